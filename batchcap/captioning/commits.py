"""Appends an engine's rows to OUTPUT, and commits them while they arrive."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain

from batchcap.captioning.engine import Chunk
from batchcap.captioning.forecast import check_room, count_photos
from batchcap.captioning.summary import RunSummary
from batchcap.captioning.watchdog import Watchdog
from batchcap.errors import BatchcapError, OutputError
from batchcap.process.clock import StageClock
from batchcap.process.logs import log_event
from batchcap.process.progress import Progress, progress
from batchcap.process.signals import Stopped, StopRequest
from batchcap.rows.writer import CaptionFolder
from batchcap.settings import RunSettings

log = logging.getLogger(__name__)


class Commits:
    """Appends chunks to OUTPUT, commits them after a number of rows or seconds, counts photos."""

    def __init__(
        self,
        settings: RunSettings,
        folder: CaptionFolder,
        summary: RunSummary,
        stop: StopRequest,
    ) -> None:
        self.settings, self.folder, self.summary, self.stop = settings, folder, summary, stop
        self.clock = StageClock()
        self.listed: int | None = None  # photos of the input, once they are counted
        self._writing = threading.Lock()  # held while rows are appended or committed

    def look_ahead(self, watchdog: Watchdog, least: int) -> None:
        """Check that OUTPUT's disk has room for the rows to come, and begin to count the photos.

        Raises:
            OutputError: it lacks room.
        """
        check_room(
            self.settings, self.folder.layout, len(self.folder.index), least, watchdog.progress
        )
        threading.Thread(target=self._count, daemon=True).start()

    def take(self, chunks: Iterator[Chunk], watchdog: Watchdog) -> None:
        """Append and commit all chunks; if the engine fails, commit those that arrived.

        Raises:
            OutputError: OUTPUT can't be written.
            Stopped: time is up, or a second signal has arrived, which skips the commit.
        """
        try:
            self._append(chunks, watchdog)
        except Stopped:
            if not self.stop.insisted:  # time is up
                self._commit(watchdog)
            raise
        except OutputError:
            raise
        except Exception:
            with suppress(OutputError):  # the first failure is the one to report
                self._commit(watchdog)
            raise
        self._commit(watchdog)

    def commit_at_once(self) -> None:
        """Commit pending rows unless a commit is in progress; nothing is committed afterwards."""
        if self._writing.acquire(blocking=False):  # and never released
            with suppress(BatchcapError):
                self.folder.commit()

    def _append(self, chunks: Iterator[Chunk], watchdog: Watchdog) -> None:
        first = next(chunks, None)
        if first is None:
            return
        started = last_commit = time.monotonic()
        with progress("captioning", None, "image") as bar:
            try:
                for chunk in chain([first], chunks):
                    with self.clock.stage("write"):
                        with self._writing:
                            self.folder.metadata |= chunk.metadata
                            self.folder.append(chunk.rows, again=chunk.again)
                        if self._is_due(time.monotonic() - last_commit):
                            self._commit(watchdog)
                            last_commit = time.monotonic()
                    watchdog.landed(row["image_id"] for row in chunk.rows)
                    self._note(chunk, bar)
            finally:
                self.summary.seconds = time.monotonic() - started
                self.summary.stage_seconds = dict(self.clock.seconds)

    def _is_due(self, seconds: float) -> bool:
        return (
            self.folder.pending >= self.settings.rows_per_part
            or seconds >= self.settings.seconds_per_part
        )

    def _note(self, chunk: Chunk, bar: Progress) -> None:
        self.summary.counts += chunk.counts
        bar.total = self.listed and self.listed - self.summary.counts.already_done
        bar.update(0 if chunk.again else len(chunk.rows))

    def _commit(self, watchdog: Watchdog) -> None:
        rows = self.folder.pending
        # A commit that is interrupted in a store can't be repeated in the same run.
        with self._writing, self.stop.unhurried():
            self.folder.commit()
        watchdog.progress()
        if not self.stop():  # else the next run drops them
            self.folder.drop_superseded(watchdog.progress)
        log_event(log, "committed", f"{rows} rows committed", logging.DEBUG, rows=rows)

    def _count(self) -> None:
        self.listed = count_photos(self.settings)
