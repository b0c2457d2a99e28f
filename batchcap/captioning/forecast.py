"""Number of photos of an input, and room for their rows on OUTPUT's disk."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice

from batchcap.captioning.inventory import list_images_of
from batchcap.errors import BatchcapError, OutputError
from batchcap.photos.listing import can_be_listed_twice
from batchcap.rows.layout import Layout
from batchcap.schema import ImageRef
from batchcap.settings import AttentionDetail, RunSettings

COUNTED_AHEAD = 100_000  # photos, which takes a fraction of a second
BYTES_PER_ROW = {  # on disk, with a margin: measured 225 over 1,000 photos, with maps 1,600
    AttentionDetail.NONE: 300,
    AttentionDetail.SUMMARY: 700,
    AttentionDetail.FULL: 2500,
}


def count_photos(settings: RunSettings) -> int | None:
    """Return the number of photos of a run's input; None if counting is slow or fails."""
    with suppress(BatchcapError):  # the run itself reports it
        return sum(1 for _ in _listed_again(settings)) // settings.shard_numbers[1] or None
    return None


def check_room(
    settings: RunSettings,
    layout: Layout,
    done: int,
    least: int,
    progress: Callable[[], object] = lambda: None,
) -> None:
    """Check that OUTPUT's disk has room for the rows to come, as far as they can be counted.

    Args:
        settings: of the run.
        layout: of OUTPUT.
        done: rows that OUTPUT has.
        least: minimum of rows to come.
        progress: that of `list_images`.

    Raises:
        OutputError: it lacks room.
    """
    again = _listed_again(settings, progress)
    listed = sum(1 for _ in islice(again, COUNTED_AHEAD)) // settings.shard_numbers[1]
    rows = max(least, min(listed - done, settings.limit or listed))
    needed = rows * BYTES_PER_ROW[settings.attention]
    if layout.is_file:  # the parts, and the file that they are joined into
        needed = 2 * needed + sum(path.stat().st_size for path in layout.row_files())
    free = shutil.disk_usage(layout.lock.parent).free
    if free < needed:
        raise OutputError(
            f"{layout} needs about {needed / 2**20:,.1f} MiB for {rows:,} rows, but "
            f"its disk has {free / 2**20:,.1f} MiB: free some space, or choose another OUTPUT"
        )


def _listed_again(
    settings: RunSettings, progress: Callable[[], object] = lambda: None
) -> Iterator[ImageRef]:
    """List the input again without warnings; nothing if it can't be listed twice quickly."""
    if not can_be_listed_twice(settings.source):
        return iter(())
    return list_images_of(settings, lambda *_: None, progress=progress)
