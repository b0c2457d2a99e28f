"""The encoder by OpenVINO: equal to TensorFlow's, in `encoder.npz` or in the cache, and damaged."""

import logging
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from helpers.small_model import small_captioner, write_encoder

from batchcap.errors import ModelError, UsageError
from batchcap.model import runtime as runtime_module
from batchcap.model.backbones import extract_features
from batchcap.model.config import ENCODER_FILE, fingerprint
from batchcap.model.openvino_captioner import load_for_openvino
from batchcap.model.runtime import choose_execution, precision_of
from batchcap.model.tensorflow_captioner import (
    TensorFlowCaptioner,
    load_for_tensorflow,
    save_captioner,
)
from batchcap.process.threads import locked_cache
from batchcap.settings import DEFAULT_MODEL, Precision, Runtime

Pixels = npt.NDArray[np.uint8]


@pytest.fixture(scope="module")
def small() -> TensorFlowCaptioner:
    return small_captioner(64)


@pytest.fixture
def model(small: TensorFlowCaptioner, tmp_path: Path) -> Path:
    """A model directory as versions without `encoder.npz` wrote it."""
    save_captioner(small, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="module")
def noise() -> Pixels:
    """Random photos of the small model's size."""
    return np.random.default_rng(1).integers(0, 256, (64, 64, 64, 3), np.uint8)


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: tmp_path / name)
    return tmp_path


def assert_close(features: npt.NDArray[Any], expected: npt.NDArray[Any]) -> None:
    assert features.shape == expected.shape
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, expected, atol=1e-3)


def test_frozen_features_equal_those_of_the_backbone(small, noise):
    """Eleven photos are extracted as eight and three."""
    expected = extract_features(small.backbone, small.config.backbone, noise[:11])
    assert_close(np.asarray(small.extract(noise[:11])), np.asarray(expected))


def test_encoder_of_a_written_graph_equals_tensorflows(model, noise):
    loaded = load_for_tensorflow(model)
    write_encoder(loaded, model)
    expected = np.asarray(loaded.extract(noise[:11]))
    assert_close(load_for_openvino(model).extract(noise[:11]), expected)


def test_encoder_of_the_shipped_model_equals_tensorflows(captioner, reference, photo_crops):
    pixels = photo_crops[:4]
    assert_close(captioner.extract(pixels), np.asarray(reference.extract(pixels)))


def test_the_shipped_graph_is_of_the_shipped_weights():
    with np.load(DEFAULT_MODEL / ENCODER_FILE) as arrays:
        assert arrays["model"].tobytes().decode() == fingerprint(DEFAULT_MODEL)


def test_writing_the_graph_keeps_the_fingerprint(small, model):
    before = fingerprint(model)
    write_encoder(small, model)
    assert fingerprint(model) == before


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_damaged_graph_is_named(small, model, place):
    write_encoder(small, model)
    path = model / ENCODER_FILE
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"encoder\.npz is damaged"):
        load_for_openvino(model)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"float32": np.zeros(9, np.uint8)}, id="not a graph"),
        pytest.param({"float32": np.zeros(9, np.float32)}, id="not bytes"),
    ],
)
def test_graph_that_is_none_is_named(small, model, changes):
    write_encoder(small, model)
    with np.load(model / ENCODER_FILE) as arrays:
        np.savez(model / ENCODER_FILE, **(dict(arrays) | changes))
    with pytest.raises(ModelError, match=r"encoder\.npz is damaged"):
        load_for_openvino(model)


def test_graph_of_another_model_is_refused(small, model):
    write_encoder(small, model)
    vocabulary = model / "vocabulary.txt"
    vocabulary.write_text(vocabulary.read_text(encoding="utf-8").replace("跑", "走"), "utf-8")
    with pytest.raises(ModelError, match="belongs to another model"):
        load_for_openvino(model)


def test_missing_graph_is_exported_once_and_again_if_damaged(model, noise, cache_folder, caplog):
    pixels = noise[:2]
    with caplog.at_level(logging.INFO):
        first = load_for_openvino(model).extract(pixels)
        assert "exporting the encoder with TensorFlow, once" in caplog.text
        caplog.clear()
        (kept,) = (cache_folder / "batchcap" / "openvino").iterdir()
        np.testing.assert_array_equal(load_for_openvino(model).extract(pixels), first)
        assert not caplog.text
    content = bytearray(kept.read_bytes())
    content[len(content) // 2] ^= 1
    for damaged in (content, b""):
        kept.write_bytes(damaged)
        np.testing.assert_array_equal(load_for_openvino(model).extract(pixels), first)
        assert kept.read_bytes() != damaged


def test_unwritable_cache_is_logged_and_changes_nothing(model, noise, cache_folder, caplog):
    (cache_folder / "batchcap").mkdir()
    (cache_folder / "batchcap" / "openvino").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        load_for_openvino(model).extract(noise[:1])
    assert "cannot cache the exported encoder" in caplog.text


def test_several_threads_extract_at_once(small, model, noise):
    write_encoder(small, model)
    extract = load_for_openvino(model).extract
    expected = extract(noise)
    found: dict[int, np.ndarray] = {}

    def work(start: int) -> None:
        found[start] = np.asarray(extract(noise[start : start + 16]))

    threads = [threading.Thread(target=work, args=(start,)) for start in range(0, 64, 16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_close(np.concatenate([found[start] for start in range(0, 64, 16)]), expected)


def test_locked_cache_builds_once_for_all_threads():
    built = []
    get = locked_cache(lambda key: built.append(key) or key)
    threads = [threading.Thread(target=get, args=(7,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert built == [7]


def test_auto_is_openvino_unless_tensorflow_finds_a_gpu(monkeypatch):
    monkeypatch.setattr(runtime_module, "has_gpu", lambda: True)
    for device, expected in (("CPU", Runtime.OPENVINO), ("a GPU", Runtime.TENSORFLOW)):
        monkeypatch.setattr(runtime_module, "start_tensorflow", lambda device=device: device)
        assert choose_execution(Runtime.AUTO, Precision.FLOAT32).runtime is expected


@pytest.mark.parametrize(
    ("asked", "runtime", "has_gpu", "expected"),
    [
        (Precision.AUTO, Runtime.AUTO, False, Precision.INT8),
        (Precision.AUTO, Runtime.AUTO, True, Precision.FLOAT32),
        (Precision.AUTO, Runtime.OPENVINO, True, Precision.INT8),
        (Precision.AUTO, Runtime.TENSORFLOW, False, Precision.FLOAT32),
        (Precision.BFLOAT16, Runtime.AUTO, False, Precision.BFLOAT16),
    ],
)
def test_auto_precision_is_int8_on_cpus_if_the_model_has_it(
    monkeypatch, asked, runtime, has_gpu, expected
):
    monkeypatch.setattr(runtime_module, "has_gpu", lambda: has_gpu)
    assert precision_of(asked, runtime, has_int8=True) is expected
    without = Precision.FLOAT32 if asked is Precision.AUTO else asked
    assert precision_of(asked, runtime, has_int8=False) is without


def test_int8_needs_a_model_that_has_it_and_openvino(monkeypatch):
    with pytest.raises(UsageError, match="batchcap model quantise"):
        precision_of(Precision.INT8, Runtime.AUTO, has_int8=False)
    with pytest.raises(UsageError, match="int8 is for CPUs"):
        choose_execution(Runtime.TENSORFLOW, Precision.INT8)
    monkeypatch.setattr(runtime_module, "has_gpu", lambda: True)
    assert choose_execution(Runtime.AUTO, Precision.INT8).runtime is Runtime.OPENVINO


def test_precision_that_openvino_lacks_is_refused(monkeypatch):
    core = type(runtime_module.openvino_core())
    monkeypatch.setattr(core, "get_property", lambda *_: ["FP32"])
    with pytest.raises(UsageError, match="does not support bfloat16"):
        choose_execution(Runtime.OPENVINO, Precision.BFLOAT16)


def test_captions_on_cpus_need_no_tensorflow(photos_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tensorflow.py").write_text("raise ImportError('tensorflow was imported')")
    shutil.copy(photos_folder / "coffee.jpg", tmp_path)
    program = "from batchcap.cli import main; main()"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    for arguments in (["caption", "coffee.jpg"], ["run", ".", "captions.parquet"]):
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr


SIGNALLED_AFTERWARDS = """
import gc, signal, sys, threading
from pathlib import Path

signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
use(Path(sys.argv[1]), Path(sys.argv[2]))
free = threading.Thread(target=gc.collect)
free.start()
free.join()
signal.raise_signal(signal.SIGUSR1)
"""


@pytest.mark.parametrize(
    "use",
    [
        "from batchcap.model.openvino_captioner import load_for_openvino\n"
        "import numpy as np\n"
        "pixels = np.zeros((2, 240, 240, 3), np.uint8)\n"
        "use = lambda model, photos: load_for_openvino(model).extract(pixels)",
        "from batchcap.training.quantisation import quantise_model\n"
        "from batchcap.settings import QuantiseSettings\n"
        "use = lambda model, photos: quantise_model(QuantiseSettings(model=model, images=photos))",
    ],
    ids=["loaded", "quantised"],
)
def test_signals_are_handled_after_a_thread_freed_the_encoder(
    photos_folder: Path, tmp_path: Path, use: str
) -> None:
    """OpenVINO gives the main thread a signal stack, which another thread could unmap."""
    model = shutil.copytree(DEFAULT_MODEL, tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-c", use + SIGNALLED_AFTERWARDS, model, photos_folder],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


@pytest.mark.parametrize(
    "use",
    [
        "from batchcap.model.runtime import openvino_core; openvino_core()",
        "from batchcap.training.quantisation import import_nncf; import_nncf()",
    ],
)
def test_openvino_and_nncf_send_no_telemetry(cache_folder: Path, use: str) -> None:
    program = (
        "import sys\n"
        f"{use}\n"
        "assert not sys.modules['openvino_telemetry'], 'it would connect to its maker'\n"
    )
    home = os.environ | {"HOME": str(cache_folder)}
    done = subprocess.run([sys.executable, "-c", program], env=home, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert not (cache_folder / "intel").exists()
