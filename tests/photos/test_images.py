"""Real files of every kind against pixels written down by hand."""

import hashlib
import io
import itertools
import os
import pickle
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers.places import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from batchcap.photos import formats, images
from batchcap.photos.images import LoadSettings, encode_webp, load_image, load_thumbnail
from batchcap.schema import ErrorType, LoadedImage, Rejection

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # as `images` does

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


@pytest.fixture
def load(tmp_path):
    def load_bytes(
        data: bytes, size: int = 2, name: str = "photo.jpg", **options: int | bool
    ) -> LoadedImage:
        path = tmp_path / name
        path.write_bytes(data)
        os.utime(path, (0, 0))  # an old file, whose time needs no tick to settle
        return load_image(path, LoadSettings(size, **options))

    return load_bytes


def assert_rejected(loaded: LoadedImage, error_type: ErrorType) -> Rejection:
    assert isinstance(loaded.pixels, Rejection)
    assert loaded.pixels.error_type is error_type
    assert re.fullmatch(r"[A-Z][ -~]+\.", loaded.pixels.message)
    return loaded.pixels


def assert_pixels(loaded: LoadedImage, expected) -> None:
    assert isinstance(loaded.pixels, np.ndarray), loaded.pixels
    np.testing.assert_array_equal(loaded.pixels, np.array(expected))


def test_pixels_are_contiguous_uint8_and_the_file_is_described(tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(SAMPLES["PNG"])
    loaded = load_image(str(path), LoadSettings(32))
    assert loaded.pixels.shape == (32, 32, 3)
    assert loaded.pixels.dtype == np.uint8
    assert loaded.pixels.flags.c_contiguous
    assert (loaded.width, loaded.height) == (96, 64)
    assert loaded.file_size == len(SAMPLES["PNG"])
    assert loaded.mtime_ns == path.stat().st_mtime_ns
    assert loaded.sha256 == hashlib.sha256(SAMPLES["PNG"]).hexdigest()


def test_damaged_file_is_still_described(load):
    data = SAMPLES["PNG"][:50]
    loaded = load(data)
    assert_rejected(loaded, ErrorType.TRUNCATED)
    assert (loaded.file_size, loaded.sha256) == (50, hashlib.sha256(data).hexdigest())
    assert loaded.mtime_ns is not None
    assert loaded.width is None


def test_photo_of_the_right_size_is_not_resampled(load):
    assert_pixels(load(encoded(Image.fromarray(QUADRANTS), "PNG")), QUADRANTS)


def test_photo_is_squashed_without_keeping_the_aspect_ratio(load):
    wide = np.repeat(np.repeat(QUADRANTS, 4, axis=0), 40, axis=1)
    loaded = load(encoded(Image.fromarray(wide), "PNG"), size=4)
    assert (loaded.width, loaded.height) == (80, 8)
    np.testing.assert_array_equal(loaded.pixels[::3, ::3], QUADRANTS)


def test_downscaling_averages_instead_of_skipping_pixels(load):
    board = np.indices((64, 64)).sum(axis=0) % 2 * 255
    loaded = load(encoded(Image.fromarray(board.astype(np.uint8)), "PNG"), size=4)
    assert np.abs(loaded.pixels.astype(int) - 127).max() <= 2


def test_threads_get_the_same_pixels(tmp_path):
    path = tmp_path / "photo"
    path.write_bytes(SAMPLES["JPEG"])
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: load_image(path, LoadSettings(32)).pixels, range(32)))
    assert all((pixels == results[0]).all() for pixels in results)


@pytest.mark.parametrize("name", SAMPLES)
def test_content_decides_and_not_the_extension(load, name):
    loaded = load(SAMPLES[name], size=16, name="photo.txt")
    reference = np.asarray(texture().resize((16, 16), Image.Resampling.BOX))
    assert (loaded.width, loaded.height) == (96, 64)
    tolerance = 90 if name == "1-bit BMP" else 25  # palettes and dithering lose colours
    assert np.abs(loaded.pixels.astype(int) - reference).mean() < tolerance


@pytest.mark.parametrize("format_name", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation_is_taken(load, format_name):
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    options = {"save_all": True, "append_images": frames[1:]}
    if format_name == "WEBP":
        options["lossless"] = True
    assert_pixels(load(encoded(frames[0], format_name, **options)), np.full((2, 2, 3), RED))


CLEAR = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
ANIMATIONS = {"GIF": {}, "PNG": {}, "WEBP": {"lossless": True}, "AVIF": {"quality": 100}}


def animation(format_name: str, *frames: Image.Image) -> bytes:
    options = {"save_all": True, "append_images": frames[1:], "duration": 100}
    return encoded(frames[0], format_name, **options, **ANIMATIONS[format_name])


@pytest.mark.parametrize("format_name", ANIMATIONS)
def test_first_frame_with_something_on_it_is_taken_and_not_white(load, format_name):
    half = CLEAR.copy()
    half.paste((*RED, 255), (0, 0, 8, 4))
    blue = Image.new("RGBA", (8, 8), (*BLUE, 255))
    pixels = load(animation(format_name, CLEAR, half, blue), size=8).pixels[[0, 7]]
    assert np.abs(pixels.astype(int) - [[RED], [WHITE]]).max() <= 3


@pytest.mark.parametrize("format_name", ANIMATIONS)
def test_animation_with_nothing_on_it_is_white(load, format_name):
    assert_pixels(load(animation(format_name, CLEAR, CLEAR)), np.full((2, 2, 3), 255))
    assert_pixels(load(encoded(CLEAR, format_name)), np.full((2, 2, 3), 255))


def nearly_clear(number: int) -> Image.Image:
    """A clear frame that differs from the others, which encoders would merge with it."""
    return Image.new("RGBA", (8, 8), (number, 0, 0, 0))


def test_only_so_many_clear_frames_are_looked_at(load, monkeypatch):
    frames = [nearly_clear(number) for number in range(5)]
    data = animation("AVIF", *frames, Image.new("RGBA", (8, 8), "red"))
    assert (load(data).pixels[..., 1] < 9).all()
    assert_pixels(load(data, max_pixels=64 * 4), np.full((2, 2, 3), 255))
    monkeypatch.setattr(images, "FRAMES_LOOKED_AT", 4)
    assert_pixels(load(data), np.full((2, 2, 3), 255))


def test_later_frame_above_the_limit_is_refused(load):
    frame = struct.pack("<HHHHB", 0, 0, 9_000, 9_000, 0) + b"\2\2L\1\0"
    first = b"!\xf9\4\1\0\0\0\0," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\2\2D\1\0"
    header = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6)
    assert_pixels(load(header + first + b";"), np.full((2, 2, 3), 255))
    large = load(header + first + b"," + frame + b";", max_pixels=1_000_000)
    assert_rejected(large, ErrorType.TOO_LARGE)


TURNED_HEIC = (GOLDEN / "turned.heic").read_bytes()


def test_heic_is_read_upright_and_bounded_and_its_exif_counts_nothing(load):
    """It is stored upside down; EXIF says so too, and decoders turn it by another piece."""
    pytest.importorskip("pi_heif")
    for data in (TURNED_HEIC, TURNED_HEIC.replace(b"MM\0*\0\0\0\x08", b"MM\0*\xff\xff\xff\x08")):
        loaded = load(data, size=16, name="a.hif")
        assert (loaded.width, loaded.height) == (96, 64)
        corners = loaded.pixels[::15, ::15].astype(int)
        assert np.abs(corners - QUADRANTS).max() < 3
    assert_rejected(load(data, max_pixels=96 * 64 - 1), ErrorType.TOO_LARGE)
    for cut in (100, 400, 700):
        assert_rejected(load(data[:cut], accept_truncated=True), ErrorType.TRUNCATED)


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"mif1", b"msf1"])
def test_heic_without_its_extra_is_refused_with_the_command_that_installs_it(
    load, monkeypatch, brand
):
    monkeypatch.delitem(images.OPENERS, "HEIC", raising=False)
    rejection = assert_rejected(load(b"\0\0\0\x10ftyp" + brand), ErrorType.UNSUPPORTED_FORMAT)
    assert "This is a HEIC file; " in rejection.message
    assert "pip install 'batchcap[heic]'" in rejection.message


def test_avif_is_told_by_any_of_its_brands(load):
    data = SAMPLES["AVIF"]
    assert data[8:12] == b"avif"
    assert b"avif" in data[16:40]
    same = load(data[:8] + b"mif1" + data[12:])
    np.testing.assert_array_equal(same.pixels, load(data).pixels)


UNSUPPORTED = {
    "camera raw": b"IIU\0\x18\0\0\0" + bytes(60),
    "JPEG XL": b"\xff\x0a" + bytes(60),
    "JPEG 2000": encoded(texture(), "JPEG2000"),
    "ICO": encoded(texture(), "ICO"),
    "PSD": b"8BPS\0\1" + bytes(60),
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "PDF": b"%PDF-1.7\n" + bytes(60),
    "HTML": b"<!DOCTYPE html><html>404</html>",
    "PNM": encoded(texture(), "PPM"),
    "TGA": encoded(texture(), "TGA") + bytes(8) + b"TRUEVISION-XFILE.\0",
    "video": b"\0\0\0\x18ftypisom" + bytes(60),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_format_is_named(load, name):
    rejection = assert_rejected(load(UNSUPPORTED[name]), ErrorType.UNSUPPORTED_FORMAT)
    assert f"This is a {name}" in rejection.message


@pytest.mark.parametrize("data", [b"\0", b"hello", bytes(1000), b"RIFF\4\0\0\0WAVE"])
def test_unknown_content_is_unsupported(load, data):
    assert_rejected(load(data), ErrorType.UNSUPPORTED_FORMAT)


def test_missing_file(tmp_path):
    assert_rejected(load_image(tmp_path / "none.jpg", LoadSettings(2)), ErrorType.MISSING)


def test_path_through_a_file_is_missing(tmp_path):
    (tmp_path / "a").touch()
    assert_rejected(load_image(tmp_path / "a" / "b.jpg", LoadSettings(2)), ErrorType.MISSING)


def test_name_with_nul_is_missing():
    assert_rejected(load_image("a\0.jpg", LoadSettings(2)), ErrorType.MISSING)


def test_dangling_link_is_missing_and_called_a_link(tmp_path):
    (tmp_path / "a.jpg").symlink_to(tmp_path / "none")
    assert (
        "link"
        in assert_rejected(
            load_image(tmp_path / "a.jpg", LoadSettings(2)), ErrorType.MISSING
        ).message
    )


def test_link_to_a_file_is_followed(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(Image.fromarray(QUADRANTS), "PNG"))
    (tmp_path / "b.png").symlink_to("a.png")
    assert_pixels(load_image(tmp_path / "b.png", LoadSettings(2)), QUADRANTS)


def test_link_loop_is_unreadable(tmp_path):
    (tmp_path / "a.jpg").symlink_to("a.jpg")
    assert_rejected(load_image(tmp_path / "a.jpg", LoadSettings(2)), ErrorType.UNREADABLE)


def test_folder_pipe_socket_and_device_are_no_files(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.jpg"))
        for kind in ("folder", "pipe", "device", "socket"):
            loaded = load_image(tmp_path / f"{kind}.jpg", LoadSettings(2))
            assert kind in assert_rejected(loaded, ErrorType.NOT_A_FILE).message


def test_file_without_permission_is_unreadable(tmp_path):
    path = tmp_path / "secret.jpg"
    path.write_bytes(SAMPLES["JPEG"])
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user reads files of mode 0")
    assert_rejected(load_image(path, LoadSettings(2)), ErrorType.UNREADABLE)


def test_file_that_may_not_be_read_still_has_its_size_and_time(tmp_path, monkeypatch):
    """The refusal is scripted, because root, who runs many tests, may read any file."""
    path = tmp_path / "secret.jpg"
    path.write_bytes(SAMPLES["JPEG"])

    def refuse(path, flags):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "open", refuse)
    loaded = load_image(path, LoadSettings(2))
    assert "Permission denied" in assert_rejected(loaded, ErrorType.UNREADABLE).message
    assert (loaded.file_size, loaded.sha256) == (len(SAMPLES["JPEG"]), None)
    assert loaded.mtime_ns == path.stat().st_mtime_ns


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="there is no such file here")
def test_error_of_the_disk_is_unreadable(tmp_path):
    """Nothing stands at address 0, so the kernel answers with the EIO of a broken disk."""
    (tmp_path / "a.jpg").symlink_to("/proc/self/mem")
    loaded = load_image(tmp_path / "a.jpg", LoadSettings(2))
    assert "put/output error" in assert_rejected(loaded, ErrorType.UNREADABLE).message
    assert loaded.mtime_ns is not None


class Writer:
    """Stands in for the pause that a fresh file is given, and writes to it in that time."""

    def __init__(self, path: Path, *contents: bytes) -> None:
        self.path, self.contents = path, list(contents)

    def time_ns(self) -> int:
        return self.path.stat().st_mtime_ns if self.path.exists() else time.time_ns()

    def sleep(self, _: float) -> None:
        if self.contents:
            before = self.path.stat().st_mtime_ns
            self.path.write_bytes(self.contents.pop(0))
            os.utime(self.path, ns=(0, before + 1))


def test_file_that_changes_once_is_read_again(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(SAMPLES["PNG"][:99])
    whole = encoded(Image.fromarray(QUADRANTS), "PNG")
    monkeypatch.setattr(images, "time", Writer(path, whole))
    loaded = load_image(path, LoadSettings(2))
    assert_pixels(loaded, QUADRANTS)
    assert (loaded.file_size, loaded.sha256) == (len(whole), hashlib.sha256(whole).hexdigest())
    assert loaded.mtime_ns == path.stat().st_mtime_ns


@pytest.mark.parametrize("contents", [(b"ab", b"abc"), (b"xy", b""), (b"12", b"34")])
def test_file_that_changes_twice_is_rejected_and_not_described(tmp_path, monkeypatch, contents):
    path = tmp_path / "a.png"
    path.write_bytes(b"aa")
    monkeypatch.setattr(images, "time", Writer(path, *contents))
    loaded = load_image(path, LoadSettings(2))
    rejection = assert_rejected(loaded, ErrorType.CHANGED)
    assert loaded == LoadedImage(rejection)


def test_file_that_is_deleted_when_it_is_to_be_read_again_is_missing(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"aa")
    writer = Writer(path)
    monkeypatch.setattr(writer, "sleep", lambda _: (path.write_bytes(b"b"), path.unlink()))
    monkeypatch.setattr(images, "time", writer)
    assert load_image(path, LoadSettings(2)).pixels.error_type is ErrorType.MISSING


FLICKERING = [
    bmp(400, 400 + number % 2, 24, bytes((number,)) * (1200 * (400 + number % 2)))
    for number in range(8)
]


def load_while(write: Callable[[Path, bytes], None], path: Path) -> list[LoadedImage]:
    """What is loaded, again and again, while a thread writes one photo after the other.

    Nothing that was loaded may be described as anything that never stood in the file.
    """
    stop, written = threading.Event(), set()

    def keep_writing() -> None:
        for data in itertools.cycle(FLICKERING):
            write(path, data)
            status = path.stat()
            sha256 = hashlib.sha256(data).hexdigest()
            written.add((status.st_size, status.st_mtime_ns, sha256))
            if stop.is_set():
                return

    path.write_bytes(FLICKERING[0])
    os.utime(path, (0, 0))
    written.add((len(FLICKERING[0]), 0, hashlib.sha256(FLICKERING[0]).hexdigest()))
    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(keep_writing)
        loaded = [load_image(path, LoadSettings(2)) for _ in range(30)]
        stop.set()
        writer.result()
    loaded.append(load_image(path, LoadSettings(2)))
    for image in loaded:
        described = image.file_size, image.mtime_ns, image.sha256
        assert described in written or described == (None, None, None)
    return loaded


@pytest.mark.parametrize("moments", [(0,), (1,), (0, 1)])
def test_file_written_during_the_read_is_refused_until_it_is_whole(tmp_path, monkeypatch, moments):
    """Each attempt calls fstat on opening, before reading and after reading.

    After the calls in `moments`, the next piece of another photo is written. No thread writes,
    because one that is paused between two pieces leaves a file that looks finished.
    """
    path, (old, new) = tmp_path / "a.bmp", FLICKERING[:2]
    path.write_bytes(old)
    os.utime(path, ns=(0, 0))  # an old file, which is read without a pause
    starts, calls, real_fstat = itertools.count(0, 100_000), itertools.count(), os.fstat
    torn = set()

    def write_piece() -> None:
        start = next(starts)
        with path.open("r+b") as file:
            file.seek(start)
            file.write(new[start : start + 100_000])
        os.utime(path, ns=(0, start + 1))
        torn.add(path.read_bytes())

    def fstat_and_write(descriptor: int) -> os.stat_result:
        status = real_fstat(descriptor)
        if next(calls) % 3 in moments:
            write_piece()
        return status

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", fstat_and_write)
        during = load_image(path, LoadSettings(2))
    assert during == LoadedImage(assert_rejected(during, ErrorType.CHANGED))
    assert next(calls) == 3 * images.READ_ATTEMPTS
    assert len(torn) == len(moments) * images.READ_ATTEMPTS
    assert torn.isdisjoint((old, new))
    while path.read_bytes() != new:
        write_piece()
    after = load_image(path, LoadSettings(2))
    assert isinstance(after.pixels, np.ndarray)
    assert after.sha256 == hashlib.sha256(new).hexdigest()
    assert (after.file_size, after.mtime_ns) == (len(new), path.stat().st_mtime_ns)


def test_file_that_is_replaced_whole_is_always_read(tmp_path):
    def replace(path: Path, data: bytes) -> None:
        part = path.with_suffix(".part")
        part.write_bytes(data)
        part.replace(path)

    for image in load_while(replace, tmp_path / "a.bmp"):
        assert isinstance(image.pixels, np.ndarray)


def test_file_that_vanishes_and_returns_is_missing_or_whole(tmp_path):
    def vanish(path: Path, data: bytes) -> None:
        path.unlink()
        path.with_suffix(".part").write_bytes(data)
        path.with_suffix(".part").rename(path)

    for image in load_while(vanish, tmp_path / "a.bmp"):
        if isinstance(image.pixels, Rejection):
            assert_rejected(image, ErrorType.MISSING)


def test_empty_file(load):
    loaded = load(b"")
    assert_rejected(loaded, ErrorType.EMPTY)
    assert loaded.file_size == 0


def test_huge_sparse_file_is_not_read(tmp_path):
    path = tmp_path / "film.jpg"
    path.touch()
    os.truncate(path, images.MAX_FILE_BYTES + 1)
    assert_rejected(load_image(path, LoadSettings(2)), ErrorType.TOO_LARGE)


def test_message_holds_no_path_and_no_control_characters(load):
    broken = SAMPLES["PNG"].replace(b"IHDR", b"I\x1b\nR")
    rejection = assert_rejected(load(broken, name="secret.jpg"), ErrorType.CORRUPT)
    assert "secret" not in rejection.message


@pytest.mark.parametrize("name", SAMPLES)
def test_cut_file_is_truncated_or_whole_in_its_first_frame(load, name):
    data = SAMPLES[name]
    whole = load(data, size=32).pixels
    cuts = {len(data) * percent // 100 for percent in range(2, 100)}
    for cut in cuts | {len(data) - 1, len(data) - 2, len(data) - 12}:
        loaded = load(data[: max(cut, 16)], size=32)
        if isinstance(loaded.pixels, Rejection):
            assert_rejected(loaded, ErrorType.TRUNCATED)
        else:
            np.testing.assert_array_equal(loaded.pixels, whole)


@pytest.mark.parametrize("fill", [b"\xff", b"\xff\xff\xff", b"\xff\0"])
def test_fill_bytes_and_escaped_ones_before_a_jpeg_marker_are_skipped(load, fill):
    data = SAMPLES["JPEG"]
    tables = data.index(b"\xff\xdb")
    filled = load(data[:tables] + fill + data[tables:]).pixels
    np.testing.assert_array_equal(filled, load(data).pixels)


@pytest.mark.parametrize("name", ["JPEG", "progressive JPEG", "PNG", "GIF"])
@pytest.mark.parametrize("percent", [30, 60, 95])
def test_preallocated_download_is_refused(load, name, percent):
    """Its tail is zeros, which Pillow decodes to grey in a JPEG and black in a PNG."""
    data = SAMPLES[name]
    kept = data[: len(data) * percent // 100]
    assert isinstance(load(kept + bytes(len(data) - len(kept))).pixels, Rejection)


def test_flipped_bit_in_png_pixels_is_corrupt(load):
    rows = bytes(1 + 3 * 40) * 40
    stored = zlib.compress(rows, 0)
    whole = png(40, 40, 8, 2, b"").replace(chunk(b"IDAT", zlib.compress(b"")), b"")
    damaged = bytearray(chunk(b"IDAT", stored))
    damaged[900] ^= 4
    assert_rejected(load(whole[:33] + damaged + whole[33:]), ErrorType.CORRUPT)


@pytest.mark.parametrize("kind", [b"tEXt", b"iTXt", b"zTXt", b"sPLT", b"pCAL"])
def test_huge_png_chunk_is_refused_without_being_allocated(load, kind):
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    loaded = load(head + struct.pack(">I", 0x7FFFFFFF) + kind + bytes(16))
    assert_rejected(loaded, ErrorType.TRUNCATED)


@pytest.mark.parametrize("rows", [0, 1, 62, 63])
def test_png_whose_pixels_end_before_its_last_row_is_truncated(load, rows):
    """All its checksums are right, and Pillow makes the rest up: it leaves it black."""
    data = png(4, 64, 8, 2, (b"\0" + b"\x80" * 12) * rows)
    assert_rejected(load(data), ErrorType.TRUNCATED)
    accepted = load(data, size=64, accept_truncated=True)
    assert accepted.note is not None
    assert accepted.pixels.any(axis=(1, 2)).sum() == rows


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
@pytest.mark.parametrize("size", [(1, 1), (3, 7), (9, 8), (64, 5)])
def test_photo_that_is_black_to_its_end_is_whole(load, mode, size):
    assert isinstance(load(encoded(Image.new(mode, size), "PNG")).pixels, np.ndarray)


@pytest.mark.parametrize(
    ("size", "passes"),
    [
        ((1, 1), (2,)),
        ((3, 2), (2, 2, 2, 4)),
        ((8, 8), (2, 2, 3, 2 * 3, 2 * 5, 4 * 5, 4 * 9)),
        ((8, 9), (2 * 2, 2 * 2, 3, 3 * 3, 2 * 5, 5 * 5, 4 * 9)),
    ],
)
def test_interlaced_photo_that_is_black_is_whole(load, size, passes):
    """`passes` are their lengths in bytes: of each row, its filter and its pixels."""
    for lacking in (0, 1):
        data = png(*size, 8, 0, bytes(sum(passes) - lacking))
        interlaced = bytearray(data[16:29])
        interlaced[12] = 1
        data = data[:8] + chunk(b"IHDR", bytes(interlaced)) + data[33:]
        assert isinstance(load(data).pixels, Rejection) == bool(lacking)


def test_truncated_rle_bmp(load):
    data = bmp(2, 2, 8, b"\2\1\0\0", palette=bgr0(RED, GREEN), compression=1)
    assert_rejected(load(data), ErrorType.TRUNCATED)


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(SAMPLES)),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1),
)
def test_flipped_bytes_never_raise(tmp_path_factory, name, flips):
    data = bytearray(SAMPLES[name])
    for place, mask in flips:
        data[int(place * len(data))] ^= mask
    path = tmp_path_factory.getbasetemp() / "flipped"
    path.write_bytes(data)
    assert_well_formed(load_image(path, LoadSettings(8)))


@settings(max_examples=150, deadline=None)
@given(signature=st.sampled_from(formats.SIGNATURES), garbage=st.binary(max_size=300))
def test_garbage_behind_a_signature_never_raises(tmp_path_factory, signature, garbage):
    offset, magic, _ = signature
    path = tmp_path_factory.getbasetemp() / "garbage"
    path.write_bytes(bytes(offset) + magic + garbage)
    assert_well_formed(load_image(path, LoadSettings(8)))


def assert_well_formed(loaded: LoadedImage) -> None:
    if isinstance(loaded.pixels, Rejection):
        assert_rejected(loaded, loaded.pixels.error_type)
    else:
        assert loaded.pixels.shape == (8, 8, 3)


def gif_header(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HH", width, height) + b"\0\0\0,"


BOMBS = {
    "PNG of 20000 x 20000": png(20_000, 20_000, 8, 2, bytes(1000)),
    "PNG just over the limit": png(10_001, 10_000, 8, 0, bytes(1000)),
    "PNG with the largest header": png(2**31 - 1, 2**31 - 1, 8, 0, bytes(1000)),
    "BMP of 30000 x 30000": bmp(30_000, 30_000, 24, bytes(1000)),
    "top-down BMP of 30000 x 30000": bmp(30_000, -30_000, 24, bytes(1000)),
    "GIF of 65535 x 65535": gif_header(65_535, 65_535)
    + struct.pack("<HHHHB", 0, 0, 1, 1, 0)
    + b"\2\2L\1\0;",
    "GIF whose frame is to be wiped": gif_header(1, 1)[:-1]
    + b"!\xf9\4\x08\0\0\0\0,"
    + struct.pack("<HHHHB", 0, 0, 13_000, 13_000, 0)
    + b"\2\2L\1\0;",
    "WebP of 13001 x 13001": b"RIFF\x16\0\0\0WEBPVP8X\n\0\0\0\0\0\0\0" + b"\xc8\x32\0" * 2,
    "lossless WebP of 16384 x 16384": b"RIFF\x16\0\0\0WEBPVP8L\n\0\0\0/\xff\xff\xff\x0f" + bytes(5),
    "lossy WebP of 16383 x 16383": b"RIFF\x16\0\0\0WEBPVP8 \n\0\0\0\x10\2\0\x9d\1*\xff\x3f\xff\x3f",
    "GIF with a frame larger than its canvas": gif_header(1, 1)
    + struct.pack("<HHHHB", 0, 0, 65_535, 65_535, 0)
    + b"\2\2L\1\0;",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bomb_is_refused_by_its_header(load, name):
    assert_rejected(load(BOMBS[name]), ErrorType.TOO_LARGE)


@pytest.mark.parametrize("name", SAMPLES)
def test_limit_of_pixels_is_a_setting(load, name):
    loaded = load(SAMPLES[name], max_pixels=96 * 64 - 1)
    rejection = assert_rejected(loaded, ErrorType.TOO_LARGE)
    assert "96 x 64 pixels; up to 6,143 are decoded" in rejection.message
    assert isinstance(load(SAMPLES[name], max_pixels=96 * 64).pixels, np.ndarray)


def test_how_to_load_can_be_sent_to_another_process(tmp_path):
    load = partial(load_image, settings=LoadSettings(2, accept_truncated=True))
    (tmp_path / "a.png").write_bytes(encoded(Image.fromarray(QUADRANTS), "PNG"))
    assert_pixels(pickle.loads(pickle.dumps(load))(tmp_path / "a.png"), QUADRANTS)


def after(start: bytes, data: bytes, inserted: bytes) -> bytes:
    position = data.index(start) + len(start)
    return data[:position] + inserted + data[position:]


GIF_TABLES = SAMPLES["GIF"][: 13 + 768]
PNG_START = SAMPLES["PNG"][:33]
FLOODS = {
    "fill bytes of a JPEG": after(b"\xff\xd8", SAMPLES["JPEG"], b"\xff" * 700_000),
    "empty segments of a JPEG": after(b"\xff\xd8", SAMPLES["JPEG"], b"\xff\xe1\0\2" * 300_000),
    "escaped bytes of a JPEG": after(b"\xff\xd8", SAMPLES["JPEG"], b"\xff\0" * 700_000),
    "empty chunks of a PNG": after(PNG_START, SAMPLES["PNG"], chunk(b"abCd", b"") * 210_000),
    "empty pixel chunks of a PNG": after(PNG_START, SAMPLES["PNG"], chunk(b"IDAT", b"") * 210_000),
    "comments of a GIF": after(GIF_TABLES, SAMPLES["GIF"], b"!\xfe\1a\0" * 300_000),
    "a comment of a GIF": after(GIF_TABLES, SAMPLES["GIF"], b"!\xfe" + b"\1a" * 700_000 + b"\0"),
}


@pytest.mark.parametrize("name", FLOODS)
def test_flood_of_parts_is_refused_before_it_takes_time_and_memory(load, name):
    """Pillow walks them in Python and keeps them: a gigabyte took minutes and 45 gigabytes."""
    tracemalloc.start()
    loaded = load(FLOODS[name])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert_rejected(loaded, ErrorType.TOO_LARGE)
    assert peak < 50_000_000


def test_many_parts_are_no_flood(load):
    data = after(PNG_START, SAMPLES["PNG"], chunk(b"tEXt", b"a\0b") * 2000)
    np.testing.assert_array_equal(load(data).pixels, load(SAMPLES["PNG"]).pixels)


LARGE = texture(224, 224)
WHOLE = {
    "JPEG": encoded(LARGE, "JPEG", quality=95),
    "progressive JPEG": encoded(LARGE, "JPEG", quality=95, progressive=True),
    "PNG": encoded(LARGE, "PNG"),
    "palette PNG": encoded(LARGE.convert("P"), "PNG"),
    "BMP": encoded(LARGE, "BMP"),
    "GIF": encoded(LARGE.convert("P"), "GIF"),
    "WebP": encoded(LARGE, "WEBP", quality=95),
    "lossless WebP": encoded(LARGE, "WEBP", lossless=True),
}


@pytest.mark.parametrize("percent", [60, 80, 95])
@pytest.mark.parametrize("name", WHOLE)
def test_what_there_is_of_a_cut_file_is_accepted_on_request(load, name, percent):
    data = WHOLE[name][: len(WHOLE[name]) * percent // 100]
    assert_rejected(load(data, size=224), ErrorType.TRUNCATED)
    loaded = load(data, size=224, accept_truncated=True)
    assert isinstance(loaded.pixels, np.ndarray)
    assert loaded.note is not None
    assert loaded.note.error_type is ErrorType.TRUNCATED
    assert (loaded.width, loaded.height, loaded.file_size) == (224, 224, len(data))
    whole = load(WHOLE[name], size=224)
    assert whole.note is None
    wrong = np.abs(loaded.pixels.astype(int) - whole.pixels).mean(axis=(1, 2))
    assert np.mean(wrong < 6) > percent / 100 - 0.3


@pytest.mark.parametrize("name", SAMPLES)
def test_every_cut_gives_pixels_and_a_note_or_a_rejection(load, name):
    data = SAMPLES[name]
    whole = load(data, size=32).pixels
    for cut in range(16, len(data), len(data) // 60):
        loaded = load(data[:cut], size=32, accept_truncated=True)
        if isinstance(loaded.pixels, Rejection):
            assert_rejected(loaded, ErrorType.TRUNCATED)
            assert loaded.note is None
        elif loaded.note is None:
            np.testing.assert_array_equal(loaded.pixels, whole)


NOTHING_OF_IT = {
    "JPEG": SAMPLES["JPEG"][: SAMPLES["JPEG"].index(b"\xff\xda")],
    "PNG": SAMPLES["PNG"][: SAMPLES["PNG"].index(b"IDAT") + 4],
    "BMP": SAMPLES["BMP"][:54],
    "GIF": SAMPLES["GIF"][: 13 + 768],
    "WebP": SAMPLES["WebP"][:20],
    "TIFF": SAMPLES["TIFF"][:140],
    "packed TIFF": SAMPLES["packed TIFF"][:2000],
    "AVIF": SAMPLES["AVIF"][:500],
}


@pytest.mark.parametrize("name", NOTHING_OF_IT)
def test_file_that_ends_before_its_first_pixel_is_refused_all_the_same(load, name):
    assert_rejected(load(NOTHING_OF_IT[name], accept_truncated=True), ErrorType.TRUNCATED)


def test_damage_is_not_accepted_with_truncation(load):
    data = bytearray(SAMPLES["PNG"])
    data[200] ^= 1
    assert_rejected(load(bytes(data), accept_truncated=True), ErrorType.CORRUPT)


def test_length_that_a_cut_webp_claims_is_not_allocated(load):
    data = SAMPLES["lossless WebP"]
    claims = data[:4] + b"\xf0\xff\xff\xff" + data[8:16] + b"\xe0\xff\xff\xff" + data[20:4000]
    tracemalloc.start()
    load(claims, accept_truncated=True)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_accepting_cut_files_in_one_thread_accepts_none_in_another(tmp_path):
    """Pillow's own switch, `LOAD_TRUNCATED_IMAGES`, would."""
    path = tmp_path / "a.png"
    path.write_bytes(WHOLE["PNG"][:-5000])
    with ThreadPoolExecutor(4) as pool:
        accepts = [number % 2 == 0 for number in range(60)]
        loaded = pool.map(lambda a: load_image(path, LoadSettings(8, accept_truncated=a)), accepts)
        assert [isinstance(image.pixels, np.ndarray) for image in loaded] == accepts


def test_photo_above_pillows_own_warning_level_is_decoded_in_silence(tmp_path):
    """Pillow warns from 89 million pixels; ours is the limit that counts."""
    path = tmp_path / "wide.png"
    path.write_bytes(encoded(Image.new("1", (9_500, 9_500)), "PNG"))
    assert run_quietly(path) == "(9500, 9500)"


def test_damaged_exif_is_ignored_in_silence(tmp_path):
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0\x0f\x01\x02\0\xff\0\0\0\xff\xff\0\0\x12\x01\x03"
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded(texture(), "JPEG", exif=exif))
    assert run_quietly(path) == "(96, 64)"


def run_quietly(path: Path) -> str:
    """What a fresh process, where no test framework resets the warnings, says of a photo."""
    code = (
        "import sys; from batchcap.photos.images import LoadSettings, load_image;"
        "loaded = load_image(sys.argv[1], LoadSettings(8)); print((loaded.width, loaded.height))"
    )
    command = [sys.executable, "-W", "always", "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.strip()


# How the stored quadrants (RG above BW) must look, by the EXIF standard.
TURNED = {
    1: ("RG", "BW"),
    2: ("GR", "WB"),
    3: ("WB", "GR"),
    4: ("BW", "RG"),
    5: ("RB", "GW"),
    6: ("BR", "WG"),
    7: ("WG", "BR"),
    8: ("GW", "RB"),
}
LETTERS = {"R": RED, "G": GREEN, "B": BLUE, "W": WHITE}


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_exif_orientation_is_applied(load, orientation, format_name):
    blocks = Image.fromarray(np.repeat(np.repeat(QUADRANTS, 64, axis=0), 96, axis=1))
    exif = Image.Exif()
    exif[0x0112] = orientation
    loaded = load(encoded(blocks, format_name, exif=exif, quality=95), size=16)
    expected = [[LETTERS[letter] for letter in row] for row in TURNED[orientation]]
    corners = loaded.pixels[np.ix_([1, 14], [1, 14])].astype(int)
    assert np.abs(corners - expected).max() <= 12
    upright = (192, 128) if orientation <= 4 else (128, 192)
    assert (loaded.width, loaded.height) == upright


@pytest.mark.parametrize("orientation", [0, 9, 65_535])
def test_orientation_that_does_not_exist_is_ignored(load, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert_pixels(load(encoded(Image.fromarray(QUADRANTS), "PNG", exif=exif)), QUADRANTS)


@settings(max_examples=60, deadline=None)
@given(garbage=st.binary(max_size=80))
def test_no_exif_makes_a_photo_fail(tmp_path_factory, garbage):
    path = tmp_path_factory.getbasetemp() / "exif.jpg"
    path.write_bytes(encoded(texture(16, 16), "JPEG", exif=b"Exif\0\0II*\0" + garbage))
    assert isinstance(load_image(path, LoadSettings(8)).pixels, np.ndarray)


def pair(load, data: bytes) -> list[list[int]]:
    """The two pixels of a 2 x 2 photo whose rows are equal."""
    pixels = load(data).pixels
    assert isinstance(pixels, np.ndarray), pixels
    np.testing.assert_array_equal(pixels[0], pixels[1])
    return pixels[0].tolist()


def deep_row(*values: int) -> bytes:
    return (b"\0" + struct.pack(f">{len(values)}H", *values)) * 2


DEEP = {
    "grey": (png(2, 2, 16, 0, deep_row(0x80FF, 0x0300)), [[0x80] * 3, [3] * 3]),
    "grey, alpha": (png(2, 2, 16, 4, deep_row(0x4000, 0xFFFF, 0, 0)), [[0x40] * 3, [255] * 3]),
    "RGB": (
        png(2, 2, 16, 2, deep_row(0xFFFF, 0x8000, 0x00FF, 0, 0x0100, 0x1000)),
        [[255, 128, 0], [0, 1, 16]],
    ),
    "RGB, alpha": (
        png(2, 2, 16, 6, deep_row(0x2000, 0x4000, 0x6000, 0xFFFF, 0, 0, 0, 0)),
        [[0x20, 0x40, 0x60], [255, 255, 255]],
    ),
}


@pytest.mark.parametrize("name", DEEP)
def test_16_bit_png_is_scaled_and_not_clipped(load, name):
    data, expected = DEEP[name]
    assert pair(load, data) == expected


KEYED = {
    "1-bit": png(2, 2, 1, 0, b"\0\x40" * 2, chunk(b"tRNS", b"\0\0")),
    "2-bit": png(2, 2, 2, 0, b"\0\x40" * 2, chunk(b"tRNS", b"\0\1")),
    "4-bit": png(2, 2, 4, 0, b"\0\x5a" * 2, chunk(b"tRNS", b"\0\5")),
    "8-bit": png(2, 2, 8, 0, b"\0\x11\x77" * 2, chunk(b"tRNS", b"\0\x11")),
    "16-bit": png(2, 2, 16, 0, deep_row(0x1234, 0x1235), chunk(b"tRNS", b"\x12\x34")),
    "RGB": png(2, 2, 8, 2, b"\0\1\2\3\4\5\6" * 2, chunk(b"tRNS", b"\0\1\0\2\0\3")),
    "16-bit RGB": png(
        2, 2, 16, 2, deep_row(0x101, 0x202, 0x303, 0, 0, 0), chunk(b"tRNS", b"\1\1\2\2\3\3")
    ),
}
KEPT = {"1-bit": 255, "2-bit": 0, "4-bit": 170, "8-bit": 0x77, "16-bit": 0x12, "16-bit RGB": 0}


@pytest.mark.parametrize("name", KEYED)
def test_transparent_colour_of_a_png_becomes_white(load, name):
    kept = [4, 5, 6] if name == "RGB" else [KEPT[name]] * 3
    assert pair(load, KEYED[name]) == [[255, 255, 255], kept]


@pytest.mark.parametrize("interlaced", [False, True])
def test_16_bit_colours_that_differ_in_low_bits_are_not_transparent(load, interlaced):
    """Every colour with the same high bytes turned white."""
    key, near = (0x101, 0x202, 0x303), (0x101, 0x202, 0x304)
    colour = struct.pack(">3H", *key)
    data = png(2, 2, 16, 2, deep_row(*key, *near), chunk(b"tRNS", colour))
    if interlaced:  # Adam7: the first pixel, the one beside it, the second row
        top = [b"\0" + struct.pack(">3H", *pixel) for pixel in (key, near)]
        rows = b"".join(top) + b"\0" + struct.pack(">6H", *key, *near)
        data = png(2, 2, 16, 2, rows, chunk(b"tRNS", colour))
        header = data[12:28] + b"\1"
        data = data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    assert pair(load, data) == [[255, 255, 255], [1, 2, 3]]


def test_16_bit_png_with_a_transparent_colour_may_end_early_on_request(load):
    noise = np.random.default_rng(0).integers(0, 2**16, (64, 64, 3), dtype=np.uint16)
    noise[0, 0] = (0x101, 0x202, 0x303)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in noise)
    data = png(64, 64, 16, 2, rows, chunk(b"tRNS", b"\1\1\2\2\3\3"))
    loaded = load(data[: len(data) // 2], size=64, accept_truncated=True)
    assert loaded.note is not None
    assert loaded.pixels[0, 0].tolist() == [255, 255, 255]
    assert loaded.pixels[0, 1].tolist() == (noise[0, 1] >> 8).tolist()


def gif_on_a_canvas(frame: Image.Image, side: int, **options: int) -> bytes:
    """A GIF whose only frame is at (2, 2) of a larger canvas."""
    data = encoded(frame, "GIF", **options)
    place = data.index(b"," + struct.pack("<HHHH", 0, 0, *frame.size))
    canvas, frame_at = struct.pack("<HH", side, side), struct.pack("<HH", 2, 2)
    return data[:6] + canvas + data[10 : place + 1] + frame_at + data[place + 5 :]


@pytest.mark.parametrize("options", [{}, {"transparency": 2}])
def test_around_a_gif_frame_smaller_than_its_canvas_is_white(load, options):
    """Pillow leaves the palette's first colour there, which is red here."""
    frame = Image.new("P", (4, 4), 1)
    frame.putpalette(RED + BLUE + GREEN)
    expected = np.full((8, 8, 3), 255)
    expected[2:6, 2:6] = BLUE
    assert_pixels(load(gif_on_a_canvas(frame, 8, **options), size=8), expected)


@pytest.mark.parametrize("flags", [0x02, 0x12], ids=["opaque", "alpha"])
def test_around_a_webp_frame_smaller_than_its_canvas_is_white(load, flags):
    def part(name: bytes, body: bytes) -> bytes:
        return name + struct.pack("<I", len(body)) + body

    def numbers(*values: int) -> bytes:
        return b"".join(struct.pack("<I", value)[:3] for value in values)

    frame = encoded(Image.new("RGB", (4, 4), BLUE), "WEBP", lossless=True)[12:]
    animation = part(b"ANMF", numbers(1, 1, 3, 3, 100) + b"\0" + frame)
    header = part(b"VP8X", bytes([flags, 0, 0, 0]) + numbers(7, 7))
    body = b"WEBP" + header + part(b"ANIM", b"\0\xff\0\xff\0\0") + 2 * animation
    expected = np.full((8, 8, 3), 255)
    expected[2:6, 2:6] = BLUE
    assert_pixels(load(part(b"RIFF", body), size=8), expected)


def test_alpha_is_composited_on_white(load):
    rows = b"\0" + bytes((255, 0, 0, 128)) + bytes((0, 0, 0, 0))
    assert pair(load, png(2, 2, 8, 6, rows * 2)) == [[255, 127, 127], [255, 255, 255]]


def test_grey_with_alpha_is_composited_on_white(load):
    assert pair(load, png(2, 2, 8, 4, b"\0\0\x80\x32\xff" * 2)) == [[127] * 3, [50] * 3]


@pytest.mark.parametrize(("alphas", "red"), [(b"\0\xff", WHITE), (b"\x80\xff", (255, 127, 127))])
def test_palette_with_transparency_is_composited_on_white(load, alphas, red):
    extra = (chunk(b"PLTE", bytes(RED + BLUE)), chunk(b"tRNS", alphas))
    assert pair(load, png(2, 2, 8, 3, b"\0\0\1" * 2, *extra)) == [list(red), list(BLUE)]


def test_transparent_gif_is_composited_on_white(load):
    image = Image.new("P", (2, 2), 1)
    image.putpalette(RED + BLUE)
    image.putpixel((0, 0), 0)
    assert_pixels(load(encoded(image, "GIF", transparency=0)), [[WHITE, BLUE], [BLUE, BLUE]])


def test_transparent_webp_is_composited_on_white(load):
    image = Image.new("RGBA", (2, 2), (*BLUE, 0))
    image.putpixel((0, 0), (*RED, 255))
    assert_pixels(load(encoded(image, "WEBP", lossless=True)), [[RED, WHITE], [WHITE, WHITE]])


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_palette_png_of_any_depth(load, depth):
    row = bytes([0b01 << (8 - 2 * depth)]) if depth < 8 else b"\0\1"
    palette = chunk(b"PLTE", bytes(RED + BLUE))
    assert pair(load, png(2, 2, depth, 3, (b"\0" + row) * 2, palette)) == [list(RED), list(BLUE)]


@pytest.mark.parametrize(("bits", "row"), [(1, b"\x40"), (4, b"\x01"), (8, b"\0\1")])
def test_palette_bmp_keeps_its_colours(load, bits, row):
    data = bmp(2, 2, bits, row.ljust(4, b"\0") * 2, palette=bgr0(RED, GREEN))
    assert pair(load, data) == [list(RED), list(GREEN)]


RLE = {"RLE8": (8, 1, b"\1\0\1\1\0\0\1\1\1\0\0\1"), "RLE4": (4, 2, b"\2\x01\0\0\2\x10\0\1")}


@pytest.mark.parametrize("name", RLE)
def test_run_length_encoded_bmp(load, name):
    bits, compression, body = RLE[name]
    data = bmp(2, 2, bits, body, palette=bgr0(RED, GREEN), compression=compression)
    assert_pixels(load(data), [[GREEN, RED], [RED, GREEN]])  # the bottom row comes first


def test_bmp_upside_down_and_top_down(load):
    first = bytes(RED[::-1] + GREEN[::-1] + (0, 0))
    second = bytes(BLUE[::-1] + WHITE[::-1] + (0, 0))
    assert_pixels(load(bmp(2, -2, 24, first + second)), QUADRANTS)
    assert_pixels(load(bmp(2, 2, 24, second + first)), QUADRANTS)


def test_fourth_byte_of_a_bmp_is_alpha_only_if_its_header_says_so(load):
    row = bytes((0, 0, 255, 0)) * 2
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    assert pair(load, bmp(2, 2, 32, row * 2)) == [list(RED), list(RED)]
    with_alpha = bmp(2, 2, 32, row * 2, compression=3, masks=masks)
    assert pair(load, with_alpha) == [list(WHITE), list(WHITE)]


@pytest.mark.parametrize(
    ("inks", "rgb"),
    [((0, 0, 0, 0), WHITE), ((255, 0, 0, 0), (0, 255, 255)), ((0, 0, 0, 255), BLACK)],
)
def test_cmyk_jpeg_has_the_colours_of_its_inks(load, inks, rgb):
    data = encoded(Image.new("CMYK", (16, 16), inks), "JPEG", quality=100)
    assert np.abs(load(data).pixels.astype(int) - rgb).max() <= 2


@pytest.mark.parametrize("orientation", [1, 6])
def test_large_jpeg_is_decoded_small_and_keeps_its_size_and_look(
    tmp_path, photos_folder, orientation
):
    size = 1201, 903  # decoded at a half for 224 pixels
    photo = Image.open(photos_folder / "coffee.jpg").convert("RGB").resize(size)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    photo.save(tmp_path / "a.jpg", quality=95, exif=exif)
    image = load_image(tmp_path / "a.jpg", LoadSettings(224))
    assert (image.width, image.height) == (size if orientation == 1 else size[::-1])
    whole = Image.open(tmp_path / "a.jpg").resize((224, 224), Image.Resampling.BILINEAR)
    upright = whole if orientation == 1 else whole.transpose(Image.Transpose.ROTATE_270)
    difference = np.abs(image.pixels.astype(int) - np.asarray(upright).astype(int))
    assert difference.mean() < 1.5


def test_jpeg_under_four_times_the_size_is_decoded_whole(tmp_path, photos_folder):
    photo = Image.open(photos_folder / "coffee.jpg").convert("RGB").resize((895, 1200))
    photo.save(tmp_path / "a.jpg", quality=95)
    whole = Image.open(tmp_path / "a.jpg").resize((224, 224), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(
        load_image(tmp_path / "a.jpg", LoadSettings(224)).pixels, np.asarray(whole)
    )


@pytest.mark.parametrize(
    ("size", "small"),
    [
        ((640, 480), (200, 150)),
        ((480, 640), (150, 200)),
        ((9000, 3), (200, 1)),
        ((20, 10), (20, 10)),
    ],
)
def test_thumbnail_keeps_the_aspect_ratio_and_enlarges_nothing(tmp_path, size, small):
    path = tmp_path / "photo.png"
    Image.new("RGB", size, "red").save(path)
    loaded = load_thumbnail(path, LoadSettings(200))
    assert loaded.pixels.shape == (*reversed(small), 3)
    assert (loaded.width, loaded.height) == size
    shown = Image.open(io.BytesIO(encode_webp(loaded.pixels, 80)))
    assert (shown.format, shown.size) == ("WEBP", small)
    assert np.abs(np.asarray(shown).astype(int) - RED).max() < 10


def test_thumbnail_is_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (640, 480)).save(path, exif=exif)
    loaded = load_thumbnail(path, LoadSettings(200))
    assert loaded.pixels.shape == (200, 150, 3)
    assert (loaded.width, loaded.height) == (480, 640)


@pytest.mark.parametrize("name", SAMPLES)
def test_thumbnail_of_a_cut_file_is_refused_like_its_photo(tmp_path, name):
    path = tmp_path / "photo.jpg"
    path.write_bytes(SAMPLES[name][: len(SAMPLES[name]) // 2])
    photo, thumbnail = (load(path, LoadSettings(64)) for load in (load_image, load_thumbnail))
    assert type(photo.pixels) is type(thumbnail.pixels)
    if isinstance(photo.pixels, Rejection):
        assert photo.pixels == thumbnail.pixels


def test_thumbnail_of_a_bomb_is_refused(tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(SAMPLES["PNG"])
    assert_rejected(load_thumbnail(path, LoadSettings(200, max_pixels=100)), ErrorType.TOO_LARGE)
