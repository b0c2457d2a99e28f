"""The file of captions: rows in, one whole Parquet file out. Knows no photos and no models."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchcap.contracts import ARROW_SCHEMA, OutputError
from batchcap.files import replacing

ROWS_PER_GROUP = 4096

Row = dict[str, Any]


class RowWriter:
    """Appends rows to a Parquet file, holding at most one row group of them in memory."""

    def __init__(self, writer: pq.ParquetWriter) -> None:
        self._writer = writer
        self._pending: list[pa.RecordBatch] = []

    def append(self, rows: list[Row]) -> None:
        """Add rows; a column that a row leaves out is null there."""
        self._pending.append(pa.RecordBatch.from_pylist(rows, self._writer.schema))
        if sum(map(len, self._pending)) >= ROWS_PER_GROUP:
            self.flush()

    def flush(self) -> None:
        """Write the rows held in memory."""
        if self._pending:
            self._writer.write_table(pa.Table.from_batches(self._pending))
            self._pending = []


@contextmanager
def parquet_file(path: Path, metadata: Mapping[str, str]) -> Iterator[RowWriter]:
    """Write `path` whole or not at all.

    Args:
        path: where the file will be; one that exists is replaced.
        metadata: stored in the file's own metadata.

    Raises:
        OutputError: the folder is missing, read-only or full.
    """
    if path.is_dir():
        raise OutputError(f"{path} is a directory: name a .parquet file")
    schema = ARROW_SCHEMA.with_metadata(dict(metadata))
    with (
        _saying_where(path),
        replacing(path) as temporary,
        temporary.open("xb") as file,
        pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as parquet,
    ):
        writer = RowWriter(parquet)
        yield writer
        writer.flush()


@contextmanager
def _saying_where(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(
            f"cannot write {path}: {reason}; free the disk or choose another OUTPUT, and run again"
        ) from error
