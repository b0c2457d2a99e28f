"""Which images have rows already, and in which files: 41 bytes an image, whatever its name.

Ids and SHA-256 sums are kept as 64-bit hashes in sorted arrays. Two ids of one hash would have to
have one size and one modification time as well to be taken for each other.
"""

import hashlib
from collections.abc import Iterable
from enum import Enum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

UNKNOWN = -1  # a size or a time that could not be read


class Known(Enum):
    """How an image stands to the rows that are there."""

    DONE = "done"
    FAILED = "failed before"
    CHANGED = "changed"


class Place(NamedTuple):
    """Where a row is: which file of the index, which of its row groups."""

    file: int
    group: int


class Entries(NamedTuple):
    """What the index keeps of a file's rows, `int64[rows]` each."""

    hashes: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    times: npt.NDArray[np.int64]
    failed: npt.NDArray[np.int64]
    sums: npt.NDArray[np.int64]
    groups: npt.NDArray[np.int64]


def entries_of(groups: Iterable[pa.Table]) -> Entries:
    """The entries of a file's rows, from its row groups."""
    columns = [_columns(group, table) for group, table in enumerate(groups)]
    return Entries(*map(np.concatenate, zip(NO_ENTRIES, *columns, strict=True)))


NO_ENTRIES = Entries(*(np.zeros(0, np.int64) for _ in Entries._fields))


class RowIndex:
    """What the rows of some files say of their images; each image has one row."""

    def __init__(self, files: list[Entries]) -> None:
        all_rows = Entries(*map(np.concatenate, zip(NO_ENTRIES, *files, strict=True)))
        file = np.repeat(np.arange(len(files), dtype=np.int32), [len(f.hashes) for f in files])
        order = np.argsort(all_rows.hashes)
        self._hashes, self._sizes, self._times = (
            column[order] for column in (all_rows.hashes, all_rows.sizes, all_rows.times)
        )
        self._failed, self._file = all_rows.failed[order].astype(np.bool_), file[order]
        self._seen = np.zeros(len(order), np.bool_)
        captioned = np.flatnonzero(all_rows.failed == 0)
        captioned = captioned[np.argsort(all_rows.sums[captioned])]
        self._sums = all_rows.sums[captioned]
        self._places = file[captioned], all_rows.groups[captioned].astype(np.int32)

    def __len__(self) -> int:
        return len(self._hashes)

    def find(self, image_id: str) -> int | None:
        """The image's row number in the index."""
        wanted = _hash(image_id)
        row = int(np.searchsorted(self._hashes, wanted))
        return row if row < len(self) and self._hashes[row] == wanted else None

    def compare(self, row: int, size: int, mtime_ns: int) -> Known:
        """How a file of this size and modification time stands to its row."""
        if (self._sizes[row], self._times[row]) != (size, mtime_ns):
            return Known.CHANGED
        return Known.FAILED if self._failed[row] else Known.DONE

    def file_of(self, row: int) -> int:
        """The number of the file that the row is in."""
        return int(self._file[row])

    def mark_seen(self, row: int) -> None:
        """Remember that the input still has this image."""
        self._seen[row] = True

    @property
    def vanished(self) -> int:
        """How many images have rows but were not seen."""
        return len(self) - int(np.count_nonzero(self._seen))

    def vanished_of(self, file: int, image_ids: Iterable[str]) -> set[str]:
        """Those of a file's images that were not seen."""
        if self._seen[self._file == file].all():
            return set()
        rows = ((image_id, self.find(image_id)) for image_id in image_ids)
        return {image_id for image_id, row in rows if row is not None and not self._seen[row]}

    def places_of(self, sha256: str) -> list[Place]:
        """Where captioned rows may be of a file of these bytes; their own sums decide."""
        wanted = _sum(sha256)
        start, end = (np.searchsorted(self._sums, wanted, side) for side in ("left", "right"))
        files, groups = (column[start:end].tolist() for column in self._places)
        return list(map(Place, files, groups))


def _columns(group: int, table: pa.Table) -> Entries:
    count = len(table)
    return Entries(
        hashes=np.fromiter(map(_hash, table["image_id"].to_pylist()), np.int64, count),
        sizes=table["file_size"].fill_null(UNKNOWN).to_numpy(),
        times=table["mtime_ns"].fill_null(UNKNOWN).to_numpy(),
        failed=pc.not_equal(table["status"], "ok").to_numpy().astype(np.int64),
        sums=np.fromiter(map(_sum, table["sha256"].to_pylist()), np.int64, count),
        groups=np.full(count, group),
    )


def _hash(image_id: str) -> int:
    digest = hashlib.blake2b(image_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def _sum(sha256: str | None) -> int:
    return 0 if sha256 is None else int.from_bytes(bytes.fromhex(sha256[:16]), signed=True)
