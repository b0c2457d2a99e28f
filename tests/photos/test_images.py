"""A photo file becomes pixels: formats, sizes, animations."""

import hashlib
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers.images import (
    ANIMATIONS,
    BLUE,
    QUADRANTS,
    RED,
    SAMPLES,
    WHITE,
    animation,
    assert_pixels,
    assert_rejected,
    encoded,
    texture,
)
from helpers.places import GOLDEN
from PIL import Image

from batchcap.photos import images
from batchcap.photos.images import LoadSettings, load_image
from batchcap.schema import ErrorType

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # as `images` does


def test_pixels_are_contiguous_uint8_and_the_file_is_described(tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(SAMPLES["PNG"])
    loaded = load_image(str(path), LoadSettings(32))
    assert loaded.pixels.shape == (32, 32, 3)
    assert loaded.pixels.dtype == np.uint8
    assert loaded.pixels.flags.c_contiguous
    assert (loaded.width, loaded.height) == (96, 64)
    assert loaded.file_size == len(SAMPLES["PNG"])
    assert loaded.mtime_ns == path.stat().st_mtime_ns
    assert loaded.sha256 == hashlib.sha256(SAMPLES["PNG"]).hexdigest()


def test_damaged_file_is_still_described(load):
    data = SAMPLES["PNG"][:50]
    loaded = load(data)
    assert_rejected(loaded, ErrorType.TRUNCATED)
    assert (loaded.file_size, loaded.sha256) == (50, hashlib.sha256(data).hexdigest())
    assert loaded.mtime_ns is not None
    assert loaded.width is None


def test_photo_of_the_right_size_is_not_resampled(load):
    assert_pixels(load(encoded(Image.fromarray(QUADRANTS), "PNG")), QUADRANTS)


def test_photo_is_squashed_without_keeping_the_aspect_ratio(load):
    wide = np.repeat(np.repeat(QUADRANTS, 4, axis=0), 40, axis=1)
    loaded = load(encoded(Image.fromarray(wide), "PNG"), size=4)
    assert (loaded.width, loaded.height) == (80, 8)
    np.testing.assert_array_equal(loaded.pixels[::3, ::3], QUADRANTS)


def test_downscaling_averages_instead_of_skipping_pixels(load):
    board = np.indices((64, 64)).sum(axis=0) % 2 * 255
    loaded = load(encoded(Image.fromarray(board.astype(np.uint8)), "PNG"), size=4)
    assert np.abs(loaded.pixels.astype(int) - 127).max() <= 2


def test_threads_get_the_same_pixels(tmp_path):
    path = tmp_path / "photo"
    path.write_bytes(SAMPLES["JPEG"])
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: load_image(path, LoadSettings(32)).pixels, range(32)))
    assert all((pixels == results[0]).all() for pixels in results)


@pytest.mark.parametrize("name", SAMPLES)
def test_content_rather_than_extension_decides_the_format(load, name):
    loaded = load(SAMPLES[name], size=16, name="photo.txt")
    reference = np.asarray(texture().resize((16, 16), Image.Resampling.BOX))
    assert (loaded.width, loaded.height) == (96, 64)
    tolerance = 90 if name == "1-bit BMP" else 25  # palettes and dithering lose colours
    assert np.abs(loaded.pixels.astype(int) - reference).mean() < tolerance


@pytest.mark.parametrize("format_name", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation_is_used(load, format_name):
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    options = {"save_all": True, "append_images": frames[1:]}
    if format_name == "WEBP":
        options["lossless"] = True
    assert_pixels(load(encoded(frames[0], format_name, **options)), np.full((2, 2, 3), RED))


CLEAR = Image.new("RGBA", (8, 8), (0, 0, 0, 0))


@pytest.mark.parametrize("format_name", ANIMATIONS)
def test_first_visible_frame_is_used(load, format_name):
    half = CLEAR.copy()
    half.paste((*RED, 255), (0, 0, 8, 4))
    blue = Image.new("RGBA", (8, 8), (*BLUE, 255))
    pixels = load(animation(format_name, CLEAR, half, blue), size=8).pixels[[0, 7]]
    assert np.abs(pixels.astype(int) - [[RED], [WHITE]]).max() <= 3


@pytest.mark.parametrize("format_name", ANIMATIONS)
def test_invisible_animation_is_white(load, format_name):
    assert_pixels(load(animation(format_name, CLEAR, CLEAR)), np.full((2, 2, 3), 255))
    assert_pixels(load(encoded(CLEAR, format_name)), np.full((2, 2, 3), 255))


def nearly_clear(number: int) -> Image.Image:
    """A clear frame that differs from the others, since encoders merge equal ones."""
    return Image.new("RGBA", (8, 8), (number, 0, 0, 0))


def test_search_for_a_visible_frame_is_limited(load, monkeypatch):
    frames = [nearly_clear(number) for number in range(5)]
    data = animation("AVIF", *frames, Image.new("RGBA", (8, 8), "red"))
    assert (load(data).pixels[..., 1] < 9).all()
    assert_pixels(load(data, max_pixels=64 * 4), np.full((2, 2, 3), 255))
    monkeypatch.setattr(images, "FRAMES_LOOKED_AT", 4)
    assert_pixels(load(data), np.full((2, 2, 3), 255))


def test_later_frame_above_the_limit_is_refused(load):
    frame = struct.pack("<HHHHB", 0, 0, 9_000, 9_000, 0) + b"\2\2L\1\0"
    first = b"!\xf9\4\1\0\0\0\0," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\2\2D\1\0"
    header = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6)
    assert_pixels(load(header + first + b";"), np.full((2, 2, 3), 255))
    large = load(header + first + b"," + frame + b";", max_pixels=1_000_000)
    assert_rejected(large, ErrorType.TOO_LARGE)


TURNED_HEIC = (GOLDEN / "turned.heic").read_bytes()


def test_heic_is_upright_whatever_its_exif_says(load):
    """EXIF must not rotate it again: decoders do so by the file's own rotation property."""
    pytest.importorskip("pi_heif")
    for data in (TURNED_HEIC, TURNED_HEIC.replace(b"MM\0*\0\0\0\x08", b"MM\0*\xff\xff\xff\x08")):
        loaded = load(data, size=16, name="a.hif")
        assert (loaded.width, loaded.height) == (96, 64)
        corners = loaded.pixels[::15, ::15].astype(int)
        assert np.abs(corners - QUADRANTS).max() < 3
    assert_rejected(load(data, max_pixels=96 * 64 - 1), ErrorType.TOO_LARGE)
    for cut in (100, 400, 700):
        assert_rejected(load(data[:cut], accept_truncated=True), ErrorType.TRUNCATED)


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"mif1", b"msf1"])
def test_heic_without_its_extra_is_refused_with_the_install_command(load, monkeypatch, brand):
    monkeypatch.delitem(images.OPENERS, "HEIC", raising=False)
    rejection = assert_rejected(load(b"\0\0\0\x10ftyp" + brand), ErrorType.UNSUPPORTED_FORMAT)
    assert "This is a HEIC file; " in rejection.message
    assert "pip install 'batchcap[heic]'" in rejection.message


def test_avif_is_recognised_by_any_of_its_brands(load):
    data = SAMPLES["AVIF"]
    assert data[8:12] == b"avif"
    assert b"avif" in data[16:40]
    same = load(data[:8] + b"mif1" + data[12:])
    np.testing.assert_array_equal(same.pixels, load(data).pixels)


UNSUPPORTED = {
    "camera raw": b"IIU\0\x18\0\0\0" + bytes(60),
    "JPEG XL": b"\xff\x0a" + bytes(60),
    "JPEG 2000": encoded(texture(), "JPEG2000"),
    "ICO": encoded(texture(), "ICO"),
    "PSD": b"8BPS\0\1" + bytes(60),
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "PDF": b"%PDF-1.7\n" + bytes(60),
    "HTML": b"<!DOCTYPE html><html>404</html>",
    "PNM": encoded(texture(), "PPM"),
    "TGA": encoded(texture(), "TGA") + bytes(8) + b"TRUEVISION-XFILE.\0",
    "video": b"\0\0\0\x18ftypisom" + bytes(60),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_format_is_named(load, name):
    rejection = assert_rejected(load(UNSUPPORTED[name]), ErrorType.UNSUPPORTED_FORMAT)
    assert f"This is a {name}" in rejection.message


@pytest.mark.parametrize("data", [b"\0", b"hello", bytes(1000), b"RIFF\4\0\0\0WAVE"])
def test_unknown_content_is_unsupported(load, data):
    assert_rejected(load(data), ErrorType.UNSUPPORTED_FORMAT)
