"""One photo file to pixels: read once, decoded from memory with Pillow, or refused with a reason.

Whatever a file is, the answer is a `LoadedImage`, never an exception, and never pixels that a
decoder made up, unless a file that ends early was asked to count. Knows neither jobs nor networks,
and leaves Pillow's global settings alone.
"""

import hashlib
import io
import os
import stat
import struct
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
from PIL import (
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    WebPImagePlugin,
)

from batchcap.contracts import ErrorType, LoadedImage, Rejection

MAX_PIXELS = 100_000_000
MAX_FILE_BYTES = 1 << 30  # a photo of MAX_PIXELS fits uncompressed; a film named .jpg does not
# Chunks, segments and blocks, which Pillow walks one by one and of which it keeps most: without a
# limit, 5 MB of the shortest take 2 s and 220 MB, and MAX_FILE_BYTES 200 times as much. A PNG of
# MAX_PIXELS, 64 bits each, in chunks of the usual 8 KiB has half as many.
MAX_PARTS = 200_000
READS_PER_PART = 3  # length, body and checksum
READ_ATTEMPTS = 2
# File systems stamp times by the tick of the kernel's clock, 10 ms at most: what is written twice
# within one has the same time twice.
CLOCK_TICK_S = 0.01

# No photo is refused for damaged metadata, and cron mails what a run writes on stderr.
warnings.filterwarnings("ignore", module=r"PIL\.")

# The classes, because Image.open would apply Pillow's own pixel limit. The JPEG class reads an MPO
# as the JPEG it begins with.
OPENERS: dict[str, Callable[[IO[bytes]], ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
}

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

FILE_KINDS = {
    stat.S_IFDIR: "folder",
    stat.S_IFIFO: "named pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}

TRANSPOSE_BY_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


TRUNCATED_NOTE = Rejection(
    ErrorType.TRUNCATED,
    "The file ends before the photo does; what there is of it was captioned.",
)


@dataclass(frozen=True)
class LoadSettings:
    """How photos are loaded: the side of the square they become, and what is refused.

    `max_pixels` is compared with the header, before anything is decoded. `accept_truncated` takes
    what there is of a file that ends early: the rest is grey, black or what the format makes of it.
    """

    image_size: int
    max_pixels: int = MAX_PIXELS
    accept_truncated: bool = False


class _RejectionError(Exception):
    """Carries a rejection to `load_image`, with what is known of the file."""

    def __init__(
        self, error_type: ErrorType, message: str, status: os.stat_result | None = None
    ) -> None:
        super().__init__(message)
        self.rejection = Rejection(error_type, message)
        self.file_size = status and status.st_size
        self.mtime_ns = status and status.st_mtime_ns


class _PatientFile(io.BytesIO):
    """A file in memory whose reader is stopped when it nibbles for too long."""

    reads_left = MAX_PARTS * READS_PER_PART

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads_left -= 1
        if self.reads_left < 0:
            raise _too_many_parts()
        return super().read(size)


def load_image(path: str | os.PathLike[str], settings: LoadSettings) -> LoadedImage:
    """Read one file and squash its photo to `settings.image_size` pixels a side (S).

    The pixels are `uint8[S, S, 3]`, RGB, contiguous: upright by EXIF, composited on white,
    resized by antialiased bilinear without keeping the aspect ratio. Of an animation, the first
    frame. Raises nothing for any file; safe to call from several threads and processes.
    """
    try:
        data, mtime_ns = _read_file(Path(path))
    except _RejectionError as error:
        return LoadedImage(error.rejection, error.file_size, error.mtime_ns)
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        pixels, (width, height), note = _decode(data, settings)
    except _RejectionError as error:
        return LoadedImage(error.rejection, len(data), mtime_ns, sha256)
    return LoadedImage(pixels, len(data), mtime_ns, sha256, width, height, note)


def _read_file(path: Path) -> tuple[bytes, int]:
    """A file's bytes, and the time at which it had exactly these."""
    status = None
    try:
        status = path.stat()
        _check_readable_kind(status)  # before opening, which a device may act on
        for _ in range(READ_ATTEMPTS):
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
            with os.fdopen(descriptor, "rb") as file:
                status = os.fstat(descriptor)
                _check_readable_kind(status)
                data = _read_unless_it_changes(file)
            if data is not None:
                return data, status.st_mtime_ns
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: NUL in name
        raise _RejectionError(ErrorType.MISSING, _missing_message(path)) from error
    except OSError as error:
        reason = _one_line(error.strerror or type(error).__name__)
        raise _RejectionError(
            ErrorType.UNREADABLE,
            f"The file cannot be read ({reason}); check its permissions and the disk.",
            status,
        ) from error
    except MemoryError as error:
        raise _RejectionError(
            ErrorType.TOO_LARGE, "The file does not fit into memory.", status
        ) from error
    raise _RejectionError(
        ErrorType.CHANGED, "The file changed while it was read; caption it when it is complete."
    )


def _read_unless_it_changes(file: IO[bytes]) -> bytes | None:
    """All of an open file; None if it is being written to, or was when it was read.

    A file written within the last tick is first left alone for one: until then a change need not
    show in its time.
    """
    opened = os.fstat(file.fileno())
    if _is_fresh(opened):
        time.sleep(CLOCK_TICK_S)
    before = os.fstat(file.fileno())
    data = file.read(before.st_size + 1)  # one more, to see it grow; no more, lest it never ends
    after = os.fstat(file.fileno())
    stamps = {(status.st_size, status.st_mtime_ns) for status in (opened, before, after)}
    return data if stamps == {(len(data), before.st_mtime_ns)} else None


def _is_fresh(status: os.stat_result) -> bool:
    return 0 <= time.time_ns() - status.st_mtime_ns < CLOCK_TICK_S * 1e9


def _check_readable_kind(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = FILE_KINDS.get(stat.S_IFMT(status.st_mode), "special file")
        raise _RejectionError(ErrorType.NOT_A_FILE, f"This is a {kind}, not a photo file.")
    if status.st_size > MAX_FILE_BYTES:
        raise _RejectionError(
            ErrorType.TOO_LARGE,
            f"The file has {status.st_size:,} bytes; the limit is {MAX_FILE_BYTES:,}.",
            status,
        )


def _missing_message(path: Path) -> str:
    if path.is_symlink():
        return "This is a link to a file that does not exist."
    return "There is no such file; it may have been moved or deleted meanwhile."


def _decode(
    data: bytes, settings: LoadSettings
) -> tuple[npt.NDArray[np.uint8], tuple[int, int], Rejection | None]:
    """Decode to `uint8[S, S, 3]`, the photo's upright (width, height), and what ails it."""
    format_name = _supported_format(data)
    note = None
    try:
        if format_name in HEADER_SIZES:
            _check_pixel_count(*HEADER_SIZES[format_name](data), settings.max_pixels)
        data, note = _checked_end(data, format_name, settings.accept_truncated)
        file = _PatientFile(data)
        image = OPENERS[format_name](file)
        size = image.size
        _check_pixel_count(*size, settings.max_pixels)
        # A run-length encoded BMP is read pixel by pixel.
        file.reads_left += 3 * size[0] * size[1]
        # Only JPEG can: decodes to the half, quarter or eighth that is at least twice what is
        # needed, in a fraction of the time. Less would leave nothing of our own filter.
        image.draft(None, (2 * settings.image_size, 2 * settings.image_size))
        note = _load_pixels(image, len(data), settings.accept_truncated) or note
        if format_name == "PNG":
            if note is None and _lacks_png_rows(image, data):
                if not settings.accept_truncated:
                    raise _truncated()
                note = TRUNCATED_NOTE
            _match_transparent_colour(image, bit_depth=data[24])
        orientation = _orientation(image)
        square = _squashed(_as_rgb(image), settings.image_size)
        return np.array(_upright(square, orientation)), _upright_size(size, orientation), note
    except _RejectionError:
        raise
    except Exception as error:  # Pillow has no common base class for what a damaged file raises
        raise _diagnosis(format_name, error, ends_early=note is not None) from error


def _checked_end(
    data: bytes, format_name: str, accept_truncated: bool
) -> tuple[bytes, Rejection | None]:
    """The bytes to decode: where a file that ends early counts, with an end that decoders take."""
    try:
        if format_name in END_CHECKS:
            END_CHECKS[format_name](data)
        return data, None
    except _RejectionError as error:
        if not accept_truncated or error.rejection.error_type is not ErrorType.TRUNCATED:
            raise
    mend = MENDERS.get(format_name)
    return (mend(data) if mend else data), TRUNCATED_NOTE


def _load_pixels(
    image: ImageFile.ImageFile, data_size: int, accept_truncated: bool
) -> Rejection | None:
    """Decode; of a file that ends early, if it is to count, what there is, which is noted.

    Pillow's own switch for that counts for all threads of the process. It isn't needed: when
    Pillow finds that there is no more, what it decoded until then is in the image.
    """
    has_begun = all(offset < data_size for _, _, offset, *_ in image.tile)
    try:
        image.load()
    except Exception as error:
        if not (accept_truncated and has_begun and _ran_out_of_data(error)):
            raise
        image.tile = []  # nothing is left to decode
        return TRUNCATED_NOTE
    return None


def _supported_format(data: bytes) -> str:
    if not data:
        raise _RejectionError(ErrorType.EMPTY, "The file is empty; copy or download it again.")
    name = _format_name(data)
    if name in OPENERS:
        return name
    found = f"This is a {name} file" if name else "This is no image format known to batchcap"
    raise _RejectionError(
        ErrorType.UNSUPPORTED_FORMAT, f"{found}; JPEG, PNG, BMP, GIF and WebP are read, convert it."
    )


def _format_name(data: bytes) -> str:
    """The format by its first bytes, whatever the extension says; empty if none is known."""
    matches = (name for offset, magic, name in SIGNATURES if data.startswith(magic, offset))
    return next(matches, "")


def _check_pixel_count(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise _RejectionError(
            ErrorType.TOO_LARGE,
            f"The photo has {width:,} x {height:,} pixels; up to {max_pixels:,} are decoded, "
            "scale it down.",
        )


def _gif_size(data: bytes) -> tuple[int, int]:
    """Canvas or first frame, whichever is larger; the canvas where there is no frame.

    Pillow makes room for a frame's disposal when it opens the file, before it can be asked.
    """
    width, height = struct.unpack_from("<HH", data, 6)
    file = _PatientFile(data)
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
        raise _truncated()


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
    raise _too_many_parts()


def _ended_jpeg(data: bytes) -> bytes:
    """A cut JPEG with an end marker, for libjpeg to fill the rest; the zeros go that a download
    had reserved. One without a scan has no pixels to show.
    """
    kept = data.rstrip(b"\0")
    start = _jpeg_scan_start(kept)
    if not kept.startswith(JPEG_SCAN, start) or len(kept) <= start + JPEG_SCAN_HEADER_BYTES:
        raise _truncated()
    return kept + JPEG_END


def _check_png_chunks(data: bytes) -> None:
    """The chunks must reach to the end mark; of the pixels Pillow ignores the checksums."""
    position = 8
    for _ in range(MAX_PARTS):
        if position + 12 > len(data):
            raise _truncated()
        length, name = struct.unpack_from(">I4s", data, position)
        body_end = position + 8 + length
        checksum = zlib.crc32(memoryview(data)[position + 4 : body_end])
        if name == b"IDAT" and checksum != int.from_bytes(data[body_end : body_end + 4], "big"):
            raise _corrupt("PNG", "wrong checksum") if body_end + 4 <= len(data) else _truncated()
        if name == b"IEND":
            return
        position = body_end + 4
    raise _too_many_parts()


def _check_webp_length(data: bytes) -> None:
    if len(data) < _webp_length(data):
        raise _truncated()


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


def _truncated() -> _RejectionError:
    return _RejectionError(
        ErrorType.TRUNCATED, "The file ends before the photo does; copy or download it again."
    )


def _too_many_parts() -> _RejectionError:
    return _RejectionError(
        ErrorType.TOO_LARGE, f"The file has more than {MAX_PARTS:,} parts; save the photo again."
    )


def _corrupt(format_name: str, reason: str) -> _RejectionError:
    return _RejectionError(
        ErrorType.CORRUPT,
        f"The {format_name} data is damaged ({_one_line(reason)}); replace the file.",
    )


def _diagnosis(format_name: str, error: Exception, ends_early: bool) -> _RejectionError:
    if isinstance(error, MemoryError):
        return _RejectionError(
            ErrorType.TOO_LARGE, "Decoding the photo needs more memory than is free."
        )
    if isinstance(error, Image.DecompressionBombError):
        return _RejectionError(
            ErrorType.TOO_LARGE, "The photo has more pixels than Pillow decodes; scale it down."
        )
    if ends_early or _ran_out_of_data(error):
        return _truncated()
    return _corrupt(format_name, str(error) or type(error).__name__)


def _ran_out_of_data(error: Exception) -> bool:
    """Whether Pillow met the end of the file; opening hides the first exception as the cause."""
    if isinstance(error.__cause__ or error, EOFError | IndexError | struct.error):
        return True
    message = str(error).lower()
    return "truncated" in message or "not enough image data" in message


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)[:120].strip()


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # malformed EXIF raises nearly anything and is no reason to refuse a photo
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    """Turn the small square rather than the photo: squashing and turning commute."""
    method = TRANSPOSE_BY_ORIENTATION.get(orientation)
    return image if method is None else image.transpose(method)


def _upright_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    width, height = size
    return (height, width) if orientation in (5, 6, 7, 8) else (width, height)


def _lacks_png_rows(image: Image.Image, data: bytes) -> bool:
    """Whether the compressed pixels of a PNG end, properly, before its last row.

    Pillow takes that for a whole photo and leaves the rest zero, so that only one with such a row
    need be unpacked again. Interlaced, the last of all rows is the last odd one.
    """
    width, height = image.size
    ends = [image.crop((0, row, width, row + 1)) for row in {height - 1, max(height - 2, 0)}]
    if all(np.asarray(end).any() for end in ends):
        return False
    unpacker, lacking = zlib.decompressobj(), _png_bytes(width, height, data)
    for piece in _png_pixel_pieces(data):
        lacking -= len(unpacker.decompress(piece))
        if lacking <= 0:
            return False
    return True


def _png_bytes(width: int, height: int, data: bytes) -> int:
    """How long the unpacked pixels of a whole PNG are: of each row, its filter and its samples."""
    bit_depth, colour_type, interlaced = data[24], data[25], data[28]
    bits = bit_depth * PNG_CHANNELS[colour_type]
    passes = PNG_PASSES if interlaced else ((0, 0, 1, 1),)
    counts = [
        (-(-(width - left) // across), -(-(height - top) // down))
        for left, top, across, down in passes
    ]
    return sum(rows * (1 + -(-columns * bits // 8)) for columns, rows in counts if columns > 0)


def _png_pixel_pieces(data: bytes) -> Iterator[bytes]:
    """The compressed pixels, in pieces so small that none unpacks to much."""
    position = 8
    while position + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, position)
        start, end = position + 8, position + 8 + length
        if name == b"IDAT":
            yield from (data[i : min(i + PNG_PIECE, end)] for i in range(start, end, PNG_PIECE))
        position = end + 4


def _match_transparent_colour(image: Image.Image, bit_depth: int) -> None:
    """Scale a PNG's transparent colour to the 8 bits to which Pillow scaled only the pixels."""
    colour = image.info.get("transparency")
    if image.mode == "L" and isinstance(colour, int):
        image.info["transparency"] = _eight_bit_sample(colour, bit_depth)
    elif image.mode == "RGB" and isinstance(colour, tuple):
        image.info["transparency"] = tuple(_eight_bit_sample(c, bit_depth) for c in colour)


def _eight_bit_sample(sample: int, bit_depth: int) -> int:
    return sample >> 8 if bit_depth == 16 else sample * 255 // (2**bit_depth - 1)


def _as_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, transparency composited on white."""
    if image.mode.startswith("I;16"):
        image = _eight_bit_grey(image)
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    rgba = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(rgba, mask=rgba)
    return white


def _eight_bit_grey(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey, which Pillow's own `convert` clips; a transparent level becomes alpha."""
    samples = np.asarray(image)
    grey = Image.fromarray((samples >> 8).astype(np.uint8))
    transparent_level = image.info.get("transparency")
    if transparent_level is not None:
        alpha = np.where(samples == transparent_level, 0, 255).astype(np.uint8)
        grey.putalpha(Image.fromarray(alpha))
    return grey


def _squashed(image: Image.Image, image_size: int) -> Image.Image:
    if image.size == (image_size, image_size):
        return image
    return image.resize((image_size, image_size), Image.Resampling.BILINEAR)
