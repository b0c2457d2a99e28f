"""Helpers of the image tests."""

import io
import re
import struct
import zlib

import numpy as np
from PIL import Image

from batchcap.schema import ErrorType, LoadedImage, Rejection

RED, GREEN, BLUE, WHITE, BLACK = (
    (255, 0, 0),
    (0, 255, 0),
    (0, 0, 255),
    (255, 255, 255),
    (0, 0, 0),
)


QUADRANTS = np.array([[RED, GREEN], [BLUE, WHITE]], dtype=np.uint8)


def encoded(image: Image.Image, format_name: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def texture(width: int = 96, height: int = 64) -> Image.Image:
    noise = np.random.default_rng(3).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def samples() -> dict[str, bytes]:
    photo = texture()
    turned = photo.rotate(180)
    return {
        "JPEG": encoded(photo, "JPEG"),
        "progressive JPEG": encoded(photo, "JPEG", progressive=True),
        "MPO": encoded(photo, "MPO", save_all=True, append_images=[turned]),
        "PNG": encoded(photo, "PNG"),
        "palette PNG": encoded(photo.convert("P"), "PNG"),
        "BMP": encoded(photo, "BMP"),
        "palette BMP": encoded(photo.convert("P"), "BMP"),
        "1-bit BMP": encoded(photo.convert("1"), "BMP"),
        "GIF": encoded(photo.convert("P"), "GIF"),
        "animated GIF": encoded(photo, "GIF", save_all=True, append_images=[turned]),
        "WebP": encoded(photo, "WEBP"),
        "lossless WebP": encoded(photo, "WEBP", lossless=True),
        "animated WebP": encoded(photo, "WEBP", save_all=True, append_images=[turned]),
        "TIFF": encoded(photo, "TIFF"),
        "packed TIFF": encoded(photo, "TIFF", compression="tiff_lzw"),
        "AVIF": encoded(photo, "AVIF"),
        "animated AVIF": encoded(photo, "AVIF", save_all=True, append_images=[turned]),
    }


SAMPLES = samples()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, depth: int, colour_type: int, rows: bytes, *extra: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    chunks = (chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(rows)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b"")


def bmp(
    width: int,
    height: int,
    bits: int,
    body: bytes,
    palette: bytes = b"",
    compression: int = 0,
    masks: bytes = b"",
) -> bytes:
    """A BMP with a 40-byte header, or with 108 bytes where colour masks are given."""
    header_size = 108 if masks else 40
    offset = 14 + header_size + len(palette)
    fields = (header_size, width, height, 1, bits, compression, len(body), 0, 0, len(palette) // 4)
    header = struct.pack("<IiiHHIIiiII", *fields, 0) + masks.ljust(header_size - 40, b"\0")
    return b"BM" + struct.pack("<IHHI", offset + len(body), 0, 0, offset) + header + palette + body


def bgr0(*colours: tuple[int, int, int]) -> bytes:
    return b"".join(bytes((b, g, r, 0)) for r, g, b in colours)


def assert_rejected(loaded: LoadedImage, error_type: ErrorType) -> Rejection:
    assert isinstance(loaded.pixels, Rejection)
    assert loaded.pixels.error_type is error_type
    assert re.fullmatch(r"[A-Z][ -~]+\.", loaded.pixels.message)
    return loaded.pixels


def assert_pixels(loaded: LoadedImage, expected) -> None:
    assert isinstance(loaded.pixels, np.ndarray), loaded.pixels
    np.testing.assert_array_equal(loaded.pixels, np.array(expected))


ANIMATIONS = {"GIF": {}, "PNG": {}, "WEBP": {"lossless": True}, "AVIF": {"quality": 100}}


def animation(format_name: str, *frames: Image.Image) -> bytes:
    options = {"save_all": True, "append_images": frames[1:], "duration": 100}
    return encoded(frames[0], format_name, **options, **ANIMATIONS[format_name])


def after(start: bytes, data: bytes, inserted: bytes) -> bytes:
    position = data.index(start) + len(start)
    return data[:position] + inserted + data[position:]
