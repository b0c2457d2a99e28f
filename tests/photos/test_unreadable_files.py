"""Files that are missing, changing, special or empty."""

import hashlib
import itertools
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers.images import (
    QUADRANTS,
    SAMPLES,
    assert_pixels,
    assert_rejected,
    bmp,
    encoded,
)
from PIL import Image

from batchcap.photos import images
from batchcap.photos.images import LoadSettings, load_image
from batchcap.schema import ErrorType, LoadedImage, Rejection

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # as `images` does


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


def test_folder_pipe_socket_and_device_are_not_files(tmp_path):
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
    """The refusal is scripted, because root may read any file."""
    path = tmp_path / "secret.jpg"
    path.write_bytes(SAMPLES["JPEG"])

    def refuse(path, flags):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "open", refuse)
    loaded = load_image(path, LoadSettings(2))
    assert "Permission denied" in assert_rejected(loaded, ErrorType.UNREADABLE).message
    assert (loaded.file_size, loaded.sha256) == (len(SAMPLES["JPEG"]), None)
    assert loaded.mtime_ns == path.stat().st_mtime_ns


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="there is no /proc/self/mem")
def test_file_on_a_broken_disk_is_unreadable(tmp_path):
    """Address 0 is unmapped, so reading it fails with the EIO of a broken disk."""
    (tmp_path / "a.jpg").symlink_to("/proc/self/mem")
    loaded = load_image(tmp_path / "a.jpg", LoadSettings(2))
    assert "put/output error" in assert_rejected(loaded, ErrorType.UNREADABLE).message
    assert loaded.mtime_ns is not None


class Writer:
    """Replaces `time`: writes to a fresh file during the pause before it is read."""

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


def test_file_deleted_before_its_second_read_is_missing(tmp_path, monkeypatch):
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
    """Load a file repeatedly while a thread writes one photo after the other.

    Each size, time and hash must be those of a version of the file.
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
