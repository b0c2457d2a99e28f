"""Files that are whole or not there. Knows no formats."""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = ".tmp"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden path beside `path` that takes its place when the block ends well and is on disk.

    A crash leaves `path` as it was, and at most the hidden file.

    Raises:
        OSError: the folder is missing, read-only or full, or `path` is a pipe or a device.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "it is no plain file, which could be replaced")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove_temporaries(folder: Path, names: str) -> None:
    """Remove what killed processes left of `replacing` the files that the glob `names` matches.

    No other process may be writing such files.
    """
    for left in folder.glob(f".{names}.{'[0-9a-f]' * 8}{TEMPORARY}"):
        left.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file or the names in a folder have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
