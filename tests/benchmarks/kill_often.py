"""Kill runs at random moments, repeat the command, and compare with an uninterrupted run.

    python tests/benchmarks/kill_often.py PHOTOS --kills 50 --images 2000

Both kinds of output, by SIGKILL and SIGTERM; then pairs of runs of one output. Stops at the first
fault.
"""

import argparse
import random
import signal
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.crashes import Chain, difference, rows_of, run, running

from batchcap.photos.listing import list_images
from batchcap.rows.layout import Layout

FLAGS = ("--rows-per-part", 64, "--batch-size", 32)
LARGEST_PART = 64 + 2 * 32  # rows; a kill costs fewer
JOINS = 5  # one of so many kills is aimed at the joining of parts, which is short


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photos = list(islice(list_images(asked.photos), asked.images))
        names = folder / "photos.txt"
        names.write_text("".join(f"{Path(ref.path).absolute()}\n" for ref in photos))
        done = run(names, folder / "whole.parquet", *FLAGS)
        assert done.returncode == 0, done.stderr
        print(f"{done.stdout.strip()}\n")
        print(
            "| output | signal | kills | starting | captioning | committing | joining | outputs "
            "| rows | twice or missing | most floats differ | slowest end, s | minutes |"
        )
        print("|---" * 13 + "|", flush=True)
        for number in (signal.SIGKILL, signal.SIGTERM):
            for output in ("o.parquet", "o"):
                rng = random.Random(f"{asked.seed} {output} {number}")
                print(kill_often(names, folder / output, number, asked.kills, rng), flush=True)
        if asked.pairs:
            print(f"\n{asked.pairs} pairs of runs: {run_pairs(names, folder, asked.pairs)}")


def kill_often(
    names: Path, output: Path, number: signal.Signals, kills: int, rng: random.Random
) -> str:
    """Return a row of the table, from as many chains as needed."""
    whole, began = rows_of(output.parent / "whole.parquet"), time.monotonic()
    chains: list[Chain] = []
    hit: list[str] = []
    farthest = 0.0
    while len(hit) < kills:
        fresh = output.with_stem(f"{output.stem}-{number.name}-{len(chains)}")
        chain = Chain((names, fresh, *FLAGS), rng)
        left = kills - len(hit)
        joins = -(-left // JOINS) if Layout(output).is_file else 0
        phases = rng.choices(("starting", "captioning", "committing"), k=left - joins)
        chain.go([*phases, *["joining"] * joins], number)
        rows = rows_of(fresh)
        assert rows["image_id"].equals(whole["image_id"])
        farthest = max(farthest, difference(rows, whole))
        assert chain.largest_part < LARGEST_PART
        hit += chain.kills
        chains.append(chain)
    counts = [hit.count(phase) for phase in ("starting", "captioning", "committing", "joining")]
    cells = [
        *(output.suffix or "folder", number.name, len(hit), *counts, len(chains), len(whole), 0),
        *(f"{farthest:.1e}", f"{max(chain.slowest_s for chain in chains):.2f}"),
        f"{(time.monotonic() - began) / 60:.1f}",
    ]
    return f"| {' | '.join(map(str, cells))} |"


def run_pairs(names: Path, folder: Path, pairs: int) -> str:
    """Start two runs of one output at once: exactly one may work."""
    slowest = 0.0
    for pair in range(pairs):
        output = folder / (f"pair{pair}.parquet" if pair % 2 else f"pair{pair}")
        command = (names, output, "--limit", 64)
        began = time.monotonic()
        with running(*command) as one, running(*command) as other:
            while one.poll() is None and other.poll() is None:
                time.sleep(0.01)
            slowest = max(slowest, time.monotonic() - began)
            codes = sorted(process.wait() for process in (one, other))
        assert codes == [0, 5], codes
        assert len(rows_of(output)) == 64
    return f"each time one ended with 0 and one with 5, after {slowest:.1f} s at most"


if __name__ == "__main__":
    main()
