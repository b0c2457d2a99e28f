"""Index of existing rows: which images have one, in which file. 46 bytes per image.

Ids and SHA-256 sums are kept as 64-bit hashes in sorted arrays. If files have several rows of an
image, the newest file's counts; the others are superseded.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batchcap.rows.id_hashes import Hashes, hashes_of, positions
from batchcap.rows.parquet import read_groups

UNKNOWN = -1  # a size or a time that could not be read


class Known(Enum):
    """State of an image relative to the existing output."""

    DONE = "done"
    FAILED = "failed before"
    CHANGED = "changed"


class Place(NamedTuple):
    """Place of a row: its file in the index, and its row group."""

    file: int
    group: int


class Entries(NamedTuple):
    """The index's entries for the rows of a file, `int64[rows]` each."""

    hashes: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    times: npt.NDArray[np.int64]
    failed: npt.NDArray[np.int64]
    sums: npt.NDArray[np.int64]
    groups: npt.NDArray[np.int64]


def entries_of(groups: Iterable[pa.Table]) -> Entries:
    """Return the entries of a file's rows, from its row groups."""
    columns = [_columns(group, table) for group, table in enumerate(groups)]
    return Entries(*map(np.concatenate, zip(NO_ENTRIES, *columns, strict=True)))


NO_ENTRIES = Entries(*(np.zeros(0, np.int64) for _ in Entries._fields))


class RowIndex:
    """Index of the rows of files, oldest first.

    `superseded` maps a file's number to the hashes of its images that have rows in newer files.
    """

    def __init__(self, files: Sequence[Entries]) -> None:
        order, self._file, self.superseded = _newest([entries.hashes for entries in files])

        def column(name: str, kind: npt.DTypeLike) -> npt.NDArray[Any]:
            """Merge one column at a time: all of them together are large."""
            parts = [getattr(entries, name) for entries in (NO_ENTRIES, *files)]
            return np.concatenate(parts)[order].astype(kind, copy=False)

        self._hashes, self._sizes = column("hashes", np.int64), column("sizes", np.int64)
        self._times, self._sums = column("times", np.int64), column("sums", np.int64)
        self._failed, self._groups = column("failed", np.bool_), column("groups", np.int32)
        self._seen = np.zeros(len(order), np.bool_)
        captioned = np.flatnonzero(~self._failed).astype(np.uint32)
        self._by_sum = captioned[np.argsort(self._sums[captioned])]

    def __len__(self) -> int:
        return len(self._hashes)

    def find(self, image_id: str) -> int | None:
        """Return the image's row number."""
        (row,) = self.find_all(hashes_of([image_id]))
        return int(row) if row >= 0 else None

    def find_all(self, hashes: Hashes) -> Hashes:
        """Return `int64[N]`: the row numbers of images, by their ids' hashes; -1 without a row."""
        return positions(self._hashes, hashes)

    def compare(self, row: int, size: int, mtime_ns: int) -> Known:
        """Compare a file of this size and modification time with its row."""
        if self._sizes[row] != size or self._times[row] != mtime_ns:
            return Known.CHANGED
        return Known.FAILED if self._failed[row] else Known.DONE

    def compare_bytes(self, row: int, size: int, sha256: str | None) -> Known:
        """Compare a photo of this size and content with its row; its time does not count."""
        if self._sizes[row] != size or self._sums[row] != _sum(sha256):
            return Known.CHANGED
        return Known.FAILED if self._failed[row] else Known.DONE

    def files_of(self, rows: Hashes) -> npt.NDArray[np.int32]:
        """Return `int32[N]`: the numbers of the rows' files."""
        return self._file[rows]

    def mark_seen(self, rows: int | Hashes) -> None:
        """Mark images that the input still has."""
        self._seen[rows] = True

    def is_seen(self, rows: Hashes) -> npt.NDArray[np.bool_]:
        """Return `bool[N]`: which of these rows are marked as seen."""
        return self._seen[rows]

    @property
    def vanished(self) -> int:
        """Number of images that have rows but were not seen."""
        return len(self) - int(np.count_nonzero(self._seen))

    def vanished_of(self, file: int) -> Hashes:
        """Return the sorted hashes of a file's images that were not seen."""
        return self._hashes[(self._file == file) & ~self._seen]

    def places_of(self, sha256: str) -> list[Place]:
        """Return places of captioned rows whose SHA-256 may be this one; callers compare it."""
        wanted, by_sum = _sum(sha256), self._by_sum
        start = end = bisect_left(by_sum, wanted, key=self._sums.__getitem__)
        while end < len(by_sum) and self._sums[by_sum[end]] == wanted:
            end += 1
        rows = by_sum[start:end]
        return list(map(Place, self._file[rows].tolist(), self._groups[rows].tolist()))


def newest_rows(paths: Sequence[Path]) -> Iterator[pa.Table]:
    """Yield the row groups of files, oldest first, without superseded rows.

    Raises what `read_groups` raises.
    """
    superseded: dict[int, Hashes] = {}
    if len(paths) > 1:
        hashes = [
            np.concatenate([NO_ENTRIES.hashes, *map(_hashes_in, read_groups(path, ["image_id"]))])
            for path in paths
        ]
        _, _, superseded = _newest(hashes)
    for number, path in enumerate(paths):
        for table in read_groups(path):
            yield without(table, superseded.get(number))


def without(table: pa.Table, superseded: Hashes | None) -> pa.Table:
    """Return the rows whose images have none of these sorted hashes."""
    if superseded is None:
        return table
    return table.filter(pa.array(positions(superseded, _hashes_in(table)) < 0))


def _newest(
    files: Sequence[Hashes],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], dict[int, Hashes]]:
    """Find the newest row of each image, in the order of the hashes.

    Returns the rows' numbers, their files' numbers and, by file, the hashes that newer files have.
    """
    rows = np.cumsum([0, *map(len, files)])
    hashes = np.concatenate([NO_ENTRIES.hashes, *files])
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    file = (np.searchsorted(rows, order, "right") - 1).astype(np.int32)
    is_newest = np.append(hashes[1:] != hashes[:-1], True)[: len(order)]
    newest, older = np.flatnonzero(is_newest), np.flatnonzero(~is_newest)
    # batchcap never writes two rows of an image to one file; such rows are kept.
    older = older[file[older] != file[newest[np.searchsorted(newest, older)]]]
    superseded = {
        int(number): np.unique(hashes[older[file[older] == number]])
        for number in np.unique(file[older])
    }
    return order[newest], file[newest], superseded


def _hashes_in(table: pa.Table) -> Hashes:
    return hashes_of(table["image_id"].to_pylist())


def _columns(group: int, table: pa.Table) -> Entries:
    count = len(table)
    return Entries(
        hashes=_hashes_in(table),
        sizes=table["file_size"].fill_null(UNKNOWN).to_numpy(),
        times=table["mtime_ns"].fill_null(UNKNOWN).to_numpy(),
        failed=pc.not_equal(table["status"], "ok").to_numpy().astype(np.int64),
        sums=np.fromiter(map(_sum, table["sha256"].to_pylist()), np.int64, count),
        groups=np.full(count, group),
    )


def _sum(sha256: str | None) -> int:
    return 0 if sha256 is None else int.from_bytes(bytes.fromhex(sha256[:16]), signed=True)
