"""Rows are committed in parts, joined, replaced and dropped."""

import json
from pathlib import Path

import datasets
import duckdb
import pandas as pd
import polars as pl
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from helpers.outputs import ids_of, names_in, opened, rows_of, run, stop_before_the_end
from helpers.rows import captioned_row, failed_row

from batchcap.captioning.summary import RunSummary, write_summary
from batchcap.errors import OutputError
from batchcap.rows.layout import Layout, layout_of
from batchcap.rows.parquet import Row, table_of
from batchcap.rows.writer import ROWS_PER_GROUP, RowFile, is_whole
from batchcap.storage.files import replacing


def rows_of_others(layout: Layout) -> list[Row]:
    """Return the rows as other programs read them."""
    return [row for path in layout.row_files() for row in pq.read_table(path).to_pylist()]


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


def test_committed_rows_can_be_read_by_others_at_once(layout):
    with opened(layout) as captions:
        for number in range(1, 4):
            captions.append([captioned_row(number)])
            assert captions.pending == 1
            captions.commit()
            captions.commit()  # does nothing
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
    """Polars and `datasets` refuse a folder that contains a manifest or a summary."""
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


def test_single_file_is_replaced_only_at_the_end(file):
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


def test_small_parts_are_joined_into_large_row_groups(file):
    run(file, *([failed_row(f"{n}-{i}") for i in range(ROWS_PER_GROUP // 2)] for n in range(5)))
    metadata = pq.read_metadata(file.output)
    groups = [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)]
    assert groups == [ROWS_PER_GROUP, ROWS_PER_GROUP, ROWS_PER_GROUP // 2]


def test_output_without_rows_is_an_empty_table(layout):
    run(layout)
    assert rows_of(layout) == []
    if layout.is_file:
        assert pq.read_schema(layout.output).names == table_of([]).column_names
    else:
        assert json.loads(layout.manifest.read_text())["complete"] is True


def test_resumes_a_stopped_run(layout):
    stop_before_the_end(layout, [captioned_row(1)], [failed_row(2)])
    with opened(layout) as captions:
        assert len(captions.index) == 2
        assert captions.index.find("1") is not None
        assert captions.index.find("3") is None
        captions.append([captioned_row(3)])
        captions.finish()
    assert ids_of(layout) == ["1", "2", "3"]


def test_run_with_nothing_to_do_joins_the_parts_of_a_stopped_one(file):
    stop_before_the_end(file, [captioned_row(1)], [failed_row(2)])
    assert not file.output.exists()
    run(file)
    assert pq.read_table(file.output)["image_id"].to_pylist() == ["1", "2"]


def test_run_with_nothing_to_do_writes_nothing(layout, tmp_path):
    """Every run rewrote the manifest, as if something had changed."""
    run(layout, [captioned_row(1)])
    before = {path: path.stat() for path in tmp_path.rglob("*") if path.is_file()}
    run(layout)
    after = {path: path.stat() for path in tmp_path.rglob("*") if path.is_file()}
    assert {p: (s.st_ino, s.st_mtime_ns) for p, s in after.items()} == {
        p: (s.st_ino, s.st_mtime_ns) for p, s in before.items()
    }


def test_changed_images_have_only_their_new_row(layout):
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
    """A kill in between lost rows."""
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


def test_single_file_is_rewritten_once_per_run(file, monkeypatch):
    run(file, [captioned_row(number) for number in range(4)])
    written: list[str] = []
    replace = Path.replace

    def recording_replace(self: Path, target: Path) -> Path:
        written.append(Path(target).name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", recording_replace)
    run(file, *([captioned_row(number, "new")] for number in range(4)))
    parts = [f"part-{number:06}.parquet" for number in range(1, 5)]
    assert written == [*parts, "out.parquet"]
    assert [row["caption"] for row in rows_of_others(file)] == ["一只new"] * 4


def test_row_replaces_one_of_the_same_run_on_request(layout):
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


def test_appending_no_rows_changes_nothing(layout, tmp_path):
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


def test_output_is_complete_once_a_run_has_seen_the_whole_input(layout):
    """Runs with --limit, and runs that skipped photos, were marked complete too."""
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
    """An output with a column added by its user was set aside as damaged."""
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
