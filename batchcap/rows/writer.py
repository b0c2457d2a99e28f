"""The output: rows are committed in parts; committed rows are never lost or duplicated.

A part is a Parquet file that a rename puts in place: at that moment its rows begin to exist.
`OUTPUT/` is the directory of parts itself, a data set that others can read at any moment.
`OUTPUT.parquet` has its parts in a hidden directory beside it. The first part is the old file, and
all parts replace it at the end of a run. Everything else (the index, the manifest) is derived from
the parts: if two parts have a row of one image, the newer part's counts, and the other row is
dropped later. Knows no photos and no models.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchcap.errors import OtherOutputError, OutputError
from batchcap.rows.id_hashes import Hashes, hashes_of
from batchcap.rows.index import Place, RowIndex, entries_of, without
from batchcap.rows.layout import FIRST_PART, Layout, number_of, part_name
from batchcap.rows.parquet import (
    WAYS_OUT,
    DamagedError,
    Row,
    is_of_newest_schema,
    read_file_metadata,
    read_group,
    read_groups,
    saying_where,
    schema_of,
    table_of,
    with_columns_of,
    write_rows,
)
from batchcap.schema import ARROW_SCHEMA, READABLE_SCHEMAS, SCHEMA_VERSION
from batchcap.settings import OnExisting, Precision
from batchcap.storage.files import (
    check_replaceable,
    make_folder,
    remove_temporaries,
    replace_text,
    replacing,
    sync,
)
from batchcap.storage.locking import locked

# Metadata that all rows of an output share, and its names for users.
IDENTITY = {
    "batchcap.schema": "schema",
    "batchcap.model": "model",
    "batchcap.decode": "decoding",
    "batchcap.precision": "precision",
    "batchcap.int8": "int8 backbone",
    "batchcap.attention": "attention",
}
# Columns that a copy of a captioned photo gets too.
CAPTION_COLUMNS = (
    *("caption", "tokens", "token_ids", "token_logprobs", "logprob", "mean_logprob", "finished"),
    *("attention", "attention_map", "caption_source", "edited_at", "familiarity"),
)
INCOMPLETE = {"batchcap.complete": "false"}  # metadata of a file after a run that skipped photos
ROWS_PER_GROUP = 4096
GROUPS_AT_HAND = 4  # of captions to reuse: renamed photos come in the order of their rows

Read = TypeVar("Read")

log = logging.getLogger(__name__)


@dataclass
class RowFile:
    """A file of rows, its number of rows, and whether its schema is an earlier one."""

    path: Path
    rows: int
    is_outdated: bool = False


@dataclass(frozen=True)
class Upgrades:
    """How existing rows of earlier versions, or of an `auto` setting, fit new rows.

    decode_defaults: of decode settings that a file of an earlier version lacks. keeps_precision:
    whether the precision of existing rows is kept. has_shipped_model: whether the model is the
    shipped one, which new versions replace.
    """

    decode_defaults: Mapping[str, object] = field(default_factory=dict)
    keeps_precision: bool = False
    has_shipped_model: bool = False

    def comparable(self, metadata: Mapping[str, str]) -> dict[str, str | None]:
        """Return the metadata that must be equal, converted to this version."""
        values = {key: metadata.get(key) for key in IDENTITY}
        if values["batchcap.schema"] in READABLE_SCHEMAS:
            values["batchcap.schema"] = str(SCHEMA_VERSION)
        with suppress(ValueError, TypeError, KeyError):
            decode = {**self.decode_defaults, **json.loads(metadata["batchcap.decode"])}
            values["batchcap.decode"] = json.dumps(decode, sort_keys=True)
        return values


class CaptionFolder:
    """An output locked for this run: its index, and where new rows go."""

    def __init__(
        self,
        layout: Layout,
        metadata: dict[str, str],
        files: list[RowFile],
        index: RowIndex,
        overwrite: bool,
        like: os.stat_result | None,
    ) -> None:
        self.layout, self.metadata, self.index = layout, metadata, index
        self._files = files  # those of the index first, in its order
        self._overwrite = overwrite
        self._like = like  # whose mode and owner new files get
        self._begun = False
        self._pending: list[pa.Table] = []
        self._replaced: dict[int, list[Hashes]] = {}  # images of pending rows, by file
        self._superseded = {file: [hashes] for file, hashes in index.superseded.items()}
        self._has_own_doubles = False
        self._captions = lru_cache(GROUPS_AT_HAND)(self._read_captions)

    @property
    def pending(self) -> int:
        """Number of rows that are not committed yet."""
        return sum(map(len, self._pending))

    def append(self, rows: list[Row], again: bool = False) -> None:
        """Add rows to the next part; each replaces its image's existing row.

        `again` means that some of these images got rows in this run, which are replaced too.
        """
        if not rows:
            return
        if again:
            self.commit()  # in one part, neither row would be the newer
            self._has_own_doubles = True
        hashes = hashes_of([row["image_id"] for row in rows])
        known = self.index.find_all(hashes)
        hashes, files = hashes[known >= 0], self.index.files_of(known[known >= 0])
        for file in set(files.tolist()):
            self._replaced.setdefault(file, []).append(hashes[files == file])
        self._pending.append(table_of(rows))

    def commit(self) -> None:
        """Write all pending rows to disk as one part.

        A crash at any line loses at most these rows; the rows that they replace still exist.

        Raises:
            OutputError: the folder is read-only or full; what was committed before is intact.
        """
        if not self._pending:
            return
        self._begin()
        part = RowFile(self.layout.parts / part_name(self._next_number()), self.pending)
        self._write(part.path, [pa.concat_tables(self._pending)])
        self._files.append(part)
        self._pending = []
        for file, hashes in self._replaced.items():
            self._superseded.setdefault(file, []).extend(hashes)
        self._replaced = {}
        self._write_manifest(complete=False)

    def drop_superseded(self, progress: Callable[[], object] = lambda: None) -> None:
        """Rewrite a data set's files without rows that committed ones replace.

        Files of an earlier schema are rewritten too, so that all are alike. `progress` is called
        after each file. The next run completes what a crash prevents. A single file is rewritten
        only at the end.

        Raises:
            OutputError: the folder is read-only or full; no row is lost.
        """
        if self.layout.is_file or not self._begun:
            return
        outdated = {number for number, file in enumerate(self._files) if file.is_outdated}
        numbers = sorted(outdated | self._superseded.keys())
        for number in numbers:
            file = self._files[number]
            with _damage_reported():
                schema = schema_of([file.path])
            file.rows = self._write(file.path, self._current_rows(number), schema)
            file.is_outdated = False
            self._superseded.pop(number, None)
            progress()
        if numbers:
            self._write_manifest(complete=False)

    def reusable(self, sha256: str) -> Row | None:
        """Return the caption of a photo with these bytes from before this run, or None."""
        for place in self.index.places_of(sha256):
            with suppress(DamagedError):  # since the run began: the photo is captioned
                table, row_of = self._captions(place)
                if sha256 in row_of:
                    return table.slice(row_of[sha256], 1).to_pylist()[0]
        return None

    def prune(self, is_excluded: Callable[[str], bool] = lambda _image_id: False) -> int:
        """Drop the rows of images that the whole input no longer has; return how many.

        Rows of excluded images are kept: the input may still have these images.
        """
        count = 0
        for file in range(len(self._files)):
            if len(vanished := self.index.vanished_of(file)):
                ids = [image_id for image_id in self._ids_of(file) if not is_excluded(image_id)]
                hashes = np.intersect1d(hashes_of(ids), vanished)
                if len(hashes):
                    self._superseded.setdefault(file, []).append(hashes)
                    count += len(hashes)
        return count

    def finish(self, complete: bool = True) -> None:
        """Complete the output: commit pending rows and, for a single file, join the parts.

        `complete` means that the whole input has rows, so that the output is marked as complete.

        Raises:
            OutputError: there is no room; the parts stay, and the next run joins them.
        """
        self.commit()
        if self._has_own_doubles:
            paths = [file.path for file in self._files]
            with _damage_reported():
                index = RowIndex([entries_of(read_groups(path)) for path in paths])
            for file, hashes in index.superseded.items():
                self._superseded.setdefault(file, []).append(hashes)
        if not self._begun and not self._overwrite and not self._superseded:
            if is_whole(self.layout, self._files):
                return
            if not complete and is_joined(self.layout):
                return
        self._begin()
        if self.layout.is_file:
            self._join(complete)
        else:
            self.drop_superseded()
            self._mark(complete)

    def _join(self, complete: bool) -> None:
        """Replace a single file by all parts."""
        layout = self.layout
        with _damage_reported():
            schema = schema_of(file.path for file in self._files)
        tables = (
            with_columns_of(schema, table)
            for number in range(len(self._files))
            for table in self._current_rows(number)
        )
        metadata = self.metadata if complete else self.metadata | INCOMPLETE
        self._write(layout.output, regrouped(tables), schema, metadata)
        with saying_where(layout.parts):
            _remove_folder(layout.parts)

    def _mark(self, complete: bool) -> None:
        """Write the manifest of a data set and, if it is complete, its mark."""
        self._write_manifest(complete)
        if complete:
            mark = self.layout.mark(digest_of(self._files))
            with saying_where(self.layout):
                mark.touch()
                sync(mark.parent)
            self.layout.publish(mark)

    def _current_rows(self, number: int) -> Iterator[pa.Table]:
        """Yield a file's row groups without superseded rows, even empty, to keep their numbers."""
        hashes = self._superseded.get(number)
        superseded = None if hashes is None else np.unique(np.concatenate(hashes))
        return (without(table, superseded) for table in verified(self._files[number].path))

    def _write(
        self,
        path: Path,
        tables: Iterable[pa.Table],
        schema: pa.Schema = ARROW_SCHEMA,
        metadata: Mapping[str, str] | None = None,
    ) -> int:
        rows = write_rows(
            path,
            tables,
            self.metadata if metadata is None else metadata,
            staged=self.layout.staged(path),
            like=self._like,
            schema=schema,
        )
        self.layout.publish(path)
        return rows

    def _begin(self) -> None:
        """Prepare the output for its first change: unmark it, and create the directory of parts."""
        if self._begun:
            return
        with saying_where(self.layout):
            for mark in self.layout.marks():
                mark.unlink()
                self.layout.publish(mark)
            if not self.layout.is_file and self.layout.manifest.exists():
                self._write_manifest(complete=False)
            if self._overwrite:
                self._clear()
            if not self.layout.parts.exists():
                self._make_parts()
        self._begun = True

    def _clear(self) -> None:
        if self.layout.is_file:
            _remove_folder(self.layout.parts)
        else:
            for path in self.layout.row_files():
                path.unlink()
                self.layout.publish(path)

    def _make_parts(self) -> None:
        """Create the directory of parts by a rename: old rows are read there once it exists."""
        parts = self.layout.parts
        new = parts.with_name(f"{parts.name}.new")
        new.mkdir()
        if self._files:
            _link(self.layout.output, new / FIRST_PART)
            self._files[0].path = parts / FIRST_PART
        sync(new)
        new.rename(parts)
        sync(parts.parent)

    def _next_number(self) -> int:
        numbers = (number_of(file.path) for file in self._files)
        return max(numbers, default=0) + 1

    def _ids_of(self, file: int) -> Iterator[str]:
        for table in verified(self._files[file].path):
            yield from table["image_id"].to_pylist()

    def _read_captions(self, place: Place) -> tuple[pa.Table, dict[str, int]]:
        """Return a row group's captions, and the row of each SHA-256; whole photos only."""
        table = read_group(self._files[place.file].path, place.group)
        table = table.filter(
            pc.and_(pc.equal(table["status"], "ok"), table["error_type"].is_null())
        )
        row_of = {sha256: row for row, sha256 in enumerate(table["sha256"].to_pylist())}
        return table.select(CAPTION_COLUMNS), row_of

    def _write_manifest(self, complete: bool) -> None:
        if self.layout.is_file:
            return
        manifest = self.layout.manifest
        with saying_where(self.layout):
            replace_text(manifest, manifest_text(complete, self.metadata, self._files))
        self.layout.publish(manifest)


def manifest_text(complete: bool, metadata: Mapping[str, str], files: list[RowFile]) -> str:
    """Return the manifest of a data set's parts."""
    manifest = {
        "complete": complete,
        "metadata": dict(metadata),
        "rows": sum(file.rows for file in files),
        "parts": _listed(files),
    }
    return json.dumps(manifest, indent=1) + "\n"


def _listed(files: list[RowFile]) -> list[dict[str, str | int]]:
    return [{"name": file.path.name, "rows": file.rows} for file in files]


def digest_of(files: list[RowFile]) -> str:
    """Return a digest of the names and row counts of a data set's parts."""
    return hashlib.sha256(json.dumps(_listed(files)).encode()).hexdigest()[:16]


def is_whole(layout: Layout, files: list[RowFile]) -> bool:
    """Whether these rows are complete, so that nothing is left to do."""
    if layout.is_file:
        return is_joined(layout) and not INCOMPLETE.items() <= _metadata_of(files).items()
    if layout.mark(digest_of(files)).exists():
        return True
    if layout.manifest.parent != layout.output:
        return False
    try:  # outputs of earlier versions have no mark
        manifest = json.loads(layout.manifest.read_text(encoding="utf-8"))
        return bool(manifest["complete"]) and manifest["parts"] == _listed(files)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def is_joined(layout: Layout) -> bool:
    """Whether no parts wait to be joined."""
    return not layout.is_file or (layout.output.exists() and not layout.parts.is_dir())


def _metadata_of(files: list[RowFile]) -> dict[str, str]:
    with suppress(DamagedError):
        return read_file_metadata(files[0].path) if files else {}
    return {}


@contextmanager
def open_captions(
    layout: Layout,
    identity: Mapping[str, str],
    on_existing: OnExisting,
    upgrades: Upgrades = Upgrades(),
) -> Iterator[CaptionFolder]:
    """Open an output for this process alone.

    Damaged files are moved aside, so that their images are captioned again.

    Args:
        layout: of the output, whose parent directory must exist.
        identity: metadata that all rows must share, by the keys of `IDENTITY`.
        on_existing: what to do if the output has rows.
        upgrades: differences from rows of earlier versions that are accepted.

    Raises:
        LockedError: another run holds it.
        OtherOutputError: its rows were made by another model or with other settings.
        OutputError: it can't be written, is not batchcap's, or exists but must not.
    """
    with saying_where(layout):
        if not layout.is_file:
            make_folder(layout.output)
        for folder in (layout.lock.parent, layout.summary.parent):
            _check_writable(folder)
        if layout.is_file and not layout.output.is_dir():
            check_replaceable(layout.output)
    with locked(layout.lock):
        with saying_where(layout):
            _remove_leftovers(layout)
        layout.refresh()
        with saying_where(layout):
            layout.move_out()
            like = _like_of(layout)
        paths = existing_rows(layout, on_existing)
        metadata = check_identity(layout, paths, identity, upgrades, layout.fetch_again)
        files, index = index_of(paths, partial(_set_aside, layout), layout.fetch_again)
        overwrite = on_existing is OnExisting.OVERWRITE
        yield CaptionFolder(layout, metadata, files, index, overwrite, like)


def _like_of(layout: Layout) -> os.stat_result | None:
    """Return the status of OUTPUT itself, or of its last part; None if there is no row yet."""
    files = layout.row_files()
    if layout.is_file and layout.output.exists():
        files.append(layout.output)
    return files[-1].stat() if files else None


def _check_writable(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, "its directory does not exist")
    if not os.access(folder, os.W_OK | os.X_OK):
        is_read_only = os.statvfs(folder).f_flag & os.ST_RDONLY
        reason = "the file system is read-only" if is_read_only else "its directory is not writable"
        raise PermissionError(errno.EACCES, reason)


def existing_rows(layout: Layout, on_existing: OnExisting) -> list[Path]:
    """Return the files of rows to resume from, oldest first.

    Raises:
        OutputError: there are rows, or other people's files, but must not be.
    """
    files = layout.row_files()
    if layout.is_file and layout.output.is_dir():
        raise OutputError(f"{layout} is a directory: give a .parquet file")
    if not layout.is_file and not files and layout.output.is_dir():
        others = [path.name for path in layout.output.iterdir() if path.name[0] not in "._"]
        if others:
            raise OutputError(
                f"{layout} has other files, such as {others[0]}: choose a new directory"
            )
    if on_existing is OnExisting.ERROR and files:
        raise OutputError(f"{layout} exists: choose another OUTPUT, or --on-existing resume")
    return [] if on_existing is OnExisting.OVERWRITE else files


def check_identity(
    output: object,
    files: Iterable[Path],
    identity: Mapping[str, str],
    upgrades: Upgrades = Upgrades(),
    fetch_again: Callable[[Path], bool] = lambda _path: False,
) -> dict[str, str]:
    """Check that existing rows have the model and settings of the rows to come.

    Returns the identity, with further metadata of the newest rows.

    Raises:
        OtherOutputError: they differ; the message says how.
        OutputError: a file is not batchcap's.
    """
    found: dict[str, str] = {}
    wanted, identity = identity, _with_int8_if_used(identity)
    for path in files:
        with suppress(DamagedError):  # reported when its rows are read
            found = _read_or_fetch(read_file_metadata, path, fetch_again)
            precision = found.get("batchcap.precision", "")
            if upgrades.keeps_precision and precision in {*Precision} - {Precision.AUTO}:
                identity = _with_int8_if_used({**wanted, "batchcap.precision": precision})
            old, new = upgrades.comparable(found), upgrades.comparable(identity)
            for key, name in IDENTITY.items():
                if old[key] != new[key]:
                    raise _other_output(output, name, old[key], new[key], upgrades)
    return {key: value for key, value in found.items() if key not in INCOMPLETE} | identity


def _with_int8_if_used(identity: Mapping[str, str]) -> dict[str, str]:
    """Return the identity; rows of other precisions do not depend on the int8 backbone."""
    if identity.get("batchcap.precision") == Precision.INT8:
        return dict(identity)
    return {key: value for key, value in identity.items() if key != "batchcap.int8"}


def _other_output(
    output: object, name: str, old: str | None, new: str | None, upgrades: Upgrades
) -> OtherOutputError:
    old, new = _differing(old or "none", new or "none")
    if name == "model" and upgrades.has_shipped_model:
        return OtherOutputError(
            f"{output} has rows of another model ({old}) than the one that this version of "
            f"batchcap ships ({new}), perhaps one that an earlier version shipped. To continue "
            f"with that model, give its directory with --model; or {WAYS_OUT}"
        )
    return OtherOutputError(
        f"{output} has rows of another {name} ({old}) than this run's ({new}): {WAYS_OUT}"
    )


def _differing(old: str, new: str) -> tuple[str, str]:
    """Return the differing fields of two JSON objects; of other texts, both texts."""
    try:
        fields, others = json.loads(old), json.loads(new)
        differing = [key for key in fields | others if fields.get(key) != others.get(key)]
    except (ValueError, AttributeError, TypeError):
        return old, new
    first, second = (
        ", ".join(f"{key} {values.get(key)}" for key in differing) for values in (fields, others)
    )
    return first, second


def index_of(
    paths: Iterable[Path],
    on_damage: Callable[[Path, DamagedError], object],
    fetch_again: Callable[[Path], bool] = lambda _path: False,
) -> tuple[list[RowFile], RowIndex]:
    """Index the undamaged files of rows; `on_damage` gets the others.

    If only the local copy is damaged, `fetch_again` downloads the store's.

    Raises:
        OutputError: a file can't be opened, or this machine has no memory for it.
    """
    files, entries = [], []
    for path in paths:
        try:
            read = _read_or_fetch(lambda path: entries_of(read_groups(path)), path, fetch_again)
            is_outdated = not is_of_newest_schema(path)
        except DamagedError as error:
            on_damage(path, error)
            continue
        entries.append(read)
        files.append(RowFile(path, len(read.hashes), is_outdated))
    return files, RowIndex(entries)


def _read_or_fetch(
    read: Callable[[Path], Read], path: Path, fetch_again: Callable[[Path], bool]
) -> Read:
    """Read a file; if only the local copy is damaged, read the store's."""
    try:
        return read(path)
    except DamagedError:
        if not fetch_again(path):
            raise
        return read(path)


def verified(path: Path) -> Iterator[pa.Table]:
    """Yield the row groups of a file.

    Raises:
        OutputError: it is damaged, or can't be opened.
    """
    with _damage_reported():
        yield from read_groups(path)


@contextmanager
def _damage_reported() -> Iterator[None]:
    try:
        yield
    except DamagedError as error:
        raise OutputError(f"{error}; run again to redo the rows of damaged files") from error


def regrouped(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Yield the same rows in row groups of a good size."""
    gathered: list[pa.Table] = []
    for table in tables:
        gathered.append(table)
        if sum(map(len, gathered)) >= ROWS_PER_GROUP:
            yield pa.concat_tables(gathered)
            gathered = []
    if gathered:
        yield pa.concat_tables(gathered)


def _set_aside(layout: Layout, path: Path, error: DamagedError) -> None:
    staged = layout.staged(path)
    aside = staged.with_name(f".{staged.name.removeprefix('.')}.{time.time_ns()}.damaged")
    with saying_where(path):
        path.rename(aside)
    layout.publish(path)
    log.warning("%s: kept as %s; captioning its photos again", error, aside)


def _remove_leftovers(layout: Layout) -> None:
    """Remove temporary files of killed runs."""
    parts = layout.parts
    for folder, names in layout.temporaries():
        remove_temporaries(folder, names)
    if layout.is_file:
        for leftover in ("new", "old"):
            shutil.rmtree(parts.with_name(f"{parts.name}.{leftover}"), ignore_errors=True)


def _remove_folder(folder: Path) -> None:
    """Rename a directory, then remove it: half of it would look like less work done."""
    if folder.exists():
        renamed = folder.with_name(f"{folder.name}.old")
        folder.rename(renamed)
        sync(folder.parent)
        shutil.rmtree(renamed, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        with replacing(target, like=source.stat()) as temporary:
            shutil.copyfile(source, temporary)
