"""Damaged metadata rejects no photo: pixels decide."""

import struct
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
from helpers.hostile_files import encoded, photo
from helpers.photos_at_hand import error_of, load, pixels_of
from PIL import Image, ImageCms, PngImagePlugin

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # as `images` does

XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="a"/></x:xmpmeta>' + b" " * 60
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
PHOTO = photo(4)
PNG_CHUNKS = {
    b"tIME": b"\7\xe0\1\1\1\1\1",
    b"gAMA": struct.pack(">I", 45_455),
    b"cHRM": struct.pack(">8I", *range(1, 9)),
    b"sRGB": b"\0",
    b"bKGD": bytes(6),
    b"sBIT": b"\x08\x08\x08",
}


def exif(orientation: int = 1) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    tags[0x010F], tags[0x011A], tags[0x011B], tags[0x0128] = "Maker" * 5, 72.0, 72.0, 2
    tags.get_ifd(0x8769)[0x9003] = "2020:01:01 00:00:00"
    return tags


def png_with(*chunks: tuple[bytes, bytes], orientation: int = 1) -> bytes:
    info = PngImagePlugin.PngInfo()
    for name, body in chunks:
        info.add(name, body)
    info.add_text("a", "b" * 50)
    info.add_text("z", "b" * 500, zip=True)
    info.add_itxt("XML:com.adobe.xmp", XMP.decode())
    return encoded(
        PHOTO, "PNG", pnginfo=info, exif=exif(orientation), icc_profile=PROFILE, dpi=(72, 72)
    )


OPTIONS = {"exif": exif(), "icc_profile": PROFILE, "xmp": XMP}
FILES = {
    "JPEG": encoded(PHOTO, "JPEG", comment=b"comment" * 9, **OPTIONS),
    "PNG": png_with(*PNG_CHUNKS.items()),
    "WebP": encoded(PHOTO, "WEBP", **OPTIONS),
    "GIF": encoded(PHOTO.quantize(64), "GIF", comment=b"comment" * 90),
    "TIFF": encoded(PHOTO, "TIFF", **OPTIONS),
    "packed TIFF": encoded(PHOTO, "TIFF", compression="tiff_lzw", **OPTIONS),
    "AVIF": encoded(PHOTO, "AVIF", **OPTIONS),
}
# The beginnings of metadata, and how many bytes of it are damaged.
BODIES = {
    "JPEG": ((b"Exif\0\0", 100), (b"ICC_PROFILE", 300), (b"http://ns.adobe", 90), (b"comment", 60)),
    "WebP": ((b"EXIF", 100), (b"ICCP", 300), (b"XMP ", 100)),
    "GIF": ((b"comment", 200),),
    "TIFF": ((b"Maker", 25), (PROFILE[:40], 300)),
    "packed TIFF": ((b"Maker", 25), (PROFILE[:40], 300)),
    "AVIF": ((b"\0\x08\0\x05\1\x0f", 80), (PROFILE[:40], 300), (XMP[:20], 80)),
}


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """The name of each chunk, and where its body begins and ends."""
    position = 8
    while position < len(data):
        length, name = struct.unpack_from(">I4s", data, position)
        yield name, position + 8, position + 8 + length
        position += 12 + length


def damaged(data: bytes, start: int, end: int, seed: int) -> bytes:
    noise = np.random.default_rng(seed).bytes(end - start)
    return data[:start] + noise + data[end:]


@pytest.mark.parametrize("kind", BODIES)
def test_damaged_metadata_changes_no_pixel(kind):
    data = FILES[kind]
    whole = pixels_of(data)
    for body, length in BODIES[kind]:
        start = data.index(body)
        skipped = 8 if kind == "WebP" else 0
        for seed in range(10):
            broken = damaged(data, start + skipped, start + skipped + length, seed)
            np.testing.assert_array_equal(pixels_of(broken), whole)


@pytest.mark.parametrize("kind", ["TIFF", "packed TIFF"])
@pytest.mark.parametrize("tag", [271, 282, 283, 296, 34675])
def test_damaged_tag_of_a_tiff_changes_no_pixel(kind, tag, capfd):
    """By itself libtiff reports such tags on stderr, where cron would mail them."""
    data = FILES[kind]
    whole, directory = pixels_of(data), struct.unpack_from("<I", data, 4)[0]
    count = struct.unpack_from("<H", data, directory)[0]
    places = range(directory + 2, directory + 2 + 12 * count, 12)
    (place,) = (place for place in places if data[place : place + 2] == struct.pack("<H", tag))
    for seed in range(10):
        broken = damaged(data, place + 2, place + 12, seed)
        np.testing.assert_array_equal(pixels_of(broken), whole)
    assert capfd.readouterr() == ("", "")


def test_png_with_a_wrong_metadata_checksum_or_body_is_whole():
    data = FILES["PNG"]
    whole = pixels_of(data)
    places = [chunk for chunk in png_chunks(data) if chunk[0] not in (b"IHDR", b"IDAT", b"IEND")]
    assert {name for name, *_ in places} >= {b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"iCCP", b"pHYs"}
    for _, start, end in places:
        np.testing.assert_array_equal(pixels_of(damaged(data, end, end + 4, 0)), whole)
        body = np.random.default_rng(1).bytes(end - start)
        checksum = struct.pack(">I", zlib.crc32(data[start - 4 : start] + body))
        np.testing.assert_array_equal(
            pixels_of(data[:start] + body + checksum + data[end + 4 :]), whole
        )


@pytest.mark.parametrize("name", [b"pHYs", b"sRGB", b"gAMA", b"cHRM", b"iCCP", b"zTXt", b"iTXt"])
def test_png_with_an_empty_metadata_chunk_is_whole(name):
    np.testing.assert_array_equal(pixels_of(png_with((name, b""))), pixels_of(FILES["PNG"]))


@pytest.mark.parametrize("name", [b"IHDR", b"PLTE", b"tRNS", b"IDAT"])
def test_png_with_a_wrong_checksum_of_pixels_is_corrupt(name):
    data = encoded(PHOTO.quantize(64), "PNG", transparency=0)
    ((_, _, end),) = (chunk for chunk in png_chunks(data) if chunk[0] == name)
    assert error_of(damaged(data, end, end + 4, 0)) == "corrupt"


def test_png_with_a_damaged_text_is_still_rotated_by_exif():
    data = png_with(orientation=6)
    start = data.index(b"tEXt")
    turned = load(damaged(data, start + 6, start + 20, 0))
    assert (turned.width, turned.height) == PHOTO.size[::-1]
    np.testing.assert_array_equal(turned.pixels, pixels_of(data))


def test_png_that_ends_after_its_pixels_is_whole():
    data = encoded(PHOTO, "PNG")
    text = struct.pack(">I", 900) + b"tEXt" + b"a\0b" * 100
    (pixels_end,) = (end for name, _, end in png_chunks(data) if name == b"IDAT")
    for ending in (
        data[pixels_end : pixels_end + 4],
        data[pixels_end : pixels_end + 4] + text,
        b"",
    ):
        np.testing.assert_array_equal(pixels_of(data[:pixels_end] + ending), pixels_of(data))
    assert error_of(data[: pixels_end - 20]) == "truncated"


@pytest.mark.parametrize("marker", [b"\xff\xe1", b"\xff\xe2", b"\xff\xfe"])
@pytest.mark.parametrize("difference", [-8, -1, 1, 8])
def test_wrong_length_of_a_jpegs_metadata_changes_no_pixel(marker, difference):
    data = FILES["JPEG"]
    place = data.index(marker) + 2
    length = int.from_bytes(data[place : place + 2], "big") + difference
    broken = data[:place] + length.to_bytes(2, "big") + data[place + 2 :]
    np.testing.assert_array_equal(pixels_of(broken), pixels_of(data))


def test_preview_after_a_wrong_length_is_not_taken_for_the_photo():
    preview = encoded(Image.new("RGB", (16, 16)), "JPEG")
    data = encoded(PHOTO, "JPEG", exif=b"Exif\0\0" + bytes(40) + preview)
    place = data.index(b"\xff\xe1") + 2
    assert error_of(data[:place] + b"\0\x20" + data[place + 2 :]) == "corrupt"


@pytest.mark.parametrize("difference", [-5000, -8, 1, 100, 1 << 20])
def test_webp_with_a_wrong_length_is_whole_and_upright(difference):
    data = encoded(PHOTO, "WEBP", exif=exif(6), xmp=XMP)
    length = max(int.from_bytes(data[4:8], "little") + difference, 0)
    broken = load(data[:4] + struct.pack("<I", length) + data[8:])
    np.testing.assert_array_equal(broken.pixels, pixels_of(data))
    assert (broken.width, broken.height) == PHOTO.size[::-1]


@pytest.mark.parametrize("name", [b"ICCP", b"EXIF", b"XMP "])
@pytest.mark.parametrize("difference", [-5, 2, 1000])
def test_wrong_length_of_a_webps_metadata_changes_no_pixel(name, difference):
    data = FILES["WebP"]
    place = data.index(name) + 4
    length = struct.unpack_from("<I", data, place)[0] + difference
    broken = data[:place] + struct.pack("<I", length) + data[place + 4 :]
    np.testing.assert_array_equal(pixels_of(broken), pixels_of(data))


def test_webp_that_ends_after_its_pixels_is_whole():
    data = FILES["WebP"]
    for cut in (1, 50, len(data) - data.index(b"EXIF")):
        np.testing.assert_array_equal(pixels_of(data[:-cut]), pixels_of(data))
    assert error_of(data[: data.index(b"EXIF") - 20]) == "truncated"


def test_cut_png_is_not_unpacked_above_the_limit():
    data = encoded(PHOTO, "PNG")
    assert error_of(data[:-16], max_pixels=100) == "too_large"
    assert error_of(data[:8] + data[33:-16]) == "truncated"
