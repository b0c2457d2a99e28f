"""Photos are read in processes of their own: a file that kills or hangs its reader costs a row.

Whatever a file does to the decoder, the run goes on: the file is tried once more with a new
process, and is given up, as a rejection, when that one dies too.
"""

import contextlib
import logging
import multiprocessing
import os
import queue
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

from batchcap.contracts import ErrorType, LoadedImage, Rejection

Load = Callable[[str], LoadedImage]

TRIES = 2
# New interpreters: forked ones would share the lock of the output and TensorFlow's threads.
PROCESSES = multiprocessing.get_context("spawn")

log = logging.getLogger(__name__)


class _DiedError(Exception):
    """The process did not answer; says what became of it."""


class _Reader:
    """One process that loads the photos it is told to, one at a time."""

    def __init__(self, load: Load) -> None:
        self._connection, theirs = PROCESSES.Pipe()
        self._process = PROCESSES.Process(target=_serve, args=(theirs, load), daemon=True)
        self._process.start()
        theirs.close()

    def load(self, path: str, timeout_s: float) -> LoadedImage:
        try:
            self._connection.send(path)
            if not self._connection.poll(timeout_s):
                raise _DiedError(f"did not come to an end in {timeout_s:.0f} s")
            return self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(timeout=10)
            raise _DiedError(_ending(self._process.exitcode)) from error

    def stop(self) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()


class Readers:
    """Loads photos in `count` processes; may be called from as many threads at once."""

    def __init__(self, load: Load, count: int, timeout_s: float) -> None:
        self._load, self._timeout_s = load, timeout_s
        self._idle: queue.SimpleQueue[_Reader] = queue.SimpleQueue()
        for _ in range(count):
            self._idle.put(_Reader(load))

    def __call__(self, path: str) -> LoadedImage:
        """Load one photo; raises nothing, whatever the file does."""
        reader = self._idle.get()
        try:
            for _ in range(TRIES):
                try:
                    return reader.load(path, self._timeout_s)
                except _DiedError as death:
                    log.warning("a reader of photos %s on %r; starting another", death, path)
                    reader.stop()
                    reader = _Reader(self._load)
                    how = str(death)
        finally:
            self._idle.put(reader)
        return LoadedImage(
            Rejection(
                ErrorType.QUARANTINED,
                f"Each of {TRIES} processes that read this file {how}; look at it, or remove it.",
            )
        )

    def stop(self) -> None:
        """End the processes, whatever they are at."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._idle.get_nowait().stop()


@contextmanager
def readers(load: Load, count: int, timeout_s: float) -> Iterator[Readers]:
    """`count` processes that load photos as `load`, which must be picklable, does.

    A process that takes longer than `timeout_s` for a photo counts as dead.
    """
    started = Readers(load, count, timeout_s)
    try:
        yield started
    finally:
        started.stop()


def _serve(connection: Connection, load: Load) -> None:
    # The run decides when to end, and closes the connection: terminals and systemd signal us too.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _be_first_to_go()
    with contextlib.suppress(EOFError, OSError):  # the run has ended
        while True:
            connection.send(load(connection.recv()))


def _be_first_to_go() -> None:
    """Where memory runs out, Linux is to kill the reader of a huge photo and not the run."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _ending(exit_code: int | None) -> str:
    if exit_code is None:
        return "closed its connection"
    if exit_code < 0:
        return f"was killed by {signal.Signals(-exit_code).name}"
    return f"ended with exit code {exit_code}"


def core_count() -> int:
    """A process for each core that this one may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
