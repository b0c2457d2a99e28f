"""The local engine: captions photos in this process, its threads and its reader processes.

An engine never raises for a single photo: if a photo cannot be read, its row says why.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property, partial
from itertools import chain, islice, takewhile
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from batchcap.captioning.engine import Chunk, Chunks, Task
from batchcap.captioning.options import WorkerSettings
from batchcap.captioning.summary import Counts
from batchcap.errors import ModelError
from batchcap.model.attention import summarise_attention
from batchcap.model.caption import Caption
from batchcap.model.captioner import Captioner
from batchcap.model.loading import load_captioner
from batchcap.model.runtime import choose_execution
from batchcap.model.vocabulary import join_words
from batchcap.photos.images import load_image
from batchcap.photos.reader_pool import Readers, core_count
from batchcap.process.memory import keep_freed_memory
from batchcap.process.wording import printable
from batchcap.rows.parquet import Row
from batchcap.schema import CaptionSource, ImageRef, LoadedImage, Rejection
from batchcap.settings import AttentionDetail

Item = TypeVar("Item")
Result = TypeVar("Result")
Read = Callable[[Sequence[ImageRef]], list[LoadedImage]]
Reusable = Callable[[str], Row | None]

BATCHES_LOADED_AHEAD = 2
# While one batch waits for Python or for the device, the other keeps the machine busy; a third is
# ready when one is done.
BATCHES_CAPTIONED_AT_ONCE = 2
BATCHES_UNDER_WAY = 3
PHOTOS_PER_READ = 8  # more than halves the cost of passing photos between processes
PHOTOS_PER_SLOT = 2  # at most: a batch ends even if no photo needs a slot

log = logging.getLogger(__name__)


def caption_locally(task: Task) -> Chunks:
    """Caption the photos of a task's inventory on this machine."""
    listed = task.inventory.listed(task.goes_on, task.watchdog.progress)
    refs = task.inventory.unfinished(listed, task.goes_on)
    first = list(islice(refs, task.settings.batch_size))
    if task.stop():
        return
    task.inventory.check_any()
    if not first:
        return
    task.look_ahead(len(first))
    wanted = task.worker_settings(batch_size=len(first))
    with closing(CaptionWorker(wanted, core_count(), task.watchdog.progress)) as worker:
        if not task.goes_on():
            return
        name = printable(first[0].image_id)
        task.log_start(f"first {name}; on {worker.execution}", **vars(worker.execution))
        worker.captioner.clock = task.clock
        if not task.goes_on():
            return
        yield Chunk([], worker.metadata, Counts())
        in_flight = task.watchdog.in_flight(chain(first, refs))
        for photos in worker.photos(in_flight, task.reusable, task.stop):
            yield Chunk(rows_of(photos, wanted), worker.metadata, counts_of(photos))


class Photo(NamedTuple):
    """A photo that was read: `reused` are known caption columns, `caption` is a new caption."""

    ref: ImageRef
    image: LoadedImage
    reused: Row | None = None
    caption: Caption | None = None

    @property
    def needs_caption(self) -> bool:
        """Whether the model has to caption the photo."""
        return self.reused is None and not isinstance(self.image.pixels, Rejection)


class CaptionWorker:
    """A loaded model and the processes that read photos for it.

    Starts the processes and the runtime. `readers` is the number of processes; with 0, this process
    reads the photos. `progress` is that of `Readers`. `settings.batch_size` shrinks if memory is
    too small.

    Raises:
        UsageError: this machine lacks the runtime or the precision.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        readers: int,
        progress: Callable[[], object] = lambda: None,
    ) -> None:
        self.settings = settings
        keep_freed_memory()
        # First: its processes start while the runtime does.
        load = partial(load_image, settings=settings.load)
        self._readers = Readers(load, readers, settings.reader_timeout_s, progress)
        self.read: Read = self._readers if readers else lambda refs: [*map(load, refs)]
        try:
            self.execution = choose_execution(settings.runtime, settings.precision)
        except BaseException:
            self.close()
            raise

    @cached_property
    def captioner(self) -> Captioner:
        """The model, loaded at its first use.

        Raises:
            ModelError: the model directory is wrong.
        """
        settings = self.settings
        return load_captioner(settings.model, self.execution, compiled=settings.compiled)

    @property
    def metadata(self) -> dict[str, str]:
        """Metadata of a file with this worker's rows."""
        grid = "{}x{}".format(*self.captioner.grid)
        return {"batchcap.runtime": self.execution.runtime, "batchcap.grid": grid}

    def photos(
        self,
        refs: Iterable[ImageRef],
        reusable: Reusable = lambda _sha256: None,
        is_over: Callable[[], bool] = lambda: False,
    ) -> Iterator[list[Photo]]:
        """Yield photos with their captions, in order, a batch at a time.

        Reading, captioning and the caller's work overlap. Only a few batches are in memory, however
        many photos there are.

        Args:
            refs: the photos.
            reusable: the existing caption columns of a file's SHA-256, or None.
            is_over: once True, no further batch is begun.
        """
        photos = self.load(refs, BATCHES_LOADED_AHEAD * self.settings.batch_size, reusable)
        batches = batched(photos, self.settings.batch_size)
        begun = takewhile(lambda _batch: not is_over(), batches)
        yield from in_threads(self.caption, begun)

    def rows(self, refs: Iterable[ImageRef]) -> Iterator[list[Row]]:
        """Yield the rows of photos in their order, a batch at a time, one row per photo."""
        for batch in self.photos(refs):
            yield rows_of(batch, self.settings)

    def load(
        self,
        refs: Iterable[ImageRef],
        ahead: int,
        reusable: Reusable = lambda _sha256: None,
    ) -> Iterator[Photo]:
        """Read and decode photos on all cores, in order, about `ahead` before they are taken."""

        def load(group: list[ImageRef]) -> list[Photo]:
            with self.captioner.clock.stage("load"):
                images = self.read(group)
            return [
                # Without the bytes, which need no memory while the caption is made.
                Photo(ref._replace(data=None), image)
                for ref, image in zip(group, images, strict=True)
            ]

        groups_ahead = max(ahead // PHOTOS_PER_READ, 1)
        for photos in in_threads(load, _grouped(refs), core_count(), groups_ahead):
            for photo in photos:
                yield photo._replace(reused=_reused(photo.image, reusable))

    def caption(self, photos: list[Photo]) -> list[Photo]:
        """Return the photos with their captions, made in as many batches as memory demands.

        Raises:
            ModelError: memory is too small for a single photo.
        """
        captions: list[Caption] = []
        waiting = [photo for photo in photos if photo.needs_caption]
        while waiting:
            size = self.settings.batch_size
            pixels, keys = padded_batch(waiting[:size], size)
            try:
                captions += self.captioner.caption(pixels, self.settings.decode, keys)
            except MemoryError as error:
                self._shrink(size, error)
                continue
            waiting = waiting[size:]
        return with_captions(photos, captions)

    def _shrink(self, too_large: int, error: MemoryError) -> None:
        if too_large == 1:
            raise ModelError("not enough memory to caption a single photo: free some") from error
        if self.settings.batch_size == too_large:  # else another thread has shrunk it
            size = too_large // 2
            self.settings = replace(self.settings, batch_size=size)
            log.warning(
                "not enough memory for batches of %d photos; continuing with %d "
                "(--batch-size %d avoids this)",
                too_large,
                size,
                size,
            )

    def close(self) -> None:
        """End the reader processes."""
        self._readers.stop()


def _reused(image: LoadedImage, reusable: Reusable) -> Row | None:
    """Return the caption of the same bytes, unless this photo was rejected."""
    if image.sha256 is None or isinstance(image.pixels, Rejection):
        return None
    return reusable(image.sha256)


def _grouped(refs: Iterable[ImageRef]) -> Iterator[list[ImageRef]]:
    left = iter(refs)
    while group := list(islice(left, PHOTOS_PER_READ)):
        yield group


def counts_of(photos: list[Photo]) -> Counts:
    """Count photos by the source of their captions, or by the reason of their failure."""
    rejections = [photo.image.pixels for photo in photos]
    return Counts(
        captioned=sum(photo.caption is not None for photo in photos),
        reused=sum(photo.reused is not None for photo in photos),
        failed=Counter(
            pixels.error_type.value for pixels in rejections if isinstance(pixels, Rejection)
        ),
    )


def with_captions(photos: list[Photo], captions: Iterable[Caption]) -> list[Photo]:
    """Give one caption to each photo that needs one, in order."""
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


def rows_of(photos: list[Photo], settings: WorkerSettings) -> list[Row]:
    """Return the rows of a batch."""
    origin = {"run_id": settings.run_id, "created_at": datetime.now(UTC)}
    return [
        _file_columns(photo) | _caption_columns(photo, settings.attention) | origin
        for photo in photos
    ]


def in_threads(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    threads: int = BATCHES_CAPTIONED_AT_ONCE,
    ahead: int = BATCHES_UNDER_WAY,
) -> Iterator[Result]:
    """Yield the results of `work` in the order of `items`; at most `ahead` are in progress."""
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
        # Without waiting, so that a run can stop at once.
        pool.shutdown(wait=False, cancel_futures=True)


def batched(photos: Iterable[Photo], size: int) -> Iterator[list[Photo]]:
    """Yield lists of photos of which at most `size` need a caption.

    Photos that need none are in the lists too, which are limited by `PHOTOS_PER_SLOT`.
    """
    batch: list[Photo] = []
    waiting = 0
    for photo in photos:
        batch.append(photo)
        waiting += photo.needs_caption
        if waiting == size or len(batch) == PHOTOS_PER_SLOT * size:
            yield batch
            batch, waiting = [], 0
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


def _caption_columns(photo: Photo, attention: AttentionDetail) -> Row:
    caption = photo.caption
    if caption is None:
        return photo.reused or {}
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
    if attention is not AttentionDetail.NONE:
        columns["attention"] = summarise_attention(caption.attention)
    if attention is AttentionDetail.FULL:
        columns["attention_map"] = caption.attention.reshape(len(caption.words), -1).tolist()
    return columns
