"""Exceptions that end a command, worded for users, with their exit codes."""

TOO_MANY_FAILED = 3  # exit code of a run with more failures than allowed


class BatchcapError(Exception):
    """A failure of the whole job, worded for the user.

    BatchcapError         1
    ├── UsageError        2   an invalid or impossible request
    ├── InputError        1   photos or annotations
    ├── ModelError        1   a model directory
    └── OutputError       1   the output
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
    """Return the first line of an error's message, or the error's type if it has no message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
