"""End a run that makes no progress, and report where it stopped."""

import contextlib
import faulthandler
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator

from batchcap.contracts import ImageRef
from batchcap.records import printable

EXIT_CODE = 1
GRACE_S = 10.0  # after which C code ends the process, should Python be stuck
SHOWN = 20


class Watchdog:
    """Keeps the time of the last progress, and the images in flight."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.names: dict[str, None] = {}  # of images in flight, in the order they were taken
        # A duplicate of stderr, which is redirected while TensorFlow starts.
        stderr = os.dup(sys.stderr.fileno()) if sys.stderr else os.open(os.devnull, os.O_WRONLY)
        self.traces = os.fdopen(stderr, "w", encoding="utf-8")
        self._last = self._armed = -math.inf
        self.progress()

    def progress(self) -> None:
        """Restart the timeout."""
        self._last = time.monotonic()
        if self._last - self._armed > GRACE_S / 10:  # arming starts a thread each time
            self._armed = self._last
            faulthandler.dump_traceback_later(self.timeout_s + GRACE_S, exit=True, file=self.traces)

    def in_flight(self, refs: Iterable[ImageRef]) -> Iterator[ImageRef]:
        """Pass images on; each is in flight until it has landed."""
        for ref in refs:
            self.names[ref.image_id] = None
            yield ref

    def landed(self, image_ids: Iterable[str]) -> None:
        """These images have their rows."""
        for image_id in image_ids:
            self.names.pop(image_id, None)
        self.progress()

    @property
    def seconds_left(self) -> float:
        """Until the run counts as stalled."""
        return self._last + self.timeout_s - time.monotonic()


@contextlib.contextmanager
def watching(timeout_s: float, last_words: Callable[[str], None]) -> Iterator[Watchdog]:
    """End the process with exit code 1 if nothing moves for `timeout_s` while the block runs.

    First the stacks of all threads go to stderr, and a message with the images in flight to
    `last_words`. Committed rows stay.
    """
    watchdog, done = Watchdog(timeout_s), threading.Event()

    def watch() -> None:
        while not done.wait(max(watchdog.seconds_left, 0.01)):
            if watchdog.seconds_left <= 0:
                _end(watchdog, last_words)

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield watchdog
    finally:
        done.set()
        faulthandler.cancel_dump_traceback_later()
        watchdog.traces.close()


def _end(watchdog: Watchdog, last_words: Callable[[str], None]) -> None:
    names = [*watchdog.names]
    shown = ", ".join(map(printable, names[:SHOWN])) or "none"
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    if sys.stderr:
        os.dup2(watchdog.traces.fileno(), sys.stderr.fileno())
    faulthandler.dump_traceback(watchdog.traces, all_threads=True)
    with contextlib.suppress(Exception):  # the disk may be what is wrong
        last_words(
            f"nothing has moved for {watchdog.timeout_s:g} s; in flight: {shown}{more}; what was "
            "committed is safe: run again, without these files if it happens again"
        )
    watchdog.traces.flush()
    os._exit(EXIT_CODE)
