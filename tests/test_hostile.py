"""`batchcap run`, as a user runs it, over a folder of hostile files."""

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from helpers.commands import batchcap_here
from helpers.hostile_files import encoded, make_hostile_tree, photo
from helpers.small_model import make_squares, settings_for, small_captioner, training_arguments
from safetensors.numpy import load_file, save_file

from batchcap.model.tensorflow_captioner import save_captioner

MAX_MEMORY_MIB = 500
MAX_READER_MEMORY_MIB = 300
MAX_SECONDS = 1.0  # of processor time, for one file
TIME_LIMIT_S = 60
# The child reports its own peak: the one that its parent sees includes the parent's memory.
PROGRAM = """
from pathlib import Path
import os, sys
try:
    from batchcap.cli import main
    main()
finally:
    status = Path("/proc/self/status")
    if status.exists():
        Path(os.environ["PEAK_FILE"]).write_text(status.read_text())
"""


@dataclass
class Ran:
    """A finished run: its file, its messages, its peak memory in MiB (0 if unknown)."""

    output: Path
    code: int
    stdout: str
    stderr: str
    peak_mib: float

    def rows(self) -> list[dict[str, Any]]:
        return pq.read_table(self.output, page_checksum_verification=True).to_pylist()


def run(source: Path, place: Path, meddle: Callable[[], None] | None = None) -> Ran:
    """Run the program in its own process, and call `meddle` repeatedly once it has begun."""
    output, peak = place / "captions.parquet", place / "peak"
    stdout, stderr = place / "stdout", place / "stderr"
    command = [sys.executable, "-c", PROGRAM, "run", str(source), str(output), "--batch-size", "8"]
    with stdout.open("wb") as out, stderr.open("wb") as err:
        process = subprocess.Popen(
            command, stdout=out, stderr=err, env=os.environ | {"PEAK_FILE": str(peak)}
        )
    deadline = time.monotonic() + TIME_LIMIT_S
    try:
        while meddle and process.poll() is None and time.monotonic() < deadline:
            if stderr.stat().st_size:  # the first line follows the listing
                meddle()
            time.sleep(0.01)
        process.wait(max(0.0, deadline - time.monotonic()))
    finally:
        process.kill()
    lines = peak.read_text().splitlines() if peak.exists() else []
    high_water = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
    texts = stdout.read_text("utf-8"), stderr.read_text("utf-8")
    return Ran(output, process.returncode, *texts, sum(high_water) / 1024)


@dataclass
class Hostile:
    """The hostile tree with the ten photos in it, the expected states, and the run."""

    folder: Path
    expected: dict[str, str]
    ran: Ran


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory, photos_folder: Path) -> Hostile:
    folder = tmp_path_factory.mktemp("hostile") / "tree"
    expected = make_hostile_tree(folder)
    shutil.copytree(photos_folder, folder / "photos")
    expected |= {
        path.relative_to(folder).as_posix(): "ok" for path in (folder / "photos").rglob("*.jpg")
    }
    return Hostile(folder, expected, run(folder, tmp_path_factory.mktemp("output")))


def test_the_tree_is_hostile_enough(hostile: Hostile) -> None:
    reasons = Counter(hostile.expected.values())
    assert reasons.total() - reasons["ok"] >= 300
    assert reasons["ok"] >= 60
    assert set(reasons) >= {
        *("missing", "not_a_file", "unreadable", "empty", "unsupported_format"),
        *("too_large", "truncated", "corrupt"),
    }


def test_every_file_has_one_row_that_says_what_it_is(hostile: Hostile) -> None:
    assert hostile.ran.code == 0, hostile.ran.stderr
    rows = hostile.ran.rows()
    found = {row["image_id"]: row["error_type"] or row["status"] for row in rows}
    wrong = {
        image_id: (reason, found.get(image_id))
        for image_id, reason in hostile.expected.items()
        if found.get(image_id) != reason
    }
    assert wrong == {}
    assert sorted(row["image_id"] for row in rows) == sorted(hostile.expected)
    for row in rows:
        assert (row["status"] == "ok") == (row["caption"] is not None)
        assert (row["status"] == "ok") == (row["error_message"] is None)


def test_found_equals_captioned_plus_failed(hostile: Hostile) -> None:
    reasons = Counter(hostile.expected.values())
    captioned, found = reasons["ok"], reasons.total()
    counts = f"{found} found, {captioned} captioned, {found - captioned} failed ("
    assert counts in hostile.ran.stdout


def assert_harmless(*texts: str) -> None:
    """Check that texts have no control characters and no traceback."""
    for text in texts:
        assert "Traceback" not in text
        for char in text.replace("\n", ""):
            assert unicodedata.category(char) not in ("Cc", "Cf", "Zl", "Zp", "Cs"), ascii(text)


def test_no_control_character_and_no_traceback_is_printed(hostile: Hostile) -> None:
    assert_harmless(hostile.ran.stdout, hostile.ran.stderr)
    assert len(hostile.ran.stderr.splitlines()) == 1


OBEYED = "\x1b]0;x\x07\x1b[2J\x7f\x9b31m\u202e\u2066\u200b\u2028"


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model whose metrics and card have control characters."""
    folder = tmp_path_factory.mktemp("small") / "model"
    save_captioner(small_captioner(64), folder)
    scores = dict.fromkeys(("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d"), 1.0)
    metrics = {"validation": scores, "signature": f"a\nb{OBEYED}"}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "README.md").write_text(f"# Card\r\n\n- 一\u3000只\t狗 {OBEYED}\n")
    return folder


def replace_in(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def add_weight(model: Path, value: float) -> None:
    path = model / "model.safetensors"
    save_file({**load_file(path), f"backbone/{OBEYED}": np.array([value], np.float32)}, path)


OBEYED_IN_JSON = json.dumps(OBEYED)[1:-1]
# A change of a model, and the expected error.
HOSTILE_MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "word": (
        lambda model: replace_in(model / "vocabulary.txt", "猫", f"猫{OBEYED[:-1]}"),
        r"vocabulary.txt:6: '猫\x1b]0;x",
    ),
    "special word": (
        lambda model: replace_in(model / "vocabulary.txt", "[END]", OBEYED),
        "vocabulary.txt:4: expected [END]",
    ),
    "field": (
        lambda model: replace_in(model / "config.json", "units", OBEYED_IN_JSON),
        "config.json: decoder.",
    ),
    "backbone": (
        lambda model: replace_in(model / "config.json", '"small"', f'"{OBEYED_IN_JSON}"'),
        "config.json: backbone.name: backbone '",
    ),
    "weight": (
        lambda model: add_weight(model, 1.0),
        "has the unknown tensor backbone/?]0;x??[2J",
    ),
    "weight that is no number": (
        lambda model: add_weight(model, np.nan),
        "model.safetensors: backbone/?]0;x??[2J",
    ),
}


@pytest.mark.parametrize("verb", ["caption", "run"])
@pytest.mark.parametrize("text", HOSTILE_MODELS)
def test_errors_quote_texts_of_a_model_harmlessly(
    small_model: Path, photos_folder: Path, tmp_path: Path, text: str, verb: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(small_model, model)
    spoil, expected = HOSTILE_MODELS[text]
    spoil(model)
    asked = {"caption": (photos_folder / "coffee.jpg",), "run": (photos_folder, tmp_path / "out")}
    done = batchcap_here(verb, *asked[verb], "--model", model)
    assert done.returncode == 1
    assert expected in done.stderr
    assert_harmless(done.stdout, done.stderr)


def test_training_logs_untrusted_annotations_harmlessly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So are the texts of the resulting model: its vocabulary and its card."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    squares = make_squares(tmp_path)
    annotations = squares / "captions.jsonl"
    for photo_of in squares.joinpath("images").iterdir():
        photo_of.rename(photo_of.with_name(f"{OBEYED}\n{photo_of.name}"))
    replace_in(annotations, '"image_id": "', f'"image_id": "{OBEYED_IN_JSON}\\n')
    replace_in(annotations, "方块", f"方{OBEYED_IN_JSON}块")
    model = tmp_path / "model"
    settings = settings_for(squares, model, epochs=1, steps_per_epoch=2, data_note=OBEYED)
    done = batchcap_here(*training_arguments(settings))
    assert done.returncode == 0, done.stderr
    card = batchcap_here("model", "card", model)
    assert "?]0;x??[2J??31m????" in card.stdout
    samples = [line for line in done.stderr.splitlines() if "temperature" in line]
    assert all(line.startswith("?]0;x??[2J??31m?????064.png, temp") for line in samples)
    assert samples
    assert_harmless(done.stdout, done.stderr, card.stdout)


def test_card_and_metrics_of_a_model_are_printed_harmlessly(small_model: Path) -> None:
    card = batchcap_here("model", "card", small_model)
    shown = batchcap_here("model", "show", small_model)
    assert card.stdout == "# Card\n\n- 一\u3000只   狗 ?]0;x??[2J??31m???\n"
    assert shown.stdout.splitlines()[-1] == "signature    a?b?]0;x??[2J??31m????"
    assert_harmless(card.stdout, shown.stdout, card.stderr, shown.stderr)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, photos_folder: Path) -> Ran:
    return run(photos_folder, tmp_path_factory.mktemp("alone"))


@pytest.mark.slow
def test_bad_files_cost_little_memory(hostile: Hostile, alone: Ran) -> None:
    if alone.peak_mib == 0:
        pytest.skip("this system does not report the peak memory of a process")
    assert hostile.ran.peak_mib - alone.peak_mib <= MAX_MEMORY_MIB


@pytest.mark.slow
def test_captions_among_bad_files_are_those_of_the_photos_alone(
    hostile: Hostile, alone: Ran
) -> None:
    captions = {row["image_id"]: row["caption"] for row in alone.rows()}
    among = {row["image_id"]: row["caption"] for row in hostile.ran.rows()}
    assert len(captions) == 10
    assert {name: among[f"photos/{name}"] for name in captions} == captions


READER_PROGRAM = """
import json, sys, time
from pathlib import Path
from batchcap.photos.images import LoadSettings, load_image

def peak_mib():
    (line,) = [s for s in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in s]
    return int(line.split()[1]) / 1024

settings, folder = LoadSettings(224), Path(sys.argv[1])
load_image(folder / "photos" / "coffee.jpg", settings)
before, slowest = peak_mib(), 0
for path in sorted(folder.rglob("*")):
    if not path.is_dir():
        started = time.process_time()
        load_image(path, settings)
        slowest = max(slowest, time.process_time() - started)
print(json.dumps([peak_mib() - before, slowest]))
"""


def test_bombs_cost_a_reader_little_memory_and_time(hostile: Hostile) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("this system does not report the peak memory of a process")
    command = [sys.executable, "-c", READER_PROGRAM, str(hostile.folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    mebibytes, seconds = json.loads(done.stdout)
    assert mebibytes < MAX_READER_MEMORY_MIB
    assert seconds < MAX_SECONDS


def test_pandas_and_duckdb_read_every_name(hostile: Hostile) -> None:
    ids = [row["image_id"] for row in hostile.ran.rows()]
    assert ids == sorted(ids)
    assert pd.read_parquet(hostile.ran.output)["image_id"].tolist() == ids
    found = duckdb.execute(
        "select image_id from read_parquet(?, file_row_number = true) order by file_row_number",
        [str(hostile.ran.output)],
    )
    assert [row[0] for row in found.fetchall()] == ids


@pytest.mark.slow
def test_files_that_vanish_and_change_during_the_run_leave_one_row_each(tmp_path: Path) -> None:
    """Files are deleted, cut, replaced and overwritten during the whole run."""
    folder = tmp_path / "photos"
    folder.mkdir()
    versions = [encoded(photo(seed), "JPEG") for seed in range(4)]
    paths = [folder / f"{number:03}.jpg" for number in range(200)]
    for path in paths:
        path.write_bytes(versions[0])
    rounds = itertools.cycle(versions)

    def meddle() -> None:
        data = next(rounds)
        for number, path in enumerate(paths):
            _meddle_with(path, number % 5, data)

    ran = run(folder, tmp_path, meddle)
    assert ran.code == 0, ran.stderr
    assert "Traceback" not in ran.stderr
    rows = ran.rows()
    assert [row["image_id"] for row in rows] == [path.name for path in paths]
    reasons = Counter(row["error_type"] or "ok" for row in rows)
    assert set(reasons) <= {"ok", "missing", "changed", "truncated", "empty"}, reasons
    assert len(reasons) > 1
    whole = {hashlib.sha256(data).hexdigest() for data in versions}
    captions: dict[str, set[str]] = {}
    for row in rows:
        if row["status"] == "ok":
            assert row["sha256"] in whole
            captions.setdefault(row["sha256"], set()).add(row["caption"])
        if row["error_type"] in ("missing", "changed"):
            assert row["sha256"] is row["file_size"] is row["mtime_ns"] is None
    assert {len(of_equal_bytes) for of_equal_bytes in captions.values()} == {1}


def _meddle_with(path: Path, how: int, data: bytes) -> None:
    if how == 0 and path.exists():
        path.unlink()
    elif how == 1:
        path.with_suffix(".part").write_bytes(data)
        path.with_suffix(".part").replace(path)
    elif how in (0, 2):
        path.write_bytes(data)
    elif how == 3:
        path.write_bytes(data[: len(data) // 2])
    else:
        with path.open("r+b") as file:
            file.write(data)
            file.truncate()
