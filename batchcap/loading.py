"""Photos are read in processes of their own: a file that kills or hangs its reader costs a row.

Whatever a file does to the decoder, the run goes on: the file is tried once more with a new
process, and is given up, as a rejection, when that one dies too. Processes that die before they
have seen a file are another matter: then no photo can be read, and the run ends.
"""

import contextlib
import logging
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from batchcap.contracts import BatchcapError, ErrorType, LoadedImage, Rejection

Load = Callable[[str], LoadedImage]

TRIES = 2
STARTS = 3
START_S = 60.0  # it takes one, on a busy machine several
STOPPED = "the readers of photos have been stopped"
# New interpreters: forked ones would share the lock of the output and TensorFlow's threads.
PROCESSES = multiprocessing.get_context("spawn")

log = logging.getLogger(__name__)


class _DiedError(Exception):
    """The process did not answer; says what became of it."""


class _Reader:
    """One process that loads the photos it is told to, one at a time.

    has_begun: it has come so far that what it dies of is a photo.
    """

    def __init__(self, load: Load) -> None:
        self.has_begun = False
        self._connection, theirs = PROCESSES.Pipe()
        self._process = PROCESSES.Process(target=_serve, args=(theirs, load), daemon=True)
        with _signals_blocked():
            self._process.start()
        theirs.close()

    def load(self, path: str, timeout_s: float) -> LoadedImage:
        try:
            if not self.has_begun:
                self._receive(START_S)
                self.has_begun = True
            self._connection.send(path)
            return self._receive(timeout_s)
        except (EOFError, OSError) as error:
            self._process.join(timeout=10)
            raise _DiedError(_ending(self._process.exitcode)) from error

    def _receive(self, timeout_s: float) -> Any:
        if not self._connection.poll(timeout_s):
            raise _DiedError(f"did not come to an end in {timeout_s:.0f} s")
        return self._connection.recv()

    def kill(self) -> None:
        """May be called while another thread loads: that one is told that the process died."""
        self._process.kill()

    def stop(self) -> None:
        self.kill()
        self._process.join()
        self._connection.close()


class Readers:
    """Loads photos in `count` processes; may be called from as many threads at once."""

    def __init__(self, load: Load, count: int, timeout_s: float) -> None:
        self._load, self._timeout_s = load, timeout_s
        self._idle: queue.SimpleQueue[_Reader | None] = queue.SimpleQueue()  # None: no more
        self._changing = threading.Lock()
        self._alive: set[_Reader] = set()
        self._stopped = False
        for _ in range(count):
            self._idle.put(self._start())

    def __call__(self, path: str) -> LoadedImage:
        """Load one photo, whatever the file does.

        Raises:
            BatchcapError: no process can be started.
            RuntimeError: the readers have been stopped.
        """
        reader, deaths, starts = self._idle.get(), 0, 0
        try:
            while deaths < TRIES:
                if reader is None:
                    raise RuntimeError(STOPPED)
                try:
                    return reader.load(path, self._timeout_s)
                except _DiedError as death:
                    how = str(death)
                    deaths, starts = deaths + reader.has_begun, starts + (not reader.has_begun)
                    if starts == STARTS:
                        raise BatchcapError(_cannot_start(how)) from death
                    reader = self._replace(reader, f"{how} on {path!r}")
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
        with self._changing:
            self._stopped = True
            for started in self._alive:
                started.kill()
        self._idle.put(None)
        with contextlib.suppress(queue.Empty):
            while (reader := self._idle.get_nowait()) is not None:
                reader.stop()
        self._idle.put(None)  # for the next thread that asks; each passes it on

    def _start(self) -> _Reader | None:
        with self._changing:
            if self._stopped:
                return None
            reader = _Reader(self._load)
            self._alive.add(reader)
            return reader

    def _replace(self, reader: _Reader, what_happened: str) -> _Reader | None:
        if not self._stopped:
            log.warning("a reader of photos %s; starting another", what_happened)
        with self._changing:
            self._alive.discard(reader)
        reader.stop()
        return self._start()


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
    _be_first_to_go()
    threading.Thread(target=_end_with_the_run, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):  # the run has ended
        connection.send(None)  # ready
        while True:
            connection.send(load(connection.recv()))


def _be_first_to_go() -> None:
    """Where memory runs out, Linux is to kill the reader of a huge photo and not the run."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes that are started in the block get none of the signals that end a run.

    Terminals and service managers send them to all processes, but the run decides when to end.
    """
    resource_tracker.ensure_running()  # before, since it unblocks signals
    before = signal.pthread_sigmask(
        signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    )
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_the_run() -> None:
    """A run that is killed closes the connection, which a reader that hangs would not notice."""
    run = multiprocessing.parent_process()
    if run is not None:
        run.join()
        os._exit(1)


def _cannot_start(how: str) -> str:
    return (
        f"each of {STARTS} processes that were to read photos {how} before it had seen one: look "
        "at what stands above, and whether memory or the number of processes is limited"
    )


def _ending(exit_code: int | None) -> str:
    if exit_code is None:
        return "closed its connection"
    if exit_code < 0:
        return f"was killed by {signal.Signals(-exit_code).name}"
    return f"ended with exit code {exit_code}"


def core_count() -> int:
    """A process for each core that this one may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
