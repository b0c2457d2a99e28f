"""One photo file to pixels: read once, decoded from memory by Pillow, or rejected with a reason.

Any file gives a `LoadedImage`, never an exception, and never pixels that a decoder made up, unless
truncated files are accepted. Knows neither jobs nor networks, and leaves Pillow's global settings
alone.
"""

import contextlib
import io
import os
import stat
import struct
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from batchcap.errors import UsageError
from batchcap.photos import jpeg, png, webp
from batchcap.photos.formats import (
    BOXED_FORMATS,
    END_CHECKS,
    HEADER_SIZES,
    MENDERS,
    WITHOUT_METADATA,
    ends_within_box,
    format_name_of,
)
from batchcap.photos.pixels import (
    is_invisible,
    match_transparent_colour,
    small_rgb,
    with_white_around,
)
from batchcap.photos.rejections import (
    PatientFile,
    RejectionError,
    corrupt,
    one_line,
    truncated,
)
from batchcap.schema import ErrorType, ImageRef, LoadedImage, Rejection, int64_or_none, sha256_of
from batchcap.settings import MAX_PIXELS
from batchcap.storage.remote import describe, is_url, read_file

MAX_FILE_BYTES = 1 << 30  # a photo of MAX_PIXELS fits uncompressed; a film named .jpg does not
READ_ATTEMPTS = 2
# File systems take times from the kernel's clock, whose tick is up to 10 ms: two writes within one
# get the same time.
CLOCK_TICK_S = 0.01

# Damaged metadata rejects no photo, and cron mails whatever a run prints on stderr.
warnings.filterwarnings("ignore", module=r"PIL\.")

# Classes, because Image.open would apply Pillow's own pixel limit. The JPEG class reads an MPO as
# the JPEG it begins with.
OPENERS: dict[str, Callable[[IO[bytes]], ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
}
READ_FORMATS = "JPEG, PNG, BMP, GIF, WebP, TIFF or AVIF"

with contextlib.suppress(ImportError):  # the extra `heic`
    from pi_heif import HeifImageFile

    OPENERS["HEIC"] = HeifImageFile

STDERR = 2
STDERR_LOCK = threading.Lock()

UNSUPPORTED_TIFF_ERRORS = ("unknown pixel mode", "Invalid value for samples per pixel")
# libtiff returns samples in the machine's byte order; Pillow reads them in the file's.
MACHINE_ORDER = {"F;32BF": "F;32NF", "I;32BS": "I;32NS", "I;16BS": "I;16NS"}
ANIMATED_FORMATS = {"GIF", "PNG", "WebP", "AVIF"}
FRAMES_LOOKED_AT = 100

Resize = Callable[[Image.Image, int], Image.Image]
# `uint8[H, W, 3]`, the photo's upright (width, height), and a note if it is truncated.
Decoded = tuple[npt.NDArray[np.uint8], tuple[int, int], Rejection | None]
# A str is a path or a URL.
Source = ImageRef | str | os.PathLike[str]

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


MISSING_FILE = "There is no such file; it may have been moved or deleted meanwhile."
CHANGED_FILE = "The file changed while it was read; caption it when it is complete."
TRUNCATED_NOTE = Rejection(
    ErrorType.TRUNCATED,
    "The file ends before the photo does; only its beginning was captioned.",
)


@dataclass(frozen=True)
class LoadSettings:
    """How to load photos: the side of the square, and what to reject.

    `max_pixels` is compared with the header, before anything is decoded. `accept_truncated` accepts
    the beginning of a file that ends early: the rest is grey, black or whatever the format yields.
    """

    image_size: int
    max_pixels: int = MAX_PIXELS
    accept_truncated: bool = False


def load_image(source: Source, settings: LoadSettings) -> LoadedImage:
    """Read one file and resize its photo to a square of `settings.image_size` pixels a side (S).

    The pixels are `uint8[S, S, 3]`, RGB, contiguous: rotated by EXIF, composited on white, resized
    by antialiased bilinear without keeping the aspect ratio. An animation yields its first visible
    frame, a file of several pictures its first. No file raises; safe in several threads and
    processes.
    """
    return _load(source, settings, _squashed)


def load_thumbnail(source: Source, settings: LoadSettings) -> LoadedImage:
    """Load a photo with its aspect ratio kept: `settings.image_size` is the longer side.

    The pixels are `uint8[H, W, 3]`; a smaller photo keeps its size.
    """
    return _load(source, settings, _fitted)


def encode_webp(pixels: npt.NDArray[np.uint8], quality: int) -> bytes:
    """Return a small WebP file of `uint8[H, W, 3]`, RGB; `quality` is from 0 to 100."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", quality=quality)
    return buffer.getvalue()


def _load(source: Source, settings: LoadSettings, resize: Resize) -> LoadedImage:
    photo = source if isinstance(source, ImageRef) else ImageRef("", os.fspath(source))
    if isinstance(photo.data, Rejection):
        return LoadedImage(photo.data, photo.size, photo.mtime_ns)
    try:
        data, mtime_ns = (photo.data, photo.mtime_ns) if photo.data is not None else _read(photo)
    except RejectionError as error:
        return LoadedImage(error.rejection, error.file_size, int64_or_none(error.mtime_ns))
    sha256 = sha256_of(data)
    try:
        format_name = _supported_format(data, _extension(photo.path))
        pixels, (width, height), note = _decode(data, format_name, settings, resize)
    except RejectionError as error:
        return LoadedImage(error.rejection, len(data), mtime_ns, sha256)
    return LoadedImage(pixels, len(data), mtime_ns, sha256, width, height, note)


def _read(photo: ImageRef) -> tuple[bytes, int | None]:
    """Return a photo's bytes and modification time, if it has one."""
    return _read_url(photo.path) if is_url(photo.path) else _read_file(Path(photo.path))


def _read_url(url: str) -> tuple[bytes, int | None]:
    size_and_time: tuple[int | None, int | None] = None, None
    try:
        for _ in range(READ_ATTEMPTS):
            file = describe(url)
            size_and_time = file.size, file.mtime_ns
            _check_file_size(file.size or 0, file.mtime_ns)
            data = read_file(url)
            if file.size is None or len(data) == file.size:
                return data, file.mtime_ns
    except FileNotFoundError as error:
        raise RejectionError(ErrorType.MISSING, MISSING_FILE) from error
    except (OSError, UsageError) as error:
        reason = one_line(getattr(error, "strerror", None) or str(error))
        # Other failures may be temporary: without size and time, the next run tries again.
        is_permanent = isinstance(error, PermissionError)
        raise RejectionError(
            ErrorType.UNREADABLE,
            f"The file cannot be read ({reason}); check the store and your access to it.",
            *(size_and_time if is_permanent else (None, None)),
        ) from error
    raise RejectionError(ErrorType.CHANGED, CHANGED_FILE)


def _read_file(path: Path) -> tuple[bytes, int | None]:
    """Return a file's bytes and the modification time of these bytes, if 64 bits hold it."""
    status = None
    try:
        status = path.stat()
        _check_readable_kind(status)  # before opening, which may affect a device
        for _ in range(READ_ATTEMPTS):
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
            with os.fdopen(descriptor, "rb") as file:
                status = os.fstat(descriptor)
                _check_readable_kind(status)
                data = _read_unless_it_changes(file, opened=status)
            if data is not None:
                return data, int64_or_none(status.st_mtime_ns)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: NUL in name
        raise RejectionError(ErrorType.MISSING, _missing_message(path)) from error
    except OSError as error:
        reason = one_line(error.strerror or type(error).__name__)
        raise RejectionError(
            ErrorType.UNREADABLE,
            f"The file cannot be read ({reason}); check its permissions and the disk.",
            *_size_and_time(status),
        ) from error
    except MemoryError as error:
        raise RejectionError(
            ErrorType.TOO_LARGE, "The file does not fit into memory.", *_size_and_time(status)
        ) from error
    raise RejectionError(ErrorType.CHANGED, CHANGED_FILE)


def _read_unless_it_changes(file: IO[bytes], opened: os.stat_result) -> bytes | None:
    """Return an open file's content; None if it changed since `opened`, its status on opening.

    A file written within the last clock tick is read after the tick: until then, a change may leave
    its time as it is.
    """
    if _is_fresh(opened):
        time.sleep(CLOCK_TICK_S)
    before = os.fstat(file.fileno())
    data = file.read(before.st_size + 1)  # one byte more shows growth; no limit may mean no end
    after = os.fstat(file.fileno())
    stamps = {(status.st_size, status.st_mtime_ns) for status in (opened, before, after)}
    return data if stamps == {(len(data), before.st_mtime_ns)} else None


def _is_fresh(status: os.stat_result) -> bool:
    return 0 <= time.time_ns() - status.st_mtime_ns < CLOCK_TICK_S * 1e9


def _check_readable_kind(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = FILE_KINDS.get(stat.S_IFMT(status.st_mode), "special file")
        raise RejectionError(
            ErrorType.NOT_A_FILE, f"This is a {kind}, not a photo file.", *_size_and_time(status)
        )
    _check_file_size(status.st_size, status.st_mtime_ns)


def _size_and_time(status: os.stat_result | None) -> tuple[int, int] | tuple[None, None]:
    return (None, None) if status is None else (status.st_size, status.st_mtime_ns)


def _check_file_size(size: int, mtime_ns: int | None) -> None:
    if size > MAX_FILE_BYTES:
        raise RejectionError(
            ErrorType.TOO_LARGE,
            f"The file has {size:,} bytes; the limit is {MAX_FILE_BYTES:,}.",
            size,
            mtime_ns,
        )


def _missing_message(path: Path) -> str:
    if path.is_symlink():
        return "This is a link to a file that does not exist."
    return MISSING_FILE


def _extension(path: str) -> str:
    """Return the extension of a file's name, lower case, without its dot."""
    return os.path.splitext(path)[1].removeprefix(".").lower()  # noqa: PTH122


def _decode(data: bytes, format_name: str, settings: LoadSettings, resize: Resize) -> Decoded:
    note = None
    try:
        if format_name in HEADER_SIZES:
            _check_pixel_count(*HEADER_SIZES[format_name](data), settings.max_pixels)
        data, note = _checked_end(data, format_name, settings)
        try:
            return _decode_pixels(data, format_name, note, settings, resize)
        except (RejectionError, MemoryError):  # metadata is not to blame
            raise
        except Exception:
            if format_name not in WITHOUT_METADATA:
                raise
            plain = WITHOUT_METADATA[format_name](data)
            if plain == data:
                raise
        return _decode_pixels(plain, format_name, note, settings, resize)
    except RejectionError:
        raise
    except Exception as error:  # Pillow has no common base class for what a damaged file raises
        is_cut = note is not None or (format_name in BOXED_FORMATS and ends_within_box(data))
        raise _diagnosis(format_name, error, is_cut) from error


def _decode_pixels(
    data: bytes, format_name: str, note: Rejection | None, settings: LoadSettings, resize: Resize
) -> Decoded:
    file = PatientFile(data)
    image = OPENERS[format_name](file)
    size = image.size
    _check_pixel_count(*size, settings.max_pixels)
    # A run-length encoded BMP is read pixel by pixel.
    file.reads_left += 3 * size[0] * size[1]
    # JPEG only: decode at 1/2, 1/4 or 1/8 scale, in a fraction of the time. At least twice the size
    # needed leaves work for our own filter.
    image.draft(None, (2 * settings.image_size, 2 * settings.image_size))
    _correct_byte_order(image)
    frame = _first_frame(image, format_name, data)
    note = _load_pixels(image, len(data), note, settings.accept_truncated)
    if format_name == "PNG":
        if note is None and _lacks_png_rows(image, data):
            if not settings.accept_truncated:
                raise truncated()
            note = TRUNCATED_NOTE
        low_bytes = partial(_low_bytes_of_png, data, note, settings)
        match_transparent_colour(image, data[24], low_bytes)
    orientation = _orientation(image)
    if format_name in ANIMATED_FORMATS:
        _go_to_visible_frame(image, settings.max_pixels)
    shown: Image.Image = image
    if frame is not None and image.tell() == 0:
        shown = with_white_around(image, frame)
    small = small_rgb(shown, lambda whole: resize(whole, settings.image_size))
    return np.array(_upright(small, orientation)), _upright_size(size, orientation), note


def _first_frame(
    image: ImageFile.ImageFile, format_name: str, data: bytes
) -> tuple[int, int, int, int] | None:
    """Return the area that the first frame draws, in formats where it may be smaller."""
    if format_name == "GIF" and image.tile:
        return image.tile[0].extents
    return webp.first_frame(data) if format_name == "WebP" else None


def _low_bytes_of_png(data: bytes, note: Rejection | None, settings: LoadSettings) -> Image.Image:
    """Return the low bytes of a PNG's 16-bit RGB samples; Pillow keeps the high ones only."""
    image = PngImagePlugin.PngImageFile(PatientFile(data))
    image.tile = [tile._replace(args="RGB;16L") for tile in image.tile]
    _load_pixels(image, len(data), note, settings.accept_truncated)
    return image


def _checked_end(
    data: bytes, format_name: str, settings: LoadSettings
) -> tuple[bytes, Rejection | None]:
    """Return the bytes to decode, and a note if they end early and were mended."""
    try:
        if format_name in END_CHECKS:
            END_CHECKS[format_name](data)
        return data, None
    except RejectionError as error:
        if error.rejection.error_type is not ErrorType.TRUNCATED:
            raise
        if format_name == "JPEG" and _is_whole_jpeg(data, settings.max_pixels):
            return jpeg.ended(data), None
        if not settings.accept_truncated:
            raise
    mend = MENDERS.get(format_name)
    return (mend(data) if mend else data), TRUNCATED_NOTE


def _is_whole_jpeg(data: bytes, max_pixels: int) -> bool:
    """Whether a JPEG without an end mark has all its pixels: none depends on what follows."""
    if not jpeg.has_all_scans(data):
        return False
    digests = set()
    for filling in jpeg.fillings(data):
        image = JpegImagePlugin.JpegImageFile(PatientFile(jpeg.ended(data, filling)))
        _check_pixel_count(*image.size, max_pixels)
        digests.add(sha256_of(image.tobytes()))
        if len(digests) > 1:
            return False
    return True


def _load_pixels(
    image: ImageFile.ImageFile, data_size: int, note: Rejection | None, accept_truncated: bool
) -> Rejection | None:
    """Decode; if the file ends early and that is accepted, keep the decoded part and return a note.

    Pillow's own switch for this affects all threads of the process. It isn't needed: when the data
    runs out, the image holds the part decoded so far.
    """
    has_begun = min((offset for _, _, offset, *_ in image.tile), default=0) < data_size
    try:
        with _silent_stderr() if _is_read_by_libtiff(image) else contextlib.nullcontext():
            image.load()
    except Exception as error:
        ends_early = note is not None or _ran_out_of_data(error)
        if not (accept_truncated and has_begun and ends_early):
            raise
        image.tile = []  # nothing is left to decode
        return TRUNCATED_NOTE
    return note


def _is_read_by_libtiff(image: ImageFile.ImageFile) -> bool:
    return any(tile[0] == "libtiff" for tile in image.tile)


def _correct_byte_order(image: ImageFile.ImageFile) -> None:
    """Make Pillow read big-endian samples of compressed TIFFs in the right byte order."""
    if _is_read_by_libtiff(image):
        (tile,) = image.tile
        assert isinstance(tile.args, tuple)
        raw_mode, *others = tile.args
        args = (MACHINE_ORDER.get(raw_mode, raw_mode), *others)
        image.tile = [tile._replace(args=args)]


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Discard libtiff's messages: failures raise anyway, and cron mails whatever is printed."""
    with STDERR_LOCK, contextlib.ExitStack() as undo:
        with contextlib.suppress(OSError):  # stderr may be closed
            kept = os.dup(STDERR)
            undo.callback(os.close, kept)
            undo.callback(os.dup2, kept, STDERR)
            with Path(os.devnull).open("wb") as nowhere:
                os.dup2(nowhere.fileno(), STDERR)
        yield


def _supported_format(data: bytes, extension: str) -> str:
    if not data:
        raise RejectionError(ErrorType.EMPTY, "The file is empty; copy or download it again.")
    name = format_name_of(data, extension)
    if name in OPENERS:
        return name
    if name == "HEIC":
        advice = "to read it, run pip install 'batchcap[heic]', then batchcap with --retry-failed"
    else:
        advice = f"convert it to {READ_FORMATS}"
    found = f"This is a {name} file" if name else "This is not an image format that batchcap knows"
    raise RejectionError(ErrorType.UNSUPPORTED_FORMAT, f"{found}; {advice}.")


def _check_pixel_count(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise RejectionError(
            ErrorType.TOO_LARGE,
            f"The photo has {width:,} x {height:,} pixels, more than the limit of {max_pixels:,}; "
            "scale it down.",
        )


def _diagnosis(format_name: str, error: Exception, ends_early: bool) -> RejectionError:
    if isinstance(error, MemoryError):
        return RejectionError(
            ErrorType.TOO_LARGE, "Decoding the photo needs more memory than is free."
        )
    if isinstance(error, Image.DecompressionBombError):
        return RejectionError(
            ErrorType.TOO_LARGE, "The photo has more pixels than Pillow decodes; scale it down."
        )
    if str(error) in UNSUPPORTED_TIFF_ERRORS:
        return RejectionError(
            ErrorType.UNSUPPORTED_FORMAT,
            "This kind of TIFF file is not supported; convert it to 8 bits per sample, or to PNG.",
        )
    if ends_early or _ran_out_of_data(error):
        return truncated()
    return corrupt(format_name, str(error) or type(error).__name__)


def _ran_out_of_data(error: Exception) -> bool:
    """Whether Pillow met the end of the file; on opening, that exception is only the cause."""
    if isinstance(error.__cause__ or error, EOFError | IndexError | struct.error):
        return True
    message = str(error).lower()
    return "truncated" in message or "not enough image data" in message


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # malformed EXIF raises nearly anything, and rejects no photo
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    """Rotate the small image rather than the photo: resizing and rotating commute."""
    method = TRANSPOSE_BY_ORIENTATION.get(orientation)
    return image if method is None else image.transpose(method)


def _upright_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    width, height = size
    return (height, width) if orientation in (5, 6, 7, 8) else (width, height)


def _lacks_png_rows(image: Image.Image, data: bytes) -> bool:
    """Whether the compressed pixels of a PNG end properly, but before its last row.

    Pillow accepts such a PNG and leaves the rest zero, so only a photo that ends in a zero row is
    unpacked again. In an interlaced PNG, the last odd row is decoded last.
    """
    width, height = image.size
    ends = [image.crop((0, row, width, row + 1)) for row in {height - 1, max(height - 2, 0)}]
    return not all(np.asarray(end).any() for end in ends) and png.lacks_pixels(data)


def _go_to_visible_frame(image: ImageFile.ImageFile, max_pixels: int) -> None:
    """Seek to the first frame that is not wholly transparent.

    Decodes up to `FRAMES_LOOKED_AT` further frames and `max_pixels` in all.
    """
    if not is_invisible(image):
        return
    frames = min(FRAMES_LOOKED_AT, max_pixels // (image.width * image.height))
    for number in range(1, frames + 1):
        try:
            image.seek(number)
        except EOFError:  # there are no more frames
            return
        _check_pixel_count(*image.size, max_pixels)
        image.load()
        if not is_invisible(image):
            return


def _squashed(image: Image.Image, image_size: int) -> Image.Image:
    if image.size == (image_size, image_size):
        return image
    return image.resize((image_size, image_size), Image.Resampling.BILINEAR)


def _fitted(image: Image.Image, longer_side: int) -> Image.Image:
    scale = longer_side / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(round(side * scale), 1) for side in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR)
