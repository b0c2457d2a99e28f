"""TIFFs against pixels written down by hand; camera raw files, which look like a TIFF."""

import io
import struct
from typing import Any

import numpy as np
import pytest
from helpers.hostile_files import encoded, photo
from helpers.photos_at_hand import error_of, load, pixels_of
from PIL import Image, ImageCms

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # as `images` does

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
QUADRANTS = np.array([[RED, GREEN], [BLUE, WHITE]], dtype=np.uint8)
GREYS = [[0, 85], [170, 255]]
PHOTO = photo(6)

LETTERS = {3: "H", 4: "I", 16: "Q"}
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, OFFSETS, SAMPLES = 256, 257, 258, 259, 262, 273, 277
BYTE_COUNTS, PLANAR, PREDICTOR, TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS = 279, 284, 317, 322, 323, 324
TILE_BYTES, SUB_DIRECTORIES, EXTRA, FORMAT, SUBFILE, DNG = 325, 330, 338, 339, 254, 50706
GREY, RGB, INVERTED, SENSOR = 1, 2, 0, 32803


def tiff(tags: dict[int, int | tuple[int, ...]], pixels: bytes, order="<", big=False) -> bytes:
    """A TIFF of one directory: `pixels` are at byte 16, where offsets should point."""
    kind = 16 if big else 4
    letters, entry_letters, value_size = ("Q", "HHQ", 8) if big else ("I", "HHI", 4)
    head = {"<": b"II", ">": b"MM"}[order]
    head += struct.pack(order + ("HHHQ" if big else "HI"), *((43, 8, 0) if big else (42,)), 0)
    head = head[:-value_size] + struct.pack(order + letters, 16 + len(pixels))
    entries, far = b"", b""
    far_start = 16 + len(pixels) + (8 if big else 2) + len(tags) * (20 if big else 12) + value_size
    for tag, value in sorted(tags.items()):
        values = value if isinstance(value, tuple) else (value,)
        body = struct.pack(order + letters * len(values), *values)
        if len(body) > value_size:
            body, far = struct.pack(order + letters, far_start + len(far)), far + body
        entries += struct.pack(order + entry_letters, tag, kind, len(values)) + body
    count = struct.pack(order + ("Q" if big else "H"), len(tags))
    return head.ljust(16, b"\0") + pixels + count + entries + bytes(value_size) + far


def grey(pixels: bytes, bits: int, **options) -> bytes:
    extra = options.pop("tags", {})
    tags = {WIDTH: 2, HEIGHT: 2, BITS: bits, COMPRESSION: 1, PHOTOMETRIC: GREY, SAMPLES: 1}
    return tiff(tags | {OFFSETS: 16, BYTE_COUNTS: len(pixels)} | extra, pixels, **options)


def samples(letter: str, *values: float, order: str = "<") -> bytes:
    return struct.pack(order + letter * len(values), *values)


FLOATS, SIGNED = {FORMAT: 3}, {FORMAT: 2}
SIXTEEN = (0, 85 * 257, 170 * 257, 65_535)
GREY_KINDS = {
    "8 bits": grey(bytes((0, 85, 170, 255)), 8),
    "big-endian": grey(bytes((0, 85, 170, 255)), 8, order=">"),
    "BigTIFF": grey(bytes((0, 85, 170, 255)), 8, big=True),
    "4 bits": grey(b"\x05\xaf", 4),
    "12 bits": grey(b"\x00\x05\x50\xaa\x0f\xff", 12),
    "16 bits": grey(samples("H", *SIXTEEN), 16),
    "16 bits big-endian": grey(samples("H", *SIXTEEN, order=">"), 16, order=">"),
    "16 bits, 0 is white": grey(samples("H", *SIXTEEN[::-1]), 16, tags={PHOTOMETRIC: INVERTED}),
    "32 bits": grey(samples("I", *(v * 0x01010101 for v in (0, 85, 170, 255))), 32),
    "32 bits with sign": grey(samples("i", 0, 85, 170, 255), 32, tags=SIGNED),
    "16 bits with sign": grey(samples("h", 0, 8500, 17_000, 25_500), 16, tags=SIGNED),
    "floats to 1": grey(samples("f", 0, 1 / 3, 2 / 3, 1), 32, tags=FLOATS),
    "floats to 255": grey(samples("f", 0, 85, 170, 255), 32, tags=FLOATS),
    "big-endian floats": grey(samples("f", 0, 85, 170, 255, order=">"), 32, order=">", tags=FLOATS),
    "floats below 0": grey(samples("f", -3000, -2000, -1000, 0), 32, tags=FLOATS),
    "floats too large to subtract": grey(samples("f", -3e38, -1e38, 1e38, 3e38), 32, tags=FLOATS),
    "NaN among floats": grey(samples("f", float("nan"), 1 / 3, 2 / 3, 1), 32, tags=FLOATS),
}


@pytest.mark.parametrize("kind", GREY_KINDS)
def test_grey_of_any_depth_keeps_its_shades(kind):
    expected = np.repeat(np.array(GREYS)[..., None], 3, axis=2)
    np.testing.assert_array_equal(pixels_of(GREY_KINDS[kind], size=2), expected)


def test_dark_floats_and_integers_stay_dark():
    assert (pixels_of(grey(samples("f", 0, 0, 0, 0.2), 32, tags=FLOATS), size=2) <= 51).all()
    assert (pixels_of(grey(samples("i", 0, 1, 2, 3), 32, tags=SIGNED), size=2) <= 3).all()


@pytest.mark.parametrize("letter", "fih")
def test_big_endian_samples_are_right_in_a_compressed_tiff(letter):
    """Pillow reads them as big-endian, but libtiff converts them to the machine's order."""
    values = np.array([[0, 85], [170, 255]], f">{'f4' if letter == 'f' else letter}")
    packed = b"".join(
        bytes((len(row) - 1,)) + row for row in (values[0].tobytes(), values[1].tobytes())
    )
    tags = {COMPRESSION: 32_773, 278: 2, FORMAT: 3 if letter == "f" else 2}
    data = grey(packed, 8 * values.itemsize, order=">", tags=tags)
    assert pixels_of(data, size=2)[..., 0].tolist() == GREYS


COLOUR_KINDS = {
    "RGB": encoded(Image.fromarray(QUADRANTS), "TIFF"),
    "RGB of 16 bits": tiff(
        {WIDTH: 2, HEIGHT: 2, BITS: (16, 16, 16), COMPRESSION: 1, PHOTOMETRIC: RGB, SAMPLES: 3}
        | {OFFSETS: 16, BYTE_COUNTS: 24},
        QUADRANTS.astype("<u2").__mul__(257).tobytes(),
    ),
    "one plane a colour": tiff(
        {WIDTH: 2, HEIGHT: 2, BITS: (8, 8, 8), COMPRESSION: 1, PHOTOMETRIC: RGB, SAMPLES: 3}
        | {OFFSETS: (16, 20, 24), BYTE_COUNTS: (4, 4, 4), PLANAR: 2},
        np.moveaxis(QUADRANTS, 2, 0).tobytes(),
    ),
    "tiles": tiff(
        {WIDTH: 2, HEIGHT: 2, BITS: (8, 8, 8), COMPRESSION: 1, PHOTOMETRIC: RGB, SAMPLES: 3}
        | {TILE_WIDTH: 16, TILE_HEIGHT: 16, TILE_OFFSETS: 16, TILE_BYTES: 768},
        np.pad(QUADRANTS, ((0, 14), (0, 14), (0, 0))).tobytes(),
    ),
    "palette": encoded(Image.fromarray(QUADRANTS).quantize(4), "TIFF"),
    "CMYK": encoded(Image.fromarray(QUADRANTS).convert("CMYK"), "TIFF"),
    "two pages": encoded(
        Image.fromarray(QUADRANTS), "TIFF", save_all=True, append_images=[Image.new("RGB", (9, 9))]
    ),
    **{
        compression: encoded(Image.fromarray(QUADRANTS), "TIFF", compression=compression)
        for compression in ("tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "packbits", "lzma")
    },
}


@pytest.mark.parametrize("kind", COLOUR_KINDS)
def test_colours_are_those_that_were_saved(kind):
    data = COLOUR_KINDS[kind]
    np.testing.assert_array_equal(pixels_of(data, size=2), QUADRANTS)
    np.testing.assert_array_equal(pixels_of(data, size=2, name="a.TIF"), QUADRANTS)


def test_jpeg_in_a_tiff_looks_the_same():
    data = encoded(PHOTO, "TIFF", compression="jpeg", quality=95)
    assert np.abs(pixels_of(data).astype(int) - pixels_of(encoded(PHOTO, "PNG"))).mean() < 3


def test_colours_of_cielab_are_close():
    spaces = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.profileToProfile(Image.fromarray(QUADRANTS), *spaces, outputMode="LAB")
    pixels = pixels_of(encoded(lab, "TIFF"), size=2).astype(int)
    assert np.abs(pixels - QUADRANTS).max() < 25


@pytest.mark.parametrize("compression", ["group3", "group4", "tiff_ccitt"])
def test_fax_is_black_and_white(compression):
    page = Image.new("1", (16, 16), 1)
    page.paste(0, (0, 0, 8, 16))
    pixels = pixels_of(encoded(page, "TIFF", compression=compression), size=16)
    assert (pixels[:, :8] == 0).all()
    assert (pixels[:, 8:] == 255).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparent_tiff_is_composited_on_white(mode):
    image = Image.new("RGBA", (2, 2), (0, 0, 0, 255))
    image.putpixel((0, 0), (0, 0, 0, 0))
    if mode == "PA":
        alpha, image = image.getchannel("A"), image.convert("RGB").quantize(2).convert("PA")
        image.putalpha(alpha)
    pixels = pixels_of(encoded(image.convert(mode), "TIFF"), size=2)
    assert pixels[..., 0].tolist() == [[255, 0], [0, 0]]


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiff_is_rotated_upright(orientation, compression):
    tags = Image.Exif()
    tags[0x0112] = orientation
    square = photo(7, 64, 64).crop((0, 0, 64, 40))
    turned = load(encoded(square, "TIFF", exif=tags, compression=compression))
    as_png = load(encoded(square, "PNG", exif=tags))
    assert (turned.width, turned.height) == (as_png.width, as_png.height)
    assert np.abs(turned.pixels.astype(int) - as_png.pixels).max() <= 1


def without_strips(data: bytes, kept: int) -> bytes:
    """A TIFF whose strips after the first `kept` are beyond its end."""
    image: Any = Image.open(io.BytesIO(data))
    places = image.tag_v2[OFFSETS]
    moved = [*places[:kept], *(place + len(data) for place in places[kept:])]
    before, after = (struct.pack(f"<{len(places)}I", *numbers) for numbers in (places, moved))
    assert before in data
    return data.replace(before, after)


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "jpeg"])
def test_cut_tiff_is_truncated_and_accepted_on_request(compression):
    data = encoded(PHOTO, "TIFF", compression=compression, tiffinfo={278: 8})
    cut = without_strips(data, 5)
    assert error_of(cut) == "truncated"
    image = load(cut, accept_truncated=True)
    assert image.note is not None
    difference = image.pixels[:12].astype(int) - pixels_of(data)[:12]
    assert np.abs(difference).mean() < 2
    assert error_of(data[:-1]) in ("truncated", "ok")
    assert error_of(data[: len(data) // 2]) == "truncated"


def test_tiff_that_ends_before_its_pixels_is_always_refused():
    cut = without_strips(encoded(PHOTO, "TIFF", tiffinfo={278: 8}), 0)
    assert error_of(cut, accept_truncated=True) == "truncated"


def test_size_of_a_tiff_and_of_its_tiles_is_limited():
    rgb = {BITS: (8, 8, 8), COMPRESSION: 8, PHOTOMETRIC: RGB, SAMPLES: 3}
    wide = tiff(rgb | {WIDTH: 20_000, HEIGHT: 20_000, OFFSETS: 16, BYTE_COUNTS: 4}, bytes(4))
    tiles = {TILE_WIDTH: 16_000, TILE_HEIGHT: 16_000, TILE_OFFSETS: 16, TILE_BYTES: 4}
    tiled = tiff(rgb | {WIDTH: 2, HEIGHT: 2} | tiles, bytes(4))
    assert (error_of(wide), error_of(tiled)) == ("too_large", "too_large")
    assert error_of(COLOUR_KINDS["RGB"], max_pixels=3) == "too_large"
    assert error_of(COLOUR_KINDS["RGB"], max_pixels=4) == "ok"


def test_tiff_of_too_many_strips_is_refused():
    offsets = {OFFSETS: (16,) * 200_001, BYTE_COUNTS: (1,) * 200_001}
    assert error_of(grey(bytes(4), 8, tags=offsets)) == "too_large"


@pytest.mark.parametrize("tags", [{COMPRESSION: 34_712}, {FORMAT: 6}, {BITS: 64, FORMAT: 3}])
def test_unsupported_tiff_is_not_called_damaged(tags):
    assert error_of(grey(bytes(32), 8, tags=tags)) == "unsupported_format"


def test_damaged_pixels_of_a_tiff_are_corrupt_and_nothing_is_printed(capfd):
    data = encoded(PHOTO, "TIFF", compression="tiff_adobe_deflate")
    place = data.index(b"\x78", 8) + 40
    assert error_of(data[:place] + bytes(40) + data[place + 40 :]) == "corrupt"
    assert capfd.readouterr() == ("", "")


SMALL = bytes((0, 85, 170, 255))
# The directory of a sensor's picture, at byte 4 of the pixels.
SENSOR_DIRECTORY = struct.pack("<HHHIII", 1, PHOTOMETRIC, 4, 1, SENSOR, 0)
RAWS = {
    "a.CR2": b"II*\0\x10\0\0\0CR\2\0" + bytes(40),
    "a.tif": grey(SMALL, 8, tags={DNG: 1}),
    "b.tif": grey(SMALL, 8, tags={PHOTOMETRIC: SENSOR}),
    "c.tif": grey(SMALL, 8, tags={COMPRESSION: 34_713}),
    "d.tif": grey(SMALL + SENSOR_DIRECTORY, 8, tags={SUBFILE: 1, SUB_DIRECTORIES: 20}),
    "e.tif": grey(SMALL + SENSOR_DIRECTORY, 8, tags={SUB_DIRECTORIES: 20}),
    "cut.tif": grey(SMALL, 8, tags={SUBFILE: 1, SUB_DIRECTORIES: 9999}),
    "by its name.NEF": grey(SMALL, 8),
    "by its name.dng": grey(SMALL, 8),
    "a.raf": b"FUJIFILMCCD-RAW 0201" + bytes(40),
    "a.orf": b"IIRO\x08\0\0\0" + bytes(40),
    "a.rw2": b"IIU\0\x18\0\0\0" + bytes(40),
    "a.CR3": b"\0\0\0\x18ftypcrx \0\0\0\1crx isom",
}


@pytest.mark.parametrize("name", RAWS)
def test_camera_raw_file_is_refused_and_its_preview_not_captioned(name):
    image = load(RAWS[name], name=name)
    assert image.pixels.error_type == "unsupported_format"
    assert image.pixels.message.startswith("This is a camera raw file;")


def test_picture_with_thumbnails_is_not_camera_raw():
    pages = struct.pack("<HHHIII", 1, PHOTOMETRIC, 4, 1, GREY, 0)
    assert error_of(grey(SMALL + pages, 8, tags={SUB_DIRECTORIES: 20})) == "ok"
    assert error_of(grey(SMALL, 8, tags={SUBFILE: 1})) == "ok"


def test_jpeg_named_like_a_raw_file_is_read():
    assert error_of(encoded(PHOTO, "JPEG"), name="a.nef") == "ok"
