"""List the photos of an input: a directory, a list or archives, local or behind a URL.

Only photos in archives are read here. Nothing is decoded.
"""

import fnmatch
import logging
import os
import posixpath
import re
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from batchcap.errors import InputError, UsageError
from batchcap.photos.archives import (
    PARQUET_SUFFIX,
    TAR_SUFFIXES,
    USUAL_COLUMNS,
    Archive,
    Columns,
    Unread,
    archives_of,
    check_columns,
    is_parquet,
    read_parquet,
)
from batchcap.photos.file_lists import names_in
from batchcap.photos.tars import read_tar
from batchcap.photos.tiff import RAW_EXTENSIONS
from batchcap.process.wording import printable, saying_which
from batchcap.schema import ImageRef
from batchcap.settings import SYSTEM_FOLDERS
from batchcap.storage.remote import is_url, list_folder, open_file, without_file_scheme

logger = logging.getLogger(__name__)

# Some of these can't be decoded, but users expect a row for each.
IMAGE_EXTENSIONS = RAW_EXTENSIONS | frozenset(
    (
        *("jpg", "jpeg", "jpe", "jfif", "pjpeg", "pjp", "mpo", "png", "apng", "bmp", "dib", "gif"),
        *("webp", "tif", "tiff", "avif", "avifs", "heic", "heics", "heif", "hif"),
        *("jp2", "j2k", "jpf", "jpx", "jxl", "jxr", "psd", "ico", "tga", "ppm", "pgm", "pnm"),
    )
)

OTHER_ARCHIVES = (".tar.zst", ".tzst", ".tar.lz4", ".tar.lz", ".tar.z", ".zip", ".7z", ".rar")

_ESCAPE = re.compile(r"\\\\|\\x(?P<byte>[89a-f][0-9a-f])")


class Entry(NamedTuple):
    """A file or a directory: its path below the root, with a final slash for a directory.

    `size` and `mtime_ns` come from a store's listing.
    """

    path: str
    size: int | None = None
    mtime_ns: int | None = None


# Whether a photo or a folder is excluded, by its path below a source
IsExcluded = Callable[[str], bool]
# (root, folder below it ending in a slash, progress callback): the folder's entries
ListFolder = Callable[[str, str, Callable[[], object]], list[Entry]]


class Selection(NamedTuple):
    """Which photos of a source to list: those that match the pattern and are not excluded.

    `progress` is called for each path.
    """

    pattern: Callable[[str], bool] | None
    is_excluded: IsExcluded
    progress: Callable[[], object] = lambda: None

    def is_photo(self, path: str) -> bool:
        """Whether a file of a directory or a tar is a photo: by the pattern, or by extension."""
        self.progress()
        return (self.pattern or has_image_extension)(path)

    def keeps(self, path: str) -> bool:
        """Whether to keep a photo that a list or a Parquet file names."""
        self.progress()
        return (self.pattern is None or self.pattern(path)) and not self.is_excluded(path)


def warn_unlisted(name: str, reason: str) -> None:
    """Warn that a directory or an archive could not be fully read."""
    logger.warning(
        "could not fully read %s (%s); skipping its remaining photos",
        printable(name),
        reason,
    )


def list_images(
    source: str | Archive,
    pattern: str | None = None,
    unlisted: Unread = warn_unlisted,
    columns: Columns = USUAL_COLUMNS,
    is_excluded: IsExcluded | None = None,
    progress: Callable[[], object] = lambda: None,
) -> Iterator[ImageRef]:
    """List the photos of a folder, a `.txt` file of paths, stdin (`-`), tars or Parquet files.

    All but stdin may be behind a URL; an `Archive` comes from `archives_in`. A pipe is read as a
    list. A folder is listed recursively by extension, in code-point order of the ids, without dot
    files and without entering linked folders; a subfolder is read when its turn comes. A list keeps
    its order and is read line by line, or NUL by NUL; relative lines start at the folder of a
    `.txt` file, else at the current one. Archives are read in the order of their names, each in its
    own order: a tar yields what a folder of the same files would, Parquet each row, by `columns`; a
    path in a row is read like one in a list. `unlisted` is called for each subfolder and archive
    that can't be fully read. Ids may repeat.

    `pattern` replaces the check of the extension: an fnmatch pattern, case ignored, matched against
    the relative path if it holds a `/`, else against the file name. Paths that `is_excluded` are
    left out, and such folders not entered; by default those of `excluder(source)`. `progress` is
    called for each file, line or row, photo or not.

    Raises UsageError if there is no such source, or the first Parquet file has no such column;
    InputError if it cannot be read or is none of these.
    """
    path = source.path if isinstance(source, Archive) else without_file_scheme(source)
    selection = Selection(_matcher(pattern), is_excluded or excluder(path), progress)
    if isinstance(source, Archive):
        return _archive_refs(source, selection, unlisted, columns)
    source = path
    if source == "-":
        if sys.stdin is None:
            raise InputError("standard input is closed: pipe the list of photos, or give its file")
        return _read_list(sys.stdin.buffer, "standard input", "", selection)
    if not is_url(source) and Path(source).is_dir():
        return _list_folder(source, _local_entries, selection, unlisted)
    archives = archives_in(source, columns)
    if archives is not None:
        return (
            ref
            for archive in archives
            for ref in _archive_refs(archive, selection, unlisted, columns)
        )
    if is_list(source) or not (is_url(source) or Path(source).exists()):
        with saying_which(source):
            lines = open_file(source)
        is_named_list = source.lower().endswith(".txt")  # unlike `/dev/fd/63` of `<(...)`
        base = posixpath.dirname(source) or "." if is_named_list else ""
        return _read_list(lines, source, base, selection)
    if is_url(source):
        return _list_folder(source, _remote_entries, selection, unlisted)
    raise InputError(
        f"{source} is neither a directory nor a .txt, .tar or .parquet file: give one of these"
    )


def archives_in(source: str, columns: Columns = USUAL_COLUMNS) -> list[Archive] | None:
    """Return the archives that a source names; None if it names none.

    Raises UsageError if no archive has such a name, the source names unsupported archives, or the
    first Parquet file lacks a column; InputError if the archives cannot be listed.
    """
    source = without_file_scheme(source)
    if not _names_archives(source):
        return None
    with saying_which(source):
        archives = archives_of(source)
    check_columns(archives[0], columns)
    return archives


def _names_archives(source: str) -> bool:
    """Whether a source names tars or Parquet files. Raises UsageError for other archives."""
    name = source.lower()
    if not is_url(source) and Path(source).is_dir():
        return False
    if name.endswith(OTHER_ARCHIVES):
        raise UsageError(
            f"{source} is an unsupported archive: unpack it, or pack the photos as "
            f"{', '.join(TAR_SUFFIXES)} or {PARQUET_SUFFIX}"
        )
    return name.endswith((*TAR_SUFFIXES, PARQUET_SUFFIX))


def is_list(source: str) -> bool:
    """Whether a source is a list, in which repeated lines are the same photo."""
    return source.lower().endswith(".txt") or (is_stream(source) and not _names_archives(source))


def is_stream(source: str) -> bool:
    """Whether a source can be read only once: stdin, a pipe, a socket or a device."""
    if source == "-":
        return True
    path = without_file_scheme(source)
    if is_url(path):
        return False
    try:
        mode = Path(path).stat().st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def names_photos(source: str) -> bool:
    """Whether a source names its photos one by one: a list, or Parquet files."""
    source = without_file_scheme(source)
    return is_list(source) or (_names_archives(source) and source.lower().endswith(PARQUET_SUFFIX))


def can_be_listed_twice(source: str) -> bool:
    """Whether listing may be repeated just to count: it is possible, and fast."""
    source = without_file_scheme(source)
    return not (is_stream(source) or is_url(source) or _names_archives(source))


def image_id_of(path: str) -> str:
    r"""Escape a relative POSIX path reversibly: `\` is doubled, invalid bytes become `\xNN`."""
    if path.isascii() and "\\" not in path:
        return path
    doubled = path.replace("\\", "\\\\")
    return doubled.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def path_of_image_id(image_id: str) -> str:
    """Return the relative path (surrogateescape str) that `image_id_of` escaped."""
    return _ESCAPE.sub(_unescaped, image_id)


def _unescaped(escape: re.Match[str]) -> str:
    byte = escape["byte"]
    return bytes.fromhex(byte).decode("utf-8", "surrogateescape") if byte else "\\"


def excluder(
    source: str,
    patterns: Sequence[str] = (),
    on_system_folder: Callable[[str], object] = lambda _path: None,
) -> IsExcluded:
    """Return a function that tells whether a path below a source is excluded.

    A path is excluded if a pattern, written as for `list_images`, matches it or a directory above
    it. Directories and tars also exclude `SYSTEM_FOLDERS`, and report each path in one to
    `on_system_folder`; lists and Parquet files do not, as they name each photo.
    """
    matches_pattern = _matcher_of_any_part(patterns)
    is_in_system_folder = _matcher_of_any_part(() if names_photos(source) else SYSTEM_FOLDERS)

    def is_excluded(path: str) -> bool:
        if matches_pattern(path):
            return True
        if not is_in_system_folder(path):
            return False
        on_system_folder(path)
        return True

    return is_excluded


def _matcher_of_any_part(patterns: Sequence[str]) -> IsExcluded:
    """Return a function that tells whether a pattern matches a path or a directory above it."""
    if not patterns:
        return lambda _path: False
    wanted = [pattern.lower().rstrip("/") for pattern in patterns]
    in_names = _matching([pattern for pattern in wanted if "/" not in pattern])
    in_paths = _matching(
        [
            start + end
            for pattern in wanted
            if "/" in pattern
            for start in {pattern, pattern.removeprefix("./").lstrip("/")}
            for end in ("", "/*")
        ]
    )

    def matches(path: str) -> bool:
        path = path.lower().rstrip("/")
        return any(map(in_names, path.split("/"))) or in_paths(path) is not None

    return matches


def _matcher(pattern: str | None) -> Callable[[str], bool] | None:
    if pattern is None:
        return None
    matches = _matching([pattern.lower()])
    if "/" in pattern:
        return lambda relative: matches(relative.lower()) is not None
    return lambda relative: matches(posixpath.basename(relative).lower()) is not None


def _matching(patterns: Sequence[str]) -> Callable[[str], re.Match[str] | None]:
    """Return a function that matches any of these fnmatch patterns; `**/` may match nothing."""
    variants = {form for pattern in patterns for form in (pattern, pattern.replace("**/", ""))}
    return re.compile("|".join(map(fnmatch.translate, sorted(variants))) or "(?!)").match


def has_image_extension(relative: str) -> bool:
    """Whether a name has the extension of a photo."""
    _, dot, extension = relative.rpartition(".")
    return bool(dot) and extension.lower() in IMAGE_EXTENSIONS


def _list_folder(
    root: str, entries: ListFolder, selection: Selection, unlisted: Unread
) -> Iterator[ImageRef]:
    prefix = root if root.endswith("/") else f"{root}/"
    try:
        top = _last_first(entries(prefix, "", selection.progress))
    except FileNotFoundError as error:
        raise UsageError(f"there is no {prefix}: check the path") from error
    except OSError as error:
        raise InputError(f"{prefix} cannot be listed ({error.strerror})") from error
    return (
        ImageRef(image_id_of(path), prefix + path, size, mtime_ns)
        for path, size, mtime_ns in _walk(prefix, top, entries, selection, unlisted)
        if selection.is_photo(path)
    )


def _walk(
    root: str, pending: list[Entry], entries: ListFolder, selection: Selection, unlisted: Unread
) -> Iterator[Entry]:
    """Yield the files below `root`, taking `pending` from its end.

    Sorting each directory by itself orders all files, as directory paths end in a slash.
    """
    while pending:
        entry = pending.pop()
        if selection.is_excluded(entry.path):
            continue
        if not entry.path.endswith("/"):
            yield entry
            continue
        try:
            below = entries(root, entry.path, selection.progress)
        except OSError as error:
            unlisted(image_id_of(entry.path), str(error.strerror))
            continue
        others = [other for other in below if other.path != entry.path]
        if len(others) < len(below) and selection.is_photo(entry.path.rstrip("/")):
            unlisted(image_id_of(entry.path), "it is a file too; rename the file")
        pending += _last_first(others)


def _last_first(entries: list[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda entry: image_id_of(entry.path), reverse=True)


def _local_entries(root: str, folder: str, progress: Callable[[], object]) -> list[Entry]:
    found = []
    with os.scandir(root + folder) as entries:
        for entry in entries:
            progress()
            if entry.name.startswith(".") or (entry.is_symlink() and _leads_to_folder(entry)):
                continue
            end = "/" if entry.is_dir(follow_symlinks=False) else ""
            found.append(Entry(f"{folder}{entry.name}{end}"))
    return found


def _remote_entries(root: str, folder: str, _progress: Callable[[], object]) -> list[Entry]:
    entries = (
        Entry(file.url.removeprefix(root), file.size, file.mtime_ns)
        for file in list_folder(root + folder)
    )
    return [
        entry for entry in entries if entry.path and not _is_hidden(entry.path.removeprefix(folder))
    ]


def _is_hidden(relative: str) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in relative.split("/"))


def _leads_to_folder(link: os.DirEntry[str]) -> bool:
    """Whether a link leads to a directory, and perhaps in a circle; False if it is broken."""
    try:
        return link.is_dir()
    except OSError:
        return False


def _archive_refs(
    archive: Archive, selection: Selection, unlisted: Unread, columns: Columns
) -> Iterator[ImageRef]:
    if is_parquet(archive):
        return _parquet_refs(archive, selection, unlisted, columns)
    return _tar_refs(archive.path, selection, unlisted)


def _tar_refs(archive: str, selection: Selection, unlisted: Unread) -> Iterator[ImageRef]:
    def is_wanted(name: str) -> bool:
        return selection.is_photo(name) and not _is_hidden(name) and not selection.is_excluded(name)

    for photo in read_tar(archive, is_wanted, unlisted, selection.progress):
        yield _named_in(archive, photo, photo.image_id)


def _parquet_refs(
    archive: Archive, selection: Selection, unlisted: Unread, columns: Columns
) -> Iterator[ImageRef]:
    for photo in read_parquet(archive, columns, unlisted):
        name = _normalised(photo.image_id)
        if not selection.keeps(name):
            continue
        if photo.data is None:
            path = _located(posixpath.dirname(archive.path) or ".", _normalised(photo.path))
            yield ImageRef(image_id_of(name), path)
        else:
            yield _named_in(archive.path, photo, name)


def _named_in(archive: str, photo: ImageRef, name: str) -> ImageRef:
    return photo._replace(image_id=image_id_of(name), path=f"{archive}: {name}")


def _read_list(
    lines: IO[bytes], source: str, base: str, selection: Selection
) -> Iterator[ImageRef]:
    with lines, saying_which(source):
        for text in names_in(lines):
            name = _normalised(text)
            if text.strip() and selection.keeps(name):
                yield ImageRef(image_id_of(name), _located(base, name))


def _located(base: str, name: str) -> str:
    return name if is_url(name) else posixpath.join(base, name)


def _normalised(line: str) -> str:
    """Return a name without `./` and doubled slashes.

    `..` is kept: after a link, it leads to another directory.
    """
    line = without_file_scheme(line)
    if is_url(line):
        return line
    root = "/" if line.startswith("/") else ""
    return root + "/".join(part for part in line.split("/") if part not in ("", "."))
