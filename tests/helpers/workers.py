"""Workers around a captioner of a test; they read photos in their own process."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from batchcap.captioning.local_engine import CaptionWorker
from batchcap.captioning.options import WorkerSettings
from batchcap.photos.images import LoadSettings
from batchcap.schema import ImageRef, LoadedImage
from batchcap.settings import AttentionDetail, DecodeSettings, Precision, Runtime


def worker_of(
    captioner: Any,
    batch_size: int,
    attention: AttentionDetail = AttentionDetail.NONE,
    read: Callable[[Sequence[ImageRef]], list[LoadedImage]] | None = None,
) -> CaptionWorker:
    """A worker that captions greedily; `read` replaces its reader pool."""
    config = captioner.config
    worker = CaptionWorker(
        WorkerSettings(
            model=Path("unused"),
            runtime=Runtime.TENSORFLOW,
            precision=Precision.FLOAT32,
            load=LoadSettings(config.backbone.image_size),
            decode=DecodeSettings(config.decoder.max_length),
            batch_size=batch_size,
            attention=attention,
            run_id="",
            reader_timeout_s=60,
        ),
        readers=0,
    )
    worker.captioner = captioner
    if read is not None:
        worker.read = read
    return worker
