"""The captions of everyday photos published in `jobs`, and the photos if available."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from helpers.places import JOBS

from batchcap.caption_files.annotations import read_annotations
from batchcap.captioning.run import run_captioning
from batchcap.evaluation.metrics import score_captions
from batchcap.model.vocabulary import segment
from batchcap.settings import RunSettings

PUBLISHED = JOBS / "everyday-zh.jsonl"
FIELDS = ["image_id", "source", "source_name", "split", "captions", "styles"]
STYLES = ("short", "detailed", "short", None)


def test_the_published_captions_are_annotations_of_two_splits() -> None:
    images = read_annotations(PUBLISHED)
    assert Counter(image.split for image in images) == {"train": 9995, "val": 500}
    assert sum(len(image.captions) for image in images) == 32687
    assert min(len(image.captions) for image in images) == 2


def test_captions_have_the_style_of_their_position() -> None:
    for image in read_annotations(PUBLISHED):
        assert image.styles == STYLES[: len(image.captions)]


def test_each_photo_has_its_source_and_its_name_there() -> None:
    records = [json.loads(line) for line in PUBLISHED.open(encoding="utf-8")]
    assert all(list(record) == FIELDS for record in records)
    assert Counter(record["source"] for record in records) == {
        "COCO": 6647,
        "ADE20K": 1295,
        "ImageNet": 1289,
        "Caltech-101": 1264,
    }
    unknown = [record["image_id"] for record in records if record["source_name"] is None]
    assert len(unknown) == 295
    named = [(record["source"], record["source_name"]) for record in records]
    assert len(set(named) - {("COCO", None)}) == len(records) - len(unknown)


def test_the_published_captions_are_those_of_the_photos(everyday: Path) -> None:
    published = [replace(image, styles=()) for image in read_annotations(PUBLISHED)]
    given = read_annotations(everyday / "captions.zh.jsonl")
    assert published == [replace(image, styles=()) for image in given]
    photos = {path.name for path in (everyday / "images").iterdir()}
    assert {image.image_id for image in read_annotations(PUBLISHED)} <= photos


@pytest.mark.slow
def test_greedy_captions_reach_the_published_score(everyday: Path, tmp_path: Path) -> None:
    annotated = [image for image in read_annotations(PUBLISHED) if image.split == "val"]
    listed = tmp_path / "val.txt"
    names = (f"{everyday.absolute()}/images/{image.image_id}\n" for image in annotated)
    listed.write_text("".join(names))
    run_captioning(RunSettings(source=str(listed), output=tmp_path / "captions.parquet"))
    captions = pq.read_table(tmp_path / "captions.parquet")["caption"].to_pylist()
    references = [[segment(caption) for caption in image.captions] for image in annotated]
    scores = score_captions([segment(caption) for caption in captions], references).overall
    assert scores["cider_d"] >= 98
