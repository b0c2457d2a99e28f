"""Runs over tars, Parquet files and shards give the rows of a run over the directory."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.crashes import OF_THE_RUN, ROUNDING, difference
from helpers.shard_files import MTIME, photos_of, tar_of, write_parquet, write_tar

from batchcap.captioning.run import plan_run, run_captioning
from batchcap.captioning.summary import RunSummary
from batchcap.errors import InputError, OtherOutputError, UsageError
from batchcap.rows.merge import merge_captions
from batchcap.settings import Engine, MergeSettings, RunSettings


def run(source: object, output: Path, **asked: object) -> RunSummary:
    settings = {"batch_size": 4, **asked}
    return run_captioning(RunSettings(source=str(source), output=output, **settings))


def rows_of(output: Path) -> pa.Table:
    return pq.read_table(output).sort_by("image_id")


def assert_same(rows: pa.Table, others: pa.Table, *but: str) -> None:
    dropped = [*OF_THE_RUN, *but]
    assert difference(rows.drop_columns(dropped), others.drop_columns(dropped)) <= ROUNDING


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, photos_folder: Path) -> Path:
    """Return the ten photos and two bad files, all with one modification time."""
    folder = tmp_path_factory.mktemp("photos") / "photos"
    shutil.copytree(photos_folder, folder, ignore=shutil.ignore_patterns("*.md"))
    (folder / "cut.jpg").write_bytes((folder / "coffee.jpg").read_bytes()[:5000])
    (folder / "empty.jpg").touch()
    for path in folder.rglob("*.jpg"):
        os.utime(path, (MTIME, MTIME))
    return folder


@pytest.fixture(scope="module")
def of_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    output = tmp_path_factory.mktemp("output") / "captions.parquet"
    run(folder, output)
    return rows_of(output)


def in_tars(folder: Path, target: Path) -> str:
    photos = [*photos_of(folder).items()]
    for number in range(3):
        first, *others = photos[number::3]
        data = tar_of(first) + tar_of(*others)  # as `cat` makes it
        (target / f"photos-{number:06}.tar").write_bytes(data)
    return f"{target}/photos-{{000000..000002}}.tar"


def in_bytes(folder: Path, target: Path) -> str:
    photos = photos_of(folder)
    image = [{"bytes": data, "path": name} for name, data in photos.items()]
    return str(write_parquet(target / "photos.parquet", image=image))


def in_paths(folder: Path, target: Path) -> str:
    paths = {name: str(folder / name) for name in photos_of(folder)}
    return str(write_parquet(target / "paths.parquet", image=[*paths.values()], id=[*paths]))


@pytest.mark.parametrize(
    ("made", "asked", "but"),
    [(in_tars, {}, []), (in_bytes, {}, ["mtime_ns"]), (in_paths, {"id_column": "id"}, [])],
)
def test_rows_equal_those_of_the_directory(
    made: Callable[[Path, Path], str],
    asked: dict[str, str],
    but: list[str],
    folder: Path,
    of_folder: pa.Table,
    tmp_path: Path,
) -> None:
    source = made(folder, tmp_path)
    run(source, tmp_path / "out.parquet", **asked)
    assert_same(rows_of(tmp_path / "out.parquet"), of_folder, *but)
    again = run(source, tmp_path / "out.parquet", **asked)
    assert (again.counts.already_done, again.counts.captioned) == (12, 0)


def test_a_photo_that_changed_in_its_tar_is_captioned_again(folder: Path, tmp_path: Path) -> None:
    photos = photos_of(folder)
    tar = write_tar(tmp_path / "x.tar", photos.items())
    run(tar, tmp_path / "out")
    photos["coffee.jpg"] = photos["coffee.jpg"] + b"\0"
    photos["new.jpg"] = photos["rocket.jpg"]
    write_tar(tar, photos.items())
    counts = run(tar, tmp_path / "out").counts
    assert (counts.changed, counts.new, counts.reused, counts.captioned) == (1, 1, 1, 1)
    rows = {row["image_id"]: row for row in rows_of(tmp_path / "out").to_pylist()}
    assert rows["coffee.jpg"]["sha256"] == hashlib.sha256(photos["coffee.jpg"]).hexdigest()
    assert len(rows) == 13


def test_a_broken_tar_loses_no_good_result(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = in_tars(folder, tmp_path)
    broken = tmp_path / "photos-000001.tar"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(InputError, match="1 folder or archive of"),
    ):
        run(source, tmp_path / "out.parquet")
    assert "could not fully read" in caplog.text
    done = rows_of(tmp_path / "out.parquet")["image_id"].to_pylist()
    assert 8 <= len(done) < 12
    broken.write_bytes(whole)
    again = run(source, tmp_path / "out.parquet")
    assert (again.counts.already_done, again.exit_code) == (len(done), 0)
    assert len(rows_of(tmp_path / "out.parquet")) == 12


@pytest.mark.parametrize("name", ["captions", "captions.parquet"])
def test_merged_shards_equal_one_run(
    name: str, folder: Path, of_folder: pa.Table, tmp_path: Path
) -> None:
    found = [run(folder, tmp_path / name, shard=f"{index}/4").counts.found for index in range(4)]
    assert sum(found) == 12
    merge_captions(MergeSettings(captions=tmp_path / name, output=tmp_path / "merged.parquet"))
    assert_same(rows_of(tmp_path / "merged.parquet"), of_folder)
    again = run(folder, tmp_path / "merged.parquet")
    assert (again.counts.already_done, again.counts.captioned) == (12, 0)


def test_a_shard_without_photos_is_done_at_once(tmp_path: Path, photos_folder: Path) -> None:
    (tmp_path / "list.txt").write_text(f"{photos_folder}/coffee.jpg\n")
    shards = {
        run(tmp_path / "list.txt", tmp_path / "out", shard=f"{index}/3").counts.found
        for index in range(3)
    }
    assert shards == {0, 1}
    assert len(pq.read_table(tmp_path / "out")) == 1


@pytest.mark.parametrize("engine", Engine)
def test_quoted_list_leaves_only_a_summary(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("'a.jpg'\n'b.jpg'\n")
    with pytest.raises(InputError, match="in quotes"):
        run(tmp_path / "list.txt", tmp_path / "out.parquet", engine=engine)
    summary = json.loads((tmp_path / "out.summary.json").read_text())
    assert (summary["outcome"], summary["found"]) == ("failed", 0)
    assert {path.name for path in tmp_path.iterdir()} == {"list.txt", "out.summary.json"}
    with pytest.raises(InputError, match="in quotes"):
        plan_run(RunSettings(source=str(tmp_path / "list.txt"), output=tmp_path / "out.parquet"))


def test_prune_keeps_the_rows_of_excluded_photos(
    folder: Path, of_folder: pa.Table, tmp_path: Path
) -> None:
    pq.write_table(of_folder, tmp_path / "out.parquet")
    shutil.copytree(folder, tmp_path / "photos")
    (tmp_path / "photos" / "coffee.jpg").unlink()
    pruned = run(tmp_path / "photos", tmp_path / "out.parquet", exclude=("animals",), prune=True)
    assert (pruned.counts.already_done, pruned.counts.vanished, pruned.counts.pruned) == (9, 3, 1)
    left = of_folder["image_id"].to_pylist()
    left.remove("coffee.jpg")
    assert rows_of(tmp_path / "out.parquet")["image_id"].to_pylist() == left


@pytest.mark.parametrize("shard", ["4/4", "-1/4", "1", "1/0", "a/b", "0/100000"])
def test_invalid_shard_is_a_usage_error(shard: str) -> None:
    with pytest.raises(UsageError, match="--shard must be I/N"):
        RunSettings(source="images", output=Path("out"), shard=shard)


def test_another_number_of_shards_is_another_output(tmp_path: Path, photos_folder: Path) -> None:
    (tmp_path / "out" / "shard-00000-of-00002").mkdir(parents=True)
    with pytest.raises(OtherOutputError, match="--shard I/2"):
        run(photos_folder, tmp_path / "out", shard="0/4")


@pytest.fixture
def a_photo(photos_folder: Path, tmp_path: Path) -> Path:
    (tmp_path / "list.txt").write_text(f"{photos_folder}/coffee.jpg\n")
    return tmp_path / "list.txt"


@pytest.mark.parametrize("name", ["out", "out.parquet"])
def test_one_output_and_shards_of_it_are_not_mixed(name: str, a_photo: Path) -> None:
    """Every photo had two rows, with exit code 0."""
    output = a_photo.with_name(name)
    run(a_photo, output)
    with pytest.raises(OtherOutputError, match="has no shards: run without --shard"):
        run(a_photo, output, shard="0/2")
    other = a_photo.with_name(f"other-{name}")
    for index in range(2):
        run(a_photo, other, shard=f"{index}/2")
    with pytest.raises(OtherOutputError, match="has 2 shards: use --shard I/2"):
        run(a_photo, other)
    with pytest.raises(OtherOutputError, match="has 2 shards"):
        plan_run(RunSettings(source=str(a_photo), output=other))


def test_shards_and_the_file_they_were_merged_to_both_resume(
    a_photo: Path, photos_folder: Path
) -> None:
    output = a_photo.with_name("out.parquet")
    for index in range(2):
        run(a_photo, output, shard=f"{index}/2")
    merge_captions(MergeSettings(captions=output, output=output))
    a_photo.write_text(f"{a_photo.read_text()}{photos_folder}/rocket.jpg\n")
    again = [run(a_photo, output, shard=f"{index}/2") for index in range(2)]
    assert sum(summary.counts.captioned for summary in again) == 1
    merged = run(a_photo, output)
    assert (merged.counts.already_done, merged.counts.captioned) == (1, 1)
