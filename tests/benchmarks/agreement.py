"""How many captions a runtime, a precision or scaled JPEG decoding changes.

    python tests/benchmarks/agreement.py PHOTOS [--limit N]

The reference is TensorFlow in float32, not compiled, one photo decoded whole.
"""

import argparse
import io
import itertools
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
from PIL import Image, JpegImagePlugin

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.workers import worker_of

from batchcap.errors import UsageError
from batchcap.model.captioner import Captioner
from batchcap.model.loading import load_captioner
from batchcap.model.runtime import Execution, choose_execution
from batchcap.photos.listing import list_images
from batchcap.schema import ImageRef
from batchcap.settings import DEFAULT_MODEL, Precision, Runtime

SCALES = (4.0, 5.0, 8.0)
ENLARGED = 300
NOISE = 8  # standard deviation, so that enlarged photos have fine grain as large ones do


class Captions(NamedTuple):
    texts: list[str]
    logprobs: list[float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--limit", type=int, default=1000)
    asked = parser.parse_args()
    refs = list(itertools.islice(list_images(str(asked.photos)), asked.limit))
    reference = captions_of(load_captioner(DEFAULT_MODEL, Execution(), compiled=False), refs)
    print(f"| {len(refs)} photos | other captions | largest difference of equal ones' logprob |")
    print("|---|---|---|")
    for runtime, precision in (
        (Runtime.TENSORFLOW, Precision.FLOAT32),
        (Runtime.OPENVINO, Precision.FLOAT32),
        (Runtime.TENSORFLOW, Precision.FLOAT16),
        (Runtime.TENSORFLOW, Precision.BFLOAT16),
        (Runtime.OPENVINO, Precision.BFLOAT16),
    ):
        try:
            captioner = load_captioner(DEFAULT_MODEL, choose_execution(runtime, precision))
        except UsageError:
            print(f"| {runtime}, {precision} | not on this machine | |")
            continue
        report(f"{runtime}, {precision}", captions_of(captioner, refs), reference)
    captioner = load_captioner(DEFAULT_MODEL, Execution("CPU", Runtime.OPENVINO))
    for scale in SCALES:
        with tempfile.TemporaryDirectory() as folder:
            enlarged = list(enlarge(refs[:ENLARGED], scale, Path(folder)))
            scaled = captions_of(captioner, enlarged)
            with patch.object(JpegImagePlugin.JpegImageFile, "draft", lambda *_: None):
                whole = captions_of(captioner, enlarged)
        report(f"JPEGs {scale:g} times the input, {len(enlarged)} photos", scaled, whole)


def captions_of(captioner: Captioner, refs: list[ImageRef]) -> Captions:
    rows = [row for batch in worker_of(captioner, 50).rows(refs) for row in batch]
    return Captions([row["caption"] for row in rows], [row["logprob"] for row in rows])


def report(name: str, captions: Captions, reference: Captions) -> None:
    is_same = np.array(captions.texts) == np.array(reference.texts)
    differences = np.abs(np.array(captions.logprobs) - np.array(reference.logprobs))
    print(
        f"| {name} | {np.count_nonzero(~is_same)} ({100 * np.mean(~is_same):.1f} %) | "
        f"{differences[is_same].max():.2g} |",
        flush=True,
    )


def enlarge(refs: list[ImageRef], scale: float, folder: Path) -> Iterator[ImageRef]:
    rng = np.random.default_rng(0)
    for number, ref in enumerate(refs):
        with Image.open(ref.path) as photo:
            size = tuple(round(side * scale) for side in photo.size)
            pixels = np.asarray(photo.convert("RGB").resize(size, Image.Resampling.BICUBIC))
        noisy = pixels + rng.normal(0, NOISE, pixels.shape).astype(np.float32)
        encoded = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(encoded, "JPEG", quality=90)
        path = folder / f"{number}.jpg"
        path.write_bytes(encoded.getvalue())
        yield ImageRef(path.name, str(path))


if __name__ == "__main__":
    main()
