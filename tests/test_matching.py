import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchcap.matching import LEAST_HASH, coco_number, hashed_number, match


def named(*names: str) -> list[tuple[str, int | None]]:
    return [(name, None) for name in names]


@pytest.mark.parametrize(
    ("way", "ours", "theirs"),
    [
        ("image_id", "a/1.jpg", ("a/1.jpg", 9)),
        ("COCO id", "391895", ("COCO_val2014_000000391895.jpg", 391895)),
        ("COCO id", "7", ("b.jpg", 7)),
        ("file name", "photos/a.jpg", ("train/a.jpg", None)),
        ("file name", "photos/cafe\u0301.jpg", ("caf\u00e9.jpg", None)),
        ("file name without extension", "photos/a.jpg", ("a", None)),
        ("number in the name", "391895", ("COCO_val2014_000000391895.jpg", None)),
        ("number in the name", str(coco_number("dog.jpg")), ("x/dog.png", None)),
    ],
)
def test_ids_are_matched_in_each_way(way: str, ours: str, theirs: tuple[str, int | None]) -> None:
    found = match([ours], [theirs])
    assert (found.way, found.pairs) == (way, [(0, 0)])


def test_the_way_that_pairs_most_is_taken_for_all() -> None:
    found = match(["a.jpg", "x/b.jpg", "x/c.jpg"], named("c.jpg", "b.jpg", "a.jpg"))
    assert found.way == "file name"
    assert found.pairs == [(0, 2), (1, 1), (2, 0)]


def test_what_two_images_share_pairs_nothing() -> None:
    assert match(["x/a.jpg", "y/a.jpg", "b.jpg"], named("a.jpg", "b.jpg")).pairs == [(2, 1)]


def test_nothing_in_common_is_no_pair() -> None:
    assert match(["a.jpg"], named("b.jpg")).pairs == []


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("COCO_val2014_000000391895.jpg", 391895),
        ("sub/000000391895.png", 391895),
        ("1000268201_693b08cb0e.jpg", 1000268201),
        ("photo-12.jpg", 12),
    ],
)
def test_the_one_number_of_a_name_is_its_number(name: str, number: int) -> None:
    assert coco_number(name) == number


@pytest.mark.parametrize("name", ["dog.jpg", "1_2.jpg", "a1.jpg", "9" * 16, "9" * 200, "", "１２"])
def test_other_names_have_a_hash_above_all_numbers(name: str) -> None:
    assert LEAST_HASH <= coco_number(name) < 2 * LEAST_HASH


@given(st.text())
def test_numbers_are_whole_in_javascript_too(name: str) -> None:
    assert 0 <= coco_number(name) < 2**53
    assert float(hashed_number(name)) == hashed_number(name)


def test_rows_of_a_parquet_file_have_numbers_of_their_own() -> None:
    assert coco_number("a/x.parquet:0000012") == 12
    names = [f"x-00000.v1.parquet:{row:07}" for row in range(3)]
    assert len({coco_number(name) for name in names}) == 3
