import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchcap.training.augmentation import (
    LEAST_AREA,
    PLAIN,
    View,
    augmented,
    crop_box,
    seen,
    training_views,
)

DIGESTS = st.binary(min_size=32, max_size=32).map(bytes.hex)
GRADIENT = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None], (64, 64, 3))


def test_views_are_the_whole_photo_its_mirror_image_and_crops_of_either() -> None:
    assert training_views(flip=False, crops=0) == (PLAIN,)
    assert training_views(flip=True, crops=0) == (PLAIN, View(mirrored=True))
    assert training_views(flip=True, crops=2)[2:] == (View(True, 1), View(False, 2))
    assert not any(view.mirrored for view in training_views(flip=False, crops=3))


def test_each_view_of_a_photo_has_a_key_of_its_own() -> None:
    views = training_views(flip=True, crops=4)
    assert len({view.key("ab") for view in views}) == len(views)
    assert PLAIN.key("ab") == "ab"


@given(DIGESTS, st.integers(1, 9))
def test_crop_is_large_and_inside_the_photo(sha256: str, crop: int) -> None:
    top, left, bottom, right = crop_box(sha256, crop)
    assert 0 <= top < bottom <= 1 + 1e-9
    assert 0 <= left < right <= 1 + 1e-9
    assert (bottom - top) * (right - left) > LEAST_AREA * 0.85
    assert crop_box(sha256, crop) == [top, left, bottom, right]


def test_crops_differ_between_photos_and_crop_numbers() -> None:
    assert crop_box("00", 1) != crop_box("01", 1)
    assert crop_box("00", 1) != crop_box("00", 2)


@pytest.mark.parametrize("mirrored", [False, True])
def test_crop_shows_its_box(mirrored: bool) -> None:
    """A pixel's brightness is its column."""
    pixels = np.stack([GRADIENT, GRADIENT])
    crops = np.asarray(seen(pixels, View(mirrored, 1), ["07", "08"])).astype(int)
    for photo, sha256 in zip(crops, ("07", "08"), strict=True):
        _, left, _, right = crop_box(sha256, 1)
        ends = photo[0, [0, -1], 0]
        assert ends[:: -1 if mirrored else 1] == pytest.approx([63 * left, 63 * right], abs=1)


def test_photos_that_only_pad_the_batch_stay_whole() -> None:
    crops = np.asarray(seen(np.stack([GRADIENT, GRADIENT]), View(False, 1), ["07"]))
    assert crops.shape == (2, 64, 64, 3)
    assert (crops[1] == GRADIENT).all()


def test_augmented_photos_keep_their_hue_and_their_range() -> None:
    red = np.full((50, 8, 8, 3), (200, 60, 20), np.uint8)
    shown = augmented(red, np.zeros(50, np.bool_), np.random.default_rng(0)).astype(int)
    assert (shown[..., 0] > shown[..., 1]).all()
    assert (shown[..., 1] > shown[..., 2]).all()
    assert len(np.unique(shown[:, 0, 0, 0])) > 20


def test_augmented_photos_are_mirrored_where_requested() -> None:
    shown = augmented(
        np.stack([GRADIENT] * 4), np.array([False, True] * 2), np.random.default_rng(0)
    ).astype(int)
    falls = shown[:, 0, 0, 0] > shown[:, 0, -1, 0]
    assert falls.tolist() == [False, True] * 2
