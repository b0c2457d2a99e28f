"""Verb: join the shares of an output, or the many parts of one, to one file or few parts."""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa

from batchcap.contracts import READABLE_SCHEMAS, InputError, OtherOutputError, OutputError
from batchcap.files import replace_text, sync
from batchcap.id_hashes import IdSet, hashes_of
from batchcap.layout import Layout, layout_of, shares_there
from batchcap.locking import locked
from batchcap.model.config import DECODE_DEFAULTS
from batchcap.output import (
    IDENTITY,
    RowFile,
    Upgrades,
    digest_of,
    is_whole,
    manifest_text,
    regrouped,
    verified,
)
from batchcap.records import counted, printable, saying_which
from batchcap.row_files import (
    DamagedError,
    count_rows,
    read_file_metadata,
    saying_where,
    write_rows,
)
from batchcap.row_index import newest_rows
from batchcap.settings import MergeSettings

UPGRADES = Upgrades(DECODE_DEFAULTS)
ROWS_PER_PART = 1_000_000  # some hundreds of megabytes


def merge_captions(settings: MergeSettings) -> str:
    """Write the rows of all shares to a new output; returns what to tell the user.

    The output appears under its final name when it is whole. In a store a data set grows part by
    part; its mark and its manifest come last. A few row groups are in memory at a time, and 8 bytes
    an image.

    Raises:
        UsageError: there are no captions of this name.
        InputError: there are no rows, a share is missing or unfinished, or two rows are of one id.
        OtherOutputError: shares are of different models or settings.
        LockedError: a run is writing a share.
        OutputError: the output exists, or can't be written; or a share can't be read.
    """
    shares, target = _shares(settings.captions), layout_of(settings.output)
    metadata = _common_metadata(shares)
    if not metadata:
        raise InputError(f"{settings.captions} has no rows: name an output of batchcap run")
    target.refresh()
    if target.row_files() or (target.output.exists() and target.mirror is None):
        raise OutputError(f"{target} exists: choose another OUTPUT, or remove it")
    tables = regrouped(_distinct_rows(shares))
    if target.is_file:
        rows = write_rows(target.output, tables, metadata)
        target.publish(target.output)
    else:
        rows = _write_parts(target, tables, metadata)
    return f"{printable(str(target))}: {rows} rows of {counted(len(shares), 'output')}"


def _shares(captions: Path | str) -> list[Layout]:
    there = shares_there(captions)
    if not there:
        if isinstance(captions, Path):
            with saying_which(captions):
                captions.stat()
        return [layout_of(captions)]
    count = max(number for _, number in there)
    if any(number != count for _, number in there):
        raise InputError(
            f"{captions} is there in different numbers of shares, {count} for one: remove those "
            "that are out of use"
        )
    missing = [index for index in range(count) if (index, count) not in there]
    if missing:
        raise InputError(
            f"{captions} lacks {counted(len(missing), 'share')} of {count}: run --shard "
            f"{missing[0]}/{count} first"
        )
    return [layout_of(captions, (index, count)) for index in range(count)]


def _common_metadata(shares: list[Layout]) -> dict[str, str]:
    """What the files of all shares say of themselves."""
    metadata: dict[str, str] = {}
    for share in shares:
        with locked(share.lock):
            share.refresh()
            for path in _whole_files(share):
                found = read_file_metadata(path)
                metadata = metadata or found
                there, first = UPGRADES.comparable(found), UPGRADES.comparable(metadata)
                for key, name in IDENTITY.items():
                    if there[key] != first[key]:
                        raise OtherOutputError(
                            f"{share} has rows of another {name} than {shares[0]}: run it again, "
                            "with --on-existing overwrite and the settings of the others"
                        )
    return metadata | {"batchcap.schema": READABLE_SCHEMAS[-1]} if metadata else {}


def _whole_files(share: Layout) -> list[Path]:
    try:
        files = [RowFile(path, count_rows(path)) for path in share.row_files()]
    except DamagedError as error:
        raise InputError(f"{error}; run again what wrote it, which redoes damaged rows") from error
    if not is_whole(share, files):
        raise InputError(f"{share} is not finished: run it to its end, and merge then")
    return [file.path for file in files]


def _distinct_rows(shares: list[Layout]) -> Iterator[pa.Table]:
    met = IdSet()
    for share in shares:
        with locked(share.lock):
            for table in newest_rows(share.row_files(), verified):
                image_ids = table["image_id"].to_pylist()
                is_new = met.add(hashes_of(image_ids))
                if not is_new.all():
                    doubled = printable(image_ids[int(np.argmin(is_new))])
                    raise InputError(
                        f"{share} has a second row of {doubled}: run the shares on one INPUT, "
                        "each with its own --shard"
                    )
                yield table


def _write_parts(target: Layout, tables: Iterator[pa.Table], metadata: Mapping[str, str]) -> int:
    """A folder of parts under a hidden name, which is then put in place; returns its rows."""
    new = target.output.with_name(f".{target.output.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    with saying_where(target):
        new.mkdir()
    try:
        files = [
            RowFile(path, write_rows(path, part, metadata)) for path, part in _in_parts(new, tables)
        ]
        with saying_where(target):
            (new / target.mark(digest_of(files)).name).touch()
            _put_in_place(new, target, manifest_text(True, metadata, files))
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return sum(file.rows for file in files)


def _in_parts(
    folder: Path, tables: Iterator[pa.Table]
) -> Iterator[tuple[Path, Iterable[pa.Table]]]:
    rows = 0

    def number_of(table: pa.Table) -> int:
        nonlocal rows
        rows += len(table)
        return (rows - 1) // ROWS_PER_PART

    for number, part in groupby(tables, number_of):
        yield folder / f"part-{number:06}.parquet", part


def _put_in_place(new: Path, target: Layout, manifest: str) -> None:
    if target.mirror is None:
        replace_text(target.manifest, manifest)
        sync(new)
        new.rename(target.output)
        sync(target.output.parent)
        return
    for path in sorted(new.iterdir(), reverse=True):  # the mark, ".complete-...", last
        target.publish(path.rename(target.output / path.name))
    replace_text(target.manifest, manifest)
    target.publish(target.manifest)
