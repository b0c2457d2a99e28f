"""Ids as 64-bit hashes, the same on every machine: sets of many ids, and shards.

Ids with the same hash count as one id. Among 10^8 ids, the chance of a collision is 1 in 3,700.
"""

from collections.abc import Iterable
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.int64]


def hashes_of(image_ids: Iterable[str]) -> Hashes:
    """Return `int64[N]`: the first 64 bits of each id's BLAKE2b."""
    digests = b"".join(
        [blake2b(image_id.encode(), digest_size=8).digest() for image_id in image_ids]
    )
    return np.frombuffer(digests, ">i8").astype(np.int64)


def in_shard(hashes: Hashes, index: int, count: int) -> npt.NDArray[np.bool_]:
    """Return `bool[N]`: which ids belong to shard `index` of `count`; each belongs to one."""
    return hashes % count == index


def positions(sorted_hashes: Hashes, wanted: Hashes) -> Hashes:
    """Return `int64[N]`: the positions of the wanted hashes among sorted ones, or -1."""
    if not len(sorted_hashes):
        return np.full(len(wanted), -1)
    # In order, so that successive searches touch the same part of memory.
    order = np.argsort(wanted)
    found = np.empty(len(wanted), np.int64)
    found[order] = np.searchsorted(sorted_hashes, wanted[order])
    is_found = sorted_hashes[np.minimum(found, len(sorted_hashes) - 1)] == wanted
    return np.where(is_found, found, -1)


class IdSet:
    """A growing set of ids: 8 bytes per id, up to 24 while it grows."""

    def __init__(self) -> None:
        self._runs: list[Hashes] = []  # sorted, each at least twice as long as the next

    def add(self, hashes: Hashes) -> npt.NDArray[np.bool_]:
        """Add ids; return `bool[N]`: which were new; of equal ids, only the first is."""
        distinct, first = np.unique(hashes, return_index=True)
        is_unknown = np.ones(len(distinct), np.bool_)
        for run in self._runs:
            is_unknown &= positions(run, distinct) < 0
        self._append(distinct[is_unknown])
        is_new = np.zeros(len(hashes), np.bool_)
        is_new[first[is_unknown]] = True
        return is_new

    def _append(self, run: Hashes) -> None:
        while self._runs and len(self._runs[-1]) < 2 * len(run):
            run = np.concatenate([self._runs.pop(), run])
            run.sort(kind="stable")  # a stable sort merges sorted runs
        if len(run):
            self._runs.append(run)
