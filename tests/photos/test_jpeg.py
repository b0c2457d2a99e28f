"""JPEGs without an end mark: their pixels decide whether they are whole."""

import io
import re

import numpy as np
import pytest
from helpers.hostile_files import encoded, photo
from helpers.photos_at_hand import error_of, load, pixels_of
from PIL import Image, JpegImagePlugin

from batchcap.photos import jpeg

PHOTO = photo(3, 203, 151)
FLAT = Image.new("RGB", (200, 100), (200, 30, 40))  # its coded pixels repeat every few bytes
KINDS = {
    "baseline": encoded(PHOTO, "JPEG"),
    "optimised": encoded(PHOTO, "JPEG", optimize=True, quality=95),
    "progressive": encoded(PHOTO, "JPEG", progressive=True),
    "with restarts": encoded(PHOTO, "JPEG", restart_marker_blocks=4),
    "grey": encoded(PHOTO.convert("L"), "JPEG"),
    "flat": encoded(FLAT, "JPEG"),
    "flat progressive": encoded(FLAT, "JPEG", progressive=True),
}
# A film that contains all bytes, and so invalid markers and end marks.
FILM = b"\0\0\0\x18ftypmp42" + np.random.default_rng(1).bytes(70_000)
SAMSUNG = b"\0\0\1\n\x0e\0\0\0Image_UTC_Data1450000000000SEFHk\0\0\0\1\0\0\0\0\0\1\n#\0\0\0SEFT"
TRAILERS = {
    "nothing": b"",
    "half a mark": b"\xff",
    "reserved zeros": bytes(5000),
    "Samsung's trailer": SAMSUNG,
    "a motion photo's film": FILM,
    "the next picture of an MPO": encoded(photo(5), "JPEG"),
}


def decoded_whole(data: bytes) -> np.ndarray:
    image = JpegImagePlugin.JpegImageFile(io.BytesIO(jpeg.ended(data)))
    return np.asarray(image)


@pytest.mark.parametrize("trailer", TRAILERS)
@pytest.mark.parametrize("kind", KINDS)
def test_jpeg_that_lacks_only_its_end_mark_is_whole(kind, trailer):
    data = KINDS[kind]
    assert data.endswith(jpeg.END)
    np.testing.assert_array_equal(pixels_of(data[:-2] + TRAILERS[trailer]), pixels_of(data))


@pytest.mark.parametrize("kind", KINDS)
def test_jpeg_that_lacks_pixels_is_truncated_wherever_it_is_cut(kind):
    data = KINDS[kind]
    whole = decoded_whole(data)
    cuts = {*range(len(data) - 50, len(data) - 2), *range(data.index(jpeg.SCAN), len(data), 331)}
    for cut in sorted(cuts):
        error = error_of(data[:cut])
        assert error == "truncated" or (error == "ok" and cut > len(data) - 30), cut
        if error == "ok":
            np.testing.assert_array_equal(decoded_whole(data[:cut]), whole)


@pytest.mark.parametrize(
    ("kind", "mark"), [("progressive", b"\xff\xda"), ("with restarts", b"\xff[\xd0-\xd7]")]
)
def test_jpeg_cut_before_a_scan_or_restart_is_truncated(kind, mark):
    data = KINDS[kind]
    places = [match.start() for match in re.finditer(mark, data, re.DOTALL)][1:]
    assert len(places) > 5
    for place in places[-12:]:
        for trailer in (b"", bytes(300), SAMSUNG):
            assert error_of(data[:place] + trailer) == "truncated"


@pytest.mark.parametrize("kind", KINDS)
def test_cut_jpeg_with_a_trailer_is_accepted_on_request(kind):
    data = KINDS[kind]
    scan = data.index(jpeg.SCAN)
    cut = data[: scan + (len(data) - scan) // 2] + SAMSUNG
    assert error_of(cut) == "truncated"
    image = load(cut, accept_truncated=True)
    assert image.note is not None
    if "progressive" not in kind:
        difference = np.abs(image.pixels[:8].astype(int) - pixels_of(data)[:8])
        assert difference.mean() < 3


def test_jpeg_without_end_mark_is_not_decoded_above_the_limit():
    assert error_of(KINDS["baseline"][:-2], max_pixels=100) == "too_large"


def test_mpo_yields_its_first_picture():
    mpo = encoded(PHOTO, "MPO", save_all=True, append_images=[FLAT])
    np.testing.assert_array_equal(pixels_of(mpo, name="a.mpo"), pixels_of(KINDS["baseline"]))
