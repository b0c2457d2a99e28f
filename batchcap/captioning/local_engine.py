"""The local engine: photos in, rows out, in this process and its threads.

An engine never raises for one photo: a photo that can't be read is a row that says why.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice, takewhile
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from batchcap.errors import ModelError
from batchcap.model.attention import summarise_attention
from batchcap.model.captioner import Caption, Captioner
from batchcap.model.vocabulary import join_words
from batchcap.photos.images import LoadSettings, load_image
from batchcap.photos.reader_pool import core_count
from batchcap.rows.parquet import Row
from batchcap.schema import CaptionSource, ImageRef, LoadedImage, Rejection
from batchcap.settings import AttentionDetail, DecodeSettings

Item = TypeVar("Item")
Result = TypeVar("Result")

BATCHES_LOADED_AHEAD = 2
# While one batch waits for Python or for the device, the other keeps the machine busy; a third is
# ready when one is done.
BATCHES_CAPTIONED_AT_ONCE = 2
BATCHES_UNDER_WAY = 3
PHOTOS_PER_READ = 8  # going to and fro between processes costs less than half of one at a time
PHOTOS_PER_SLOT = 2  # at most: a batch comes to an end even where no photo needs a slot

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """How photos become rows.

    read: loads some photos; None loads them in this process.
    reusable: the caption columns that are there already for a file's SHA-256, or None.
    is_over: once True, no further batch is begun.
    """

    captioner: Captioner
    decode_settings: DecodeSettings
    batch_size: int
    attention: AttentionDetail = AttentionDetail.SUMMARY
    run_id: str = ""
    read: Callable[[Sequence[ImageRef]], list[LoadedImage]] | None = None
    reusable: Callable[[str], Row | None] = lambda _sha256: None
    is_over: Callable[[], bool] = lambda: False


class Photo(NamedTuple):
    """A photo that was read: `reused` are its caption columns if known, `caption` if captioned."""

    ref: ImageRef
    image: LoadedImage
    reused: Row | None = None
    caption: Caption | None = None

    @property
    def needs_caption(self) -> bool:
        """Whether the model has to see it."""
        return self.reused is None and not isinstance(self.image.pixels, Rejection)


def run_locally(refs: Iterable[ImageRef], job: Job) -> Iterator[list[Row]]:
    """Caption photos in this process: loading, captioning and what the caller does overlap.

    Yields rows in the order of `refs`, a batch at a time, one for each photo. Holds no more than a
    few batches, however many photos there are.
    """
    photos = load_photos(refs, job, BATCHES_LOADED_AHEAD * job.batch_size)
    begun = takewhile(lambda _batch: not job.is_over(), batches(photos, job.batch_size))
    for batch in in_threads(BatchCaptioner(job), begun):
        yield caption_rows(batch, job)


def load_photos(refs: Iterable[ImageRef], job: Job, ahead: int) -> Iterator[Photo]:
    """Read and decode photos on all cores, in order, about `ahead` before they are taken."""
    settings = LoadSettings(job.captioner.config.backbone.image_size)
    read = job.read or (lambda refs: [load_image(ref, settings) for ref in refs])

    def load(group: list[ImageRef]) -> list[Photo]:
        with job.captioner.clock.stage("load"):
            images = read(group)
        return [
            # Without the bytes, which need not wait for the caption.
            Photo(ref._replace(data=None), image)
            for ref, image in zip(group, images, strict=True)
        ]

    groups_ahead = max(ahead // PHOTOS_PER_READ, 1)
    for photos in in_threads(load, _grouped(refs), core_count(), groups_ahead):
        for photo in photos:
            yield photo._replace(reused=_reusable(photo.image, job))


def _reusable(image: LoadedImage, job: Job) -> Row | None:
    """The caption of the same bytes, unless this photo was rejected: then it has none."""
    if image.sha256 is None or isinstance(image.pixels, Rejection):
        return None
    return job.reusable(image.sha256)


def _grouped(refs: Iterable[ImageRef]) -> Iterator[list[ImageRef]]:
    left = iter(refs)
    while group := list(islice(left, PHOTOS_PER_READ)):
        yield group


class BatchCaptioner:
    """Captions batches of photos, in smaller ones from then on where memory turns out too small."""

    def __init__(self, job: Job) -> None:
        self.captioner, self.settings = job.captioner, job.decode_settings
        self.batch_size = job.batch_size

    def __call__(self, photos: list[Photo]) -> list[Photo]:
        """Return the photos with their captions, written in as many parts as it takes."""
        captions: list[Caption] = []
        wanting = [photo for photo in photos if photo.needs_caption]
        while wanting:
            size = self.batch_size
            try:
                captions += self._caption(wanting[:size], size)
            except MemoryError as error:
                self._shrink(size, error)
                continue
            wanting = wanting[size:]
        return with_captions(photos, captions)

    def _shrink(self, too_large: int, error: MemoryError) -> None:
        if too_large == 1:
            raise ModelError("there is no memory to caption even one photo at a time") from error
        if self.batch_size == too_large:  # else another thread has met the same
            self.batch_size = too_large // 2
            log.warning(
                "no memory for %d photos at a time: going on with %d; --batch-size %d avoids this",
                *(too_large, self.batch_size, self.batch_size),
            )

    def _caption(self, photos: list[Photo], rows: int) -> list[Caption]:
        pixels, keys = padded_batch(photos, rows)
        return self.captioner.caption(pixels, self.settings, keys)


def with_captions(photos: list[Photo], captions: Iterable[Caption]) -> list[Photo]:
    """Give the photos that need a caption one each, in order."""
    left = iter(captions)
    return [
        photo._replace(caption=next(left)) if photo.needs_caption else photo for photo in photos
    ]


def padded_batch(photos: list[Photo], rows: int) -> tuple[npt.NDArray[np.uint8], list[str]]:
    """Return pixels `uint8[rows, S, S, 3]` and keys of photos, at least one and at most `rows`."""
    real = np.stack([np.asarray(photo.image.pixels) for photo in photos])
    pixels = np.zeros((rows, *real.shape[1:]), np.uint8)
    pixels[: len(real)] = real
    return pixels, [str(photo.image.sha256) for photo in photos]


def caption_rows(photos: list[Photo], job: Job) -> list[Row]:
    """Return the rows of a batch."""
    origin = {"run_id": job.run_id, "created_at": datetime.now(UTC)}
    return [
        _file_columns(photo)
        | (_caption_columns(photo.caption, job) if photo.caption else photo.reused or {})
        | origin
        for photo in photos
    ]


def in_threads(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    threads: int = BATCHES_CAPTIONED_AT_ONCE,
    ahead: int = BATCHES_UNDER_WAY,
) -> Iterator[Result]:
    """The results of `work` in the order of `items`, of which at most `ahead` are under way."""
    pool = ThreadPoolExecutor(threads)
    under_way: deque[Future[Result]] = deque()
    try:
        for item in items:
            under_way.append(pool.submit(work, item))
            if len(under_way) >= ahead:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        # Not waited for: a run that is told to stop at once does so.
        pool.shutdown(wait=False, cancel_futures=True)


def batches(photos: Iterable[Photo], size: int) -> Iterator[list[Photo]]:
    """Lists of photos of which `size` need a caption, the last one perhaps fewer.

    Those that need none pass by with the others.
    """
    batch: list[Photo] = []
    wanting = 0
    for photo in photos:
        batch.append(photo)
        wanting += photo.needs_caption
        if wanting == size or len(batch) == PHOTOS_PER_SLOT * size:
            yield batch
            batch, wanting = [], 0
    if batch:
        yield batch


def _file_columns(photo: Photo) -> Row:
    image = photo.image
    rejection = image.pixels if isinstance(image.pixels, Rejection) else None
    reason = rejection or image.note
    return {
        "image_id": photo.ref.image_id,
        "status": "failed" if rejection else "ok",
        "width": image.width,
        "height": image.height,
        "file_size": image.file_size,
        "mtime_ns": image.mtime_ns,
        "sha256": image.sha256,
        "error_type": reason and reason.error_type,
        "error_message": reason and reason.message,
    }


def _caption_columns(caption: Caption, job: Job) -> Row:
    log_probs = caption.log_probs
    columns = {
        "caption": join_words(caption.words),
        "tokens": caption.words,
        "token_ids": caption.ids.tolist(),
        "token_logprobs": log_probs.tolist(),
        "logprob": float(log_probs.sum()),
        "mean_logprob": float(log_probs.mean()) if len(log_probs) else None,
        "finished": caption.finished,
        "caption_source": CaptionSource.MODEL.value,
    }
    if job.attention is not AttentionDetail.NONE:
        columns["attention"] = summarise_attention(caption.attention)
    if job.attention is AttentionDetail.FULL:
        columns["attention_map"] = caption.attention.reshape(len(caption.words), -1).tolist()
    return columns
