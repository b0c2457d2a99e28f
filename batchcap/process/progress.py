"""Progress of long work: a bar on a terminal, plain lines in a log. Always on stderr."""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from tqdm import tqdm

from batchcap.process.logs import writes_json

SECONDS_BETWEEN_LINES = 30.0

log = logging.getLogger(__name__)


class Progress(Protocol):
    """Counts finished work, and the total once it is known."""

    total: float | None

    def update(self, n: int) -> object:
        """Count `n` more."""


class _Lines:
    """Logs progress as one line every half minute."""

    def __init__(self, what: str, total: float | None, unit: str, done: int) -> None:
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self.done_before = done
        self.started = self.last_line = time.monotonic()

    def update(self, n: int) -> None:
        self.done += n
        now = time.monotonic()
        if now - self.last_line < SECONDS_BETWEEN_LINES:
            return
        self.last_line = now
        rate = (self.done - self.done_before) / (now - self.started)
        of, left = "", ""
        if self.total is not None:
            of = f" of {self.total:.0f}"
            if rate:  # else unknown
                left = f", {max(self.total - self.done, 0) / rate:.0f} s left"
        log.info(
            "%s: %d%s %ss, %.1f %ss/s%s",
            self.what,
            self.done,
            of,
            self.unit,
            rate,
            self.unit,
            left,
        )


@contextmanager
def progress(what: str, total: int | None, unit: str, done: int = 0) -> Iterator[Progress]:
    """Count from `done` to `total` with rate and remaining time; `unit` is in the singular.

    `total` is None while it is unknown.
    """
    if sys.stderr.isatty() and not writes_json():
        # Some terminals report a width of 0, in which tqdm shows nothing.
        width = os.get_terminal_size(sys.stderr.fileno()).columns
        options: dict[str, Any] = {"dynamic_ncols": True} if width else {"ncols": 80}
        with tqdm(total=total, initial=done, desc=what, unit=unit, **options) as bar:
            yield bar
    else:
        yield _Lines(what, total, unit, done)
