"""How work is spread: photos in, rows out. One engine so far: this process, with threads that load.

An engine never raises for one photo: a photo that can't be read is a row that says why.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import islice

import numpy as np

from batchcap.contracts import LoadedImage, Rejection
from batchcap.inputs import ImageRef
from batchcap.model.attention import summarise_attention
from batchcap.model.captioner import Captioner
from batchcap.model.config import DecodeSettings
from batchcap.model.decoding import Decoded
from batchcap.model.images import load_image
from batchcap.model.text import join_words
from batchcap.output import Row
from batchcap.settings import AttentionDetail

LoadedPhoto = tuple[ImageRef, LoadedImage]

BATCHES_AHEAD = 2


def run_locally(
    refs: Iterable[ImageRef],
    captioner: Captioner,
    decode_settings: DecodeSettings,
    batch_size: int,
    attention: AttentionDetail,
    run_id: str,
) -> Iterator[list[Row]]:
    """Caption photos in this process; a batch is decoded while the next ones are loaded.

    Yields rows in the order of `refs`, a batch at a time, one for each photo.
    """
    for photos in _load_batches(refs, captioner.config.backbone.image_size, batch_size):
        decoded = _caption(photos, captioner, decode_settings, batch_size)
        origin = {"run_id": run_id, "created_at": datetime.now(UTC)}
        yield [
            _row(ref, image, _caption_columns(decoded, i, captioner, attention)) | origin
            for i, (ref, image) in enumerate(photos)
        ]


def _load_batches(
    refs: Iterable[ImageRef], image_size: int, batch_size: int
) -> Iterator[list[LoadedPhoto]]:
    refs = iter(refs)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        waiting: deque[tuple[ImageRef, Future[LoadedImage]]] = deque()
        try:
            while True:
                room = (1 + BATCHES_AHEAD) * batch_size - len(waiting)
                for ref in islice(refs, room):
                    waiting.append((ref, pool.submit(load_image, ref.path, image_size)))
                batch = [waiting.popleft() for _ in range(min(batch_size, len(waiting)))]
                if not batch:
                    return
                yield [(ref, future.result()) for ref, future in batch]
        finally:
            pool.shutdown(cancel_futures=True)


def _caption(
    photos: Sequence[LoadedPhoto], captioner: Captioner, settings: DecodeSettings, batch_size: int
) -> Decoded | None:
    """Decode a batch, filled up to its fixed size; rejected photos are dead rows."""
    size = captioner.config.backbone.image_size
    pixels = np.zeros((batch_size, size, size, 3), np.uint8)
    live = np.zeros(batch_size, np.bool_)
    keys = [""] * batch_size
    for row, (_, image) in enumerate(photos):
        if not isinstance(image.pixels, Rejection):
            pixels[row], live[row], keys[row] = image.pixels, True, str(image.sha256)
    return captioner.caption(pixels, live, settings, keys) if live.any() else None


def _row(ref: ImageRef, image: LoadedImage, caption_columns: Row) -> Row:
    rejection = image.pixels if isinstance(image.pixels, Rejection) else None
    return {
        "image_id": ref.image_id,
        "status": "failed" if rejection else "ok",
        **({} if rejection else caption_columns),
        "width": image.width,
        "height": image.height,
        "file_size": image.file_size,
        "mtime_ns": image.mtime_ns,
        "sha256": image.sha256,
        "error_type": rejection and rejection.error_type,
        "error_message": rejection and rejection.message,
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
