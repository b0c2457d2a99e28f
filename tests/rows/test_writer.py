"""The safe folder: what is committed is there for all to read, once, whatever happens next."""

import errno
import json
import logging
import os
import random
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import datasets
import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from helpers.rows import METADATA, captioned_row, failed_row, sum_of
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from batchcap.captioning.summary import RunSummary, read_rate, write_summary
from batchcap.errors import LockedError, OtherOutputError, OutputError, UsageError
from batchcap.rows.index import newest_rows
from batchcap.rows.layout import Layout, layout_of
from batchcap.rows.parquet import Row, table_of, write_rows
from batchcap.rows.writer import ROWS_PER_GROUP, CaptionFolder, RowFile, is_whole, open_captions
from batchcap.settings import OnExisting
from batchcap.storage.files import replacing

DAMAGES = 200
RESUME, OVERWRITE, ERROR = OnExisting.RESUME, OnExisting.OVERWRITE, OnExisting.ERROR


@pytest.fixture(params=["out.parquet", "out"])
def layout(request: pytest.FixtureRequest, tmp_path: Path) -> Layout:
    return Layout(tmp_path / request.param)


@pytest.fixture
def file(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "out.parquet")


@pytest.fixture
def folder(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "out")


def opened(layout: Layout, on_existing: OnExisting = RESUME, **identity: str) -> Any:
    return open_captions(layout, METADATA | identity, on_existing)


def run(layout: Layout, *parts: list[Row], on_existing: OnExisting = RESUME) -> None:
    """A run that commits each of these lists of rows as a part."""
    with opened(layout, on_existing) as captions:
        for rows in parts:
            captions.append(rows)
            captions.commit()
        captions.finish()


def stop_before_the_end(layout: Layout, *parts: list[Row]) -> None:
    with opened(layout) as captions:
        for rows in parts:
            captions.append(rows)
            captions.commit()


def rows_of(layout: Layout) -> list[Row]:
    """As batchcap reads them."""
    return [row for table in newest_rows(layout.row_files()) for row in table.to_pylist()]


def rows_of_others(layout: Layout) -> list[Row]:
    """As other programs read them."""
    return [row for path in layout.row_files() for row in pq.read_table(path).to_pylist()]


def ids_of(layout: Layout) -> list[str]:
    return [row["image_id"] for row in rows_of(layout)]


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_run_leaves_its_rows_and_nothing_else(layout, tmp_path):
    run(layout, [captioned_row(1), failed_row(2)], [captioned_row(3, 3)])
    assert rows_of(layout) == [captioned_row(1), failed_row(2), captioned_row(3, 3)]
    if layout.is_file:
        assert names_in(tmp_path) == {"out.parquet"}
    else:
        assert names_in(tmp_path) == {"out", ".out.manifest.json"}
        (mark,) = layout.marks()
        assert mark.stat().st_size == 0
        assert names_in(layout.output) == {"part-000001.parquet", "part-000002.parquet", mark.name}


def test_what_is_committed_can_be_read_at_once_by_others(layout):
    with opened(layout) as captions:
        for number in range(1, 4):
            captions.append([captioned_row(number)])
            assert captions.pending == 1
            captions.commit()
            captions.commit()  # nothing more to do
            assert captions.pending == 0
            table = ds.dataset(layout.parts, format="parquet").to_table()
            assert sorted(table["image_id"].to_pylist()) == [f"{n}" for n in range(1, number + 1)]
            query = f"select count(*), max(caption) from '{layout.parts}/*.parquet'"
            assert duckdb.sql(query).fetchall() == [(number, "一只photo")]


def readers_of(folder: Path, cache: Path) -> dict[str, set[str]]:
    """Return the ids that each program finds in a folder, by the program's name."""
    query = f"select image_id from '{folder}/**/*.parquet'"
    loaded = datasets.load_dataset(
        "parquet", data_dir=str(folder), split="train", cache_dir=str(cache)
    )
    return {
        "polars": {*pl.scan_parquet(folder).select("image_id").collect()["image_id"]},
        "duckdb": {name for (name,) in duckdb.sql(query).fetchall()},
        "pandas": {*pd.read_parquet(folder)["image_id"]},
        "pyarrow": {*ds.dataset(folder, format="parquet").to_table()["image_id"].to_pylist()},
        "datasets": {*loaded["image_id"]},
    }


def test_other_programs_read_a_folder_during_and_after_a_run(folder, tmp_path):
    """Polars and `datasets` refuse a folder with a manifest or a summary in it."""
    datasets.disable_progress_bars()
    shard = layout_of(folder.output, (1, 2))
    shard.output.mkdir(parents=True)
    (shard.output / "part-000001.parquet").write_bytes(b"PAR1")  # is set aside
    with opened(shard) as captions:
        captions.append([captioned_row("first")])
        captions.commit()
        write_summary(shard.summary, RunSummary("out", "run", "now"))
        part = shard.output / "part-000002.parquet"
        with replacing(part, shard.staged(part)) as temporary:
            temporary.write_bytes(b"PAR1, and more to follow")
            assert shard.lock.exists()
            found = readers_of(folder.output, tmp_path / "during")
            assert found == {program: {"first"} for program in found}
        part.unlink()
        captions.append([captioned_row("last")])
        captions.finish()
    found = readers_of(folder.output, tmp_path / "after")
    assert found == {program: {"first", "last"} for program in found}


def test_one_file_is_replaced_at_the_end_only(file):
    run(file, [captioned_row(1)])
    before = file.output.read_bytes()
    with opened(file) as captions:
        captions.append([captioned_row(2)])
        captions.commit()
        assert file.output.read_bytes() == before
        assert ids_of(file) == ["1", "2"]
        captions.finish()
    assert pq.read_table(file.output)["image_id"].to_pylist() == ["1", "2"]
    assert not file.parts.exists()


def test_small_parts_are_joined_into_good_row_groups(file):
    run(file, *([failed_row(f"{n}-{i}") for i in range(ROWS_PER_GROUP // 2)] for n in range(5)))
    metadata = pq.read_metadata(file.output)
    groups = [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)]
    assert groups == [ROWS_PER_GROUP, ROWS_PER_GROUP, ROWS_PER_GROUP // 2]


def test_an_output_without_rows_is_a_table_without_rows(layout):
    run(layout)
    assert rows_of(layout) == []
    if layout.is_file:
        assert pq.read_schema(layout.output).names == table_of([]).column_names
    else:
        assert json.loads(layout.manifest.read_text())["complete"] is True


def test_a_run_that_was_stopped_is_gone_on_with(layout):
    stop_before_the_end(layout, [captioned_row(1)], [failed_row(2)])
    with opened(layout) as captions:
        assert len(captions.index) == 2
        assert captions.index.find("1") is not None
        assert captions.index.find("3") is None
        captions.append([captioned_row(3)])
        captions.finish()
    assert ids_of(layout) == ["1", "2", "3"]


def test_a_stopped_run_is_joined_by_a_next_one_that_has_nothing_to_do(file):
    stop_before_the_end(file, [captioned_row(1)], [failed_row(2)])
    assert not file.output.exists()
    run(file)
    assert pq.read_table(file.output)["image_id"].to_pylist() == ["1", "2"]


def test_nothing_is_written_where_there_is_nothing_to_do(layout, tmp_path):
    """The manifest was written anew by each run, as if something had changed."""
    run(layout, [captioned_row(1)])
    before = {path: path.stat() for path in tmp_path.rglob("*") if path.is_file()}
    run(layout)
    after = {path: path.stat() for path in tmp_path.rglob("*") if path.is_file()}
    assert {p: (s.st_ino, s.st_mtime_ns) for p, s in after.items()} == {
        p: (s.st_ino, s.st_mtime_ns) for p, s in before.items()
    }


def test_changed_images_have_their_new_row_only(layout):
    run(layout, [captioned_row(1, "old"), captioned_row(2)], [captioned_row(3)])
    with opened(layout) as captions:
        captions.append([captioned_row(1, "new"), captioned_row(4)])
        captions.commit()
        assert sorted(ids_of(layout)) == ["1", "2", "3", "4"]
        captions.append([captioned_row(3, "new")])
        captions.finish()
    captions_by_id = {row["image_id"]: row["caption"] for row in rows_of(layout)}
    assert len(rows_of(layout)) == 4
    assert captions_by_id == {"1": "一只new", "2": "一只photo", "3": "一只new", "4": "一只photo"}


def test_publishes_the_new_row_before_it_drops_the_old_one(layout):
    """A kill in between cost rows of photos that had one."""
    run(layout, [captioned_row(1, "old"), captioned_row(2)])
    stop_before_the_end(layout, [captioned_row(1, "new")])
    assert [row["caption"] for row in rows_of_others(layout)] == ["一只old", "一只photo", "一只new"]
    assert [row["caption"] for row in rows_of(layout)] == ["一只photo", "一只new"]
    with opened(layout) as captions:
        assert len(captions.index) == 2
        captions.finish()
    assert [row["caption"] for row in rows_of_others(layout)] == ["一只photo", "一只new"]


def test_drops_a_pruned_image_with_its_superseded_rows(layout):
    run(layout, [captioned_row(1, "old"), captioned_row(2)])
    stop_before_the_end(layout, [captioned_row(1, "new")])
    with opened(layout) as captions:
        captions.index.mark_seen(captions.index.find("2"))
        assert captions.prune() == 1
        captions.finish()
    assert [row["image_id"] for row in rows_of_others(layout)] == ["2"]


def test_each_rewritten_file_is_progress(folder):
    run(folder, *([captioned_row(number)] for number in range(5)))
    events: list[str] = []
    with opened(folder) as captions:
        captions.append([captioned_row(number, "new") for number in (0, 2, 3)])
        captions.commit()
        captions.drop_superseded(lambda: events.append("rewritten"))
        assert events == ["rewritten"] * 3
        captions.drop_superseded(lambda: events.append("rewritten"))
        assert events == ["rewritten"] * 3


def test_one_file_is_rewritten_once_a_run(file, monkeypatch):
    run(file, [captioned_row(number) for number in range(4)])
    written: list[str] = []
    replace = Path.replace

    def noted(self: Path, target: Path) -> Path:
        written.append(Path(target).name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", noted)
    run(file, *([captioned_row(number, "new")] for number in range(4)))
    parts = [f"part-{number:06}.parquet" for number in range(1, 5)]
    assert written == [*parts, "out.parquet"]
    assert [row["caption"] for row in rows_of_others(file)] == ["一只new"] * 4


def test_a_row_replaces_one_of_the_same_run_if_told_so(layout):
    with opened(layout) as captions:
        captions.append([captioned_row(1, "second"), captioned_row(2)])
        captions.append([captioned_row(1, "first")], again=True)
        captions.append([captioned_row(3)])
        captions.finish()
    assert [row["caption"] for row in rows_of_others(layout)] == [
        "一只photo",
        "一只first",
        "一只photo",
    ]


def test_no_rows_change_nothing(layout, tmp_path):
    run(layout, [captioned_row(1)])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    with opened(layout) as captions:
        captions.append([])
        captions.commit()
        captions.drop_superseded()
        captions.finish()
    assert before == {
        path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()
    }


def test_an_output_is_whole_once_a_run_has_seen_all_of_the_input(layout):
    """Runs with --limit, and those that left photos out, said `complete` too."""
    is_whole_after = []
    for number, complete in ((1, False), (1, True), (1, False), (2, False), (2, True)):
        with opened(layout) as captions:
            if captions.index.find(f"{number}") is None:
                captions.append([captioned_row(number)])
            captions.finish(complete)
        files = [RowFile(path, pq.read_metadata(path).num_rows) for path in layout.row_files()]
        is_whole_after.append(is_whole(layout, files))
    assert is_whole_after == [False, True, True, False, True]
    assert ids_of(layout) == ["1", "2"]


def test_columns_of_other_programs_are_kept(layout):
    """An output with a column that its user had added was set aside as damaged."""
    run(layout, [captioned_row(1), captioned_row(2)])
    (path,) = layout.row_files()
    table = pq.read_table(path)
    pq.write_table(table.append_column("stars", [[5, 3]]), path, write_page_checksum=True)
    run(layout, [captioned_row(2, "new"), captioned_row(3)])
    rows = rows_of(layout)
    assert [(row["image_id"], row.get("stars")) for row in rows] == [
        ("1", 5),
        ("2", None),
        ("3", None),
    ]


def test_columns_of_one_name_and_two_types_are_refused(file):
    stop_before_the_end(file, [captioned_row(1)], [captioned_row(2)])
    for path, stars in zip(file.row_files(), ([5], ["five"]), strict=True):
        table = pq.read_table(path)
        pq.write_table(table.append_column("stars", [stars]), path, write_page_checksum=True)
    with pytest.raises(OutputError, match="a column stars of another type"):
        run(file)
    assert ids_of(file) == ["1", "2"]


SHORT_OF = [
    pa.lib.ArrowMemoryError("malloc of size 4096 failed"),
    pa.lib.ArrowException("Failed to launch worker thread: Resource temporarily unavailable"),
    OSError("ZSTD decompression failed: Allocation error : not enough memory"),
    OSError("ZSTD_DCtx create failed"),
    OSError(errno.EMFILE, "Too many open files"),
    MemoryError(),
]


@pytest.mark.parametrize("shortage", SHORT_OF, ids=lambda error: type(error).__name__)
def test_lack_of_memory_or_threads_is_no_damage(layout, monkeypatch, tmp_path, shortage):
    """A good output was set aside, and everything captioned again."""
    run(layout, [captioned_row(1)])
    before = names_in(tmp_path)

    def fail(*_arguments: object, **_options: object) -> None:
        raise shortage

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", fail)
    with pytest.raises(OutputError, match=r"cannot read .*part|cannot read .*out"), opened(layout):
        pass
    monkeypatch.undo()
    assert names_in(tmp_path) == before
    assert ids_of(layout) == ["1"]


LIMITED = """
import json, resource, sys
from pathlib import Path
from batchcap.errors import OutputError
from batchcap.rows.layout import Layout
from batchcap.rows.writer import open_captions
from batchcap.settings import OnExisting

used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]) * 2**20,) * 2)
try:
    with open_captions(Layout(Path(sys.argv[1])), json.loads(sys.argv[3]), OnExisting.RESUME):
        pass
except OutputError as error:
    print(error)
"""


@pytest.mark.parametrize("free_mib", [4, 32, 120])
def test_a_process_with_little_memory_touches_no_output(file, free_mib, tmp_path):
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    tables = [
        table_of([captioned_row(f"{group}/{n}", n) for n in range(1024)]) for group in range(8)
    ]
    write_rows(file.output, tables, METADATA)
    before = file.output.read_bytes()
    command = [sys.executable, "-c", LIMITED, file.output, str(free_mib), json.dumps(METADATA)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.stdout or "lacks memory or threads" in done.stdout
    assert file.output.read_bytes() == before
    assert not [*tmp_path.glob(".*damaged")]


def test_a_size_that_no_machine_has_is_damage(folder, monkeypatch):
    run(folder, [captioned_row(1)])

    def fail(*_arguments: object, **_options: object) -> None:
        raise pa.lib.ArrowMemoryError(f"malloc of size {2**60} failed")

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", fail)
    with opened(folder) as captions:
        assert len(captions.index) == 0


@pytest.mark.parametrize("name", ["caf\udce9.parquet", "caf\udce9"])
def test_paths_need_not_be_utf_8(tmp_path, name):
    """Everything was captioned, and then nothing committed."""
    layout = Layout(tmp_path / "fol\udce9der" / name)
    layout.output.parent.mkdir()
    run(layout, [captioned_row(1)])
    run(layout, [captioned_row(1, "new"), captioned_row(2)])
    assert sorted(ids_of(layout)) == ["1", "2"]
    write_summary(layout.summary, RunSummary(str(layout), "r", ""))
    assert read_rate(layout.summary) is None


def test_rows_of_images_that_are_gone_are_dropped(layout):
    run(layout, [captioned_row(1), captioned_row(2)], [captioned_row(3)])
    with opened(layout) as captions:
        captions.append([captioned_row(4)])
        for image_id in ("1", "3"):
            captions.index.mark_seen(captions.index.find(image_id))
        assert captions.prune() == 1
        captions.finish()
    assert sorted(ids_of(layout)) == ["1", "3", "4"]
    with opened(layout) as captions:
        assert captions.index.vanished == 3
        assert captions.prune({"1", "3"}.__contains__) == 1  # excluded ones stay
        captions.finish()
    assert sorted(ids_of(layout)) == ["1", "3"]


def test_manifest_tells_what_is_there(folder):
    stop_before_the_end(folder, [captioned_row(1), failed_row(2)], [captioned_row(3)])
    manifest = folder.manifest
    assert json.loads(manifest.read_text()) == {
        "complete": False,
        "metadata": METADATA,
        "rows": 3,
        "parts": [
            {"name": "part-000001.parquet", "rows": 2},
            {"name": "part-000002.parquet", "rows": 1},
        ],
    }
    run(folder, [captioned_row(1, "new")])
    assert json.loads(manifest.read_text()) == {
        "complete": True,
        "metadata": METADATA,
        "rows": 3,
        "parts": [
            {"name": "part-000001.parquet", "rows": 1},
            {"name": "part-000002.parquet", "rows": 1},
            {"name": "part-000003.parquet", "rows": 1},
        ],
    }


@pytest.mark.parametrize("on_existing", [RESUME, OVERWRITE])
def test_manifest_is_not_complete_while_anything_is_under_way(folder, monkeypatch, on_existing):
    """A run that was killed before its first commit left one that said `complete`, with rows and
    parts that were gone.
    """
    run(folder, [captioned_row(1, "old")])
    fail_at(monkeypatch, lambda path: path.name == "part-000002.parquet" or path.stem[-1] == "1")
    with suppress(OutputError):
        run(folder, [captioned_row(1, "new")], on_existing=on_existing)
    assert json.loads(folder.manifest.read_text())["complete"] is False


def fail_at(monkeypatch: pytest.MonkeyPatch, is_refused: Callable[[Path], bool]) -> None:
    """Have the disk refuse the renames that would put a file in place."""
    replace = Path.replace

    def refuse(self: Path, target: Path) -> Path:
        if is_refused(Path(target)):
            raise OSError(5, "Input/output error")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", refuse)


def test_damaged_parts_are_set_aside_and_their_images_done_again(folder, caplog):
    run(folder, [captioned_row(1)], [captioned_row(2)])
    part = folder.output / "part-000001.parquet"
    damaged = part.read_bytes()[:-20]
    part.write_bytes(damaged)
    with caplog.at_level(logging.WARNING), opened(folder) as captions:
        assert captions.index.find("1") is None
        assert captions.index.find("2") is not None
        captions.append([captioned_row(1)])
        captions.finish()
    assert sorted(ids_of(folder)) == ["1", "2"]
    (aside,) = folder.output.parent.glob(".out.part-000001.parquet.*.damaged")
    assert aside.read_bytes() == damaged
    (message,) = caplog.messages
    assert str(part) in message
    assert message.endswith(f"kept as {aside}; captioning its photos again")


def test_a_damaged_file_is_set_aside_and_done_again(file, tmp_path):
    run(file, [captioned_row(1)])
    file.output.write_bytes(file.output.read_bytes()[:-20])
    run(file, [captioned_row(1)])
    assert ids_of(file) == ["1"]
    assert len(names_in(tmp_path)) == 2


def test_a_damaged_manifest_or_mark_misleads_no_run(folder, tmp_path):
    """They are made of the parts, and never read instead of these."""
    run(folder, [captioned_row(1)], [captioned_row(2)])
    draws = random.Random(1)
    rows, told = rows_of(folder), folder.manifest.read_bytes()
    for number in range(DAMAGES):
        damaged = bytearray(told)
        if number % 2:
            damaged[draws.randrange(len(told))] ^= 1 << draws.randrange(8)
        else:
            del damaged[draws.randrange(len(told)) :]
        folder.manifest.write_bytes(damaged)
        if number % 3 == 0:
            for mark in folder.marks():
                mark.rename(mark.with_name(f"{mark.name[:-1]}x"))
        with opened(folder) as captions:
            assert len(captions.index) == 2
            captions.finish()
        assert rows_of(folder) == rows
        assert is_whole(folder, [RowFile(path, 1) for path in folder.row_files()])
        assert number % 3 or folder.manifest.read_bytes() == told


def test_damage_that_comes_during_a_run_ends_it_with_the_way_out(folder):
    run(folder, [captioned_row(1)])
    with opened(folder) as captions:
        (folder.output / "part-000001.parquet").write_bytes(b"PAR1")
        captions.append([captioned_row(1, "new")])
        captions.commit()
        with pytest.raises(OutputError, match="run again, which redoes the rows"):
            captions.drop_superseded()
    run(folder, [captioned_row(1, "new")])
    assert rows_of(folder) == [captioned_row(1, "new")]


@pytest.mark.parametrize(
    ("key", "asked", "told"),
    [
        ("batchcap.model", "def", "another model (abc) than what is asked for (def)"),
        ("batchcap.precision", "float16", "another precision (float32)"),
        ("batchcap.attention", "full", "another attention (summary)"),
        ("batchcap.schema", "3", "another schema (2) than what is asked for (3)"),
        (
            "batchcap.decode",
            '{"max_length": 9, "beam_size": 1}',
            "another decoding (max_length 20) than what is asked for (max_length 9)",
        ),
        (
            "batchcap.decode",
            '{"max_length": 20}',
            "another decoding (beam_size 1) than what is asked for (beam_size None)",
        ),
    ],
)
def test_rows_of_another_kind_are_named_and_left(layout, key, asked, told):
    run(layout, [captioned_row(1)])
    with pytest.raises(OtherOutputError) as refusal, opened(layout, **{key: asked}):
        pass
    assert refusal.value.exit_code == 4
    assert str(layout.output) in str(refusal.value)
    assert told in str(refusal.value)
    assert ids_of(layout) == ["1"]
    run(layout, [captioned_row(2)])  # the lock is free again


def test_another_version_may_go_on(layout):
    run(layout, [captioned_row(1)])
    with opened(layout, **{"batchcap.version": "9"}) as captions:
        assert len(captions.index) == 1


def test_an_output_that_exists_can_be_refused(layout):
    run(layout, [captioned_row(1)], on_existing=ERROR)
    with pytest.raises(OutputError, match="exists"), opened(layout, ERROR):
        pass
    assert ids_of(layout) == ["1"]


def test_an_output_can_be_replaced_even_one_of_another_kind(layout):
    stop_before_the_end(layout, [captioned_row(1)], [captioned_row(2)])
    with opened(layout, OVERWRITE, **{"batchcap.model": "def"}) as captions:
        assert len(captions.index) == 0
        assert ids_of(layout) == ["1", "2"]  # until there is something better
        captions.append([captioned_row(3)])
        captions.finish()
    assert ids_of(layout) == ["3"]
    assert pq.read_schema(layout.row_files()[0]).metadata[b"batchcap.model"] == b"def"


def test_an_output_can_be_replaced_by_nothing(layout):
    """A file kept its old rows where there was nothing to caption; a folder did not."""
    run(layout, [captioned_row(1)])
    run(layout, on_existing=OVERWRITE)
    assert rows_of(layout) == []


def test_other_peoples_folders_are_left_alone(folder):
    folder.output.mkdir()
    (folder.output / "holiday.jpg").touch()
    with pytest.raises(OutputError, match=r"has other files, such as holiday.jpg"):
        run(folder, [captioned_row(1)])
    assert names_in(folder.output) == {"holiday.jpg"}


@pytest.mark.parametrize("on_existing", list(OnExisting))
def test_a_folder_is_no_parquet_file(file, on_existing):
    file.output.mkdir()
    with pytest.raises(OutputError, match="is a directory"):
        run(file, [captioned_row(1)], on_existing=on_existing)


def test_other_files_that_are_named_like_parts_are_no_parts(folder):
    """A copy of a part, as file managers name it, ended runs in a ValueError."""
    run(folder, [captioned_row(1)])
    copy = folder.output / "part-000001 (copy).parquet"
    copy.write_bytes((folder.output / "part-000001.parquet").read_bytes())
    run(folder, [captioned_row(2)])
    run(folder, [captioned_row(3)], on_existing=OVERWRITE)
    assert ids_of(folder) == ["3"]
    assert copy.exists()


def test_leftovers_of_killed_runs_go_and_other_files_stay(file, tmp_path):
    ours = [".out.parquet.0123abcd.tmp", ".out.summary.json.0123abcd.tmp"]
    others = [
        ".out.parquet.old.parquet.0123abcd.tmp",
        ".out.parquet2.0123abcd.tmp",
        ".shout.parquet.0123abcd.tmp",
        ".out.parquet.0123abcd.tmp.jpg",
        "out.parquet.0123abcd.tmp",
    ]
    for name in ours + others:
        (tmp_path / name).touch()
    for leftover in ("new", "old"):
        (tmp_path / f".out.parquet.parts.{leftover}").mkdir()
        (tmp_path / f".out.parquet.parts.{leftover}" / "part-000001.parquet").touch()
    run(file, [captioned_row(1)])
    assert names_in(tmp_path) == {"out.parquet", *others}


def test_leftovers_of_a_folder_go_including_those_of_earlier_versions(folder, tmp_path):
    run(folder, [captioned_row(1)])
    before = names_in(folder.output), names_in(tmp_path)
    for name in ("part-000002.parquet", "_manifest.json", "_summary.json"):
        (folder.output / f".{name}.0123abcd.tmp").touch()
    for name in ("part-000002.parquet", "manifest.json", "summary.json"):
        (tmp_path / f"..out.{name}.0123abcd.tmp").touch()
    run(folder)
    assert (names_in(folder.output), names_in(tmp_path)) == before


def test_leftovers_of_an_output_with_glob_characters_in_its_name(tmp_path):
    (tmp_path / ".a[b]*.parquet.0123abcd.tmp").touch()
    (tmp_path / ".ab.parquet.0123abcd.tmp").touch()
    run(Layout(tmp_path / "a[b]*.parquet"))
    assert names_in(tmp_path) == {"a[b]*.parquet", ".ab.parquet.0123abcd.tmp"}


def as_earlier_versions_left_it(folder: Layout) -> dict[str, bytes]:
    """Make a data set with all files in its folder; return those that are not parts."""
    folder.output.parent.mkdir(exist_ok=True)
    run(folder, [captioned_row(1)])
    for mark in folder.marks():
        mark.unlink()
    folder.manifest.rename(folder.output / "_manifest.json")
    (folder.output / "_summary.json").write_text('{"images_per_second": 5}')
    (folder.output / ".part-000002.parquet.17.damaged").write_text("damaged")
    return {
        f".out{new}": (folder.output / old).read_bytes()
        for old, new in (
            ("_manifest.json", ".manifest.json"),
            ("_summary.json", ".summary.json"),
            (".part-000002.parquet.17.damaged", ".part-000002.parquet.17.damaged"),
        )
    }


@pytest.mark.parametrize("killed", [False, True])
def test_old_files_move_out_of_a_folder_even_after_a_failure_at_any_step(killed, tmp_path):
    disk = Disk()
    try:
        for number in range(100):
            folder = Layout(tmp_path / str(number) / "out")
            before = as_earlier_versions_left_it(folder)
            files = [RowFile(path, 1) for path in folder.row_files()]
            assert is_whole(folder, files)
            assert read_rate(folder.summary) == 5
            disk.countdown, disk.killed = number, killed
            with suppress(OutputError, _Killed):
                run(folder)
            undisturbed = disk.countdown is not None
            disk.countdown, disk.dead = None, False
            assert read_rate(folder.summary) == 5
            run(folder)
            assert is_whole(folder, files)
            assert names_in(folder.output) == {
                "part-000001.parquet",
                *(m.name for m in folder.marks()),
            }
            after = {path.name: path.read_bytes() for path in folder.output.parent.glob(".*")}
            assert after == before
            if undisturbed:
                assert number > 5
                return
    finally:
        disk.close()
    pytest.fail("there is no end to the changes")


def test_all_files_are_in_a_folder_that_is_a_mount_point(folder):
    """No file can be renamed into it from outside."""
    folder.output.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder.output)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("cannot mount a file system")
    try:
        run(folder, [captioned_row(1)])
        assert folder.summary == folder.output / "_summary.json"
        part = folder.output / "part-000002.parquet"
        assert folder.staged(part) == part
        names = {"part-000001.parquet", "_manifest.json", *(mark.name for mark in folder.marks())}
        assert names_in(folder.output) == names
        assert names_in(folder.output.parent) == {"out"}
        run(folder, [captioned_row(2)])
        assert ids_of(folder) == ["1", "2"]
    finally:
        subprocess.run(["umount", "--lazy", str(folder.output)], check=True)


def test_follows_a_symlinked_output(layout, tmp_path):
    """All files are beside the link's target, also those that runs through the link write."""
    (tmp_path / "far").mkdir()
    layout.output.symlink_to(f"far/{layout.output.name}")  # dangling
    target = Layout(tmp_path / "far" / layout.output.name)
    run(layout_of(layout.output), [captioned_row(1)])
    assert ids_of(target) == ["1"]
    stop_before_the_end(layout_of(layout.output), [captioned_row(2)])
    with opened(layout_of(layout.output)) as captions:
        assert len(captions.index) == 2
        with pytest.raises(LockedError), opened(target):
            pass
        captions.append([captioned_row(3)])
        captions.finish()
    assert ids_of(target) == ["1", "2", "3"]
    assert layout.output.is_symlink()
    assert names_in(tmp_path) == {"far", layout.output.name}
    assert layout_of(layout.output).summary.parent.samefile(tmp_path / "far")


def test_refuses_links_that_lead_nowhere(layout, tmp_path):
    layout.output.symlink_to(f"none/{layout.output.name}")
    with pytest.raises(OutputError, match=r"cannot write .*none/out.*: "):
        run(layout_of(layout.output))
    layout.output.unlink()
    layout.output.symlink_to(layout.output)
    with pytest.raises(OutputError, match="symbolic links"):
        layout_of(layout.output)
    layout.output.unlink()
    layout.output.symlink_to("out2" if layout.is_file else "out2.parquet")
    with pytest.raises(UsageError, match="both must end in"):
        layout_of(layout.output)
    assert names_in(tmp_path) == {layout.output.name}


@pytest.mark.parametrize("has_links", [True, False])
def test_rows_of_a_private_output_stay_private(layout, has_links, monkeypatch):
    def refuse(*_paths: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not has_links:
        monkeypatch.setattr(os, "link", refuse)
    run(layout, [captioned_row(1)])
    for path in layout.row_files():
        path.chmod(0o600)
    for number in (2, 3):
        with opened(layout) as captions:
            captions.append([captioned_row(number), captioned_row(1, number)])
            captions.commit()
            assert modes_of(layout) == {0o600}
            captions.finish()
        assert modes_of(layout) == {0o600}
    for path in layout.row_files():
        path.write_bytes(path.read_bytes()[:-20])
    run(layout, [captioned_row(1)])
    assert modes_of(layout) == {0o600}
    run(layout, [captioned_row(1)], on_existing=OVERWRITE)
    assert modes_of(layout) == {0o600}


def modes_of(layout: Layout) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in layout.row_files()}


def test_refuses_an_output_that_cannot_be_replaced_before_any_work(file):
    os.mkfifo(file.output)
    with pytest.raises(OutputError, match="not a regular file"), opened(file):
        pass
    assert file.output.is_fifo()


def test_only_one_may_write(layout):
    with opened(layout), pytest.raises(LockedError), opened(layout):
        pass


def test_captions_are_found_by_the_bytes_of_the_photo(layout):
    cut = captioned_row("cut", "cut", error_type="truncated")
    run(layout, [captioned_row(1, "dog"), cut], [failed_row(2, sha256=sum_of("cat"))])
    with opened(layout) as captions:
        for rewritten in (False, True):
            found = captions.reusable(sum_of("dog"))
            assert found is not None
            assert found["caption"] == "一只dog"
            assert found["attention"] == captioned_row(1)["attention"]
            assert not found.keys() & {"image_id", "status", "sha256", "width", "run_id"}
            for content in ("cut", "cat", "bird"):
                assert captions.reusable(sum_of(content)) is None
            if not rewritten:
                captions.append([captioned_row("cut", "other")])
                captions.commit()
                captions.drop_superseded()
                captions._captions.cache_clear()
        captions.append([captioned_row(9, **captions.reusable(sum_of("dog")))])
        captions.finish()


def test_captions_are_found_in_each_row_group_of_a_rewritten_file(folder):
    tables = [table_of([captioned_row(n, n)]) for n in range(3)]
    folder.output.mkdir()
    write_rows(folder.output / "part-000001.parquet", tables, METADATA)
    with opened(folder) as captions:
        captions.append([captioned_row(0, "new"), captioned_row(1, "new")])
        captions.commit()
        captions.drop_superseded()
        assert captions.reusable(sum_of(2))["caption"] == "一只2"


def test_captions_of_a_file_that_was_damaged_meanwhile_are_not_reused(folder):
    """It ended the run, though the model could caption the photo."""
    run(folder, [captioned_row(1, "dog")])
    with opened(folder) as captions:
        part = folder.output / "part-000001.parquet"
        part.write_bytes(part.read_bytes()[:-20])
        assert captions.reusable(sum_of("dog")) is None


def test_a_failure_to_clear_up_says_what_to_do(file, monkeypatch):
    """It was a bare OSError: a traceback, though all rows were in place."""
    stop_before_the_end(file, [captioned_row(1)])

    def refuse(_self: Path, _target: Path) -> Path:
        raise OSError(5, "Input/output error")

    with opened(file) as captions:
        monkeypatch.setattr(Path, "rename", refuse)
        with pytest.raises(OutputError, match="Input/output error"):
            captions.finish()
        monkeypatch.undo()
    run(file)
    assert ids_of(file) == ["1"]
    assert not file.parts.exists()


def test_where_there_are_no_hard_links_the_old_file_is_copied(file, monkeypatch):
    def refuse(*_paths: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    run(file, [captioned_row(1)])
    monkeypatch.setattr(os, "link", refuse)
    stop_before_the_end(file, [captioned_row(2)])
    assert ids_of(file) == ["1", "2"]
    run(file)
    assert ids_of(file) == ["1", "2"]


class _Killed(BaseException):
    """What no code catches: from here on the process does nothing more."""


class Disk:
    """Fails, or has the process killed, at the `countdown`-th change of names from now on."""

    def __init__(self) -> None:
        self.countdown: int | None = None
        self.killed = self.dead = False
        self._stack = ExitStack()
        patch = pytest.MonkeyPatch()
        self._stack.callback(patch.undo)
        for owner, name in (
            *((Path, name) for name in ("replace", "rename", "mkdir", "unlink", "touch")),
            (os, "link"),
        ):
            patch.setattr(owner, name, self._counted(getattr(owner, name)))
        patch.setattr(os, "fsync", self._counted(lambda _descriptor: None))  # quickly
        patch.setattr("shutil.rmtree", self._counted(shutil.rmtree))
        patch.setattr("shutil.copyfile", self._counted(shutil.copyfile))

    def _counted(self, change: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            if self.dead:
                return None  # a `finally` that a dead process would not run
            if self.countdown is not None:
                self.countdown -= 1
                if self.countdown < 0:
                    self.countdown = None
                    if self.killed:
                        self.dead = True
                        raise _Killed
                    raise OSError(28, "No space left on device")
            return change(*arguments, **options)

        return counted

    def close(self) -> None:
        self._stack.close()


class Crashes(RuleBasedStateMachine):
    """Any sequence of runs, with failures and kills at any change of names, against a dict.

    `there` is what every later moment must show of each image: one of these contents, or None.
    """

    layout_name = ""

    def __init__(self) -> None:
        super().__init__()
        self._tmp = Path(tempfile.mkdtemp())
        self.layout = Layout(self._tmp / self.layout_name)
        self.disk = Disk()
        self.stack = ExitStack()
        self.captions: CaptionFolder | None = None
        self.there: dict[str, str] = {}
        self.appended: dict[str, str] = {}
        self.done: set[str] = set()  # in this run
        self.count = 0

    def teardown(self) -> None:
        self.disk.countdown = None
        self._leave()
        self._finish_undisturbed()
        self.disk.close()
        shutil.rmtree(self._tmp)

    def _leave(self) -> None:
        self.stack.close()
        self.disk.dead = False
        self.captions, self.appended, self.done = None, {}, set()

    def _finish_undisturbed(self) -> None:
        """Whatever was before, one good run makes the output what it would have been anyway."""
        with opened(self.layout) as captions:
            wanted = dict.fromkeys("abcdefg", "end")
            new = [
                captioned_row(image_id, content)
                for image_id, content in wanted.items()
                if self.there.get(image_id) != content
            ]
            captions.append(new)
            captions.finish()
        found = {row["image_id"]: row["caption"] for row in rows_of(self.layout)}
        assert len(rows_of(self.layout)) == len(found)
        assert found == dict.fromkeys("abcdefg", "一只end")
        assert self.layout.is_file != self.layout.parts.is_dir()

    def _trying(self, step: Callable[[], object], countdown: int | None, killed: bool) -> bool:
        """Whether the step came to its end; if not, the run is over."""
        self.disk.countdown, self.disk.killed = countdown, killed
        try:
            step()
        except (OutputError, OSError, _Killed) as error:
            if countdown is None or not (killed or isinstance(error, OutputError)):
                raise
            self.disk.countdown = None
            lost = set(self.appended)
            self._leave()
            self._look(may_lack=lost)
            return False
        self.disk.countdown = None
        return True

    def _look(self, may_lack: set[str] | None = None) -> None:
        """What is there now is what was committed, but that appended rows may be in or out."""
        rows = rows_of(self.layout)
        found = {row["image_id"]: row["caption"].removeprefix("一只") for row in rows}
        assert len(found) == len(rows), "an image has two rows"
        if may_lack is None:
            assert found == self.there
        for image_id, content in self.there.items():
            if image_id not in (may_lack or ()):
                assert found.get(image_id) == content
        assert found.keys() <= self.there.keys() | (may_lack or set())
        self.there = found

    FAILURES = st.one_of(st.none(), st.integers(0, 25))

    @precondition(lambda self: self.captions is None)
    @rule(countdown=FAILURES, killed=st.booleans())
    def open(self, countdown: int | None, killed: bool) -> None:
        def step() -> None:
            self.captions = self.stack.enter_context(opened(self.layout))

        if self._trying(step, countdown, killed):
            index = self.captions.index
            assert len(index) == len(self.there)
            assert all(index.find(image_id) is not None for image_id in self.there)

    @precondition(lambda self: self.captions is not None)
    @rule(image_ids=st.sets(st.sampled_from("abcdefg"), min_size=1))
    def append(self, image_ids: set[str]) -> None:
        image_ids -= self.done
        self.count += 1
        self.done |= image_ids
        self.appended |= dict.fromkeys(image_ids, f"v{self.count}")
        rows = [captioned_row(image_id, f"v{self.count}") for image_id in sorted(image_ids)]
        self.captions.append(rows)

    @precondition(lambda self: self.captions is not None)
    @rule(countdown=FAILURES, killed=st.booleans())
    def commit(self, countdown: int | None, killed: bool) -> None:
        if self._trying(self.captions.commit, countdown, killed):
            self.there |= self.appended
            self.appended = {}

    @precondition(lambda self: self.captions is not None)
    @rule(gone=st.sets(st.sampled_from("abcdefg")), countdown=FAILURES, killed=st.booleans())
    def end(self, gone: set[str], countdown: int | None, killed: bool) -> None:
        """As a run does: commit, prune, finish."""
        gone -= self.done
        index = self.captions.index
        for image_id in self.there.keys() - gone:
            row = index.find(image_id)
            if row is not None:
                index.mark_seen(row)

        def step() -> None:
            self.captions.commit()
            self.captions.prune()
            self.captions.finish()

        before = self.appended
        self.appended = before | dict.fromkeys(gone & self.there.keys(), "")
        if self._trying(step, countdown, killed):
            self.there = {k: v for k, v in (self.there | before).items() if k not in gone}
            self._leave()
            assert self.layout.is_file != self.layout.parts.is_dir()

    @precondition(lambda self: self.captions is not None)
    @rule()
    def stop(self) -> None:
        self._leave()

    @invariant()
    def each_image_has_the_row_it_must_have(self) -> None:
        self._look()


def crashes_of(name: str) -> Any:
    case = type("Case", (Crashes,), {"layout_name": name}).TestCase
    case.settings = settings(
        max_examples=25,
        stateful_step_count=15,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    return case


TestCrashesOfOneFile = crashes_of("out.parquet")
TestCrashesOfAFolder = crashes_of("out")


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("name", ["out.parquet", "out"])
def test_a_failure_at_each_change_of_names_is_made_good_by_the_next_run(name, killed, tmp_path):
    """Two runs, the second with a new, a changed and a vanished image; it fails at the n-th call
    for every n, and a third one goes on.
    """

    def second(layout: Layout) -> None:
        with opened(layout) as captions:
            for image_id in wanted:
                row = captions.index.find(image_id)
                if row is not None:
                    captions.index.mark_seen(row)
            missing = [i for i in ("same", "new") if captions.index.find(i) is None]
            captions.append([captioned_row(i, i) for i in missing])
            captions.append([captioned_row("changed", "new bytes")])
            captions.commit()
            captions.prune()
            captions.finish()

    wanted = {"same": "一只same", "changed": "一只new bytes", "new": "一只new"}
    disk = Disk()
    try:
        for number in range(200):
            layout = Layout(tmp_path / str(number) / name)
            layout.output.parent.mkdir()
            run(layout, [captioned_row(i, i) for i in ("same", "changed", "vanished")])
            disk.countdown, disk.killed = number, killed
            failed = False
            try:
                second(layout)
            except (OutputError, _Killed):
                failed = True
            undisturbed = disk.countdown is not None
            disk.countdown, disk.dead = None, False
            ids = ids_of(layout)
            assert len(set(ids)) == len(ids)
            assert "same" in ids
            second(layout)
            rows = rows_of(layout)
            assert {row["image_id"]: row["caption"] for row in rows} == wanted
            assert len(rows) == len(wanted)
            if undisturbed:
                assert not failed
                assert number > 8
                return
    finally:
        disk.close()
    pytest.fail("there is no end to the changes")


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("name", ["out.parquet", "out"])
def test_a_failure_while_replacing_an_output_leaves_no_mixture(name, killed, tmp_path):
    """Rows of the old output and of the new one would be of two models."""
    disk, other = Disk(), {"batchcap.model": "def"}
    try:
        for number in range(100):
            layout = Layout(tmp_path / str(number) / name)
            layout.output.parent.mkdir()
            run(layout, [captioned_row(1, "old")], [captioned_row(2, "old")])
            disk.countdown, disk.killed = number, killed
            with suppress(OutputError, _Killed), opened(layout, OVERWRITE, **other) as captions:
                captions.append([captioned_row(1, "new")])
                captions.commit()
                captions.append([captioned_row(2, "new")])
                captions.finish()
            undisturbed = disk.countdown is not None
            disk.countdown, disk.dead = None, False
            assert len({row["caption"] for row in rows_of(layout)}) <= 1
            if undisturbed:
                assert number > 8
                return
            with opened(layout, OVERWRITE, **other) as captions:
                captions.append([captioned_row(1, "end"), captioned_row(2, "end")])
                captions.finish()
            assert [row["caption"] for row in rows_of(layout)] == ["一只end"] * 2
    finally:
        disk.close()
    pytest.fail("there is no end to the changes")


def test_another_outputs_write_is_not_disturbed(tmp_path):
    """Of two outputs in one folder the name of one may begin with that of the other."""
    with replacing(tmp_path / "out.parquet.old.parquet") as temporary:
        temporary.touch()
        run(Layout(tmp_path / "out.parquet"), [captioned_row(1)])
        assert temporary.exists()
