"""Verb: how many images a second each stage of a run reaches on this machine, and all together."""

import json
import logging
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from batchcap.contracts import InputError, Rejection
from batchcap.engines import (
    LoadedPhoto,
    batches,
    caption_rows,
    decode_settings_of,
    filled_batch,
    in_threads,
    load_photos,
    run_locally,
)
from batchcap.inputs import ImageRef, list_images
from batchcap.model.captioner import Captioner, load_captioner
from batchcap.model.config import DecodeSettings, read_config
from batchcap.model.images import LoadSettings
from batchcap.model.runtime import choose_execution
from batchcap.output import parquet_file
from batchcap.settings import AttentionDetail, BenchSettings

Result = TypeVar("Result")

GENERATED = 64
GENERATED_SIZE = (640, 480)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BenchResult:
    """Images per second of each stage alone on all cores, and of a whole run.

    `load` reads and decodes files, `features` is the backbone, `captions` the decoder, `write`
    makes rows and the Parquet file. `pipeline_efficiency` is `end_to_end` over the rate that the
    stages add up to, 1 / sum(1 / rate). `peak_memory_bytes` is the process's after the whole run.
    """

    load: float
    features: float
    captions: float
    write: float
    end_to_end: float
    pipeline_efficiency: float
    peak_memory_bytes: int
    photos: int
    batch_size: int
    device: str
    runtime: str
    precision: str

    def as_json(self) -> str:
        """One JSON object."""
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        stages = ("load", "features", "captions", "write", "end_to_end")
        rates = [f"{name.replace('_', ' '):<12}{getattr(self, name):>10.1f}" for name in stages]
        return "\n".join(
            [
                f"{self.photos} photos, {self.batch_size} at a time, on {self.device} with "
                f"{self.runtime}, {self.precision}",
                f"{'':<12}{'images/s':>10}",
                *rates,
                f"pipeline efficiency {self.pipeline_efficiency:.2f}",
                f"peak memory {self.peak_memory_bytes / 2**20:,.0f} MiB",
            ]
        )


def run_bench(settings: BenchSettings) -> BenchResult:
    """Time a run of `settings.limit` photos, then each of its stages alone.

    Raises:
        UsageError: a setting that the model or the machine can't do, or no such directory.
        InputError: there is no photo, or none that can be read.
        ModelError: the model directory is wrong.
    """
    decode_settings = decode_settings_of(settings, read_config(settings.model))
    execution = choose_execution(settings.runtime, settings.precision)
    captioner = load_captioner(settings.model, execution)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        refs = _refs(settings, folder)
        batch_size = min(settings.batch_size, len(refs))
        pipeline = partial(
            _run, captioner=captioner, settings=decode_settings, batch_size=batch_size
        )
        pipeline(refs[: 2 * batch_size], folder / "warm.parquet")
        log.info("timing a run of %d photos, then each of its stages", len(refs))
        seconds, _ = _timed(pipeline, refs, folder / "captions.parquet")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        rates = {
            stage: len(refs) / stage_seconds
            for stage, stage_seconds in _stages(
                refs, folder / "rows.parquet", captioner, decode_settings, batch_size
            )
        }
    return BenchResult(
        **rates,
        end_to_end=len(refs) / seconds,
        pipeline_efficiency=len(refs) / seconds * sum(1 / rate for rate in rates.values()),
        peak_memory_bytes=peak * (1 if sys.platform == "darwin" else 1024),
        photos=len(refs),
        batch_size=batch_size,
        device=execution.device,
        runtime=execution.runtime,
        precision=execution.precision,
    )


def _run(
    refs: list[ImageRef],
    output: Path,
    captioner: Captioner,
    settings: DecodeSettings,
    batch_size: int,
) -> None:
    rows = run_locally(refs, captioner, settings, batch_size, AttentionDetail.SUMMARY, "bench")
    with parquet_file(output, {}) as writer:
        for batch in rows:
            writer.append(batch)


def _stages(
    refs: list[ImageRef],
    output: Path,
    captioner: Captioner,
    settings: DecodeSettings,
    batch_size: int,
) -> Iterator[tuple[str, float]]:
    """Each stage's name and seconds, all photos going through one before the next begins."""
    side = captioner.config.backbone.image_size

    def load() -> list[LoadedPhoto]:
        return list(load_photos(refs, LoadSettings(side), batch_size))

    def extract(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        return np.asarray(captioner.extract(pixels))

    def write() -> None:
        with parquet_file(output, {}) as writer:
            for photos, rows in zip(loaded, decoded, strict=True):
                writer.append(caption_rows(photos, rows, captioner, AttentionDetail.SUMMARY, ""))

    seconds, photos = _timed(load)
    yield "load", seconds
    if all(isinstance(image.pixels, Rejection) for _, image in photos):
        raise InputError("none of the photos can be read: there is nothing to time")
    loaded = list(batches(photos, batch_size))
    filled = [filled_batch(batch, batch_size, side) for batch in loaded]
    seconds, features = _timed(lambda: [*in_threads(extract, (pixels for pixels, _, _ in filled))])
    yield "features", seconds
    decode_inputs = [
        (batch, live, settings, keys)
        for batch, (_, live, keys) in zip(features, filled, strict=True)
    ]
    seconds, decoded = _timed(
        lambda: [*in_threads(lambda inputs: captioner.caption_features(*inputs), decode_inputs)]
    )
    yield "captions", seconds
    seconds, _ = _timed(write)
    yield "write", seconds


def _timed(work: Callable[..., Result], *arguments: Any) -> tuple[float, Result]:
    started = time.perf_counter()
    result = work(*arguments)
    return time.perf_counter() - started, result


def _refs(settings: BenchSettings, folder: Path) -> list[ImageRef]:
    """The photos to time; the generated ones are taken again and again."""
    if settings.images is None:
        generated = [_generate(folder / f"{number}.jpg", number) for number in range(GENERATED)]
        return list(islice(cycle(generated), settings.limit))
    refs = list(islice(list_images(str(settings.images)), settings.limit))
    if not refs:
        raise InputError(f"no photo in {settings.images}: check the path")
    return refs


def _generate(path: Path, seed: int) -> ImageRef:
    """Coloured clouds as a JPEG, whose size and decoding time are those of a photo."""
    draws = np.random.default_rng(seed)
    photo = np.zeros((*GENERATED_SIZE[::-1], 3), np.float32)
    for cells, strength in ((4, 90), (32, 40), (160, 20)):
        noise = draws.normal(128, strength, (cells, cells, 3)).clip(0, 255).astype(np.uint8)
        photo += np.asarray(Image.fromarray(noise).resize(GENERATED_SIZE), np.float32) / 3
    Image.fromarray(photo.astype(np.uint8)).save(path, quality=90)
    return ImageRef(path.name, str(path))
