"""Merging: missing, unfinished and conflicting shards, and concurrent runs."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.rows import METADATA, captioned_row

from batchcap.errors import InputError, LockedError, OtherOutputError, OutputError, UsageError
from batchcap.rows import merge
from batchcap.rows.layout import check_shards, existing_shards, layout_of
from batchcap.rows.merge import merge_captions
from batchcap.rows.writer import open_captions, verified
from batchcap.settings import MergeSettings, OnExisting
from batchcap.storage.files import replace_text
from batchcap.storage.locking import locked

OUTPUTS = pytest.mark.parametrize("name", ["captions", "captions.parquet"])
TARGETS = pytest.mark.parametrize("target", ["merged", "merged.parquet"])


def write(output: Path, *image_ids: object, shard: tuple[int, int] = (0, 1), **metadata: str):
    """Write an output as a run that commits each photo as a part."""
    layout = layout_of(output, shard)
    layout.output.parent.mkdir(exist_ok=True, parents=True)
    with open_captions(layout, METADATA | metadata, OnExisting.RESUME) as folder:
        for image_id in image_ids:
            folder.append([captioned_row(image_id)])
            folder.commit()
        folder.finish()


def merged(captions: Path, output: Path) -> str:
    return merge_captions(MergeSettings(captions=captions, output=output))


def left_of_merge(folder: Path) -> list[str]:
    """Return the hidden files and folders of an output `merged` that a finished one lacks."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob(".*"))
    finished = re.compile(
        r"merged/\.complete-\w+|\.merged\.manifest\.json|captions.*|others.*|\.[co].*"
    )
    return [name for name in names if not finished.fullmatch(name)]


def ids_in(output: Path) -> list[str]:
    return pq.read_table(output)["image_id"].to_pylist()


@OUTPUTS
@TARGETS
def test_merges_the_rows_of_all_shards(tmp_path, name, target):
    for index in range(3):
        write(tmp_path / name, f"{index}a", f"{index}b", shard=(index, 3))
    message = merged(tmp_path / name, tmp_path / target)
    assert message == f"{tmp_path / target}: 6 rows of 3 outputs"
    assert ids_in(tmp_path / target) == ["0a", "0b", "1a", "1b", "2a", "2b"]
    assert left_of_merge(tmp_path) == []


def test_compacts_many_parts_so_that_runs_can_resume(tmp_path, monkeypatch):
    write(tmp_path / "many", *range(7))
    monkeypatch.setattr(merge, "ROWS_PER_PART", 4)
    monkeypatch.setattr("batchcap.rows.writer.ROWS_PER_GROUP", 2)
    merged(tmp_path / "many", tmp_path / "few")
    parts = sorted((tmp_path / "few").glob("part-*"))
    assert [ids_in(part) for part in parts] == [["0", "1", "2", "3"], ["4", "5", "6"]]
    manifest = json.loads((layout_of(tmp_path / "few").manifest).read_text())
    assert (manifest["complete"], manifest["rows"], manifest["metadata"]) == (True, 7, METADATA)
    write(tmp_path / "few", 7)
    assert len(ids_in(tmp_path / "few")) == 8


@OUTPUTS
def test_shards_can_be_read_together(tmp_path, name):
    for index in range(2):
        write(tmp_path / name, index, shard=(index, 2))
    assert existing_shards(tmp_path / name) == {(0, 2), (1, 2)}
    names = {path.name for path in (tmp_path / name).parent.iterdir()}
    if name == "captions":
        assert sorted(ids_in(tmp_path / name)) == ["0", "1"]
    else:
        assert {"captions-00000-of-00002.parquet", "captions-00001-of-00002.parquet"} <= names


def test_moved_shards_are_still_complete(tmp_path):
    """A manifest beside a folder is not moved or copied with it."""
    for index in range(2):
        write(tmp_path / f"machine{index}" / "captions", index, shard=(index, 2))
        (shard,) = (tmp_path / f"machine{index}" / "captions").iterdir()
        shutil.copytree(shard, tmp_path / "here" / shard.name)
    merged(tmp_path / "here", tmp_path / "merged")
    assert ids_in(tmp_path / "merged") == ["0", "1"]
    (tmp_path / "merged").rename(tmp_path / "moved")
    merged(tmp_path / "moved", tmp_path / "merged.parquet")


def test_shard_that_lacks_a_part_is_unfinished(tmp_path):
    write(tmp_path / "captions", "a", "b")
    (tmp_path / "captions" / "part-000002.parquet").unlink()
    with pytest.raises(InputError, match="is unfinished"):
        merged(tmp_path / "captions", tmp_path / "merged")


@OUTPUTS
def test_follows_symlinked_shards(tmp_path, name):
    """Shards of a linked OUTPUT are beside its target, where runs on the target find them."""
    (tmp_path / "far").mkdir()
    (tmp_path / name).symlink_to(tmp_path / "far" / name)
    for index in range(2):
        write((tmp_path if index else tmp_path / "far") / name, index, shard=(index, 2))
    for captions in (tmp_path / name, tmp_path / "far" / name):
        assert existing_shards(captions) == {(0, 2), (1, 2)}
    assert (tmp_path / name).is_symlink()
    target = tmp_path / "merged.parquet"
    target.symlink_to("far/all.parquet")
    merged(tmp_path / name, target)
    assert target.is_symlink()
    assert ids_in(tmp_path / "far" / "all.parquet") == ["0", "1"]


@OUTPUTS
def test_another_number_of_shards_is_refused(tmp_path, name):
    write(tmp_path / name, 1, shard=(0, 2))
    check_shards(tmp_path / name, 2)
    with pytest.raises(OtherOutputError, match="has 2 shards: use --shard I/2"):
        check_shards(tmp_path / name, 4)
    write(tmp_path / name, 1, shard=(0, 1_000))
    with pytest.raises(InputError, match="shards of different counts"):
        merged(tmp_path / name, tmp_path / "merged")


@OUTPUTS
def test_missing_shard_is_named(tmp_path, name):
    write(tmp_path / name, 1, shard=(0, 3))
    with pytest.raises(InputError, match="lacks 2 shards of 3: run --shard 1/3 first"):
        merged(tmp_path / name, tmp_path / "merged")


@OUTPUTS
def test_unfinished_shard_is_named(tmp_path, name):
    write(tmp_path / name, 1, shard=(0, 2))
    shard = layout_of(tmp_path / name, (1, 2))
    with open_captions(shard, METADATA, OnExisting.RESUME) as folder:
        folder.append([captioned_row(2)])
        folder.commit()
    assert existing_shards(tmp_path / name) == {(0, 2), (1, 2)}
    with pytest.raises(InputError, match=r"00001-of-00002.* is unfinished"):
        merged(tmp_path / name, tmp_path / "merged")


@TARGETS
def test_duplicate_ids_are_refused_and_nothing_is_left(tmp_path, target):
    write(tmp_path / "captions", "a", "b", shard=(0, 2))
    write(tmp_path / "captions", "c", "b", shard=(1, 2))
    with pytest.raises(InputError, match="00001-of-00002 has a second row of b"):
        merged(tmp_path / "captions", tmp_path / target)
    assert [*tmp_path.glob("*merged*")] == []


def test_shards_of_different_models_are_refused(tmp_path):
    write(tmp_path / "captions", "a", shard=(0, 2))
    write(tmp_path / "captions", "b", shard=(1, 2), **{"batchcap.model": "other"})
    with pytest.raises(OtherOutputError, match="00001-of-00002 has rows of another model than"):
        merged(tmp_path / "captions", tmp_path / "merged")


def test_locked_shard_is_refused(tmp_path):
    write(tmp_path / "captions", "a")
    with locked(layout_of(tmp_path / "captions").lock), pytest.raises(LockedError):
        merged(tmp_path / "captions", tmp_path / "merged")


@contextmanager
def while_merging(happens: Callable[[], object]) -> Iterator[None]:
    """Call `happens` once during a merge."""
    read, left = verified, [happens]

    def read_and_do(path: Path) -> Iterator[pa.Table]:
        yield from read(path)
        while left:
            left.pop()()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge, "verified", read_and_do)
        yield


@TARGETS
def test_a_second_merge_into_an_output_is_refused(tmp_path, target):
    write(tmp_path / "captions", "a")
    write(tmp_path / "others", "b")

    def merge_others() -> None:
        with pytest.raises(LockedError) as refusal:
            merged(tmp_path / "others", tmp_path / target)
        assert refusal.value.exit_code == 5

    with while_merging(merge_others):
        merged(tmp_path / "captions", tmp_path / target)
    assert ids_in(tmp_path / target) == ["a"]
    assert left_of_merge(tmp_path) == []


def test_a_run_into_a_file_that_is_being_merged_is_refused(tmp_path):
    write(tmp_path / "captions", "a")

    def run_into_it() -> None:
        with pytest.raises(LockedError):
            write(tmp_path / "merged.parquet", "b")

    with while_merging(run_into_it):
        merged(tmp_path / "captions", tmp_path / "merged.parquet")
    write(tmp_path / "merged.parquet", "b")
    assert ids_in(tmp_path / "merged.parquet") == ["a", "b"]
    assert left_of_merge(tmp_path) == []


@TARGETS
def test_a_merge_into_an_output_that_a_run_holds_is_refused(tmp_path, target):
    write(tmp_path / "captions", "a")
    with open_captions(layout_of(tmp_path / target), METADATA, OnExisting.RESUME) as folder:
        with pytest.raises(LockedError):
            merged(tmp_path / "captions", tmp_path / target)
        folder.append([captioned_row("b")])
        folder.finish()
    assert ids_in(tmp_path / target) == ["b"]
    assert left_of_merge(tmp_path) == []


def test_data_set_created_during_a_merge_is_kept(tmp_path):
    write(tmp_path / "captions", "a")
    with (
        while_merging(lambda: write(tmp_path / "merged", "b")),
        pytest.raises(OutputError, match="another run has created"),
    ):
        merged(tmp_path / "captions", tmp_path / "merged")
    assert ids_in(tmp_path / "merged") == ["b"]
    assert '"rows": 1' in layout_of(tmp_path / "merged").manifest.read_text()
    assert left_of_merge(tmp_path) == []


def test_runs_are_kept_out_until_a_merged_data_set_is_complete(tmp_path, monkeypatch):
    write(tmp_path / "captions", "a")

    def run_before(path: Path, text: str) -> None:
        with pytest.raises(LockedError):
            write(tmp_path / "merged", "b")
        replace_text(path, text)

    monkeypatch.setattr(merge, "replace_text", run_before)
    merged(tmp_path / "captions", tmp_path / "merged")
    write(tmp_path / "merged", "b")
    assert ids_in(tmp_path / "merged") == ["a", "b"]


KILLED = """
import os, signal, sys
from pathlib import Path
from batchcap.rows import merge
from batchcap.settings import MergeSettings
write_rows, merge.ROWS_PER_PART = merge.write_rows, 1
def write_and_die(path, tables, *others, **options):
    def dying():
        for table in tables:
            yield table
            if table["image_id"][0].as_py() == "b":
                os.kill(os.getpid(), signal.SIGKILL)
    return write_rows(path, dying(), *others, **options)
merge.write_rows = write_and_die
merge.regrouped = lambda tables: tables
merge.merge_captions(MergeSettings(captions=Path(sys.argv[1]), output=Path(sys.argv[2])))
"""


@TARGETS
def test_next_merge_removes_leftovers_of_a_killed_one(tmp_path, target):
    write(tmp_path / "captions", "a", "b", "c")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "captions"), str(tmp_path / target)]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    assert left_of_merge(tmp_path) != []
    assert not (tmp_path / target).exists()
    merged(tmp_path / "captions", tmp_path / target)
    assert ids_in(tmp_path / target) == ["a", "b", "c"]
    assert left_of_merge(tmp_path) == []


def test_shard_resumed_during_a_merge_is_refused(tmp_path):
    for index in range(2):
        write(tmp_path / "captions", index, shard=(index, 2))

    def resume() -> None:
        shard = layout_of(tmp_path / "captions", (1, 2))
        with open_captions(shard, METADATA, OnExisting.RESUME) as folder:
            folder.append([captioned_row("new")])
            folder.commit()

    with while_merging(resume), pytest.raises(InputError, match="00001-of-00002 is unfinished"):
        merged(tmp_path / "captions", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@TARGETS
def test_existing_output_is_left_unchanged(tmp_path, target):
    write(tmp_path / "captions", "a")
    write(tmp_path / target, "b")
    with pytest.raises(OutputError, match="exists: choose another"):
        merged(tmp_path / "captions", tmp_path / target)
    assert ids_in(tmp_path / target) == ["b"]


def test_missing_captions_are_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="check the path"):
        merged(tmp_path / "none", tmp_path / "merged")
    with pytest.raises(UsageError, match="check the path"):
        merged(tmp_path / "none.parquet", tmp_path / "merged")


def test_an_output_without_rows_has_nothing_to_merge(tmp_path):
    write(tmp_path / "captions")
    with pytest.raises(InputError, match="has no rows"):
        merged(tmp_path / "captions", tmp_path / "merged")


def test_a_damaged_shard_is_named_and_nothing_is_left(tmp_path):
    write(tmp_path / "captions", "a")
    part = tmp_path / "captions" / "part-000001.parquet"
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(InputError, match="repeat the run that wrote it"):
        merged(tmp_path / "captions", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@OUTPUTS
def test_columns_of_other_programs_are_kept(tmp_path, name):
    for index in range(2):
        write(tmp_path / name, index, shard=(index, 2))
    (path,) = layout_of(tmp_path / name, (1, 2)).row_files()
    table = pq.read_table(path)
    pq.write_table(table.append_column("stars", [[5]]), path, write_page_checksum=True)
    merged(tmp_path / name, tmp_path / "merged.parquet")
    assert pq.read_table(tmp_path / "merged.parquet")["stars"].to_pylist() == [None, 5]
