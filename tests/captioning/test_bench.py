"""`batchcap bench` as a user runs it."""

import functools
import json
import shutil
from pathlib import Path

import pytest
from helpers.commands import batchcap_here

from batchcap.captioning.bench import BenchResult

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
    assert (result["photos"], result["batch_size"]) == (5, 5)


def test_table_has_the_rates_of_the_given_photos(photos_folder: Path) -> None:
    done = bench("--images", photos_folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("10 photos, 10 at a time, on ")
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
        "10 photos (60 others can't be read), 10 at a time, "
    )


def test_only_unreadable_photos_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("no photo")
    done = bench("--images", tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "none of the photos can be read" in done.stderr
