"""Which photos there are: folders, lists and archives of them, here or behind URLs, and their ids.

Only photos in archives are read here. Whether one can be decoded is not known.
"""

import fnmatch
import logging
import os
import posixpath
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from batchcap.contracts import ImageRef, InputError, UsageError
from batchcap.records import printable, saying_which
from batchcap.remote import is_url, list_folder, open_file, without_file_scheme
from batchcap.shards import (
    PARQUET_SUFFIX,
    TAR_SUFFIXES,
    USUAL_COLUMNS,
    Archive,
    Columns,
    Item,
    Unread,
    archives_of,
    check_columns,
    is_parquet,
    read_parquet,
)
from batchcap.tars import read_tar

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = frozenset(
    (
        *("jpg", "jpeg", "jpe", "jfif", "png", "bmp", "dib", "gif", "webp"),
        # Not decoded, but their owners believe them to be photos and want to be told.
        *("tif", "tiff", "heic", "heif", "avif", "jp2", "jxl", "psd", "ico"),
    )
)

OTHER_ARCHIVES = (".tar.zst", ".tzst", ".tar.lz4", ".tar.lz", ".tar.z", ".zip", ".7z", ".rar")

_ESCAPE = re.compile(r"\\\\|\\x(?P<byte>[89a-f][0-9a-f])")


class Entry(NamedTuple):
    """What a folder holds: its path below the root, with a slash at a folder's end.

    `size` and `mtime_ns` as a store's listing tells them.
    """

    path: str
    size: int | None = None
    mtime_ns: int | None = None


# (root, folder below it with a slash at its end): its entries
ListFolder = Callable[[str, str], list[Entry]]


def warn_unlisted(name: str, reason: str) -> None:
    """Say that a folder is left out, or what can't be read of an archive."""
    logger.warning(
        "%s cannot be read, or not all of it (%s); its other photos are left out.",
        *(printable(name), reason),
    )


def list_images(
    source: str | Archive,
    pattern: str | None = None,
    unlisted: Unread = warn_unlisted,
    columns: Columns = USUAL_COLUMNS,
) -> Iterator[ImageRef]:
    """List the photos of a folder, a `.txt` file of paths, stdin (`-`), tars or Parquet files.

    All but stdin may lie behind a URL; an archive is one that `archives_in` has found. A folder is
    listed by extension, in code-point order of the ids, with all below it, but without dot files
    and without entering linked folders; a subfolder is read when its turn comes. A list keeps its
    order and is read line by line; relative lines start at the list's folder. Archives come in the
    order of their names, each in its own order: of tars what a folder of the same files would have,
    of Parquet each row, by `columns`; a path there is as in a list. `unlisted` is told of each
    subfolder and archive that can't be read. An id may come twice.

    `pattern` decides instead of the extension: an fnmatch pattern, case ignored, matched against
    the relative path if it holds a `/`, or else against the file name.

    Raises UsageError if there is no such source, or the first Parquet file has no such column;
    InputError if it cannot be read or is none of these.
    """
    is_wanted = _matcher(pattern)
    if isinstance(source, Archive):
        return _archive_refs(source, is_wanted, unlisted, columns)
    source = without_file_scheme(source)
    if source == "-":
        if sys.stdin is None:
            raise InputError("standard input is closed: give the list of photos there, or name it")
        return _read_list(sys.stdin.buffer, "standard input", "", is_wanted)
    if not is_url(source) and Path(source).is_dir():
        return _list_folder(source, _local_entries, is_wanted or _has_image_extension, unlisted)
    archives = archives_in(source)
    if archives is not None:
        check_columns(archives[0], columns)
        return (
            ref
            for archive in archives
            for ref in _archive_refs(archive, is_wanted, unlisted, columns)
        )
    if source.lower().endswith(".txt") or not (is_url(source) or Path(source).exists()):
        with saying_which(source):
            lines = open_file(source)
        return _read_list(lines, source, posixpath.dirname(source) or ".", is_wanted)
    if is_url(source):
        return _list_folder(source, _remote_entries, is_wanted or _has_image_extension, unlisted)
    raise InputError(
        f"{source} is neither a folder nor a .txt file of paths nor a .tar or .parquet file; name "
        "one of these."
    )


def archives_in(source: str) -> list[Archive] | None:
    """The archives that a source consists of; None where it does not.

    Raises UsageError if there are none of these names, or it names archives of another kind;
    InputError if they can't be listed.
    """
    source = without_file_scheme(source)
    if not _names_archives(source):
        return None
    with saying_which(source):
        return archives_of(source)


def _names_archives(source: str) -> bool:
    """Whether these are tars or Parquet files. Raises UsageError if they are other archives."""
    name = source.lower()
    if not is_url(source) and Path(source).is_dir():
        return False
    if name.endswith(OTHER_ARCHIVES):
        raise UsageError(
            f"{source} is an archive of a kind that is not read: unpack it, or pack the photos as "
            f"{', '.join(TAR_SUFFIXES)} or {PARQUET_SUFFIX}"
        )
    return name.endswith((*TAR_SUFFIXES, PARQUET_SUFFIX))


def is_list(source: str) -> bool:
    """Whether a source is a list, in which the same line is the same photo."""
    return source == "-" or source.lower().endswith(".txt")


def can_be_listed_twice(source: str) -> bool:
    """Whether listing takes little time, so that it may be done once more only to count."""
    source = without_file_scheme(source)
    return not (source == "-" or is_url(source) or _names_archives(source))


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
    root: str, entries: ListFolder, is_wanted: Callable[[str], bool], unlisted: Unread
) -> Iterator[ImageRef]:
    prefix = root if root.endswith("/") else f"{root}/"
    try:
        top = _last_first(entries(prefix, ""))
    except FileNotFoundError as error:
        raise UsageError(f"There is no {prefix}; check the path.") from error
    except OSError as error:
        raise InputError(f"{prefix} cannot be listed ({error.strerror}).") from error
    return (
        ImageRef(image_id_of(path), prefix + path, size, mtime_ns)
        for path, size, mtime_ns in _walk(prefix, top, entries, unlisted)
        if is_wanted(path)
    )


def _walk(
    root: str, pending: list[Entry], entries: ListFolder, unlisted: Unread
) -> Iterator[Entry]:
    """All below `root` that is no folder, from the last of `pending` to the first.

    Each folder is sorted by itself: with the slash that its paths go on with, all are in order.
    """
    while pending:
        entry = pending.pop()
        if not entry.path.endswith("/"):
            yield entry
            continue
        try:
            pending += _last_first(entries(root, entry.path))
        except OSError as error:
            unlisted(image_id_of(entry.path), str(error.strerror))


def _last_first(entries: list[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda entry: image_id_of(entry.path), reverse=True)


def _local_entries(root: str, folder: str) -> list[Entry]:
    with os.scandir(root + folder) as entries:
        return [
            Entry(
                f"{folder}{entry.name}/"
                if entry.is_dir(follow_symlinks=False)
                else folder + entry.name
            )
            for entry in entries
            if not entry.name.startswith(".")
            and not (entry.is_symlink() and _leads_to_folder(entry))
        ]


def _remote_entries(root: str, folder: str) -> list[Entry]:
    told = (file._replace(url=file.url.removeprefix(root)) for file in list_folder(root + folder))
    return [
        Entry(file.url, None if file.url.endswith("/") else file.size, file.mtime_ns)
        for file in told
        if not _is_hidden(file.url.removeprefix(folder))
    ]


def _is_hidden(relative: str) -> bool:
    return any(part.startswith(".") and part != ".." for part in relative.split("/"))


def _leads_to_folder(link: os.DirEntry[str]) -> bool:
    """Whether to leave a link out, since it may lead in a circle; False where it leads nowhere."""
    try:
        return link.is_dir()
    except OSError:
        return False


def _archive_refs(
    archive: Archive, is_wanted: Callable[[str], bool] | None, unlisted: Unread, columns: Columns
) -> Iterator[ImageRef]:
    if is_parquet(archive):
        return _parquet_refs(archive, is_wanted, unlisted, columns)
    return _tar_refs(archive.path, is_wanted or _has_image_extension, unlisted)


def _tar_refs(
    archive: str, is_photo: Callable[[str], bool], unlisted: Unread
) -> Iterator[ImageRef]:
    for item in read_tar(archive, lambda name: is_photo(name) and not _is_hidden(name), unlisted):
        yield _ref_in(archive, item)


def _parquet_refs(
    archive: Archive, is_wanted: Callable[[str], bool] | None, unlisted: Unread, columns: Columns
) -> Iterator[ImageRef]:
    for item in read_parquet(archive, columns, unlisted):
        name = _normalised(item.name)
        if is_wanted is not None and not is_wanted(name):
            continue
        if item.data is None:
            path = _located(posixpath.dirname(archive.path) or ".", _normalised(item.path))
            yield ImageRef(image_id_of(name), path)
        else:
            yield _ref_in(archive.path, item._replace(name=name))


def _ref_in(archive: str, item: Item) -> ImageRef:
    path = f"{archive}: {item.name}"
    return ImageRef(image_id_of(item.name), path, item.size, item.mtime_ns, item.data)


def _read_list(
    lines: IO[bytes], source: str, base: str, is_wanted: Callable[[str], bool] | None
) -> Iterator[ImageRef]:
    with lines, saying_which(source):
        for number, line in enumerate(lines):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
            text = line.decode("utf-8", "surrogateescape").removesuffix("\n").removesuffix("\r")
            if not text.strip():
                continue
            name = _normalised(text)
            if is_wanted is None or is_wanted(name):
                yield ImageRef(image_id_of(name), _located(base, name))


def _located(base: str, name: str) -> str:
    return name if is_url(name) else posixpath.join(base, name)


def _normalised(line: str) -> str:
    """Without `./` and doubled slashes. `..` stays: behind a link it is another folder."""
    line = without_file_scheme(line)
    if is_url(line):
        return line
    root = "/" if line.startswith("/") else ""
    return root + "/".join(part for part in line.split("/") if part not in ("", "."))
