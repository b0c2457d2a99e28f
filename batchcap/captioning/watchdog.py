"""Ends a run that makes no progress, and reports where it hangs.

Time counts only while this process runs: a suspended run (Ctrl-Z, Slurm, a paused container)
continues when it is resumed.
"""

import contextlib
import faulthandler
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from batchcap.process.wording import printable
from batchcap.schema import ImageRef

EXIT_CODE = 1
GRACE_S = 10.0  # for the last words; then another process ends this one
TICK_S = 1.0
SHOWN = 20
GUARD = Path(__file__).with_name("guard.py")


class Watchdog:
    """Counts signs of progress, and keeps the names of photos in flight."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.moves = 0
        self.names: dict[str, None] = {}  # of images in flight, in the order they were taken
        # A duplicate of stderr, which is redirected while TensorFlow starts.
        stderr = os.dup(sys.stderr.fileno()) if sys.stderr else os.open(os.devnull, os.O_WRONLY)
        self.traces = os.fdopen(stderr, "w", encoding="utf-8")

    def progress(self) -> None:
        """Restart the timeout."""
        self.moves += 1

    def in_flight(self, refs: Iterable[ImageRef]) -> Iterator[ImageRef]:
        """Yield photos; each is in flight until it has landed."""
        for ref in refs:
            self.names[ref.image_id] = None
            yield ref

    def landed(self, image_ids: Iterable[str]) -> None:
        """Record that these photos have their rows."""
        for image_id in image_ids:
            self.names.pop(image_id, None)
        self.progress()


@contextlib.contextmanager
def watching(timeout_s: float, last_words: Callable[[str], None]) -> Iterator[Watchdog]:
    """End the process with exit code 1 if there is no progress for `timeout_s` in the block.

    First the stacks of all threads are written to stderr, and a message with the photos in flight
    goes to `last_words`. Committed rows stay. If Python hangs in C code, SIGABRT ends the process.
    """
    watchdog, done = Watchdog(timeout_s), threading.Event()
    tick_s = min(TICK_S, timeout_s / 4)
    dumps_already = faulthandler.is_enabled()
    if not dumps_already:
        faulthandler.enable(watchdog.traces)  # for SIGABRT
    with _guard(timeout_s + GRACE_S, tick_s) as beat:

        def watch() -> None:
            quiet_s, moves, before = 0.0, -1, time.monotonic()
            while not done.wait(tick_s):
                beat()
                now = time.monotonic()
                # A longer gap is no stall: this process was suspended.
                quiet_s += min(now - before, 2 * tick_s)
                before = now
                if watchdog.moves != moves:
                    quiet_s, moves = 0.0, watchdog.moves
                if quiet_s > timeout_s:
                    _end(watchdog, last_words)

        thread = threading.Thread(target=watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield watchdog
        finally:
            done.set()
            thread.join()
            if not dumps_already:
                faulthandler.disable()
            watchdog.traces.close()


@contextlib.contextmanager
def _guard(limit_s: float, tick_s: float) -> Iterator[Callable[[], object]]:
    """Start a process that ends this one unless the yielded function is called regularly."""
    command = [sys.executable, "-I", "-S", str(GUARD), str(limit_s), str(tick_s)]
    guard = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
    )
    assert guard.stdin is not None
    pipe = guard.stdin.fileno()
    os.set_blocking(pipe, False)

    def beat() -> None:
        with contextlib.suppress(OSError):  # the guard was killed or suspended
            os.write(pipe, b".")

    try:
        yield beat
    finally:
        guard.kill()
        guard.wait()
        guard.stdin.close()


def _end(watchdog: Watchdog, last_words: Callable[[str], None]) -> None:
    # Last words may hang too, if the disk is at fault.
    faulthandler.dump_traceback_later(GRACE_S, exit=True, file=watchdog.traces)
    names = [*watchdog.names]
    shown = ", ".join(map(printable, names[:SHOWN])) or "none"
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    if sys.stderr:
        os.dup2(watchdog.traces.fileno(), sys.stderr.fileno())
    faulthandler.dump_traceback(watchdog.traces, all_threads=True)
    with contextlib.suppress(Exception):
        last_words(
            f"no progress for {watchdog.timeout_s:g} s; in flight: {shown}{more}; committed rows "
            "are safe: run again, without these files if it happens again"
        )
    watchdog.traces.flush()
    os._exit(EXIT_CODE)
