"""The segments and scans of a JPEG, before a decoder sees them.

A JPEG is a header of segments, then scans: each a segment and the coded pixels after it. An end
mark follows the last scan. Phones and cameras append further files, and some omit the mark.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from batchcap.photos.rejections import MAX_PARTS, too_many_parts, truncated

START, SCAN, END = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"
# An escaped 0xff, TEM, RST0 to RST7, SOI: no length follows them.
WITHOUT_LENGTH = frozenset((0x00, 0x01, *range(0xD0, 0xD9)))
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
PROGRESSIVE_FRAMES = frozenset((0xC2, 0xC6, 0xCA, 0xCE))
BETWEEN_SCANS = frozenset((0xC4, 0xCC, 0xDA, 0xDB, 0xDC, 0xDD, *range(0xE0, 0xF0), 0xFE))
SCAN_HEADER_BYTES = 8  # of the shortest, with one component
# A marker that ends coded pixels, so no escaped 0xff, RST0 to RST7 or fill byte.
MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
HEADER_MARKER = re.compile(rb"\xff([\xc0-\xcf\xd8\xda-\xdf\xe0-\xef\xfe])")
RESTART = re.compile(rb"\xff([\xd0-\xd7])")
NOISE = bytes(89 * number % 251 for number in range(1, 128))  # without 0 and 0xff
# APP1 to APP13, APP15 and comments. APP0 and APP14 affect the colours.
METADATA = frozenset((*range(0xE1, 0xEE), 0xEF, 0xFE))
BLOCK = range(64)  # the coefficients of 8 x 8 pixels


@dataclass(frozen=True)
class Scans:
    """The coded pixels of a JPEG: their end, whether an end mark is there, and all pixels."""

    end: int
    has_end_mark: bool
    are_complete: bool


def check_end(data: bytes) -> None:
    """Raise unless an end mark follows the scans: Pillow decodes a tail of zeros to grey."""
    start = first_scan(data)
    if data.startswith(SCAN, start):
        has_end_mark = scans(data).has_end_mark
    else:  # the decoder reports what is wrong
        has_end_mark = data.find(END, start) != -1
    if not has_end_mark:
        raise truncated()


def first_scan(data: bytes) -> int:
    """Return the position of the first scan's marker, or of the first non-marker before it."""
    return max(_header_markers(data))


def scans(data: bytes) -> Scans:
    """Walk the scans as a decoder does.

    Without an end mark, the pixels end at the first marker after the scan that completes them: the
    rest is not part of the photo.
    """
    missing, is_progressive = _coefficients(data)
    end, position = None, first_scan(data)
    for _ in range(MAX_PARTS):
        if data.startswith(SCAN, position):
            missing -= _coefficients_of_scan(data, position, is_progressive)
        marker = MARKER.search(data, _segment_end(data, position))
        position = marker.start() if marker else len(data)
        if end is None and not missing:
            end = position
        if marker is not None and marker[0] == END:
            return Scans(position, True, not missing)
        if marker is None or marker[1][0] not in BETWEEN_SCANS:
            return Scans(position if end is None else end, False, not missing)
    raise too_many_parts()


def has_all_scans(data: bytes) -> bool:
    """Whether there is a scan, and none is missing as far as the scans' headers tell."""
    return data.startswith(SCAN, first_scan(data)) and scans(data).are_complete


def fillings(data: bytes) -> list[bytes]:
    """Return bytes to append to coded pixels, to see if they need more: none, noise, its inverse.

    With restarts, also both after the next restart mark: a decoder skips to it.
    """
    coded = data[: scans(data).end]
    marks = RESTART.findall(coded, coded.rfind(SCAN))
    noises = [NOISE, bytes(255 - byte for byte in NOISE)]
    if marks:
        mark = bytes((0xFF, 0xD0 | (marks[-1][0] + 1) & 7))
        noises += [mark + noise for noise in noises]
    return [b"", *noises]


def ended(data: bytes, filling: bytes = b"") -> bytes:
    """Insert `filling` and an end mark, which the JPEG lacks, where its coded pixels end.

    Drops half a mark, and the zeros of a preallocated download. Raises RejectionError if there is
    no scan, and so no pixel to show.
    """
    start = first_scan(data)
    if not data.startswith(SCAN, start):
        raise truncated()
    coded = data[: scans(data).end]
    kept = coded.rstrip(b"\0")
    if kept.endswith(b"\xff"):
        kept = kept + b"\0" if len(kept) < len(coded) else kept.rstrip(b"\xff")
    if len(kept) <= start + SCAN_HEADER_BYTES:
        raise truncated()
    return kept + filling + END


def without_metadata(data: bytes) -> bytes:
    """Drop EXIF, XMP, profiles and comments, whatever lengths they claim.

    A JPEG in which another begins before the first scan is returned unchanged: the scan may be that
    of a preview.
    """
    kept, position = [START], 2
    for _ in range(MAX_PARTS):
        marker = HEADER_MARKER.search(data, position)
        if marker is None or marker[0] == START:
            return data
        if marker[0] == SCAN:
            return b"".join([*kept, data[marker.start() :]])
        position = _segment_end(data, marker.start())
        if marker[1][0] not in METADATA:
            kept.append(data[marker.start() : position])
        elif not data.startswith(b"\xff", position):  # a wrong length
            position = marker.end()
    return data


def _header_markers(data: bytes) -> Iterator[int]:
    """Yield the positions of the markers up to the first scan or non-marker, inclusive."""
    position = 2
    for _ in range(MAX_PARTS):
        yield position
        if not data.startswith(b"\xff", position) or data.startswith(SCAN, position):
            return
        if data.startswith(b"\xff\xff", position):  # a fill byte, which may precede any marker
            position += 1
        elif data[position + 1 : position + 2] and data[position + 1] in WITHOUT_LENGTH:
            position += 2
        else:
            position = _segment_end(data, position)
    raise too_many_parts()


def _segment_end(data: bytes, position: int) -> int:
    return position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")


def _coefficients(data: bytes) -> tuple[set[tuple[int, int]], bool]:
    """Return the (component, number) of each coefficient needed, and whether progressive."""
    for position in _header_markers(data):
        frame = data[position : _segment_end(data, position)]
        if len(frame) > 10 and frame[1] in FRAMES:
            components = frame[10 : 10 + 3 * frame[9] : 3]
            needed = {(component, number) for component in components for number in BLOCK}
            return needed, frame[1] in PROGRESSIVE_FRAMES
    return set(), False


def _coefficients_of_scan(data: bytes, position: int, is_progressive: bool) -> set[tuple[int, int]]:
    """Return the coefficients that a scan completes."""
    header = data[position : _segment_end(data, position)]
    count = header[4] if len(header) > 4 else 0
    if len(header) < 8 + 2 * count:
        return set()
    components = header[5 : 5 + 2 * count : 2]
    first, last, bits = header[5 + 2 * count : 8 + 2 * count]
    if not is_progressive:
        numbers = BLOCK
    elif bits & 15:  # lower bits follow in a later scan
        return set()
    else:
        numbers = range(first, last + 1)
    return {(component, number) for component in components for number in numbers}
