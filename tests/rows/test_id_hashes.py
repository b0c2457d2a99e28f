"""Sets and shards of ids, compared with Python's sets."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchcap.rows.id_hashes import IdSet, hashes_of, in_shard, positions

NUMBERS = st.lists(st.integers(-5, 5) | st.integers(-(2**63), 2**63 - 1), max_size=20)


def int64(numbers: list[int]) -> np.ndarray:
    return np.array(numbers, np.int64)


def test_hashes_are_the_same_on_every_machine_and_in_every_version():
    """Unfinished runs, and their shards, depend on it."""
    hashes = hashes_of(["a/1.jpg", "照片.webp", ""]).tolist()
    assert hashes == [50258119939534515, -7424024040096525311, -1970711489451281740]


@given(st.lists(NUMBERS, max_size=8))
def test_set_reports_the_first_of_equal_ids_as_new(batches):
    ids, met = IdSet(), set()
    for batch in batches:
        expected = []
        for number in batch:
            expected.append(number not in met)
            met.add(number)
        assert ids.add(int64(batch)).tolist() == expected


def test_a_set_of_many_ids_has_few_runs():
    ids = IdSet()
    for batch in np.random.default_rng(0).integers(-(2**63), 2**63, (300, 100)):
        assert ids.add(batch).all()
        assert not ids.add(batch).any()
    assert len(ids._runs) <= 16
    assert sum(map(len, ids._runs)) == 30_000


@given(st.sets(st.integers(-5, 5)), NUMBERS)
def test_positions_are_those_of_the_hashes(known, wanted):
    ordered = sorted(known)
    expected = [ordered.index(number) if number in known else -1 for number in wanted]
    assert positions(int64(ordered), int64(wanted)).tolist() == expected


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_each_id_is_in_one_shard_and_shards_have_similar_sizes(count):
    hashes = hashes_of([f"{number}.jpg" for number in range(10_000)])
    shards = [in_shard(hashes, index, count) for index in range(count)]
    assert np.sum(shards, axis=0).tolist() == [1] * 10_000
    assert min(map(np.count_nonzero, shards)) > 10_000 / count * 0.93
