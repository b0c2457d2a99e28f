"""Ids of the same image in two files, and files that match in several ways."""

import posixpath
import tracemalloc
from dataclasses import dataclass

import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from batchcap.caption_files.matching import (
    LEAST_HASH,
    ImageId,
    coco_number,
    hashed_number,
    match,
    stem,
)
from batchcap.errors import InputError
from batchcap.settings import MatchBy

NAMES = ("captions.json", "references.json")


def named(*names: str) -> list[ImageId]:
    return [(name, None) for name in names]


@pytest.mark.parametrize(
    ("way", "ours", "theirs"),
    [
        ("image_id", ("a/1.jpg", None), ("a/1.jpg", 9)),
        ("image_id", ("a/1.jpg", 1), ("a/1.jpg", 9)),
        ("COCO id", ("391895", 391895), ("COCO_val2014_000000391895.jpg", 391895)),
        ("COCO id", ("391895", None), ("COCO_val2014_000000391895.jpg", 391895)),
        ("COCO id", ("7", 7), ("b.jpg", 7)),
        ("file name", ("photos/a.jpg", None), ("a.jpg", None)),
        ("file name", ("a.jpg", None), ("train/a.jpg", None)),
        ("file name", ("photos/cafe\u0301.jpg", None), ("caf\u00e9.jpg", None)),
        ("file name without extension", ("photos/a.jpg", None), ("a", None)),
        ("number in the name", ("391895", 391895), ("COCO_val2014_000000391895.jpg", None)),
        ("number in the name", (str(coco_number("dog.jpg")), None), ("x/dog.png", None)),
    ],
)
def test_ids_are_matched_in_each_way(way: str, ours: ImageId, theirs: ImageId) -> None:
    found = match([ours], [theirs])
    assert (found.way.name, found.pairs) == (way, [(0, 0)])


@pytest.mark.parametrize(
    ("by", "partner"),
    [(MatchBy.IMAGE_ID, 0), (MatchBy.COCO_ID, 1), (MatchBy.NAME, 2), (MatchBy.NUMBER, 3)],
)
def test_requested_way_is_used(by: MatchBy, partner: int) -> None:
    theirs = [("7", 1), ("cat.jpg", 7), ("x/7.jpg", 2), ("b_7.jpg", 3)]
    others = [image for i, image in enumerate(theirs) if i == partner] + named("y.jpg")
    with pytest.raises(InputError, match="match-by"):
        match([("7", 7)], theirs)
    assert match([("7", 7)], others, by).pairs == [(0, 0)]


def test_file_names_in_other_folders_are_matched_on_request_only() -> None:
    ours, theirs = named("train/1.jpg", "train/2.jpg"), named("val/2.jpg", "val/1.jpg")
    with pytest.raises(InputError, match=r"no image in common.*--match-by"):
        match(ours, theirs)
    assert match(ours, theirs, MatchBy.NAME).pairs == [(0, 1), (1, 0)]


def test_folders_tell_equal_file_names_apart() -> None:
    ours = named("images/a/1.jpg", "images/b/1.jpg", "images/2.jpg")
    assert match(ours, named("b/1.jpg", "2.jpg", "a/1.jpg")).pairs == [(0, 2), (1, 0), (2, 1)]


def test_deep_folders_take_little_memory() -> None:
    """Every end of every path was kept: 1.3 GB for 300,000 photos below 20 folders."""
    photos = [f"{number}.jpg" for number in range(2000)]
    deep = [f"{'folder/' * 50}{photo}" for photo in photos]
    tracemalloc.start()
    try:
        found = match(named(*photos), named(*deep))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found.pairs) == len(photos)
    assert peak < 5e6


def test_all_images_are_matched_in_one_way() -> None:
    found = match(named("x/a.jpg", "x/b.jpg", "y/c.jpg"), named("c.jpg", "b.jpg", "a.jpg"))
    assert (found.way.name, found.pairs) == ("file name", [(0, 2), (1, 1), (2, 0)])


def test_name_shared_by_two_images_pairs_nothing() -> None:
    assert match(named("x/a.jpg", "y/a.jpg", "b.jpg"), named("a.jpg", "b.jpg")).pairs == [(2, 1)]


def test_files_without_a_common_image_are_refused() -> None:
    with pytest.raises(
        InputError,
        match=r"captions\.json and references\.json have no image in common: the one has ",
    ):
        match(named("a.jpg"), named("b\x1b.jpg"), names=NAMES)


@pytest.mark.parametrize(
    ("theirs", "advice"),
    [
        ("000000391895.jpg", "use --match-by number, which pairs 1 image"),
        ("dog.jpg", "check that both files are about the same photos"),
    ],
)
def test_error_names_a_way_that_would_pair_images(theirs: str, advice: str) -> None:
    with pytest.raises(InputError) as refused:
        match(named("COCO_val2014_000000391895.jpg"), [(theirs, 391895)])
    assert advice in str(refused.value)


def test_a_file_without_captions_is_named() -> None:
    with pytest.raises(InputError, match=r"^captions\.json has no captions to match"):
        match([], named("a.jpg"), names=NAMES)


def test_only_ways_that_pair_images_are_offered_and_they_pair_them() -> None:
    """Ids with two different leading folders."""
    ours, theirs = named("x/a/1.jpg", "y/b/1.jpg"), named("a/1.jpg", "b/1.jpg")
    with pytest.raises(InputError, match=r"If that is right, use --match-by name$"):
        match(ours, theirs)
    assert match(ours, theirs, MatchBy.NAME).pairs == [(0, 0), (1, 1)]


def test_numbers_that_fit_both_coco_ids_and_names_are_refused() -> None:
    """Two hundred captions were scored against the references of other photos."""
    theirs: list[ImageId] = [(f"{1 + i}.jpg", 1 + (i + 7) % 200) for i in range(200)]
    ours: list[ImageId] = [(str(n), n) for n in range(1, 201)]
    with pytest.raises(InputError) as refused:
        match(ours, theirs, names=NAMES)
    assert str(refused.value) == (
        "captions.json and references.json can be matched in two ways that pair different images: "
        "by COCO id 200 images, where '1' is '194.jpg'; by file name without extension 200 images, "
        "where '1' is '1.jpg'. Choose with --match-by coco-id or --match-by name"
    )
    for by, partner in ((MatchBy.COCO_ID, 193), (MatchBy.NUMBER, 0), (MatchBy.NAME, 0)):
        assert match(ours, theirs, by).pairs[0] == (0, partner)
    assert match([(f"{n}.jpg", n) for n in range(1, 201)], theirs).pairs[0] == (0, 0)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (named("1.jpg", "sub/2.jpg"), named("1.jpg", "2.jpg")),
        (named("1.jpg", "2.jpg"), named("1.jpg", "2.png")),
        (named("all/p/1.jpg", "all/q/2.jpg"), named("p/1.jpg", "2.jpg")),
        ([("1", 1), ("2", 2)], [("a_1.jpg", 7), ("a_2.jpg", 8)]),
    ],
    ids=["folders", "extensions", "roots", "no common COCO id"],
)
def test_a_weaker_way_that_pairs_more_is_refused(
    ours: list[ImageId], theirs: list[ImageId]
) -> None:
    with pytest.raises(InputError, match="two ways that pair different images"):
        match(ours, theirs)


@dataclass(frozen=True)
class Layout:
    """How a file names its photos: below a folder, without folders or extensions, by numbers."""

    prefix: str = ""
    flat: bool = False
    stems: bool = False
    numbers: str = ""  # COCO ids: the file's "own", or "made" from names
    nameless: bool = False

    def ids(self, photos: list[str], own: dict[str, int]) -> list[ImageId]:
        return [self._image_id(photo, own) for photo in photos]

    def _image_id(self, photo: str, own: dict[str, int]) -> ImageId:
        number = {"own": own[photo], "made": coco_number(photo)}.get(self.numbers)
        name = self.prefix + (posixpath.basename(photo) if self.flat else photo)
        name = posixpath.splitext(name)[0] if self.stems else name
        return (str(number) if self.nameless else name, number)


PHOTOS = st.lists(
    st.tuples(
        st.sampled_from(["", "p/", "q/", "p/q/"]),
        st.sampled_from(["", "a", "b_", "img_7_"]),
        st.integers(1, 6),
        st.sampled_from([".jpg", ".png"]),
    ).map(lambda parts: "".join(map(str, parts))),
    min_size=2,
    max_size=12,
    unique_by=lambda name: posixpath.splitext(name)[0],
)
NAMED = st.builds(
    Layout,
    prefix=st.sampled_from(["", "images/", "data/images/"]),
    flat=st.booleans(),
    stems=st.booleans(),
    numbers=st.sampled_from(["", "own", "made"]),
)
NUMBERS = st.builds(Layout, numbers=st.sampled_from(["own", "made"]), nameless=st.just(True))


@settings(max_examples=300)
@given(data=st.data(), photos=PHOTOS, ours=NAMED | NUMBERS, theirs=NAMED)
def test_no_image_is_paired_with_another_without_an_error(
    data: st.DataObject, photos: list[str], ours: Layout, theirs: Layout
) -> None:
    """Try any names, any two ways to write them, and any choice of photos per file.

    The files have a photo in common, and a file without folders names each photo once: otherwise no
    program could tell that `1.jpg` and `p/1.jpg` are two photos.
    """
    own = dict(zip(photos, data.draw(st.permutations(range(1, 1 + len(photos)))), strict=True))
    some = st.permutations(photos).flatmap(
        lambda all_photos: st.integers(1, len(photos)).map(lambda count: all_photos[:count])
    )
    generated, annotated = data.draw(some), data.draw(some)
    assume(set(generated) & set(annotated))
    # Bare numbers are COCO ids of the references, or made from names.
    assume(not (ours.nameless and ours.numbers == "own") or theirs.numbers == "own")
    left, right = ours.ids(generated, own), theirs.ids(annotated, own)
    for layout, side in ((ours, left), (theirs, right)):
        assume(len({name for name, _ in layout.ids(photos, own)}) == len(photos))
        if layout.flat or not any("/" in name for name, _ in side):
            assume(len({stem(photo) for photo in photos}) == len(photos))
    try:
        found = match(left, right)
    except InputError:
        event("refused")
        return
    event(found.way.name)
    for one, other in found.pairs:
        assert generated[one] == annotated[other], (left[one], right[other], found.way.name)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("COCO_val2014_000000391895.jpg", 391895),
        ("sub/000000391895.png", 391895),
        ("1000268201_693b08cb0e.jpg", 1000268201),
        ("photo-12.jpg", 12),
    ],
)
def test_single_number_in_a_name_is_its_coco_number(name: str, number: int) -> None:
    assert coco_number(name) == number


@pytest.mark.parametrize("name", ["dog.jpg", "1_2.jpg", "a1.jpg", "9" * 16, "9" * 200, "", "１２"])
def test_other_names_have_a_hash_above_all_numbers(name: str) -> None:
    assert LEAST_HASH <= coco_number(name) < 2 * LEAST_HASH


@given(st.text())
def test_numbers_are_exact_in_javascript_too(name: str) -> None:
    assert 0 <= coco_number(name) < 2**53
    assert float(hashed_number(name)) == hashed_number(name)


def test_rows_of_a_parquet_file_have_distinct_numbers() -> None:
    assert coco_number("a/x.parquet:0000012") == 12
    names = [f"x-00000.v1.parquet:{row:07}" for row in range(3)]
    assert len({coco_number(name) for name in names}) == 3
