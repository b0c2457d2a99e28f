"""Which photos there are: folders and lists of them, their ids and their paths.

Names only: no photo is opened here, and whether one can be decoded is not known.
"""

import fnmatch
import logging
import os
import posixpath
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from batchcap.contracts import InputError
from batchcap.records import printable, saying_which

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = frozenset(
    (
        *("jpg", "jpeg", "jpe", "jfif", "png", "bmp", "dib", "gif", "webp"),
        # Not decoded, but their owners believe them to be photos and want to be told.
        *("tif", "tiff", "heic", "heif", "avif", "jp2", "jxl", "psd", "ico"),
    )
)

_ESCAPE = re.compile(r"\\\\|\\x(?P<byte>[89a-f][0-9a-f])")

# (folder, why it can't be listed)
Unlisted = Callable[[str, str], object]


@dataclass(frozen=True, slots=True)
class ImageRef:
    """One photo to caption: its id, and the path that opens it (surrogateescape str)."""

    image_id: str
    path: str


def warn_unlisted(folder: str, reason: str) -> None:
    """Say that a folder is left out."""
    logger.warning(
        "The folder %s cannot be listed (%s); its photos are left out.", printable(folder), reason
    )


def list_images(
    source: str, pattern: str | None = None, unlisted: Unlisted = warn_unlisted
) -> Iterator[ImageRef]:
    """List the photos of a folder (recursive), of a `.txt` file of paths, or of stdin (`-`).

    A folder is listed by extension, in code-point order of the ids, without dot files and without
    entering linked folders; a subfolder is read when its turn comes, and `unlisted` is told of one
    that can't be: its name and why. A list keeps its order and is read line by line; relative lines
    start at the list's folder. `pattern` decides instead of the extension: an fnmatch pattern, case
    ignored, matched against the relative path if it holds a `/`, or else against the file name.

    Raises UsageError if there is no such source, InputError if it cannot be read or is neither.
    """
    is_wanted = _matcher(pattern)
    if source == "-":
        if sys.stdin is None:
            raise InputError("standard input is closed: give the list of photos there, or name it")
        return _read_list(sys.stdin.buffer, "standard input", "", is_wanted)
    path = Path(source)
    if path.is_dir():
        return _list_folder(source, is_wanted or _has_image_extension, unlisted)
    if path.suffix.lower() == ".txt" or not path.exists():
        with saying_which(path):
            lines = path.open("rb")
        return _read_list(lines, source, f"{path.parent}/", is_wanted)
    raise InputError(f"{source} is neither a folder nor a .txt file of paths; name one of these.")


def image_id_of(path: str) -> str:
    r"""Escape a relative POSIX path reversibly: `\` is doubled, invalid bytes become `\xNN`."""
    if path.isascii() and "\\" not in path:
        return path
    doubled = path.replace("\\", "\\\\")
    return doubled.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def path_of_image_id(image_id: str) -> str:
    """The relative path (surrogateescape str) whose id this is: what `image_id_of` escaped."""
    return _ESCAPE.sub(_unescaped, image_id)


def _unescaped(escape: re.Match[str]) -> str:
    byte = escape["byte"]
    return bytes.fromhex(byte).decode("utf-8", "surrogateescape") if byte else "\\"


def _matcher(pattern: str | None) -> Callable[[str], bool] | None:
    if pattern is None:
        return None
    wanted = pattern.lower(), pattern.lower().replace("**/", "")  # **/ may stand for no folder
    matches = re.compile("|".join(map(fnmatch.translate, wanted))).match
    if "/" in pattern:
        return lambda relative: matches(relative.lower()) is not None
    return lambda relative: matches(posixpath.basename(relative).lower()) is not None


def _has_image_extension(relative: str) -> bool:
    _, dot, extension = relative.rpartition(".")
    return bool(dot) and extension.lower() in IMAGE_EXTENSIONS


def _list_folder(
    root: str, is_wanted: Callable[[str], bool], unlisted: Unlisted
) -> Iterator[ImageRef]:
    prefix = root if root.endswith("/") else f"{root}/"
    try:
        top = _folder_entries(prefix, "")
    except OSError as error:
        raise InputError(f"{prefix} cannot be listed ({error.strerror}).") from error
    return (
        ImageRef(image_id_of(relative), prefix + relative)
        for relative in _walk(prefix, top, unlisted)
        if is_wanted(relative)
    )


def _walk(root: str, pending: list[str], unlisted: Unlisted) -> Iterator[str]:
    """Paths relative to `root` of all that is no folder, from the last of `pending` to the first.

    Each folder is sorted by itself: with the slash that its paths go on with, all are in order.
    """
    while pending:
        path = pending.pop()
        if not path.endswith("/"):
            yield path
            continue
        try:
            pending += _folder_entries(root, path)
        except OSError as error:
            unlisted(image_id_of(path), str(error.strerror))


def _folder_entries(root: str, folder: str) -> list[str]:
    """Paths relative to `root`, a folder's with a slash at its end; the last in order first."""
    with os.scandir(root + folder) as entries:
        paths = [
            f"{folder}{entry.name}/" if entry.is_dir(follow_symlinks=False) else folder + entry.name
            for entry in entries
            if not entry.name.startswith(".")
            and not (entry.is_symlink() and _leads_to_folder(entry))
        ]
    return sorted(paths, key=image_id_of, reverse=True)


def _leads_to_folder(link: os.DirEntry[str]) -> bool:
    """Whether to leave a link out, since it may lead in a circle; False where it leads nowhere."""
    try:
        return link.is_dir()
    except OSError:
        return False


def _read_list(
    lines: IO[bytes], source: str, base: str, is_wanted: Callable[[str], bool] | None
) -> Iterator[ImageRef]:
    seen: set[str] = set()
    with lines, saying_which(source):
        for number, line in enumerate(lines):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
            text = line.decode("utf-8", "surrogateescape").removesuffix("\n").removesuffix("\r")
            name = _normalised(text)
            if not text.strip() or name in seen or not (is_wanted is None or is_wanted(name)):
                continue
            seen.add(name)
            yield ImageRef(image_id_of(name), posixpath.join(base, name))


def _normalised(line: str) -> str:
    """Without `./` and doubled slashes. `..` stays: behind a link it is another folder."""
    root = "/" if line.startswith("/") else ""
    return root + "/".join(part for part in line.split("/") if part not in ("", "."))
