"""Which photos of an input need a row: the listing against the rows that are there."""

import os
from collections.abc import Callable, Iterator

from batchcap.contracts import InputError
from batchcap.inputs import ImageRef, list_images, warn_unlisted
from batchcap.row_index import UNKNOWN, Known, RowIndex
from batchcap.run_report import RunSummary
from batchcap.settings import RunSettings


class Inventory:
    """The photos of an input against the rows that are there, counted while they are listed.

    taken: how many need a row, or a new one. complete: all of the input has been seen. unlisted:
    how many folders could not be.
    """

    def __init__(self, settings: RunSettings, index: RowIndex, summary: RunSummary) -> None:
        self.settings, self.index, self.summary = settings, index, summary
        self.taken = self.unlisted = 0
        self.complete = False

    def unfinished(self, goes_on: Callable[[], bool] = lambda: True) -> Iterator[ImageRef]:
        """The photos that need a row, or a new one; asks `goes_on` at each photo of the input."""
        for ref in list_images(self.settings.source, self.settings.glob, self._note_unlisted):
            if not goes_on():
                return
            if self._is_done(ref):
                continue
            self.taken += 1
            yield ref
            if self.taken == self.settings.limit:
                return
        self.complete = not self.unlisted

    @property
    def vanished(self) -> int:
        """How many rows are of photos that the input no longer has; 0 where it was not all seen."""
        return self.index.vanished if self.complete else 0

    def check_any(self) -> None:
        """Raises InputError if the input has no photo, unless that is allowed."""
        if not (self.taken or self.summary.already_done or self.settings.allow_empty):
            raise InputError(
                f"no photo in {self.settings.source}: check the path, or --glob; "
                "--allow-empty takes this for a success"
            )

    def _is_done(self, ref: ImageRef) -> bool:
        row, summary = self.index.find(ref.image_id), self.summary
        if row is None:
            summary.new += 1
            return False
        self.index.mark_seen(row)
        known = self.index.compare(row, *_size_and_time(ref.path))
        if known is Known.CHANGED:
            summary.changed += 1
            return False
        if known is Known.FAILED and self.settings.retry_failed:
            summary.retried += 1
            return False
        summary.already_done += 1
        summary.failed_before += known is Known.FAILED
        return True

    def _note_unlisted(self, folder: str, reason: str) -> None:
        self.unlisted += 1
        warn_unlisted(folder, reason)


def _size_and_time(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)  # noqa: PTH116, done for every photo of every run
    except (OSError, ValueError):
        return UNKNOWN, UNKNOWN
    return status.st_size, status.st_mtime_ns
