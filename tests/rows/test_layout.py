"""Paths of outputs: parts in the order of their numbers, with and without shards."""

import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from helpers.rows import METADATA, captioned_row

from batchcap.errors import OtherOutputError
from batchcap.rows.layout import check_shards, layout_of
from batchcap.rows.merge import merge_captions
from batchcap.rows.writer import open_captions
from batchcap.settings import MergeSettings, OnExisting

OUTPUTS = pytest.mark.parametrize("name", ["captions", "captions.parquet"])


def write(output: Path, *image_ids: object, shard: tuple[int, int] = (0, 1), ends: bool = True):
    """Write an output as a run that commits each row as a part."""
    layout = layout_of(output, shard)
    layout.output.parent.mkdir(exist_ok=True)
    with open_captions(layout, METADATA, OnExisting.RESUME) as folder:
        for image_id in image_ids:
            folder.append([captioned_row(image_id)])
            folder.commit()
        if ends:
            folder.finish()
    return layout


def ids_in(files: list[Path]) -> list[str]:
    return [image_id for file in files for image_id in pq.read_table(file)["image_id"].to_pylist()]


@OUTPUTS
def test_parts_above_999999_are_found_in_their_order(name, tmp_path):
    layout = write(tmp_path / name, "a", ends=False)
    (layout.parts / "part-000001.parquet").rename(layout.parts / "part-999998.parquet")
    write(tmp_path / name, "b", "c", ends=False)
    write(tmp_path / name, "d", ends=False)
    numbers = [int(file.stem.removeprefix("part-")) for file in layout.row_files()]
    assert numbers == [999_998, 999_999, 1_000_000, 1_000_001]
    assert ids_in(layout.row_files()) == ["a", "b", "c", "d"]
    write(tmp_path / name)
    assert sorted(ids_in(layout.row_files())) == ["a", "b", "c", "d"]


@OUTPUTS
def test_temporary_files_of_parts_above_999999_are_removed(name, tmp_path):
    layout = write(tmp_path / name, "a", ends=False)
    leftover = layout.staged(layout.parts / "part-1000000.parquet")
    leftover = leftover.with_name(f".{leftover.name}.0123abcd.tmp")
    foreign = leftover.with_name(leftover.name.replace("1000000", "1000000-mine"))
    for path in (leftover, foreign):
        path.touch()
    write(tmp_path / name, ends=False)
    assert (leftover.exists(), foreign.exists()) == (False, True)


def test_damaged_parts_above_999999_are_moved_out(tmp_path):
    layout = write(tmp_path / "captions", "a")
    (layout.output / ".part-1000000.parquet.17.damaged").touch()
    write(tmp_path / "captions")
    assert (tmp_path / ".captions.part-1000000.parquet.17.damaged").exists()


@pytest.mark.parametrize(
    "other", ["part-0000001.parquet", "part-000001-old.parquet", "part-1.parquet"]
)
def test_other_names_are_not_parts(other, tmp_path):
    layout = write(tmp_path / "captions", "a")
    (layout.output / other).touch()
    assert [file.name for file in layout.row_files()] == ["part-000001.parquet"]


@OUTPUTS
def test_sharded_output_refuses_runs_without_shard(name, tmp_path):
    write(tmp_path / name, "a", shard=(1, 4))
    with pytest.raises(OtherOutputError, match="has 4 shards: use --shard I/4") as refusal:
        check_shards(tmp_path / name, 1)
    assert refusal.value.exit_code == 4


@OUTPUTS
@pytest.mark.parametrize("ends", [True, False])
def test_output_without_shards_refuses_runs_with_shard(name, ends, tmp_path):
    write(tmp_path / name, "a", ends=ends)
    check_shards(tmp_path / name, 1)
    with pytest.raises(OtherOutputError, match="has no shards: run without --shard"):
        check_shards(tmp_path / name, 4)


def test_a_data_set_with_rows_in_and_outside_of_shards_is_refused(tmp_path):
    """Versions before this check could leave such data sets."""
    write(tmp_path / "captions", "a")
    write(tmp_path / "captions", "a", shard=(0, 1_000))
    with pytest.raises(OtherOutputError, match="has 1000 shards"):
        check_shards(tmp_path / "captions", 1)
    with pytest.raises(OtherOutputError, match=r"outside of its shards, in part-000001\.parquet"):
        check_shards(tmp_path / "captions", 1_000)


def test_shards_resume_beside_the_file_they_were_merged_to(tmp_path):
    output = tmp_path / "captions.parquet"
    for index in range(2):
        write(output, index, shard=(index, 2))
    merge_captions(MergeSettings(captions=output, output=output))
    for count in (1, 2):
        check_shards(output, count)
    with pytest.raises(OtherOutputError, match="has 2 shards"):
        check_shards(output, 4)


def test_new_folders_are_synced(tmp_path, monkeypatch):
    """Otherwise a power failure could lose a folder with all its committed rows."""
    synced: list[str] = []
    fsync = os.fsync

    def recording_fsync(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr("batchcap.rows.layout.cache_folder", lambda name: tmp_path / "cache" / name)
    layout = layout_of("memory://bucket/captions")
    created = [layout.output, layout.output.parent]
    assert {str(path.parent) for path in created} <= set(synced)
    with open_captions(layout_of(tmp_path / "captions"), METADATA, OnExisting.RESUME):
        assert synced[-1] == str(tmp_path)
