"""Verb: caption every photo of a tree or a list into one Parquet file."""

import json
import logging
import time
import uuid
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.metadata import version

from batchcap.contracts import SCHEMA_VERSION, InputError, UsageError
from batchcap.engines import run_locally
from batchcap.inputs import list_images, printable
from batchcap.model.captioner import load_captioner
from batchcap.model.config import DecodeSettings, ModelConfig, fingerprint, read_config
from batchcap.model.runtime import start_tensorflow
from batchcap.output import parquet_file
from batchcap.progress import progress
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
        UsageError: a setting that the model can't do, or an input that does not exist.
        InputError: there is no photo, or the input can't be listed.
        ModelError: the model directory is wrong.
        OutputError: the output can't be written.
    """
    refs = list_images(settings.source, settings.glob)[: settings.limit]
    if not refs:
        raise InputError(f"no photo in {settings.source}: check the path, or --glob")
    decode_settings = _decode_settings(settings, read_config(settings.model))
    model = fingerprint(settings.model)
    metadata = {
        "batchcap.schema": str(SCHEMA_VERSION),
        "batchcap.version": version("batchcap"),
        "batchcap.model": model,
        "batchcap.decode": json.dumps(asdict(decode_settings)),
    }
    log.info(
        "captioning %d photos of %s into %s, first %s; on %s, model %.12s, %s, at most %d words",
        len(refs),
        *map(printable, (settings.source, str(settings.output), refs[0].image_id)),
        *(start_tensorflow(), model),
        f"temperature {settings.temperature:g}" if settings.temperature else "greedy",
        decode_settings.max_length,
    )
    failed: Counter[str] = Counter()
    with parquet_file(settings.output, metadata) as writer:
        captioner = load_captioner(settings.model)
        started = time.monotonic()
        batches = run_locally(
            refs,
            captioner,
            decode_settings,
            min(settings.batch_size, len(refs)),
            settings.attention,
            uuid.uuid4().hex,
        )
        with progress("captioning", len(refs), "image") as bar:
            for rows in batches:
                writer.append(rows)
                failed.update(row["error_type"] for row in rows if row["error_type"])
                bar.update(len(rows))
        seconds = time.monotonic() - started
    return RunSummary(settings, len(refs), len(refs) - failed.total(), failed, seconds)


def _decode_settings(settings: RunSettings, model: ModelConfig) -> DecodeSettings:
    longest = model.decoder.max_length
    if settings.max_length and settings.max_length > longest:
        raise UsageError(f"--max-length must be at most {longest}, the limit of {settings.model}")
    draws = settings.temperature > 0
    return DecodeSettings(
        max_length=settings.max_length or longest,
        temperature=settings.temperature,
        seed=settings.seed if draws else 0,
    )
