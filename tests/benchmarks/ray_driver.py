"""Rows per second that the driver of a run on Ray can take.

    python tests/benchmarks/ray_driver.py [COUNT]

Chunks of made-up rows with attention summaries are pickled beforehand, as workers send them.
Unpickling, checking for duplicate ids, and committing are timed.
"""

import argparse
import pickle
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers.rows import METADATA, captioned_row

from batchcap.captioning.arrivals import Arrivals
from batchcap.captioning.inventory import Inventory
from batchcap.captioning.ray_engine import Answer
from batchcap.photos.archives import Archive
from batchcap.rows.index import RowIndex
from batchcap.rows.layout import Layout
from batchcap.rows.parquet import Row
from batchcap.rows.writer import open_captions
from batchcap.settings import OnExisting, RunSettings

ROWS_PER_CHUNK, ROWS_PER_PART = 64, 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=100_000)
    count = parser.parse_args().count
    chunks = [
        pickle.dumps(Answer({}, [row_of(number) for number in range(i, i + ROWS_PER_CHUNK)]))
        for i in range(0, count, ROWS_PER_CHUNK)
    ]
    print(f"{sum(map(len, chunks)) / count:.0f} bytes a row as sent")
    with tempfile.TemporaryDirectory() as name:
        output = Path(name, "captions")
        settings = RunSettings(source="photos.tar", output=output)
        inventory = Inventory(settings, RowIndex([]))
        archives = [Archive(name, name) for name in ("0.tar", "1.tar")]
        arrivals = Arrivals(inventory, archives)
        started = time.perf_counter()
        with open_captions(Layout(output), METADATA, OnExisting.RESUME) as folder:
            for chunk in map(pickle.loads, chunks):
                for admitted in arrivals.take(archives[1], chunk.rows, None):
                    folder.append(admitted.rows)
                if folder.pending >= ROWS_PER_PART:
                    folder.commit()
            folder.finish()
        seconds = time.perf_counter() - started
        size = sum(path.stat().st_size for path in output.glob("part-*"))
    print(f"{count / seconds:,.0f} rows/s, {size / count:.0f} bytes a row on disk")


def row_of(number: int) -> Row:
    """Return a row that shares no object with others: pickling stores these once."""
    return pickle.loads(pickle.dumps(captioned_row(f"{number:012}.jpg", number)))


if __name__ == "__main__":
    main()
