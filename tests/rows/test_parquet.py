"""Files of rows have a fixed schema, are whole or absent, and show any damage."""

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.rows import METADATA, captioned_row, failed_row
from hypothesis import given, settings
from hypothesis import strategies as st

from batchcap.errors import OutputError
from batchcap.rows.index import entries_of
from batchcap.rows.parquet import (
    DamagedError,
    Row,
    read_file_metadata,
    read_group,
    read_groups,
    table_of,
    write_rows,
)
from batchcap.schema import ARROW_SCHEMA


def write(path: Path, *rows: Row) -> int:
    return write_rows(path, [table_of(list(rows))], METADATA)


def read(path: Path) -> list[Row]:
    return [row for table in read_groups(path) for row in table.to_pylist()]


@pytest.mark.parametrize("rows", [(), (failed_row(),), (captioned_row(), failed_row(1))])
def test_schema_does_not_depend_on_the_rows(tmp_path, rows):
    path = tmp_path / "out.parquet"
    assert write(path, *rows) == len(rows)
    assert pq.read_schema(path).equals(ARROW_SCHEMA)
    assert read_file_metadata(path).items() >= METADATA.items()
    assert read(path) == list(rows)


def test_each_table_is_a_row_group_even_an_empty_one(tmp_path):
    """The index refers to rows by row group, so an empty one must not shift the others."""
    path = tmp_path / "out.parquet"
    tables = [table_of([captioned_row(1)]), table_of([]), table_of([captioned_row(2)])]
    assert write_rows(path, tables, METADATA) == 2
    assert [len(table) for table in read_groups(path)] == [1, 0, 1]
    assert read_group(path, 2)["image_id"].to_pylist() == ["2"]


def flip(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize("column", range(len(ARROW_SCHEMA)))
def test_pages_have_checksums(tmp_path, column):
    path = tmp_path / "out.parquet"
    write(path, captioned_row())
    chunk = pq.read_metadata(path).row_group(0).column(column)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    flip(path, start + chunk.total_compressed_size - 1)
    with pytest.raises(DamagedError, match="CRC"):
        read(path)


def test_file_appears_when_it_is_whole(tmp_path):
    def tables() -> Iterator[pa.Table]:
        yield table_of([failed_row()])
        assert all(path.name.startswith(".") for path in tmp_path.iterdir())

    write_rows(tmp_path / "out.parquet", tables(), METADATA)
    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet"]


def test_file_replaces_the_old_one(tmp_path):
    path = tmp_path / "out.parquet"
    write(path, failed_row(1))
    write(path, failed_row(2))
    assert [row["image_id"] for row in read(path)] == ["2"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_failure_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "out.parquet"
    path.write_bytes(b"old")

    def tables() -> Iterator[pa.Table]:
        yield table_of([failed_row()])
        raise error

    with pytest.raises(error):
        write_rows(path, tables(), METADATA)
    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet"]
    assert path.read_bytes() == b"old"


def test_file_has_default_permissions(tmp_path):
    write(tmp_path / "out.parquet")
    (tmp_path / "plain").touch()
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def assert_refused(path: Path, reason: str, **columns: Any) -> None:
    with pytest.raises(OutputError) as refusal:
        write(path, failed_row(**columns))
    message = str(refusal.value)
    assert str(path) in message
    assert reason in message
    assert "\n" not in message


def test_missing_folder_is_named(tmp_path):
    assert_refused(tmp_path / "missing" / "out.parquet", "No such file or directory")


def test_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "notes.txt").touch()
    assert_refused(tmp_path / "notes.txt" / "out.parquet", "Not a directory")


def test_directory_is_refused(tmp_path):
    (tmp_path / "out.parquet").mkdir()
    assert_refused(tmp_path / "out.parquet", "is a directory")


def mounted(folder: Path, options: str) -> Iterator[Path]:
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a disk needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    yield from mounted(tmp_path, "size=64k")


@pytest.fixture
def read_only_disk(tmp_path: Path) -> Iterator[Path]:
    yield from mounted(tmp_path, "ro")


def test_full_disk_is_reported_and_keeps_the_old_file(small_disk):
    path = small_disk / "out.parquet"
    write(path, failed_row(1))
    noise = os.urandom(2**20).hex()
    assert_refused(path, "No space left on device", caption=noise)
    assert [row["image_id"] for row in read(path)] == ["1"]
    assert list(small_disk.iterdir()) == [path]


def test_read_only_disk_is_named(read_only_disk):
    assert_refused(read_only_disk / "out.parquet", "Read-only file system")


def test_file_that_is_not_parquet_is_refused_and_kept(tmp_path):
    path = tmp_path / "out.parquet"
    path.write_text("image_id,caption\n")
    with pytest.raises(OutputError, match=r"not a Parquet file.*--on-existing overwrite"):
        read_file_metadata(path)
    assert path.read_text() == "image_id,caption\n"


def test_file_of_other_programs_is_refused(tmp_path):
    path = tmp_path / "out.parquet"
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(OutputError, match="not written by batchcap"):
        read_file_metadata(path)


@pytest.mark.parametrize("left", [0, 4, 100, -8, -1])
def test_truncated_file_is_damaged(tmp_path, left):
    """Even to zero bytes: a file emptied by a crash had to be removed by hand."""
    path = tmp_path / "out.parquet"
    write(path, captioned_row())
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(DamagedError):
        read_file_metadata(path)
    with pytest.raises(DamagedError):
        read(path)


def test_damaged_first_bytes_do_not_make_a_file_foreign(tmp_path):
    """After one flipped bit in the first four bytes, every later run refused the output."""
    path = tmp_path / "out.parquet"
    write(path, captioned_row())
    flip(path, 1)
    assert read_file_metadata(path).items() >= METADATA.items()
    assert read(path) == [captioned_row()]


@pytest.mark.parametrize("reader", [read_file_metadata, lambda path: [*read_groups(path)]])
def test_file_that_cannot_be_opened_is_not_taken_for_damaged(tmp_path, monkeypatch, reader):
    """Damaged files are set aside, which is wrong if permissions or file handles are lacking."""

    def refuse(*_arguments: Any, **_options: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    write(tmp_path / "out.parquet", captioned_row())
    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(pq, "ParquetFile", refuse)
    with pytest.raises(OutputError, match="Permission denied"):
        reader(tmp_path / "out.parquet")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "out.parquet"
    write(path, *(captioned_row(number, number) for number in range(3)), failed_row(3))
    return path


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_damage_is_noticed_or_harmless(whole, data):
    """Checksums cover pages only. A flipped bit in the footer renamed a column, and the run ended
    with a KeyError.
    """
    content = bytearray(whole.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1), label="position")
    content[position] ^= 1 << data.draw(st.integers(0, 7), label="bit")
    damaged = whole.with_name("damaged.parquet")
    damaged.write_bytes(content)
    try:
        read_file_metadata(damaged)
        rows = read(damaged)
        entries_of(read_groups(damaged))
    except (DamagedError, OutputError):
        return
    assert rows == read(whole)
