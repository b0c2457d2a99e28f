"""Merges the shards of an output, or compacts a data set of many parts."""

import errno
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa

from batchcap.errors import InputError, OtherOutputError, OutputError
from batchcap.process.wording import counted, printable, saying_which
from batchcap.rows.id_hashes import IdSet, hashes_of
from batchcap.rows.layout import Layout, check_shards, existing_shards, layout_of, part_name
from batchcap.rows.parquet import (
    DamagedError,
    count_rows,
    read_file_metadata,
    saying_where,
    schema_of,
    with_columns_of,
    write_rows,
)
from batchcap.rows.writer import (
    IDENTITY,
    RowFile,
    Upgrades,
    digest_of,
    is_whole,
    manifest_text,
    regrouped,
    verified,
)
from batchcap.schema import SCHEMA_VERSION
from batchcap.settings import DECODE_DEFAULTS, MergeSettings
from batchcap.storage.files import remove_temporaries, replace_text, sync
from batchcap.storage.locking import locked

UPGRADES = Upgrades(DECODE_DEFAULTS)
REDO = "repeat the run that wrote it, which redoes damaged rows"
ROWS_PER_PART = 1_000_000  # some hundreds of megabytes


def merge_captions(settings: MergeSettings) -> str:
    """Write the rows of all shards to a new output; return a message for the user.

    The output appears under its final name when it is complete. In a store, a data set grows part
    by part, and its mark and manifest come last. Memory holds a few row groups, and 8 bytes per
    image.

    Raises:
        UsageError: there are no captions of this name.
        InputError: there are no rows, a shard is missing or unfinished, or two rows have one id.
        OtherOutputError: shards are of different models or settings, or there are rows outside.
        LockedError: a run is writing a shard, or a run or another merge is writing the output.
        OutputError: the output exists, or can't be written; or a shard can't be read.
    """
    shards, target = _shards(settings.captions), layout_of(settings.output)
    metadata = _common_metadata(shards)
    if not metadata:
        raise InputError(f"{settings.captions} has no rows: give an output of batchcap run")
    with _building(target, settings.output) as place:
        schema = _common_schema(shards)
        tables = regrouped(
            with_columns_of(schema, table) for table in _distinct_rows(shards, metadata)
        )
        if target.is_file:
            rows = write_rows(target.output, tables, metadata, schema=schema)
            target.publish(target.output)
        else:
            rows = _write_parts(place, target, tables, metadata, schema)
    return f"{printable(str(target))}: {rows} rows of {counted(len(shards), 'output')}"


def _shards(captions: Path | str) -> list[Layout]:
    there = existing_shards(captions)
    if not there:
        if isinstance(captions, Path):
            with saying_which(captions):
                captions.stat()
        return [layout_of(captions)]
    count = max(number for _, number in there)
    if any(number != count for _, number in there):
        raise InputError(
            f"{captions} has shards of different counts, such as {count}: remove the obsolete ones"
        )
    missing = [index for index in range(count) if (index, count) not in there]
    if missing:
        raise InputError(
            f"{captions} lacks {counted(len(missing), 'shard')} of {count}: run --shard "
            f"{missing[0]}/{count} first"
        )
    check_shards(captions, count)
    return [layout_of(captions, (index, count)) for index in range(count)]


def _common_metadata(shards: list[Layout]) -> dict[str, str]:
    """Return the metadata that the files of all shards have."""
    metadata: dict[str, str] = {}
    for shard in shards:
        with locked(shard.lock):
            shard.refresh()
            for path in _whole_files(shard):
                found = read_file_metadata(path)
                metadata = metadata or found
                _check_same(found, metadata, shard)
    return metadata | {"batchcap.schema": str(SCHEMA_VERSION)} if metadata else {}


def _common_schema(shards: list[Layout]) -> pa.Schema:
    """Return the columns of all shards, including those that other programs have added."""
    try:
        return schema_of(path for shard in shards for path in shard.row_files())
    except DamagedError as error:
        raise InputError(f"{error}; {REDO}") from error


def _check_same(found: Mapping[str, str], metadata: Mapping[str, str], shard: Layout) -> None:
    there, first = UPGRADES.comparable(found), UPGRADES.comparable(metadata)
    for key, name in IDENTITY.items():
        if there[key] != first[key]:
            raise OtherOutputError(
                f"{shard} has rows of another {name} than the other shards: run it again with "
                "--on-existing overwrite and their settings"
            )


def _whole_files(shard: Layout) -> list[Path]:
    try:
        files = [RowFile(path, count_rows(path)) for path in shard.row_files()]
    except DamagedError as error:
        raise InputError(f"{error}; {REDO}") from error
    if not is_whole(shard, files):
        raise InputError(f"{shard} is unfinished: complete its run, then merge")
    return [file.path for file in files]


def _distinct_rows(shards: list[Layout], metadata: Mapping[str, str]) -> Iterator[pa.Table]:
    met = IdSet()
    for shard in shards:
        with locked(shard.lock):
            files = _whole_files(shard)  # a run may have added rows since the metadata was read
            for path in files:
                _check_same(read_file_metadata(path), metadata, shard)
            for table in (table for path in files for table in verified(path)):
                image_ids = table["image_id"].to_pylist()
                is_new = met.add(hashes_of(image_ids))
                if not is_new.all():
                    duplicate = printable(image_ids[int(np.argmin(is_new))])
                    raise InputError(
                        f"{shard} has a second row of {duplicate}: run all shards on one INPUT, "
                        "each with its own --shard"
                    )
                yield table


@contextmanager
def _building(target: Layout, output: Path | str) -> Iterator[Layout]:
    """Lock and yield the place of a new output; a failure leaves no rows there.

    The place is the output itself, except for a data set on this machine, which is written under a
    hidden name with its own lock, and renamed at the end.

    Raises:
        LockedError: a run or another merge is writing there.
        OutputError: the output exists, or can't be written.
    """
    place = target
    if not target.is_file and target.mirror is None:
        if target.lock.exists():
            with locked(target.lock):  # report a run that is writing there first
                pass
        place = Layout(target.output.with_name(f".{target.output.name}.new"))
        with saying_where(target):
            place.output.mkdir(exist_ok=True)
    try:
        with locked(place.lock):
            with saying_where(target):
                for folder, names in place.temporaries():
                    remove_temporaries(folder, names)
            place.refresh()
            _check_absent(target, output)
            if place is not target:
                _remove_rows(place)  # of a merge that was killed
            try:
                yield place
            except BaseException:
                if not target.is_file:
                    _remove_rows(place)
                raise
    finally:
        if place is not target:
            with suppress(OSError):  # renamed
                place.output.rmdir()


def _check_absent(target: Layout, output: Path | str) -> None:
    if target.is_file or target.mirror is None:
        exists = target.output.exists() or target.parts.exists()
    else:  # the working copy's directory always exists
        exists = bool(target.row_files() or existing_shards(output))
    if exists:
        raise OutputError(f"{target} exists: choose another OUTPUT, or remove it")


def _remove_rows(place: Layout) -> None:
    for path in (*place.marks(), *place.row_files()):
        path.unlink()


def _write_parts(
    place: Layout,
    target: Layout,
    tables: Iterator[pa.Table],
    metadata: Mapping[str, str],
    schema: pa.Schema,
) -> int:
    """Write a data set to `place` and move it to its final path; return its number of rows."""
    files = [
        RowFile(path, write_rows(path, part, metadata, schema=schema))
        for path, part in _in_parts(place.output, tables)
    ]
    with saying_where(target):
        place.mark(digest_of(files)).touch()
        if target.mirror is None:
            _put_in_place(place, target, manifest_text(True, metadata, files))
        else:
            # The first part is named like a run's, so that only one of the two can upload it.
            for path in (*place.row_files(), *place.marks()):
                target.publish(path)
            replace_text(target.manifest, manifest_text(True, metadata, files))
            target.publish(target.manifest)
    return sum(file.rows for file in files)


def _in_parts(
    folder: Path, tables: Iterator[pa.Table]
) -> Iterator[tuple[Path, Iterable[pa.Table]]]:
    rows = 0

    def number_of(table: pa.Table) -> int:
        nonlocal rows
        rows += len(table)
        return 1 + (rows - 1) // ROWS_PER_PART

    for number, part in groupby(tables, number_of):
        yield folder / part_name(number), part


def _put_in_place(place: Layout, target: Layout, manifest: str) -> None:
    """Rename a data set with its lock: runs are kept out until its manifest is written."""
    sync(place.output)
    try:
        place.output.rename(target.output)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise OutputError(
                f"another run has created {target} meanwhile: choose another OUTPUT"
            ) from error
        raise
    try:
        sync(target.output.parent)
        replace_text(target.manifest, manifest)
    finally:
        target.lock.unlink(missing_ok=True)
