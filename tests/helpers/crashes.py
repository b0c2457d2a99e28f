"""Real processes of `batchcap run` that are killed, and the files they leave.

Shared by `test_crashes.py` and `benchmarks/kill_often.py`. Needs `/proc`. Knows the layout of an
output, but not how it is written.
"""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchcap.rows.layout import Layout

BATCHCAP = [sys.executable, "-c", "from batchcap.cli import main; main()"]
OF_THE_RUN = ("run_id", "created_at")  # the columns in which two runs differ
TEMPORARY = ("*.tmp", "*.new", "*.old", "*.lock", ".lock")
LONG_S = 120.0
POLL_S = 0.001
EARLY_S = 1.0  # until the program sets its handlers, signals have their default effect

# Of log-probabilities: a CPU may sum batches of another size in another order.
ROUNDING = 1e-4

Photos = frozenset[tuple[str, str]]  # image_id and run_id of rows


@contextmanager
def running(*arguments: object, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Run `batchcap run ...` in its own session; kill it when the block ends."""
    command = [*BATCHCAP, "run", *map(str, arguments)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    with subprocess.Popen(command, start_new_session=True, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def run(
    *arguments: object, timeout_s: float = LONG_S, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run `batchcap run ...` to its end."""
    with running(*arguments, **options) as process:
        output, errors = process.communicate(timeout=timeout_s)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def wait_until(happens: Callable[[], object], timeout_s: float = LONG_S) -> bool:
    """Return whether `happens()` is true in time."""
    deadline = time.monotonic() + timeout_s
    while not happens():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def children_of(pid: int) -> list[int]:
    """The live children of a process."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += map(int, task.read_text().split())
    return found


def is_alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def committed(output: Path) -> Photos:
    """The committed rows; fails if an image has two or a file can't be read."""
    photos: list[tuple[str, str]] = []
    for path in Layout(output).row_files():
        table = pq.read_table(path, columns=["image_id", "run_id"])
        photos += zip(table["image_id"].to_pylist(), table["run_id"].to_pylist(), strict=True)
    ids = [image_id for image_id, _ in photos]
    assert len(set(ids)) == len(ids), "an image has two rows"
    return frozenset(photos)


def check_readable(output: Path) -> int:
    """Read all files with final names as users would; return the number of rows."""
    layout = Layout(output)
    names = [layout.summary] if layout.is_file else [layout.summary, layout.manifest]
    for name in names:
        if name.exists():
            json.loads(name.read_text(encoding="utf-8"))
    committed(output)
    names = [output] if layout.is_file else sorted(output.glob("part-*.parquet"))
    if not all(name.exists() for name in names) or not names:
        return 0
    table = pq.read_table(output, columns=["image_id", "caption", "token_logprobs"])
    pattern = output if layout.is_file else f"{output}/*.parquet"
    rows, images, _ = duckdb.execute(
        f"select count(*), count(distinct image_id), sum(len(tokens)) from '{pattern}'"
    ).fetchall()[0]
    assert rows == images, "an image has two rows"
    assert rows >= len(table) == pc.count_distinct(table["image_id"]).as_py()  # it may have grown
    return len(table)


def leftovers(output: Path) -> list[str]:
    """Files under temporary names."""
    folders = {output.parent, Layout(output).parts}
    return sorted(
        path.name for folder in folders for pattern in TEMPORARY for path in folder.glob(pattern)
    )


def rows_of(output: Path) -> pa.Table:
    """The rows of a finished output, by image."""
    return pq.read_table(output).sort_by("image_id")


def difference(rows: pa.Table, others: pa.Table) -> float:
    """The largest difference of floats; all other values must be equal."""
    farthest = 0.0
    for name in rows.column_names:
        if name in OF_THE_RUN or rows[name].equals(others[name]):
            continue
        values, other_values = (_flat(table[name].combine_chunks()) for table in (rows, others))
        for column, other in zip(values, other_values, strict=True):
            assert pa.types.is_floating(column.type) or column.equals(other), name
            assert len(column) == len(other), name
            if pa.types.is_floating(column.type) and not column.equals(other):
                farthest = max(farthest, pc.max(pc.abs(pc.subtract(column, other))).as_py())
    return farthest


def _flat(column: Any) -> list[Any]:
    """The plain columns that a nested column is made of."""
    if pa.types.is_list(column.type):
        return [column.value_lengths(), *_flat(column.flatten())]
    if pa.types.is_struct(column.type):
        return [plain for part in column.flatten() for plain in _flat(part)]
    return [column]


# Phases in which to kill a run: wait for the phase to begin, then up to this many seconds.
PHASES = {"starting": 5.0, "captioning": 0.1, "committing": 0.03, "joining": 0.03}


@dataclass
class Chain:
    """One output, made by a command that is killed and repeated until it ends by itself."""

    arguments: Sequence[object]  # INPUT, OUTPUT and flags
    rng: random.Random
    kills: list[str] = field(default_factory=list)  # the phases that were hit
    slowest_s: float = 0.0  # from the signal to the end
    largest_part: int = 0  # rows
    rows_before: int = 0  # the process

    @property
    def output(self) -> Path:
        return Path(str(self.arguments[1]))

    def go(self, phases: Sequence[str], number: signal.Signals) -> None:
        """Kill one process in each of the phases, then let one end.

        Stops early if a run ends before its phase comes.
        """
        before: Photos = frozenset()
        for phase in [*phases, ""]:
            self.rows_before = len(before)
            with running(*self.arguments) as process:
                if phase and self._wait_for(phase, process):
                    self._end(process, number, phase)
                _, errors = process.communicate(timeout=LONG_S)
            # Python prints a traceback if a reader's parent dies while the reader starts.
            assert number is signal.SIGKILL or "Traceback" not in errors, errors
            now = committed(self.output)
            assert before <= now, "committed rows are gone"
            check_readable(self.output)
            parts = map(pq.read_metadata, Layout(self.output).parts.glob("part-*.parquet"))
            self.largest_part = max(self.largest_part, *(part.num_rows for part in parts), 0)
            if process.returncode == 0:
                break
            self.kills.append(phase)
            before = now
        assert process.returncode == 0, errors
        assert leftovers(self.output) == []

    def _wait_for(self, phase: str, process: subprocess.Popen[str]) -> bool:
        """Wait for a moment in the phase; return whether the run is still alive then."""
        wait_until(lambda: process.poll() is not None or self._has_begun(phase, process))
        time.sleep(self.rng.uniform(0, PHASES[phase]))
        return process.poll() is None

    def _has_begun(self, phase: str, process: subprocess.Popen[str]) -> bool:
        layout = Layout(self.output)
        parts = layout.staged(layout.parts / "part-*.parquet")
        signs: dict[str, Callable[[], object]] = {
            "starting": lambda: True,
            "captioning": lambda: len(committed(self.output)) > self.rows_before,
            "committing": lambda: [*parts.parent.glob(f".{parts.name}.*.tmp")],
            "joining": lambda: [*layout.output.parent.glob(f".{layout.output.name}.*.tmp")],
        }
        return bool(signs[phase]())

    def _end(self, process: subprocess.Popen[str], number: signal.Signals, phase: str) -> None:
        children, began = children_of(process.pid), time.monotonic()
        # Python has no handlers while it starts, nor while it exits with all work done.
        has_handlers = phase not in ("starting", "joining")
        process.send_signal(number)
        process.wait(timeout=LONG_S)
        self.slowest_s = max(self.slowest_s, time.monotonic() - began)
        expected = {-number} if number is signal.SIGKILL else {128 + number}
        allowed = expected | {0} | (set() if has_handlers else {-number})
        assert process.returncode in allowed, (phase, process.returncode)
        assert wait_until(lambda: not any(map(is_alive, children)), 10), "a reader is left"
