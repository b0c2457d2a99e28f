"""From photos to rows: order, failures, and lack of memory."""

import hashlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers.small_model import small_captioner
from helpers.workers import worker_of

from batchcap.captioning.local_engine import (
    BATCHES_UNDER_WAY,
    PHOTOS_PER_READ,
    Photo,
    batched,
    in_threads,
    rows_of,
)
from batchcap.errors import ModelError
from batchcap.model.captioner import Captioner
from batchcap.process.clock import StageClock
from batchcap.schema import ErrorType, ImageRef, LoadedImage, Rejection
from batchcap.settings import DecodeSettings


def photos_of(crops: Any, count: int) -> list[Photo]:
    return [
        Photo(ImageRef(f"{i}.jpg", f"{i}.jpg"), LoadedImage(crops[i], sha256=str(i)))
        for i in range(count)
    ]


def rejected(number: int) -> Photo:
    image = LoadedImage(Rejection(ErrorType.EMPTY, "The file is empty."))
    return Photo(ImageRef(f"{number}", f"{number}"), image)


NETWORKLESS = SimpleNamespace(
    config=SimpleNamespace(
        backbone=SimpleNamespace(image_size=8), decoder=SimpleNamespace(max_length=5)
    ),
    clock=StageClock(),
)


def tokens_of(photos: list[Photo]) -> list[list[int]]:
    return [photo.caption.ids.tolist() for photo in photos]


class SmallDevice:
    """A captioner whose device has memory for `room` photos at a time."""

    def __init__(self, captioner: Captioner, room: int) -> None:
        self.captioner, self.room = captioner, room
        self.tried: list[int] = []
        self.config = captioner.config

    def caption(self, pixels: Any, *arguments: Any) -> Any:
        self.tried.append(len(pixels))
        if len(pixels) > self.room:
            raise MemoryError("out of memory")
        return self.captioner.caption(pixels, *arguments)


@pytest.fixture(scope="module")
def small(photo_crops: Any) -> Captioner:
    """Return a small captioner for photos of the crops' size."""
    return small_captioner(photo_crops.shape[1])


@pytest.fixture
def greedy(small: Captioner) -> DecodeSettings:
    return DecodeSettings(small.config.decoder.max_length)


def test_batches_are_halved_until_they_fit_and_stay_so(small, photo_crops, caplog):
    photos = photos_of(photo_crops, 8)
    whole = worker_of(small, 8).caption(photos)
    device = SmallDevice(small, room=3)
    worker = worker_of(device, 8)
    with caplog.at_level(logging.WARNING):
        in_parts = worker.caption(photos)
    assert device.tried == [8, 4, 2, 2, 2, 2]
    worker.caption(photos)
    assert device.tried[6:] == [2, 2, 2, 2]
    assert [photo.ref for photo in in_parts] == [photo.ref for photo in photos]
    assert tokens_of(in_parts) == tokens_of(whole)
    assert caplog.messages == [
        "not enough memory for batches of 8 photos; continuing with 4 (--batch-size 4 avoids this)",
        "not enough memory for batches of 4 photos; continuing with 2 (--batch-size 2 avoids this)",
    ]


def test_no_memory_for_a_single_photo_ends_the_run(small, photo_crops):
    with pytest.raises(ModelError, match="a single photo"):
        worker_of(SmallDevice(small, room=0), 2).caption(photos_of(photo_crops, 2))


def test_a_device_out_of_memory_is_a_memory_error(small, greedy, photo_crops, monkeypatch):
    import tensorflow as tf

    def fail(_pixels: Any) -> None:
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")

    monkeypatch.setattr(small, "extract", fail)
    with pytest.raises(MemoryError):
        small.caption(photo_crops[:1], greedy, ["a"])


def test_rows_come_in_the_order_of_the_photos(small, photos_folder):
    paths = [*sorted(photos_folder.rglob("*.jpg")), Path("nowhere.jpg")] * 3
    refs = [ImageRef(f"{i}", str(path)) for i, path in enumerate(paths)]
    rows = [row for batch in worker_of(small, 4).rows(iter(refs)) for row in batch]
    assert [row["image_id"] for row in rows] == [ref.image_id for ref in refs]
    reasons = [*[None] * (len(paths) // 3 - 1), "missing"]
    assert [row["error_type"] for row in rows] == reasons * 3
    assert rows[0]["caption"] == rows[len(reasons)]["caption"] == rows[2 * len(reasons)]["caption"]


def test_threads_read_ahead_within_limits_and_keep_the_order():
    taken: list[int] = []
    handed_out = 0

    def numbers() -> Iterator[int]:
        for number in range(50):
            taken.append(number)
            assert len(taken) - handed_out <= 5
            yield number

    results = []
    for result in in_threads(lambda number: number * 2, numbers(), threads=3, ahead=5):
        handed_out += 1
        results.append(result)
    assert results == [number * 2 for number in range(50)]


def test_bytes_in_memory_are_bounded_and_freed_once_read():
    """Photos of archives are read as needed, however slowly rows are taken."""
    taken = 0

    def refs() -> Iterator[ImageRef]:
        nonlocal taken
        for number in range(500):
            taken += 1
            yield ImageRef(str(number), "", 1, None, b"x")

    rejection = LoadedImage(Rejection(ErrorType.CORRUPT, "It is one byte."))
    worker = worker_of(NETWORKLESS, 8, read=lambda photos: [rejection for _ in photos])
    for number, photo in enumerate(worker.load(refs(), ahead=16)):
        assert taken - number <= 16 + 2 * PHOTOS_PER_READ
        assert photo.ref == ImageRef(str(number), "", 1)


def test_a_failure_in_a_thread_reaches_the_caller_and_stops_the_work():
    started: list[int] = []

    def work(number: int) -> int:
        started.append(number)
        if number == 3:
            raise ZeroDivisionError
        return number

    with pytest.raises(ZeroDivisionError):
        list(in_threads(work, iter(range(1000)), threads=2, ahead=4))
    assert len(started) < 20
    assert threading.active_count() < 20


@pytest.mark.parametrize(("count", "sizes"), [(0, []), (3, [3]), (7, [3, 3, 1])])
def test_batches_are_full_except_the_last(count, sizes, photo_crops):
    assert [len(batch) for batch in batched(iter(photos_of(photo_crops, count)), 3)] == sizes


def test_photos_that_need_no_caption_take_no_slot(photo_crops):
    good = photos_of(photo_crops, 4)
    mixed = [rejected(0), good[0], rejected(1), good[1], good[2], rejected(2), good[3]]
    assert [*batched(iter(mixed), 2)] == [mixed[:4], mixed[4:]]


def test_batch_ends_even_if_no_photo_needs_a_caption():
    sizes = [len(batch) for batch in batched(map(rejected, range(10)), 2)]
    assert sizes == [4, 4, 2]


def test_row_may_have_both_a_caption_and_a_note():
    note = Rejection(ErrorType.TRUNCATED, "The file ends early.")
    image = LoadedImage(np.zeros((32, 32, 3), np.uint8), 1, 2, "ab", 32, 32, note)
    photo = Photo(ImageRef("a.jpg", "a.jpg"), image, reused={"caption": "known"})
    (row,) = rows_of([photo], worker_of(NETWORKLESS, 1).settings)
    assert (row["status"], row["caption"]) == ("ok", "known")
    assert (row["error_type"], row["error_message"]) == ("truncated", "The file ends early.")


def test_a_batch_of_rejected_photos_is_not_captioned():
    worker, photos = worker_of(NETWORKLESS, 4), [rejected(0)]
    assert worker.caption(photos) == photos
    (row,) = rows_of(photos, worker.settings)
    assert (row["status"], row["error_type"], "caption" in row) == ("failed", "empty", False)


def test_caption_of_the_same_bytes_is_reused(small, photos_folder):
    refs = [ImageRef(path.name, str(path)) for path in sorted(photos_folder.glob("*.jpg"))]
    coffee = hashlib.sha256((photos_folder / "coffee.jpg").read_bytes()).hexdigest()
    known = {coffee: {"caption": "known"}}
    worker = worker_of(small, 2)
    found = worker.photos(refs, reusable=known.get)
    rows = {row["image_id"]: row for batch in found for row in rows_of(batch, worker.settings)}
    assert [name for name, row in rows.items() if row["caption"] == "known"] == ["coffee.jpg"]
    assert rows["coffee.jpg"]["status"] == "ok"
    assert rows["coffee.jpg"]["file_size"] == (photos_folder / "coffee.jpg").stat().st_size


def test_rejected_photo_reuses_no_caption(small):
    """A copy rejected by `--max-pixels` was `failed` but had a caption."""
    images = [
        LoadedImage(Rejection(ErrorType.TOO_LARGE, "It has too many pixels."), sha256="a"),
        LoadedImage(np.zeros((224, 224, 3), np.uint8), sha256="a"),
    ]
    worker = worker_of(small, 2, read=lambda photos: images[: len(photos)])
    refs = [ImageRef(name, name) for name in ("refused.jpg", "whole.jpg")]
    (batch,) = worker.photos(refs, reusable=lambda _sha256: {"caption": "known"})
    refused, whole = rows_of(batch, worker.settings)
    assert (refused["status"], refused.get("caption")) == ("failed", None)
    assert (whole["status"], whole["caption"]) == ("ok", "known")


def test_no_batch_is_begun_once_the_run_is_over(small, photos_folder):
    refs = [ImageRef(str(i), str(photos_folder / "coffee.jpg")) for i in range(100)]
    done: list[str] = []
    batches = worker_of(small, 2).photos(refs, is_over=lambda: bool(done))
    for photos in batches:
        done += [photo.ref.image_id for photo in photos]
    assert done == [str(i) for i in range(len(done))]
    assert 2 <= len(done) <= 2 * (BATCHES_UNDER_WAY + 1)


def test_photo_that_reappears_is_captioned_by_the_next_run(small, photos_folder):
    """Its size and time were read after it came back, so that it counted as unchanged."""
    missing = LoadedImage(Rejection(ErrorType.MISSING, "There is no such file."))
    ref = ImageRef("coffee.jpg", str(photos_folder / "coffee.jpg"))
    worker = worker_of(small, 1, read=lambda photos: [missing for _ in photos])
    ((row,),) = worker.rows([ref])
    assert (row["error_type"], row["file_size"], row["mtime_ns"]) == ("missing", None, None)
