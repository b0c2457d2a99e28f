"""Human captions: the references of evaluation, the examples of training."""

import logging
import os
import posixpath
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from batchcap.caption_files.records import (
    Problems,
    entries,
    first_of,
    holds_records,
    name_of,
    read_bytes,
    read_records,
    text_lines,
)
from batchcap.errors import InputError
from batchcap.model.config import STYLE_NAME
from batchcap.photos.listing import has_image_extension
from batchcap.process.wording import counted, printable, shown

Record = tuple[str, dict[str, Any]]  # its place in the file, and its fields
SPLITS = ("train", "val", "test")
# Names of these splits in Karpathy's files and on Hugging Face.
SPLIT_SYNONYMS = {"restval": "train", "validation": "val"}
# `#<number>` or `#<kind>#<number>` after a name; a kind is a word, such as zhc.
FLICKR_NUMBER = re.compile(r"(?!^)#(?:(?P<kind>[^\W\d][\w-]*)#)?(?P<number>\d+)(?!\S)")
KNOWN_FORMATS = (
    "Known formats: Flickr8k text (`<file name>#<number> <caption>` per line), COCO captions, "
    "Karpathy's JSON, AI Challenger's JSON, and JSON lines or CSV with `image_id` or `file_name` "
    "and `captions`, `caption` or `text`."
)
EMPTY_CAPTION = ("empty caption", "empty captions")
STRAY_CAPTION = ("caption of an unknown photo", "captions of unknown photos")
UNCAPTIONED = ("photo without a caption", "photos without a caption")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AnnotatedImage:
    """The human captions of one photo, and its split: `train`, `val`, `test` or another.

    `styles` are the captions' styles, None for a caption without one; empty if no caption has a
    style. `number` is the photo's id in a COCO file.
    """

    image_id: str
    captions: tuple[str, ...]
    split: str | None = None
    number: int | None = None
    styles: tuple[str | None, ...] = ()


def read_annotations(path: str | os.PathLike[str]) -> list[AnnotatedImage]:
    """Read captions in any known format, recognised by content, in order of first appearance.

    Captions are normalised to NFC with single spaces. Empty captions, captions of unknown photos
    and photos without captions are skipped, and the log counts them.

    Raises:
        UsageError: there is no such file.
        InputError: it has wrong entries; counts them and shows the first ten.
    """
    annotations = _Annotations(Path(path))
    data = read_bytes(annotations.path)
    if not holds_records(data):
        _add_flickr8k(annotations, data)
        return annotations.finish()
    for place, record in read_records(annotations.path, data, annotations.problems):
        if not isinstance(record, dict):
            annotations.problems.report(place, f"{shown(record)} is not an object")
        elif name_of(record) is None and not record.keys().isdisjoint(("images", "annotations")):
            _add_document(annotations, record)
        else:
            _add_record(annotations, place, record)
    return annotations.finish()


class _Annotations:
    """Collects captions by photo, and all problems of the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems = Problems(path)
        self.captions: dict[str, list[tuple[str, str | None]]] = {}
        self.splits: dict[str, str] = {}
        self.numbers: dict[str, int] = {}
        self._left_out: dict[tuple[str, str], list[str]] = {}

    def add_image(
        self, place: str, image_id: object, split: object = None, number: object = None
    ) -> bool:
        """Add a photo, perhaps repeatedly; return False if its name is wrong."""
        if not isinstance(image_id, str) or not image_id:
            self.problems.report(place, f"the photo's name must be a string, not {shown(image_id)}")
            return False
        self.captions.setdefault(image_id, [])
        if type(number) is int:
            self.numbers[image_id] = number
        if isinstance(split, str) and split:
            split = SPLIT_SYNONYMS.get(split, split)
            if (other := self.splits.setdefault(image_id, split)) != split:
                self.problems.report(place, f"{image_id} is in two splits, {other} and {split}")
        return True

    def add_caption(
        self, place: str, image_id: str, caption: object, style: str | None = None
    ) -> None:
        if caption is None or (isinstance(caption, str) and not caption.strip()):
            self.leave_out(EMPTY_CAPTION, f"{self.path}{place}")
        elif reason := caption_problem(caption):
            self.problems.report(place, reason)
        else:
            self.captions[image_id].append((clean(str(caption)), style))

    def leave_out(self, noun: tuple[str, str], example: str) -> None:
        """Count an entry that is skipped without being wrong; `noun` is singular and plural."""
        self._left_out.setdefault(noun, []).append(example)

    def finish(self) -> list[AnnotatedImage]:
        captioned = {image_id: captions for image_id, captions in self.captions.items() if captions}
        self.problems.raise_if_any("" if captioned else KNOWN_FORMATS)
        for image_id in self.captions:
            if image_id not in captioned:
                self.leave_out(UNCAPTIONED, image_id)
        for noun, examples in self._left_out.items():
            left_out = f"{counted(len(examples), *noun)}, such as {printable(examples[0])}"
            log.warning("%s: skipped %s", self.path, left_out)
        if not captioned:
            raise InputError(f"{self.path} has no captions. {KNOWN_FORMATS}")
        return [self._image(image_id, captions) for image_id, captions in captioned.items()]

    def _image(self, image_id: str, captions: list[tuple[str, str | None]]) -> AnnotatedImage:
        texts, styles = zip(*captions, strict=True)
        return AnnotatedImage(
            image_id,
            texts,
            split=self.splits.get(image_id),
            number=self.numbers.get(image_id),
            styles=styles if any(styles) else (),
        )


def caption_problem(caption: object) -> str | None:
    """Return why a value cannot be a caption, or None."""
    if not isinstance(caption, str):
        return f"the caption is {shown(caption)}, not a string"
    if re.fullmatch(r"""\s*\[\s*(['"]).*\1\s*\]\s*""", caption, re.DOTALL):
        return "the caption is a list written as text; write one caption per entry"
    if re.search("[\ud800-\udfff]", caption):
        return "the caption holds half a character (a lone surrogate)"
    return None


def clean(caption: str) -> str:
    """Return a caption in NFC, on one line, with single spaces."""
    return " ".join(unicodedata.normalize("NFC", caption).split())


def _add_flickr8k(annotations: _Annotations, data: bytes) -> None:
    """Add lines of `<file name>#<kind>#<n> <caption>`, `#<kind>` optional, and their splits."""
    lines = list(text_lines(data, annotations.problems))
    numbers = _caption_numbers([line for _, line in lines])
    seen: set[tuple[str, str | None, str]] = set()
    for (place, line), match in zip(lines, numbers, strict=True):
        if match is None:
            annotations.problems.report(place, "not `<file name>#<number> <caption>`")
            continue
        name, caption = line[: match.start()], line[match.end() :]
        kind, number = match.groups()
        if (name, kind, number) in seen:
            annotations.problems.report(place, f"duplicate caption {number} of {name}")
        seen.add((name, kind, number))
        annotations.add_image(place, name)
        annotations.add_caption(place, name, caption)
    _add_splits_beside(annotations)


def _caption_numbers(lines: Sequence[str]) -> list[re.Match[str] | None]:
    """Find the number that ends the name in each line: names and captions may contain `#3` too.

    It is the first candidate after an image extension, if most lines have such a candidate.
    """
    candidates = [list(FLICKR_NUMBER.finditer(line)) for line in lines]
    after_extensions = [
        [match for match in found if has_image_extension(line[: match.start()])]
        for line, found in zip(lines, candidates, strict=True)
    ]
    if 2 * sum(map(bool, after_extensions)) > len(lines):
        candidates = [
            likely or found for likely, found in zip(after_extensions, candidates, strict=True)
        ]
    return [next(iter(found), None) for found in candidates]


def _add_splits_beside(annotations: _Annotations) -> None:
    """Add the splits of `train.txt`, `val.txt` and `test.txt` in the same directory.

    Their lines name photos, with or without extension. A file is ignored if most of its lines name
    no photo.
    """
    photos: dict[str, list[str]] = {}
    for image_id in annotations.captions:
        for name in {image_id, posixpath.splitext(image_id)[0]}:
            photos.setdefault(name, []).append(image_id)
    for split in SPLITS:
        path = annotations.path.with_name(f"{split}.txt")
        if path == annotations.path or not path.is_file():
            continue
        lines = read_bytes(path).decode("utf-8", "replace").split("\n")
        names = [name for line in lines if (name := line.strip())]
        known = [name for name in names if name in photos]
        if 2 * len(known) > len(names):
            for image_id in (photo for name in known for photo in photos[name]):
                annotations.add_image("", image_id, split)
        else:
            log.log(
                logging.WARNING if known else logging.INFO,
                "%s is not used as a split: %d of %s name photos of %s",
                path,
                len(known),
                counted(len(names), "line"),
                annotations.path.name,
            )


def _add_record(annotations: _Annotations, place: str, record: dict[str, Any]) -> None:
    """Add `{"image_id": ..., "captions": [...]}`, or one `"caption"`; `"split"` is optional.

    The optional `"styles"` has a name or null for each caption. AI Challenger 2017 has arrays of
    such records; Hugging Face's image folders have `"file_name"` and `"text"`.
    """
    if not any(key in record for key in ("captions", "caption", "text")):
        annotations.problems.report(place, "the caption is missing")
        return
    name, captions = name_of(record), first_of(record, "captions", "caption", "text")
    captions = captions if isinstance(captions, list) else [captions]
    styles = record.get("styles", [None] * len(captions))
    if problem := _styles_problem(styles, len(captions)):
        annotations.problems.report(place, problem)
    elif annotations.add_image(place, name, record.get("split"), record.get("image_id")):
        for caption, style in zip(captions, styles, strict=True):
            annotations.add_caption(place, str(name), caption, style)


def _styles_problem(styles: object, count: int) -> str | None:
    """Return why a value cannot be the styles of `count` captions, or None."""
    if not isinstance(styles, list) or len(styles) != count:
        return f"`styles` is {shown(styles)}, not a list with a name or null for each caption"
    for style in styles:
        if style is not None and not (isinstance(style, str) and re.search(STYLE_NAME, style)):
            return f"the style {shown(style)} is not made of a to z, 0 to 9 and -"
    return None


def _add_document(annotations: _Annotations, document: dict[str, Any]) -> None:
    """Add a COCO file, or one of Karpathy's, whose photos contain their captions."""
    images = list(_section(annotations, document, "images"))
    if any("sentences" in image for _, image in images):
        for place, image in images:
            _add_karpathy(annotations, place, image)
    else:
        _add_coco(annotations, images, _section(annotations, document, "annotations"))


def _add_karpathy(annotations: _Annotations, place: str, image: dict[str, Any]) -> None:
    """Add a photo: `filename` in `filepath`; `sentences` with text in `raw`; `split`, `cocoid`."""
    name: Any = image.get("filename")
    folder = image.get("filepath")
    if name and isinstance(name, str) and isinstance(folder, str):
        name = posixpath.join(folder, name)
    if not annotations.add_image(place, name, image.get("split"), image.get("cocoid")):
        return
    sentences = image.get("sentences")
    for sentence in sentences if isinstance(sentences, list) else [sentences]:
        if isinstance(sentence, dict):
            annotations.add_caption(place, name, sentence.get("raw"))
        else:
            annotations.problems.report(
                place, f"a sentence must be an object, not {shown(sentence)}"
            )


def _add_coco(
    annotations: _Annotations, images: Iterable[Record], captions: Iterable[Record]
) -> None:
    """Add images with `id` and `file_name`, and captions with `image_id` and `caption`.

    An image may occur several times, as in AI Challenger's references.
    """
    names: dict[str | int | float, str] = {}
    for place, image in images:
        key, name = image.get("id"), image.get("file_name")
        if not _is_id(key):
            annotations.problems.report(place, f"invalid id {shown(key)}")
        elif names.get(key, name) != name:
            annotations.problems.report(place, "duplicate id")
        elif annotations.add_image(place, name, image.get("split"), key):
            names[key] = str(name)
    for place, caption in captions:
        key = caption.get("image_id")
        if not _is_id(key):
            annotations.problems.report(place, f"unknown image_id {shown(key)}")
        elif key in names:
            annotations.add_caption(place, names[key], caption.get("caption"))
        else:
            annotations.leave_out(
                STRAY_CAPTION, f"{annotations.path}{place}: image_id {shown(key)}"
            )


def _is_id(value: object) -> TypeGuard[str | int | float]:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _section(annotations: _Annotations, document: dict[str, Any], name: str) -> Iterator[Record]:
    """Yield each object of one of the document's lists; report the others."""
    records = document.get(name)
    if not isinstance(records, list):
        annotations.problems.report("", f"no list `{name}`")
        return
    for place, record in entries(records, f"{name} entry"):
        if isinstance(record, dict):
            yield place, record
        else:
            annotations.problems.report(place, f"{shown(record)} is not an object")
