"""Thumbnails of photos, or reasons why there is none. Knows no pages.

Photos are decoded in a reader pool, as in a run, so that no file can end the report.
"""

import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

from batchcap.errors import UsageError
from batchcap.photos.archives import Columns
from batchcap.photos.images import LoadSettings, encode_webp, load_thumbnail
from batchcap.photos.listing import (
    archives_in,
    image_id_of,
    is_list,
    is_stream,
    list_images,
    path_of_image_id,
)
from batchcap.photos.reader_pool import core_count, readers
from batchcap.process.progress import progress
from batchcap.schema import ErrorType, ImageRef, LoadedImage, Rejection
from batchcap.storage.remote import is_url, without_file_scheme

Item = TypeVar("Item")

LONGER_SIDE = 200  # pixels
QUALITY = 60  # of WebP: 5 KB a photo
TIMEOUT_S = 60.0
PHOTOS_PER_READ = 8

CHANGED = "The photo has changed since it was captioned."
MISSING = "The photo was not found."


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """A WebP file and its size in pixels."""

    webp: bytes
    width: int
    height: int


def find_photos(source: str, image_ids: Iterable[str], columns: Columns) -> Iterator[ImageRef]:
    """Yield the photos of a run's INPUT that have these ids, each once; reads archives for them.

    Photos of directories and lists need not exist.

    Raises:
        UsageError: there is no such INPUT, or its Parquet files lack the columns.
    """
    source = without_file_scheme(source)
    archives = archives_in(source, columns)
    if archives is None:
        located = _locator(source)
        yield from (
            ImageRef(image_id, located(path_of_image_id(image_id))) for image_id in image_ids
        )
        return
    if not any(is_url(archive.path) or Path(archive.path).exists() for archive in archives):
        raise _no_input(source)
    left = set(image_ids)

    def is_unwanted(path: str) -> bool:
        return image_id_of(path) not in left

    for archive in archives:
        for ref in list_images(archive, "*", columns=columns, is_excluded=is_unwanted):
            if ref.image_id in left:  # of duplicate ids, the first photo has the row
                left.remove(ref.image_id)
                yield ref
            if not left:
                return


def _locator(source: str) -> Callable[[str], str]:
    """Return a function from a path in a directory or a list to the photo's place."""
    if not (is_url(source) or is_stream(source) or Path(source).exists()):
        raise _no_input(source)
    if is_list(source):
        # Paths from standard input and pipes start at the current folder.
        base = "" if is_stream(source) else posixpath.dirname(source)
        return lambda path: path if is_url(path) else posixpath.join(base, path)
    if is_url(source):
        root = source if source.endswith("/") else f"{source}/"
        return lambda path: root + path  # keys may begin with a slash
    folder = source if Path(source).is_dir() else posixpath.dirname(source)
    return lambda path: posixpath.join(folder, path)


def _no_input(source: str) -> UsageError:
    return UsageError(f"there is no {source}; --images must be the run's INPUT: check the path")


def make_thumbnails(
    photos: Iterable[ImageRef], sums: Mapping[str, str | None]
) -> Iterator[tuple[str, Thumbnail | str]]:
    """Yield each photo's id, and its thumbnail or a sentence why there is none.

    Truncated files are shown in part: they have captions only if a run accepted them.

    Args:
        photos: in any order.
        sums: the SHA-256 of the file that was captioned, by id.
    """
    load = partial(load_thumbnail, settings=LoadSettings(LONGER_SIDE, accept_truncated=True))
    groups = _groups(iter(photos), PHOTOS_PER_READ)
    processes = min(core_count(), -(-len(sums) // PHOTOS_PER_READ))
    with (
        ThreadPoolExecutor(core_count()) as pool,  # outermost, so readers close first
        readers(load, processes, TIMEOUT_S) as read,
        progress("reading photos", len(sums), "photo") as bar,
    ):
        # A few at a time: photos from archives are held in memory.
        for some in _groups(groups, 2 * core_count()):
            loaded = pool.map(read, some)
            for refs, images in zip(some, loaded, strict=True):
                for ref, image in zip(refs, images, strict=True):
                    yield ref.image_id, _thumbnail(image, sums[ref.image_id])
                bar.update(len(refs))


def _groups(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    while group := list(islice(items, size)):
        yield group


def _thumbnail(image: LoadedImage, sha256: str | None) -> Thumbnail | str:
    pixels = image.pixels
    if isinstance(pixels, Rejection) and pixels.error_type is ErrorType.MISSING:
        return MISSING
    if image.sha256 is not None and image.sha256 != sha256:
        return CHANGED
    if isinstance(pixels, Rejection):
        return pixels.message
    height, width = pixels.shape[:2]
    return Thumbnail(encode_webp(pixels, QUALITY), width, height)
