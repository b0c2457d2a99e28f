"""Captions that people wrote: the references of evaluation, the examples of training."""

import os
import posixpath
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchcap.records import (
    MISSING,
    Problems,
    entries,
    first_line,
    json_lines,
    read_bytes,
    read_json,
    shown,
    text_lines,
)

SPLITS = ("train", "val", "test")
FLICKR_LINE = re.compile(
    r"(?P<name>.+?)#(?:(?P<kind>[^#\s]+)#)?(?P<number>\d+)(?:\s+(?P<caption>.*))?"
)


@dataclass(frozen=True)
class AnnotatedImage:
    """One photo's captions as people wrote them, and `train`, `val`, `test` or whatever split.

    `number` is its id in a COCO file.
    """

    image_id: str
    captions: tuple[str, ...]
    split: str | None = None
    number: int | None = None


def read_annotations(path: str | os.PathLike[str]) -> list[AnnotatedImage]:
    """Read captions in any known format, told by its content, in order of first appearance.

    Captions come back in NFC with single spaces.

    Raises:
        UsageError: there is no such file.
        InputError: it is wrong; counts the places and shows the first ten.
    """
    return ANNOTATION_READERS[detect_format(path)](Path(path))


def detect_format(path: str | os.PathLike[str]) -> str:
    """The key of `ANNOTATION_READERS` for a file, by its first line that is not blank."""
    first = first_line(Path(path))
    if first.startswith(b"["):
        return "ai-challenger"
    if not first.startswith(b"{"):
        return "flickr8k"
    is_one_record = first.endswith(b"}") and b'"annotations"' not in first
    return "jsonl" if is_one_record or Path(path).suffix == ".jsonl" else "coco"


class _Annotations:
    """Gathers captions by photo, and everything that is wrong with the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems = Problems(path)
        self.captions: dict[str, list[str]] = {}
        self.splits: dict[str, str] = {}
        self.numbers: dict[str, int] = {}

    def add_image(self, place: str, image_id: object, split: object) -> bool:
        """Whether it is one; a photo that stands in several places is the same photo."""
        if not isinstance(image_id, str) or not image_id:
            self.problems.report(place, f"the name of the photo is {shown(image_id)}, not a text")
            return False
        self.captions.setdefault(image_id, [])
        if isinstance(split, str) and self.splits.setdefault(image_id, split) != split:
            self.problems.report(place, f"{image_id} stands in two splits")
        return True

    def add_caption(self, place: str, image_id: str, caption: object) -> None:
        reason = caption_problem(caption)
        if reason is None:
            self.captions[image_id].append(clean(str(caption)))
        else:
            self.problems.report(place, reason)

    def finish(self) -> list[AnnotatedImage]:
        self.problems.raise_if_any()
        if not self.captions:
            self.problems.report("", "no captions")
            self.problems.raise_if_any()
        return [
            AnnotatedImage(
                image_id, tuple(captions), self.splits.get(image_id), self.numbers.get(image_id)
            )
            for image_id, captions in self.captions.items()
        ]


def caption_problem(caption: object) -> str | None:
    """Why a value can't be a caption, or None."""
    if not isinstance(caption, str):
        return f"the caption is {shown(caption)}, not a text"
    if not caption.strip():
        return "empty caption"
    if re.fullmatch(r"""\s*\[\s*(['"]).*\1\s*\]\s*""", caption, re.DOTALL):
        return "the caption is a list written as text; write one caption each"
    if re.search("[\ud800-\udfff]", caption):
        return "the caption holds half a character (a lone surrogate)"
    return None


def clean(caption: str) -> str:
    """In NFC, on one line, with single spaces."""
    return " ".join(unicodedata.normalize("NFC", caption).split())


def _read_flickr8k(path: Path) -> list[AnnotatedImage]:
    """`<file name>#<kind>#<n> <caption>` a line, `#<kind>` optional; splits in files beside."""
    annotations = _Annotations(path)
    splits = _splits_beside(annotations)
    seen: set[tuple[str, str | None, str]] = set()
    for place, line in text_lines(path, annotations.problems):
        match = FLICKR_LINE.fullmatch(line)
        if match is None:
            annotations.problems.report(place, "not `<file name>#<number> <caption>`")
            continue
        name, kind, number, caption = match.groups()
        if (name, kind, number) in seen:
            annotations.problems.report(place, f"caption {number} of {name} stands twice")
        seen.add((name, kind, number))
        split = splits.get(name) or splits.get(posixpath.splitext(name)[0])
        if annotations.add_image(place, name, split):
            annotations.add_caption(place, name, caption or "")
    return annotations.finish()


def _splits_beside(annotations: _Annotations) -> dict[str, str]:
    """Split by photo name, with or without extension as the lists have it."""
    splits: dict[str, str] = {}
    for split in SPLITS:
        path = annotations.path.with_name(f"{split}.txt")
        if path == annotations.path or not path.is_file():
            continue
        for name in read_bytes(path).decode("utf-8", "surrogateescape").split():
            if splits.setdefault(name, split) != split:
                annotations.problems.report(
                    "", f"{name} stands in {splits[name]}.txt and in {path.name}"
                )
    return splits


def _read_jsonl(path: Path) -> list[AnnotatedImage]:
    """`{"image_id": ..., "captions": [...]}` a line, or one `"caption"`; `"split"` optional."""
    annotations = _Annotations(path)
    for place, record in json_lines(path, annotations.problems):
        _add_record(annotations, place, record)
    return annotations.finish()


def _read_ai_challenger(path: Path) -> list[AnnotatedImage]:
    """One array of `{"image_id": ..., "caption": [five texts]}`, as AI Challenger 2017 has it."""
    annotations = _Annotations(path)
    for place, record in entries(read_json(path)):
        _add_record(annotations, place, record)
    return annotations.finish()


def _add_record(annotations: _Annotations, place: str, record: Any) -> None:
    if not isinstance(record, dict):
        annotations.problems.report(place, f"{shown(record)} is not an object")
        return
    captions = record.get("captions", record.get("caption"))
    listed = captions if isinstance(captions, list) else [captions]
    if not listed:
        annotations.problems.report(place, "no caption")
    elif annotations.add_image(place, record.get("image_id"), record.get("split")):
        for caption in listed:
            annotations.add_caption(place, record["image_id"], caption)


def _read_coco(path: Path) -> list[AnnotatedImage]:
    """`images` with `id` and `file_name`, `annotations` with `image_id` and `caption`.

    An image may stand there several times, as AI Challenger's own references have it.
    """
    document = read_json(path)
    annotations = _Annotations(path)
    names: dict[str, str] = {}
    for place, image in _section(annotations, document, "images"):
        key, name = shown(image.get("id")), image.get("file_name")
        if key == MISSING or names.get(key, name) != name:
            annotations.problems.report(place, f"the id is {key if key == MISSING else 'taken'}")
        elif annotations.add_image(place, name, image.get("split")):
            names[key] = image["file_name"]
            if type(image["id"]) is int:
                annotations.numbers[names[key]] = image["id"]
    for place, annotation in _section(annotations, document, "annotations"):
        key = shown(annotation.get("image_id"))
        if key in names:
            annotations.add_caption(place, names[key], annotation.get("caption"))
        else:
            annotations.problems.report(place, f"unknown image_id ({key})")
    for name in dict.fromkeys(names.values()):
        if not annotations.captions[name]:
            annotations.problems.report("", f"{name} has no caption")
    return annotations.finish()


def _section(
    annotations: _Annotations, document: dict[str, Any], name: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of each object in one of the document's lists; others are reported."""
    records = document.get(name)
    if not isinstance(records, list):
        annotations.problems.report("", f"no list `{name}`")
        return
    for place, record in entries(records, f"{name} entry"):
        if isinstance(record, dict):
            yield place, record
        else:
            annotations.problems.report(place, f"{shown(record)} is not an object")


ANNOTATION_READERS: dict[str, Callable[[Path], list[AnnotatedImage]]] = {
    "flickr8k": _read_flickr8k,
    "ai-challenger": _read_ai_challenger,
    "coco": _read_coco,
    "jsonl": _read_jsonl,
}
