"""The chunks of a PNG, before a decoder sees them."""

import struct
import zlib
from collections.abc import Iterator

from batchcap.photos.rejections import MAX_PARTS, corrupt, too_many_parts, truncated

CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
# Adam7: (first column, first row, columns between, rows between).
PASSES = (
    *((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)),
    *((0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)),
)
PIECE = 1 << 14
SIGNATURE_BYTES, HEADER_NAME, HEADER_BODY, HEADER_END = 8, 12, 16, 29
PIXEL_CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
USEFUL_CHUNKS = {b"eXIf", b"acTL", b"fcTL", b"fdAT"}  # orientation and animation


def size(data: bytes) -> tuple[int, int]:
    """Return (width, height); (0, 0) if the header is missing or damaged."""
    header = data[HEADER_NAME:HEADER_END]
    checksum = zlib.crc32(header).to_bytes(4, "big")
    if not header.startswith(b"IHDR") or not data.startswith(checksum, HEADER_END):
        return 0, 0
    width, height = struct.unpack_from(">II", data, HEADER_BODY)
    return width, height


def check_chunks(data: bytes) -> None:
    """Raise if pixels are missing or damaged: Pillow ignores their checksums.

    The end mark may be missing.
    """
    for name, start, end in _chunks(data):
        if name == b"IEND":
            return
        if name == b"IDAT":
            if end > len(data):
                break
            if not _has_right_checksum(memoryview(data)[start:end]):
                raise corrupt("PNG", "wrong checksum")
    _check_pixels(data)


def _check_pixels(data: bytes) -> None:
    """Raise unless a PNG without an end mark has all its pixels."""
    try:
        is_cut = size(data) == (0, 0) or lacks_pixels(data)
    except (zlib.error, KeyError):
        is_cut = True
    if is_cut:
        raise truncated()


def lacks_pixels(data: bytes) -> bool:
    """Whether the compressed pixels end before the last row.

    Raises:
        KeyError: the header names a colour type that does not exist.
        zlib.error: the pixels are damaged.
    """
    unpacker, lacking = zlib.decompressobj(), _unpacked_bytes(data)
    for piece in _pixel_pieces(data):
        lacking -= len(unpacker.decompress(piece))
        if lacking <= 0:
            return False
    return True


def without_metadata(data: bytes) -> bytes:
    """Keep pixel chunks, and orientation and animation chunks with the right checksum."""
    kept = [data[:SIGNATURE_BYTES]]
    for name, start, end in _chunks(data):
        chunk = data[start:end]
        if name in PIXEL_CHUNKS or (name in USEFUL_CHUNKS and _has_right_checksum(chunk)):
            kept.append(chunk)
    return b"".join(kept)


def _unpacked_bytes(data: bytes) -> int:
    """Return the unpacked length of a whole PNG's pixels: a filter byte and samples per row."""
    header = struct.unpack_from(">IIBBBBB", data, HEADER_BODY)
    width, height, bit_depth, colour_type, *_, interlaced = header
    bits = bit_depth * CHANNELS[colour_type]
    passes = PASSES if interlaced else ((0, 0, 1, 1),)
    counts = [
        (-(-(width - left) // across), -(-(height - top) // down))
        for left, top, across, down in passes
    ]
    return sum(rows * (1 + -(-columns * bits // 8)) for columns, rows in counts if columns > 0)


def _pixel_pieces(data: bytes) -> Iterator[bytes]:
    """Yield the compressed pixels, in pieces so small that none unpacks to much."""
    for name, start, end in _chunks(data):
        if name == b"IDAT":
            body_end = end - 4
            yield from (
                data[i : min(i + PIECE, body_end)] for i in range(start + 8, body_end, PIECE)
            )


def _has_right_checksum(chunk: bytes | memoryview) -> bool:
    return zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield (name, start, end) of each chunk that begins in the file, up to the end mark."""
    position = SIGNATURE_BYTES
    for _ in range(MAX_PARTS):
        if position + 12 > len(data):
            return
        length, name = struct.unpack_from(">I4s", data, position)
        start, position = position, position + 12 + length
        yield name, start, position
        if name == b"IEND":
            return
    raise too_many_parts()
