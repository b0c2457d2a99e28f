"""The summary of a run: for people, as JSON beside the output, and as Prometheus metrics."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from batchcap.errors import TOO_MANY_FAILED
from batchcap.process.wording import printable
from batchcap.rows.parquet import saying_where
from batchcap.storage.files import replace_text

FASTEST = 1e9  # images per second; a higher rate is not credible
# Fields of `Counts` among the metrics.
STATES = ("found", "captioned", "reused", "already_done", "failed_before", "vanished")


@dataclass
class Counts:
    """Numbers of photos of a run, which can be added.

    captioned, reused: got a new caption, or that of a photo with the same bytes. failed: got none,
    by reason. already_done: kept their rows; `failed_before` of them have no caption. new, changed,
    retried: why the others needed a row. vanished, pruned: rows of photos that the input no longer
    has, and how many were dropped.
    """

    captioned: int = 0
    reused: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    already_done: int = 0
    failed_before: int = 0
    new: int = 0
    changed: int = 0
    retried: int = 0
    vanished: int = 0
    pruned: int = 0

    def __iadd__(self, other: "Counts") -> "Counts":
        for name, value in vars(other).items():
            if isinstance(value, int):
                setattr(self, name, getattr(self, name) + value)
        self.failed.update(other.failed)
        self.failed = Counter({reason: count for reason, count in self.failed.items() if count})
        return self

    @property
    def given(self) -> int:
        """Photos that got a row in this run."""
        return self.captioned + self.reused + self.failed.total()

    @property
    def found(self) -> int:
        """Photos that have a row, from this run or an earlier one."""
        return self.given + self.already_done

    @property
    def taken(self) -> int:
        """Photos that needed a row, or a new one."""
        return self.new + self.changed + self.retried


@dataclass
class RunSummary:
    """Result of a run.

    seconds: of captioning alone. stage_seconds: of work by stage, summed over threads. last_rate:
    images per second of the previous run. outcome: `done`, `stopped` or `failed`.
    """

    output: str
    run_id: str
    started_at: str
    counts: Counts = field(default_factory=Counts)
    seconds: float = 0.0
    last_rate: float | None = None
    stage_seconds: dict[str, float] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    outcome: str = "failed"
    exit_code: int = 1
    ended_at: str = ""

    @property
    def images_per_second(self) -> float | None:
        """Rate of this run; of the previous run if this one wrote no row."""
        if not self.counts.given or not self.seconds:
            return self.last_rate
        return self.counts.given / self.seconds

    def finish(self, max_failures: int | None) -> None:
        """Set the outcome of a run that reached its end."""
        failed = self.counts.failed.total() + self.counts.failed_before
        too_many = max_failures is not None and failed > max_failures
        self.outcome, self.exit_code = "done", TOO_MANY_FAILED if too_many else 0

    def as_json(self) -> dict[str, Any]:
        """Return all fields and the rate; of paths, only the output's name."""
        name = Path(self.output).name.encode("utf-8", "surrogateescape")
        return {
            "output": name.decode("utf-8", "backslashreplace"),
            "outcome": self.outcome,
            "found": self.counts.found,
            "run_id": self.run_id,
            "started_at": self.started_at,
            **vars(self.counts),
            "seconds": self.seconds,
            "stage_seconds": self.stage_seconds,
            "metadata": self.metadata,
            "versions": self.versions,
            "exit_code": self.exit_code,
            "ended_at": self.ended_at,
            "images_per_second": self.images_per_second,
        }

    def __str__(self) -> str:
        counts = self.counts
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.failed.most_common())
        parts = [f"{counts.found} found", f"{counts.captioned} captioned"]
        parts += [f"{counts.reused} reused"] if counts.reused else []
        parts += [f"{counts.failed.total()} failed" + (f" ({reasons})" if reasons else "")]
        parts += [f"{counts.already_done} already done"] if counts.already_done else []
        parts += (
            [f"{counts.vanished} vanished ({counts.pruned} dropped)"] if counts.vanished else []
        )
        rate = f"; {self.seconds:.1f} s, {self.images_per_second or 0:.1f} images/s"
        return f"{printable(self.output)}: {', '.join(parts)}" + (rate if self.seconds else "")


def write_summary(path: Path, summary: RunSummary) -> None:
    """Write the summary as JSON.

    Raises:
        OutputError: the folder is read-only or full.
    """
    with saying_where(path):
        replace_text(path, json.dumps(summary.as_json(), indent=2, ensure_ascii=False) + "\n")


def read_summary(path: Path) -> dict[str, Any]:
    """Read a summary; empty if it is missing or damaged."""
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return summary if isinstance(summary, dict) else {}


def read_rate(path: Path) -> float | None:
    """Read images per second of the last run that captioned photos, from its summary."""
    rate: Any = read_summary(path).get("images_per_second")
    return float(rate) if type(rate) in (int, float) and 0 < rate < FASTEST else None


def write_metrics(path: Path, summary: RunSummary) -> None:
    """Write metrics in Prometheus's text format, for node-exporter's textfile collector.

    Raises:
        OutputError: the folder is missing, read-only or full.
    """
    with saying_where(path):
        replace_text(path, metrics_text(summary))


def metrics_text(summary: RunSummary) -> str:
    """Return gauges of the last run, named `batchcap_run_...`."""
    from prometheus_client import CollectorRegistry, Gauge, generate_latest

    registry = CollectorRegistry()

    def add(name: str, description: str, samples: Mapping[str, float], label: str) -> None:
        gauge = Gauge(f"batchcap_run_{name}", description, [label], registry=registry)
        for value, number in samples.items():
            gauge.labels(value).set(number)

    def add_one(name: str, description: str, number: float) -> None:
        Gauge(f"batchcap_run_{name}", description, registry=registry).set(number)

    counts = summary.counts
    states = {name: getattr(counts, name) for name in STATES} | {"failed": counts.failed.total()}
    failures, stages = (
        dict(sorted(numbers.items())) for numbers in (counts.failed, summary.stage_seconds)
    )
    add("images", "Images of the last run, by state.", states, "state")
    add("failures", "Images that failed in the last run, by reason.", failures, "reason")
    add("stage_seconds", "Seconds of work of the last run, by stage.", stages, "stage")
    add_one("seconds", "Seconds that the last run captioned.", summary.seconds)
    add_one("images_per_second", "Rate of the last run.", summary.images_per_second or 0.0)
    add_one("exit_code", "Exit code of the last run.", summary.exit_code)
    ended = datetime.fromisoformat(summary.ended_at).timestamp() if summary.ended_at else 0.0
    add_one("end_timestamp_seconds", "When the last run ended, in Unix time.", ended)
    return generate_latest(registry).decode()
