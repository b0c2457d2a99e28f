"""`batchcap bench` as a user runs it."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import pytest
from helpers.commands import batchcap_here

from batchcap.captioning.bench import BenchResult, Comparison

bench = functools.partial(batchcap_here, "bench")


def test_json_has_the_rates_of_stages_and_of_the_run() -> None:
    done = bench("--limit", 5, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    stages = [result[stage] for stage in ("load", "features", "captions", "write")]
    assert all(rate > 0 for rate in stages)
    sum_of_stages = 1 / sum(1 / rate for rate in stages)
    assert result["pipeline_efficiency"] == pytest.approx(result["end_to_end"] / sum_of_stages)
    assert result["peak_memory_bytes"] > 100e6
    assert result["peak_memory_with_readers_bytes"] > result["peak_memory_bytes"] + 10e6
    assert result["first_caption_s"] > 0
    assert (result["width"], result["height"]) == (640, 480)
    assert (result["photos"], result["batch_size"]) == (5, 5)


def test_table_has_the_rates_of_the_given_photos(photos_folder: Path) -> None:
    done = bench("--images", photos_folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("10 photos of 448x317 (median), 10 at a time, on ")
    for row in ("load", "features", "captions", "write", "end to end", "pipeline efficiency"):
        assert f"\n{row}" in done.stdout


def test_unreadable_photos_are_not_timed(photos_folder: Path, tmp_path: Path) -> None:
    """With 60 of 80 files unreadable, features seemed four times as fast."""
    shutil.copytree(photos_folder, tmp_path / "photos")
    for number in range(60):
        (tmp_path / "photos" / f"{number:02}.jpg").write_text("no photo")
    done = bench("--images", tmp_path / "photos", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["photos"], result["unreadable"], result["batch_size"]) == (10, 60, 10)
    assert str(BenchResult(**result)).startswith(
        "10 photos (60 others can't be read) of 448x317 (median), 10 at a time, "
    )


def test_only_unreadable_photos_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("no photo")
    done = bench("--images", tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "none of the photos can be read" in done.stderr


def test_precisions_are_compared_on_the_same_photos(photos_folder: Path) -> None:
    done = bench("--images", photos_folder, "--compare", "--json")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert results[0]["precision"] == "float32"
    assert results[0]["other_captions"] == 0
    assert all(result["photos"] == 10 for result in results)
    others = ("int8", "bfloat16", "float16")
    skipped = [name for name in others if f"without {name}: " in done.stderr]
    compared = [result["precision"] for result in results]
    assert sorted(compared + skipped) == sorted(["float32", *others])


def test_a_precision_excludes_a_comparison() -> None:
    done = bench("--compare", "--precision", "float32")
    assert done.returncode == 2
    assert "omit --precision" in done.stderr


def test_comparison_without_a_model_is_an_error(tmp_path: Path) -> None:
    done = bench("--compare", "--model", tmp_path / "none")
    assert done.returncode == 1
    assert "is not a model directory" in done.stderr
    assert "Traceback" not in done.stderr


def test_table_of_a_comparison_has_a_column_for_each_precision() -> None:
    result = BenchResult(
        1, 2, 3, 4, 5, 0.5, 1.5, 2**20, 2**21, 8, 0, 640, 480, 4, "CPU", "openvino", "float32"
    )
    other = dataclasses.replace(result, precision="float16", features=20)
    table = str(Comparison([result, other], [0, 2])).splitlines()
    assert table[1].split() == ["float32", "float16"]
    assert table[3].split() == ["features", "2.0", "20.0"]
    assert table[-1].split() == ["other", "captions", "0.0%", "25.0%"]
