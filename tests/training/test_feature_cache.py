"""The cache of features across processes and crashes."""

import multiprocessing
import os
import resource
from collections.abc import Sequence
from multiprocessing.synchronize import Barrier
from pathlib import Path
from zlib import crc32

import numpy as np
import numpy.typing as npt
import pytest

from batchcap.errors import OutputError
from batchcap.training.feature_cache import FEATURES_FILE, INDEX_FILE, FeatureCache

ROW_SHAPE = (1, 2)
KEYS = ("a", "bcd", "ef")
TURNS = 30


def row_of(key: str) -> npt.NDArray[np.float16]:
    """Return features that only this key has."""
    number = int.from_bytes(key.encode()) % 2000  # float16 holds these exactly
    return np.array([[number, -number]], np.float16)


def append(cache: FeatureCache, *keys: str) -> None:
    with cache.writing():
        cache.append(keys, np.stack([row_of(key) for key in keys]))


def reopened(folder: Path) -> FeatureCache:
    cache = FeatureCache(folder, ROW_SHAPE)
    with cache.writing():
        return cache


def assert_holds(cache: FeatureCache, keys: Sequence[str]) -> None:
    assert set(cache.row_of) == set(keys)
    for key in keys:
        np.testing.assert_array_equal(cache.rows()[cache.row_of[key]], row_of(key))


def test_a_full_disk_is_reported_with_what_to_do(tmp_path):
    cache = FeatureCache(tmp_path, ROW_SHAPE)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
    try:
        with pytest.raises(OutputError, match=f"cannot write features to {tmp_path}: File too"):
            append(cache, "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    append(cache, "bcd")
    assert_holds(reopened(tmp_path), ["bcd"])


def test_appended_rows_are_found_by_the_next_process(tmp_path):
    cache = FeatureCache(tmp_path / "new" / "cache", ROW_SHAPE)
    append(cache, "a", "bcd")
    append(cache, "ef")
    assert_holds(cache, KEYS)
    assert_holds(reopened(cache.folder), KEYS)


def test_appending_leaves_earlier_rows_in_place(tmp_path):
    append(FeatureCache(tmp_path, ROW_SHAPE), "a")
    early_rows = reopened(tmp_path).rows()
    append(reopened(tmp_path), "bcd")
    np.testing.assert_array_equal(early_rows[0], row_of("a"))


def test_key_appended_twice_keeps_rows_and_keys_in_step(tmp_path):
    cache = FeatureCache(tmp_path, ROW_SHAPE)
    append(cache, "a", "a", "bcd")
    append(cache, "ef")
    assert cache.row_count == 4
    assert_holds(cache, KEYS)
    assert_holds(reopened(tmp_path), KEYS)


def written_until_crash(folder: Path, features_bytes: int, index_bytes: int) -> Path:
    append(FeatureCache(folder, ROW_SHAPE), *KEYS)
    os.truncate(folder / FEATURES_FILE, features_bytes)
    os.truncate(folder / INDEX_FILE, index_bytes)
    return folder


@pytest.mark.parametrize("features_bytes", range(len(KEYS) * 4 + 1))
def test_crash_at_any_byte_leaves_the_keys_before_it(tmp_path, features_bytes):
    index = "".join(f"{key} {crc32(row_of(key).tobytes()):08x}\n" for key in KEYS)
    for index_bytes in range(len(index) + 1):
        folder = written_until_crash(tmp_path / str(index_bytes), features_bytes, index_bytes)
        whole = min(features_bytes // 4, index[:index_bytes].count("\n"))
        cache = reopened(folder)
        assert set(cache.row_of) == set(KEYS[:whole])
        append(cache, "new")
        assert_holds(reopened(folder), [*KEYS[:whole], "new"])


def test_crash_inside_a_character_loses_its_line_only(tmp_path):
    append(FeatureCache(tmp_path, ROW_SHAPE), "a", "狗")
    os.truncate(tmp_path / INDEX_FILE, len("a 00000000\n狗".encode()) - 1)
    assert_holds(reopened(tmp_path), ["a"])


@pytest.mark.parametrize("value", [np.nan, 1.0])
def test_rows_whose_bytes_have_changed_are_dropped(tmp_path, value):
    append(FeatureCache(tmp_path, ROW_SHAPE), *KEYS)
    rows = np.memmap(tmp_path / FEATURES_FILE, np.float16, "r+", shape=(3, *ROW_SHAPE))
    rows[1, 0, 1] = value
    rows.flush()
    cache = reopened(tmp_path)
    assert cache.drop_damaged(["a", "ef", "unknown"]) == 0
    assert cache.drop_damaged(KEYS) == 1
    assert_holds(cache, ["a", "ef"])
    append(cache, "bcd")
    assert_holds(reopened(tmp_path), KEYS)


@pytest.mark.parametrize("line", [b"bcd 0000000g", b"bcd", b"\xff\xff\xff 00000000", b""])
def test_damaged_line_loses_its_row_only(tmp_path, line):
    append(FeatureCache(tmp_path, ROW_SHAPE), *KEYS)
    index = tmp_path / INDEX_FILE
    lines = index.read_bytes().split(b"\n")
    index.write_bytes(b"\n".join([lines[0], line, *lines[2:]]))
    cache = reopened(tmp_path)
    cache.drop_damaged(cache.row_of.copy())
    assert_holds(cache, ["a", "ef"])


def append_in_turns(folder: Path, name: str, both_are_here: Barrier) -> None:
    cache = FeatureCache(folder, ROW_SHAPE)
    both_are_here.wait()
    for turn in range(TURNS):
        append(cache, f"{name}{turn}")


def test_two_processes_take_turns(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(2, timeout=60)
    writers = [
        spawn.Process(target=append_in_turns, args=(tmp_path, name, barrier)) for name in "ab"
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(timeout=60)
        assert writer.exitcode == 0
    assert_holds(reopened(tmp_path), [f"{name}{turn}" for name in "ab" for turn in range(TURNS)])
