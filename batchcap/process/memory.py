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


def peak_memory_bytes(process_id: int | None = None) -> int:
    """Return the peak resident memory of this process, or of another; 0 if that can't be known."""
    # From /proc on Linux, where getrusage starts at the parent's peak.
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{process_id or 'self'}/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
    if process_id is not None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)
