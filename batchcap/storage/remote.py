"""Object stores: files behind URLs, by fsspec. Knows no photos and no rows.

Every failure is an OSError with a reason, as for local files, so that callers handle both alike.
`file:` URLs are paths.
"""

import errno
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import unquote

from batchcap.errors import UsageError, first_line
from batchcap.schema import int64_or_none

PACKAGES = {  # by scheme
    "s3": "batchcap[s3]",
    "s3a": "batchcap[s3]",
    "gs": "batchcap[gcs]",
    "gcs": "batchcap[gcs]",
    "http": "fsspec[http]",
    "https": "fsspec[http]",
}
ERRNO_BY_TYPE = {
    FileNotFoundError: errno.ENOENT,
    FileExistsError: errno.EEXIST,
    PermissionError: errno.EACCES,
    IsADirectoryError: errno.EISDIR,
}
REFUSALS = ("PreconditionFailed", "412", "ConditionalRequestConflict")  # S3's, of an `upload`
COMPARED_BYTES = 1 << 20
ERRNO_BY_STATUS = {  # HTTP
    401: errno.EACCES,
    403: errno.EACCES,
    404: errno.ENOENT,
    410: errno.ENOENT,
}

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_FILE_SCHEME = re.compile(r"file:(//(localhost(?=/))?|(?=/))", re.IGNORECASE)
_COLONS = re.compile(r"::(?![a-z][a-z0-9+.-]*://)", re.IGNORECASE)
_COLONS_MASK = "\x1a\x1a"


class RemoteFile(NamedTuple):
    """A file as its store describes it.

    The URL of a directory ends in a slash. `size` and `mtime_ns` are None if the store does not
    report them; `version` changes whenever the file does.
    """

    url: str
    size: int | None
    mtime_ns: int | None
    version: str


def is_url(name: str) -> bool:
    """Whether this is a URL rather than a path."""
    return _SCHEME.match(name) is not None


def without_file_scheme(name: str) -> str:
    """Return the path of a `file:` URL, percent-decoded; other names unchanged."""
    scheme = _FILE_SCHEME.match(name)
    return unquote(name[scheme.end() :], errors="surrogateescape") if scheme else name


def describe(url: str) -> RemoteFile:
    """Ask the store about one file.

    Raises:
        OSError: it is missing, or can't be reached.
        UsageError: the package for such URLs is missing.
    """
    with _reaching(url) as (store, path):
        return _remote_file(url, store.info(path))


def list_folder(url: str) -> list[RemoteFile]:
    """List the files and directories directly in a directory, unsorted; `url` ends in a slash.

    If the URL contains a directory without a name (`a//`), all files below it are listed at once,
    however deep. The directory itself is listed too if it is also a non-empty file.

    Raises:
        OSError: the directory is missing, or can't be reached.
        UsageError: the package for such URLs is missing.
    """
    with _reaching(url) as (store, path):
        if _is_web(url):
            return [*_on_web(url, store.ls(path, detail=True))]
        # fsspec strips the slashes at the end of a path, but each ends a folder's name.
        address = url.partition("://")[2]
        folder = path.rstrip("/") + address[len(address.rstrip("/")) :]
        if "//" in folder:
            return _below_nameless(url, folder, store)
        return [*_in_store(url, folder, store.ls(path, detail=True))]


def _below_nameless(url: str, folder: str, store: Any) -> list[RemoteFile]:
    """List all files whose names begin with `folder`; `ls` needs directories with names."""
    named, _, below = folder.partition("//")
    infos = store.find(named, prefix=f"/{below}", detail=True)
    names = [name for name in infos if name.startswith(folder) and not name.endswith("/")]
    if not names:
        raise FileNotFoundError(errno.ENOENT, "no name with this prefix")
    return [_remote_file(url + name.removeprefix(folder), infos[name]) for name in names]


def _in_store(url: str, folder: str, infos: Iterable[dict[str, Any]]) -> Iterator[RemoteFile]:
    """List a directory of a store; a directory without a name gets a URL that ends in `//`."""
    for info in infos:
        name = info["name"]
        if name.rstrip("/") != folder.rstrip("/"):
            yield _remote_file(url + name.rstrip("/").rpartition("/")[2], info)
        elif info["type"] == "directory":
            yield _remote_file(f"{url}/", info)
        elif name.endswith("/") and info["size"]:
            yield _remote_file(url, info)


def _on_web(url: str, links: Iterable[dict[str, Any]]) -> Iterator[RemoteFile]:
    """List the links of a web page that lead below it."""
    for link in links:
        name = link["name"].partition("://")[2].removeprefix(url.partition("://")[2])
        name = name.removeprefix("./")
        if name and not name.startswith("../"):
            yield _remote_file(url + name, link)


def matching(url: str) -> list[str]:
    """Return the URLs that match a glob, sorted.

    Raises:
        OSError: the store can't be reached.
        UsageError: the package for such URLs is missing.
    """
    with _reaching(url) as (store, path):
        return sorted(map(store.unstrip_protocol, store.glob(path)))


def open_file(name: str) -> IO[bytes]:
    """Open a path or a URL for reading and seeking; a URL is read a few megabytes at a time.

    Raises:
        OSError: it is missing, or can't be reached; reading it may also raise.
        UsageError: the package for such URLs is missing.
    """
    if not is_url(name):
        return Path(name).open("rb")
    with _reaching(name) as (store, path):
        return store.open(path, "rb")


def read_file(url: str) -> bytes:
    """Return the content of a file.

    Raises:
        OSError: it is missing, or can't be reached.
        UsageError: the package for such URLs is missing.
    """
    with _reaching(url) as (store, path):
        return store.cat_file(path)


def download(url: str, path: Path) -> None:
    """Copy a file from a store to this machine. A crash can leave half of it.

    Raises:
        OSError: it is missing, or can't be reached; or the disk is full.
    """
    with _reaching(url) as (store, remote_path):
        store.get_file(remote_path, str(path))


def upload(path: Path, url: str, replaced: str) -> None:
    """Copy a file from this machine to a store, whole or not at all.

    S3 and Google's store show the file only when it is complete, and refuse it if it must be new
    but exists. S3 also refuses to replace a version other than `replaced`, unless the upload takes
    several requests (from 100 MiB on). Other stores do what they can.

    Args:
        path: the local file.
        url: its destination.
        replaced: the version that it replaces; empty if there must be none.

    Raises:
        FileExistsError: there is another version already.
        OSError: it can't be written or reached.
    """
    with _reaching(url) as (store, remote_path):
        mode = "overwrite" if replaced else "create"
        condition = {"IfMatch": replaced.partition(" ")[2]} if replaced and _is_s3(url) else {}
        store.put_file(str(path), remote_path, mode=mode, **condition)


def holds_same(url: str, path: Path) -> bool:
    """Whether a store has a file with the same bytes as a local one.

    Raises:
        OSError: one of them can't be read or reached.
    """
    try:
        with (
            _reaching(url) as (store, remote_path),
            store.open(remote_path, "rb") as stored,
            path.open("rb") as file,
        ):
            while True:
                block = stored.read(COMPARED_BYTES)
                if block != file.read(COMPARED_BYTES):
                    return False
                if not block:
                    return True
    except FileNotFoundError:
        return False


def remove(url: str) -> None:
    """Remove a file if it exists.

    Raises:
        OSError: it can't be removed or reached.
    """
    with suppress(FileNotFoundError), _reaching(url) as (store, path):
        if store.exists(path):
            store.rm_file(path)


def _remote_file(url: str, info: dict[str, Any]) -> RemoteFile:
    if info["type"] == "directory":
        return RemoteFile(url if url.endswith("/") else f"{url}/", None, None, "")
    moment, size = _moment(info), int64_or_none(info.get("size"))
    if size is not None and size < 0:
        size = None
    mark = info.get("ETag") or info.get("etag") or info.get("generation") or moment
    # In whole seconds: only listings may be more precise.
    seconds = int64_or_none(moment)
    mtime_ns = None if seconds is None else int64_or_none(seconds * 10**9)
    return RemoteFile(url, size, mtime_ns, f"{info.get('size')} {mark}")


def _moment(info: dict[str, Any]) -> float | None:
    """Return a file's modification time (Unix time), under the name that its store uses."""
    moment = info.get("LastModified") or info.get("mtime") or info.get("created")
    if isinstance(moment, datetime):
        return moment.timestamp()
    return moment if isinstance(moment, int | float) else None


@contextmanager
def _reaching(url: str) -> Iterator[tuple[Any, str]]:
    """Yield the store of a URL and the path in it; failures in the block become OSErrors."""
    fsspec = _import_fsspec()
    scheme = url.partition("://")[0].lower()
    try:
        yield _store_and_path(fsspec, scheme + url[len(scheme) :])
    except ImportError as error:
        package = PACKAGES.get(scheme, str(error))
        raise UsageError(f"{scheme}:// needs a package: pip install '{package}'") from error
    except Exception as error:  # each store has its own classes
        if not isinstance(error, OSError) and scheme not in fsspec.available_protocols():
            raise UsageError(f"unknown URL scheme {scheme}://") from error
        raise _as_os_error(_answer_of(error) if _is_web(url) else error) from error


def _store_and_path(fsspec: Any, url: str) -> tuple[Any, str]:
    """Return the store of a URL and the path in it, without a cache of listings.

    fsspec splits URLs at every `::`, even within names; this function splits only where another URL
    follows.
    """
    masked = _COLONS.sub(_COLONS_MASK, url)
    store, path = fsspec.core.url_to_fs(masked, use_listings_cache=False)
    return store, path.replace(_COLONS_MASK, "::")


def _is_s3(url: str) -> bool:
    return url.lower().startswith(("s3://", "s3a://"))


def _is_web(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def _answer_of(error: Exception) -> Exception:
    """Return the error that fsspec replaced: it reports any error status as a missing file."""
    cause = error.__cause__
    return cause if isinstance(error, FileNotFoundError) and isinstance(cause, Exception) else error


def _as_os_error(error: Exception) -> OSError:
    status = getattr(error, "status", None)
    if isinstance(status, int):
        message = f"{status} {getattr(error, 'message', '')}".strip().splitlines()[0]
        return OSError(ERRNO_BY_STATUS.get(status, errno.EIO), message)
    if _code_of(error) in REFUSALS:
        return OSError(errno.EEXIST, _reason(error))
    if isinstance(error, OSError):
        number = error.errno or ERRNO_BY_TYPE.get(type(error), errno.EIO)
        return OSError(number, error.strerror or _reason(error))
    return OSError(errno.EIO, _reason(error))


def _code_of(error: Exception) -> str:
    """Return S3's code for an error; empty for other stores."""
    response = getattr(error.__cause__, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def _import_fsspec() -> Any:
    """Import `fsspec` late, because it reads the user's settings.

    Raises:
        UsageError: the settings are wrong.
    """
    try:
        return import_module("fsspec")
    except ValueError as error:
        raise UsageError(
            f"fsspec cannot read its settings ({_reason(error)}): check the files in "
            "~/.config/fsspec and the variables FSSPEC_*"
        ) from error


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return first_line(error)
