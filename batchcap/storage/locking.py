"""Locks between processes; the operating system frees them when a process dies."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from batchcap.errors import LockedError, OutputError


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path` during the block; remove it afterwards.

    Uses `flock(2)` on a descriptor that child processes do not inherit: a killed process leaves the
    file, but not the lock.

    Raises:
        LockedError: another process holds it.
        OutputError: the file can't be made, or its file system has no locks.
    """
    descriptor = _acquire(path)
    try:
        yield
    finally:
        try:
            # Still locked, so that `_acquire` notices. A file left behind does no harm.
            with suppress(OSError):
                if _is_still(path, descriptor):
                    path.unlink()
        finally:
            os.close(descriptor)


def _acquire(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    while True:
        try:
            descriptor = os.open(path, flags, 0o666)
        except OSError as error:
            raise OutputError(
                f"cannot write {path}: {error.strerror}; free the disk or choose another OUTPUT"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(path, descriptor):
                return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise LockedError(
                f"another run is writing this output (it holds {path}): wait until it ends"
            ) from error
        except OSError as error:
            os.close(descriptor)
            raise OutputError(
                f"cannot lock {path} ({error.strerror}), so two runs could write at once: choose "
                "an OUTPUT on a file system with locks"
            ) from error
        os.close(descriptor)


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether the open file is still at `path`, not removed by another process."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
