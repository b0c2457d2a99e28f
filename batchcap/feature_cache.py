"""Features of photos on disk, so that a backbone sees each photo once. Arrays and keys only.

A cache is a folder of one backbone with one set of weights: `features.f16` holds row after row of
float16, `index.txt` the key of each row, a line each. A row is there when its line is: lines are
written after the rows have reached the disk, and what a killed process left half-written is cut off
by the next.
"""

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from batchcap.contracts import OutputError

INDEX_FILE = "index.txt"
FEATURES_FILE = "features.f16"


class FeatureCache:
    """Rows `float16[G, D]` by key. Keys have no line breaks."""

    def __init__(self, folder: Path, row_shape: tuple[int, int]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.row_shape = folder, row_shape
        self.row_bytes = 2 * row_shape[0] * row_shape[1]
        self.row_of: dict[str, int] = {}
        self.row_count = 0  # a key can have two rows: two copies of a photo in one batch

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the cache for this process alone, mended and read anew; others wait."""
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._mend()
            yield

    def append(self, keys: Sequence[str], rows: npt.NDArray[np.float16]) -> None:
        """Add rows `float16[n, G, D]`. A crash loses at most these.

        Raises:
            OutputError: they can't be written.
        """
        try:
            with (self.folder / FEATURES_FILE).open("ab") as features:
                features.write(rows.tobytes())
                features.flush()
                os.fsync(features.fileno())
            with (self.folder / INDEX_FILE).open("a", encoding="utf-8") as index:
                index.writelines(f"{key}\n" for key in keys)
        except OSError as error:
            raise OutputError(
                f"cannot write features to {self.folder}: {error.strerror or error}; free the "
                "disk, or set XDG_CACHE_HOME to a folder with room, and run again"
            ) from error
        self.row_of |= {key: self.row_count + i for i, key in enumerate(keys)}
        self.row_count += len(keys)

    def rows(self) -> npt.NDArray[np.float16]:
        """All rows, `float16[rows, G, D]`, read from disk as they are used."""
        return np.memmap(
            self.folder / FEATURES_FILE, np.float16, "r", shape=(self.row_count, *self.row_shape)
        )

    def _mend(self) -> None:
        index, features = self.folder / INDEX_FILE, self.folder / FEATURES_FILE
        index.touch()
        features.touch()
        whole_lines = index.read_bytes().rpartition(b"\n")[0].decode().splitlines()
        keys = whole_lines[: features.stat().st_size // self.row_bytes]
        os.truncate(index, sum(len(key.encode()) + 1 for key in keys))
        os.truncate(features, len(keys) * self.row_bytes)
        self.row_of = {key: row for row, key in enumerate(keys)}
        self.row_count = len(keys)
