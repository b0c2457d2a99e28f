"""The chunks of a WebP, before a decoder sees them."""

import re
import struct
from collections.abc import Iterator

from batchcap.photos.rejections import MAX_PARTS, too_many_parts, truncated

CHUNKS_START = 12  # after RIFF, the length and WEBP
FRAME_BODY = 8  # after the name and length of a chunk
PIXEL_CHUNKS = {b"VP8 ", b"VP8L", b"ANMF"}
KEPT_CHUNKS = {b"VP8X", b"ANIM", b"ALPH", b"EXIF", *PIXEL_CHUNKS}
FIRST_OF_PIXELS = re.compile(rb"ANIM|ALPH|VP8[ L]")
ANIMATION, EXIF, ALPHA = 0x02, 0x08, 0x10  # flags of VP8X


def size(data: bytes) -> tuple[int, int]:
    """Return the size of the canvas, which libwebp allocates on opening; (0, 0) if unknown."""
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


def check_end(data: bytes) -> None:
    """Raise if the (first) picture is cut, whatever length the file claims."""
    for name, _, end in _chunks(data):
        if name in PIXEL_CHUNKS:
            if end > len(data):
                break
            return
    else:
        if len(data) >= _claimed_length(data):  # the decoder reports what is wrong
            return
    raise truncated()


def first_frame(data: bytes) -> tuple[int, int, int, int] | None:
    """Return left, top, right and bottom of an animation's first frame; None if there is none."""
    for name, start, end in _chunks(data):
        if name == b"ANMF" and start + FRAME_BODY + 12 <= min(end, len(data)):
            left, top, width, height = (
                int.from_bytes(data[place : place + 3], "little")
                for place in range(start + FRAME_BODY, start + FRAME_BODY + 12, 3)
            )
            return 2 * left, 2 * top, 2 * left + width + 1, 2 * top + height + 1
    return None


def filled(data: bytes) -> bytes:
    """Pad a cut WebP with zeros, which libwebp reads at the end of its data anyway.

    By no more than its pixels take uncompressed, whatever length the header claims.
    """
    width, height = size(data)
    return data.ljust(min(_claimed_length(data), len(data) + 4 * width * height), b"\0")


def without_metadata(data: bytes) -> bytes:
    """Keep complete pixel chunks, and EXIF for the orientation, and correct the file's length."""
    places = list(_chunks(data))
    if not any(name in PIXEL_CHUNKS for name, *_ in places):  # a profile's length is wrong
        found = FIRST_OF_PIXELS.search(data, CHUNKS_START)
        places = places[:1] + list(_chunks(data, found.start())) if found else places
    whole = [(name, data[start:end]) for name, start, end in places if end <= len(data)]
    kept = [
        _with_flags(chunk, {name for name, _ in whole}) if name == b"VP8X" else chunk
        for name, chunk in whole
        if name in KEPT_CHUNKS
    ]
    body = b"WEBP" + b"".join(chunk + b"\0" * (len(chunk) % 2) for chunk in kept)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _with_flags(chunk: bytes, names: set[bytes]) -> bytes:
    flags = chunk[8] & (ANIMATION | ALPHA | (EXIF if b"EXIF" in names else 0))
    return chunk[:8] + bytes([flags]) + chunk[9:]


def _claimed_length(data: bytes) -> int:
    return 8 + int.from_bytes(data[4:8], "little")


def _chunks(data: bytes, position: int = CHUNKS_START) -> Iterator[tuple[bytes, int, int]]:
    """Yield (name, start, end) of each chunk that begins in the file."""
    for _ in range(MAX_PARTS):
        if position + 8 > len(data):
            return
        name, length = struct.unpack_from("<4sI", data, position)
        end = position + 8 + length
        yield name, position, end
        position = end + length % 2
    raise too_many_parts()
