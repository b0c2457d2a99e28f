"""Time and memory of planning a run that is half done.

    python tests/benchmarks/planning.py [COUNT]

Ids, sizes, times and checksums are made up; reading them from a store's listing and the rows of
earlier runs is not timed. Everything else is what a run does.
"""

import argparse
import hashlib
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from batchcap.captioning.inventory import Inventory
from batchcap.rows.index import Entries, RowIndex, entries_of
from batchcap.schema import ImageRef
from batchcap.settings import RunSettings

ROWS_PER_PART = 100_000
ROWS_PER_GROUP = 4096
SIZE, MTIME_NS = 100_000, 1_600_000_000 * 10**9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=10**6)
    count = parser.parse_args().count
    print(f"| {count:,} ids, half of them done | seconds | peak GiB |")
    print("|---|---|---|")
    parts = done_parts(count)
    with timed("the index of what is done"):
        index = RowIndex(parts)
    del parts
    settings = RunSettings(source="s3://photos", output=Path("captions"))
    plan = Inventory(settings, index)
    with timed("what is left to do"):
        left = sum(1 for _ in plan.unfinished(listing(count)))
    assert left == plan.counts.new == count // 2
    assert plan.counts.already_done == count - left


@contextmanager
def timed(stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    row(stage, time.perf_counter() - started)


def row(stage: str, seconds: float) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"| {stage} | {seconds:.1f} | {peak:.2f} |", flush=True)


def name_of(number: int) -> str:
    return f"{number % 1000:03}/{number:012}.jpg"


def listing(count: int) -> Iterator[ImageRef]:
    for number in range(count):
        yield ImageRef(name_of(number), "s3://photos/", SIZE, MTIME_NS)


def done_parts(count: int) -> list[Entries]:
    """The entries of parts of every second photo."""
    numbers = range(0, count, 2)
    entries, seconds = [], 0.0
    for first in range(0, len(numbers), ROWS_PER_PART):
        part = numbers[first : first + ROWS_PER_PART]
        groups = [
            rows_of(part[start : start + ROWS_PER_GROUP])
            for start in range(0, len(part), ROWS_PER_GROUP)
        ]
        started = time.perf_counter()
        entries.append(entries_of(groups))
        seconds += time.perf_counter() - started
    row("ids and sums of rows as hashes", seconds)
    return entries


def rows_of(numbers: range) -> pa.Table:
    names = [name_of(number) for number in numbers]
    return pa.table(
        {
            "image_id": names,
            "status": ["ok"] * len(names),
            "file_size": [SIZE] * len(names),
            "mtime_ns": [MTIME_NS] * len(names),
            "sha256": [hashlib.sha256(name.encode()).hexdigest() for name in names],
        }
    )


if __name__ == "__main__":
    main()
