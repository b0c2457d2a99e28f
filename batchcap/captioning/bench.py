"""Measures images per second of each stage of a run, and of a whole run."""

import json
import logging
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from itertools import cycle, islice
from operator import ne
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from PIL import Image

from batchcap.captioning.caption import caption_images
from batchcap.captioning.local_engine import (
    CaptionWorker,
    batched,
    in_threads,
    padded_batch,
    rows_of,
    with_captions,
)
from batchcap.captioning.options import WorkerSettings, decode_settings_of, precision_for
from batchcap.errors import InputError, UsageError
from batchcap.model.caption import Caption
from batchcap.model.config import read_config
from batchcap.model.encoder import int8_digest
from batchcap.photos.images import LoadSettings
from batchcap.photos.listing import list_images
from batchcap.photos.reader_pool import core_count
from batchcap.process.children import call_in_new_process
from batchcap.process.memory import peak_memory_bytes, peak_memory_of
from batchcap.rows.layout import Layout
from batchcap.rows.parquet import Row
from batchcap.rows.writer import IDENTITY, open_captions
from batchcap.schema import ImageRef
from batchcap.settings import (
    AttentionDetail,
    BenchSettings,
    CaptionSettings,
    ModelOptions,
    OnExisting,
    Precision,
)

Result = TypeVar("Result")

GENERATED = 64
GENERATED_SIZE = (640, 480)
TIMEOUT_S = 60.0  # for a photo
COMPARED = (Precision.FLOAT32, Precision.INT8, Precision.BFLOAT16, Precision.FLOAT16)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BenchResult:
    """Images per second of each stage alone on all cores, and of a whole run.

    `photos` were timed, whose median size is `width` x `height`; `unreadable` others were not.
    `load` reads and decodes files, `features` is the backbone, `captions` the decoder, `write`
    creates rows and the Parquet file. `pipeline_efficiency` is `end_to_end` divided by the rate
    that the stages would reach one after the other, 1 / sum(1 / rate). `first_caption_s` are the
    seconds of a new process until it has captioned one photo. `peak_memory_bytes` is this process's
    after the whole run; with the readers, pages that processes share are counted in each, and only
    Linux tells.
    """

    load: float
    features: float
    captions: float
    write: float
    end_to_end: float
    pipeline_efficiency: float
    first_caption_s: float
    peak_memory_bytes: int
    peak_memory_with_readers_bytes: int | None
    photos: int
    unreadable: int
    width: int
    height: int
    batch_size: int
    device: str
    runtime: str
    precision: str

    def as_json(self) -> str:
        """Return one JSON object."""
        return json.dumps(asdict(self), indent=2)

    @property
    def subject(self) -> str:
        """What was timed, on what."""
        others = f" ({self.unreadable} others can't be read)" if self.unreadable else ""
        return (
            f"{self.photos} photos{others} of {self.width}x{self.height} (median), "
            f"{self.batch_size} at a time, on {self.device} with {self.runtime}"
        )

    @property
    def figures(self) -> dict[str, str]:
        """The measured values, by the name of their row in a table."""
        stages = ("load", "features", "captions", "write", "end_to_end")
        return {name.replace("_", " "): f"{getattr(self, name):.1f}" for name in stages} | {
            "pipeline efficiency": f"{self.pipeline_efficiency:.2f}",
            "first caption, s": f"{self.first_caption_s:.1f}",
            "peak memory, MiB": _mebibytes(self.peak_memory_bytes),
            "with the readers, MiB": _mebibytes(self.peak_memory_with_readers_bytes),
        }

    def __str__(self) -> str:
        return _table(f"{self.subject}, {self.precision}", {"images/s": self.figures})


@dataclass(frozen=True)
class Comparison:
    """Results of several precisions, float32 first, on the same photos.

    `other_captions` is the number of photos whose caption is not that of float32, per result.
    """

    results: list[BenchResult]
    other_captions: list[int]

    def as_json(self) -> str:
        """Return a JSON array with an object for each precision."""
        results = zip(self.results, self.other_captions, strict=True)
        objects = [asdict(result) | {"other_captions": others} for result, others in results]
        return json.dumps(objects, indent=2)

    def __str__(self) -> str:
        results = zip(self.results, self.other_captions, strict=True)
        columns = {
            result.precision: result.figures | {"other captions": f"{others / result.photos:.1%}"}
            for result, others in results
        }
        return _table(f"{self.results[0].subject}; images/s", columns)


def _mebibytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**20:,.0f}"


def _table(title: str, columns: dict[str, dict[str, str]]) -> str:
    """Return figures as text, one column for each set of them."""
    names = next(iter(columns.values()))
    rows = {name: [figures[name] for figures in columns.values()] for name in names}
    lines = [
        f"{name:<22}" + "".join(f"{cell:>10}" for cell in row)
        for name, row in ({"": [*columns]} | rows).items()
    ]
    return "\n".join([title, *lines])


def run_bench(settings: BenchSettings) -> BenchResult | Comparison:
    """Time a run of `settings.limit` photos, then each of its stages alone.

    With `settings.compare`, at each precision that this machine supports, in a process of its own.

    Raises:
        UsageError: the model or the machine does not support a setting, or no such directory.
        InputError: there is no photo, or none that can be read.
        ModelError: the model directory is wrong.
    """
    if not settings.compare:
        result, _ = _measure(settings)
        return result
    measured: list[tuple[BenchResult, list[str]]] = []
    for precision in COMPARED:
        one = replace(settings, precision=precision, compare=False)
        log.info("measuring %s", precision)
        try:
            result, captions = call_in_new_process(_measure, one)
        except UsageError as error:
            if not measured:  # not the precision's fault
                raise
            log.info("without %s: %s", precision, error)
            continue
        if measured and result.device != measured[0][0].device:
            log.info("without %s: it runs on %s only", precision, result.device)
            continue
        measured.append((result, captions))
    _, wanted = measured[0]
    return Comparison(
        [result for result, _ in measured],
        [sum(map(ne, captions, wanted)) for _, captions in measured],
    )


def _measure(settings: BenchSettings) -> tuple[BenchResult, list[str]]:
    """Return the result at one precision, and the caption of each photo."""
    wanted = _worker_settings(settings)
    with (
        tempfile.TemporaryDirectory() as name,
        closing(CaptionWorker(wanted, core_count())) as worker,
    ):
        folder = Path(name)
        found = _refs(settings, folder)
        refs, sizes = _readable(found, worker)
        batch_size = min(settings.batch_size, len(refs))
        worker.settings = replace(worker.settings, batch_size=batch_size)
        _run(refs[: 2 * batch_size], folder / "warm.parquet", worker)
        log.info("timing a run of %d photos at %s", len(refs), worker.execution.precision)
        seconds, _ = _timed(_run, refs, folder / "captions.parquet", worker)
        peak = peak_memory_bytes()
        readers = multiprocessing.active_children()
        peak_with_readers = _total([peak, *(peak_memory_of(reader.pid) for reader in readers)])
        log.info("timing each of its stages, and the first caption of a new process")
        rates = {
            stage: len(refs) / stage_seconds
            for stage, stage_seconds in _stages(refs, folder / "rows.parquet", worker)
        }
        first_s, _ = _timed(call_in_new_process, _caption_one, settings, refs[0].path)
        captions = pq.read_table(folder / "captions.parquet", columns=["caption"])
    result = BenchResult(
        **rates,
        end_to_end=len(refs) / seconds,
        pipeline_efficiency=len(refs) / seconds * sum(1 / rate for rate in rates.values()),
        first_caption_s=first_s,
        peak_memory_bytes=peak,
        peak_memory_with_readers_bytes=peak_with_readers,
        photos=len(refs),
        unreadable=len(found) - len(refs),
        width=int(np.median(sizes[:, 0])),
        height=int(np.median(sizes[:, 1])),
        batch_size=batch_size,
        device=worker.execution.device,
        runtime=worker.execution.runtime,
        precision=worker.execution.precision,
    )
    return result, captions["caption"].to_pylist()


def _total(sizes: list[int | None]) -> int | None:
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None


def _caption_one(settings: BenchSettings, path: str) -> None:
    options = {option.name: getattr(settings, option.name) for option in fields(ModelOptions)}
    list(caption_images(CaptionSettings(images=(path,), **options)))


def _worker_settings(settings: BenchSettings) -> WorkerSettings:
    config = read_config(settings.model)
    return WorkerSettings(
        model=settings.model,
        runtime=settings.runtime,
        precision=precision_for(settings, int8_digest(settings.model)),
        load=LoadSettings(config.backbone.image_size),
        decode=decode_settings_of(settings, config),
        batch_size=settings.batch_size,
        attention=AttentionDetail.SUMMARY,
        run_id="bench",
        reader_timeout_s=TIMEOUT_S,
    )


def _readable(
    refs: list[ImageRef], worker: CaptionWorker
) -> tuple[list[ImageRef], npt.NDArray[np.int_]]:
    """Return the photos that can be decoded, and widths and heights `int[n, 2]`.

    Rejected files would raise the rates.
    """
    photos = worker.load(refs, worker.settings.batch_size)
    readable = [
        (ref, (photo.image.width, photo.image.height))
        for ref, photo in zip(refs, photos, strict=True)
        if photo.needs_caption
    ]
    if not readable:
        raise InputError("none of the photos can be read: check --images")
    return [ref for ref, _ in readable], np.array([size for _, size in readable])


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
