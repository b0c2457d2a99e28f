"""What ends a command: exceptions worded for users, with their exit codes."""

TOO_MANY_FAILED = 3  # the exit code of a run that finished with more failures than were allowed


class BatchcapError(Exception):
    """A failure of the whole job, worded for the user.

    BatchcapError         1
    ├── UsageError        2   what was asked for cannot be
    ├── InputError        1   photos or annotations
    ├── ModelError        1   a model directory
    └── OutputError       1   the place to write to
        ├── OtherOutputError  4   it belongs to another model or other settings
        └── LockedError       5   another run holds it
    """

    exit_code = 1


class UsageError(BatchcapError):
    exit_code = 2


class InputError(BatchcapError):
    pass


class ModelError(BatchcapError):
    pass


class OutputError(BatchcapError):
    pass


class OtherOutputError(OutputError):
    exit_code = 4


class LockedError(OutputError):
    exit_code = 5


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the error's type where it has no message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
