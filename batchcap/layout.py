"""Where an output and what belongs to it lies: here, in a store, in shares. Names only."""

import hashlib
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from batchcap.contracts import OtherOutputError
from batchcap.mirror import Mirror
from batchcap.remote import RemoteFile, describe, list_folder
from batchcap.row_files import saying_where
from batchcap.surroundings import cache_folder

PARTS = f"part-{'[0-9]' * 6}.parquet"
MANIFEST = "_manifest.json"
SUMMARY = "_summary.json"


@dataclass(frozen=True)
class Layout:
    """Where an output and what belongs to it lies; of one in a store, the working copy."""

    output: Path
    mirror: Mirror | None = None

    def __str__(self) -> str:
        """The output as its user knows it."""
        if self.mirror is None:
            return str(self.output)
        return self.mirror.url + (self.output.name if self.is_file else "")

    @property
    def is_file(self) -> bool:
        """Whether it is one Parquet file rather than a folder of parts."""
        return self.output.suffix == ".parquet"

    @property
    def parts(self) -> Path:
        """The folder of parts."""
        return self.output.with_name(f".{self.output.name}.parts") if self.is_file else self.output

    @property
    def lock(self) -> Path:
        """The file that a run locks."""
        if self.is_file:
            return self.output.with_name(f".{self.output.name}.lock")
        return self.output / ".lock"

    @property
    def summary(self) -> Path:
        """The account of the last run."""
        if self.is_file:
            return self.output.with_suffix(".summary.json")
        return self.output / SUMMARY

    def row_files(self) -> list[Path]:
        """The files that hold the rows so far, oldest first."""
        if self.parts.is_dir():
            return sorted(self.parts.glob(PARTS))
        return [self.output] if self.is_file and self.output.exists() else []

    def refresh(self) -> None:
        """Make the working copy what the store has; the caller holds the lock.

        Raises:
            OutputError: the store can't be reached, or the disk is full.
        """
        if self.mirror is None:
            return
        with saying_where(self.mirror.url):
            there = self._stored(self.mirror.url)
        changed = self.mirror.pull(there)
        if self.is_file and self.output.name in changed:  # what the parts went on from is no more
            shutil.rmtree(self.parts, ignore_errors=True)

    def publish(self, path: Path) -> None:
        """Put a file that was written, or removed, into the store as well, if there is one.

        Raises:
            LockedError: another run has written it meanwhile.
            OutputError: the store can't be reached, or doesn't allow it.
        """
        if self.mirror is not None:
            self.mirror.push(path)

    def _stored(self, url: str) -> list[RemoteFile]:
        if self.is_file:
            found = []
            for path in (self.output, self.summary):
                with suppress(FileNotFoundError):
                    found.append(describe(url + path.name))
            return found
        ours = (PARTS, MANIFEST, SUMMARY)
        return [
            file
            for file in _files_in(url)
            if any(fnmatchcase(file.url.removeprefix(url), name) for name in ours)
        ]


def layout_of(output: Path | str, share: tuple[int, int] = (0, 1)) -> Layout:
    """The layout of an output, or of one of its shares (which, of how many); a str is a URL.

    A share of `OUTPUT/` is `OUTPUT/shard-00000-of-00004/`, of `OUTPUT.parquet` it is
    `OUTPUT-00000-of-00004.parquet`. The working copy of what is in a store lies in the user's cache
    folder, which is made.
    """
    index, count = share
    if count > 1:
        output = _share_of(output, f"{index:05}-of-{count:05}")
    return Layout(output) if isinstance(output, Path) else _mirrored(output)


def check_shares(output: Path | str, count: int) -> None:
    """See that an output is not there in another number of shares than `count`.

    Raises:
        OtherOutputError: it is.
        OutputError: the store can't be reached.
    """
    others = {number for _, number in shares_there(output)} - {count}
    if others:
        raise OtherOutputError(
            f"{output} is in {max(others)} shares: give --shard I/{max(others)}, or choose "
            "another OUTPUT"
        )


def shares_there(output: Path | str) -> set[tuple[int, int]]:
    """Which shares of an output are there, finished or not, and of how many.

    Raises:
        OutputError: the store can't be reached.
    """
    folder, name = _parted(output)
    _, share = _parted(_share_of(output, "NUMBERS"))
    numbered = re.escape(share).replace("NUMBERS", r"(\d{5})-of-(\d{5})")
    pattern = re.compile(rf"\.?{numbered}(\.parts)?")
    with saying_where(output):
        names = _names_in(folder if _is_file(name) else output)
    matches = map(pattern.fullmatch, names)
    return {(int(match[1]), int(match[2])) for match in matches if match}


def _share_of(output: Path | str, mark: str) -> Path | str:
    folder, name = _parted(output)
    if _is_file(name):
        return _joined(folder, f"{name.removesuffix('.parquet')}-{mark}.parquet")
    return _joined(output, f"shard-{mark}")


def _mirrored(url: str) -> Layout:
    folder, name = _parted(url)
    digest = hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]
    home = cache_folder("outputs") / digest
    copy = home / name
    files, place = (home, folder) if _is_file(name) else (copy, url.rstrip("/"))
    with saying_where(files):
        files.mkdir(parents=True, exist_ok=True)
    return Layout(copy, Mirror(f"{place}/", files, home))


def _parted(output: Path | str) -> tuple[Path | str, str]:
    """The folder that an output is in, and its name there."""
    if isinstance(output, Path):
        return output.parent, output.name
    folder, _, name = output.rstrip("/").rpartition("/")
    return folder, name


def _joined(folder: Path | str, name: str) -> Path | str:
    return folder / name if isinstance(folder, Path) else f"{folder.rstrip('/')}/{name}"


def _is_file(name: str) -> bool:
    return name.endswith(".parquet")


def _names_in(folder: Path | str) -> list[str]:
    if isinstance(folder, Path):
        return [path.name for path in folder.iterdir()] if folder.is_dir() else []
    url = f"{folder.rstrip('/')}/"
    return [file.url.removeprefix(url).rstrip("/") for file in _files_in(url)]


def _files_in(url: str) -> list[RemoteFile]:
    try:
        return list_folder(url)
    except FileNotFoundError:  # stores have folders only where there are files in them
        return []
