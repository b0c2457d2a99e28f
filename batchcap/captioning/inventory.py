"""Photos of an input that need a row: the listing compared with the existing rows."""

import errno
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from itertools import chain, compress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from batchcap.captioning.summary import Counts
from batchcap.errors import InputError, UsageError
from batchcap.photos.archives import PARQUET_SUFFIX, Archive, Columns, Unread
from batchcap.photos.file_lists import likely_fault
from batchcap.photos.listing import (
    excluder,
    is_list,
    is_stream,
    list_images,
    names_photos,
    path_of_image_id,
    warn_unlisted,
)
from batchcap.process.wording import counted, printable
from batchcap.rows.id_hashes import Hashes, IdSet, hashes_of, in_shard
from batchcap.rows.index import UNKNOWN, Known, RowIndex
from batchcap.schema import ImageRef, int64_or_none
from batchcap.settings import SYSTEM_FOLDERS, RunSettings
from batchcap.storage.remote import describe, is_url

LARGEST_CHUNK = 1 << 16
LARGEST_OF_PIPE = 64  # names may arrive slowly there
CHUNK_BYTES = 1 << 22
PATH_SHOWN = 300  # characters; a name may be a whole file in one line
NAMES_CHECKED = 100  # of a list, before it is refused
STORE_THREADS = 32  # a store takes tens of milliseconds to answer

log = logging.getLogger(__name__)


class State(IntEnum):
    """State of a photo relative to its row; photos up to RETRIED need a row."""

    NEW = 0
    CHANGED = 1
    RETRIED = 2
    DONE = 3
    FAILED = 4


COUNTED_AS = {  # fields of `Counts`
    State.NEW: ("new",),
    State.CHANGED: ("changed",),
    State.RETRIED: ("retried",),
    State.DONE: ("already_done",),
    State.FAILED: ("already_done", "failed_before"),
}


class Inventory:
    """The photos of an input, compared with the existing rows and counted while they are listed.

    counts: of the run. is_empty: no photo was seen. complete: the whole input was seen. unlisted:
    number of directories and archives that could not be fully read. duplicates: number of photos
    skipped because an earlier one has their id; lines of a list do not count. left_out: the first
    system folder of the input, or empty.
    """

    def __init__(
        self, settings: RunSettings, index: RowIndex, counts: Counts | None = None
    ) -> None:
        self.settings, self.index = settings, index
        self.counts = counts or Counts()
        self.unlisted = self.duplicates = 0
        self.is_empty, self.complete = True, False
        self.left_out = ""
        self._met = IdSet()

    def listed(
        self,
        goes_on: Callable[[], bool] = lambda: True,
        progress: Callable[[], object] = lambda: None,
    ) -> Iterator[ImageRef]:
        """List the input's photos; note unreadable directories and archives, and system folders.

        `progress` is that of `list_images`. Raises InputError for a list of missing files, as
        `checked` does.
        """
        refs = list_images_of(
            self.settings, self.note_unlisted, left_out=self.note_left_out, progress=progress
        )
        return self.checked(refs, goes_on)

    def checked(
        self, refs: Iterator[ImageRef], goes_on: Callable[[], bool] = lambda: True
    ) -> Iterator[ImageRef]:
        """Yield the photos of a list, but hold back those without a row until one of them exists.

        Raises InputError if none of the first hundred without a row exists or, in a shorter list,
        no photo exists. Other inputs pass unchecked.
        """
        if not names_photos(self.settings.source):
            yield from refs
            return
        held: list[ImageRef] = []
        has_rows = is_right = False
        for chunk in chunks(refs, LARGEST_OF_PIPE, goes_on):
            rows = self.index.find_all(hashes_of([ref.image_id for ref in chunk]))
            for ref, row in zip(chunk, rows.tolist(), strict=True):
                has_rows = has_rows or row >= 0
                if is_right or row >= 0:
                    yield ref
                    continue
                held.append(ref)
                is_right = not _is_missing(ref)
                if is_right:
                    yield from held
                elif len(held) == NAMES_CHECKED:
                    raise _wrong_list(held, self.settings.source)
            if is_right:
                yield from refs
                return
        if held and not has_rows and goes_on():
            raise _wrong_list(held, self.settings.source)
        yield from held

    def check_list(
        self, pieces: Iterable[list[ImageRef]], goes_on: Callable[[], bool] = lambda: True
    ) -> None:
        """Check the photos of a list, given in pieces; raises InputError as `checked` does."""
        if names_photos(self.settings.source):
            deque(self.checked(chain.from_iterable(pieces), goes_on), maxlen=0)

    def unfinished(
        self, refs: Iterable[ImageRef], goes_on: Callable[[], bool] = lambda: True
    ) -> Iterator[ImageRef]:
        """Yield the photos that need a row; asks `goes_on` at each photo."""
        largest = LARGEST_OF_PIPE if is_stream(self.settings.source) else LARGEST_CHUNK
        for chunk in chunks(refs, largest, goes_on):
            for ref, row in self._looked_up(chunk):
                if not goes_on():
                    return
                state = self._state(ref, row)
                self.count(state)
                if state > State.RETRIED:
                    continue
                yield ref
                if self.counts.taken == self.settings.limit:
                    return
        self.complete = goes_on() and not self.unlisted

    def count(self, state: State, photos: int = 1) -> None:
        """Count photos of one state."""
        for name in COUNTED_AS[state]:
            setattr(self.counts, name, getattr(self.counts, name) + photos)

    @property
    def vanished(self) -> int:
        """Number of rows whose photos were not listed; 0 unless the whole input was."""
        return self.index.vanished if self.complete else 0

    def check_any(self) -> None:
        """Raise InputError if the input has no photo, unless that is allowed."""
        if self.is_empty and not self.settings.allow_empty:
            raise InputError(
                f"no photo in {self.settings.source}: check the path, or --glob; "
                "with --allow-empty, this is a success"
            )

    def check_whole(self) -> None:
        """Raise InputError if photos of the input were skipped, now that the others have rows."""
        faults = []
        if self.unlisted:
            left_out = counted(self.unlisted, "folder or archive", "folders or archives")
            faults.append(f"{left_out} of {self.settings.source} could not be fully read")
        if self.duplicates:
            faults.append(
                f"{counted(self.duplicates, 'photo')} of {self.settings.source} had the ids of "
                "earlier photos, and got no rows"
            )
        if faults:
            raise InputError(
                f"{self.settings.output} is written, but {' and '.join(faults)}: fix this, and "
                "run again"
            )

    def _looked_up(self, refs: list[ImageRef]) -> Iterator[tuple[ImageRef, int]]:
        """Return this shard's photos without duplicates, with their row numbers or -1."""
        self.is_empty = self.is_empty and not refs
        hashes = hashes_of([ref.image_id for ref in refs])
        mine = in_shard(hashes, *self.settings.shard_numbers)
        refs, hashes = _chosen(refs, mine), hashes[mine]
        is_new = self._met.add(hashes)
        for ref in _chosen(refs, ~is_new):
            self._note_duplicate(ref.path)
        refs, hashes = _chosen(refs, is_new), hashes[is_new]
        rows = self.index.find_all(hashes)
        has_row = rows >= 0
        self._note_met(hashes[~has_row], rows[has_row])
        return zip(_described(refs, has_row), rows.tolist(), strict=True)

    def _note_met(self, _new: Hashes, rows: Hashes) -> None:
        """Record photos: the hashes of new ids, and the row numbers of the others."""
        self.index.mark_seen(rows)

    def _state(self, ref: ImageRef, row: int) -> State:
        if row < 0:
            return State.NEW
        known = self._known(ref, row)
        if known is Known.CHANGED:
            return State.CHANGED
        if known is Known.FAILED:
            return State.RETRIED if self.settings.retry_failed else State.FAILED
        return State.DONE

    def _known(self, ref: ImageRef, row: int) -> Known:
        size, mtime_ns = ref.size, ref.mtime_ns
        if ref.data is not None:
            # The time of a photo in an archive is often the archive's.
            return self.index.compare_bytes(row, UNKNOWN if size is None else size, ref.sha256)
        if size is None:
            size, mtime_ns = _size_and_time(ref.path)
        return self.index.compare(row, size, UNKNOWN if mtime_ns is None else mtime_ns)

    def note_unlisted(self, name: str, reason: str) -> None:
        """Count and log a directory or an archive that could not be fully read."""
        self.unlisted += 1
        warn_unlisted(name, reason)

    def note_left_out(self, name: str) -> None:
        """Log once that system folders are skipped."""
        if not self.left_out:
            self.left_out = name
            log.info(
                "skipping system folders (%s), such as %s; "
                "to caption their photos, give one as INPUT",
                ", ".join(SYSTEM_FOLDERS),
                printable(name),
            )

    def _note_duplicate(self, name: str) -> None:
        if not is_list(self.settings.source):
            self.note_duplicate(name)

    def note_duplicate(self, name: str, photos: int = 1) -> None:
        """Count photos with the id of an earlier one, and log the first."""
        is_first = not self.duplicates
        self.duplicates += photos
        if is_first:
            is_parquet = self.settings.source.lower().endswith(PARQUET_SUFFIX)
            log.warning(
                "%s has the id of an earlier photo; skipping such photos%s",
                printable(name),
                "; choose a column of unique ids with --id-column" if is_parquet else "",
            )


def list_images_of(
    settings: RunSettings,
    unlisted: Unread,
    archive: Archive | None = None,
    left_out: Callable[[str], object] = lambda _name: None,
    progress: Callable[[], object] = lambda: None,
) -> Iterator[ImageRef]:
    """List the photos of a run's input, or of one archive; `left_out` gets system folders."""
    return list_images(
        archive or settings.source,
        settings.glob,
        unlisted,
        columns_of(settings),
        excluder(settings.source, settings.exclude, left_out),
        progress,
    )


def columns_of(settings: RunSettings) -> Columns:
    """Return the columns of a Parquet input."""
    return Columns(settings.image_column, settings.id_column)


def excluded_by(settings: RunSettings) -> Callable[[str], bool]:
    """Return a function that tells whether the photo of an id is excluded."""
    is_excluded = excluder(settings.source, settings.exclude)
    return lambda image_id: is_excluded(path_of_image_id(image_id))


def chunks(
    refs: Iterable[ImageRef], largest: int, goes_on: Callable[[], bool]
) -> Iterator[list[ImageRef]]:
    """Yield photos to look up together: one at first, so that work begins soon, then more and more.

    Photos whose bytes are in memory come in chunks of a few megabytes.
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
    """Return the same photos; those with a row get size and time from their store, if any."""
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
        file = describe(ref.path)
    except OSError:  # reading the photo will fail too, and its row says why
        return ref._replace(size=UNKNOWN)
    size = UNKNOWN if file.size is None else file.size
    return ref._replace(size=size, mtime_ns=file.mtime_ns)


def _is_missing(ref: ImageRef) -> bool:
    """Whether a photo's file does not exist; False if this cannot be known."""
    if ref.data is not None:
        return False
    try:
        _ = describe(ref.path) if is_url(ref.path) else os.stat(ref.path)  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return True
    except OSError as error:
        return error.errno == errno.ENAMETOOLONG
    except UsageError:
        return False
    return False


def _wrong_list(missing: list[ImageRef], source: str) -> InputError:
    names = [path_of_image_id(ref.image_id) for ref in missing]
    path = missing[0].path
    place = path if is_url(path) else str(Path.cwd() / path)
    numbers = {1: "only name", NAMES_CHECKED: f"first {NAMES_CHECKED} names"}
    return InputError(
        f"found no file for the {numbers.get(len(names), f'{len(names)} names')} in "
        f"{'standard input' if source == '-' else source} (looked for the first at "
        f"{printable(place[:PATH_SHOWN])}): they {likely_fault(names)}"
    )


def _size_and_time(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)  # noqa: PTH116, done for every photo of every run
    except (OSError, ValueError):
        return UNKNOWN, UNKNOWN
    mtime_ns = int64_or_none(status.st_mtime_ns)
    return status.st_size, UNKNOWN if mtime_ns is None else mtime_ns
