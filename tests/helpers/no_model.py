"""As a program, `batchcap` whose captions are made of the bytes of text files, without a network.

It starts in half a second, and all but the captions is the real program.
"""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.rows import captioned_row

from batchcap import cli
from batchcap.captioning import run
from batchcap.process.clock import StageClock
from batchcap.rows.parquet import Row
from batchcap.schema import ImageRef

BATCHCAP = (sys.executable, __file__)


class Worker:
    """Takes the place of `CaptionWorker`; a batch is a photo."""

    def __init__(self, *_settings: object) -> None:
        self.execution = SimpleNamespace(runtime="none", precision="float32")
        self.captioner = SimpleNamespace(clock=StageClock())
        self.metadata = {"batchcap.runtime": "none", "batchcap.grid": "8x8"}

    def rows(self, refs: Iterable[ImageRef], *_others: Any) -> Iterator[list[Row]]:
        """Yield the row of each photo; its caption tells its content."""
        for ref in refs:
            path = Path(ref.path)
            status = path.stat()
            described = {"file_size": status.st_size, "mtime_ns": status.st_mtime_ns}
            yield [captioned_row(ref.image_id, path.read_text(), **described)]

    def close(self) -> None:
        """Nothing to end."""


if __name__ == "__main__":
    run.CaptionWorker = Worker  # type: ignore[assignment,misc]
    cli.main()
