"""Write files whole or not at all; links, modes and owners are kept. Knows no formats."""

import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TEMPORARY = ".tmp"
# Errors of file systems, often FUSE or SMB, that can't open or sync a folder.
NO_FOLDER_SYNC = {
    *(errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF),
    *(errno.EACCES, errno.EPERM, errno.EISDIR, errno.EROFS),
}
MAX_LINKS = 40  # followed in a row, as on Linux


@contextmanager
def replacing(
    path: Path, staged: Path | None = None, like: os.stat_result | None = None
) -> Iterator[Path]:
    """Yield an empty hidden file that replaces `path` at the end of the block.

    The file is synced to disk first. A crash leaves `path` unchanged, and at most the hidden file.
    Symbolic links are followed and kept. The new file gets the mode, owner and group of the old one
    as far as this process may set them; before that, nobody else can read it. Other hard links to
    the old file keep the old content.

    Args:
        path: the file to write.
        staged: a path on the same file system, `path` by default; the hidden file is named after it
            and created beside it.
        like: the status whose mode, owner and group a new file gets instead of the usual ones.

    Raises:
        OSError: the folder is missing, read-only or full, or `path` can't be replaced.
    """
    path = followed(path)
    like = check_replaceable(path) or like
    staged = staged or path
    temporary = staged.with_name(f".{staged.name}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        mode = 0o666 if like is None else 0o600
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode))
        yield temporary
        sync(temporary)
        if like is not None:
            _set_owner_and_mode(temporary, like)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def followed(path: Path) -> Path:
    """Return the target of a symbolic link, which need not exist; any other path unchanged.

    Raises:
        OSError: the links lead in a circle, or can't be read.
    """
    for _ in range(MAX_LINKS):
        if not path.is_symlink():
            return path
        path = path.parent / path.readlink()
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def check_replaceable(path: Path) -> os.stat_result | None:
    """Return the status of a file that this process may replace; None if there is no file.

    Raises:
        OSError: it is a folder, a link, a pipe, a device or a mount point, or this user may not
            replace it.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file")
    if not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, "it is read-only")
    if is_mounted_apart(path, path.parent):
        raise OSError(errno.EBUSY, "it is a mount point: mount its directory instead")
    folder = path.parent.stat()
    owners = (0, status.st_uid, folder.st_uid)
    if folder.st_mode & stat.S_ISVTX and os.geteuid() not in owners:
        raise PermissionError(errno.EPERM, "it belongs to another user and its directory is sticky")
    return status


def is_mounted_apart(path: Path, folder: Path) -> bool:
    """Whether `path`, in `folder`, is a mount point, so that nothing in `folder` can replace it.

    Raises:
        OSError: one of the two is missing, or lies in a folder that can't be searched.
    """
    # Folders only: on overlayfs a file and its folder may have different devices.
    if path.is_dir() and path.stat().st_dev != folder.stat().st_dev:
        return True
    return _mount_of(path) != _mount_of(folder)


def remove_temporaries(folder: Path, names: str) -> None:
    """Remove files that killed `replacing` blocks left behind.

    `names` is a regex for the names that were being written. No other process may be writing such
    files.
    """
    left_names = re.compile(rf"\.({names})\.[0-9a-f]{{8}}{re.escape(TEMPORARY)}")
    for left in folder.glob(f".*{TEMPORARY}"):
        if left_names.fullmatch(left.name):
            left.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Create a directory unless it exists, and sync its name to disk.

    Raises:
        OSError: it can't be made, or is a file.
    """
    path.mkdir(exist_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Sync a file, or the names in a directory, to disk.

    A file system that cannot sync directories is not an error.

    Raises:
        OSError: the disk is full or broken, or `path` is missing.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC or not path.is_dir():
            raise


def _mount_of(path: Path) -> str | None:
    """Return the ID of the mount that holds a path; None if the system has no such IDs."""
    descriptor = os.open(path, getattr(os, "O_PATH", os.O_RDONLY) | os.O_CLOEXEC)
    try:
        info = Path(f"/proc/self/fdinfo/{descriptor}").read_text(encoding="ascii")
    except OSError:
        return None
    finally:
        os.close(descriptor)
    found = re.search(r"^mnt_id:\s*(\d+)", info, re.MULTILINE)
    return found[1] if found else None


def _set_owner_and_mode(path: Path, like: os.stat_result) -> None:
    """Copy owner, group and mode from `like`; narrow the mode if the group can't be set."""
    for owner, group in ((like.st_uid, -1), (-1, like.st_gid)):
        with suppress(OSError):
            os.chown(path, owner, group)
    mode = stat.S_IMODE(like.st_mode) & 0o777
    if path.stat().st_gid != like.st_gid:
        mode &= 0o707 | (mode & 0o007) << 3  # the group may do no more than others
    with suppress(OSError):  # a file system without modes
        path.chmod(mode)
