"""Which images of two files are the same, where each file names them in its own way."""

import hashlib
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

HASH_BITS = 51
# Numbers of names stay below, hashes of names above; all are whole numbers in JavaScript too.
LEAST_HASH = 1 << 52


@dataclass(frozen=True)
class Match:
    """`pairs` are places in the one and in the other list, in the order of the first.

    `way` says what was compared.
    """

    way: str
    pairs: list[tuple[int, int]]


def match(generated: Sequence[str], annotated: Sequence[tuple[str, int | None]]) -> Match:
    """Pair ids of generated captions with ids, and COCO numbers, of annotated images.

    All are compared in one way, the one that pairs most: as they are, by number, by file name with
    and without extension, or by the number that `coco_number` makes of a name. What two images of a
    list share pairs nothing.
    """
    names, numbers = [name for name, _ in annotated], [number for _, number in annotated]
    matches = [
        Match("image_id", _pairs(generated, names)),
        Match("COCO id", _pairs(generated, [None if n is None else str(n) for n in numbers])),
        *(Match(way, _pairs(map(key, generated), map(key, names))) for way, key in WAYS.items()),
        Match("number in the name", _pairs(generated, [str(coco_number(name)) for name in names])),
    ]
    return max(matches, key=lambda found: len(found.pairs))  # the first of several


def _pairs(ours: Iterable[str | None], theirs: Iterable[str | None]) -> list[tuple[int, int]]:
    places, others = _places(ours), _places(theirs)
    return [(place, others[key]) for key, place in places.items() if key in others]


def _places(keys: Iterable[str | None]) -> dict[str, int]:
    """The place of each key that stands once."""
    listed = list(keys)
    counts = Counter(listed)
    return {key: i for i, key in enumerate(listed) if key is not None and counts[key] == 1}


def stem(image_id: str) -> str:
    """The file name without folders and extension; `x.parquet:0000012`, a row, is kept whole."""
    name, extension = posixpath.splitext(posixpath.basename(image_id))
    return name + extension if ":" in extension else name


def _in_nfc(key: Callable[[str], str]) -> Callable[[str], str]:
    """Normalise the result of `key` to NFC: macOS lists file names decomposed."""
    return lambda image_id: unicodedata.normalize("NFC", key(image_id))


WAYS: dict[str, Callable[[str], str]] = {
    "file name": _in_nfc(posixpath.basename),
    "file name without extension": _in_nfc(stem),
}


def coco_number(image_id: str) -> int:
    """The whole number that stands for an image in COCO files, below 2^53, from its file name.

    The number in the name where there is exactly one, as in `COCO_val2014_000000391895.jpg` and in
    Flickr's names; else a hash of the name, 2^52 or more. Folders and extensions don't count, so
    that captions and references get the same number wherever they come from.
    """
    name = stem(image_id)
    numbers = [
        part for part in re.split(r"[^0-9A-Za-z]+", name) if re.fullmatch("[0-9]{1,16}", part)
    ]
    if len(numbers) == 1 and int(numbers[0]) < LEAST_HASH:
        return int(numbers[0])
    return hashed_number(name)


def hashed_number(name: str) -> int:
    """A whole number from 2^52 up to 2^53, by the SHA-256 of a name."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
    return LEAST_HASH + (int.from_bytes(digest[:8]) >> (64 - HASH_BITS))
