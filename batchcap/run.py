"""Verb: caption every photo of a tree or a list into one Parquet file."""

import json
import logging
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import chain, islice

from batchcap.contracts import SCHEMA_VERSION, BatchcapError, InputError
from batchcap.engines import decode_settings_of, run_locally
from batchcap.inputs import list_images, printable
from batchcap.model.captioner import load_captioner
from batchcap.model.config import fingerprint, read_config
from batchcap.model.runtime import choose_execution
from batchcap.output import Row, RowWriter, parquet_file
from batchcap.progress import Progress, progress
from batchcap.settings import RunSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunSummary:
    """What a run did: found = captioned + failed. `seconds` is the captioning alone."""

    settings: RunSettings
    found: int
    captioned: int
    failed: Counter[str]
    seconds: float

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.failed.most_common())
        failed = f"{self.failed.total()} failed" + (f" ({reasons})" if reasons else "")
        output = printable(str(self.settings.output))
        return (
            f"{output}: {self.found} found, {self.captioned} captioned, {failed}; "
            f"{self.seconds:.1f} s, {self.found / self.seconds:.1f} images/s"
        )


def run_captioning(settings: RunSettings) -> RunSummary:
    """Caption all photos of `settings.source`; one row each, failed ones included.

    Raises:
        UsageError: a setting that the model or the machine can't do, or no such input.
        InputError: there is no photo, or the input can't be listed.
        ModelError: the model directory is wrong.
        OutputError: the output can't be written.
    """
    refs = islice(list_images(settings.source, settings.glob), settings.limit)
    first = list(islice(refs, settings.batch_size))
    if not first:
        raise InputError(f"no photo in {settings.source}: check the path, or --glob")
    decode_settings = decode_settings_of(settings, read_config(settings.model))
    execution = choose_execution(settings.runtime, settings.precision)
    model = fingerprint(settings.model)
    log.info(
        "captioning the photos of %s into %s, first %s; on %s, model %.12s, %s",
        *map(printable, (settings.source, str(settings.output), first[0].image_id)),
        *(execution, model, decode_settings),
    )
    metadata = {
        "batchcap.schema": str(SCHEMA_VERSION),
        "batchcap.version": version("batchcap"),
        "batchcap.model": model,
        "batchcap.decode": json.dumps(asdict(decode_settings)),
        "batchcap.runtime": execution.runtime,
        "batchcap.precision": execution.precision,
    }
    with parquet_file(settings.output, metadata) as writer:
        # Compiling takes seconds, which a single batch would not win back.
        is_long = len(first) == settings.batch_size
        captioner = load_captioner(settings.model, execution, compiled=is_long)
        started = time.monotonic()
        batches = run_locally(
            chain(first, refs),
            captioner,
            decode_settings,
            len(first),
            settings.attention,
            uuid.uuid4().hex,
        )
        found, failed = _write(batches, writer, settings)
        seconds = time.monotonic() - started
    return RunSummary(settings, found, found - failed.total(), failed, seconds)


def _write(
    batches: Iterable[list[Row]], writer: RowWriter, settings: RunSettings
) -> tuple[int, Counter[str]]:
    """Write rows as they come: how many, and the reasons of those that failed."""
    found, failed = 0, Counter[str]()
    with progress("captioning", None, "image") as bar:
        # Apart, so that nothing waits for a long listing.
        threading.Thread(target=_count, args=(settings, bar), daemon=True).start()
        for rows in batches:
            writer.append(rows)
            found += len(rows)
            failed.update(row["error_type"] for row in rows if row["error_type"])
            bar.update(len(rows))
    return found, failed


def _count(settings: RunSettings, bar: Progress) -> None:
    if settings.source == "-":  # can't be read twice
        return
    with suppress(BatchcapError):  # for the reader of the rows to meet
        refs = list_images(settings.source, settings.glob, warn=False)
        bar.total = sum(1 for _ in islice(refs, settings.limit))
