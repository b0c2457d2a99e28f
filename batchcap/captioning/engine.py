"""The interface of engines: functions of a task that yield chunks of rows."""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import NamedTuple

from batchcap.captioning.inventory import Inventory
from batchcap.captioning.options import WorkerSettings, worker_settings_of
from batchcap.captioning.summary import Counts
from batchcap.captioning.watchdog import Watchdog
from batchcap.process.clock import StageClock
from batchcap.process.signals import StopRequest
from batchcap.rows.parquet import Row
from batchcap.rows.writer import CaptionFolder
from batchcap.settings import DecodeSettings, RunSettings


class Chunk(NamedTuple):
    """Rows to append, and their effect on a run's counts.

    metadata: of a file with these rows. again: each row replaces a row of this run. A chunk without
    rows reports progress.
    """

    rows: list[Row]
    metadata: dict[str, str]
    counts: Counts
    again: bool = False


Chunks = Generator[Chunk, None, None]


@dataclass(frozen=True)
class Task:
    """A run's request to an engine: rows for the photos of its inventory.

    folder: OUTPUT, with the captions that can be reused. clock: counts seconds of work per stage.
    look_ahead: the engine calls it with the minimum of rows to come, once there are any; raises
    OutputError if OUTPUT's disk lacks room for them. log_start: logs the start of the work.
    """

    settings: RunSettings
    decode: DecodeSettings
    run_id: str
    inventory: Inventory
    folder: CaptionFolder
    stop: StopRequest
    watchdog: Watchdog
    clock: StageClock
    look_ahead: Callable[[int], None]
    log_start: Callable[..., None]

    def goes_on(self) -> bool:
        """Report progress; False once the run is to stop."""
        self.watchdog.progress()
        return not self.stop()

    def worker_settings(self, batch_size: int) -> WorkerSettings:
        """Return the settings of a worker."""
        return worker_settings_of(
            self.settings, self.decode, batch_size=batch_size, run_id=self.run_id
        )

    def reusable(self, sha256: str) -> Row | None:
        """Return OUTPUT's caption columns for a file's SHA-256, if they may be reused."""
        return self.folder.reusable(sha256) if self.settings.reuse else None
