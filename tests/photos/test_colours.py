"""Orientation, bit depths, transparency, palettes and scaled decoding."""

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers.images import (
    BLACK,
    BLUE,
    GREEN,
    QUADRANTS,
    RED,
    SAMPLES,
    WHITE,
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
from PIL import ExifTags, Image

from batchcap.photos.images import LoadSettings, encode_webp, load_image, load_thumbnail
from batchcap.schema import ErrorType, Rejection

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # as `images` does


def test_photo_above_pillows_own_warning_level_is_decoded_silently(tmp_path):
    """Pillow warns above 89 million pixels, but only our own limit counts."""
    path = tmp_path / "wide.png"
    path.write_bytes(encoded(Image.new("1", (9_500, 9_500)), "PNG"))
    assert run_quietly(path) == "(9500, 9500)"


def test_damaged_exif_is_ignored_silently(tmp_path):
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0\x0f\x01\x02\0\xff\0\0\0\xff\xff\0\0\x12\x01\x03"
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded(texture(), "JPEG", exif=exif))
    assert run_quietly(path) == "(96, 64)"


def run_quietly(path: Path) -> str:
    """Return the size that a fresh process, where pytest resets no warnings, prints of a photo."""
    code = (
        "import sys; from batchcap.photos.images import LoadSettings, load_image;"
        "loaded = load_image(sys.argv[1], LoadSettings(8)); print((loaded.width, loaded.height))"
    )
    command = [sys.executable, "-W", "always", "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.strip()


# How the stored quadrants (RG above BW) must look, by the EXIF standard.
TURNED = {
    1: ("RG", "BW"),
    2: ("GR", "WB"),
    3: ("WB", "GR"),
    4: ("BW", "RG"),
    5: ("RB", "GW"),
    6: ("BR", "WG"),
    7: ("WG", "BR"),
    8: ("GW", "RB"),
}


LETTERS = {"R": RED, "G": GREEN, "B": BLUE, "W": WHITE}


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_exif_orientation_is_applied(load, orientation, format_name):
    blocks = Image.fromarray(np.repeat(np.repeat(QUADRANTS, 64, axis=0), 96, axis=1))
    exif = Image.Exif()
    exif[0x0112] = orientation
    loaded = load(encoded(blocks, format_name, exif=exif, quality=95), size=16)
    expected = [[LETTERS[letter] for letter in row] for row in TURNED[orientation]]
    corners = loaded.pixels[np.ix_([1, 14], [1, 14])].astype(int)
    assert np.abs(corners - expected).max() <= 12
    upright = (192, 128) if orientation <= 4 else (128, 192)
    assert (loaded.width, loaded.height) == upright


@pytest.mark.parametrize("orientation", [0, 9, 65_535])
def test_unknown_orientation_is_ignored(load, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert_pixels(load(encoded(Image.fromarray(QUADRANTS), "PNG", exif=exif)), QUADRANTS)


@settings(max_examples=60, deadline=None)
@given(garbage=st.binary(max_size=80))
def test_garbage_in_exif_fails_no_photo(tmp_path_factory, garbage):
    path = tmp_path_factory.getbasetemp() / "exif.jpg"
    path.write_bytes(encoded(texture(16, 16), "JPEG", exif=b"Exif\0\0II*\0" + garbage))
    assert isinstance(load_image(path, LoadSettings(8)).pixels, np.ndarray)


def pair(load, data: bytes) -> list[list[int]]:
    """The two pixels of a 2 x 2 photo whose rows are equal."""
    pixels = load(data).pixels
    assert isinstance(pixels, np.ndarray), pixels
    np.testing.assert_array_equal(pixels[0], pixels[1])
    return pixels[0].tolist()


def deep_row(*values: int) -> bytes:
    return (b"\0" + struct.pack(f">{len(values)}H", *values)) * 2


DEEP = {
    "grey": (png(2, 2, 16, 0, deep_row(0x80FF, 0x0300)), [[0x80] * 3, [3] * 3]),
    "grey, alpha": (png(2, 2, 16, 4, deep_row(0x4000, 0xFFFF, 0, 0)), [[0x40] * 3, [255] * 3]),
    "RGB": (
        png(2, 2, 16, 2, deep_row(0xFFFF, 0x8000, 0x00FF, 0, 0x0100, 0x1000)),
        [[255, 128, 0], [0, 1, 16]],
    ),
    "RGB, alpha": (
        png(2, 2, 16, 6, deep_row(0x2000, 0x4000, 0x6000, 0xFFFF, 0, 0, 0, 0)),
        [[0x20, 0x40, 0x60], [255, 255, 255]],
    ),
}


@pytest.mark.parametrize("name", DEEP)
def test_16_bit_png_is_scaled_and_not_clipped(load, name):
    data, expected = DEEP[name]
    assert pair(load, data) == expected


KEYED = {
    "1-bit": png(2, 2, 1, 0, b"\0\x40" * 2, chunk(b"tRNS", b"\0\0")),
    "2-bit": png(2, 2, 2, 0, b"\0\x40" * 2, chunk(b"tRNS", b"\0\1")),
    "4-bit": png(2, 2, 4, 0, b"\0\x5a" * 2, chunk(b"tRNS", b"\0\5")),
    "8-bit": png(2, 2, 8, 0, b"\0\x11\x77" * 2, chunk(b"tRNS", b"\0\x11")),
    "16-bit": png(2, 2, 16, 0, deep_row(0x1234, 0x1235), chunk(b"tRNS", b"\x12\x34")),
    "RGB": png(2, 2, 8, 2, b"\0\1\2\3\4\5\6" * 2, chunk(b"tRNS", b"\0\1\0\2\0\3")),
    "16-bit RGB": png(
        2, 2, 16, 2, deep_row(0x101, 0x202, 0x303, 0, 0, 0), chunk(b"tRNS", b"\1\1\2\2\3\3")
    ),
}


KEPT = {"1-bit": 255, "2-bit": 0, "4-bit": 170, "8-bit": 0x77, "16-bit": 0x12, "16-bit RGB": 0}


@pytest.mark.parametrize("name", KEYED)
def test_transparent_colour_of_a_png_becomes_white(load, name):
    kept = [4, 5, 6] if name == "RGB" else [KEPT[name]] * 3
    assert pair(load, KEYED[name]) == [[255, 255, 255], kept]


@pytest.mark.parametrize("interlaced", [False, True])
def test_16_bit_colours_that_differ_in_low_bits_are_not_transparent(load, interlaced):
    """With the high bytes alone, similar colours would turn white."""
    key, near = (0x101, 0x202, 0x303), (0x101, 0x202, 0x304)
    colour = struct.pack(">3H", *key)
    data = png(2, 2, 16, 2, deep_row(*key, *near), chunk(b"tRNS", colour))
    if interlaced:  # Adam7: the first pixel, the one beside it, the second row
        top = [b"\0" + struct.pack(">3H", *pixel) for pixel in (key, near)]
        rows = b"".join(top) + b"\0" + struct.pack(">6H", *key, *near)
        data = png(2, 2, 16, 2, rows, chunk(b"tRNS", colour))
        header = data[12:28] + b"\1"
        data = data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    assert pair(load, data) == [[255, 255, 255], [1, 2, 3]]


def test_cut_16_bit_png_with_a_transparent_colour_is_accepted_on_request(load):
    noise = np.random.default_rng(0).integers(0, 2**16, (64, 64, 3), dtype=np.uint16)
    noise[0, 0] = (0x101, 0x202, 0x303)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in noise)
    data = png(64, 64, 16, 2, rows, chunk(b"tRNS", b"\1\1\2\2\3\3"))
    loaded = load(data[: len(data) // 2], size=64, accept_truncated=True)
    assert loaded.note is not None
    assert loaded.pixels[0, 0].tolist() == [255, 255, 255]
    assert loaded.pixels[0, 1].tolist() == (noise[0, 1] >> 8).tolist()


def gif_on_a_canvas(frame: Image.Image, side: int, **options: int) -> bytes:
    """A GIF whose only frame is at (2, 2) of a larger canvas."""
    data = encoded(frame, "GIF", **options)
    place = data.index(b"," + struct.pack("<HHHH", 0, 0, *frame.size))
    canvas, frame_at = struct.pack("<HH", side, side), struct.pack("<HH", 2, 2)
    return data[:6] + canvas + data[10 : place + 1] + frame_at + data[place + 5 :]


@pytest.mark.parametrize("options", [{}, {"transparency": 2}])
def test_canvas_around_a_smaller_gif_frame_is_white(load, options):
    """Pillow leaves the palette's first colour there, which is red here."""
    frame = Image.new("P", (4, 4), 1)
    frame.putpalette(RED + BLUE + GREEN)
    expected = np.full((8, 8, 3), 255)
    expected[2:6, 2:6] = BLUE
    assert_pixels(load(gif_on_a_canvas(frame, 8, **options), size=8), expected)


@pytest.mark.parametrize("flags", [0x02, 0x12], ids=["opaque", "alpha"])
def test_canvas_around_a_smaller_webp_frame_is_white(load, flags):
    def part(name: bytes, body: bytes) -> bytes:
        return name + struct.pack("<I", len(body)) + body

    def numbers(*values: int) -> bytes:
        return b"".join(struct.pack("<I", value)[:3] for value in values)

    frame = encoded(Image.new("RGB", (4, 4), BLUE), "WEBP", lossless=True)[12:]
    animation = part(b"ANMF", numbers(1, 1, 3, 3, 100) + b"\0" + frame)
    header = part(b"VP8X", bytes([flags, 0, 0, 0]) + numbers(7, 7))
    body = b"WEBP" + header + part(b"ANIM", b"\0\xff\0\xff\0\0") + 2 * animation
    expected = np.full((8, 8, 3), 255)
    expected[2:6, 2:6] = BLUE
    assert_pixels(load(part(b"RIFF", body), size=8), expected)


def test_alpha_is_composited_on_white(load):
    rows = b"\0" + bytes((255, 0, 0, 128)) + bytes((0, 0, 0, 0))
    assert pair(load, png(2, 2, 8, 6, rows * 2)) == [[255, 127, 127], [255, 255, 255]]


def test_grey_with_alpha_is_composited_on_white(load):
    assert pair(load, png(2, 2, 8, 4, b"\0\0\x80\x32\xff" * 2)) == [[127] * 3, [50] * 3]


@pytest.mark.parametrize(("alphas", "red"), [(b"\0\xff", WHITE), (b"\x80\xff", (255, 127, 127))])
def test_palette_with_transparency_is_composited_on_white(load, alphas, red):
    extra = (chunk(b"PLTE", bytes(RED + BLUE)), chunk(b"tRNS", alphas))
    assert pair(load, png(2, 2, 8, 3, b"\0\0\1" * 2, *extra)) == [list(red), list(BLUE)]


def test_transparent_gif_is_composited_on_white(load):
    image = Image.new("P", (2, 2), 1)
    image.putpalette(RED + BLUE)
    image.putpixel((0, 0), 0)
    assert_pixels(load(encoded(image, "GIF", transparency=0)), [[WHITE, BLUE], [BLUE, BLUE]])


def test_transparent_webp_is_composited_on_white(load):
    image = Image.new("RGBA", (2, 2), (*BLUE, 0))
    image.putpixel((0, 0), (*RED, 255))
    assert_pixels(load(encoded(image, "WEBP", lossless=True)), [[RED, WHITE], [WHITE, WHITE]])


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_palette_png_of_any_depth(load, depth):
    row = bytes([0b01 << (8 - 2 * depth)]) if depth < 8 else b"\0\1"
    palette = chunk(b"PLTE", bytes(RED + BLUE))
    assert pair(load, png(2, 2, depth, 3, (b"\0" + row) * 2, palette)) == [list(RED), list(BLUE)]


@pytest.mark.parametrize(("bits", "row"), [(1, b"\x40"), (4, b"\x01"), (8, b"\0\1")])
def test_palette_bmp_keeps_its_colours(load, bits, row):
    data = bmp(2, 2, bits, row.ljust(4, b"\0") * 2, palette=bgr0(RED, GREEN))
    assert pair(load, data) == [list(RED), list(GREEN)]


RLE = {"RLE8": (8, 1, b"\1\0\1\1\0\0\1\1\1\0\0\1"), "RLE4": (4, 2, b"\2\x01\0\0\2\x10\0\1")}


@pytest.mark.parametrize("name", RLE)
def test_run_length_encoded_bmp(load, name):
    bits, compression, body = RLE[name]
    data = bmp(2, 2, bits, body, palette=bgr0(RED, GREEN), compression=compression)
    assert_pixels(load(data), [[GREEN, RED], [RED, GREEN]])  # the bottom row comes first


def test_bmp_upside_down_and_top_down(load):
    first = bytes(RED[::-1] + GREEN[::-1] + (0, 0))
    second = bytes(BLUE[::-1] + WHITE[::-1] + (0, 0))
    assert_pixels(load(bmp(2, -2, 24, first + second)), QUADRANTS)
    assert_pixels(load(bmp(2, 2, 24, second + first)), QUADRANTS)


def test_fourth_byte_of_a_bmp_is_alpha_only_if_its_header_says_so(load):
    row = bytes((0, 0, 255, 0)) * 2
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    assert pair(load, bmp(2, 2, 32, row * 2)) == [list(RED), list(RED)]
    with_alpha = bmp(2, 2, 32, row * 2, compression=3, masks=masks)
    assert pair(load, with_alpha) == [list(WHITE), list(WHITE)]


@pytest.mark.parametrize(
    ("inks", "rgb"),
    [((0, 0, 0, 0), WHITE), ((255, 0, 0, 0), (0, 255, 255)), ((0, 0, 0, 255), BLACK)],
)
def test_cmyk_jpeg_has_the_colours_of_its_inks(load, inks, rgb):
    data = encoded(Image.new("CMYK", (16, 16), inks), "JPEG", quality=100)
    assert np.abs(load(data).pixels.astype(int) - rgb).max() <= 2


@pytest.mark.parametrize("orientation", [1, 6])
def test_large_jpeg_decoded_at_reduced_scale_looks_the_same(tmp_path, photos_folder, orientation):
    size = 1201, 903  # decoded at a half for 224 pixels
    photo = Image.open(photos_folder / "coffee.jpg").convert("RGB").resize(size)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    photo.save(tmp_path / "a.jpg", quality=95, exif=exif)
    image = load_image(tmp_path / "a.jpg", LoadSettings(224))
    assert (image.width, image.height) == (size if orientation == 1 else size[::-1])
    whole = Image.open(tmp_path / "a.jpg").resize((224, 224), Image.Resampling.BILINEAR)
    upright = whole if orientation == 1 else whole.transpose(Image.Transpose.ROTATE_270)
    difference = np.abs(image.pixels.astype(int) - np.asarray(upright).astype(int))
    assert difference.mean() < 1.5


def test_jpeg_under_four_times_the_size_is_decoded_at_full_scale(tmp_path, photos_folder):
    photo = Image.open(photos_folder / "coffee.jpg").convert("RGB").resize((895, 1200))
    photo.save(tmp_path / "a.jpg", quality=95)
    whole = Image.open(tmp_path / "a.jpg").resize((224, 224), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(
        load_image(tmp_path / "a.jpg", LoadSettings(224)).pixels, np.asarray(whole)
    )


@pytest.mark.parametrize(
    ("size", "small"),
    [
        ((640, 480), (200, 150)),
        ((480, 640), (150, 200)),
        ((9000, 3), (200, 1)),
        ((20, 10), (20, 10)),
    ],
)
def test_thumbnail_keeps_the_aspect_ratio_and_enlarges_nothing(tmp_path, size, small):
    path = tmp_path / "photo.png"
    Image.new("RGB", size, "red").save(path)
    loaded = load_thumbnail(path, LoadSettings(200))
    assert loaded.pixels.shape == (*reversed(small), 3)
    assert (loaded.width, loaded.height) == size
    shown = Image.open(io.BytesIO(encode_webp(loaded.pixels, 80)))
    assert (shown.format, shown.size) == ("WEBP", small)
    assert np.abs(np.asarray(shown).astype(int) - RED).max() < 10


def test_thumbnail_is_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (640, 480)).save(path, exif=exif)
    loaded = load_thumbnail(path, LoadSettings(200))
    assert loaded.pixels.shape == (200, 150, 3)
    assert (loaded.width, loaded.height) == (480, 640)


@pytest.mark.parametrize("name", SAMPLES)
def test_thumbnail_of_a_cut_file_is_refused_like_its_photo(tmp_path, name):
    path = tmp_path / "photo.jpg"
    path.write_bytes(SAMPLES[name][: len(SAMPLES[name]) // 2])
    photo, thumbnail = (load(path, LoadSettings(64)) for load in (load_image, load_thumbnail))
    assert type(photo.pixels) is type(thumbnail.pixels)
    if isinstance(photo.pixels, Rejection):
        assert photo.pixels == thumbnail.pixels


def test_thumbnail_of_a_bomb_is_refused(tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(SAMPLES["PNG"])
    assert_rejected(load_thumbnail(path, LoadSettings(200, max_pixels=100)), ErrorType.TOO_LARGE)
