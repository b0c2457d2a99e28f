"""Captions all photos of an input, and skips those that already have a row."""

import json
import logging
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from typing import Any

from batchcap.captioning.commits import Commits
from batchcap.captioning.engine import Chunks, Task
from batchcap.captioning.inventory import Inventory, excluded_by
from batchcap.captioning.local_engine import caption_locally
from batchcap.captioning.options import decode_settings_of, precision_for
from batchcap.captioning.ray_engine import caption_on_ray
from batchcap.captioning.summary import RunSummary, read_rate, write_metrics, write_summary
from batchcap.captioning.watchdog import watching
from batchcap.errors import BatchcapError, LockedError, OutputError
from batchcap.model.config import fingerprint, read_config
from batchcap.model.encoder import int8_digest
from batchcap.process.logs import log_event
from batchcap.process.signals import Stopped, StopRequest, stopping_softly
from batchcap.process.wording import printable
from batchcap.rows.layout import Layout, check_shards, layout_of
from batchcap.rows.parquet import DamagedError, read_file_metadata, saying_where
from batchcap.rows.writer import (
    CaptionFolder,
    Upgrades,
    check_identity,
    existing_rows,
    index_of,
    open_captions,
)
from batchcap.schema import SCHEMA_VERSION
from batchcap.settings import (
    DECODE_DEFAULTS,
    DEFAULT_MODEL,
    DecodeSettings,
    Engine,
    Precision,
    RunSettings,
)
from batchcap.storage.files import make_folder
from batchcap.storage.locking import locked

VERSIONS = ("batchcap", "tensorflow", "keras", "numpy", "pillow", "pyarrow")
ENGINES: dict[Engine, Callable[[Task], Chunks]] = {
    Engine.LOCAL: caption_locally,
    Engine.RAY: caption_on_ray,
}

log = logging.getLogger(__name__)


def run_captioning(settings: RunSettings) -> RunSummary:
    """Caption the photos of `settings.source` that need a row.

    Raises:
        UsageError: the model or the machine does not support a setting, or no such input.
        InputError: there is no photo, or the input can't be listed.
        ModelError: the model directory is wrong.
        OutputError: the output can't be written, is locked, or is of other settings.
        Stopped: a signal has arrived; finished rows are committed.
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
        _make_room_for_shard(settings, layout)
        upgrades = _upgrades(settings)
        with open_captions(layout, summary.metadata, settings.on_existing, upgrades) as folder:
            accept()
            summary.metadata = folder.metadata
            settings = replace(settings, precision=Precision(folder.metadata["batchcap.precision"]))
            inventory = Inventory(settings, folder.index, summary.counts)
            with stopping_softly() as stop:
                _caption(settings, decode_settings, inventory, folder, summary, stop)
                if stop.number is not None:
                    raise Stopped(stop.number)
                _finish(inventory, folder, summary)
    return summary


def plan_run(settings: RunSettings) -> str:
    """Describe what `run_captioning` would do; writes nothing.

    Raises:
        BatchcapError: as `run_captioning` does, except for failures of writing.
    """
    layout = _layout(settings)
    if layout.mirror is not None:
        with locked(layout.lock):
            layout.refresh()
    identity = _identity(settings, decode_settings_of(settings, read_config(settings.model)))
    files = existing_rows(layout, settings.on_existing)
    identity = check_identity(layout, files, identity, _upgrades(settings))
    settings = replace(settings, precision=Precision(identity["batchcap.precision"]))
    _, index = index_of(files, lambda *_: None)
    inventory = Inventory(settings, index)
    counts = inventory.counts
    for _ in inventory.unfinished(inventory.listed()):
        pass
    inventory.check_any()
    rate = read_rate(layout.summary)
    needed = f"about {counts.taken / rate:.0f} s at the last run's rate" if rate else "unknown"
    return (
        f"{printable(str(layout))}: {counts.new} new, {counts.changed} changed, "
        f"{counts.retried} failed before and to be retried; {counts.already_done} done, "
        f"{counts.failed_before} of them failed; {inventory.vanished} vanished; time: {needed}"
    )


def _layout(settings: RunSettings) -> Layout:
    check_shards(settings.output, settings.shard_numbers[1])
    return layout_of(settings.output, settings.shard_numbers)


def _make_room_for_shard(settings: RunSettings, layout: Layout) -> None:
    """Create the data set's directory for its shards; its parent must exist."""
    if settings.shard_numbers[1] > 1 and not layout.is_file and layout.mirror is None:
        with saying_where(settings.output):
            make_folder(layout.output.parent)


def _caption(
    settings: RunSettings,
    decode: DecodeSettings,
    inventory: Inventory,
    folder: CaptionFolder,
    summary: RunSummary,
    stop: StopRequest,
) -> None:
    """Turn photos into committed rows until there are no more, or a signal arrives."""
    commits = Commits(settings, folder, summary, stop)
    say_last_words = partial(_say_last_words, settings, commits, summary)
    with watching(settings.stall_timeout, say_last_words) as watchdog:
        task = Task(
            settings=settings,
            decode=decode,
            run_id=summary.run_id,
            inventory=inventory,
            folder=folder,
            stop=stop,
            watchdog=watchdog,
            clock=commits.clock,
            look_ahead=partial(commits.look_ahead, watchdog),
            log_start=partial(_log_start, settings, decode, summary),
        )
        with closing(ENGINES[settings.engine](task)) as chunks:
            commits.take(chunks, watchdog)


def _say_last_words(
    settings: RunSettings, commits: Commits, summary: RunSummary, message: str
) -> None:
    log_event(log, "run_stalled", f"batchcap: {message}", logging.ERROR, exit_code=1)
    commits.commit_at_once()
    _account(settings, commits.folder.layout, summary)


def _log_start(
    settings: RunSettings,
    decode: DecodeSettings,
    summary: RunSummary,
    details: str,
    **fields: Any,
) -> None:
    model, done = summary.metadata["batchcap.model"], summary.counts.already_done
    source, output = map(printable, (settings.source, summary.output))
    log_event(
        log,
        "run_started",
        f"captioning the photos of {source} into {output}, "
        + (f"{done} already done, " if done else "")
        + f"{details}, model {model:.12}, {decode}",
        run_id=summary.run_id,
        **fields,
        model=model,
    )


def _finish(inventory: Inventory, folder: CaptionFolder, summary: RunSummary) -> None:
    """Complete the output, and check that every photo has its row."""
    settings, counts = inventory.settings, summary.counts
    counts.vanished = inventory.vanished
    # An empty input is more likely a disk that is not mounted.
    if settings.prune and inventory.complete and not inventory.is_empty:
        counts.pruned = folder.prune(excluded_by(settings))
    folder.finish(inventory.complete and not inventory.duplicates)
    if counts.taken != counts.given:
        raise RuntimeError(f"{counts.taken} photos needed a row, but {counts.given} got one")
    inventory.check_whole()
    summary.finish(settings.max_failures)


@contextmanager
def _accounting(
    settings: RunSettings, layout: Layout, summary: RunSummary
) -> Iterator[Callable[[], None]]:
    """Write the summary and metrics of the run, however it ends; not beside a refused OUTPUT.

    The block calls the yielded function once OUTPUT is accepted.
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
        with suppress(OutputError):  # the first failure is the one to report
            _account(settings, None if is_refused else layout, summary)
        raise
    _account(settings, layout, summary)


def _is_refused(settings: RunSettings, layout: Layout) -> bool:
    """Whether OUTPUT would be refused for its content, whatever the model."""
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
    digest = int8_digest(settings.model)
    return {
        "batchcap.schema": str(SCHEMA_VERSION),
        "batchcap.version": version("batchcap"),
        "batchcap.model": fingerprint(settings.model),
        "batchcap.decode": json.dumps(asdict(decode_settings)),
        "batchcap.precision": precision_for(settings, digest),
        "batchcap.attention": settings.attention,
    } | ({} if digest is None else {"batchcap.int8": digest})


def _upgrades(settings: RunSettings) -> Upgrades:
    return Upgrades(
        decode_defaults=DECODE_DEFAULTS,
        keeps_precision=settings.precision is Precision.AUTO,
        has_shipped_model=settings.model == DEFAULT_MODEL,
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
