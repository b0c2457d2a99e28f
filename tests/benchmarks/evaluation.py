"""Time and memory of `batchcap evaluate` for any number of images.

    python tests/benchmarks/evaluation.py captions.parquet captions.zh.txt --images 30000

Captions and references are repeated until there are enough; neither batchcap nor pycocoevalcap
profits from that.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

import click

from batchcap.caption_files.annotations import read_annotations
from batchcap.caption_files.predictions import read_captions


@click.command()
@click.argument("captions", type=click.Path(path_type=Path, exists=True))
@click.argument("references", type=click.Path(path_type=Path, exists=True))
@click.option("--images", default=30_000, show_default=True)
@click.option("--joined", default=1, show_default=True, help="Texts joined to a longer one.")
def main(captions: Path, references: Path, images: int, joined: int) -> None:
    """Evaluate, and print a row of the table in README.md."""
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder) / "captions.jsonl", Path(folder) / "references.jsonl"
        generated = [one.caption for one in read_captions(captions) if one.caption]
        written = [image.captions for image in read_annotations(references)]
        with ours.open("w", encoding="utf-8") as file:
            for i, texts in enumerate(islice(_joined(generated, joined), images)):
                file.write(json.dumps({"image_id": str(i), "caption": "".join(texts)}) + "\n")
        with theirs.open("w", encoding="utf-8") as file:
            for i, several in enumerate(islice(_joined(written, joined), images)):
                texts = ["".join(parts) for parts in zip(*several, strict=False)]
                file.write(json.dumps({"image_id": str(i), "captions": texts}) + "\n")
        started = time.perf_counter()
        done = subprocess.run(
            [str(Path(sys.executable).with_name("batchcap")), "evaluate", str(ours), str(theirs)],
            capture_output=True,
            text=True,
            check=True,
        )
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        click.echo(done.stdout)
        click.echo(f"| {images} | {joined} | {seconds:.1f} | {peak:.0f} |")


def _joined(values, count):
    endless = cycle(values)
    while True:
        yield list(islice(endless, count))


if __name__ == "__main__":
    main()
