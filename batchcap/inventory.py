"""Which photos of an input need a row: the listing against the rows that are there."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import compress
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from batchcap.contracts import ImageRef, InputError
from batchcap.id_hashes import Hashes, IdSet, hashes_of, in_share
from batchcap.inputs import is_list, list_images, warn_unlisted
from batchcap.records import counted, printable
from batchcap.remote import describe, is_url
from batchcap.row_files import Row
from batchcap.row_index import UNKNOWN, Known, RowIndex
from batchcap.run_report import RunSummary
from batchcap.settings import RunSettings
from batchcap.shards import PARQUET_SUFFIX, Archive, Columns, Unread

LARGEST_CHUNK = 1 << 16
LARGEST_OF_PIPE = 64  # as names may come slowly there
CHUNK_BYTES = 1 << 22
COUNTED = ("new", "changed", "retried", "already_done", "failed_before")
STORE_THREADS = 32  # an answer takes a store tens of milliseconds

log = logging.getLogger(__name__)


class Tally(NamedTuple):
    """What an inventory of a piece of an input has come to, for that of the whole.

    seen: the row numbers of its photos. unread: what could not be listed, and why.
    """

    summary: RunSummary
    taken: int
    is_empty: bool
    doubled: int
    seen: Hashes
    unread: list[tuple[str, str]]


class Inventory:
    """The photos of an input against the rows that are there, counted while they are listed.

    taken: how many need a row, or a new one. is_empty: no photo has been seen. complete: all of the
    input has been. unlisted: how many folders and shards could not be read, or not whole. doubled:
    how many photos have an id that came before, and are left out; lines of a list do not count.
    """

    def __init__(
        self,
        settings: RunSettings,
        index: RowIndex,
        summary: RunSummary,
        mark_seen: Callable[[Hashes], object] | None = None,
    ) -> None:
        self.settings, self.index, self.summary = settings, index, summary
        self.taken = self.unlisted = self.doubled = 0
        self.is_empty, self.complete = True, False
        self._mark_seen = mark_seen or index.mark_seen
        self._met = IdSet()

    def unfinished(
        self, refs: Iterable[ImageRef], goes_on: Callable[[], bool] = lambda: True
    ) -> Iterator[ImageRef]:
        """Those of all photos that need a row, or a new one; asks `goes_on` at each photo."""
        largest = LARGEST_OF_PIPE if self.settings.source == "-" else LARGEST_CHUNK
        for chunk in chunks(refs, largest, goes_on):
            for ref, row in self._looked_up(chunk):
                if not goes_on():
                    return
                if self._is_done(ref, row):
                    continue
                self.taken += 1
                yield ref
                if self.taken == self.settings.limit:
                    return
        self.complete = goes_on() and not self.unlisted

    def add(self, tally: Tally) -> None:
        """Count what a worker has found of a piece of the input."""
        for name in COUNTED:
            total = getattr(self.summary, name) + getattr(tally.summary, name)
            setattr(self.summary, name, total)
        self.taken += tally.taken
        self.is_empty = self.is_empty and tally.is_empty
        self.doubled += tally.doubled
        self._mark_seen(tally.seen)
        for name, reason in tally.unread:
            self.note_unlisted(name, reason)

    def admitted(self, rows: list[Row]) -> list[Row]:
        """Rows of a worker, without those whose id has come from another piece of the input."""
        is_new = self._met.add(hashes_of([row["image_id"] for row in rows]))
        for row in compress(rows, (~is_new).tolist()):
            self.taken -= 1
            self._note_doubled(row["image_id"])
        return [*compress(rows, is_new.tolist())]

    @property
    def vanished(self) -> int:
        """How many rows are of photos that the input no longer has; 0 where it was not all seen."""
        return self.index.vanished if self.complete else 0

    def check_any(self) -> None:
        """Raises InputError if the input has no photo, unless that is allowed."""
        if self.is_empty and not self.settings.allow_empty:
            raise InputError(
                f"no photo in {self.settings.source}: check the path, or --glob; "
                "--allow-empty takes this for a success"
            )

    def check_whole(self) -> None:
        """Raises InputError if some of the input was left out, now that the rest has its rows."""
        told = []
        if self.unlisted:
            left_out = counted(self.unlisted, "folder or shard", "folders or shards")
            told.append(f"{left_out} of {self.settings.source} could not be read, or not whole")
        if self.doubled:
            told.append(
                f"{counted(self.doubled, 'photo')} of {self.settings.source} had ids that came "
                "before, and no rows"
            )
        if told:
            raise InputError(
                f"{self.settings.output} is written, but {' and '.join(told)}: see to that, and "
                "run again"
            )

    def _looked_up(self, refs: list[ImageRef]) -> Iterator[tuple[ImageRef, int]]:
        """The photos of this share that have not been met, with their row numbers or -1."""
        self.is_empty = self.is_empty and not refs
        hashes = hashes_of([ref.image_id for ref in refs])
        mine = in_share(hashes, *self.settings.share)
        refs, hashes = _chosen(refs, mine), hashes[mine]
        is_new = self._met.add(hashes)
        for ref in _chosen(refs, ~is_new):
            self._note_doubled(ref.path)
        refs, rows = _chosen(refs, is_new), self.index.find_all(hashes[is_new])
        has_row = rows >= 0
        self._mark_seen(rows[has_row])
        return zip(_described(refs, has_row), rows.tolist(), strict=True)

    def _is_done(self, ref: ImageRef, row: int) -> bool:
        summary = self.summary
        if row < 0:
            summary.new += 1
            return False
        known = self._known(ref, row)
        if known is Known.CHANGED:
            summary.changed += 1
            return False
        if known is Known.FAILED and self.settings.retry_failed:
            summary.retried += 1
            return False
        summary.already_done += 1
        summary.failed_before += known is Known.FAILED
        return True

    def _known(self, ref: ImageRef, row: int) -> Known:
        size, mtime_ns = ref.size, ref.mtime_ns
        if ref.data is not None:
            # Its time is often that at which the shard was made.
            return self.index.compare_bytes(row, UNKNOWN if size is None else size, ref.sha256)
        if size is None:
            size, mtime_ns = _size_and_time(ref.path)
        return self.index.compare(row, size, UNKNOWN if mtime_ns is None else mtime_ns)

    def note_unlisted(self, name: str, reason: str) -> None:
        """Say that a folder or a shard can't be read, or not whole."""
        self.unlisted += 1
        warn_unlisted(name, reason)

    def _note_doubled(self, name: str) -> None:
        if is_list(self.settings.source):
            return
        self.doubled += 1
        if self.doubled == 1:
            remedy = "; name a column of unique ids with --id-column"
            log.warning(
                "%s has the id of a photo before it; such photos are left out%s",
                printable(name),
                remedy if self.settings.source.lower().endswith(PARQUET_SUFFIX) else "",
            )


def list_images_of(
    settings: RunSettings, unlisted: Unread, archive: Archive | None = None
) -> Iterator[ImageRef]:
    """The photos of a run's input, or of one of its archives."""
    return list_images(archive or settings.source, settings.glob, unlisted, columns_of(settings))


def columns_of(settings: RunSettings) -> Columns:
    """The columns of a Parquet input."""
    return Columns(settings.image_column, settings.id_column)


def chunks(
    refs: Iterable[ImageRef], largest: int, goes_on: Callable[[], bool]
) -> Iterator[list[ImageRef]]:
    """Photos to be looked up together: one at first, so that work begins soon, then more and more.

    Of those whose bytes are at hand, only a few megabytes.
    """
    chunk: list[ImageRef] = []
    held, size = 0, 1
    for ref in refs:
        if not goes_on():
            return
        chunk.append(ref)
        if ref.data is not None:
            held += ref.size or 0
        if len(chunk) == size or held >= CHUNK_BYTES:
            yield chunk
            chunk, held, size = [], 0, min(2 * size, largest)
    yield chunk


def _chosen(refs: list[ImageRef], which: npt.NDArray[np.bool_]) -> list[ImageRef]:
    return [*compress(refs, which.tolist())]


def _described(refs: list[ImageRef], has_row: npt.NDArray[np.bool_]) -> Iterator[ImageRef]:
    """The same photos; of those to be compared that lie in a store, with what the store says."""
    is_asked = [
        known and ref.size is None and ref.data is None and is_url(ref.path)
        for ref, known in zip(refs, has_row.tolist(), strict=True)
    ]
    return _described_where(is_asked, refs) if any(is_asked) else iter(refs)


def _described_where(is_asked: list[bool], refs: list[ImageRef]) -> Iterator[ImageRef]:
    pool = ThreadPoolExecutor(STORE_THREADS)
    try:
        answers = pool.map(_described_by_store, compress(refs, is_asked))
        for ref, asked in zip(refs, is_asked, strict=True):
            yield next(answers) if asked else ref
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _described_by_store(ref: ImageRef) -> ImageRef:
    try:
        told = describe(ref.path)
    except OSError:  # for the reader of the photo to meet
        return ref._replace(size=UNKNOWN)
    return ref._replace(size=told.size, mtime_ns=told.mtime_ns)


def _size_and_time(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)  # noqa: PTH116, done for every photo of every run
    except (OSError, ValueError):
        return UNKNOWN, UNKNOWN
    return status.st_size, status.st_mtime_ns
