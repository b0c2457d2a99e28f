"""The shipped model on the 1,000 validation photos of Flickr8k-CN, where they are."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from batchcap.inputs import read_annotations
from batchcap.metrics import score_captions
from batchcap.model.text import segment
from batchcap.run import RunSummary, run_captioning
from batchcap.settings import RunSettings

Rows = list[dict[str, Any]]

ANIMALS_AND_COLOURS = ("狗", "小狗", "白色", "黑色", "红色", "棕色")


@pytest.fixture(scope="module")
def validation_run(
    flickr8k: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunSummary, Rows]:
    folder = tmp_path_factory.mktemp("flickr8k")
    names = (flickr8k / "val.txt").read_text().split()
    listed = folder / "val.txt"
    listed.write_text("".join(f"{flickr8k.absolute()}/images/{name}.jpg\n" for name in names))
    summary = run_captioning(RunSettings(str(listed), folder / "captions.parquet"))
    return summary, pq.read_table(folder / "captions.parquet").to_pylist()


def test_every_photo_has_a_row_with_a_caption(validation_run: tuple[RunSummary, Rows]) -> None:
    summary, rows = validation_run
    assert (summary.found, summary.captioned, summary.failed.total()) == (1000, 1000, 0)
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
    scores = score_captions([segment(row["caption"]) for row in rows], references)
    assert scores["cider_d"] >= 77


def test_attention_follows_the_photo_and_not_the_word(
    validation_run: tuple[RunSummary, Rows],
) -> None:
    for word in ANIMALS_AND_COLOURS:
        centres = [
            (look["row"], look["col"])
            for row in validation_run[1]
            for token, look in zip(row["tokens"], row["attention"], strict=True)
            if token == word
        ]
        if len(centres) >= 20:
            assert np.std(centres, axis=0).min() > 0.1, word  # of a cell
