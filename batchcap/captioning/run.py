"""Verb: caption every photo of an input, going on from what is there already."""

import json
import logging
import shutil
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from itertools import chain, islice, takewhile
from typing import Any

from batchcap.captioning.arrivals import Arrivals
from batchcap.captioning.inventory import Inventory, excluded_by, list_images_of
from batchcap.captioning.local_engine import CaptionWorker
from batchcap.captioning.options import decode_settings_of, worker_settings_of
from batchcap.captioning.ray_engine import Chunk, pieces_of, run_on_ray
from batchcap.captioning.summary import RunSummary, read_rate, write_metrics, write_summary
from batchcap.captioning.watchdog import Watchdog, watching
from batchcap.errors import BatchcapError, LockedError, OutputError
from batchcap.model.config import fingerprint, read_config
from batchcap.model.runtime import precision_of
from batchcap.photos.listing import can_be_listed_twice
from batchcap.photos.reader_pool import core_count
from batchcap.process.clock import StageClock
from batchcap.process.logs import log_event
from batchcap.process.progress import progress
from batchcap.process.signals import Stopped, StopRequest, stopping_softly
from batchcap.process.wording import counted, printable
from batchcap.rows.layout import Layout, check_shares, layout_of
from batchcap.rows.parquet import DamagedError, Row, read_file_metadata, saying_where
from batchcap.rows.writer import (
    CaptionFolder,
    Upgrades,
    check_identity,
    existing_rows,
    index_of,
    open_captions,
)
from batchcap.schema import SCHEMA_VERSION, ImageRef
from batchcap.settings import (
    DECODE_DEFAULTS,
    DEFAULT_MODEL,
    AttentionDetail,
    DecodeSettings,
    Engine,
    Precision,
    RunSettings,
)
from batchcap.storage.files import make_folder
from batchcap.storage.locking import locked

VERSIONS = ("batchcap", "tensorflow", "keras", "numpy", "pillow", "pyarrow")
COUNTED_AHEAD = 100_000  # photos, which takes a fraction of a second
BYTES_PER_ROW = {  # on disk, with room to spare: 1,000 photos took 225 a row, with maps 1,600
    AttentionDetail.NONE: 300,
    AttentionDetail.SUMMARY: 700,
    AttentionDetail.FULL: 2500,
}

log = logging.getLogger(__name__)


def run_captioning(settings: RunSettings) -> RunSummary:
    """Caption the photos of `settings.source` that have no row yet; each has one at the end.

    Raises:
        UsageError: a setting that the model or the machine can't do, or no such input.
        InputError: there is no photo, or the input can't be listed.
        ModelError: the model directory is wrong.
        OutputError: the output can't be written, is locked, or is of other settings.
        Stopped: a signal has come; what was finished is committed.
    """
    layout = _layout(settings)
    summary = RunSummary(
        output=str(layout),
        run_id=uuid.uuid4().hex,
        started_at=_now(),
        last_rate=read_rate(layout.summary),
        versions={name: version(name) for name in VERSIONS},
    )
    with _accounting(settings, layout, summary) as accept:
        decode_settings = decode_settings_of(settings, read_config(settings.model))
        summary.metadata = _identity(settings, decode_settings)
        _make_room_for_share(settings, layout)
        upgrades = _upgrades(settings)
        with open_captions(layout, summary.metadata, settings.on_existing, upgrades) as folder:
            accept()
            summary.metadata = folder.metadata
            settings = replace(settings, precision=Precision(folder.metadata["batchcap.precision"]))
            inventory = Inventory(settings, folder.index, summary)
            with stopping_softly() as stop:
                _Captioning(inventory, folder, decode_settings, stop).run()
                if stop.number is not None:
                    raise Stopped(stop.number)
                _finish(inventory, folder)
    return summary


def plan_run(settings: RunSettings) -> str:
    """What `run_captioning` would do, in words; writes nothing.

    Raises:
        BatchcapError: as `run_captioning` does, but for what only writing can tell.
    """
    layout = _layout(settings)
    if layout.mirror is not None:
        with locked(layout.lock):
            layout.refresh()
    identity = _identity(settings, decode_settings_of(settings, read_config(settings.model)))
    files = existing_rows(layout, settings.on_existing)
    check_identity(layout, files, identity, _upgrades(settings))
    summary = RunSummary(str(layout), "", "")
    _, index = index_of(files, lambda *_: None)
    inventory = Inventory(settings, index, summary)
    for _ in inventory.unfinished(inventory.listed()):
        pass
    inventory.check_any()
    rate = read_rate(layout.summary)
    needed = f"some {inventory.taken / rate:.0f} s, at the last run's rate" if rate else "not known"
    return (
        f"{printable(summary.output)}: {summary.new} new, {summary.changed} changed, "
        f"{summary.retried} failed before and to be tried again; {summary.already_done} done, "
        f"{summary.failed_before} of them failed; {inventory.vanished} vanished; time: {needed}"
    )


def _layout(settings: RunSettings) -> Layout:
    check_shares(settings.output, settings.share[1])
    return layout_of(settings.output, settings.share)


def _make_room_for_share(settings: RunSettings, layout: Layout) -> None:
    """Make the data set's folder for its shards; the folder that contains it must exist."""
    if settings.share[1] > 1 and not layout.is_file and layout.mirror is None:
        with saying_where(settings.output):
            make_folder(layout.output.parent)


class _Captioning:
    """The part of a run in which photos become committed rows."""

    def __init__(
        self,
        inventory: Inventory,
        folder: CaptionFolder,
        decode_settings: DecodeSettings,
        stop: StopRequest,
    ) -> None:
        self.settings, self.summary = inventory.settings, inventory.summary
        self.inventory, self.folder, self.stop = inventory, folder, stop
        self.decode_settings = decode_settings
        self.listed: int | None = None
        self.reused: Counter[str] = Counter()  # SHA-256 sums of photos in flight
        self.writing = threading.Lock()  # held while rows are taken or committed

    def run(self) -> None:
        """Caption what needs it until there is no more, or a signal comes."""
        with watching(self.settings.stall_timeout, self._say_last_words) as watchdog:
            if self.settings.engine is Engine.RAY:
                self._caption_on_ray(watchdog)
                return
            goes_on = partial(self._goes_on, watchdog)
            listed = self.inventory.listed(goes_on, watchdog.progress)
            refs = self.inventory.unfinished(listed, goes_on)
            first = list(islice(refs, self.settings.batch_size))
            if self.stop():
                return
            self.inventory.check_any()
            if first:
                self._look_ahead(len(first), watchdog)
                self._caption(first, refs, watchdog)

    def _look_ahead(self, least: int, watchdog: Watchdog) -> None:
        """See that there is room for the rows to come, and begin to count them."""
        self._check_room(least, watchdog)
        threading.Thread(target=self._count, daemon=True).start()

    def _goes_on(self, watchdog: Watchdog) -> bool:
        watchdog.progress()
        return not self.stop()

    def _caption(
        self, first: list[ImageRef], others: Iterator[ImageRef], watchdog: Watchdog
    ) -> None:
        wanted = worker_settings_of(
            self.settings,
            self.decode_settings,
            batch_size=len(first),
            run_id=self.summary.run_id,
        )
        with closing(CaptionWorker(wanted, core_count(), watchdog.progress)) as worker:
            if not self._goes_on(watchdog):
                return
            name = printable(first[0].image_id)
            self._log_start(f"first {name}; on {worker.execution}", **vars(worker.execution))
            captioner = worker.captioner
            self.folder.metadata |= worker.metadata
            if not self._goes_on(watchdog):
                return
            refs = watchdog.in_flight(chain(first, others))
            batches = worker.rows(refs, self._reusable, self.stop)
            self._commit_rows(batches, watchdog, captioner.clock)

    def _caption_on_ray(self, watchdog: Watchdog) -> None:
        """Workers list their pieces of the input, and send a tally of each at its end."""
        settings, inventory = self.settings, self.inventory
        listed = pieces_of(
            settings, inventory.note_unlisted, inventory.note_left_out, watchdog.progress
        )
        pieces = [*takewhile(lambda _piece: self._goes_on(watchdog), listed)]
        inventory.check_list(
            (piece for piece in pieces if isinstance(piece, list)), partial(self._goes_on, watchdog)
        )
        if pieces and not self.stop():
            self._look_ahead(len(pieces), watchdog)
            wanted = worker_settings_of(
                settings,
                self.decode_settings,
                batch_size=settings.batch_size,
                run_id=self.summary.run_id,
            )
            self._log_start(f"in {counted(len(pieces), 'piece')}; on Ray")
            chunks = run_on_ray(pieces, settings, wanted, self.folder.index)
            arrivals = Arrivals(inventory, pieces)
            self._commit_rows(self._rows_of(chunks, arrivals), watchdog, StageClock())
            if arrivals.untallied and not self.stop():
                raise RuntimeError(f"Ray has left out {arrivals.untallied} pieces")
        if not self.stop():
            inventory.complete = not inventory.unlisted
            inventory.check_any()

    def _rows_of(self, chunks: Iterator[Chunk], arrivals: Arrivals) -> Iterator[list[Row]]:
        """Rows to append as they come; empty lists are news, too."""
        for chunk in chunks:
            self.folder.metadata |= chunk.metadata
            for admitted in arrivals.take(chunk.archive, chunk.rows, chunk.tally):
                if admitted.again:
                    with self.writing:
                        self.folder.append(admitted.rows, again=True)
                    self._count_rows(admitted.rows)
                else:
                    yield admitted.rows
            if self.stop():
                break
        for admitted in arrivals.rest():
            yield admitted.rows

    def _commit_rows(
        self, batches: Iterator[list[Row]], watchdog: Watchdog, clock: StageClock
    ) -> None:
        try:
            self._take_rows(batches, watchdog, clock)
            self._commit(watchdog)
        except Stopped:
            if not self.stop.insisted:  # but out of time
                self._commit(watchdog)
            raise

    def _take_rows(
        self, batches: Iterator[list[Row]], watchdog: Watchdog, clock: StageClock
    ) -> None:
        settings, folder = self.settings, self.folder
        started = last_commit = time.monotonic()
        with progress("captioning", None, "image") as bar:
            try:
                for rows in batches:
                    with clock.stage("write"):
                        with self.writing:
                            folder.append(rows)
                        seconds = time.monotonic() - last_commit
                        if (
                            folder.pending >= settings.rows_per_part
                            or seconds >= settings.seconds_per_part
                        ):
                            self._commit(watchdog)
                            last_commit = time.monotonic()
                    watchdog.landed(row["image_id"] for row in rows)
                    self._count_rows(rows)
                    bar.total = self.listed and self.listed - self.summary.already_done
                    bar.update(len(rows))
            finally:
                self.summary.seconds = time.monotonic() - started
                self.summary.stage_seconds = dict(clock.seconds)

    def _commit(self, watchdog: Watchdog) -> None:
        rows = self.folder.pending
        # A commit that is cut off in a store can't be given again in the same run.
        with self.writing, self.stop.unhurried():
            self.folder.commit()
        watchdog.progress()
        if not self.stop():  # else the next run drops them
            self.folder.drop_superseded(watchdog.progress)
        log_event(log, "committed", f"{rows} rows committed", logging.DEBUG, rows=rows)

    def _count_rows(self, rows: list[Row]) -> None:
        for row in rows:
            if row["status"] == "failed":
                self.summary.failed[row["error_type"]] += 1
            elif row["sha256"] in self.reused:
                self.reused[row["sha256"]] -= 1
                if not self.reused[row["sha256"]]:
                    del self.reused[row["sha256"]]
                self.summary.reused += 1
            else:
                self.summary.captioned += 1

    def _reusable(self, sha256: str) -> Row | None:
        caption = self.folder.reusable(sha256) if self.settings.reuse else None
        if caption is not None:
            self.reused[sha256] += 1
        return caption

    def _count(self) -> None:
        """How many photos there are, for the bar; apart, so that nothing waits for it."""
        with suppress(BatchcapError):  # for the reader of the rows to meet
            listed = sum(1 for _ in _listed_again(self.settings))
            self.listed = listed // self.settings.share[1] or None

    def _check_room(self, least: int, watchdog: Watchdog) -> None:
        """See that the disk has room for the rows to come, as far as they can be counted soon.

        Raises:
            OutputError: it has not.
        """
        layout, settings = self.folder.layout, self.settings
        again = _listed_again(settings, watchdog.progress)
        listed = sum(1 for _ in islice(again, COUNTED_AHEAD)) // settings.share[1]
        rows = max(least, min(listed - len(self.folder.index), settings.limit or listed))
        needed = rows * BYTES_PER_ROW[settings.attention]
        if layout.is_file:  # the parts, and the file that they are joined to
            needed = 2 * needed + sum(path.stat().st_size for path in layout.row_files())
        free = shutil.disk_usage(layout.lock.parent).free
        if free < needed:
            raise OutputError(
                f"{layout} will need some {needed / 2**20:,.1f} MiB for {rows:,} rows, and "
                f"its disk has {free / 2**20:,.1f} MiB: free some, or choose another OUTPUT"
            )

    def _log_start(self, what_on_what: str, **fields: Any) -> None:
        settings, model = self.settings, self.summary.metadata["batchcap.model"]
        source, output = map(printable, (settings.source, str(self.folder.layout)))
        done = self.summary.already_done
        log_event(
            log,
            "run_started",
            f"captioning the photos of {source} into {output}, "
            + (f"{done} done already, " if done else "")
            + f"{what_on_what}, model {model:.12}, {self.decode_settings}",
            run_id=self.summary.run_id,
            **fields,
            model=model,
        )

    def _say_last_words(self, message: str) -> None:
        log_event(log, "run_stalled", f"batchcap: {message}", logging.ERROR, exit_code=1)
        if self.writing.acquire(blocking=False):  # and never released: the process ends
            with suppress(BatchcapError):
                self.folder.commit()
        _account(self.settings, self.folder.layout, self.summary)


def _listed_again(
    settings: RunSettings, progress: Callable[[], object] = lambda: None
) -> Iterator[ImageRef]:
    """The input once more, in silence; nothing where that can't be done, or takes long."""
    if not can_be_listed_twice(settings.source):
        return iter(())
    return list_images_of(settings, lambda *_: None, progress=progress)


def _finish(inventory: Inventory, folder: CaptionFolder) -> None:
    """Make the output whole, and see that every photo has its row."""
    settings, summary = inventory.settings, inventory.summary
    summary.vanished = inventory.vanished
    # An input with nothing in it is rather a disk that is not mounted.
    if settings.prune and inventory.complete and not inventory.is_empty:
        summary.pruned = folder.prune(excluded_by(settings))
    folder.finish(inventory.complete and not inventory.doubled)
    if inventory.taken != summary.captioned + summary.reused + summary.failed.total():
        raise RuntimeError(f"{inventory.taken} photos were taken up, but not as many have rows")
    inventory.check_whole()
    summary.finish(settings.max_failures)


@contextmanager
def _accounting(
    settings: RunSettings, layout: Layout, summary: RunSummary
) -> Iterator[Callable[[], None]]:
    """Leave an account of the run, however it ends, but none beside an OUTPUT that was refused.

    The block calls what this yields once OUTPUT is accepted.
    """
    is_accepted = False

    def accept() -> None:
        nonlocal is_accepted
        is_accepted = True

    try:
        yield accept
    except LockedError:
        raise
    except Stopped as stop:
        summary.outcome, summary.exit_code = "stopped", stop.exit_code
        is_refused = not is_accepted and _is_refused(settings, layout)
        _account(settings, None if is_refused else layout, summary)
        raise
    except Exception as error:
        summary.exit_code = error.exit_code if isinstance(error, BatchcapError) else 1
        is_refused = not is_accepted and (
            isinstance(error, OutputError) or _is_refused(settings, layout)
        )
        with suppress(OutputError):  # the first failure is the one to tell of
            _account(settings, None if is_refused else layout, summary)
        raise
    _account(settings, layout, summary)


def _is_refused(settings: RunSettings, layout: Layout) -> bool:
    """Whether OUTPUT would be refused for what lies there, whatever the model."""
    try:
        for path in existing_rows(layout, settings.on_existing):
            with suppress(DamagedError):
                read_file_metadata(path)
    except (OutputError, OSError):
        return True
    return False


def _account(settings: RunSettings, layout: Layout | None, summary: RunSummary) -> None:
    summary.ended_at = _now()
    log_event(log, "run_ended", str(summary), logging.DEBUG, **summary.as_json())
    if settings.metrics_file is not None:
        write_metrics(settings.metrics_file, summary)
    if layout is not None and layout.summary.parent.is_dir():
        write_summary(layout.summary, summary)
        layout.publish(layout.summary)


def _identity(settings: RunSettings, decode_settings: DecodeSettings) -> dict[str, str]:
    return {
        "batchcap.schema": str(SCHEMA_VERSION),
        "batchcap.version": version("batchcap"),
        "batchcap.model": fingerprint(settings.model),
        "batchcap.decode": json.dumps(asdict(decode_settings)),
        "batchcap.precision": precision_of(settings.precision),
        "batchcap.attention": settings.attention,
    }


def _upgrades(settings: RunSettings) -> Upgrades:
    return Upgrades(
        decode_defaults=DECODE_DEFAULTS,
        keeps_precision=settings.precision is Precision.AUTO,
        has_shipped_model=settings.model == DEFAULT_MODEL,
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
