"""Matches the images of two files that name them in different ways."""

import hashlib
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from batchcap.errors import InputError
from batchcap.process.wording import counted, printable
from batchcap.settings import MatchBy

HASH_BITS = 51
# Numbers in names are below, hashes of names above; all are exact in JavaScript too.
LEAST_HASH = 1 << 52
# Instead of a place, if there is no single image.
SEVERAL, NOBODY = -1, -2

# An image's id, and its number in a COCO file if it has one.
ImageId = tuple[str, int | None]
# Places in the first and in the second list, in the order of the first.
Pairs = list[tuple[int, int]]
Pairing = Callable[[Sequence[ImageId], Sequence[ImageId]], Pairs]


@dataclass(frozen=True)
class Way:
    """A way to compare the ids of two lists. A key that two images share pairs nothing."""

    name: str
    by: MatchBy
    pairs: Pairing


@dataclass(frozen=True)
class Match:
    """The images that two lists have in common, and the way in which ids were compared."""

    way: Way
    pairs: Pairs


def match(
    generated: Sequence[ImageId],
    annotated: Sequence[ImageId],
    by: MatchBy = MatchBy.AUTO,
    names: tuple[str, str] = ("captions", "references"),
) -> Match:
    """Pair the images of two files called `names`, all in the same way.

    `MatchBy.AUTO` uses the strictest way that pairs any: equal ids; ids of which one is the end of
    the other; the same without extensions; COCO numbers. It never chooses between ways that pair
    different images and could both be right.

    Raises:
        InputError: two ways pair different images, or no image is in both files.
    """
    if not generated:
        raise InputError(f"{names[0]} has no captions to match with {names[1]}: check both files")
    if by is MatchBy.AUTO:
        found = _agreed(generated, annotated, names)
    else:
        found = _fullest([way for way in WAYS_ON_REQUEST if way.by is by], generated, annotated)
    if not found.pairs:
        raise _nothing_in_common(generated, annotated, names)
    return found


def _fullest(
    ways: Sequence[Way], generated: Sequence[ImageId], annotated: Sequence[ImageId]
) -> Match:
    """Return the match of the way that pairs most images; of equal ones the first."""
    matches = [Match(way, way.pairs(generated, annotated)) for way in ways]
    return max(matches, key=lambda one: len(one.pairs))


def _nothing_in_common(
    generated: Sequence[ImageId], annotated: Sequence[ImageId], names: tuple[str, str]
) -> InputError:
    """Return an error that names an image of each file, and the explicit way that pairs most."""

    def quoted(image: ImageId) -> str:
        return repr(printable(image[0]))

    possible = _fullest(WAYS_ON_REQUEST, generated, annotated)
    advice = "check that both files are about the same photos"
    if possible.pairs:
        i, j = possible.pairs[0]
        advice = (
            f"if {quoted(generated[i])} is {quoted(annotated[j])}, use --match-by "
            f"{possible.way.by}, which pairs {counted(len(possible.pairs), 'image')}"
        )
    return InputError(
        f"{names[0]} and {names[1]} have no image in common: the one has {quoted(generated[0])}, "
        f"the other {quoted(annotated[0])}; {advice}"
    )


def _agreed(
    generated: Sequence[ImageId], annotated: Sequence[ImageId], names: tuple[str, str]
) -> Match:
    """Return the match that no other way contradicts."""

    def found(way: Way) -> Match:
        return Match(way, way.pairs(generated, annotated))

    def refuse(one: Match, other: Match) -> InputError:
        return _ambiguous(one, other, generated, annotated, names)

    # Ids that are numbers may be COCO ids, or the numbers that `export` makes of names.
    are_numbers = all(_whole_number(name) is not None for name, _ in generated)
    ways = [BY_END, BY_END_OF_STEM, *([BY_NUMBER] if are_numbers else [])]
    by_coco_id = found(BY_COCO_ID)
    best = by_image_id = found(BY_IMAGE_ID)
    for way in ways:
        if len(best.pairs) == min(len(generated), len(annotated)):
            break  # weaker ways pair no further images
        other = found(way)
        if not best.pairs:
            best = other
        # A weaker way that pairs fewer images is not needed.
        elif len(other.pairs) >= len(best.pairs) and set(other.pairs) != set(best.pairs):
            raise refuse(best, other)
    if not best.pairs and are_numbers:
        best = by_coco_id
    if best.way in (BY_END, BY_END_OF_STEM) and _have_several_roots(
        [(generated[i][0], annotated[j][0]) for i, j in best.pairs], generated, annotated
    ):
        raise refuse(by_image_id, best)
    if not are_numbers:
        return best
    if set(best.pairs) == set(by_coco_id.pairs):
        return by_coco_id
    has_coco_ids = any(number is not None for _, number in annotated)
    if by_coco_id.pairs or (has_coco_ids and best.way is not BY_IMAGE_ID):
        raise refuse(by_coco_id, best)
    return best


def _have_several_roots(
    pairs: list[tuple[str, str]], generated: Sequence[ImageId], annotated: Sequence[ImageId]
) -> bool:
    """Whether paired ids, with directories in both lists, differ by several leading ones."""
    if not all(any("/" in name for name, _ in side) for side in (generated, annotated)):
        return False
    roots = {_folders(one)[: -len(_folders(other)) or None] for one, other in pairs}
    others = {_folders(other)[: -len(_folders(one)) or None] for one, other in pairs}
    return len(roots) > 1 or len(others) > 1


def _ambiguous(
    one: Match,
    other: Match,
    generated: Sequence[ImageId],
    annotated: Sequence[ImageId],
    names: tuple[str, str],
) -> InputError:
    """Return an error that names two ways that pair different images, and such an image."""
    partners = [dict(found.pairs) for found in (one, other)]
    sample = next(
        i for i, _ in [*other.pairs, *one.pairs] if partners[0].get(i) != partners[1].get(i)
    )

    def described(found: Match, partner: int | None) -> str:
        theirs = "no image" if partner is None else repr(printable(annotated[partner][0]))
        return (
            f"by {found.way.name} {counted(len(found.pairs), 'image')}, where "
            f"{printable(generated[sample][0])!r} is {theirs}"
        )

    flags = dict.fromkeys(f"--match-by {found.way.by}" for found in (one, other) if found.pairs)
    return InputError(
        f"{names[0]} and {names[1]} can be matched in two ways that pair different images: "
        f"{described(one, partners[0].get(sample))}; {described(other, partners[1].get(sample))}. "
        f"{'Choose with' if len(flags) > 1 else 'If that is right, use'} "
        f"{' or '.join(flags)}"
    )


def stem(image_id: str) -> str:
    """Return a file name without directories and extension; `x.parquet:0000012`, a row, stays."""
    return posixpath.basename(_without_extension(image_id))


def coco_number(image_id: str) -> int:
    """Return the number that identifies an image in COCO files, below 2^53, from its file name.

    It is the number in the name if there is exactly one, as in `COCO_val2014_000000391895.jpg` and
    in Flickr's names; else a hash of the name, 2^52 or more. Directories and extensions are
    ignored, so that captions and references get the same number wherever they are.
    """
    name = stem(image_id)
    numbers = [
        part for part in re.split(r"[^0-9A-Za-z]+", name) if re.fullmatch("[0-9]{1,16}", part)
    ]
    if len(numbers) == 1 and int(numbers[0]) < LEAST_HASH:
        return int(numbers[0])
    return hashed_number(name)


def hashed_number(name: str) -> int:
    """Return a number from 2^52 up to 2^53, from the SHA-256 of a name."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
    return LEAST_HASH + (int.from_bytes(digest[:8]) >> (64 - HASH_BITS))


def _without_extension(image_id: str) -> str:
    path, extension = posixpath.splitext(image_id)
    return path + extension if ":" in extension else path


def _whole_number(name: str) -> int | None:
    """Return the number that an id is, written as in JSON, or None."""
    return int(name) if re.fullmatch("0|[1-9][0-9]{0,15}", name) else None


def _given_number(image: ImageId) -> int | None:
    name, number = image
    return _whole_number(name) if number is None else number


def _number_of_name(image: ImageId) -> int:
    number = _whole_number(image[0])
    return coco_number(image[0]) if number is None else number


def _in_nfc(part: Callable[[str], str]) -> Callable[[ImageId], str]:
    """Normalise a part of the name to NFC: macOS lists file names decomposed."""
    return lambda image: unicodedata.normalize("NFC", part(image[0]))


def _by_key(ours: Callable[[ImageId], object], theirs: Callable[[ImageId], object]) -> Pairing:
    """Pair the images with equal keys of the two functions."""

    def pairs(generated: Sequence[ImageId], annotated: Sequence[ImageId]) -> Pairs:
        places, others = _places(map(ours, generated)), _places(map(theirs, annotated))
        return [(place, others[key]) for key, place in places.items() if key in others]

    return pairs


def _places(keys: Iterable[object]) -> dict[object, int]:
    """Return the place of each key that occurs once."""
    listed = list(keys)
    counts = Counter(listed)
    return {key: i for i, key in enumerate(listed) if key is not None and counts[key] == 1}


def _by_end(path_of: Callable[[ImageId], str]) -> Pairing:
    """Pair the images of which one path ends in the other, below different directories."""

    def pairs(generated: Sequence[ImageId], annotated: Sequence[ImageId]) -> Pairs:
        ours, theirs = (list(map(path_of, side)) for side in (generated, annotated))
        partners, theirs_back = _partners(ours, theirs), _partners(theirs, ours)
        return [
            (i, partner)
            for i, partner in enumerate(partners)
            if partner != SEVERAL and theirs_back[partner] == i
        ]

    return pairs


def _partners(ours: list[str], theirs: list[str]) -> list[int]:
    """Return, for each of our paths, the place of the path of theirs that ends in it or vice versa.

    The place is `SEVERAL` if there is not exactly one.
    """
    by_path: dict[str, int] = {}
    by_end: dict[str, int] = {}
    wanted = set(ours)
    for place, path in enumerate(theirs):
        by_path[path] = SEVERAL if path in by_path else place
        for end in wanted.intersection(_ends(path)):
            by_end[end] = SEVERAL if end in by_end else place
    partners = []
    for path in ours:
        found = {by_path[end] for end in _ends(path) if end in by_path}
        found.add(by_end.get(path, NOBODY))
        found.discard(NOBODY)
        partners.append(found.pop() if len(found) == 1 else SEVERAL)
    return partners


def _ends(path: str) -> Iterator[str]:
    """Yield `a/b/c`, `b/c` and `c` of `a/b/c`."""
    yield path
    while "/" in path:
        path = path.partition("/")[2]
        yield path


def _folders(path: str) -> tuple[str, ...]:
    return tuple(path.split("/")[:-1])


def _itself(name: str) -> str:
    return name


def _image_id(image: ImageId) -> str:
    return image[0]


_basename, _stem = _in_nfc(posixpath.basename), _in_nfc(stem)
BY_IMAGE_ID = Way("image_id", MatchBy.IMAGE_ID, _by_key(_image_id, _image_id))
BY_END = Way("file name", MatchBy.NAME, _by_end(_in_nfc(_itself)))
BY_END_OF_STEM = Way(
    "file name without extension", MatchBy.NAME, _by_end(_in_nfc(_without_extension))
)
BY_NUMBER = Way(
    "number in the name",
    MatchBy.NUMBER,
    _by_key(_number_of_name, lambda image: coco_number(image[0])),
)
BY_COCO_ID = Way("COCO id", MatchBy.COCO_ID, _by_key(_given_number, lambda image: image[1]))
WAYS_ON_REQUEST = (
    BY_IMAGE_ID,
    BY_END,
    BY_END_OF_STEM,
    Way("file name", MatchBy.NAME, _by_key(_basename, _basename)),
    Way("file name without extension", MatchBy.NAME, _by_key(_stem, _stem)),
    BY_NUMBER,
    BY_COCO_ID,
)
