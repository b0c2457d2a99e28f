"""The Parquet file: what is in it, and that it is whole or not there at all."""

import os
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from batchcap.contracts import ARROW_SCHEMA, OutputError
from batchcap.output import ROWS_PER_GROUP, Row, parquet_file

METADATA = {"batchcap.version": "1", "batchcap.model": "abc"}
NOW = datetime(2024, 5, 17, 12, 30, tzinfo=UTC)


def failed_row(number: int = 0) -> Row:
    """A row of a photo that has no caption: every other column is null."""
    filled = {"image_id": f"{number}.jpg", "status": "failed", "run_id": "r", "created_at": NOW}
    return dict.fromkeys(ARROW_SCHEMA.names) | filled


def captioned_row() -> Row:
    look = {"row": 1.5, "col": 0.5, "peak_row": 2, "peak_col": 0, "peak": 0.25, "entropy": 3.5}
    return failed_row() | {
        "status": "ok",
        "caption": "一只狗",
        "tokens": ["一只", "狗"],
        "token_ids": [7, 9],
        "token_logprobs": [-0.5, -0.25, -0.125],
        "logprob": -0.875,
        "mean_logprob": -0.25,
        "finished": True,
        "attention": [look, look],
        "attention_map": [[0.25, 0.75], [0.5, 0.5]],
        "width": 640,
        "height": 480,
        "file_size": 2**40,
        "mtime_ns": 2**60,
        "sha256": "0" * 64,
    }


def write(path: Path, *rows: Row) -> None:
    with parquet_file(path, METADATA) as writer:
        writer.append(list(rows))


def write_and_fail(path: Path, error: BaseException) -> None:
    with parquet_file(path, METADATA) as writer:
        writer.append([failed_row(i) for i in range(ROWS_PER_GROUP + 1)])
        raise error


@pytest.mark.parametrize("rows", [(), (failed_row(),), (captioned_row(), failed_row(1))])
def test_schema_is_fixed_whatever_the_rows(tmp_path, rows):
    write(tmp_path / "out.parquet", *rows)
    schema = pq.read_schema(tmp_path / "out.parquet")
    assert schema.equals(ARROW_SCHEMA)
    assert schema.metadata == {key.encode(): value.encode() for key, value in METADATA.items()}


def test_rows_come_back_as_they_went_in(tmp_path):
    rows = [captioned_row(), failed_row(1)]
    write(tmp_path / "out.parquet", *rows)
    assert pq.read_table(tmp_path / "out.parquet").to_pylist() == rows


def test_many_rows_keep_their_order_in_several_row_groups(tmp_path):
    path, count = tmp_path / "out.parquet", 2 * ROWS_PER_GROUP + 100
    with parquet_file(path, METADATA) as writer:
        for start in range(0, count, 32):
            writer.append([failed_row(i) for i in range(start, min(start + 32, count))])
    assert pq.read_metadata(path).num_row_groups == 3
    ids = pq.read_table(path, columns=["image_id"])["image_id"].to_pylist()
    assert ids == [f"{i}.jpg" for i in range(count)]


def flip_last_byte_of_column(path: Path, column: int) -> None:
    chunk = pq.read_metadata(path).row_group(0).column(column)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    content = bytearray(path.read_bytes())
    content[start + chunk.total_compressed_size - 1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("column", range(len(ARROW_SCHEMA)))
def test_pages_have_checksums(tmp_path, column):
    path = tmp_path / "out.parquet"
    write(path, captioned_row())
    pq.read_table(path, page_checksum_verification=True)
    flip_last_byte_of_column(path, column)
    with pytest.raises(OSError, match="CRC"):
        pq.read_table(path, page_checksum_verification=True)


def test_file_appears_when_it_is_whole(tmp_path):
    with parquet_file(tmp_path / "out.parquet", METADATA) as writer:
        writer.append([failed_row()])
        writer.flush()
        assert all(path.name.startswith(".") for path in tmp_path.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet"]


def test_file_replaces_the_old_one(tmp_path):
    path = tmp_path / "out.parquet"
    write(path, failed_row(1))
    write(path, failed_row(2))
    assert pq.read_table(path)["image_id"].to_pylist() == ["2.jpg"]


@pytest.mark.parametrize("error", [ValueError(), KeyboardInterrupt(), SystemExit()])
def test_failure_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "out.parquet"
    path.write_bytes(b"old")
    with pytest.raises(type(error)):
        write_and_fail(path, error)
    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet"]
    assert path.read_bytes() == b"old"


def test_file_is_as_readable_as_any_other(tmp_path):
    write(tmp_path / "out.parquet")
    (tmp_path / "plain").touch()
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def assert_refused(path: Path, reason: str, **columns: Any) -> None:
    with pytest.raises(OutputError) as refusal:
        write(path, failed_row() | columns)
    message = str(refusal.value)
    assert str(path) in message
    assert reason in message
    assert "\n" not in message


def test_missing_folder_is_named(tmp_path):
    assert_refused(tmp_path / "missing" / "out.parquet", "No such file or directory")


def test_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "notes.txt").touch()
    assert_refused(tmp_path / "notes.txt" / "out.parquet", "Not a directory")


def test_directory_is_no_output(tmp_path):
    (tmp_path / "out.parquet").mkdir()
    assert_refused(tmp_path / "out.parquet", "is a directory")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder_is_named(tmp_path):
    tmp_path.chmod(0o500)
    assert_refused(tmp_path / "out.parquet", "Permission denied")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_full_disk_is_named_and_left_as_it_was(small_disk):
    path = small_disk / "out.parquet"
    write(path, failed_row(1))
    noise = os.urandom(2**20).hex()
    assert_refused(path, "No space left on device", caption=noise)
    assert pq.read_table(path)["image_id"].to_pylist() == ["1.jpg"]
    assert list(small_disk.iterdir()) == [path]
