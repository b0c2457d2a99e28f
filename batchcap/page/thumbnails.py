"""Photos of rows as small pictures for a page, or why there is none. Knows no pages.

Photos are decoded in processes of their own, as a run does, so that no file ends the work.
"""

import posixpath
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from batchcap.contracts import ErrorType, LoadedImage, Rejection, UsageError
from batchcap.inputs import path_of_image_id
from batchcap.loading import Readers, core_count, readers
from batchcap.model.images import LoadSettings, encode_webp, load_thumbnail
from batchcap.progress import progress

LONGER_SIDE = 200  # pixels
QUALITY = 60  # of WebP: 5 KB a photo
TIMEOUT_S = 60.0
PHOTOS_PER_READ = 8

CHANGED = "The photo has changed since it was captioned."
MISSING = "The photo is not there any more."


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """A WebP file and its size in pixels."""

    webp: bytes
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Wanted:
    """A photo to show: where it is, and the SHA-256 of the file that was captioned."""

    path: str
    sha256: str | None


def photos_folder(images: Path) -> str:
    """Where the photos of a run's INPUT lie: a list's lines start at its folder.

    Raises:
        UsageError: there is no such INPUT.
    """
    if not images.exists():
        raise UsageError(f"There is no {images}; --images is the INPUT of the run, check the path.")
    return str(images if images.is_dir() else images.parent)


def photo_path(folder: str, image_id: str) -> str:
    """Where the photo of a row is (surrogateescape str); ids of lists may lead anywhere."""
    return posixpath.join(folder, path_of_image_id(image_id))


def make_thumbnails(wanted: list[Wanted]) -> Iterator[Thumbnail | str]:
    """For each photo, in order, its picture, or a sentence that says why there is none.

    Files that end early are shown as far as they go: only those that a run accepted have captions.
    """
    load = partial(load_thumbnail, settings=LoadSettings(LONGER_SIDE, accept_truncated=True))
    groups = [wanted[n : n + PHOTOS_PER_READ] for n in range(0, len(wanted), PHOTOS_PER_READ)]
    with (
        ThreadPoolExecutor(core_count()) as pool,  # outside, so as not to wait for readers to go on
        readers(load, min(core_count(), len(groups)), TIMEOUT_S) as read,
        progress("reading photos", len(wanted), "photo") as bar,
    ):
        for group in pool.map(partial(_read_group, read), groups):
            yield from group
            bar.update(len(group))


def _read_group(read: Readers, wanted: list[Wanted]) -> list[Thumbnail | str]:
    loaded = read([photo.path for photo in wanted])
    return [_thumbnail(*pair) for pair in zip(loaded, wanted, strict=True)]


def _thumbnail(image: LoadedImage, wanted: Wanted) -> Thumbnail | str:
    pixels = image.pixels
    if isinstance(pixels, Rejection) and pixels.error_type is ErrorType.MISSING:
        return MISSING
    if image.sha256 is not None and image.sha256 != wanted.sha256:
        return CHANGED
    if isinstance(pixels, Rejection):
        return pixels.message
    height, width = pixels.shape[:2]
    return Thumbnail(encode_webp(pixels, QUALITY), width, height)
