"""The first directory of a TIFF, before a decoder sees it. Camera raw files look like a TIFF."""

import contextlib
import struct
from collections.abc import Iterator
from typing import NamedTuple

from batchcap.photos.rejections import MAX_PARTS, RejectionError, too_many_parts, truncated
from batchcap.schema import ErrorType

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC = 256, 257, 258, 259, 262
STRIP_OFFSETS, STRIP_BYTES, TILE_WIDTH, TILE_HEIGHT = 273, 279, 322, 323
TILE_OFFSETS, TILE_BYTES, SUB_DIRECTORIES, SUBFILE_TYPE, DNG_VERSION = 324, 325, 330, 254, 50706
PALETTE, JPEG_TABLES = 320, 347
# Tags of pixels and orientation; all others are metadata.
PIXEL_TAGS = frozenset(
    (
        *(WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, 266, STRIP_OFFSETS, 274, 277, 278),
        *(STRIP_BYTES, 284, 292, 293, 317, PALETTE, TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS),
        *(TILE_BYTES, 332, 338, 339, JPEG_TABLES, 512, 513, 514, 515, 517, 518, 519, 520, 521),
        *(529, 530, 531, 532),
    )
)
# Tags of these whose values may be far from the directory.
NEEDED_TAGS = frozenset(
    (BITS, PALETTE, JPEG_TABLES, STRIP_OFFSETS, STRIP_BYTES, TILE_OFFSETS, TILE_BYTES)
)
REDUCED = 1  # a subfile type: a preview of another picture
NO_COMPRESSION = 1
# CCITT, LZW, JPEG, deflate, PackBits, LZMA, Zstandard: what Pillow's libtiff decodes.
COMPRESSIONS = frozenset((1, 2, 3, 4, 5, 6, 7, 8, 32771, 32773, 32946, 34925, 50000))
SENSOR = frozenset((32803, 34892))  # photometric: one colour per pixel, or linear
SENSOR_COMPRESSIONS = frozenset((32767, 32769, 32770, 34713, 65535))
MAX_SUB_DIRECTORIES = 16

# Extensions decide where the directory does not.
RAW_EXTENSIONS = frozenset(
    (
        *("3fr", "arw", "cr2", "cr3", "crw", "dcr", "dng", "erf", "fff", "iiq", "kdc", "mef"),
        *("mos", "mrw", "nef", "nrw", "orf", "pef", "raf", "rw2", "rwl", "sr2", "srf", "srw"),
        "x3f",
    )
)

NUMBERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I", 16: "Q", 17: "q", 18: "Q"}
TYPE_SIZES = {2: 1, 5: 8, 7: 1, 10: 8, 11: 4, 12: 8} | {
    kind: struct.calcsize(f"={letter}") for kind, letter in NUMBERS.items()
}


class Layout(NamedTuple):
    """How a file encodes directories: byte order; `struct` letters of offset, length and entry."""

    order: str
    offset: str
    length: str
    entry: str


class Entry(NamedTuple):
    """One tag: its type, the number of values, their place, and the bytes of the entry itself."""

    kind: int
    number: int
    place: int
    encoded: bytes


Directory = dict[int, Entry]


def is_raw(data: bytes, extension: str) -> bool:
    """Whether a file that looks like a TIFF is a camera raw file, which holds previews.

    `extension` is lower case, without a dot.
    """
    if data[8:10] == b"CR" or extension in RAW_EXTENSIONS:
        return True
    try:
        first = _directory(data, _first_place(data))
    except struct.error:  # cut or damaged, as `check_pixels` reports
        return False
    has_others = SUB_DIRECTORIES in first
    is_preview = bool(_value(data, first, SUBFILE_TYPE) & REDUCED)
    return (
        DNG_VERSION in first
        or (has_others and is_preview)
        or any(
            _value(data, directory, PHOTOMETRIC) in SENSOR
            or _value(data, directory, COMPRESSION) in SENSOR_COMPRESSIONS
            for directory in (first, *_sub_directories(data, first))
        )
    )


def size(data: bytes) -> tuple[int, int]:
    """Return the size of the first picture or of its tiles; decoders allocate the larger.

    (0, 0) if unknown.
    """
    try:
        tags = _directory(data, _first_place(data))
        width, height, tile_width, tile_height = (
            _value(data, tags, tag) for tag in (WIDTH, HEIGHT, TILE_WIDTH, TILE_HEIGHT)
        )
    except struct.error:
        return 0, 0
    return max(width, tile_width), max(height, tile_height)


def check_pixels(data: bytes) -> None:
    """Raise if a strip or tile of the first picture is missing, or its compression is unsupported.

    Decompressors make up missing pixels. Without compression, Pillow notices them.
    """
    try:
        tags = _directory(data, _first_place(data))
    except struct.error as error:
        raise truncated() from error
    compression = _value(data, tags, COMPRESSION) or NO_COMPRESSION
    if compression not in COMPRESSIONS:
        raise RejectionError(
            ErrorType.UNSUPPORTED_FORMAT,
            f"This is a TIFF file with the unsupported compression {compression}; save it with "
            "another one, or convert it to PNG.",
        )
    if any(_end(tags[tag]) > len(data) for tag in NEEDED_TAGS & tags.keys()):
        raise truncated()
    if compression == NO_COMPRESSION:
        return
    for offsets, counts in ((STRIP_OFFSETS, STRIP_BYTES), (TILE_OFFSETS, TILE_BYTES)):
        pairs = zip(_values(data, tags, offsets), _values(data, tags, counts), strict=False)
        if any(offset + count > len(data) for offset, count in pairs):
            raise truncated()


def without_metadata(data: bytes) -> bytes:
    """Return the same bytes, with only `PIXEL_TAGS` in the first directory."""
    layout = _layout(data)
    try:
        place = _first_place(data)
        tags = _directory(data, place)
    except struct.error:
        return data
    kept = [entry.encoded for tag, entry in sorted(tags.items()) if tag in PIXEL_TAGS]
    length = struct.pack(layout.order + layout.length, len(kept))
    no_other_picture = bytes(struct.calcsize(f"={layout.offset}"))
    directory = b"".join((length, *kept, no_other_picture))
    return data[:place] + directory + data[place + len(directory) :]


def _layout(data: bytes) -> Layout:
    order = "<" if data.startswith(b"II") else ">"
    is_big = data[2:4] in (b"+\0", b"\0+")
    return Layout(order, *(("Q", "Q", "HHQ8s") if is_big else ("I", "H", "HHI4s")))


def _first_place(data: bytes) -> int:
    layout = _layout(data)
    start = 4 if layout.offset == "I" else 8
    place: int = struct.unpack_from(layout.order + layout.offset, data, start)[0]
    return place


def _directory(data: bytes, place: int) -> Directory:
    """Return the directory at a place; raise struct.error if the file ends within it."""
    order, offset_letter, length_letter, entry_letters = _layout(data)
    if place > len(data):
        raise struct.error("there is no directory")
    (count,) = struct.unpack_from(order + length_letter, data, place)
    start = place + struct.calcsize(f"={length_letter}")
    length = struct.calcsize(f"={entry_letters}")
    if start + count * length > len(data):
        raise struct.error("the directory is cut")
    if count > MAX_PARTS:
        raise too_many_parts()
    directory: Directory = {}
    for position in range(start, start + count * length, length):
        tag, kind, number, value = struct.unpack_from(order + entry_letters, data, position)
        if (tag in PIXEL_TAGS or tag == SUB_DIRECTORIES) and kind in NUMBERS and number > MAX_PARTS:
            raise too_many_parts()
        value_place = position + length - len(value)
        if number * TYPE_SIZES.get(kind, 1) > len(value):
            (value_place,) = struct.unpack(order + offset_letter, value)
        directory[tag] = Entry(kind, number, value_place, data[position : position + length])
    return directory


def _sub_directories(data: bytes, directory: Directory) -> Iterator[Directory]:
    for place in _values(data, directory, SUB_DIRECTORIES)[:MAX_SUB_DIRECTORIES]:
        with contextlib.suppress(struct.error):
            yield _directory(data, place)


def _values(data: bytes, directory: Directory, tag: int) -> tuple[int, ...]:
    """Return the integers of a tag; none if it is missing, of another type, or beyond the end."""
    entry = directory.get(tag)
    if entry is None or entry.kind not in NUMBERS:
        return ()
    letters = f"{_layout(data).order}{entry.number}{NUMBERS[entry.kind]}"
    if _end(entry) > len(data):
        return ()
    return struct.unpack_from(letters, data, entry.place)


def _end(entry: Entry) -> int:
    return entry.place + entry.number * TYPE_SIZES.get(entry.kind, 1)


def _value(data: bytes, directory: Directory, tag: int) -> int:
    return next(iter(_values(data, directory, tag)), 0)
