"""What must hold on a GPU; skipped without one: `pytest -m "" -n0 tests/gpu/test_gpu.py`."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from batchcap.model.runtime import has_gpu
from batchcap.settings import DEFAULT_MODEL, DecodeSettings

pytestmark = [
    pytest.mark.skipif(not has_gpu(), reason="this machine has no GPU"),
    pytest.mark.slow,
    pytest.mark.timeout(900),
]

PROGRAM = "from batchcap.cli import main; main()"
MEMORY_MIB = 800
WITH_LITTLE_MEMORY = f"""
import batchcap.cli, tensorflow as tf
(gpu, *_) = tf.config.list_physical_devices("GPU")
limit = tf.config.LogicalDeviceConfiguration(memory_limit={MEMORY_MIB})
tf.config.set_logical_device_configuration(gpu, [limit])
batchcap.cli.main()
"""
# Of a GPU's arithmetic, which differs from a CPU's.
OTHER_CAPTIONS, LOG_PROBABILITY = 0.01, 1e-3
OTHER_CAPTIONS_OF_FLOAT16 = 0.05
BATCH = 64


@dataclass
class Ran:
    """The rows of a run and what it printed."""

    rows: pa.Table
    printed: str


@pytest.fixture(scope="session")
def crops_folder(
    photo_crops: npt.NDArray[np.uint8], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("crops")
    for number, crop in enumerate(photo_crops):
        Image.fromarray(crop).save(folder / f"{number:03}.png")
    return folder


def run(
    photos: Path, output: Path, *flags: object, program: str = PROGRAM, **variables: str
) -> Ran:
    command = [sys.executable, "-c", program, "run", photos, output, "--runtime", "tensorflow"]
    done = subprocess.run(
        [*map(str, [*command, *flags])],
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return Ran(pq.read_table(output).sort_by("image_id"), done.stdout + done.stderr)


@pytest.fixture(scope="session")
def on_gpu(crops_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    ran = run(crops_folder, tmp_path_factory.mktemp("gpu") / "o.parquet")
    if "on CPU with" in ran.printed:
        pytest.skip("TensorFlow cannot use this machine's GPU")
    return ran


def share_of_other_captions(rows: pa.Table, wanted: pa.Table) -> float:
    assert rows["image_id"].equals(wanted["image_id"])
    return float(np.mean(rows["caption"].to_numpy() != wanted["caption"].to_numpy()))


def test_captions_are_those_of_a_cpu(on_gpu: Ran, crops_folder: Path, tmp_path: Path) -> None:
    on_cpu = run(crops_folder, tmp_path / "o.parquet", CUDA_VISIBLE_DEVICES="-1")
    assert "on CPU with" in on_cpu.printed
    assert share_of_other_captions(on_gpu.rows, on_cpu.rows) <= OTHER_CAPTIONS
    same = on_gpu.rows["caption"].to_numpy() == on_cpu.rows["caption"].to_numpy()
    difference = on_gpu.rows["logprob"].to_numpy() - on_cpu.rows["logprob"].to_numpy()
    assert np.abs(difference[same]).max() <= LOG_PROBABILITY


def test_captions_do_not_depend_on_the_batch_size(
    on_gpu: Ran, crops_folder: Path, tmp_path: Path
) -> None:
    by_seven = run(crops_folder, tmp_path / "o.parquet", "--batch-size", 7)
    assert share_of_other_captions(by_seven.rows, on_gpu.rows) <= OTHER_CAPTIONS


def test_float16_changes_few_captions(on_gpu: Ran, crops_folder: Path, tmp_path: Path) -> None:
    half = run(crops_folder, tmp_path / "o.parquet", "--precision", "float16")
    assert share_of_other_captions(half.rows, on_gpu.rows) <= OTHER_CAPTIONS_OF_FLOAT16


def test_a_batch_too_large_for_the_memory_is_halved(
    on_gpu: Ran, crops_folder: Path, tmp_path: Path
) -> None:
    flags = ("--batch-size", len(on_gpu.rows))
    ran = run(crops_folder, tmp_path / "o.parquet", *flags, program=WITH_LITTLE_MEMORY)
    assert "not enough memory for batches of" in ran.printed
    assert share_of_other_captions(ran.rows, on_gpu.rows) <= OTHER_CAPTIONS


@pytest.mark.usefixtures("on_gpu")
def test_all_batches_share_one_trace(
    photo_crops: npt.NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    from batchcap.model.tensorflow_captioner import load_for_tensorflow

    captioner = load_for_tensorflow(DEFAULT_MODEL)
    traced: list[str] = []
    for owner, method in ((captioner.decoder, "step"), (captioner.backbone, "call")):
        monkeypatch.setattr(owner, method, noting(traced, method, getattr(owner, method)))
    settings = DecodeSettings(captioner.config.decoder.max_length)
    batch = photo_crops[:BATCH]
    captioner.caption(batch, settings, ["key"] * BATCH)
    assert {"step", "call"} <= {*traced}
    of_first = len(traced)
    for real in (BATCH, BATCH - 1, 1):  # the last batch is padded
        captioner.caption(batch, settings, ["key"] * real)
    assert len(traced) == of_first


def noting(names: list[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Call a function, and note its name; a compiled one calls Python only while it is traced."""

    def noted(*arguments: Any, **named: Any) -> Any:
        names.append(name)
        return function(*arguments, **named)

    return noted
