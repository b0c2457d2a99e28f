"""Paths of an output's files: on this machine, in a store, in shards.

A data set's directory has only its parts and hidden empty files: Polars refuses a directory with
any other file. All other files are beside the directory under hidden names, or inside it if it is a
mount point or a bucket, or if its parent is not writable.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from batchcap.errors import OtherOutputError, UsageError
from batchcap.process.environment import cache_folder
from batchcap.rows.mirror import Mirror, describe_if_there
from batchcap.rows.parquet import saying_where
from batchcap.storage.files import followed, is_mounted_apart, replacing, sync
from batchcap.storage.remote import RemoteFile, list_folder

PART = re.compile(r"part-([0-9]{6}|[1-9][0-9]{6,})\.parquet")
MANIFEST = "manifest.json"
SUMMARY = "summary.json"
MARK = ".complete-"
SHARD = re.compile(r"shard-\d{5}-of-\d{5}")


@dataclass(frozen=True)
class Layout:
    """Paths of an output and its other files; for a store, those of the working copy."""

    output: Path
    mirror: Mirror | None = None

    def __str__(self) -> str:
        """Return the output's path or URL, as users know it."""
        if self.mirror is None:
            return str(self.output)
        return self.mirror.url + (self.output.name if self.is_file else "")

    @property
    def is_file(self) -> bool:
        """Whether the output is one Parquet file rather than a directory of parts."""
        return _is_file(self.output.name)

    @property
    def parts(self) -> Path:
        """Directory of the parts."""
        return self.output.with_name(f".{self.output.name}.parts") if self.is_file else self.output

    @property
    def lock(self) -> Path:
        """File that a run locks."""
        if self.is_file:
            return self.output.with_name(f".{self.output.name}.lock")
        return self.output / ".lock"  # inside: the same file wherever the directory is mounted

    @property
    def manifest(self) -> Path:
        """List of a data set's parts; a single file has no manifest."""
        return self._inside_or_beside(MANIFEST)

    @property
    def summary(self) -> Path:
        """The summary of the last run."""
        if self.is_file:
            return self.output.with_suffix(f".{SUMMARY}")
        return self._inside_or_beside(SUMMARY)

    def mark(self, digest: str) -> Path:
        """Empty file that marks a data set as complete, by a digest of its parts.

        It is in the directory, so that it is moved and copied with the parts.
        """
        return self.output / f"{MARK}{digest}"

    def marks(self) -> list[Path]:
        """Marks of a data set: one, or none while it is incomplete."""
        return list(self.output.glob(f"{MARK}*"))

    def staged(self, part: Path) -> Path:
        """Path beside which a part's temporary and damaged files are written."""
        return part if self.is_file or not self._has_room_beside else self._beside(part.name)

    def row_files(self) -> list[Path]:
        """Return the files with rows, oldest first."""
        if self.parts.is_dir():
            parts = filter(is_part, self.parts.glob("part-*.parquet"))
            return sorted(parts, key=number_of)
        return [self.output] if self.is_file and self.output.exists() else []

    def temporaries(self) -> Iterator[tuple[Path, str]]:
        """Yield directory and name regex of the files that a killed run may have left."""
        if self.is_file:
            ours = [self.output, self.summary]
        else:
            names = (MANIFEST, SUMMARY)
            ours = [place(name) for place in (self._inside, self._beside) for name in names]
            beside = self._beside("")
            yield beside.parent, re.escape(beside.name) + PART.pattern
        yield from ((path.parent, re.escape(path.name)) for path in ours)
        yield self.parts, PART.pattern

    def refresh(self) -> None:
        """Update the working copy from the store; the caller holds the lock.

        Raises:
            OutputError: the store can't be reached, or the disk is full.
        """
        if self.mirror is None:
            return
        with saying_where(self.mirror.url):
            there = self._stored(self.mirror)
        here = [self.output] if self.is_file else [*self.row_files(), self.manifest, *self.marks()]
        changed = self.mirror.pull(there, [*here, self.summary])
        if self.is_file and self.output.name in changed:  # the parts extend the old file
            shutil.rmtree(self.parts, ignore_errors=True)

    def move_out(self) -> None:
        """Move files that earlier versions left in a data set's directory.

        The caller holds the lock.

        Raises:
            OSError: a file can't be moved.
            OutputError: the store can't be reached, or doesn't allow it.
        """
        if self.is_file or not self._has_room_beside:
            return
        moves = {self._inside(name): self._beside(name) for name in (MANIFEST, SUMMARY)}
        damaged = re.compile(rf"\.{PART.pattern}\..*\.damaged")
        for path in self.output.glob(".part-*.damaged"):
            if damaged.fullmatch(path.name):
                moves[path] = self._beside(path.name.removeprefix("."))
        for inside, beside in moves.items():
            if inside.exists():
                inside.replace(beside)
                sync(beside.parent)
                self.publish(beside)
                self.publish(inside)

    def fetch_again(self, path: Path) -> bool:
        """Replace a damaged file of rows by the store's; False if the store has none.

        Raises:
            LockedError: another run has written it meanwhile.
            OutputError: the store can't be reached, or the disk is full.
        """
        if self.mirror is None:
            return False
        # A single file's first part is a copy of the file itself.
        copy = self.output if self.is_file and path.name == FIRST_PART else path
        if not self.mirror.fetch_again(copy):
            return False
        if copy != path:
            with saying_where(path), replacing(path) as temporary:
                shutil.copyfile(copy, temporary)
        return True

    def publish(self, path: Path) -> None:
        """Copy a file that was written, or remove one that was removed, in the store, if any.

        Raises:
            LockedError: another run has written it meanwhile.
            OutputError: the store can't be reached, or doesn't allow it.
        """
        if self.mirror is not None:
            self.mirror.push(path)

    def _inside(self, name: str) -> Path:
        return self.output / f"_{name}"

    def _beside(self, name: str) -> Path:
        """Return the path of a hidden file beside a data set's directory."""
        if self.mirror is not None:
            return self.mirror.home / f"{self.mirror.prefix_beside}{name}"
        folder, data_set = _data_set_of(Path(os.path.realpath(self.output)))
        return Path(folder) / f".{data_set}.{name}"

    def _inside_or_beside(self, name: str) -> Path:
        """Return the path of a data set's file; if it is in both places, the newer is inside."""
        inside, beside = self._inside(name), self._beside(name)
        if inside.exists() or not (beside.exists() or self._has_room_beside):
            return inside
        return beside

    @property
    def _has_room_beside(self) -> bool:
        """Whether files can be written beside a data set's directory, and moved into it."""
        if self.mirror is not None:
            return self.mirror.url != self.mirror.url_beside
        folder = self._beside(MANIFEST).parent
        if not os.access(folder, os.W_OK | os.X_OK):
            return False
        return not self.output.exists() or not is_mounted_apart(self.output, folder)

    def _stored(self, mirror: Mirror) -> list[RemoteFile]:
        if self.is_file:
            return _described(mirror.url + path.name for path in (self.output, self.summary))
        ours = (f"{MARK}*", self._inside(MANIFEST).name, self._inside(SUMMARY).name)
        found = []
        for file in _files_in(mirror.url):
            name = file.url.removeprefix(mirror.url)
            if PART.fullmatch(name) or any(fnmatchcase(name, pattern) for pattern in ours):
                found.append(file)
        if self._has_room_beside:
            beside = (self._beside(name).name for name in (MANIFEST, SUMMARY))
            found += _described(mirror.url_beside + name for name in beside)
        return found


def is_part(path: Path) -> bool:
    """Whether a file is named like a part."""
    return PART.fullmatch(path.name) is not None


def number_of(part: Path) -> int:
    """Return the number of a part; names are out of order from 1,000,000 on."""
    return int(part.stem.removeprefix("part-"))


def part_name(number: int) -> str:
    """Return the name of a part, which `is_part` recognises."""
    return f"part-{number:06}.parquet"


FIRST_PART = part_name(0)  # the previous `OUTPUT.parquet`


def layout_of(output: Path | str, shard: tuple[int, int] = (0, 1)) -> Layout:
    """Return the layout of an output, or of one of its shards (index, count); a str is a URL.

    A shard of `OUTPUT/` is `OUTPUT/shard-00000-of-00004/`, of `OUTPUT.parquet` it is
    `OUTPUT-00000-of-00004.parquet`. Symbolic links are followed. The working copy of an output in a
    store is in the user's cache directory, which is created.

    Raises:
        UsageError: it is a link named like a file to a directory, or vice versa.
        OutputError: it is a circular link, or the cache directory can't be created.
    """
    index, count = shard
    output = _followed(output)
    if count > 1:
        output = _followed(_shard_of(output, f"{index:05}-of-{count:05}"))
    return Layout(output) if isinstance(output, Path) else _mirrored(output)


def check_shards(output: Path | str, count: int) -> None:
    """Check that an output has no other number of shards than `count`; 1 means no shards.

    Only `OUTPUT.parquet` may be beside its shards: `merge` writes it.

    Raises:
        OtherOutputError: it has, so that every photo would get a second row.
        OutputError: the store can't be reached.
    """
    output = _followed(output)
    is_file = _is_file(_parted(output)[1])
    if count == 1 and is_file and _has_rows(output):
        return
    names = _names_around(output)
    shards, rows = _shards_among(names, output), _rows_among(names, output)
    others = {number for _, number in shards} - {count}
    if others:
        raise OtherOutputError(
            f"{output} has {max(others)} shards: use --shard I/{max(others)}, or choose "
            "another OUTPUT"
        )
    if count > 1 and rows and not shards:
        raise OtherOutputError(
            f"{output} has no shards: run without --shard, or choose another OUTPUT"
        )
    if count > 1 and rows and not is_file:
        raise OtherOutputError(
            f"{output} has rows outside of its shards, in {rows[0]}: move these files away, "
            "or choose another OUTPUT"
        )


def existing_shards(output: Path | str) -> set[tuple[int, int]]:
    """Return index and count of an output's existing shards, finished or not.

    Raises:
        OutputError: the store can't be reached.
    """
    output = _followed(output)
    return _shards_among(_names_around(output), output)


def _names_around(output: Path | str) -> list[str]:
    """Return the names in the directory with an output's shards."""
    folder, name = _parted(output)
    with saying_where(output):
        return _names_in(folder if _is_file(name) else output)


def _shards_among(names: Iterable[str], output: Path | str) -> set[tuple[int, int]]:
    _, shard = _parted(_shard_of(output, "NUMBERS"))
    numbered = re.escape(shard).replace("NUMBERS", r"(\d{5})-of-(\d{5})")
    pattern = re.compile(rf"\.?{numbered}(\.parts)?")
    matches = map(pattern.fullmatch, names)
    return {(int(match[1]), int(match[2])) for match in matches if match}


def _rows_among(names: Iterable[str], output: Path | str) -> list[str]:
    """Return the names of files and directories with rows outside of shards."""
    _, name = _parted(output)
    if _is_file(name):
        return [found for found in names if found in (name, f".{name}.parts")]
    return [found for found in names if PART.fullmatch(found)]


def _has_rows(file: Path | str) -> bool:
    if isinstance(file, Path):
        return bool(Layout(file).row_files())
    with saying_where(file):
        return describe_if_there(file) is not None


def _followed(output: Path | str) -> Path | str:
    if not isinstance(output, Path):
        return output
    with saying_where(output):
        target = followed(output)
    if _is_file(target.name) != _is_file(output.name):
        raise UsageError(
            f"OUTPUT {output} links to {target}; both must end in .parquet, or neither: give the "
            "target"
        )
    return target


def _data_set_of(output: Path | str) -> tuple[Path | str, str]:
    """Return the directory around a data set, and its name within hidden names there."""
    folder, name = _parted(output)
    if SHARD.fullmatch(name):
        folder, data_set = _parted(folder)
        name = f"{data_set}.{name}"
    return folder, name


def _shard_of(output: Path | str, mark: str) -> Path | str:
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
    around, data_set = _data_set_of(url)
    if str(around).endswith(":/"):  # nothing is beside a bucket
        around = place
    with saying_where(files):
        files.mkdir(parents=True, exist_ok=True)
        for made in (files, home, home.parent):
            sync(made.parent)
    return Layout(copy, Mirror(f"{place}/", files, home, f"{around}/", f".{data_set}."))


def _parted(output: Path | str) -> tuple[Path | str, str]:
    """Return an output's parent directory and name."""
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
    except FileNotFoundError:  # a store has no empty folders
        return []


def _described(urls: Iterable[str]) -> list[RemoteFile]:
    return [file for file in map(describe_if_there, urls) if file is not None]
