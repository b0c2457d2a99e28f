"""Archives (tars and Parquet files), by name or glob, and the photos of Parquet files.

Archives are read as streams, one photo at a time. Photos before any damage are used, and the damage
is reported. Nothing is unpacked: a name in an archive is an id, and never opens a file.
"""

import errno
import glob
import posixpath
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count, product
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from batchcap.errors import UsageError, first_line
from batchcap.schema import ErrorType, ImageRef, Rejection
from batchcap.storage.remote import is_url, matching, open_file

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
PARQUET_SUFFIX = ".parquet"
MAX_PHOTO_BYTES = 1 << 26  # up to about 200 archive photos are in memory at a time
ROWS_READ = 16  # at a time, from a Parquet file
BUFFER_BYTES = 1 << 20

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_WILD = re.compile(r"[*?[]")
_VARIABLE = re.compile(rf"{_RANGE.pattern}|{_WILD.pattern}")

TOO_LARGE = Rejection(
    ErrorType.TOO_LARGE,
    f"In an archive, a photo may have at most {MAX_PHOTO_BYTES:,} bytes; unpack the archive.",
)
NO_BYTES = Rejection(ErrorType.MISSING, "The row has neither bytes nor a path.")

# (folder or archive, why it could not be fully read)
Unread = Callable[[str, str], object]


class Archive(NamedTuple):
    """A tar or a Parquet file of an input.

    name: its path below the input archives' common directory, the same on every machine.
    """

    path: str
    name: str


class Columns(NamedTuple):
    """The columns of a Parquet file: photos, as bytes or paths, and ids, if any."""

    image: str = "image"
    image_id: str | None = None


USUAL_COLUMNS = Columns()


def archives_of(source: str) -> list[Archive]:
    """Return the archives named by `a-{000..999}.tar`, a glob or a file name, sorted.

    Raises:
        UsageError: a glob matches nothing.
        OSError: the store can't be reached.
    """
    if not is_url(source) and Path(source).exists():
        return [Archive(source, posixpath.basename(source))]
    paths: set[str] = set()
    for name in _numbered(source):
        paths.update(_matching(name) if _WILD.search(name) else [name])
    if not paths:
        raise UsageError(f"there is no {source}: check the path")
    folder = _without_scheme(_VARIABLE.split(source)[0]).rpartition("/")[0]
    names = {path: _without_scheme(path).removeprefix(folder).lstrip("/") for path in paths}
    return [Archive(path, names[path]) for path in sorted(paths)]


def _without_scheme(path: str) -> str:
    """Return the path alone: a store that is asked for `s3a://` lists `s3://`."""
    return path.partition("://")[2].lstrip("/") if is_url(path) else path


def _numbered(source: str) -> Iterator[str]:
    """Yield the names that `{000..999}` expands to, zero-padded like its start."""
    first, *others = _RANGE.split(source)[::3]
    ranges = [
        [str(number).zfill(len(start)) for number in range(int(start), int(end) + 1)]
        for start, end in _RANGE.findall(source)
    ]
    for numbers in product(*ranges):
        pairs = zip(numbers, others, strict=True)
        yield first + "".join(number + text for number, text in pairs)


def _matching(pattern: str) -> list[str]:
    return matching(pattern) if is_url(pattern) else glob.glob(pattern)  # noqa: PTH207, keeps `./`


def is_parquet(archive: Archive) -> bool:
    """Whether the archive is a Parquet file, by its name."""
    return archive.path.lower().endswith(PARQUET_SUFFIX)


def check_columns(archive: Archive, columns: Columns) -> None:
    """Check that an archive, if it is a Parquet file, has these columns.

    A file that can't be read passes; `read_parquet` reports it.

    Raises:
        UsageError: it lacks them.
    """
    if not is_parquet(archive):
        return
    with reporting(archive.path, lambda *_: None), _opened_parquet(archive) as file:
        if problem := _problem(file.schema_arrow, columns):
            raise UsageError(f"{archive.path} {problem}")


def read_parquet(archive: Archive, columns: Columns, unread: Unread) -> Iterator[ImageRef]:
    """Yield the photos of a Parquet file, in its order.

    `image_id`, not escaped yet, is the value of the id column or the path or, if that is null or
    empty, file and row: `photos-00000.parquet:0000012`. Only a photo without `data` has a path.
    """
    with reporting(archive.path, unread), _opened_parquet(archive) as file:
        if problem := _problem(file.schema_arrow, columns):
            raise ValueError(f"it {problem}")
        wanted = [name for name in columns if name is not None]
        rows = count()
        for batch in file.iter_batches(ROWS_READ, columns=wanted):
            photos = [_photo(value) for value in batch.column(columns.image).to_pylist()]
            names = [photo.image_id for photo in photos]
            if columns.image_id is not None:
                names = _ids_in(batch.column(columns.image_id))
            for photo, name, row in zip(photos, names, rows, strict=False):
                yield photo._replace(image_id=name or f"{archive.name}:{row:07}")


def open_archive(path: str) -> IO[bytes]:
    """Open a tar or a Parquet file for reading more than once.

    Raises:
        OSError: it can't be opened, or is a pipe or a device.
    """
    if not is_url(path) and Path(path).exists() and not Path(path).is_file():
        raise OSError(errno.ESPIPE, "an archive must be a regular file: save it as one")
    return open_file(path)


@contextmanager
def _opened_parquet(archive: Archive) -> Iterator[pq.ParquetFile]:
    with (
        open_archive(archive.path) as opened,
        pq.ParquetFile(opened, buffer_size=BUFFER_BYTES) as file,
    ):
        yield file


def _ids_in(column: pa.Array) -> list[str]:
    """Return the ids of a column as strings; a null becomes empty."""
    if pa.types.is_temporal(column.type):  # Python has no nanoseconds, nor years after 9999
        column = column.cast(pa.string())
    return ["" if value is None else _text(value) for value in column.to_pylist()]


def _text(value: Any) -> str:
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)


def _photo(value: Any) -> ImageRef:
    """Return a photo given as bytes, a path, or Hugging Face's struct of both."""
    if isinstance(value, dict):
        photo = _photo(value["bytes"])
        path = value.get("path") or ""
        return _photo(path) if photo.data is NO_BYTES and path else photo._replace(image_id=path)
    if isinstance(value, str):
        return ImageRef(value, value)
    if value is None:
        return ImageRef("", "", data=NO_BYTES)
    too_large = len(value) > MAX_PHOTO_BYTES
    return ImageRef("", "", size=len(value), data=TOO_LARGE if too_large else value)


def _problem(schema: pa.Schema, columns: Columns) -> str | None:
    """Return why a file of this schema has no photos in these columns, or None."""
    for flag, name in (("--image-column", columns.image), ("--id-column", columns.image_id)):
        if name is not None and name not in schema.names:
            return f"has no column {name!r}: name one of {', '.join(schema.names)} with {flag}"
    kind = schema.field(columns.image).type
    if _is_bytes(kind) or _is_path(kind) or _is_hugging_face(kind):
        return None
    return (
        f"has a column {columns.image!r} of type {kind}, neither bytes nor paths of photos: name "
        "another with --image-column"
    )


def _is_bytes(kind: pa.DataType) -> bool:
    kind = _value_type(kind)
    checks = pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view
    return pa.types.is_fixed_size_binary(kind) or any(check(kind) for check in checks)


def _is_path(kind: pa.DataType) -> bool:
    kind = _value_type(kind)
    checks = pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view
    return any(check(kind) for check in checks)


def _value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_hugging_face(kind: pa.DataType) -> bool:
    """Whether this is a struct of bytes and a path, one of which may be null in all rows."""
    if not pa.types.is_struct(kind):
        return False
    fields = {field.name: field.type for field in kind}
    data, path = fields.get("bytes", pa.int8()), fields.get("path", pa.null())
    return (_is_bytes(data) or pa.types.is_null(data)) and (
        _is_path(path) or pa.types.is_null(path)
    )


@contextmanager
def reporting(archive: str, unread: Unread) -> Iterator[None]:
    """Report any error in the block as the reason why an archive was not fully read.

    Raises:
        UsageError: the block raised it; it is not the archive's fault.
    """
    try:
        yield
    except UsageError:
        raise
    except OSError as error:
        unread(archive, error.strerror or str(error))
    except Exception as error:  # tarfile, decompressors and pyarrow share no base class
        unread(archive, first_line(error))
