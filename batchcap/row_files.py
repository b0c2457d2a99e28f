"""Parquet files of rows: written whole or not at all, read with every checksum verified."""

import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchcap.contracts import ARROW_SCHEMA, OutputError
from batchcap.files import replacing

Row = dict[str, Any]

MAGIC = b"PAR1"


class DamagedError(Exception):
    """A file of rows that is not as it was written."""


def table_of(rows: list[Row]) -> pa.Table:
    """Rows as a table of the schema; a column that a row leaves out is null there."""
    return pa.Table.from_pylist(rows, ARROW_SCHEMA)


def write_rows(
    path: Path,
    tables: Iterable[pa.Table],
    metadata: Mapping[str, str],
    staged: Path | None = None,
    like: os.stat_result | None = None,
) -> int:
    """Write tables as the row groups of `path`, which appears, or is replaced, when it is whole.

    Returns how many rows it has. `staged` and `like` are those of `replacing`.

    Raises:
        OutputError: the folder is missing, read-only or full; what `path` was is unchanged.
    """
    if path.is_dir():
        raise OutputError(f"{path} is a directory: name a .parquet file")
    schema = ARROW_SCHEMA.with_metadata(dict(metadata))
    with saying_where(path), replacing(path, staged, like) as temporary:
        rows = 0
        with (
            temporary.open("wb") as file,
            pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as parquet,
        ):
            for table in tables:
                parquet.write_table(table)
                rows += len(table)
        if pq.read_metadata(temporary).num_rows != rows:
            raise OSError(None, "what was written does not read back")
    return rows


def read_groups(path: Path) -> Iterator[pa.Table]:
    """The row groups of a file, every checksum verified.

    Raises:
        DamagedError: it is not as it was written.
        OutputError: it can't be opened.
    """
    with (
        _noticing_damage(path),
        pq.ParquetFile(path, page_checksum_verification=True) as file,
    ):
        if not file.schema_arrow.equals(ARROW_SCHEMA):
            raise DamagedError(f"{path}: its columns are not those of batchcap")
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            table.validate(full=True)  # the checksums are of the pages only
            yield table


def read_group(path: Path, group: int) -> pa.Table:
    """One row group of a file that `read_groups` has found whole.

    Raises:
        DamagedError: it is not as it was any more.
        OutputError: it can't be opened.
    """
    with (
        _noticing_damage(path),
        pq.ParquetFile(path, page_checksum_verification=True) as file,
    ):
        return file.read_row_group(group)


def count_rows(path: Path) -> int:
    """How many rows a file has.

    Raises:
        DamagedError: it is not as it was written.
        OutputError: it can't be opened.
    """
    with _noticing_damage(path):
        return int(pq.read_metadata(path).num_rows)


def read_file_metadata(path: Path) -> dict[str, str]:
    """What the file says of itself.

    Raises:
        DamagedError: it is not as it was written.
        OutputError: it can't be opened, is no Parquet file at all, or not one of batchcap's.
    """
    with _noticing_damage(path):
        if not _seems_parquet(path):
            raise OutputError(f"{path} is no Parquet file, and is left as it is: {WAYS_OUT}")
        found = pq.read_schema(path).metadata or {}
        metadata = {key.decode(): value.decode() for key, value in found.items()}
    if "batchcap.schema" not in metadata:
        raise OutputError(f"{path} was not written by batchcap, and is left as it is: {WAYS_OUT}")
    return metadata


def _seems_parquet(path: Path) -> bool:
    """Whether it begins or ends like one, or is empty: so that damage at one end is damage."""
    with path.open("rb") as file:
        first = file.read(len(MAGIC))
        file.seek(max(0, path.stat().st_size - len(MAGIC)))
        return not first or MAGIC in (first, file.read())


@contextmanager
def _noticing_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        number = getattr(error, "errno", None)  # of the system; pyarrow's own errors have none
        if number not in (None, errno.EIO):
            reason = os.strerror(number)
            raise OutputError(f"cannot read {path}: {reason}; correct it and run again") from error
        raise DamagedError(f"{path}: {error}") from error


WAYS_OUT = "choose another OUTPUT, or give --on-existing overwrite to replace it"


@contextmanager
def saying_where(place: object) -> Iterator[None]:
    """Turn what the file system says into what a user can do.

    Raises:
        OutputError: for any OSError in the block.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(
            f"cannot write {place}: {reason}; free the disk or choose another OUTPUT, and run again"
        ) from error
