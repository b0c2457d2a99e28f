"""A directory of a store and its working copy: pulled first, then pushed file by file.

Hidden files beside the directory that belong to it are copied too. A file appears in the store
whole, under its final name, or not at all. A store has no lock that is freed when a run dies.
Instead, a file is pushed only if the store still has the version that this run left or found: of
two runs that write at the same time, the second is refused. Knows nothing of the files' content.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from batchcap.errors import LockedError
from batchcap.rows.parquet import saying_where
from batchcap.storage.files import replace_text, replacing
from batchcap.storage.remote import RemoteFile, describe, download, holds_same, remove, upload

RECORD = ".remote.json"


class Copy(NamedTuple):
    """The store's version of which a local file is a copy, and the file's state at that time."""

    version: str
    size: int
    mtime_ns: int


@dataclass
class Mirror:
    """The files directly in `url`, which ends in a slash, and their copies in `folder`.

    Files whose names begin with `prefix_beside` are directly in `url_beside` and in `home`, which
    also has the record of copies. One process at a time may use it.
    """

    url: str
    folder: Path
    home: Path
    url_beside: str
    prefix_beside: str
    _copies: dict[str, Copy] = field(default_factory=dict)

    def pull(self, there: Iterable[RemoteFile], here: Iterable[Path]) -> set[str]:
        """Make the local files equal to the store's, `there`, and remove all others.

        `here` are files that may exist locally without having reached the store. Returns the names
        of files that somebody else has changed since the last run here.

        Raises:
            OutputError: the store can't be reached, or the disk is full.
        """
        stored = {file.url.rpartition("/")[2]: file for file in there}
        with saying_where(self.url):
            self._copies = self._read_record()
            names = stored.keys() | self._copies.keys() | {path.name for path in here}
            changed = {name for name in names if self._version(name) != _version(stored.get(name))}
            for name in names:
                if name in changed or self._copies.get(name) != self._copy_of(name):
                    self._copies.pop(name, None)
                    self._path(name).unlink(missing_ok=True)
            for name in stored.keys() - self._copies.keys():
                self._fetch(name, stored[name])
            self._write_record()
        return changed

    def push(self, path: Path) -> None:
        """Make a file in the store equal to the local one, or remove it with the local one.

        Files outside of the mirror are ignored.

        Raises:
            LockedError: somebody else has written it meanwhile.
            OutputError: the store can't be reached, or doesn't allow it.
        """
        if path != self._path(path.name):
            return
        url, before = self._url(path.name), self._version(path.name)
        with saying_where(url):
            if before and _version(describe_if_there(url)) != before:
                raise _overtaken(url)
            if not path.exists():
                if before:
                    remove(url)
                self._copies.pop(path.name, None)
            else:
                self._note(path.name, _uploaded(path, url, before))
            self._write_record()

    def fetch_again(self, path: Path) -> bool:
        """Replace a local file by the store's; False if the store has none.

        Raises:
            LockedError: somebody else has written it since `pull`.
            OutputError: the store can't be reached, or the disk is full.
        """
        if path != self._path(path.name):
            return False
        url = self._url(path.name)
        with saying_where(url):
            stored = describe_if_there(url)
            if _version(stored) != self._version(path.name):
                raise _overtaken(url)
            if stored is None:
                return False
            self._fetch(path.name, stored)
            self._write_record()
        return True

    def _path(self, name: str) -> Path:
        return (self.home if name.startswith(self.prefix_beside) else self.folder) / name

    def _url(self, name: str) -> str:
        return (self.url_beside if name.startswith(self.prefix_beside) else self.url) + name

    def _fetch(self, name: str, file: RemoteFile) -> None:
        with replacing(self._path(name)) as temporary:
            download(file.url, temporary)
        self._note(name, file)

    def _note(self, name: str, file: RemoteFile) -> None:
        status = self._path(name).stat()
        self._copies[name] = Copy(file.version, status.st_size, status.st_mtime_ns)

    def _version(self, name: str) -> str:
        return self._copies[name].version if name in self._copies else ""

    def _copy_of(self, name: str) -> Copy | None:
        """Return the record of a local file if the file is untouched."""
        try:
            status = self._path(name).stat()
        except FileNotFoundError:
            return None
        return Copy(self._version(name), status.st_size, status.st_mtime_ns)

    def _read_record(self) -> dict[str, Copy]:
        try:
            record = json.loads((self.home / RECORD).read_text(encoding="utf-8"))
            return {name: Copy(*copy) for name, copy in record.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def _write_record(self) -> None:
        replace_text(self.home / RECORD, json.dumps(self._copies))


def _uploaded(path: Path, url: str, before: str) -> RemoteFile:
    """Upload a file in place of the version `before`, empty for none; return its description.

    If an answer is lost, the client repeats the request, and its own first write then makes the
    store refuse the second.

    Raises:
        LockedError: somebody else has written the file meanwhile.
        OSError: it can't be written or reached.
    """
    try:
        upload(path, url, before)
    except (FileExistsError, FileNotFoundError) as error:
        if not holds_same(url, path):
            if before or isinstance(error, FileExistsError):
                raise _overtaken(url) from error
            raise
    stored = describe(url)
    if stored.size not in (None, path.stat().st_size):
        raise _overtaken(url)
    return stored


def _version(file: RemoteFile | None) -> str:
    return file.version if file is not None else ""


def describe_if_there(url: str) -> RemoteFile | None:
    """Describe a file of a store; None if it does not exist."""
    try:
        return describe(url)
    except FileNotFoundError:
        return None


def _overtaken(url: str) -> LockedError:
    return LockedError(
        f"another run is writing this output: {url} has changed; let one run end, and run again"
    )
