"""Measures images per second of each stage of a run, and of a whole run."""

import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from batchcap.captioning.local_engine import (
    CaptionWorker,
    batched,
    in_threads,
    padded_batch,
    rows_of,
    with_captions,
)
from batchcap.captioning.options import WorkerSettings, decode_settings_of
from batchcap.errors import InputError
from batchcap.model.caption import Caption
from batchcap.model.config import read_config
from batchcap.photos.images import LoadSettings
from batchcap.photos.listing import list_images
from batchcap.photos.reader_pool import core_count
from batchcap.process.memory import peak_memory_bytes
from batchcap.rows.layout import Layout
from batchcap.rows.parquet import Row
from batchcap.rows.writer import IDENTITY, open_captions
from batchcap.schema import ImageRef
from batchcap.settings import AttentionDetail, BenchSettings, OnExisting

Result = TypeVar("Result")

GENERATED = 64
GENERATED_SIZE = (640, 480)
TIMEOUT_S = 60.0  # for a photo

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BenchResult:
    """Images per second of each stage alone on all cores, and of a whole run.

    `photos` were timed; `unreadable` others were not. `load` reads and decodes files, `features` is
    the backbone, `captions` the decoder, `write` creates rows and the Parquet file.
    `pipeline_efficiency` is `end_to_end` divided by the rate that the stages would reach one after
    the other, 1 / sum(1 / rate). `peak_memory_bytes` is this process's after the whole run.
    """

    load: float
    features: float
    captions: float
    write: float
    end_to_end: float
    pipeline_efficiency: float
    peak_memory_bytes: int
    photos: int
    unreadable: int
    batch_size: int
    device: str
    runtime: str
    precision: str

    def as_json(self) -> str:
        """Return one JSON object."""
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        stages = ("load", "features", "captions", "write", "end_to_end")
        rates = [f"{name.replace('_', ' '):<12}{getattr(self, name):>10.1f}" for name in stages]
        others = f" ({self.unreadable} others can't be read)" if self.unreadable else ""
        return "\n".join(
            [
                f"{self.photos} photos{others}, {self.batch_size} at a time, on {self.device} with "
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
        UsageError: the model or the machine does not support a setting, or no such directory.
        InputError: there is no photo, or none that can be read.
        ModelError: the model directory is wrong.
    """
    wanted = _worker_settings(settings)
    with (
        tempfile.TemporaryDirectory() as name,
        closing(CaptionWorker(wanted, core_count())) as worker,
    ):
        folder = Path(name)
        found = _refs(settings, folder)
        refs = _readable(found, worker)
        batch_size = min(settings.batch_size, len(refs))
        worker.settings = replace(worker.settings, batch_size=batch_size)
        _run(refs[: 2 * batch_size], folder / "warm.parquet", worker)
        log.info("timing a run of %d photos, then each of its stages", len(refs))
        seconds, _ = _timed(_run, refs, folder / "captions.parquet", worker)
        peak = peak_memory_bytes()
        rates = {
            stage: len(refs) / stage_seconds
            for stage, stage_seconds in _stages(refs, folder / "rows.parquet", worker)
        }
    return BenchResult(
        **rates,
        end_to_end=len(refs) / seconds,
        pipeline_efficiency=len(refs) / seconds * sum(1 / rate for rate in rates.values()),
        peak_memory_bytes=peak,
        photos=len(refs),
        unreadable=len(found) - len(refs),
        batch_size=batch_size,
        device=worker.execution.device,
        runtime=worker.execution.runtime,
        precision=worker.execution.precision,
    )


def _worker_settings(settings: BenchSettings) -> WorkerSettings:
    config = read_config(settings.model)
    return WorkerSettings(
        model=settings.model,
        runtime=settings.runtime,
        precision=settings.precision,
        load=LoadSettings(config.backbone.image_size),
        decode=decode_settings_of(settings, config),
        batch_size=settings.batch_size,
        attention=AttentionDetail.SUMMARY,
        run_id="bench",
        reader_timeout_s=TIMEOUT_S,
    )


def _readable(refs: list[ImageRef], worker: CaptionWorker) -> list[ImageRef]:
    """Return the photos that can be decoded: rejected files would raise the rates."""
    photos = worker.load(refs, worker.settings.batch_size)
    readable = [ref for ref, photo in zip(refs, photos, strict=True) if photo.needs_caption]
    if not readable:
        raise InputError("none of the photos can be read: check --images")
    return readable


def _run(refs: list[ImageRef], output: Path, worker: CaptionWorker) -> None:
    _write(worker.rows(refs), output)


def _write(batches_of_rows: Iterable[list[Row]], output: Path) -> None:
    with open_captions(Layout(output), dict.fromkeys(IDENTITY, ""), OnExisting.ERROR) as folder:
        for rows in batches_of_rows:
            folder.append(rows)
        folder.finish()


def _stages(
    refs: list[ImageRef], output: Path, worker: CaptionWorker
) -> Iterator[tuple[str, float]]:
    """Yield each stage's name and seconds; all photos pass one stage before the next begins."""
    captioner, settings = worker.captioner, worker.settings
    seconds, photos = _timed(lambda: list(worker.load(refs, settings.batch_size)))
    yield "load", seconds
    readable = (photo for photo in photos if photo.needs_caption)  # one may have vanished
    loaded = list(batched(readable, settings.batch_size))
    padded = [padded_batch(batch, settings.batch_size) for batch in loaded]

    def extract(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        return np.asarray(captioner.extract(pixels))

    seconds, features = _timed(lambda: [*in_threads(extract, (pixels for pixels, _ in padded))])
    yield "features", seconds

    def decode(batch: tuple[npt.NDArray[np.float32], list[str]]) -> list[Caption]:
        features, keys = batch
        return captioner.caption_features(features, settings.decode, keys)

    to_decode = zip(features, (keys for _, keys in padded), strict=True)
    seconds, captions = _timed(lambda: [*in_threads(decode, to_decode)])
    yield "captions", seconds
    captioned = [*map(with_captions, loaded, captions)]
    seconds, _ = _timed(lambda: _write((rows_of(batch, settings) for batch in captioned), output))
    yield "write", seconds


def _timed(work: Callable[..., Result], *arguments: Any) -> tuple[float, Result]:
    started = time.perf_counter()
    result = work(*arguments)
    return time.perf_counter() - started, result


def _refs(settings: BenchSettings, folder: Path) -> list[ImageRef]:
    """Return the photos to time; generated ones are repeated."""
    if settings.images is None:
        generated = [_generate(folder / f"{number}.jpg", number) for number in range(GENERATED)]
        return list(islice(cycle(generated), settings.limit))
    refs = list(islice(list_images(str(settings.images)), settings.limit))
    if not refs:
        raise InputError(f"no photo in {settings.images}: check the path")
    return refs


def _generate(path: Path, seed: int) -> ImageRef:
    """Write coloured clouds as a JPEG with the size and decoding time of a photo."""
    rng = np.random.default_rng(seed)
    photo = np.zeros((*GENERATED_SIZE[::-1], 3), np.float32)
    for cells, strength in ((4, 90), (32, 40), (160, 20)):
        noise = rng.normal(128, strength, (cells, cells, 3)).clip(0, 255).astype(np.uint8)
        photo += np.asarray(Image.fromarray(noise).resize(GENERATED_SIZE), np.float32) / 3
    Image.fromarray(photo.astype(np.uint8)).save(path, quality=90)
    return ImageRef(path.name, str(path))
