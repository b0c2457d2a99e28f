"""Checks of an image file's bytes before decoding: format, size, end, metadata.

Decoders allocate what a header claims and make up what a file lacks, so both are checked first.
Handles bytes only, and raises rejections.
"""

import io
import re
import struct
from collections.abc import Callable

from batchcap.photos import jpeg, png, tiff, webp
from batchcap.photos.rejections import PatientFile

CAMERA_RAW = "camera raw"

# (offset, bytes there, format); the first match decides.
SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (0, b"GIF87a", "GIF"),
    (0, b"GIF89a", "GIF"),
    (0, b"BM", "BMP"),
    (8, b"WEBP", "WebP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"II+\0", "TIFF"),
    (0, b"MM\0+", "big-endian BigTIFF"),
    (0, b"IIU\0", CAMERA_RAW),  # Panasonic
    (0, b"IIRO", CAMERA_RAW),  # Olympus
    (0, b"IIRS", CAMERA_RAW),
    (0, b"MMOR", CAMERA_RAW),
    (0, b"FUJIFILMCCD-RAW", CAMERA_RAW),
    (0, b"FOVb", CAMERA_RAW),  # Sigma
    (0, b"\0MRM", CAMERA_RAW),  # Minolta
    (6, b"HEAPCCDR", CAMERA_RAW),  # Canon before 2004
    (4, b"ftyp", "video"),  # or another format of `BRANDS`
    (0, b"\xff\x0a", "JPEG XL"),
    (4, b"JXL \r\n\x87\n", "JPEG XL"),
    (4, b"jP  \r\n\x87\n", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"II\xbc", "JPEG XR"),
    (0, b"\0\0\1\0", "ICO"),
    (0, b"8BPS", "PSD"),
    (0, b"gimp xcf", "XCF"),
    (0, b"v/1\1", "OpenEXR"),
    (0, b"#?RADIANCE", "Radiance HDR"),
    (0, b"DDS ", "DDS"),
    (0, b"qoif", "QOI"),
    *((0, b"P%d%c" % (number, end), "PNM") for number in range(1, 8) for end in b" \t\r\n#"),
    (0, b"%PDF", "PDF"),
    (0, b"%!PS", "PostScript"),
    (0, b"<svg", "SVG"),
    (0, b"<?xml", "SVG or XML"),
    (0, b"<!DOCTYPE", "HTML"),
    (0, b"<!doctype", "HTML"),
    (0, b"<html", "HTML"),
)
TGA_END = b"TRUEVISION-XFILE.\0"

# By the brands after `ftyp`, the major one first.
BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm"), "HEIC"),
    **dict.fromkeys((b"hevs", b"heif", b"avci", b"j2ki"), "HEIC"),
    b"crx ": CAMERA_RAW,  # Canon since 2018
}
# An item's entry: version, flags, id (2 bytes, or 4 in version 3), protection, type.
METADATA_ITEM = re.compile(rb"(infe(?:\x02...|\x03.....)....)(?:Exif|mime)", re.DOTALL)
BOXED_FORMATS = ("AVIF", "HEIC")
GENERAL_BRANDS = {b"mif1", b"msf1"}  # HEIC, unless another brand decides
MAX_BRANDS = 64


def format_name_of(data: bytes, extension: str) -> str:
    """Return the format by its first bytes, whatever the extension; empty if unknown.

    `extension` (lower case, without a dot) only distinguishes camera raw files from TIFFs.
    """
    matches = (name for offset, magic, name in SIGNATURES if data.startswith(magic, offset))
    name = next(matches, "TGA" if data.endswith(TGA_END) else "")
    if name == "video":
        return _name_by_brand(data)
    return CAMERA_RAW if name == "TIFF" and tiff.is_raw(data, extension) else name


def _name_by_brand(data: bytes) -> str:
    box = data[8 : min(int.from_bytes(data[:4], "big"), 4 * MAX_BRANDS)] or data[8:12]
    brands = [box[:4], *(box[start : start + 4] for start in range(8, len(box), 4))]
    found = (BRANDS[brand] for brand in brands if brand in BRANDS)
    return next(found, "video" if GENERAL_BRANDS.isdisjoint(brands) else "HEIC")


def _gif_size(data: bytes) -> tuple[int, int]:
    """Return the larger of canvas and first frame; the canvas if there is no frame.

    Pillow allocates a frame's disposal when it opens the file.
    """
    width, height = struct.unpack_from("<HH", data, 6)
    file = PatientFile(data)
    file.seek(13 + _gif_palette_bytes(data[10]))
    while (block := file.read(1)) not in (b",", b";", b""):
        if block == b"!":  # an extension: its kind, then parts that begin with their lengths
            file.read(1)
            while length := int.from_bytes(file.read(1)):
                file.seek(length, io.SEEK_CUR)
    if block != b",":
        return width, height
    left, top, frame_width, frame_height = struct.unpack("<4H", file.read(8))
    return max(width, left + frame_width), max(height, top + frame_height)


def _gif_palette_bytes(flags: int) -> int:
    return 6 << (flags & 7) if flags & 128 else 0


def ends_within_box(data: bytes) -> bool:
    """Whether an AVIF or HEIC ends within a top-level box."""
    position = 0
    while position + 8 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        if length == 1 and position + 16 <= len(data):
            (length,) = struct.unpack_from(">Q", data, position + 8)
        if length < 8:  # the last box, or nonsense
            return False
        position += length
    return position != len(data)


def _without_items(data: bytes) -> bytes:
    """Rename the EXIF and XMP items of an AVIF or HEIC, so that decoders ignore them."""
    return METADATA_ITEM.sub(rb"\1skip", data)


# The (width, height) that a decoder allocates on reading the header, or that END_CHECKS unpack.
HEADER_SIZES: dict[str, Callable[[bytes], tuple[int, int]]] = {
    "PNG": png.size,
    "GIF": _gif_size,
    "WebP": webp.size,
    "TIFF": tiff.size,
}

# Raise if pixels of the first picture are missing. The decoders of GIF, BMP, AVIF and HEIC notice
# that themselves.
END_CHECKS: dict[str, Callable[[bytes], None]] = {
    "JPEG": jpeg.check_end,
    "PNG": png.check_chunks,
    "WebP": webp.check_end,
    "TIFF": tiff.check_pixels,
}

# Make a file that ends early decodable. Decoders of other formats stop where the file does.
MENDERS: dict[str, Callable[[bytes], bytes]] = {
    "JPEG": jpeg.ended,
    "WebP": webp.filled,
}

# Return a file of the same pixels without the metadata, which may be damaged.
WITHOUT_METADATA: dict[str, Callable[[bytes], bytes]] = {
    "JPEG": jpeg.without_metadata,
    "PNG": png.without_metadata,
    "WebP": webp.without_metadata,
    "TIFF": tiff.without_metadata,
    **dict.fromkeys(BOXED_FORMATS, _without_items),
}
