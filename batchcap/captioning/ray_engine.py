"""The Ray engine: pieces of the input go to workers on a cluster, rows come back.

Ray Data keeps the workers busy with bounded read-ahead, and retries pieces lost with a process or a
machine. A retried piece yields the same number of answers, so that no row comes back twice. Only
the driver writes. Workers also report progress without rows, since much work yields none.
"""

import logging
import math
import os
import pickle
import queue
import re
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import chdir, contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, compress, islice, takewhile
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa

from batchcap.captioning.arrivals import Arrivals, Piece, PieceInventory, Tally
from batchcap.captioning.engine import Chunks, Task
from batchcap.captioning.inventory import columns_of, list_images_of
from batchcap.captioning.local_engine import CaptionWorker
from batchcap.captioning.options import WorkerSettings
from batchcap.errors import BatchcapError, UsageError, first_line
from batchcap.model.runtime import choose_execution
from batchcap.photos.archives import Archive, Unread
from batchcap.photos.listing import archives_in
from batchcap.process.ending import leave_threads_behind
from batchcap.process.environment import cache_folder
from batchcap.process.signals import SIGNALS, Stopped
from batchcap.process.stderr import DID_NOT_START, kept_back, stderr_to
from batchcap.process.wording import counted
from batchcap.rows.id_hashes import IdSet, hashes_of
from batchcap.rows.index import RowIndex
from batchcap.rows.parquet import Row
from batchcap.schema import ImageRef
from batchcap.settings import RunSettings
from batchcap.storage.remote import is_url

CALLS_AT_ONCE = 2  # of a worker: while one waits for the model, the other loads photos
PHOTOS_PER_PIECE = 256
CONNECT_S = 10.0
REPORT_S = 2.0  # between two reports of a worker, at least
STARTS = 3  # of TensorFlow in a worker
TENSORFLOW_DIED = DID_NOT_START.format("TensorFlow")
INIT = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.CRITICAL}
# Silence Ray's own messages and tracebacks; batchcap reports failures itself.
QUIET = {"RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_IGNORE_UNHANDLED_ERRORS": "1"}

Item = TypeVar("Item")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """A part of a worker's answer for a piece: rows or, after all rows, the piece's tally.

    metadata: of a file with these rows. archive: the piece, if it is an archive. failure: why there
    are no rows; a value, because Ray would wrap an exception. An empty answer reports progress.
    """

    metadata: dict[str, str] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    archive: Archive | None = None
    tally: Tally | None = None
    failure: BatchcapError | None = None


class Workers(NamedTuple):
    """The number of workers, and the CPUs and GPUs of each."""

    number: int
    cpus: int
    gpus: float


def caption_on_ray(task: Task) -> Chunks:
    """Caption the input of a task on a cluster; workers list the photos of their pieces."""
    settings, inventory = task.settings, task.inventory
    listed = pieces_of(
        settings, inventory.note_unlisted, inventory.note_left_out, task.watchdog.progress
    )
    pieces = [*takewhile(lambda _piece: task.goes_on(), listed)]
    inventory.check_list((piece for piece in pieces if isinstance(piece, list)), task.goes_on)
    if pieces and not task.stop():
        task.look_ahead(len(pieces))
        task.log_start(f"in {counted(len(pieces), 'piece')}; on Ray")
        arrivals = Arrivals(inventory, pieces)
        wanted = task.worker_settings(settings.batch_size)
        for answer in run_on_ray(pieces, settings, wanted, task.folder.index):
            for chunk in arrivals.take(answer.archive, answer.rows, answer.tally):
                yield chunk._replace(metadata=answer.metadata)
            if task.stop():
                break
        yield from arrivals.rest()
        if arrivals.untallied and not task.stop():
            raise RuntimeError(f"Ray returned no tally for {arrivals.untallied} pieces: run again")
    if not task.stop():
        inventory.complete = not inventory.unlisted
        inventory.check_any()


def pieces_of(
    settings: RunSettings,
    unlisted: Unread,
    left_out: Callable[[str], object] = lambda _name: None,
    progress: Callable[[], object] = lambda: None,
) -> Iterator[Piece]:
    """Split the input into pieces, one for a worker at a time: archives, or lists of photos.

    Paths are absolute, since workers run elsewhere. `progress` is that of `list_images`.

    Raises:
        UsageError, InputError: as `list_images` does.
    """
    archives = archives_in(settings.source, columns_of(settings))
    if archives is not None:
        yield from (archive._replace(path=_whole(archive.path)) for archive in archives)
        return
    met = IdSet()
    refs = list_images_of(settings, unlisted, left_out=left_out, progress=progress)
    while some := list(islice(refs, PHOTOS_PER_PIECE)):
        is_new = met.add(hashes_of([ref.image_id for ref in some]))  # a list may name a photo twice
        yield [ref._replace(path=_whole(ref.path)) for ref in compress(some, is_new.tolist())]


def _whole(path: str) -> str:
    return path if is_url(path) else str(Path.cwd() / path)


def run_on_ray(
    pieces: Sequence[Piece], settings: RunSettings, worker: WorkerSettings, index: RowIndex
) -> Iterator[Answer]:
    """Caption pieces of an input on all machines of a cluster; yield answers as they arrive.

    The model and the index of existing rows are sent once to each machine. While no answer arrives,
    empty ones are yielded as long as workers make progress or the cluster waits for machines.

    Raises:
        UsageError: Ray is not installed, there is no such cluster, or it has no room for a worker.
        BatchcapError: a worker raised it, or the cluster has failed.
    """
    with _connected(settings.address) as ray, _reporting_failure():
        yield Answer()
        workers = workers_on(_resources(ray), settings.workers, settings.gpus_per_worker)
        model = {path.name: path.read_bytes() for path in worker.model.iterdir() if path.is_file()}
        at_hand = [ray.put(model), ray.put(index)]
        pulse = _start_pulse(ray)
        answers = ray.data.from_items(
            [{"piece": pickle.dumps(piece)} for piece in pieces], override_num_blocks=len(pieces)
        ).map_batches(
            RayWorker,
            fn_constructor_args=(settings, worker, at_hand, pulse),
            batch_size=1,  # a block is one piece; with GPUs, Ray requires a number
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                size=workers.number, max_concurrent_calls_per_actor=CALLS_AT_ONCE
            ),
            num_cpus=workers.cpus,
            num_gpus=workers.gpus,
        )
        tables = answers.iter_batches(batch_size=None, batch_format="pyarrow")
        moves = asking(ray, pulse, workers, settings.stall_timeout)
        for table in with_news(tables, moves, _report_s(settings)):
            if table is None:
                yield Answer()
                continue
            for answer in map(pickle.loads, table["answer"].to_pylist()):
                if answer.failure is not None:
                    raise answer.failure
                yield answer


class Pulse:
    """An actor that workers report to, and that the driver asks about them."""

    def __init__(self) -> None:
        self._workers: dict[str, tuple[str, int]] = {}  # by id: node, pieces
        self._has_moved = False

    def report(self, worker: str, node: str, pieces: int) -> None:
        """Record a worker's progress, its node, and how many pieces it works on."""
        self._workers[worker] = node, pieces
        self._has_moved = True

    def ask(self) -> tuple[bool, int, int]:
        """Return whether a worker made progress since the last call, and how many exist and work.

        A worker exists if its node is alive.
        """
        import ray

        has_moved, self._has_moved = self._has_moved, False
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        pieces = [pieces for node, pieces in self._workers.values() if node in alive]
        return has_moved, len(pieces), sum(map(bool, pieces))


def _start_pulse(ray: Any) -> Any:
    """Start a `Pulse` on the driver's own node, so that it ends only with the driver."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
    return ray.remote(Pulse).options(**options, scheduling_strategy=here).remote()


def asking(ray: Any, pulse: Any, workers: Workers, warn_s: float) -> Callable[[], bool]:
    """Return a function that tells whether the cluster makes progress, or waits for machines.

    It does not wait for an answer, since a hanging cluster gives none.
    """
    asked = [pulse.ask.remote()]
    next_warning = time.monotonic() + warn_s

    def moves() -> bool:
        nonlocal next_warning
        answered, _ = ray.wait(asked, timeout=0)
        if not answered:
            return False
        has_moved, there, busy = ray.get(asked.pop())
        asked.append(pulse.ask.remote())
        waits = not busy and there < workers.number
        now = time.monotonic()
        if has_moved or not waits:
            next_warning = now + warn_s
        elif now >= next_warning:
            next_warning = now + warn_s
            log.warning(
                "the Ray cluster has room for %d of %d workers of %d CPUs and %g GPUs, and none is "
                "busy; waiting for machines",
                there,
                *workers,
            )
        return has_moved or waits

    return moves


def with_news(
    items: Iterable[Item], moves: Callable[[], bool], seconds: float
) -> Generator[Item | None, None, None]:
    """Yield items as they arrive and, every so many seconds without one, None if `moves()`."""
    arrived: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(1)
    over = threading.Event()

    def pass_on() -> None:
        try:
            for item in items:
                arrived.put((item, None))
                if over.is_set():
                    return
            arrived.put((None, None))
        except BaseException as error:
            arrived.put((None, error))

    threading.Thread(target=pass_on, daemon=True).start()
    try:
        while True:
            try:
                item, error = arrived.get(timeout=seconds)
            except queue.Empty:
                if moves():
                    yield None
                continue
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        over.set()
        with suppress(queue.Empty):  # so that the thread can end
            arrived.get_nowait()


def _report_s(settings: RunSettings) -> float:
    """Return an interval that is short enough for the shortest timeout."""
    return min(REPORT_S, settings.stall_timeout / 10)


class RayWorker:
    """A `CaptionWorker` as an actor of Ray Data."""

    moves: Callable[[], object] = staticmethod(lambda: None)  # reports progress

    def __init__(
        self, settings: RunSettings, worker: WorkerSettings, at_hand: Sequence[Any], pulse: Any
    ) -> None:
        import ray

        context: Any = ray.get_runtime_context()
        self.settings, self._pulse = settings, pulse
        self._id, self._node = context.get_actor_id(), context.get_node_id()
        self._pieces, self._counting = 0, threading.Lock()
        self.moves = at_most_every(_report_s(settings), self._report)
        self.failure: BatchcapError | None = None
        with self._busy():
            model, self.index = ray.get(at_hand)
            cpus = context.get_assigned_resources().get("CPU", 1)
            self._start(worker, model, int(cpus))

    def _start(self, worker: WorkerSettings, model: dict[str, bytes], cpus: int) -> None:
        with tempfile.TemporaryDirectory(prefix="batchcap-") as folder:
            for name, data in model.items():
                Path(folder, name).write_bytes(data)
            try:
                _start_runtime(self._id, worker)
                self.moves()
                self.worker = CaptionWorker(replace(worker, model=Path(folder)), cpus, self.moves)
                _ = self.worker.captioner  # loaded while the folder exists
            except BatchcapError as error:  # names the temporary folder
                self.failure = type(error)(str(error).replace(folder, str(worker.model)))

    def _report(self) -> None:
        self._pulse.report.remote(self._id, self._node, self._pieces)

    @contextmanager
    def _busy(self) -> Iterator[None]:
        """Report that there is work; starting counts as a piece."""
        self._count_piece(1)
        try:
            yield
        finally:
            self._count_piece(-1)

    def _count_piece(self, by: int) -> None:
        with self._counting:
            self._pieces += by
            self._report()

    def __call__(self, pieces: pa.Table) -> Iterator[pa.Table]:
        """Yield the answers, pickled, for one pickled piece."""
        with self._busy():
            for piece in map(pickle.loads, pieces["piece"].to_pylist()):
                for answer in self._answers_or_failure(piece):
                    yield pa.table({"answer": pa.array([pickle.dumps(answer)], pa.large_binary())})

    def _answers_or_failure(self, piece: Piece) -> Iterator[Answer]:
        try:
            if self.failure is not None:
                raise self.failure
            yield from self.answers(piece)
        except BatchcapError as error:
            yield Answer(failure=error)

    def answers(self, piece: Piece) -> Iterator[Answer]:
        """Caption a piece; a retried piece yields the same number of answers."""
        # All workers of a machine share one read-only index.
        inventory = PieceInventory(self.settings, self.index)
        archive = piece if isinstance(piece, Archive) else None
        refs: Iterable[ImageRef]
        if isinstance(piece, Archive):
            refs = list_images_of(
                self.settings,
                inventory.note_unlisted,
                archive=piece,
                left_out=inventory.note_left_out,
                progress=self.moves,
            )
        else:
            refs = piece
        failed: dict[int, str] = {}
        rows = chain.from_iterable(self.worker.rows(inventory.unfinished(refs, self._goes_on)))
        while some := list(islice(rows, self.settings.batch_size)):
            self.moves()
            failed |= failures(some)
            yield Answer(self.worker.metadata, some, archive)
        yield Answer(self.worker.metadata, archive=archive, tally=inventory.tally(failed))

    def _goes_on(self) -> bool:
        self.moves()
        return True


def failures(rows: list[Row]) -> dict[int, str]:
    """Return the reason of each photo without a caption, by the hash of its id."""
    failed = [row for row in rows if row["status"] == "failed"]
    hashes = hashes_of([row["image_id"] for row in failed]).tolist()
    return dict(zip(hashes, [row["error_type"] for row in failed], strict=True))


def at_most_every(seconds: float, report: Callable[[], object]) -> Callable[[], None]:
    """Return a function that calls `report` at most once in `seconds`."""
    last = -math.inf

    def reported() -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= seconds:
            last = now
            report()

    return reported


def _start_runtime(worker_id: str, settings: WorkerSettings) -> None:
    """Start OpenVINO or TensorFlow in a worker, which Ray restarts under the same id if it dies.

    A file keeps TensorFlow's output at earlier deaths.

    Raises:
        BatchcapError: TensorFlow can't be imported, or the worker has died here too often.
    """
    file = cache_folder("ray") / worker_id
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+b") as printed:
        printed.seek(0)
        _, *deaths = printed.read().decode(errors="replace").split(TENSORFLOW_DIED)
        if len(deaths) < STARTS:
            with stderr_to(printed.fileno()):
                choose_execution(settings.runtime, settings.precision)
    file.unlink()
    if len(deaths) >= STARTS:
        raise BatchcapError(
            f"TensorFlow ended a worker on {socket.gethostname()} {STARTS} times; it printed:\n"
            f"{deaths[-1].strip()}"
        )


def workers_on(
    nodes: Sequence[dict[str, float]], number: int | None, gpus: float | None
) -> Workers:
    """Choose workers for a cluster whose machines have these resources, by Ray's names.

    One worker per GPU or, without GPUs, per machine; a machine's CPUs are divided among its
    workers.

    Raises:
        UsageError: no machine has room for a worker, and `number` is None.
    """
    if gpus is None:
        gpus = 1.0 if any(node.get("GPU") for node in nodes) else 0.0
    able = [node for node in nodes if node.get("CPU", 0) >= 1 and node.get("GPU", 0) >= gpus]
    if not able:
        if number is None:
            raise UsageError(
                f"no machine of the Ray cluster has a CPU and {gpus:g} GPUs: lower "
                "--gpus-per-worker, or set --workers and let the cluster grow"
            )
        return Workers(number, 1, gpus)
    room = [int(node["GPU"] // gpus) if gpus else 1 for node in able]
    number = number or sum(room)
    side_by_side = max(room) if gpus else -(-number // len(able))
    return Workers(number, max(1, int(min(node["CPU"] for node in able) // side_by_side)), gpus)


def _resources(ray: Any) -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


@contextmanager
def _connected(address: str | None) -> Iterator[Any]:
    """Connect to the cluster at `address` or RAY_ADDRESS, or start one on this machine.

    Disconnects at the end of the block, but not if it is left early.

    Raises:
        UsageError: Ray is not installed, or no cluster can be reached there.
    """
    if not log.isEnabledFor(logging.DEBUG):
        os.environ.update(QUIET | os.environ)
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UsageError("--engine ray needs Ray: pip install 'batchcap[ray]'") from error
    address = address or os.environ.get("RAY_ADDRESS")
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        _check_answers(address)
        # Workers would look for modules in this process's working directory first.
        with chdir(os.sep), kept_back("Ray"):  # it prints that it will be quiet
            ray.init(address, **INIT)
        for number, handler in handlers.items():  # Ray's handlers would end the program
            signal.signal(number, handler)
    except SystemExit as error:  # raised by Ray's handler of this signal
        raise Stopped(signal.SIGTERM) from error
    except (OSError, ValueError) as error:
        raise UsageError(
            f"cannot reach a Ray cluster at {address} ({first_line(error)}): start one, or omit "
            "--address to use this machine only"
        ) from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = 1  # pass each answer on at once
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    _check_version(ray)
    try:
        yield ray
    except BaseException:
        # Ray's threads are still at work: if one used Ray after a shutdown, it would end or crash
        # this process. The end of the process disconnects it.
        leave_threads_behind()
        raise
    ray.shutdown()


def _check_answers(address: str | None) -> None:
    """Raise OSError if nothing listens there; Ray itself would try for minutes."""
    match = re.fullmatch(r"([^/]+):(\d+)", address or "")
    if match:
        socket.create_connection((match[1], int(match[2])), CONNECT_S).close()


def _check_version(ray: Any) -> None:
    """Check that the cluster has this version of batchcap, on at least one machine.

    Raises:
        UsageError: it has another, or none.
    """
    here = version("batchcap")
    task = ray.remote(num_cpus=0)(lambda: version("batchcap"))  # pickled by value: runs anywhere
    with _reporting_failure():
        try:
            there = ray.get(task.remote())
        except PackageNotFoundError:
            there = "none"
    if there != here:
        raise UsageError(
            f"the Ray cluster has batchcap {there}, but this is {here}: install the same version "
            "on all machines"
        )


@contextmanager
def _reporting_failure() -> Iterator[None]:
    """Turn a failure of the cluster into a BatchcapError."""
    from ray.exceptions import RayError

    try:
        yield
    except RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise BatchcapError(
            f"the Ray cluster failed ({reason}); committed rows are safe: run again"
        ) from error
