"""The shipped model on the 1,000 validation photos of Flickr8k-CN, if available."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from batchcap.caption_files.annotations import read_annotations
from batchcap.captioning.run import run_captioning
from batchcap.captioning.summary import RunSummary
from batchcap.evaluation.metrics import score_captions
from batchcap.model.captioner import Captioner
from batchcap.model.vocabulary import segment
from batchcap.photos.images import LoadSettings, load_image
from batchcap.settings import DecodeSettings, RunSettings

pytestmark = pytest.mark.slow

Rows = list[dict[str, Any]]

FREQUENT_NOUNS = ("狗", "男人", "小孩")
MIRRORED_PHOTOS = 200


@pytest.fixture(scope="module")
def validation_run(
    flickr8k: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunSummary, Rows]:
    folder = tmp_path_factory.mktemp("flickr8k")
    names = (flickr8k / "val.txt").read_text().split()
    listed = folder / "val.txt"
    listed.write_text("".join(f"{flickr8k.absolute()}/images/{name}.jpg\n" for name in names))
    summary = run_captioning(RunSettings(source=str(listed), output=folder / "captions.parquet"))
    return summary, pq.read_table(folder / "captions.parquet").to_pylist()


def test_every_photo_has_a_row_with_a_caption(validation_run: tuple[RunSummary, Rows]) -> None:
    summary, rows = validation_run
    assert (summary.counts.found, summary.counts.captioned, summary.counts.failed.total()) == (
        1000,
        1000,
        0,
    )
    assert len({row["image_id"] for row in rows}) == 1000
    assert all(row["caption"] and row["finished"] for row in rows)


def test_greedy_captions_reach_the_published_score(
    validation_run: tuple[RunSummary, Rows], flickr8k: Path
) -> None:
    annotated = {image.image_id: image for image in read_annotations(flickr8k / "captions.zh.txt")}
    rows = validation_run[1]
    references = [
        [segment(caption) for caption in annotated[Path(row["image_id"]).name].captions]
        for row in rows
    ]
    scores = score_captions([segment(row["caption"]) for row in rows], references).overall
    assert scores["cider_d"] >= 95


def test_attention_follows_the_photo_and_not_the_word(
    validation_run: tuple[RunSummary, Rows],
) -> None:
    for word in FREQUENT_NOUNS:
        centres = [
            (look["row"], look["col"])
            for row in validation_run[1]
            for token, look in zip(row["tokens"], row["attention"], strict=True)
            if token == word
        ]
        assert len(centres) >= 50, word
        assert np.std(centres, axis=0).min() > 0.2, word  # of a cell


def test_attention_moves_to_the_other_side_of_a_mirrored_photo(
    captioner: Captioner, flickr8k: Path
) -> None:
    names = (flickr8k / "val.txt").read_text().split()[:MIRRORED_PHOTOS]
    load_settings = LoadSettings(captioner.config.backbone.image_size)
    images = [
        load_image(flickr8k / "images" / f"{name}.jpg", load_settings).pixels for name in names
    ]
    pixels = np.stack([image for image in images if isinstance(image, np.ndarray)])
    as_taken, mirrored = (
        columns_of_words(captioner, seen) for seen in (pixels, pixels[:, :, ::-1])
    )
    pairs = [
        (columns[word], captioner.grid[1] - 1 - mirrored_columns[word])
        for columns, mirrored_columns in zip(as_taken, mirrored, strict=True)
        for word in columns.keys() & mirrored_columns.keys()
    ]
    assert len(pairs) > 2 * MIRRORED_PHOTOS
    assert np.corrcoef(np.transpose(pairs))[0, 1] > 0.5


def columns_of_words(captioner: Captioner, pixels: Any) -> list[dict[int, float]]:
    """Return, per photo, the column of the attention's centre for each word of its caption."""
    settings, keys = DecodeSettings(captioner.config.decoder.max_length), [""] * len(pixels)
    columns = np.arange(captioner.grid[1])
    return [
        dict(zip(caption.ids.tolist(), caption.attention.sum(axis=-2) @ columns, strict=True))
        for caption in captioner.caption(pixels, settings, keys)
    ]
