"""What the bytes of an image file say before a decoder sees them: format, size, and their end.

Decoders make room for what a header claims, and up for what a file lacks: so both are looked at
first. Bytes only, and the rejections that they lead to.
"""

import io
import os
import struct
import zlib
from collections.abc import Callable, Iterator

from batchcap.contracts import ErrorType, Rejection

# Chunks, segments and blocks, which Pillow walks one by one and of which it keeps most: without a
# limit, 5 MB of the shortest take 2 s and 220 MB, and MAX_FILE_BYTES 200 times as much. A PNG of
# MAX_PIXELS, 64 bits each, in chunks of the usual 8 KiB has half as many.
MAX_PARTS = 200_000
READS_PER_PART = 3  # length, body and checksum

# (offset, bytes there, format); the first match decides, so the catch-all `ftyp` stands last.
SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (0, b"GIF87a", "GIF"),
    (0, b"GIF89a", "GIF"),
    (0, b"BM", "BMP"),
    (8, b"WEBP", "WebP"),
    (0, b"II*\0", "TIFF or camera raw"),
    (0, b"MM\0*", "TIFF or camera raw"),
    (0, b"II+\0", "BigTIFF"),
    (0, b"MM\0+", "BigTIFF"),
    (4, b"ftyphei", "HEIC"),
    (4, b"ftyphev", "HEIC"),
    (4, b"ftypmif1", "HEIC"),
    (4, b"ftypmsf1", "HEIC"),
    (4, b"ftypavi", "AVIF"),
    (4, b"ftypcrx", "Canon raw"),
    (0, b"\xff\x0a", "JPEG XL"),
    (4, b"JXL \r\n\x87\n", "JPEG XL"),
    (4, b"jP  \r\n\x87\n", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"\0\0\1\0", "ICO"),
    (0, b"8BPS", "PSD"),
    (0, b"%PDF", "PDF"),
    (0, b"<svg", "SVG"),
    (0, b"<?xml", "SVG or XML"),
    (0, b"<!DOCTYPE", "HTML"),
    (0, b"<!doctype", "HTML"),
    (0, b"<html", "HTML"),
    (4, b"ftyp", "video"),
)

JPEG_SCAN, JPEG_END = b"\xff\xda", b"\xff\xd9"
# An escaped 0xff, TEM, RST0 to RST7, SOI: nothing follows them.
JPEG_WITHOUT_LENGTH = [bytes([marker]) for marker in (0x00, 0x01, *range(0xD0, 0xD9))]
JPEG_SCAN_HEADER_BYTES = 8  # of the shortest, with one component

PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
# Adam7: (first column, first row, columns between, rows between).
PNG_PASSES = (
    *((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)),
    *((0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)),
)
PNG_PIECE = 1 << 14


class RejectionError(Exception):
    """Carries a rejection to `load_image`, with what is known of the file."""

    def __init__(
        self, error_type: ErrorType, message: str, status: os.stat_result | None = None
    ) -> None:
        super().__init__(message)
        self.rejection = Rejection(error_type, message)
        self.file_size = status and status.st_size
        self.mtime_ns = status and status.st_mtime_ns


class PatientFile(io.BytesIO):
    """A file in memory whose reader is stopped when it nibbles for too long."""

    reads_left = MAX_PARTS * READS_PER_PART

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads_left -= 1
        if self.reads_left < 0:
            raise too_many_parts()
        return super().read(size)


def format_name_of(data: bytes) -> str:
    """The format by its first bytes, whatever the extension says; empty if none is known."""
    matches = (name for offset, magic, name in SIGNATURES if data.startswith(magic, offset))
    return next(matches, "")


def _gif_size(data: bytes) -> tuple[int, int]:
    """Canvas or first frame, whichever is larger; the canvas where there is no frame.

    Pillow makes room for a frame's disposal when it opens the file, before it can be asked.
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


def _webp_size(data: bytes) -> tuple[int, int]:
    """The canvas, for which libwebp makes room before it can be asked; (0, 0) where unknown."""
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    return 0, 0


# What a decoder would make room for as soon as it sees the header.
HEADER_SIZES: dict[str, Callable[[bytes], tuple[int, int]]] = {
    "GIF": _gif_size,
    "WebP": _webp_size,
}


def _check_jpeg_end(data: bytes) -> None:
    """An end marker must follow the first scan: Pillow decodes a tail of zeros to grey."""
    if data.find(JPEG_END, _jpeg_scan_start(data)) == -1:
        raise truncated()


def _jpeg_scan_start(data: bytes) -> int:
    """Where the marker of the first scan stands, or what is no marker."""
    position = 2
    for _ in range(MAX_PARTS):
        if not data.startswith(b"\xff", position) or data.startswith(JPEG_SCAN, position):
            return position
        if data.startswith(b"\xff\xff", position):  # a fill byte, which any marker may have ahead
            position += 1
        elif data[position + 1 : position + 2] in JPEG_WITHOUT_LENGTH:
            position += 2
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    raise too_many_parts()


def _ended_jpeg(data: bytes) -> bytes:
    """A cut JPEG with an end marker, for libjpeg to fill the rest; the zeros go that a download
    had reserved. One without a scan has no pixels to show.
    """
    kept = data.rstrip(b"\0")
    start = _jpeg_scan_start(kept)
    if not kept.startswith(JPEG_SCAN, start) or len(kept) <= start + JPEG_SCAN_HEADER_BYTES:
        raise truncated()
    return kept + JPEG_END


def _check_png_chunks(data: bytes) -> None:
    """The chunks must reach to the end mark; of the pixels Pillow ignores the checksums."""
    position = 8
    for _ in range(MAX_PARTS):
        if position + 12 > len(data):
            raise truncated()
        length, name = struct.unpack_from(">I4s", data, position)
        body_end = position + 8 + length
        checksum = zlib.crc32(memoryview(data)[position + 4 : body_end])
        if name == b"IDAT" and checksum != int.from_bytes(data[body_end : body_end + 4], "big"):
            raise corrupt("PNG", "wrong checksum") if body_end + 4 <= len(data) else truncated()
        if name == b"IEND":
            return
        position = body_end + 4
    raise too_many_parts()


def _check_webp_length(data: bytes) -> None:
    if len(data) < _webp_length(data):
        raise truncated()


def _webp_length(data: bytes) -> int:
    return 8 + int.from_bytes(data[4:8], "little")


def _filled_webp(data: bytes) -> bytes:
    """A cut WebP filled up with zeros, which libwebp reads at the end of its data anyway.

    Not by more than its pixels take uncompressed, whatever length the header claims.
    """
    width, height = _webp_size(data)
    return data.ljust(min(_webp_length(data), len(data) + 4 * width * height), b"\0")


# GIF and BMP need none: Pillow itself notices where their first frame ends too early.
END_CHECKS: dict[str, Callable[[bytes], None]] = {
    "JPEG": _check_jpeg_end,
    "PNG": _check_png_chunks,
    "WebP": _check_webp_length,
}

# What makes a decoder take a file that ends early; the others stop where it does.
MENDERS: dict[str, Callable[[bytes], bytes]] = {
    "JPEG": _ended_jpeg,
    "WebP": _filled_webp,
}


def truncated() -> RejectionError:
    """The file ends early."""
    return RejectionError(
        ErrorType.TRUNCATED, "The file ends before the photo does; copy or download it again."
    )


def too_many_parts() -> RejectionError:
    """The file is made of nothing but parts."""
    return RejectionError(
        ErrorType.TOO_LARGE, f"The file has more than {MAX_PARTS:,} parts; save the photo again."
    )


def corrupt(format_name: str, reason: str) -> RejectionError:
    """The file is damaged; `reason` is what noticed."""
    return RejectionError(
        ErrorType.CORRUPT,
        f"The {format_name} data is damaged ({one_line(reason)}); replace the file.",
    )


def unpacked_png_bytes(width: int, height: int, data: bytes) -> int:
    """How long the unpacked pixels of a whole PNG are: of each row, its filter and its samples."""
    bit_depth, colour_type, interlaced = data[24], data[25], data[28]
    bits = bit_depth * PNG_CHANNELS[colour_type]
    passes = PNG_PASSES if interlaced else ((0, 0, 1, 1),)
    counts = [
        (-(-(width - left) // across), -(-(height - top) // down))
        for left, top, across, down in passes
    ]
    return sum(rows * (1 + -(-columns * bits // 8)) for columns, rows in counts if columns > 0)


def png_pixel_pieces(data: bytes) -> Iterator[bytes]:
    """The compressed pixels, in pieces so small that none unpacks to much."""
    position = 8
    while position + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, position)
        start, end = position + 8, position + 8 + length
        if name == b"IDAT":
            yield from (data[i : min(i + PNG_PIECE, end)] for i in range(start, end, PNG_PIECE))
        position = end + 4


def one_line(text: str) -> str:
    """What a decoder says, without what a terminal or a table would stumble over."""
    return "".join(c if c.isprintable() else " " for c in text)[:120].strip()
