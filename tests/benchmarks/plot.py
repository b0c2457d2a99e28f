"""Plots of throughput against batch size and of memory against the number of images.

    python tests/benchmarks/plot.py throughput|memory PHOTOS

Writes `throughput.png` or `memory.png` beside this file. Linux only: reads /proc.
"""

import argparse
import itertools
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from compare import bench
from matplotlib import pyplot as plt

from batchcap.photos.listing import list_images

HERE = Path(__file__).parent
BATCH_SIZES = (1, 4, 16, 64, 128)
TIMED_PHOTOS = 384
RUNTIMES = ("tensorflow", "openvino")
IMAGES = 20_000
PAGE_MIB = 4096 / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plot", choices=PLOTS)
    parser.add_argument("photos", type=Path)
    asked = parser.parse_args()
    PLOTS[asked.plot](asked.photos)


def plot_throughput(photos: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for runtime in RUNTIMES:
        rates = []
        for size in BATCH_SIZES:
            result = bench(photos, TIMED_PHOTOS, "--runtime", runtime, "--batch-size", str(size))
            rates.append(result["end_to_end"])
            print(f"{runtime}, batch {size}: {rates[-1]:.1f} images/s", flush=True)
        axes.plot(BATCH_SIZES, rates, marker="o", label=runtime)
    axes.set(xscale="log", xticks=BATCH_SIZES, xticklabels=BATCH_SIZES, ylim=(0, None))
    axes.set(xlabel="photos at a time", ylabel="images/s, end to end")
    axes.legend()
    figure.savefig(HERE / "throughput.png", dpi=120)


def plot_memory(photos: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for runtime in RUNTIMES:
        images, mebibytes = memory_of_a_run(photos, runtime)
        axes.plot(images, mebibytes, label=runtime)
        for count in (2_000, IMAGES):
            seen = [mib for done, mib in zip(images, mebibytes, strict=True) if done <= count]
            print(f"{runtime}: peak {max(seen):.0f} MiB up to {count} images", flush=True)
        axes.set(xlabel="images captioned", ylabel="resident MiB", ylim=(0, None))
        axes.legend()
        figure.savefig(HERE / "memory.png", dpi=120)


def memory_of_a_run(photos: Path, runtime: str) -> tuple[list[float], list[float]]:
    """Sample resident memory; images done so far are estimated from an even rate."""
    with tempfile.TemporaryDirectory() as folder:
        links = Path(folder) / "links"
        links.mkdir()
        for number, ref in enumerate(
            itertools.islice(itertools.cycle(list(list_images(str(photos)))), IMAGES)
        ):
            (links / f"{number}.jpg").symlink_to(Path(ref.path).absolute())
        program = "from batchcap.cli import main; main()"
        arguments = ["run", str(links), f"{folder}/captions.parquet", "--runtime", runtime]
        process = subprocess.Popen([sys.executable, "-c", program, *arguments])
        seconds, mebibytes = [], []
        started = time.monotonic()
        while process.poll() is None:
            pages = Path(f"/proc/{process.pid}/statm").read_text().split()
            seconds.append(time.monotonic() - started)
            mebibytes.append(int(pages[1]) * PAGE_MIB if len(pages) > 1 else 0)
            time.sleep(0.2)
    if process.returncode:
        raise SystemExit(process.returncode)
    return [second / seconds[-1] * IMAGES for second in seconds], mebibytes


PLOTS = {"throughput": plot_throughput, "memory": plot_memory}

if __name__ == "__main__":
    main()
