"""The memory of this process."""

import contextlib
import ctypes
import resource
import sys
from pathlib import Path

# Of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 1 << 29
LARGEST_KEPT_BYTES = 1 << 26


def keep_freed_memory() -> None:
    """Make the C library reuse freed memory instead of returning it to the system.

    Photos and batches are allocated and freed all the time, and fresh pages cost a run a few
    percent of its rate. Does nothing if the C library is not glibc.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def peak_memory_bytes() -> int:
    """Return this process's peak resident memory."""
    # Not by getrusage on Linux, where it starts at the parent's peak.
    peak = peak_memory_of("self")
    if peak is not None:
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def peak_memory_of(process: int | str | None) -> int | None:
    """Return the peak resident memory of a process, by its id; None without `/proc`."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
    return None
