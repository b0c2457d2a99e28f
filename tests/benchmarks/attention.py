"""Where attention falls, on photos whose place in a larger photo is known.

    python tests/benchmarks/attention.py IMAGES REFERENCES --model MODEL

Each photo is pasted, at half its side and at a random place, into another one. For words in its
references but not in the other one's, attention should fall on it. Prints how often the strongest
cell's centre lies in its box, and how often a random cell's would. Words of more than a tenth of
all photos (`一个`, `在`) name nothing in particular, and are skipped.
"""

from collections import Counter
from pathlib import Path

import click
import numpy as np
from PIL import Image

from batchcap.caption_files.annotations import AnnotatedImage, read_annotations
from batchcap.evaluation.bootstrap import interval, resampled
from batchcap.model.openvino_captioner import load_for_openvino
from batchcap.model.vocabulary import segment
from batchcap.settings import DEFAULT_MODEL, DecodeSettings

BATCH = 50
COMMON = 0.1


@click.command()
@click.argument("images", type=click.Path(path_type=Path, exists=True))
@click.argument("references", type=click.Path(path_type=Path, exists=True))
@click.option("--model", type=click.Path(path_type=Path), default=DEFAULT_MODEL)
@click.option("--count", default=1000, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(images: Path, references: Path, model: Path, count: int, seed: int) -> None:
    """Print the share of words with attention on their photo, and chance."""
    rng = np.random.default_rng(seed)
    annotated = [one for one in read_annotations(references) if (images / one.image_id).exists()]
    words_of = [_words(image) for image in annotated]
    frequency = Counter(word for words in words_of for word in words)
    common = {word for word, photos in frequency.items() if photos > COMMON * len(annotated)}
    captioner = load_for_openvino(model)
    side = captioner.config.backbone.image_size
    settings = DecodeSettings(captioner.config.decoder.max_length)
    hits: list[tuple[float, float]] = []
    for start in range(0, count, BATCH):
        chosen = rng.integers(len(annotated), size=(BATCH, 2))
        corners = rng.integers(side - side // 2, size=(BATCH, 2))
        pixels = np.stack(
            [
                _composed(
                    images / annotated[front].image_id,
                    images / annotated[behind].image_id,
                    corner,
                    side,
                )
                for (front, behind), corner in zip(chosen, corners, strict=True)
            ]
        )
        captions = captioner.caption(pixels, settings, [""] * BATCH)
        for (front, behind), corner, caption in zip(chosen, corners, captions, strict=True):
            named = words_of[front] - words_of[behind] - common
            inside = _cells_inside(corner, side, captioner.grid)
            for word, weights in zip(caption.words, caption.attention, strict=True):
                if word in named:
                    peak = int(weights.argmax())
                    hits.append((float(inside[peak]), float(inside.mean())))
        click.echo(f"{start + BATCH} photos, {len(hits)} words", err=True)
    table = np.array(hits)
    share, chance = table.mean(axis=0)
    low, high = interval(resampled(table[:, :1], 1000, seed)[:, 0] / len(table))
    click.echo(
        f"| {model.name} | {len(hits)} | {100 * share:.1f} % ({100 * low:.1f} to {100 * high:.1f}) "
        f"| {100 * chance:.1f} % |"
    )


def _words(image: AnnotatedImage) -> set[str]:
    """Return the words in at least two captions of a photo."""
    counts = Counter(word for caption in image.captions for word in set(segment(caption)))
    return {word for word, people in counts.items() if people > 1}


def _composed(front: Path, behind: Path, corner: np.ndarray, side: int) -> np.ndarray:
    with Image.open(behind) as photo:
        canvas = photo.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
    with Image.open(front) as photo:
        small = photo.convert("RGB").resize((side // 2, side // 2), Image.Resampling.BILINEAR)
    canvas.paste(small, (int(corner[1]), int(corner[0])))
    return np.asarray(canvas)


def _cells_inside(corner: np.ndarray, side: int, grid: tuple[int, int]) -> np.ndarray:
    """Return `bool[G]`: whether each cell's centre lies in the pasted photo."""
    rows, columns = ((np.arange(cells) + 0.5) * side / cells for cells in grid)
    top, left = corner
    down = (top <= rows) & (rows < top + side // 2)
    across = (left <= columns) & (columns < left + side // 2)
    return (down[:, None] & across[None, :]).ravel()


if __name__ == "__main__":
    main()
