"""A program: `batchcap` whose captions contain the text of files, without a network.

It starts in half a second; all but the captions is the real program.
"""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from helpers.rows import sum_of

from batchcap import cli
from batchcap.captioning import local_engine
from batchcap.captioning.local_engine import Photo
from batchcap.model.caption import Caption
from batchcap.process.clock import StageClock
from batchcap.schema import ImageRef, LoadedImage

BATCHCAP = (sys.executable, __file__)


class Worker:
    """Replaces `CaptionWorker`; a batch is a photo."""

    def __init__(self, *_settings: object) -> None:
        self.execution = SimpleNamespace(runtime="none", precision="float32")
        self.captioner = SimpleNamespace(clock=StageClock())
        self.metadata = {"batchcap.runtime": "none", "batchcap.grid": "1x2"}

    def photos(self, refs: Iterable[ImageRef], *_others: Any) -> Iterator[list[Photo]]:
        """Yield each photo; its caption contains its text."""
        for ref in refs:
            path = Path(ref.path)
            status, content = path.stat(), path.read_text()
            image = LoadedImage(
                np.zeros((1, 1, 3), np.uint8), status.st_size, status.st_mtime_ns, sum_of(content)
            )
            caption = Caption(
                words=["一只", content],
                ids=np.array([7, 9], np.int32),
                log_probs=np.array([-0.5, -0.25, -0.125], np.float32),
                finished=True,
                attention=np.array([[[0.25, 0.75]], [[0.5, 0.5]]], np.float32),
            )
            yield [Photo(ref, image, caption=caption)]

    def close(self) -> None:
        """Nothing to end."""


if __name__ == "__main__":
    local_engine.CaptionWorker = Worker  # type: ignore[assignment,misc]
    cli.main()
