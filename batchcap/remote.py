"""The door to object stores: files behind URLs, by fsspec. Knows no photos and no rows.

Whatever goes wrong is an OSError with a reason, as it is with files, so that callers say of both
what a user can do. `file://` URLs are paths, and nothing else.
"""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import IO, Any, NamedTuple

from batchcap.contracts import UsageError

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}  # of batchcap, by scheme
NUMBERS = {
    FileNotFoundError: errno.ENOENT,
    FileExistsError: errno.EEXIST,
    PermissionError: errno.EACCES,
    IsADirectoryError: errno.EISDIR,
}

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)


class RemoteFile(NamedTuple):
    """What a store says of a file. The URL of a folder ends in a slash.

    `mtime_ns` is None where the store tells no time; `version` is another one whenever the file is.
    """

    url: str
    size: int
    mtime_ns: int | None
    version: str


def is_url(name: str) -> bool:
    """Whether this is a URL rather than a path."""
    return _SCHEME.match(name) is not None


def without_file_scheme(name: str) -> str:
    """The path that a `file://` URL stands for; other names as they are."""
    return name.removeprefix("file://")


def describe(url: str) -> RemoteFile:
    """What the store says of one file.

    Raises:
        OSError: it is not there, or can't be reached.
        UsageError: no package for such URLs.
    """
    with _reaching(url) as (store, path):
        return _told(url, store.info(path))


def list_folder(url: str) -> list[RemoteFile]:
    """The files and folders right in a folder, in no order; `url` ends in a slash.

    Raises:
        OSError: there is nothing, or it can't be reached.
        UsageError: no package for such URLs.
    """
    with _reaching(url) as (store, path):
        folder = path.rstrip("/")
        told = store.ls(folder, detail=True)
        return [
            _told(url + name.rpartition("/")[2], info)
            for info in told
            # A store may tell of the folder itself too, as an empty file.
            if (name := info["name"].rstrip("/")) != folder
        ]


def matching(url: str) -> list[str]:
    """The URLs that a glob matches, sorted.

    Raises:
        OSError: the store can't be reached.
        UsageError: no package for such URLs.
    """
    with _reaching(url) as (store, path):
        return sorted(map(store.unstrip_protocol, store.glob(path)))


def open_file(name: str) -> IO[bytes]:
    """The file of a path or a URL, which can be sought in; of a URL, some megabytes at a time.

    Raises:
        OSError: it is not there, or can't be reached; and later, for what reading meets.
        UsageError: no package for such URLs.
    """
    if not is_url(name):
        return Path(name).open("rb")
    with _reaching(name) as (store, path):
        return store.open(path, "rb")


def read_file(url: str) -> bytes:
    """All of a file.

    Raises:
        OSError: it is not there, or can't be reached.
        UsageError: no package for such URLs.
    """
    with _reaching(url) as (store, path):
        return store.cat_file(path)


def download(url: str, path: Path) -> None:
    """Copy a file to here. A crash leaves half of it.

    Raises:
        OSError: it is not there, or can't be reached; or the disk is full.
    """
    with _reaching(url) as (store, remote_path):
        store.get_file(remote_path, str(path))


def upload(path: Path, url: str, must_be_new: bool) -> None:
    """Copy a file from here, whole or not at all.

    S3 and Google's store make the file appear with its last byte, and refuse one that has come in
    between where it must be new; other stores do as well as they can.

    Raises:
        FileExistsError: there is one already that must not be.
        OSError: it can't be written or reached.
    """
    with _reaching(url) as (store, remote_path):
        store.put_file(str(path), remote_path, mode="create" if must_be_new else "overwrite")


def remove(url: str) -> None:
    """Remove a file, if it is there.

    Raises:
        OSError: it can't be removed or reached.
    """
    with _reaching(url) as (store, path):
        if store.exists(path):
            store.rm_file(path)


def _told(url: str, info: dict[str, Any]) -> RemoteFile:
    if info["type"] == "directory":
        return RemoteFile(f"{url.rstrip('/')}/", 0, None, "")
    moment = _moment(info)
    mark = info.get("ETag") or info.get("etag") or info.get("generation") or moment
    # In whole seconds: a listing may tell more, but no other answer does.
    mtime_ns = None if moment is None else int(moment) * 10**9
    return RemoteFile(url, int(info["size"] or 0), mtime_ns, f"{info['size']} {mark}")


def _moment(info: dict[str, Any]) -> float | None:
    """When the file was written, in Unix time, by the names that S3, Google and others give it."""
    told = info.get("LastModified") or info.get("mtime") or info.get("created")
    if isinstance(told, datetime):
        return told.timestamp()
    return told if isinstance(told, int | float) else None


@contextmanager
def _reaching(url: str) -> Iterator[tuple[Any, str]]:
    """The store of a URL and the path there, with what goes wrong as an OSError."""
    fsspec = _import_fsspec()
    scheme = url.partition("://")[0].lower()
    try:
        # Without its cache of listings, which would tell what was there before.
        yield fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        package = f"batchcap[{EXTRAS[scheme]}]" if scheme in EXTRAS else str(error)
        raise UsageError(f"{scheme}:// needs a package: pip install '{package}'") from error
    except OSError as error:
        number = error.errno or NUMBERS.get(type(error), errno.EIO)
        raise OSError(number, error.strerror or _reason(error)) from error
    except Exception as error:  # each store has its own
        if scheme not in fsspec.available_protocols():
            raise UsageError(f"{scheme}:// is no kind of URL that batchcap knows") from error
        raise OSError(errno.EIO, _reason(error)) from error


def _import_fsspec() -> Any:
    """Imported when it is needed, for it reads the user's settings.

    Raises:
        UsageError: these are wrong.
    """
    try:
        return import_module("fsspec")
    except ValueError as error:
        raise UsageError(
            f"fsspec cannot read its settings ({_reason(error)}): see to the files in "
            "~/.config/fsspec and to the variables FSSPEC_*"
        ) from error


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
