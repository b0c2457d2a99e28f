"""What an engine is: a function of a task that yields chunks of rows."""

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
    """Rows to append, and what they change in a run's counts.

    metadata: of a file of these rows. again: each row replaces one of this run. A chunk without
    rows reports that the engine works.
    """

    rows: list[Row]
    metadata: dict[str, str]
    counts: Counts
    again: bool = False


Chunks = Generator[Chunk, None, None]


@dataclass(frozen=True)
class Task:
    """What a run asks of an engine: rows for the photos of its inventory.

    folder: OUTPUT, with the captions that can be reused.
    clock: counts seconds of work by stage.
    look_ahead: to be called, with the fewest rows to come, once it is sure that there are some;
        raises OutputError where OUTPUT's disk lacks room for them.
    log_start: logs, with these fields, what begins where.
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
        """What each worker has to know."""
        return worker_settings_of(
            self.settings, self.decode, batch_size=batch_size, run_id=self.run_id
        )

    def reusable(self, sha256: str) -> Row | None:
        """The caption columns of a file's SHA-256 that OUTPUT has, if they may be reused."""
        return self.folder.reusable(sha256) if self.settings.reuse else None
