"""Fixtures of many tests: the shipped model, real photos, real data sets if present."""

import ctypes
import gc
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import numpy as np
import numpy.typing as npt
import pytest
from helpers.commands import sharing_the_model
from helpers.places import PHOTOS, data_set
from PIL import Image

from batchcap.captioning.summary import RunSummary
from batchcap.model.config import read_config
from batchcap.settings import DEFAULT_MODEL, Precision, RunSettings, Runtime

if TYPE_CHECKING:  # the process that distributes the tests needs no TensorFlow
    from batchcap.model.captioner import Captioner
    from batchcap.model.tensorflow_captioner import TensorFlowCaptioner

hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# Shells make background jobs ignore SIGINT, and nohup SIGHUP; the processes that tests start would
# inherit that.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)

CROPS = 200
CROP_SIZE = read_config(DEFAULT_MODEL).backbone.image_size


@pytest.fixture(scope="session", autouse=True)
def _shared_model() -> Iterator[None]:
    with sharing_the_model():
        yield


@pytest.fixture(scope="module", autouse=True)
def _return_freed_memory() -> Iterator[None]:
    """Compiling leaves gigabytes of freed memory with the C library, more with each module."""
    yield
    gc.collect()
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="session")
def captioner() -> "Captioner":
    """The shipped model as `run` uses it on CPUs."""
    from batchcap.model.loading import load_captioner
    from batchcap.model.runtime import Execution

    return load_captioner(DEFAULT_MODEL, Execution("CPU", Runtime.OPENVINO, Precision.FLOAT32))


@pytest.fixture(scope="session")
def reference() -> "TensorFlowCaptioner":
    """The shipped model by TensorFlow. Each compiled batch size takes memory for good."""
    from batchcap.model.tensorflow_captioner import load_for_tensorflow

    return load_for_tensorflow(DEFAULT_MODEL)


@pytest.fixture(scope="session")
def photos_folder() -> Path:
    return PHOTOS


@pytest.fixture(scope="session")
def photo_crops(photos_folder: Path) -> npt.NDArray[np.uint8]:
    """`uint8[200, S, S, 3]`: random crops of the photos, the same in every session."""
    photos = [Image.open(path).convert("RGB") for path in sorted(photos_folder.rglob("*.jpg"))]
    rng = np.random.default_rng(0)
    return np.stack([_random_crop(photos[i % len(photos)], rng) for i in range(CROPS)])


def _random_crop(photo: Image.Image, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    side = int(min(photo.size) * rng.uniform(0.3, 1.0))
    left, top = (int(rng.integers(room - side + 1)) for room in photo.size)
    crop = photo.crop((left, top, left + side, top + side))
    return np.asarray(crop.resize((CROP_SIZE, CROP_SIZE), Image.Resampling.BILINEAR))


@pytest.fixture
def asked_of_run(monkeypatch: pytest.MonkeyPatch) -> list[RunSettings]:
    """The settings that `batchcap run` would get; nothing is run."""
    seen: list[RunSettings] = []

    def succeed(settings: RunSettings) -> RunSummary:
        seen.append(settings)
        return RunSummary("out.parquet", "run", "", exit_code=0)

    monkeypatch.setattr("batchcap.captioning.run.run_captioning", succeed)
    return seen


@pytest.fixture(scope="session")
def flickr8k() -> Path:
    """Folder of Flickr8k-CN: `images/`, `captions.zh.txt` and the lists of its splits."""
    return _data_set("BATCHCAP_FLICKR8K", "flickr8k-cn")


@pytest.fixture(scope="session")
def everyday() -> Path:
    """Folder of the photos of `jobs/everyday-zh.jsonl`: `images/` and `captions.zh.jsonl`."""
    return _data_set("BATCHCAP_EVERYDAY", "everyday-zh")


def _data_set(variable: str, name: str) -> Path:
    folder = data_set(variable, name)
    if not folder.is_dir():
        pytest.skip(f"set {variable} to the folder of {name}")
    return folder
