"""How work is spread: photos in, rows out. One engine so far: this process, with threads.

An engine never raises for one photo: a photo that can't be read is a row that says why.
"""

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import islice
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from batchcap.contracts import LoadedImage, ModelError, Rejection, UsageError
from batchcap.inputs import ImageRef
from batchcap.model.attention import summarise_attention
from batchcap.model.captioner import Captioner
from batchcap.model.config import DecodeSettings, ModelConfig
from batchcap.model.decoding import Decoded
from batchcap.model.images import LoadSettings, load_image
from batchcap.model.text import join_words
from batchcap.output import Row
from batchcap.settings import AttentionDetail, ModelOptions

Item = TypeVar("Item")
Result = TypeVar("Result")
LoadedPhoto = tuple[ImageRef, LoadedImage]
DecodedPhotos = tuple[list[LoadedPhoto], Decoded | None]

BATCHES_LOADED_AHEAD = 2
# While one batch waits for Python or for the device, the other keeps the machine busy; a third is
# ready when one is done.
BATCHES_CAPTIONED_AT_ONCE = 2
BATCHES_UNDER_WAY = 3

log = logging.getLogger(__name__)


def run_locally(
    refs: Iterable[ImageRef],
    captioner: Captioner,
    decode_settings: DecodeSettings,
    batch_size: int,
    attention: AttentionDetail,
    run_id: str,
) -> Iterator[list[Row]]:
    """Caption photos in this process: loading, captioning and what the caller does overlap.

    Yields rows in the order of `refs`, a batch at a time, one for each photo. Holds no more than a
    few batches, however many photos there are.
    """
    load_settings = LoadSettings(captioner.config.backbone.image_size)
    photos = load_photos(refs, load_settings, BATCHES_LOADED_AHEAD * batch_size)
    caption = BatchCaptioner(captioner, decode_settings, batch_size)
    for parts in in_threads(caption, batches(photos, batch_size)):
        yield [row for part in parts for row in caption_rows(*part, captioner, attention, run_id)]


def decode_settings_of(options: ModelOptions, model: ModelConfig) -> DecodeSettings:
    """How the model is to choose words; what does not count is as nobody had asked for it.

    Raises:
        UsageError: a length that the model or the other length does not allow.
    """
    longest = model.decoder.max_length
    if options.max_length and options.max_length > longest:
        raise UsageError(f"--max-length must be at most {longest}, the limit of {options.model}")
    max_length = options.max_length or longest
    if options.min_length > max_length:
        raise UsageError(
            f"--min-length {options.min_length} is more than the {max_length} words of a caption"
        )
    return DecodeSettings(
        max_length=max_length,
        temperature=options.temperature,
        seed=options.seed if options.temperature > 0 else 0,
        top_k=options.top_k,
        top_p=options.top_p,
        beam_size=options.beam_size,
        length_penalty=options.length_penalty if options.beam_size > 1 else 0.0,
        min_length=options.min_length,
        no_repeat_ngram=options.no_repeat_ngram,
    )


def load_photos(
    refs: Iterable[ImageRef], settings: LoadSettings, ahead: int
) -> Iterator[LoadedPhoto]:
    """Read and decode photos on all cores, in order, at most `ahead` before they are taken."""

    def load(ref: ImageRef) -> LoadedPhoto:
        return ref, load_image(ref.path, settings)

    return in_threads(load, refs, os.cpu_count() or 1, ahead)


class BatchCaptioner:
    """Captions batches of photos, in smaller ones from then on where memory turns out too small."""

    def __init__(self, captioner: Captioner, settings: DecodeSettings, batch_size: int) -> None:
        self.captioner, self.settings = captioner, settings
        self.batch_size = batch_size

    def __call__(self, photos: list[LoadedPhoto]) -> list[DecodedPhotos]:
        """Decode photos in as many parts as it takes."""
        parts: list[DecodedPhotos] = []
        while photos:
            size = self.batch_size
            try:
                parts.append((photos[:size], self._decode(photos[:size], size)))
                photos = photos[size:]
            except MemoryError as error:
                self._shrink(size, error)
        return parts

    def _shrink(self, too_large: int, error: MemoryError) -> None:
        if too_large == 1:
            raise ModelError("there is no memory to caption even one photo at a time") from error
        if self.batch_size == too_large:  # else another thread has met the same
            self.batch_size = too_large // 2
            log.warning(
                "no memory for %d photos at a time: going on with %d; --batch-size %d avoids this",
                *(too_large, self.batch_size, self.batch_size),
            )

    def _decode(self, photos: list[LoadedPhoto], rows: int) -> Decoded | None:
        side = self.captioner.config.backbone.image_size
        pixels, live, keys = filled_batch(photos, rows, side)
        return self.captioner.caption(pixels, live, self.settings, keys) if live.any() else None


def filled_batch(
    photos: list[LoadedPhoto], rows: int, image_size: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_], list[str]]:
    """A batch filled up to its fixed size: pixels, live rows, keys; rejected photos are dead rows.

    As `Captioner.caption` takes them: `uint8[rows, S, S, 3]`, `bool[rows]` and `rows` strings.
    """
    pixels = np.zeros((rows, image_size, image_size, 3), np.uint8)
    live = np.zeros(rows, np.bool_)
    keys = [""] * rows
    for row, (_, image) in enumerate(photos):
        if not isinstance(image.pixels, Rejection):
            pixels[row], live[row], keys[row] = image.pixels, True, str(image.sha256)
    return pixels, live, keys


def caption_rows(
    photos: list[LoadedPhoto],
    decoded: Decoded | None,
    captioner: Captioner,
    attention: AttentionDetail,
    run_id: str,
) -> list[Row]:
    """The rows of a batch; `decoded` is None where none of its photos could be read."""
    origin = {"run_id": run_id, "created_at": datetime.now(UTC)}
    return [
        _row(ref, image, _caption_columns(decoded, row, captioner, attention)) | origin
        for row, (ref, image) in enumerate(photos)
    ]


def in_threads(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    threads: int = BATCHES_CAPTIONED_AT_ONCE,
    ahead: int = BATCHES_UNDER_WAY,
) -> Iterator[Result]:
    """The results of `work` in the order of `items`, of which at most `ahead` are under way."""
    with ThreadPoolExecutor(threads) as pool:
        under_way: deque[Future[Result]] = deque()
        try:
            for item in items:
                under_way.append(pool.submit(work, item))
                if len(under_way) >= ahead:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items, the last one perhaps of fewer."""
    left = iter(items)
    while batch := list(islice(left, size)):
        yield batch


def _row(ref: ImageRef, image: LoadedImage, caption_columns: Row) -> Row:
    rejection = image.pixels if isinstance(image.pixels, Rejection) else None
    reason = rejection or image.note
    return {
        "image_id": ref.image_id,
        "status": "failed" if rejection else "ok",
        **({} if rejection else caption_columns),
        "width": image.width,
        "height": image.height,
        "file_size": image.file_size,
        "mtime_ns": image.mtime_ns,
        "sha256": image.sha256,
        "error_type": reason and reason.error_type,
        "error_message": reason and reason.message,
    }


def _caption_columns(
    decoded: Decoded | None, row: int, captioner: Captioner, attention: AttentionDetail
) -> Row:
    if decoded is None:
        return {}
    length = int(decoded.lengths[row])
    finished = bool(decoded.finished[row])
    log_probs = decoded.log_probs[row, : length + finished]
    token_ids = decoded.tokens[row, :length]
    words = captioner.vocabulary.decode(token_ids)
    columns = {
        "caption": join_words(words),
        "tokens": words,
        "token_ids": token_ids.tolist(),
        "token_logprobs": log_probs.tolist(),
        "logprob": float(log_probs.sum()),
        "mean_logprob": float(log_probs.mean()) if len(log_probs) else None,
        "finished": finished,
    }
    weights = decoded.attention[row, :length]
    if attention is not AttentionDetail.NONE:
        columns["attention"] = summarise_attention(weights.reshape(length, *captioner.grid))
    if attention is AttentionDetail.FULL:
        columns["attention_map"] = weights.tolist()
    return columns
