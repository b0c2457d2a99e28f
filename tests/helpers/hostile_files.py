"""A folder of hostile files, made from seeds, and the result expected of each.

Names and device nodes that the file system refuses are left out of both.
"""

import io
import os
import stat
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

Files = Iterator[tuple[str | bytes, bytes, str]]

EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "GIF": "gif", "BMP": "bmp", "WEBP": "webp"}


def make_hostile_tree(folder: Path) -> dict[str, str]:
    """Fill a folder; return the expected `error_type` by `image_id`, `ok` if there is none."""
    expected: dict[str, str] = {}
    for section in SECTIONS:
        place = folder / section.__name__.strip("_")
        place.mkdir(parents=True)
        for name, data, reason in section():
            image_id = f"{place.name}/{_escaped(name)}"
            if _write(os.fsencode(place), os.fsencode(name), data):
                expected[image_id] = reason
    return expected | _special_files(folder / "special") | _left_out(folder / "left_out")


def photo(seed: int, width: int = 96, height: int = 64) -> Image.Image:
    """Soft noise, RGB."""
    noise = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format_name: str, **options: object) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def _escaped(name: str | bytes) -> str:
    """The image id, made without the code under test."""
    text = name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else name
    return text.replace("\\", "\\\\") if isinstance(name, str) else text


def _write(place: bytes, name: bytes, data: bytes) -> bool:
    """Write a file, unless the file system refuses its name or has an equal one."""
    path = place + b"/" + name
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
    except (OSError, ValueError):
        return False
    return True


def _samples() -> dict[str, tuple[bytes, str]]:
    image = photo(1)
    return {
        "baseline": (encoded(image, "JPEG"), "jpg"),
        "progressive": (encoded(image, "JPEG", progressive=True), "jpg"),
        "true": (encoded(image, "PNG"), "png"),
        "palette": (encoded(image.convert("P"), "PNG"), "png"),
        "grey": (encoded(image.convert("L"), "PNG"), "png"),
        "table": (encoded(image.convert("P"), "GIF"), "gif"),
        "raw": (encoded(image, "BMP"), "bmp"),
        "packed": (encoded(image, "TIFF", compression="tiff_lzw"), "tif"),
        "coded": (encoded(image, "AVIF"), "avif"),
        "lossy": (encoded(image, "WEBP"), "webp"),
        "lossless": (encoded(image, "WEBP", lossless=True), "webp"),
    }


SAMPLES = _samples()


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def _png(width: int, height: int, pixels: bytes, *extra: bytes, depth: int = 8) -> bytes:
    """A grey PNG; `pixels` is the compressed stream."""
    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    chunks = (_chunk(b"IHDR", header), *extra, _chunk(b"IDAT", pixels), _chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _small_png(*extra: bytes) -> bytes:
    return _png(2, 2, zlib.compress(b"\0\x40\x80" * 2), *extra)


def _cut() -> Files:
    for name, (data, extension) in SAMPLES.items():
        for percent in (7, 13, 20, 27, 34, 41, 48, 55, 62, 69, 76, 83, 90, 95):
            yield f"{name}-{percent}.{extension}", data[: len(data) * percent // 100], "truncated"
        yield f"{name}-32-bytes.{extension}", data[:32], "truncated"
        if extension in ("jpg", "png"):  # only the end mark is cut
            yield f"{name}-all-but-one.{extension}", data[:-1], "ok"


def _reserved() -> Files:
    """Preallocated downloads that ended early."""
    for name, reason in (("baseline", "truncated"), ("true", "corrupt"), ("palette", "corrupt")):
        data, extension = SAMPLES[name]
        for percent in (45, 60, 80, 97):
            kept = data[: len(data) * percent // 100]
            yield f"{name}-{percent}.{extension}", kept.ljust(len(data), b"\0"), reason


def _flipped() -> Files:
    """One wrong bit that a checksum reveals: in a PNG's header, palette or pixels."""
    for name in ("true", "palette", "grey"):
        data, extension = SAMPLES[name]
        start = data.index(b"IDAT") + 4
        length = int.from_bytes(data[start - 8 : start - 4], "big")
        places = [16, 20, 24, *np.random.default_rng(7).integers(start, start + length, 17)]
        places += [data.index(b"PLTE") + 9] if name == "palette" else []
        for place in map(int, places):
            damaged = bytearray(data)
            damaged[place] ^= 1 << place % 8
            yield f"{name}-{place}.{extension}", bytes(damaged), "corrupt"


def _checksums() -> Files:
    data = SAMPLES["palette"][0]
    for name in (b"IHDR", b"PLTE", b"IDAT"):
        place = data.index(name)
        end = place + 4 + int.from_bytes(data[place - 4 : place], "big")
        wrong = data[:end] + bytes(4) + data[end + 4 :]
        yield f"{name.decode()}.png", wrong, "corrupt"
    yield "zlib.png", _png(2, 2, zlib.compress(b"\0\x40\x80" * 2)[:-4] + b"\1\2\3\4"), "corrupt"


def _broken() -> Files:
    """Damaged structure."""
    jpeg, png, bmp, webp = (SAMPLES[name][0] for name in ("baseline", "true", "raw", "lossless"))
    yield "no-pixels.png", png[:33] + _chunk(b"IEND", b""), "corrupt"
    yield "no-header.png", png[:8] + png[33:], "corrupt"
    yield "not-compressed.png", _png(2, 2, b"\0\x40\x80" * 2), "corrupt"
    yield "no-width.png", _png(0, 2, zlib.compress(bytes(6))), "corrupt"
    yield "too-few-rows.png", _png(64, 64, zlib.compress(bytes(65))), "truncated"
    yield "depth-3.png", _png(2, 2, zlib.compress(bytes(6)), depth=3), "corrupt"
    yield "bits-3.bmp", bmp[:28] + b"\3" + bmp[29:], "corrupt"
    yield "header-7.bmp", bmp[:14] + b"\7" + bmp[15:], "corrupt"
    yield "no-width.bmp", bmp[:18] + bytes(4) + bmp[22:], "corrupt"
    yield "compression-9.bmp", bmp[:30] + b"\t" + bmp[31:], "corrupt"
    yield "chunk.webp", webp[:12] + b"VPxx" + webp[16:], "corrupt"
    yield "signature.webp", webp[:20] + b"\0" + webp[21:], "corrupt"
    yield "no-scan.jpg", jpeg[: jpeg.index(b"\xff\xda")] + b"\xff\xd9", "truncated"
    yield "no-tables.jpg", b"\xff\xd8" + jpeg[jpeg.index(b"\xff\xc0") :], "corrupt"
    yield "two-ends.jpg", b"\xff\xd8\xff\xd9\xff\xd9", "truncated"


def _empty() -> Files:
    for extension in (*EXTENSIONS.values(), "jpeg", "JPG", "tiff", "heic", "avif", "psd", "ico"):
        yield f"nothing.{extension}", b"", "empty"


def _no_photos() -> Files:
    """Other formats under the names of photos."""
    others = {
        "text": b"not a photo",
        "long text": b"0123456789\n" * 10_000,
        "utf-16": "照片".encode("utf-16"),
        "html": b"<!DOCTYPE html><html><body>404</body></html>",
        "html in small": b"<html><body>Please log in</body></html>",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
        "xml": b"<?xml version='1.0'?><!DOCTYPE a [<!ENTITY a 'a'>]><svg>&a;</svg>",
        "pdf": b"%PDF-1.7\n" + bytes(60),
        "zip": b"PK\3\4" + bytes(60),
        "gzip": b"\x1f\x8b\x08" + bytes(60),
        "script": b"#!/bin/sh\necho run\n",
        "program": b"\x7fELF\2\1\1" + bytes(60),
        "pickle": b"\x80\4\x95\x1a\0\0\0\0\0\0\0\x8c\5posix\x94\x8c\6system\x94\x93\x94.",
        "json": b'{"image": null}',
        "canon": b"II*\0\x10\0\0\0CR\2\0" + bytes(60),
        "newer canon": b"\0\0\0\x18ftypcrx " + bytes(60),
        "olympus": b"IIRO\x08\0\0\0" + bytes(60),
        "panasonic": b"IIU\0\x18\0\0\0" + bytes(60),
        "fuji": b"FUJIFILMCCD-RAW 0201" + bytes(60),
        "film": b"\0\0\0\x18ftypisom" + bytes(60),
        "jpeg 2000": encoded(photo(2), "JPEG2000"),
        "jpeg xl": b"\xff\x0a" + bytes(60),
        "icon": encoded(photo(2), "ICO"),
        "photoshop": b"8BPS\0\1" + bytes(60),
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n(x) run\n",
        "pnm": encoded(photo(2), "PPM"),
        "tga": encoded(photo(2), "TGA"),
        "pcx": encoded(photo(2), "PCX"),
        "sound": b"RIFF\x24\0\0\0WAVEfmt " + bytes(30),
        "one zero": b"\0",
        "zeros": bytes(5000),
        "one letter of JPEG": b"\xff",
        "two of PNG": b"\x89P",
        "GIF of 1990": b"GIF90a" + bytes(60),
        "jpeg behind a space": b" " + SAMPLES["baseline"][0],
    }
    for number, (name, data) in enumerate(others.items()):
        extension = tuple(EXTENSIONS.values())[number % len(EXTENSIONS)]
        yield f"{name}.{extension}", data, "unsupported_format"
    for seed in range(20):
        noise = np.random.default_rng(seed).bytes(10 + 40 * seed)
        yield f"noise-{seed}.jpg", noise, "unsupported_format"


def _packed_rows(row: bytes, rows: int) -> bytes:
    packer = zlib.compressobj(9)
    return b"".join([packer.compress(row) for _ in range(rows)]) + packer.flush()


def _bombs() -> Files:
    """Small files of huge pictures, and of huge numbers of parts."""
    rows_of_20000 = _packed_rows(bytes(1 + 2500), 20_000)
    yield "whole-20000x20000.png", _png(20_000, 20_000, rows_of_20000, depth=1), "too_large"
    rest = zlib.compress(bytes(1000))
    for width, height in ((10_001, 10_000), (2**31 - 1, 2**31 - 1), (2**27, 1), (1, 2**30)):
        yield f"{width}x{height}.png", _png(width, height, rest), "too_large"
    bmp = SAMPLES["raw"][0]
    for width, height in ((30_000, 30_000), (30_000, -30_000), (2**30, 1)):
        header = bmp[:18] + struct.pack("<ii", width, height) + bmp[26:]
        yield f"{width}x{height}.bmp", header, "too_large"
    jpeg = SAMPLES["baseline"][0]
    size = jpeg.index(b"\xff\xc0") + 5
    for width, height in ((65_500, 65_500), (20_000, 20_000), (65_500, 1600)):
        header = jpeg[:size] + struct.pack(">HH", height, width) + jpeg[size + 4 :]
        yield f"{width}x{height}.jpg", header, "too_large"
    for width, height in ((65_535, 65_535), (16_000, 16_000), (13_000, 13_000)):
        for kind, canvas in (("canvas", (width, height)), ("frame", (1, 1))):
            header = b"GIF89a" + struct.pack("<HH", *canvas) + b"\0\0\0!\xf9\4\x08\0\0\0\0,"
            frame = struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\2\2L\1\0;"
            yield f"{kind}-{width}x{height}.gif", header + frame, "too_large"
    for side in (10_001, 13_000, 16_383):
        extended = b"VP8X\n\0\0\0\0\0\0\0" + 2 * (side - 1).to_bytes(3, "little")
        lossy = b"VP8 \n\0\0\0\x10\2\0\x9d\1*" + struct.pack("<HH", side, side)
        bits = (side - 1) | (side - 1) << 14
        lossless = b"VP8L\n\0\0\0/" + struct.pack("<I", bits) + bytes(5)
        for kind, body in (("extended", extended), ("lossy", lossy), ("lossless", lossless)):
            length = struct.pack("<I", len(body) + 4)
            yield f"{kind}-{side}.webp", b"RIFF" + length + b"WEBP" + body, "too_large"
    wide = bytearray(encoded(photo(2), "TIFF"))
    place = wide.index(struct.pack("<HHI", 256, 4, 1)) + 8
    wide[place : place + 4] = struct.pack("<I", 3_000_000)
    yield "wide.tif", bytes(wide), "too_large"
    yield "fill.jpg", b"\xff\xd8" + b"\xff" * 3_000_000 + jpeg[2:], "too_large"
    yield "segments.jpg", b"\xff\xd8" + b"\xff\xe1\0\2" * 700_000 + jpeg[2:], "too_large"
    png = SAMPLES["true"][0]
    for name in (b"IDAT", b"abCd"):
        flood = png[:33] + _chunk(name, b"") * 250_000 + png[33:]
        yield f"chunks-{name.decode()}.png", flood, "too_large"
    gif = SAMPLES["table"][0]
    tables = 13 + (6 << (gif[10] & 7))
    comment = b"!\xfe" + b"\1a" * 1_500_000 + b"\0"
    yield "comment.gif", gif[:tables] + comment + gif[tables:], "too_large"


def _texts() -> Files:
    """PNG metadata that is larger than its photo."""
    for kind in (b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"sPLT", b"eXIf", b"pCAL"):
        claim = struct.pack(">I", 0x7FFFFFFF) + kind + bytes(40)
        yield f"claims-2-GB-{kind.decode()}.png", _small_png()[:33] + claim, "truncated"
    packed = _packed_rows(bytes(1_000_000), 64)
    yield "unpacks-to-64-MB.png", _small_png(_chunk(b"zTXt", b"a\0\0" + packed)), "ok"
    yield "profile-of-64-MB.png", _small_png(_chunk(b"iCCP", b"a\0\0" + packed)), "ok"
    yield "text-of-2-MB.png", _small_png(_chunk(b"tEXt", b"a\0" + b"x" * 2_000_000)), "ok"


NAMES: tuple[str | bytes, ...] = (
    b"caf\xe9.jpg",
    b"\xff\xfe.jpg",
    b"\xe4\xb8.jpg",
    b"half-\xed\xa0\x80-surrogate.jpg",
    b"over\xc0\xafslash.jpg",
    b"\xb2\xe2\xca\xd4.jpg",
    "line\nbreak.jpg",
    "carriage\rreturn.jpg",
    "tab\tstop.jpg",
    "bell\a.jpg",
    "back\bspace.jpg",
    "\x1b[31mred\x1b[0m.jpg",
    "\x1b]0;title\a.jpg",
    "\x1b[2J.jpg",
    "\x9b2J.jpg",
    "delete\x7f.jpg",
    "next\x85line.jpg",
    "separator\u2028.jpg",
    "right\u202eto left gpj.jpg",
    "mark\u200f.jpg",
    "joined\u200d.jpg",
    "\ufeffbom.jpg",
    "'single'.jpg",
    '"double".jpg',
    "`date`.jpg",
    "$(touch x).jpg",
    "$HOME.jpg",
    "; rm -rf x.jpg",
    "a|b&c>d<e.jpg",
    "*[x].jpg",
    "?.jpg",
    "{a,b}.jpg",
    "[!a].jpg",
    "-rf.jpg",
    "--help.jpg",
    "~.jpg",
    "%s%n%d.jpg",
    "%(message)s.jpg",
    "{0}.jpg",
    "=1+1.jpg",
    "a,b.jpg",
    "a\\b.jpg",
    "\\xff.jpg",
    "\\.jpg",
    " leading.jpg",
    "trailing .jpg",
    "two..dots.jpg",
    "...jpg.jpg",
    "#1.jpg",
    "file:name.jpg",
    "con.jpg",
    "NULL.jpg",
    "nan.jpg",
    "name.JPG",
    "NAME.jpg",
    "name.jpg",
    "Name.jpg",
    "caf\u00e9.jpg",
    "cafe\u0301.jpg",
    "\uac00.jpg",
    "\u1100\u1161.jpg",
    "照片.jpg",
    "👩‍👩‍👧‍👦.jpg",
    "😀.jpg",
    "\U000e0001.jpg",
    "a" * 246 + ".jpg",
    "照" * 82 + ".jpg",
    "<script>alert(1)</script>.jpg".replace("/", "\u2215"),
    "' or 1=1 --.jpg",
)
DOTTED = {"...jpg.jpg"}


def _good_names() -> Files:
    data = encoded(photo(3, 8, 8), "PNG")
    return ((name, data, "ok") for name in NAMES if name not in DOTTED)


def _bad_names() -> Files:
    return ((name, b"", "empty") for name in NAMES if name not in DOTTED)


def _good() -> Files:
    """Valid photos that look invalid."""
    image = photo(4)
    jpeg, png, gif, bmp, webp = (encoded(image, name) for name in EXTENSIONS)
    yield "png-named.jpg", png, "ok"
    yield "jpeg-named.png", jpeg, "ok"
    yield "webp-named.gif", webp, "ok"
    yield "gif-named.webp", gif, "ok"
    yield "bmp-named.jfif", bmp, "ok"
    yield "jpeg-named.nef", jpeg, "ok"
    yield "png-named.heic", png, "ok"
    for orientation in range(10):
        exif = Image.Exif()
        exif[0x0112] = orientation
        yield f"orientation-{orientation}.jpg", encoded(image, "JPEG", exif=exif), "ok"
    garbage = b"Exif\0\0II*\0" + np.random.default_rng(5).bytes(60)
    yield "damaged-exif.jpg", encoded(image, "JPEG", exif=garbage), "ok"
    yield "cmyk.jpg", encoded(image.convert("CMYK"), "JPEG"), "ok"
    yield "grey.jpg", encoded(image.convert("L"), "JPEG"), "ok"
    yield "bits-16.png", encoded(Image.new("I;16", (40, 40), 40_000), "PNG"), "ok"
    for mode in ("1", "L", "LA", "P", "RGBA"):
        yield f"mode-{mode}.png", encoded(image.convert(mode), "PNG"), "ok"
    for format_name in ("GIF", "WEBP", "PNG"):
        frames = {"save_all": True, "append_images": [photo(5), photo(6)]}
        name = f"animated.{EXTENSIONS[format_name]}"
        yield name, encoded(image, format_name, **frames), "ok"
    animation = encoded(image, "GIF", save_all=True, append_images=[photo(5), photo(6)])
    yield "first-frame-whole.gif", animation[: len(animation) * 3 // 4], "ok"
    yield "one-pixel.png", encoded(image.resize((1, 1)), "PNG"), "ok"
    yield "one-row.png", encoded(image.resize((5000, 1)), "PNG"), "ok"
    yield "one-column.jpg", encoded(image.resize((1, 5000)), "JPEG"), "ok"
    yield "letter-behind.jpg", jpeg + b"\n", "ok"
    yield "film-for-end-mark.jpg", jpeg[:-2] + b"\0\0\0\x18ftypmp42" + bytes(60), "ok"
    yield "zip-behind.jpg", jpeg + b"PK\3\4" + bytes(60), "ok"


SECTIONS: tuple[Callable[[], Files], ...] = (
    *(_cut, _reserved, _flipped, _checksums, _broken, _empty, _no_photos, _bombs, _texts),
    *(_good_names, _bad_names, _good),
)


def _special_files(folder: Path) -> dict[str, str]:
    """Special files, links, and an unreadable file."""
    folder.mkdir()
    (folder / "dangling.jpg").symlink_to("nothing")
    (folder / "circle.jpg").symlink_to("circle.jpg")
    (folder / "there.jpg").symlink_to("back.jpg")
    (folder / "back.jpg").symlink_to("there.jpg")
    (folder / "zero.jpg").symlink_to("/dev/zero")
    (folder / "null.jpg").symlink_to("/dev/null")
    (folder / "folder.jpg").mkdir()
    inside = encoded(photo(8), "JPEG")
    (folder / "folder.jpg" / "inside.jpg").write_bytes(inside)
    (folder / "link.jpg").symlink_to("folder.jpg/inside.jpg")
    os.link(folder / "folder.jpg" / "inside.jpg", folder / "second-name.jpg")
    deep = folder / "/".join("d" * 30)
    deep.mkdir(parents=True)
    (deep / "deep.jpg").write_bytes(inside)
    (folder / "film.jpg").touch()
    os.truncate(folder / "film.jpg", (1 << 30) + 1)
    expected = {
        "dangling.jpg": "missing",
        **dict.fromkeys(("circle.jpg", "there.jpg", "back.jpg"), "unreadable"),
        **dict.fromkeys(("zero.jpg", "null.jpg"), "not_a_file"),
        **dict.fromkeys(("folder.jpg/inside.jpg", "link.jpg", "second-name.jpg"), "ok"),
        f"{'/'.join('d' * 30)}/deep.jpg": "ok",
        "film.jpg": "too_large",
    }
    nodes = {"pipe": stat.S_IFIFO, "socket": stat.S_IFSOCK}
    nodes |= {"zero-node": stat.S_IFCHR, "loop-node": stat.S_IFBLK}
    for name, kind in nodes.items():
        with suppress(OSError):  # only root can make devices
            device = os.makedev(1, 5) if kind == stat.S_IFCHR else os.makedev(7, 0)
            os.mknod(folder / f"{name}.jpg", kind | 0o600, device)
            expected[f"{name}.jpg"] = "not_a_file"
    (folder / "secret.jpg").write_bytes(inside)
    (folder / "secret.jpg").chmod(0)
    expected["secret.jpg"] = "ok" if os.access(folder / "secret.jpg", os.R_OK) else "unreadable"
    return {f"{folder.name}/{name}": reason for name, reason in expected.items()}


def _left_out(folder: Path) -> dict[str, str]:
    """Files that must not be listed."""
    data = encoded(photo(9), "JPEG")
    (folder / ".thumbnails").mkdir(parents=True)
    (folder / ".thumbnails" / "a.jpg").write_bytes(data)
    for name in (".hidden.jpg", "._fork.jpg", "...jpg", *DOTTED, "notes.txt", "jpg", "a.jpg.part"):
        (folder / name).write_bytes(data)
    (folder / "to-the-top.jpg").symlink_to("..")
    (folder / "here").symlink_to(".")
    (folder / "elsewhere").symlink_to("../special")
    return {}
