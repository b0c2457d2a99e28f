"""Ids as 64-bit hashes, the same on every machine: sets of many of them, and shards of them.

Ids of one hash are taken for one id. Among 10^8 that befalls a pair once in 3,700 data sets.
"""

from collections.abc import Iterable
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.int64]


def hashes_of(image_ids: Iterable[str]) -> Hashes:
    """`int64[N]`: the first 64 bits of each id's BLAKE2b."""
    digests = b"".join(
        [blake2b(image_id.encode(), digest_size=8).digest() for image_id in image_ids]
    )
    return np.frombuffer(digests, ">i8").astype(np.int64)


def in_shard(hashes: Hashes, index: int, count: int) -> npt.NDArray[np.bool_]:
    """`bool[N]`: which ids are in shard `index` of `count`; each is in one."""
    return hashes % count == index


def positions(sorted_hashes: Hashes, wanted: Hashes) -> Hashes:
    """`int64[N]`: where each wanted hash stands among sorted ones; -1 where it does not."""
    if not len(sorted_hashes):
        return np.full(len(wanted), -1)
    # In order, since neighbours are then looked for in the same part of memory.
    order = np.argsort(wanted)
    found = np.empty(len(wanted), np.int64)
    found[order] = np.searchsorted(sorted_hashes, wanted[order])
    there = sorted_hashes[np.minimum(found, len(sorted_hashes) - 1)] == wanted
    return np.where(there, found, -1)


class IdSet:
    """A set of ids that grows: 8 bytes an id, up to 24 for the moment in which it grows."""

    def __init__(self) -> None:
        self._runs: list[Hashes] = []  # sorted, each at least twice as long as the next

    def add(self, hashes: Hashes) -> npt.NDArray[np.bool_]:
        """Add ids; `bool[N]` says which were not there, of equal ones the first."""
        distinct, first = np.unique(hashes, return_index=True)
        strangers = np.ones(len(distinct), np.bool_)
        for run in self._runs:
            strangers &= positions(run, distinct) < 0
        self._append(distinct[strangers])
        is_new = np.zeros(len(hashes), np.bool_)
        is_new[first[strangers]] = True
        return is_new

    def _append(self, run: Hashes) -> None:
        while self._runs and len(self._runs[-1]) < 2 * len(run):
            run = np.concatenate([self._runs.pop(), run])
            run.sort(kind="stable")  # merges what is sorted already
        if len(run):
            self._runs.append(run)
