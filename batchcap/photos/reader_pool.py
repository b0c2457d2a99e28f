"""Decode photos in worker processes: a file that crashes or hangs one fails a row, not the run.

Such a file is tried once more, alone and in a new process; if that process dies too, the file is
rejected. If processes die before they read any file, the run ends.
"""

import contextlib
import logging
import os
import pickle
import queue
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from batchcap.errors import BatchcapError, UsageError
from batchcap.process.children import NEW_INTERPRETERS, end_with_parent, signals_blocked
from batchcap.process.memory import keep_freed_memory
from batchcap.schema import ErrorType, ImageRef, LoadedImage, Rejection, int64_or_none
from batchcap.storage.remote import RemoteFile, describe, is_url

Load = Callable[[ImageRef], LoadedImage]

STARTS = 3
START_S = 60.0  # for a new process, on a busy machine
WAITS = 10
STOPPED = "the reader pool has been stopped"

log = logging.getLogger(__name__)


class _DiedError(Exception):
    """The process did not answer; the message says what happened to it."""


class _Reader:
    """One process that loads photos, one at a time."""

    def __init__(self, load: Load, timeout_s: float) -> None:
        self._connection, theirs = NEW_INTERPRETERS.Pipe()
        _limit_waiting(self._connection, timeout_s)
        self._pixels = _shared_file()
        self._timeout_s = timeout_s
        self._ready = False
        self._process = NEW_INTERPRETERS.Process(
            target=_serve, args=(theirs, self._pixels, load), daemon=True
        )
        with signals_blocked():
            self._process.start()
        theirs.close()

    def wait_until_ready(self) -> None:
        """Wait for the process to start; later crashes and timeouts are blamed on the photo."""
        if not self._ready:
            self._ready = self._receive(START_S)

    def load(self, photos: Sequence[ImageRef]) -> list[LoadedImage]:
        with self._noticing_death():
            self._connection.send(photos)
        rest, sizes = self._receive(self._timeout_s)
        arrays = [
            os.pread(self._pixels.fileno(), size, end - size)
            for size, end in zip(sizes, accumulate(sizes), strict=True)
            if self._pixels is not None
        ]
        return pickle.loads(rest, buffers=arrays)

    def _receive(self, timeout_s: float) -> Any:
        with self._noticing_death():
            # In short waits: if this process is suspended, only the current wait times out.
            if not any(self._connection.poll(timeout_s / WAITS) for _ in range(WAITS)):
                raise _DiedError(f"did not answer within {timeout_s:.0f} s")
            return self._connection.recv()

    @contextmanager
    def _noticing_death(self) -> Iterator[None]:
        try:
            yield
        except BlockingIOError as error:  # in the middle of a message
            raise _DiedError(f"took no data for {self._timeout_s:.0f} s") from error
        except (EOFError, OSError) as error:
            self._process.join(timeout=10)
            raise _DiedError(_ending(self._process.exitcode)) from error

    def kill(self) -> None:
        """Kill the process; a thread that is loading gets a `_DiedError`."""
        self._process.kill()

    def stop(self) -> None:
        self.kill()
        self._process.join()
        self._connection.close()
        if self._pixels is not None:
            self._pixels.close()


class Readers:
    """A reader pool: loads photos in `count` processes, for as many threads at once.

    `progress` is called whenever a process has loaded photos, or has died and is replaced.
    """

    def __init__(
        self,
        load: Load,
        count: int,
        timeout_s: float,
        progress: Callable[[], object] = lambda: None,
    ) -> None:
        self._load, self._timeout_s, self._progress = load, timeout_s, progress
        self._idle: queue.SimpleQueue[_Reader | None] = queue.SimpleQueue()  # None: no more
        self._lock = threading.Lock()
        self._alive: set[_Reader] = set()
        self._stopped = False
        for _ in range(count):
            self._idle.put(self._start())

    def __call__(self, photos: Sequence[ImageRef]) -> list[LoadedImage]:
        """Load photos, whatever their files do.

        If a process dies on several photos, each is retried alone, so that only the culprit kills a
        second process.

        Raises:
            BatchcapError: no process can be started.
            RuntimeError: the pool has been stopped.
        """
        reader = self._idle.get()
        try:
            reader = self._ready(reader)
            try:
                return self._loaded(reader, photos)
            except _DiedError as death:
                reader = self._replace(
                    reader, f"{death} on one of {[photo.path for photo in photos]!r}"
                )
            images = []
            for photo in photos:
                reader = self._ready(reader)
                try:
                    images += self._loaded(reader, [photo])
                except _DiedError as death:
                    reader = self._replace(reader, f"{death} on {photo.path!r} alone")
                    images.append(_quarantined(photo, death, self._timeout_s))
            return images
        finally:
            self._idle.put(reader)

    def _loaded(self, reader: _Reader, photos: Sequence[ImageRef]) -> list[LoadedImage]:
        images = reader.load(photos)
        self._progress()
        return images

    def stop(self) -> None:
        """End all processes, whatever they are doing."""
        with self._lock:
            self._stopped = True
            for started in self._alive:
                started.kill()
        self._idle.put(None)
        with contextlib.suppress(queue.Empty):
            while (reader := self._idle.get_nowait()) is not None:
                reader.stop()
        self._idle.put(None)  # for the next thread that asks; each passes it on

    def _start(self) -> _Reader | None:
        with self._lock:
            if self._stopped:
                return None
            reader = _Reader(self._load, self._timeout_s)
            self._alive.add(reader)
            return reader

    def _ready(self, reader: _Reader | None) -> _Reader:
        """Return the reader, or a replacement, once it has started."""
        for _ in range(STARTS):
            if reader is None:
                raise RuntimeError(STOPPED)
            try:
                reader.wait_until_ready()
                return reader
            except _DiedError as death:
                how = str(death)
                reader = self._replace(reader, f"{how} while it started")
        raise BatchcapError(
            f"cannot start a reader process: each {how}; check the machine's memory and process "
            "limits, and run again"
        )

    def _replace(self, reader: _Reader, what_happened: str) -> _Reader | None:
        if not self._stopped:
            log.warning("a reader process %s; starting another", what_happened)
        with self._lock:
            self._alive.discard(reader)
        reader.stop()
        self._progress()
        return self._start()


@contextmanager
def readers(load: Load, count: int, timeout_s: float) -> Iterator[Readers]:
    """Run a reader pool of `count` processes during the block; `load` must be picklable.

    A process that takes longer than `timeout_s` for a photo counts as dead.
    """
    started = Readers(load, count, timeout_s)
    try:
        yield started
    finally:
        started.stop()


def _serve(connection: Connection, pixels: Connection | None, load: Load) -> None:
    keep_freed_memory()
    _raise_oom_score()
    end_with_parent()
    with contextlib.suppress(EOFError, OSError):  # the run has ended
        connection.send(True)
        while True:
            _answer(connection, pixels, [load(photo) for photo in connection.recv()])


def _answer(connection: Connection, pixels: Connection | None, images: list[LoadedImage]) -> None:
    """Send images; their arrays through the shared file, whose sizes are sent, if it takes them."""
    arrays: list[pickle.PickleBuffer] = []
    rest = pickle.dumps(images, pickle.HIGHEST_PROTOCOL, buffer_callback=arrays.append)
    if pixels is not None and _written(arrays, pixels.fileno()):
        connection.send((rest, [array.raw().nbytes for array in arrays]))
    else:
        connection.send((pickle.dumps(images, pickle.HIGHEST_PROTOCOL), []))


def _written(arrays: list[pickle.PickleBuffer], file: int) -> bool:
    """Write arrays one after the other; return whether there was space."""
    end = 0
    with contextlib.suppress(OSError):
        for array in arrays:
            end += array.raw().nbytes
            if os.pwrite(file, array.raw(), end - array.raw().nbytes) < array.raw().nbytes:
                return False
        return True
    return False


def _shared_file() -> Connection | None:
    """Return an open file in memory, without a name, where the system has such.

    Pixels cross it at a third of a pipe's cost. It is a `Connection` because `multiprocessing`
    passes those to new processes.
    """
    with contextlib.suppress(AttributeError, OSError):
        return Connection(os.memfd_create("pixels"))
    return None


def _raise_oom_score() -> None:
    """If memory runs out, let Linux kill the reader of a huge photo instead of the run."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _limit_waiting(connection: Connection, timeout_s: float) -> None:
    """Make each read and write of a connection, a socket on Unix, fail after `timeout_s`."""
    limit = struct.pack("ll", int(timeout_s), int(timeout_s % 1 * 1e6))
    with socket.socket(fileno=os.dup(connection.fileno())) as ours:
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, option, limit)


def _quarantined(photo: ImageRef, death: _DiedError, timeout_s: float) -> LoadedImage:
    """Reject a photo with its size, time and hash, so that later runs recognise and skip it."""
    message = f"Two reader processes failed on this file (the second {death}); check or remove it."
    rejection = Rejection(ErrorType.QUARANTINED, message)
    if photo.data is not None:
        return LoadedImage(rejection, photo.size, photo.mtime_ns, photo.sha256)
    if is_url(photo.path):
        file = _described_soon(photo.path, timeout_s)
        return LoadedImage(rejection, file and file.size, file and file.mtime_ns)
    try:
        status = Path(photo.path).stat()
    except (OSError, ValueError):
        return LoadedImage(rejection)
    return LoadedImage(rejection, status.st_size, int64_or_none(status.st_mtime_ns))


def _described_soon(url: str, timeout_s: float) -> RemoteFile | None:
    """Return a store's description of a file; None if it does not answer in time."""
    answers: queue.SimpleQueue[RemoteFile | None] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(describe(url))
        except (OSError, UsageError):
            answers.put(None)

    threading.Thread(target=ask, daemon=True).start()
    with contextlib.suppress(queue.Empty):
        return answers.get(timeout=timeout_s)
    return None


def _ending(exit_code: int | None) -> str:
    if exit_code is None:
        return "closed its connection"
    if exit_code < 0:
        return f"was killed by {signal.Signals(-exit_code).name}"
    return f"ended with exit code {exit_code}"


def core_count() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
