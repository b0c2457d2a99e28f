"""Photos in files of many: tars in WebDataset's naming, Parquet with a column of bytes or paths.

Shards are read as streams, one photo at a time. What could be read of a damaged one counts; whoever
lists is told of the rest. Nothing is unpacked: names in a shard are ids, and open no file.
"""

import glob
import re
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from batchcap.contracts import ErrorType, Rejection, UsageError
from batchcap.remote import is_url, matching, open_file

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
PARQUET_SUFFIX = ".parquet"
MAX_PHOTO_BYTES = 1 << 26  # some two hundred photos of shards are in memory at a time
ROWS_READ = 16  # of a Parquet file at a time
BUFFER_BYTES = 1 << 20

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_WILD = re.compile(r"[*?[]")

NOT_A_FILE = Rejection(ErrorType.NOT_A_FILE, "This is a link or a device in a tar, no photo file.")
TOO_LARGE = Rejection(
    ErrorType.TOO_LARGE, f"In a shard, a photo has {MAX_PHOTO_BYTES:,} bytes at most; unpack it."
)
NO_BYTES = Rejection(ErrorType.MISSING, "The row has neither bytes nor a path.")

# (folder or shard, why it, or the rest of it, can't be read)
Unread = Callable[[str, str], object]


class Item(NamedTuple):
    """One photo of a shard.

    name: in a tar its path, without `./`; in Parquet what the id column says, or the path.
    data: its bytes, or why there are none; None where `path` leads to them.
    """

    name: str
    path: str = ""
    data: bytes | Rejection | None = None
    size: int | None = None
    mtime_ns: int | None = None


class Columns(NamedTuple):
    """The columns of a Parquet file: of photos, as bytes or paths, and of ids, if there is one."""

    image: str = "image"
    image_id: str | None = None


USUAL_COLUMNS = Columns()


def shards_of(source: str) -> list[str]:
    """The tars or Parquet files that `a-{000..999}.tar`, a glob or a name stands for, sorted.

    Raises:
        UsageError: a glob matches nothing.
        OSError: the store can't be reached.
    """
    if not is_url(source) and Path(source).exists():
        return [source]
    shards: set[str] = set()
    for name in _numbered(source):
        shards.update(_matching(name) if _WILD.search(name) else [name])
    if not shards:
        raise UsageError(f"There is no {source}; check the path.")
    return sorted(shards)


def _numbered(source: str) -> Iterator[str]:
    """The names that `{000..999}` stands for, with as many digits as its start has."""
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


def read_tar(shard: str, is_wanted: Callable[[str], bool], unread: Unread) -> Iterator[Item]:
    """The members of a tar whose names are wanted, in its order, folders left out."""
    with (
        _telling(shard, unread),
        open_file(shard) as file,
        tarfile.open(fileobj=file, encoding="utf-8", errors="surrogateescape") as tar,
    ):
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined] # or it would keep each
            name = "/".join(part for part in member.name.split("/") if part not in ("", "."))
            if not member.isdir() and is_wanted(name):
                data = _member_bytes(tar, member)
                yield Item(name, "", data, member.size, round(member.mtime * 1e9))
        _check_end(tar)


def _member_bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | Rejection:
    if member.size > MAX_PHOTO_BYTES:
        return TOO_LARGE
    if not member.isreg() or member.issparse() or (file := tar.extractfile(member)) is None:
        return NOT_A_FILE
    return file.read()


def _check_end(tar: tarfile.TarFile) -> None:
    """`tarfile` takes a damaged header, and an end that comes early, for the end."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("it is damaged, or ends early")


def read_parquet(shard: str, columns: Columns, unread: Unread) -> Iterator[Item]:
    """The photos of a Parquet file, in its order.

    Raises:
        UsageError: it has no such column, or nothing to make ids of.
    """
    with (
        _telling(shard, unread),
        open_file(shard) as opened,
        pq.ParquetFile(opened, buffer_size=BUFFER_BYTES) as file,
    ):
        _check_columns(shard, file.schema_arrow, columns)
        wanted = [name for name in columns if name is not None]
        for batch in file.iter_batches(ROWS_READ, columns=wanted):
            ids = batch.column(columns.image_id).to_pylist() if columns.image_id else None
            for row, photo in enumerate(batch.column(columns.image).to_pylist()):
                item = _item(photo)
                if ids is not None:
                    item = item._replace(name="" if ids[row] is None else str(ids[row]))
                if item.name:
                    yield item
                else:
                    unread(shard, "a photo has no id")


def _item(photo: Any) -> Item:
    """Of bytes, of a path, or of Hugging Face's struct of both; the path is the name."""
    if isinstance(photo, dict):
        item = _item(photo.get("bytes"))
        path = photo.get("path") or ""
        return Item(path, path) if item.data is NO_BYTES and path else item._replace(name=path)
    if isinstance(photo, str):
        return Item(photo, photo)
    if photo is None:
        return Item("", "", NO_BYTES)
    too_large = len(photo) > MAX_PHOTO_BYTES
    return Item("", "", TOO_LARGE if too_large else photo, len(photo))


def _check_columns(shard: str, schema: pa.Schema, columns: Columns) -> None:
    for flag, name in (("--image-column", columns.image), ("--id-column", columns.image_id)):
        if name is not None and name not in schema.names:
            raise UsageError(
                f"{shard} has no column {name!r}: name one of {', '.join(schema.names)} with {flag}"
            )
    kind = schema.field(columns.image).type
    is_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    is_path = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if not (is_bytes or is_path or _is_hugging_face(kind)):
        raise UsageError(
            f"{shard}: column {columns.image!r} is {kind}, neither bytes nor paths of photos: name "
            "another with --image-column"
        )
    if is_bytes and columns.image_id is None:
        raise UsageError(f"{shard} has photos as bytes: name the column of their ids, --id-column")


def _is_hugging_face(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and {"bytes", "path"} <= {field.name for field in kind}


@contextmanager
def _telling(shard: str, unread: Unread) -> Iterator[None]:
    """Tell of what can't be read of a shard, whose photos until there have been given out."""
    try:
        yield
    except UsageError:
        raise
    except OSError as error:
        unread(shard, error.strerror or str(error))
    except Exception as error:  # tars, their compression and Parquet have nothing in common
        unread(shard, (str(error).splitlines() or [type(error).__name__])[0])
