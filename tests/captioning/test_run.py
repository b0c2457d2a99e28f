"""`batchcap run` as a user runs it: the shipped model, files for other programs."""

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from helpers.commands import batchcap_here
from helpers.crashes import run
from helpers.shard_files import photos_of, write_tar
from PIL import Image

from batchcap.captioning.run import run_captioning
from batchcap.model.config import fingerprint
from batchcap.schema import ARROW_SCHEMA
from batchcap.settings import DEFAULT_MODEL, RunSettings

Rows = list[dict[str, Any]]


def rows_of(path: Path) -> Rows:
    return pq.read_table(path).to_pylist()


def by_id(rows: Rows) -> dict[str, dict[str, Any]]:
    return {row["image_id"]: row for row in rows}


@pytest.fixture(scope="module")
def bad_and_good(tmp_path_factory: pytest.TempPathFactory, photos_folder: Path) -> Path:
    """Return the ten photos, and one bad file of every kind."""
    folder = tmp_path_factory.mktemp("mixed") / "photos"
    subprocess.run(["cp", "-r", photos_folder, folder], check=True)
    jpeg = (folder / "coffee.jpg").read_bytes()
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("not a photo")
    (folder / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (folder / "dangling.jpg").symlink_to(folder / "nothing")
    Image.new("RGB", (8, 8)).save(folder / "scan.NEF", "TIFF")  # a preview, by its name
    Image.new("1", (20_000, 6_000)).save(folder / "bomb.png")
    Image.effect_noise((32, 32), 50).save(folder / "damaged.png")
    damaged = bytearray((folder / "damaged.png").read_bytes())
    damaged[200] ^= 1
    (folder / "damaged.png").write_bytes(damaged)
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "notes.md").write_text("skipped")
    (folder / ".hidden.jpg").write_bytes(jpeg)
    (folder / ".cache").mkdir()
    (folder / ".cache" / "thumbnail.jpg").write_bytes(jpeg)
    return folder


@pytest.fixture(scope="module")
def mixed_run(
    bad_and_good: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    output = tmp_path_factory.mktemp("output") / "captions.parquet"
    return output, run(bad_and_good, output, "--batch-size", 4)


MIXED_IDS = [
    "animals/cat.jpg",
    "animals/raccoon.jpg",
    "astronaut.jpg",
    "bomb.png",
    "coffee.jpg",
    "cut.jpg",
    "damaged.png",
    "dangling.jpg",
    "empty.jpg",
    "flower.jpg",
    "loop.jpg",
    "officer.jpg",
    "photographer.jpg",
    "pipe.jpg",
    "rocket.jpg",
    "scan.NEF",
    "stairs.jpg",
    "temple.jpg",
    "text.jpg",
]
REASONS = {
    "bomb.png": "too_large",
    "cut.jpg": "truncated",
    "damaged.png": "corrupt",
    "dangling.jpg": "missing",
    "empty.jpg": "empty",
    "loop.jpg": "unreadable",
    "pipe.jpg": "not_a_file",
    "scan.NEF": "unsupported_format",
    "text.jpg": "unsupported_format",
}


def test_every_image_has_one_row_in_order(mixed_run: tuple[Path, Any]) -> None:
    assert [row["image_id"] for row in rows_of(mixed_run[0])] == MIXED_IDS


def test_each_bad_file_is_a_row_with_its_reason(mixed_run: tuple[Path, Any]) -> None:
    failed = {row["image_id"]: row for row in rows_of(mixed_run[0]) if row["status"] == "failed"}
    assert {image_id: row["error_type"] for image_id, row in failed.items()} == REASONS
    assert all(row["error_message"] and row["caption"] is None for row in failed.values())
    for column in ("token_logprobs", "attention", "finished", "width"):
        assert all(row[column] is None for row in failed.values())


def test_good_files_have_captions_whose_columns_agree(mixed_run: tuple[Path, Any]) -> None:
    good = [row for row in rows_of(mixed_run[0]) if row["status"] == "ok"]
    assert len(good) == 10
    for row in good:
        assert row["caption"]
        assert row["caption"] == "".join(row["tokens"])
        assert len(row["token_ids"]) == len(row["tokens"]) == len(row["attention"])
        assert len(row["token_logprobs"]) == len(row["tokens"]) + row["finished"]
        assert row["logprob"] == pytest.approx(sum(row["token_logprobs"]), abs=1e-4)
        mean = row["logprob"] / len(row["token_logprobs"])
        assert row["mean_logprob"] == pytest.approx(mean, abs=1e-5)
        assert row["error_type"] is row["error_message"] is row["attention_map"] is None
        assert row["file_size"] > 0
        assert len(row["sha256"]) == 64


def test_the_summary_counts_failures_by_reason(mixed_run: tuple[Path, Any]) -> None:
    done = mixed_run[1]
    assert done.returncode == 0
    assert "19 found, 10 captioned, 9 failed (2 unsupported_format" in done.stdout
    assert "images/s" in done.stdout


def test_nothing_but_progress_is_on_stderr_and_no_traceback(mixed_run: tuple[Path, Any]) -> None:
    lines = mixed_run[1].stderr.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("captioning the photos of ")


def test_file_has_the_schema_and_metadata_of_its_origin(mixed_run: tuple[Path, Any]) -> None:
    schema = pq.read_schema(mixed_run[0])
    assert schema.equals(ARROW_SCHEMA)
    metadata = {key.decode(): value.decode() for key, value in schema.metadata.items()}
    assert metadata["batchcap.schema"] == "2"
    assert metadata["batchcap.model"] == fingerprint(DEFAULT_MODEL)
    assert json.loads(metadata["batchcap.decode"])["temperature"] == 0
    assert metadata["batchcap.runtime"] in ("tensorflow", "openvino")
    assert metadata["batchcap.precision"] == "float32"  # the shipped model has no int8
    assert metadata["batchcap.grid"] == "8x8"


def test_no_path_of_the_machine_is_in_the_file(mixed_run: tuple[Path, Any]) -> None:
    table = pq.read_table(mixed_run[0])
    text = str(table.to_pylist()) + str(table.schema.metadata)
    assert str(Path.home()) not in text
    assert str(mixed_run[0].parent.parent) not in text


def test_pandas_and_duckdb_read_the_same_rows(mixed_run: tuple[Path, Any]) -> None:
    rows = rows_of(mixed_run[0])
    frame = pd.read_parquet(mixed_run[0])
    assert frame["image_id"].tolist() == [row["image_id"] for row in rows]
    assert frame["caption"].dropna().tolist() == [r["caption"] for r in rows if r["caption"]]
    found = duckdb.sql(
        f"select image_id, len(tokens), attention[1].entropy from '{mixed_run[0]}' "
        "where status = 'ok'"
    ).fetchall()
    expected = [row for row in rows if row["status"] == "ok"]
    assert found == [
        (r["image_id"], len(r["tokens"]), pytest.approx(r["attention"][0]["entropy"]))
        for r in expected
    ]


def test_a_bad_batch_changes_no_good_caption(
    mixed_run: tuple[Path, Any], photos_folder: Path, tmp_path: Path
) -> None:
    batchcap_here("run", photos_folder, tmp_path / "good.parquet")
    alone, mixed = by_id(rows_of(tmp_path / "good.parquet")), by_id(rows_of(mixed_run[0]))
    assert len(alone) == 10
    for image_id, row in alone.items():
        assert row["token_ids"] == mixed[image_id]["token_ids"]
        assert row["logprob"] == pytest.approx(mixed[image_id]["logprob"], abs=1e-4)


def test_only_bad_files_still_give_rows(tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    done = batchcap_here("run", folder, tmp_path / "bad.parquet")
    assert done.returncode == 0, done.stderr
    assert [row["status"] for row in rows_of(tmp_path / "bad.parquet")] == ["failed"] * 3


@pytest.mark.parametrize(
    ("detail", "has_summary", "has_map"), [("full", True, True), ("none", False, False)]
)
def test_attention_is_kept_as_requested(
    detail: str, has_summary: bool, has_map: bool, photos_folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "a.parquet"
    batchcap_here("run", photos_folder, output, "--attention", detail, "--limit", 1)
    (row,) = rows_of(output)
    assert (row["attention"] is not None) == has_summary
    assert (row["attention_map"] is not None) == has_map
    if has_map:
        maps = np.array(row["attention_map"])
        assert maps.shape == (len(row["tokens"]), 64)
        assert maps.sum(axis=1) == pytest.approx(1, abs=1e-4)
        assert row["attention"][0]["peak"] == pytest.approx(maps[0].max(), abs=1e-6)


def run_with(photos: Path, output: Path, *arguments: object) -> Rows:
    done = batchcap_here("run", photos, output, "--on-existing", "overwrite", *arguments)
    assert done.returncode == 0, done.stderr
    return rows_of(output)


def test_glob_and_limit_choose_photos(photos_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "o.parquet"
    cats = run_with(photos_folder, output, "--glob", "CAT*")
    assert [row["image_id"] for row in cats] == ["animals/cat.jpg"]
    assert len(run_with(photos_folder, output, "--limit", 2)) == 2


def test_a_length_limit_cuts_and_says_so(photos_folder: Path, tmp_path: Path) -> None:
    rows = run_with(photos_folder, tmp_path / "o.parquet", "--max-length", 2)
    assert all(len(row["tokens"]) <= 2 for row in rows)
    assert any(not row["finished"] for row in rows)


def test_samples_depend_on_the_seed(photos_folder: Path, tmp_path: Path) -> None:
    def captions(*arguments: object) -> list[str]:
        rows = run_with(photos_folder, tmp_path / "o.parquet", "--temperature", 1, *arguments)
        return [row["caption"] for row in rows]

    first = captions("--seed", 1)
    assert captions("--seed", 1) == first
    assert captions("--seed", 2) != first


def test_beams_are_more_probable_than_greedy_captions(photos_folder: Path, tmp_path: Path) -> None:
    arguments = ("--length-penalty", 0)
    greedy = run_with(photos_folder, tmp_path / "o.parquet")
    beam = run_with(photos_folder, tmp_path / "o.parquet", "--beam-size", 5, *arguments)
    assert sum(row["logprob"] for row in beam) > sum(row["logprob"] for row in greedy) + 0.5
    recorded = pq.read_schema(tmp_path / "o.parquet").metadata[b"batchcap.decode"]
    assert json.loads(recorded)["beam_size"] == 5


def test_captions_obey_min_length_and_no_repeat_ngram(photos_folder: Path, tmp_path: Path) -> None:
    arguments = ("--min-length", 9, "--no-repeat-ngram", 1)
    for row in run_with(photos_folder, tmp_path / "o.parquet", *arguments):
        assert len(row["tokens"]) >= 9
        assert len(set(row["tokens"])) == len(row["tokens"])


def test_a_list_on_stdin_names_the_photos(photos_folder: Path, tmp_path: Path) -> None:
    listed = f"{photos_folder}/coffee.jpg\n"
    done = batchcap_here("run", "-", tmp_path / "o.parquet", stdin=listed)
    assert done.returncode == 0, done.stderr
    assert len(rows_of(tmp_path / "o.parquet")) == 1


def test_a_list_in_a_named_pipe_is_read_once(tmp_path: Path) -> None:
    """The pipe was opened more than once: most photos were skipped, with exit code 0."""
    names = [f"{number:04}.jpg" for number in range(3000)]
    for name in names:
        (tmp_path / name).write_text("no photo")
    pipe = tmp_path / "list.txt"
    os.mkfifo(pipe)
    listed = "".join(f"{name}\n" for name in names)
    with subprocess.Popen(["cp", "/dev/stdin", pipe], stdin=subprocess.PIPE, text=True) as writer:
        threading.Thread(target=writer.communicate, args=[listed]).start()
        done = batchcap_here("run", pipe, tmp_path / "o.parquet")
    assert done.returncode == 0, done.stderr
    assert [row["image_id"] for row in rows_of(tmp_path / "o.parquet")] == names


def assert_refused(arguments: Sequence[object], code: int, *messages: str) -> None:
    done = batchcap_here("run", *arguments)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    for message in messages:
        assert message in done.stderr


def test_no_photo_is_a_failure_that_leaves_no_file(tmp_path: Path) -> None:
    output = tmp_path / "o.parquet"
    assert_refused([tmp_path, output], 1, "no photo", str(tmp_path))
    assert not output.exists()


def test_usage_errors_exit_with_code_2(photos_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "o.parquet"
    assert_refused([tmp_path / "nowhere", output], 2, "nowhere")
    assert_refused([photos_folder, tmp_path / "o.csv"], 2, "o.csv")
    assert_refused([photos_folder, output, "--batch-size", 0], 2, "--batch-size")
    assert_refused([photos_folder, output, "--max-length", 999], 2, "--max-length")
    assert_refused([photos_folder, output, "--attention", "some"], 2, "--attention")
    assert_refused([photos_folder, output, "--min-length", 99], 2, "--min-length 99")
    assert_refused([photos_folder, output, "--top-k", 5], 2, "--temperature")
    assert_refused(
        [photos_folder, output, "--beam-size", 3, "--temperature", 1],
        2,
        "--beam-size",
        "exclude each other",
    )
    assert_refused([photos_folder], 2, "OUTPUT")


def test_directory_without_a_model_is_named(photos_folder: Path, tmp_path: Path) -> None:
    arguments = [photos_folder, tmp_path / "o.parquet", "--model", tmp_path]
    assert_refused(arguments, 1, str(tmp_path), "config.json")


def test_an_output_folder_that_is_missing_is_named(photos_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "no" / "o.parquet"
    assert_refused([photos_folder, output], 1, str(output))


@pytest.mark.parametrize("model", [(), ("--model", "/nowhere")])
@pytest.mark.parametrize("name", ["photos", "folder.parquet", "text.parquet", "foreign.parquet"])
def test_nothing_is_written_near_an_output_that_is_refused(
    name: str, model: Sequence[str], photos_folder: Path, tmp_path: Path
) -> None:
    """A summary was written beside other people's files, or among them."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "photo.jpg").touch()
    (tmp_path / "folder.parquet").mkdir()
    (tmp_path / "text.parquet").write_text("what was here before")
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "foreign.parquet")
    before = sorted(tmp_path.rglob("*"))
    assert_refused([photos_folder, tmp_path / name, *model], 1)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_refused_output_of_ours_keeps_its_summary(photos_folder: Path, tmp_path: Path) -> None:
    output, summary = tmp_path / "o.parquet", tmp_path / "o.summary.json"
    run_with(photos_folder, output)
    before = summary.read_text()
    assert_refused([photos_folder, output, "--on-existing", "error"], 1, "exists")
    assert_refused([photos_folder, output, "--beam-size", 2], 4, "beam_size")
    assert summary.read_text() == before


def test_a_run_that_fails_for_its_input_or_model_leaves_a_summary(
    photos_folder: Path, tmp_path: Path
) -> None:
    for name, source, flags in [
        ("a", tmp_path, ()),
        ("b", photos_folder, ("--model", tmp_path)),
    ]:
        assert_refused([source, tmp_path / f"{name}.parquet", *flags], 1)
        summary = json.loads((tmp_path / f"{name}.summary.json").read_text())
        assert (summary["outcome"], summary["exit_code"]) == ("failed", 1)


def test_captions_of_equal_files_are_reused_and_counted(
    photos_folder: Path, tmp_path: Path
) -> None:
    for name in ("a", "b", "c"):
        shutil.copy(photos_folder / "coffee.jpg", tmp_path / f"{name}.jpg")
    settings = RunSettings(source=str(tmp_path), output=tmp_path / "o.parquet", batch_size=1)
    counts = run_captioning(settings).counts
    assert (counts.captioned + counts.reused, counts.found) == (3, 3)
    shutil.copy(photos_folder / "coffee.jpg", tmp_path / "d.jpg")
    counts = run_captioning(settings).counts
    assert (counts.captioned, counts.reused, counts.already_done) == (0, 1, 3)


def test_an_output_is_replaced_only_by_a_whole_one(photos_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "o.parquet"
    output.write_text("what was here before")
    assert_refused([photos_folder, output], 1, "is not a Parquet file", "--on-existing overwrite")
    assert_refused([photos_folder, output, "--model", tmp_path], 1)
    assert output.read_text() == "what was here before"
    assert len(run_with(photos_folder, output)) == 10


@pytest.mark.parametrize("name", ["captions", "captions.parquet"])
def test_a_run_with_a_limit_is_not_complete_and_not_merged(photos_folder, tmp_path, name):
    output, merged = tmp_path / name, tmp_path / "merged.parquet"
    assert batchcap_here("run", photos_folder, output, "--limit", 2).returncode == 0
    refused = batchcap_here("merge", output, merged)
    assert refused.returncode == 1
    assert f"{name} is unfinished: complete its run" in refused.stderr
    assert batchcap_here("run", photos_folder, output).returncode == 0
    assert batchcap_here("merge", output, merged).returncode == 0
    assert pq.read_metadata(merged).num_rows == 10


@pytest.mark.parametrize("name", ["captions", "captions.parquet"])
def test_run_that_skipped_photos_is_not_complete(photos_folder, tmp_path, name):
    for number in (1, 2):
        write_tar(tmp_path / f"{number}.tar", photos_of(photos_folder).items())
    done = batchcap_here("run", tmp_path / "*.tar", tmp_path / name)
    assert done.returncode == 1
    assert "10 photos of" in done.stderr
    assert batchcap_here("merge", tmp_path / name, tmp_path / "merged").returncode == 1
