"""Cut, flipped and hostile files are rejected, or accepted up to the damage."""

import pickle
import struct
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from helpers.images import (
    GREEN,
    QUADRANTS,
    RED,
    SAMPLES,
    after,
    assert_pixels,
    assert_rejected,
    bgr0,
    bmp,
    chunk,
    encoded,
    png,
    texture,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from batchcap.photos import formats
from batchcap.photos.images import LoadSettings, load_image
from batchcap.schema import ErrorType, LoadedImage, Rejection

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # as `images` does


@pytest.mark.parametrize("name", SAMPLES)
def test_cut_file_is_truncated_or_whole_in_its_first_frame(load, name):
    data = SAMPLES[name]
    whole = load(data, size=32).pixels
    cuts = {len(data) * percent // 100 for percent in range(2, 100)}
    for cut in cuts | {len(data) - 1, len(data) - 2, len(data) - 12}:
        loaded = load(data[: max(cut, 16)], size=32)
        if isinstance(loaded.pixels, Rejection):
            assert_rejected(loaded, ErrorType.TRUNCATED)
        else:
            np.testing.assert_array_equal(loaded.pixels, whole)


@pytest.mark.parametrize("fill", [b"\xff", b"\xff\xff\xff", b"\xff\0"])
def test_fill_and_escaped_bytes_before_a_jpeg_marker_are_skipped(load, fill):
    data = SAMPLES["JPEG"]
    tables = data.index(b"\xff\xdb")
    filled = load(data[:tables] + fill + data[tables:]).pixels
    np.testing.assert_array_equal(filled, load(data).pixels)


@pytest.mark.parametrize("name", ["JPEG", "progressive JPEG", "PNG", "GIF"])
@pytest.mark.parametrize("percent", [30, 60, 95])
def test_preallocated_download_is_refused(load, name, percent):
    """Its tail is zeros, which Pillow decodes to grey in a JPEG and black in a PNG."""
    data = SAMPLES[name]
    kept = data[: len(data) * percent // 100]
    assert isinstance(load(kept + bytes(len(data) - len(kept))).pixels, Rejection)


def test_flipped_bit_in_png_pixels_is_corrupt(load):
    rows = bytes(1 + 3 * 40) * 40
    stored = zlib.compress(rows, 0)
    whole = png(40, 40, 8, 2, b"").replace(chunk(b"IDAT", zlib.compress(b"")), b"")
    damaged = bytearray(chunk(b"IDAT", stored))
    damaged[900] ^= 4
    assert_rejected(load(whole[:33] + damaged + whole[33:]), ErrorType.CORRUPT)


@pytest.mark.parametrize("kind", [b"tEXt", b"iTXt", b"zTXt", b"sPLT", b"pCAL"])
def test_huge_png_chunk_is_refused_without_being_allocated(load, kind):
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    loaded = load(head + struct.pack(">I", 0x7FFFFFFF) + kind + bytes(16))
    assert_rejected(loaded, ErrorType.TRUNCATED)


@pytest.mark.parametrize("rows", [0, 1, 62, 63])
def test_png_whose_pixels_end_before_its_last_row_is_truncated(load, rows):
    """All its checksums are right, and Pillow leaves the rest black."""
    data = png(4, 64, 8, 2, (b"\0" + b"\x80" * 12) * rows)
    assert_rejected(load(data), ErrorType.TRUNCATED)
    accepted = load(data, size=64, accept_truncated=True)
    assert accepted.note is not None
    assert accepted.pixels.any(axis=(1, 2)).sum() == rows


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
@pytest.mark.parametrize("size", [(1, 1), (3, 7), (9, 8), (64, 5)])
def test_black_png_is_whole(load, mode, size):
    assert isinstance(load(encoded(Image.new(mode, size), "PNG")).pixels, np.ndarray)


@pytest.mark.parametrize(
    ("size", "passes"),
    [
        ((1, 1), (2,)),
        ((3, 2), (2, 2, 2, 4)),
        ((8, 8), (2, 2, 3, 2 * 3, 2 * 5, 4 * 5, 4 * 9)),
        ((8, 9), (2 * 2, 2 * 2, 3, 3 * 3, 2 * 5, 5 * 5, 4 * 9)),
    ],
)
def test_interlaced_black_png_is_whole(load, size, passes):
    """`passes` are the lengths of the passes: a filter byte and pixels per row."""
    for lacking in (0, 1):
        data = png(*size, 8, 0, bytes(sum(passes) - lacking))
        interlaced = bytearray(data[16:29])
        interlaced[12] = 1
        data = data[:8] + chunk(b"IHDR", bytes(interlaced)) + data[33:]
        assert isinstance(load(data).pixels, Rejection) == bool(lacking)


def test_truncated_rle_bmp(load):
    data = bmp(2, 2, 8, b"\2\1\0\0", palette=bgr0(RED, GREEN), compression=1)
    assert_rejected(load(data), ErrorType.TRUNCATED)


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(SAMPLES)),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1),
)
def test_flipped_bytes_never_raise(tmp_path_factory, name, flips):
    data = bytearray(SAMPLES[name])
    for place, mask in flips:
        data[int(place * len(data))] ^= mask
    path = tmp_path_factory.getbasetemp() / "flipped"
    path.write_bytes(data)
    assert_well_formed(load_image(path, LoadSettings(8)))


@settings(max_examples=150, deadline=None)
@given(signature=st.sampled_from(formats.SIGNATURES), garbage=st.binary(max_size=300))
def test_garbage_after_a_signature_never_raises(tmp_path_factory, signature, garbage):
    offset, magic, _ = signature
    path = tmp_path_factory.getbasetemp() / "garbage"
    path.write_bytes(bytes(offset) + magic + garbage)
    assert_well_formed(load_image(path, LoadSettings(8)))


def assert_well_formed(loaded: LoadedImage) -> None:
    if isinstance(loaded.pixels, Rejection):
        assert_rejected(loaded, loaded.pixels.error_type)
    else:
        assert loaded.pixels.shape == (8, 8, 3)


def gif_header(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HH", width, height) + b"\0\0\0,"


BOMBS = {
    "PNG of 20000 x 20000": png(20_000, 20_000, 8, 2, bytes(1000)),
    "PNG just over the limit": png(10_001, 10_000, 8, 0, bytes(1000)),
    "PNG with the largest header": png(2**31 - 1, 2**31 - 1, 8, 0, bytes(1000)),
    "BMP of 30000 x 30000": bmp(30_000, 30_000, 24, bytes(1000)),
    "top-down BMP of 30000 x 30000": bmp(30_000, -30_000, 24, bytes(1000)),
    "GIF of 65535 x 65535": gif_header(65_535, 65_535)
    + struct.pack("<HHHHB", 0, 0, 1, 1, 0)
    + b"\2\2L\1\0;",
    "GIF whose frame is to be cleared": gif_header(1, 1)[:-1]
    + b"!\xf9\4\x08\0\0\0\0,"
    + struct.pack("<HHHHB", 0, 0, 13_000, 13_000, 0)
    + b"\2\2L\1\0;",
    "WebP of 13001 x 13001": b"RIFF\x16\0\0\0WEBPVP8X\n\0\0\0\0\0\0\0" + b"\xc8\x32\0" * 2,
    "lossless WebP of 16384 x 16384": b"RIFF\x16\0\0\0WEBPVP8L\n\0\0\0/\xff\xff\xff\x0f" + bytes(5),
    "lossy WebP of 16383 x 16383": b"RIFF\x16\0\0\0WEBPVP8 \n\0\0\0\x10\2\0\x9d\1*\xff\x3f\xff\x3f",
    "GIF with a frame larger than its canvas": gif_header(1, 1)
    + struct.pack("<HHHHB", 0, 0, 65_535, 65_535, 0)
    + b"\2\2L\1\0;",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bomb_is_refused_by_its_header(load, name):
    assert_rejected(load(BOMBS[name]), ErrorType.TOO_LARGE)


@pytest.mark.parametrize("name", SAMPLES)
def test_pixel_limit_is_a_setting(load, name):
    loaded = load(SAMPLES[name], max_pixels=96 * 64 - 1)
    rejection = assert_rejected(loaded, ErrorType.TOO_LARGE)
    assert "96 x 64 pixels, more than the limit of 6,143" in rejection.message
    assert isinstance(load(SAMPLES[name], max_pixels=96 * 64).pixels, np.ndarray)


def test_load_function_can_be_pickled(tmp_path):
    load = partial(load_image, settings=LoadSettings(2, accept_truncated=True))
    (tmp_path / "a.png").write_bytes(encoded(Image.fromarray(QUADRANTS), "PNG"))
    assert_pixels(pickle.loads(pickle.dumps(load))(tmp_path / "a.png"), QUADRANTS)


GIF_TABLES = SAMPLES["GIF"][: 13 + 768]


PNG_START = SAMPLES["PNG"][:33]


FLOODS = {
    "fill bytes of a JPEG": after(b"\xff\xd8", SAMPLES["JPEG"], b"\xff" * 700_000),
    "empty segments of a JPEG": after(b"\xff\xd8", SAMPLES["JPEG"], b"\xff\xe1\0\2" * 300_000),
    "escaped bytes of a JPEG": after(b"\xff\xd8", SAMPLES["JPEG"], b"\xff\0" * 700_000),
    "empty chunks of a PNG": after(PNG_START, SAMPLES["PNG"], chunk(b"abCd", b"") * 210_000),
    "empty pixel chunks of a PNG": after(PNG_START, SAMPLES["PNG"], chunk(b"IDAT", b"") * 210_000),
    "comments of a GIF": after(GIF_TABLES, SAMPLES["GIF"], b"!\xfe\1a\0" * 300_000),
    "a comment of a GIF": after(GIF_TABLES, SAMPLES["GIF"], b"!\xfe" + b"\1a" * 700_000 + b"\0"),
}


@pytest.mark.parametrize("name", FLOODS)
def test_flood_of_parts_is_refused_before_it_takes_time_and_memory(load, name):
    """Pillow walks and keeps all parts: 1 GB of them takes minutes and 45 GB of memory."""
    tracemalloc.start()
    loaded = load(FLOODS[name])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert_rejected(loaded, ErrorType.TOO_LARGE)
    assert peak < 50_000_000


def test_thousands_of_parts_are_accepted(load):
    data = after(PNG_START, SAMPLES["PNG"], chunk(b"tEXt", b"a\0b") * 2000)
    np.testing.assert_array_equal(load(data).pixels, load(SAMPLES["PNG"]).pixels)


LARGE = texture(224, 224)


WHOLE = {
    "JPEG": encoded(LARGE, "JPEG", quality=95),
    "progressive JPEG": encoded(LARGE, "JPEG", quality=95, progressive=True),
    "PNG": encoded(LARGE, "PNG"),
    "palette PNG": encoded(LARGE.convert("P"), "PNG"),
    "BMP": encoded(LARGE, "BMP"),
    "GIF": encoded(LARGE.convert("P"), "GIF"),
    "WebP": encoded(LARGE, "WEBP", quality=95),
    "lossless WebP": encoded(LARGE, "WEBP", lossless=True),
}


@pytest.mark.parametrize("percent", [60, 80, 95])
@pytest.mark.parametrize("name", WHOLE)
def test_beginning_of_a_cut_file_is_accepted_on_request(load, name, percent):
    data = WHOLE[name][: len(WHOLE[name]) * percent // 100]
    assert_rejected(load(data, size=224), ErrorType.TRUNCATED)
    loaded = load(data, size=224, accept_truncated=True)
    assert isinstance(loaded.pixels, np.ndarray)
    assert loaded.note is not None
    assert loaded.note.error_type is ErrorType.TRUNCATED
    assert (loaded.width, loaded.height, loaded.file_size) == (224, 224, len(data))
    whole = load(WHOLE[name], size=224)
    assert whole.note is None
    wrong = np.abs(loaded.pixels.astype(int) - whole.pixels).mean(axis=(1, 2))
    assert np.mean(wrong < 6) > percent / 100 - 0.3


@pytest.mark.parametrize("name", SAMPLES)
def test_every_cut_gives_pixels_and_a_note_or_a_rejection(load, name):
    data = SAMPLES[name]
    whole = load(data, size=32).pixels
    for cut in range(16, len(data), len(data) // 60):
        loaded = load(data[:cut], size=32, accept_truncated=True)
        if isinstance(loaded.pixels, Rejection):
            assert_rejected(loaded, ErrorType.TRUNCATED)
            assert loaded.note is None
        elif loaded.note is None:
            np.testing.assert_array_equal(loaded.pixels, whole)


NO_PIXELS = {
    "JPEG": SAMPLES["JPEG"][: SAMPLES["JPEG"].index(b"\xff\xda")],
    "PNG": SAMPLES["PNG"][: SAMPLES["PNG"].index(b"IDAT") + 4],
    "BMP": SAMPLES["BMP"][:54],
    "GIF": SAMPLES["GIF"][: 13 + 768],
    "WebP": SAMPLES["WebP"][:20],
    "TIFF": SAMPLES["TIFF"][:140],
    "packed TIFF": SAMPLES["packed TIFF"][:2000],
    "AVIF": SAMPLES["AVIF"][:500],
}


@pytest.mark.parametrize("name", NO_PIXELS)
def test_file_that_ends_before_its_first_pixel_is_always_refused(load, name):
    assert_rejected(load(NO_PIXELS[name], accept_truncated=True), ErrorType.TRUNCATED)


def test_accepting_cut_files_accepts_no_damage(load):
    data = bytearray(SAMPLES["PNG"])
    data[200] ^= 1
    assert_rejected(load(bytes(data), accept_truncated=True), ErrorType.CORRUPT)


def test_claimed_length_of_a_cut_webp_is_not_allocated(load):
    data = SAMPLES["lossless WebP"]
    claims = data[:4] + b"\xf0\xff\xff\xff" + data[8:16] + b"\xe0\xff\xff\xff" + data[20:4000]
    tracemalloc.start()
    load(claims, accept_truncated=True)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_accepting_cut_files_affects_no_other_thread(tmp_path):
    """Pillow's own switch, `LOAD_TRUNCATED_IMAGES`, would."""
    path = tmp_path / "a.png"
    path.write_bytes(WHOLE["PNG"][:-5000])
    with ThreadPoolExecutor(4) as pool:
        accepts = [number % 2 == 0 for number in range(60)]
        loaded = pool.map(lambda a: load_image(path, LoadSettings(8, accept_truncated=a)), accepts)
        assert [isinstance(image.pixels, np.ndarray) for image in loaded] == accepts
