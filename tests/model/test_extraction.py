"""The backbone with both runtimes: equal features; OpenVINO's graph is cached and rebuilt."""

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from helpers.small_model import small_captioner

from batchcap.errors import UsageError
from batchcap.model import runtime as runtime_module
from batchcap.model.backbones import extract_features
from batchcap.model.captioner import Captioner
from batchcap.model.extraction import locked_cache, openvino_extractor, tensorflow_extractor
from batchcap.model.runtime import choose_execution
from batchcap.settings import Precision, Runtime


@pytest.fixture(scope="module")
def small() -> Captioner:
    return small_captioner(64)


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    """Random photos of the small model's size."""
    return np.random.default_rng(1).integers(0, 256, (64, 64, 64, 3), np.uint8)


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("openvino", reason="pip install 'batchcap[openvino]'")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: tmp_path / name)
    return tmp_path


def openvino_features(captioner: Captioner, pixels: np.ndarray) -> np.ndarray:
    extract = openvino_extractor(
        captioner.backbone, captioner.config.backbone, Precision.FLOAT32, "fingerprint"
    )
    return np.asarray(extract(pixels))


def assert_close(features: np.ndarray, expected: np.ndarray) -> None:
    assert features.shape == expected.shape
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, expected, atol=1e-3)


def test_frozen_features_equal_those_of_the_backbone(small, noise):
    """Eleven photos are extracted as eight and three."""
    expected = extract_features(small.backbone, small.config.backbone, noise[:11])
    assert_close(np.asarray(small.extract(noise[:11])), np.asarray(expected))


def test_openvinos_features_equal_tensorflows(small, noise, cache_folder):
    assert_close(openvino_features(small, noise), np.asarray(small.extract(noise)))


@pytest.mark.slow
def test_openvinos_features_of_the_shipped_model_equal_tensorflows(
    captioner, photo_crops, cache_folder
):
    pixels = photo_crops[:16]
    expected = tensorflow_extractor(captioner.backbone, captioner.config.backbone)(pixels)
    assert_close(openvino_features(captioner, pixels), np.asarray(expected))


def test_exported_graph_is_cached_and_rebuilt_if_damaged(small, noise, cache_folder):
    pixels = noise[:2]
    first = openvino_features(small, pixels)
    (kept,) = (cache_folder / "batchcap" / "openvino").iterdir()
    exported = kept.stat()
    np.testing.assert_array_equal(openvino_features(small, pixels), first)
    assert kept.stat().st_mtime_ns == exported.st_mtime_ns
    content = bytearray(kept.read_bytes())
    content[len(content) // 2] ^= 1
    for damaged in (content, b""):
        kept.write_bytes(damaged)
        np.testing.assert_array_equal(openvino_features(small, pixels), first)
        assert kept.read_bytes() != damaged
        # Each export continues the numbering of nodes, so some numbers are longer.
        assert kept.stat().st_size == pytest.approx(exported.st_size, rel=0.05)


def test_unwritable_cache_is_logged_and_changes_nothing(small, noise, cache_folder, caplog):
    (cache_folder / "batchcap").mkdir()
    (cache_folder / "batchcap" / "openvino").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        openvino_features(small, noise[:1])
    assert "cannot cache the exported backbone" in caplog.text


def test_several_threads_extract_at_once(small, noise, cache_folder):
    extract = openvino_extractor(
        small.backbone, small.config.backbone, Precision.FLOAT32, "fingerprint"
    )
    expected = np.asarray(small.extract(noise[:64]))
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


def test_missing_openvino_is_a_usage_error(monkeypatch):
    monkeypatch.setattr(runtime_module, "find_spec", lambda _: None)
    assert choose_execution(Runtime.AUTO, Precision.AUTO).runtime is Runtime.TENSORFLOW
    with pytest.raises(UsageError, match=r"pip install 'batchcap\[openvino\]'"):
        choose_execution(Runtime.OPENVINO, Precision.AUTO)


def test_auto_is_openvino_if_installed_and_without_a_gpu(monkeypatch):
    monkeypatch.setattr(runtime_module, "find_spec", lambda _: True)
    for device, expected in (("CPU", Runtime.OPENVINO), ("a GPU", Runtime.TENSORFLOW)):
        monkeypatch.setattr(runtime_module, "start_tensorflow", lambda device=device: device)
        execution = choose_execution(Runtime.AUTO, Precision.AUTO)
        assert (execution.runtime, execution.precision) == (expected, Precision.FLOAT32)


def test_precision_that_openvino_lacks_is_refused(monkeypatch):
    openvino = pytest.importorskip("openvino", reason="pip install 'batchcap[openvino]'")
    monkeypatch.setattr(openvino.Core, "get_property", lambda *_: ["FP32"])
    with pytest.raises(UsageError, match="does not support bfloat16"):
        choose_execution(Runtime.OPENVINO, Precision.BFLOAT16)


def test_openvino_sends_no_telemetry(cache_folder: Path) -> None:
    program = (
        "import sys\n"
        "from batchcap.model.runtime import import_openvino\n"
        "import_openvino().Core()\n"
        "assert not sys.modules['openvino_telemetry'], 'it would connect to its maker'\n"
    )
    home = os.environ | {"HOME": str(cache_folder)}
    done = subprocess.run([sys.executable, "-c", program], env=home, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert not (cache_folder / "intel").exists()
