"""Orders the rows that workers send, as if one machine had listed the whole input.

Of photos with the same id, the first in archive order gets the row. The row of a new photo is
accepted when it arrives. A row that replaces one of an earlier run waits until all archives before
its own are tallied, because the earlier row may belong to a photo there.
"""

import os
import pickle
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import compress
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from batchcap.captioning.engine import Chunk
from batchcap.captioning.inventory import Inventory, State
from batchcap.captioning.summary import Counts
from batchcap.errors import BatchcapError
from batchcap.photos.archives import Archive
from batchcap.rows.id_hashes import Hashes, IdSet, hashes_of
from batchcap.rows.index import RowIndex
from batchcap.rows.parquet import Row
from batchcap.schema import ImageRef
from batchcap.settings import RunSettings

BYTES_IN_MEMORY = 1 << 26  # of rows that wait; more are on disk

# An archive, or some photos of a folder or a list.
Piece = Archive | list[ImageRef]


class Tally(NamedTuple):
    """A worker's findings in a piece of the input.

    new: hashes of the ids of photos without a row. seen: row numbers of the other photos, and
    states: the `State` of each. failed: reason of each photo without a caption, by the hash of its
    id. duplicates: number of photos skipped because an earlier one has their id; first_duplicate:
    the first of them. unread: each archive that could not be fully read, and why. left_out: the
    first system folder, or empty.
    """

    new: Hashes
    seen: npt.NDArray[np.int32]
    states: npt.NDArray[np.int8]
    failed: dict[int, str]
    is_empty: bool
    duplicates: int
    first_duplicate: str
    unread: list[tuple[str, str]]
    left_out: str


class PieceInventory(Inventory):
    """A worker's inventory of one piece; it marks nothing in the index, which workers share."""

    def __init__(self, settings: RunSettings, index: RowIndex) -> None:
        super().__init__(settings, index)
        self._new = [np.zeros(0, np.int64)]
        self._seen = [np.zeros(0, np.int32)]
        self._states = bytearray()
        self._first_duplicate = ""
        self._unread: list[tuple[str, str]] = []

    def tally(self, failed: dict[int, str]) -> Tally:
        """Return the findings, once the whole piece has been listed."""
        return Tally(
            new=np.concatenate(self._new),
            seen=np.concatenate(self._seen),
            states=np.frombuffer(bytes(self._states), np.int8),
            failed=failed,
            is_empty=self.is_empty,
            duplicates=self.duplicates,
            first_duplicate=self._first_duplicate,
            unread=self._unread,
            left_out=self.left_out,
        )

    def count(self, state: State, photos: int = 1) -> None:
        """Count photos, and keep the state of a photo that has a row."""
        super().count(state, photos)
        if state is not State.NEW:
            self._states.append(state)

    def note_duplicate(self, name: str, photos: int = 1) -> None:
        """Count photos with the id of an earlier one, for the run to warn about."""
        self._first_duplicate = self._first_duplicate or name
        self.duplicates += photos

    def note_unlisted(self, name: str, reason: str) -> None:
        """Record an archive that could not be fully read, for the run to warn about."""
        self.unlisted += 1
        self._unread.append((name, reason))

    def note_left_out(self, name: str) -> None:
        """Record the first system folder, for the run to log."""
        self.left_out = self.left_out or name

    def _note_met(self, new: Hashes, rows: Hashes) -> None:
        self._new.append(new)
        self._seen.append(rows.astype(np.int32))


class Arrivals:
    """Accepts the rows of workers, and counts their photos, as one machine would.

    untallied: number of pieces without a tally. Archives that wait for their turn keep their
    tallies, and settled ones keep the hashes of their new ids: 16 bytes per new photo with its
    row's hash, and 5 bytes per photo that had a row. Nothing is kept if ids cannot repeat, as in
    directories, lists and a single archive.
    """

    def __init__(self, inventory: Inventory, pieces: Sequence[Piece]) -> None:
        self.inventory = inventory
        self.untallied = len(pieces)
        archives = [piece for piece in pieces if isinstance(piece, Archive)]
        self._archives = archives if len(archives) > 1 else []
        self._numbers = {archive: number for number, archive in enumerate(self._archives)}
        self._turn = 0  # the first archive that is not settled
        self._tallies: dict[int, Tally] = {}
        self._waiting = _Waiting()
        self._arrived = IdSet()  # new ids that have a row of this run
        self._settled = IdSet()  # new ids of settled archives
        self._replaced: list[Hashes] = []  # rows that the archive whose turn it is replaces

    def take(
        self, archive: Archive | None, rows: list[Row], tally: Tally | None
    ) -> Iterator[Chunk]:
        """Yield the rows that can be appended now that these rows, or a tally, have arrived."""
        number = None if archive is None else self._numbers.get(archive)
        yield _chunk(rows if number is None else self._admitted(number, rows))
        if tally is None:
            return
        self.untallied -= 1
        self._note(tally)
        if number is None:
            self._count(tally, np.ones(len(tally.new), np.bool_))
        else:
            self._tallies[number] = tally
            yield from self._settle()

    def rest(self) -> Iterator[Chunk]:
        """Yield the rows that still wait when a run stops before all pieces are tallied.

        If the row of an earlier archive was the right one, the next run restores it.
        """
        index = self.inventory.index
        for places in self._replaced:
            index.mark_seen(places)
        for number in range(self._turn, len(self._archives)):
            for rows in self._waiting.take(number, again=False):
                yield _chunk(self._replacing(rows))
                index.mark_seen(self._replaced[-1])
            if number in self._tallies:
                index.mark_seen(self._tallies[number].seen.astype(np.int64))

    def _admitted(self, number: int, rows: list[Row]) -> list[Row]:
        """Return the rows that can be appended at once; keep the others."""
        hashes = _hashes_of(rows)
        is_new = self.inventory.index.find_all(hashes) < 0
        is_first = np.zeros(len(rows), np.bool_)
        is_first[is_new] = self._arrived.add(hashes[is_new])
        self._waiting.add(number, _chosen(rows, is_new & ~is_first), again=True)
        replacing = _chosen(rows, ~is_new)
        if number == self._turn:
            return _chosen(rows, is_first) + self._replacing(replacing)
        self._waiting.add(number, replacing, again=False)
        return _chosen(rows, is_first)

    def _replacing(self, rows: list[Row]) -> list[Row]:
        """Return the rows whose photo is the first with its id; earlier archives are settled."""
        index = self.inventory.index
        places = index.find_all(_hashes_of(rows))
        is_first = ~index.is_seen(places)
        self._replaced.append(places[is_first])
        return _chosen(rows, is_first)

    def _settle(self) -> Iterator[Chunk]:
        """Settle the archives whose turn has come: their photos are first unless met before."""
        while (tally := self._tallies.pop(self._turn, None)) is not None:
            is_first = self._settled.add(tally.new)
            self._count(tally, is_first)
            yield from self._corrections(tally, is_first)
            self._turn += 1
            self._replaced = []
            for rows in self._waiting.take(self._turn, again=False):
                yield _chunk(self._replacing(rows))

    def _corrections(self, tally: Tally, is_first: npt.NDArray[np.bool_]) -> Iterator[Chunk]:
        """Yield rows that replace those of later archives that arrived first with the same ids."""
        first, replaced = tally.new[is_first], {*tally.new[~is_first].tolist()}
        gathered: list[Row] = []
        for rows in self._waiting.take(self._turn, again=True):
            hashes = _hashes_of(rows)
            is_admitted = np.isin(hashes, first)
            replaced -= {*hashes[~is_admitted].tolist()}  # which were never appended
            gathered += _chosen(rows, is_admitted)
            if len(gathered) >= self.inventory.settings.rows_per_part:
                yield _chunk(gathered, again=True)
                gathered = []
        if gathered:
            yield _chunk(gathered, again=True)
        if replaced:  # take back their counts, added when they were appended
            reasons = [tally.failed[id_hash] for id_hash in replaced if id_hash in tally.failed]
            failed = Counter(dict.fromkeys(reasons, 0))
            failed.subtract(reasons)
            yield Chunk([], {}, Counts(captioned=len(reasons) - len(replaced), failed=failed))

    def _note(self, tally: Tally) -> None:
        inventory = self.inventory
        inventory.is_empty = inventory.is_empty and tally.is_empty
        for name, reason in tally.unread:
            inventory.note_unlisted(name, reason)
        if tally.left_out:
            inventory.note_left_out(tally.left_out)

    def _count(self, tally: Tally, is_first_new: npt.NDArray[np.bool_]) -> None:
        """Count a piece's photos that are the first with their ids; mark them as seen."""
        index, seen = self.inventory.index, tally.seen.astype(np.int64)
        is_first_seen = ~index.is_seen(seen)
        index.mark_seen(seen)
        counts = np.bincount(tally.states[is_first_seen], minlength=len(State))
        counts[State.NEW] = np.count_nonzero(is_first_new)
        for state in State:
            self.inventory.count(state, int(counts[state]))
        others = sum(np.count_nonzero(~is_first) for is_first in (is_first_new, is_first_seen))
        if tally.duplicates + others:
            name = tally.first_duplicate or f"a photo of {self._archives[self._turn].path}"
            self.inventory.note_duplicate(name, tally.duplicates + int(others))


class _Waiting:
    """Waiting rows, by the number of their archive; on disk if there are many."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(BYTES_IN_MEMORY)  # noqa: SIM115
        self._places: dict[tuple[int, bool], list[int]] = {}

    def add(self, number: int, rows: list[Row], again: bool) -> None:
        if not rows:
            return
        try:
            place = self._file.seek(0, os.SEEK_END)
            pickle.dump(rows, self._file)
        except OSError as error:
            raise BatchcapError(
                f"no room for waiting rows in {tempfile.gettempdir()} "
                f"({error.strerror}): free some space or set TMPDIR, and run again"
            ) from error
        self._places.setdefault((number, again), []).append(place)

    def take(self, number: int, again: bool) -> Iterator[list[Row]]:
        """Yield an archive's rows in the order of their arrival."""
        for place in self._places.pop((number, again), ()):
            self._file.seek(place)
            yield pickle.load(self._file)
        if not self._places:
            self._file.seek(0)
            self._file.truncate()


def _chunk(rows: list[Row], again: bool = False) -> Chunk:
    failed = Counter(row["error_type"] for row in rows if row["status"] == "failed")
    return Chunk(rows, {}, Counts(captioned=len(rows) - failed.total(), failed=failed), again)


def _hashes_of(rows: list[Row]) -> Hashes:
    return hashes_of([row["image_id"] for row in rows])


def _chosen(rows: list[Row], which: npt.NDArray[np.bool_]) -> list[Row]:
    return [*compress(rows, which.tolist())]
