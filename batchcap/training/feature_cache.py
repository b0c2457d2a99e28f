"""Cache of features on disk, so that a backbone sees each photo once. Arrays and keys only.

A cache is a directory for one backbone with one set of weights: `features.f16` has rows of float16,
`index.txt` has a line per row with its key and the CRC-32 of its bytes. A row exists if its line
does: lines are written after the rows were synced to disk, and the next process cuts off what a
killed one left half-written.
"""

import fcntl
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from batchcap.errors import OutputError

INDEX_FILE = "index.txt"
FEATURES_FILE = "features.f16"
LINE = re.compile(rb"(?P<key>[^ ]+) (?P<crc>[0-9a-f]{8})")


class FeatureCache:
    """Rows `float16[G, D]` by key. Keys have no spaces and no line breaks."""

    def __init__(self, folder: Path, row_shape: tuple[int, int]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.row_shape = folder, row_shape
        self.row_bytes = 2 * row_shape[0] * row_shape[1]
        self.row_of: dict[str, int] = {}
        self._sums: dict[int, int] = {}
        self.row_count = 0  # copies of a photo in one batch give a key two rows

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Lock, repair and reload the cache; other processes wait."""
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._mend()
            yield

    def append(self, keys: Sequence[str], rows: npt.NDArray[np.float16]) -> None:
        """Add rows `float16[n, G, D]`. A crash loses at most these.

        Raises:
            OutputError: they can't be written.
        """
        sums = [zlib.crc32(row.tobytes()) for row in rows]
        try:
            with (self.folder / FEATURES_FILE).open("ab") as features:
                features.write(rows.tobytes())
                features.flush()
                os.fsync(features.fileno())
            with (self.folder / INDEX_FILE).open("a", encoding="utf-8") as index:
                index.writelines(f"{key} {crc:08x}\n" for key, crc in zip(keys, sums, strict=True))
        except OSError as error:
            raise OutputError(
                f"cannot write features to {self.folder}: {error.strerror or error}; free disk "
                "space, or set XDG_CACHE_HOME to a folder with room, and run again"
            ) from error
        self._add(keys, sums)

    def rows(self) -> npt.NDArray[np.float16]:
        """Return all rows, `float16[rows, G, D]`, read from disk as they are used."""
        return np.memmap(
            self.folder / FEATURES_FILE, np.float16, "r", shape=(self.row_count, *self.row_shape)
        )

    def drop_damaged(self, keys: Iterable[str]) -> int:
        """Drop the rows of these keys whose bytes have changed; return how many."""
        rows = self.rows() if self.row_count else np.empty((0, *self.row_shape), np.float16)
        known = {key: self.row_of[key] for key in keys if key in self.row_of}
        damaged = [
            key for key, row in known.items() if zlib.crc32(rows[row].tobytes()) != self._sums[row]
        ]
        for key in damaged:
            del self.row_of[key]
        return len(damaged)

    def _add(self, keys: Sequence[str], sums: Sequence[int]) -> None:
        for key, crc in zip(keys, sums, strict=True):
            self.row_of[key], self._sums[self.row_count] = self.row_count, crc
            self.row_count += 1

    def _mend(self) -> None:
        """Read the index again, and cut off rows without a line and lines without a row."""
        index, features = self.folder / INDEX_FILE, self.folder / FEATURES_FILE
        index.touch()
        features.touch()
        most = features.stat().st_size // self.row_bytes
        lines = index.read_bytes().split(b"\n")[:-1][:most]
        self.row_of, self._sums, self.row_count = {}, {}, 0
        for line in lines:
            parts = LINE.fullmatch(line)
            # A damaged line leaves its row without a key.
            key, crc = (
                (parts["key"].decode(errors="replace"), int(parts["crc"], 16)) if parts else ("", 0)
            )
            self._add([key], [crc])
        self.row_of.pop("", None)
        os.truncate(index, sum(len(line) + 1 for line in lines))
        os.truncate(features, len(lines) * self.row_bytes)
