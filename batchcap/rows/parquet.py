"""Parquet files of rows: written whole or not at all, read with every checksum verified.

Files of earlier schemas are read as files of the newest. Columns that other programs have added
are kept, as the last ones.
"""

import errno
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchcap.errors import OutputError, first_line
from batchcap.schema import ARROW_SCHEMA, SINCE_SCHEMA_2, CaptionSource
from batchcap.storage.files import replacing

Row = dict[str, Any]

MAGIC = b"PAR1"
WAYS_OUT = "choose another OUTPUT, or give --on-existing overwrite to replace it"
# A lack of memory or threads, in the words of Arrow and its codecs.
SHORTAGE = re.compile(r"memory|alloc|DCtx create|worker thread|temporarily", re.IGNORECASE)


class DamagedError(Exception):
    """A file of rows is not as it was written."""


class _NoPandas(MetaPathFinder):
    """A finder of modules for which pandas is not installed."""

    @staticmethod
    def find_spec(name: str, *_: Any) -> None:
        if name == "pandas":
            raise ModuleNotFoundError(name)


def keep_pandas_out() -> None:
    """Make pyarrow believe that pandas is not installed, unless it is imported already.

    Otherwise pyarrow imports pandas before it converts a list, which takes half a second and 60 MB.
    For programs that convert nothing to pandas.
    """
    if "pandas" not in sys.modules:
        sys.meta_path.insert(0, _NoPandas)
        try:
            pa.array([])  # looks for pandas, this one time
        finally:
            sys.meta_path.remove(_NoPandas)


def table_of(rows: list[Row]) -> pa.Table:
    """Return rows as a table of the schema; a column that a row lacks is null."""
    return pa.Table.from_pylist(rows, ARROW_SCHEMA)


def write_rows(
    path: Path,
    tables: Iterable[pa.Table],
    metadata: Mapping[str, str],
    staged: Path | None = None,
    like: os.stat_result | None = None,
    schema: pa.Schema = ARROW_SCHEMA,
) -> int:
    """Write tables as the row groups of `path`, whole or not at all; return the number of rows.

    `staged` and `like` are those of `replacing`. `schema` comes from `schema_of`; its columns that
    a table lacks are null.

    Raises:
        OutputError: the folder is missing, read-only or full; an existing `path` is unchanged.
    """
    if path.is_dir():
        raise OutputError(f"{path} is a directory: give a .parquet file")
    schema = schema.with_metadata(dict(metadata))
    with saying_where(path), replacing(path, staged, like) as temporary:
        rows = 0
        with (
            temporary.open("wb") as file,
            pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as parquet,
        ):
            for table in tables:
                parquet.write_table(with_columns_of(schema, table))
                rows += len(table)
        with temporary.open("rb") as written:
            if pq.read_metadata(written).num_rows != rows:
                raise OSError(None, "the written file does not read back")
    return rows


def read_groups(path: Path, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """Yield the row groups of a file, every checksum verified; all columns, or some.

    Raises:
        DamagedError: it is not as it was written.
        OutputError: it can't be opened, or this machine has no memory for it.
    """
    with _opened(path) as file:
        _check_columns(path, file.schema_arrow)
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns)
            table.validate(full=True)  # the checksums are of the pages only
            yield table if columns else _upgraded(table)


def read_group(path: Path, group: int) -> pa.Table:
    """Return one row group of a file that `read_groups` has verified.

    Raises:
        DamagedError: it has changed since.
        OutputError: it can't be opened, or this machine has no memory for it.
    """
    with _opened(path) as file:
        return _upgraded(file.read_row_group(group))


def count_rows(path: Path) -> int:
    """Return the number of rows of a file.

    Raises:
        DamagedError: it is not as it was written.
        OutputError: it can't be opened.
    """
    with _opened(path) as file:
        return int(file.metadata.num_rows)


def read_file_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a file.

    Raises:
        DamagedError: it is not as it was written.
        OutputError: it can't be opened, is no Parquet file at all, or not one of batchcap's.
    """
    with _noticing_damage(path):
        if not _seems_parquet(path):
            raise OutputError(f"{path} is not a Parquet file, and is left unchanged: {WAYS_OUT}")
    with _opened(path) as file:
        found = file.schema_arrow.metadata or {}
        metadata = {key.decode(): value.decode() for key, value in found.items()}
    if "batchcap.schema" not in metadata:
        raise OutputError(f"{path} was not written by batchcap, and is left unchanged: {WAYS_OUT}")
    return metadata


def is_of_newest_schema(path: Path) -> bool:
    """Whether a file needs no upgrade.

    Raises:
        DamagedError: it is not as it was written.
        OutputError: it can't be opened.
    """
    with _opened(path) as file:
        return not _is_of_schema_1(file.schema_arrow)


def schema_of(paths: Iterable[Path]) -> pa.Schema:
    """Return the newest schema, then the columns that other programs have added to these files.

    Raises:
        DamagedError: a file is not as it was written.
        OutputError: one can't be opened, or two have different columns of one name.
    """
    schema = ARROW_SCHEMA
    for path in paths:
        with _opened(path) as file:
            found = file.schema_arrow.remove_metadata()
        for field in found:
            if field.name not in schema.names:
                schema = schema.append(field.with_nullable(True))
            elif (
                field.name not in ARROW_SCHEMA.names and field.type != schema.field(field.name).type
            ):
                raise OutputError(
                    f"{path} has a column {field.name} of another type ({field.type}) than the "
                    "files beside it: convert it, or remove it"
                )
    return schema


def _check_columns(path: Path, found: pa.Schema) -> None:
    """Raise DamagedError if a column of batchcap is missing, or of another type."""
    expected = set(ARROW_SCHEMA)
    if _is_of_schema_1(found):
        expected -= set(SINCE_SCHEMA_2)
    for field in expected:
        if field.name not in found.names or found.field(field.name).type != field.type:
            raise DamagedError(f"{path} has other columns than batchcap's")


def _is_of_schema_1(found: pa.Schema) -> bool:
    return {field.name for field in SINCE_SCHEMA_2}.isdisjoint(found.names)


def _upgraded(table: pa.Table) -> pa.Table:
    """Return a table with the newest schema's columns in order, then any others."""
    added = [name for name in table.column_names if name not in ARROW_SCHEMA.names]
    if _is_of_schema_1(table.schema):
        model, nothing = pa.scalar(CaptionSource.MODEL.value), pa.scalar(None, pa.string())
        source = pc.if_else(table["caption"].is_valid(), model, nothing)
        table = table.append_column(ARROW_SCHEMA.field("caption_source"), source)
    metadata = table.schema.metadata
    schema = pa.schema([*ARROW_SCHEMA, *(table.schema.field(name) for name in added)], metadata)
    return with_columns_of(schema, table)


def with_columns_of(schema: pa.Schema, table: pa.Table) -> pa.Table:
    """Return a table with the columns of a schema, in order; missing ones are null."""
    if table.column_names == schema.names:
        return table
    columns = [
        table[field.name] if field.name in table.column_names else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def _seems_parquet(path: Path) -> bool:
    """Whether a file begins or ends like Parquet, or is empty, so that it may be damaged."""
    with path.open("rb") as file:
        first = file.read(len(MAGIC))
        file.seek(max(0, path.stat().st_size - len(MAGIC)))
        return not first or MAGIC in (first, file.read())


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a file of rows; errors in the block become DamagedError or OutputError."""
    # Opened by Python: Arrow accepts only UTF-8 names.
    with (
        _noticing_damage(path),
        path.open("rb") as opened,
        pq.ParquetFile(opened, page_checksum_verification=True) as file,
    ):
        yield file


@contextmanager
def _noticing_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException, UnicodeDecodeError, MemoryError) as error:
        number = getattr(error, "errno", None)  # of the system; pyarrow's own errors have none
        if number not in (None, errno.EIO):
            reason = os.strerror(number)
            raise OutputError(f"cannot read {path}: {reason}; fix this and run again") from error
        if _is_shortage(error):
            raise OutputError(
                f"cannot read {path}: this machine lacks memory or threads "
                f"({first_line(error)}); free some, or raise the limits, and run again"
            ) from error
        raise DamagedError(f"{path}: {error}") from error


def _is_shortage(error: Exception) -> bool:
    """Whether the machine may be at fault, not the file.

    A damaged file asks for more memory than any machine has.
    """
    wanted = re.search(r"size (\d+)", str(error))
    if wanted and int(wanted[1]) > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        return False
    return isinstance(error, MemoryError) or SHORTAGE.search(str(error)) is not None


@contextmanager
def saying_where(place: object) -> Iterator[None]:
    """Turn the block's file system errors into errors that a user can act on.

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
