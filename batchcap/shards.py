"""Photos in files of many: tars in WebDataset's naming, Parquet with a column of bytes or paths.

Shards are read as streams, one photo at a time. What could be read of a damaged one counts; whoever
lists is told of the rest. Nothing is unpacked: names in a shard are ids, and open no file.
"""

import glob
import posixpath
import re
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from functools import partial
from itertools import count, product
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

import pyarrow as pa
import pyarrow.parquet as pq

from batchcap.contracts import ErrorType, Rejection, UsageError, int64_or_none
from batchcap.remote import is_url, matching, open_file

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
PARQUET_SUFFIX = ".parquet"
MAX_PHOTO_BYTES = 1 << 26  # some two hundred photos of shards are in memory at a time
ROWS_READ = 16  # of a Parquet file at a time
BUFFER_BYTES = 1 << 20
MAX_HEADER_BYTES = 1 << 20  # of a pax header, or a long name
MAX_EXTENTS = 4096  # of a sparse file
MAX_LINKS = 1 << 18  # of a tar, some hundred megabytes
MAX_FOLLOWED = 40  # as many links as Linux follows
MAX_DEPTH = 1024
LEADING_HEADERS = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
AFTER_END = "what follows its end mark is no tar, or damaged"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_WILD = re.compile(r"[*?[]")
_VARIABLE = re.compile(rf"{_RANGE.pattern}|{_WILD.pattern}")

NOT_A_FILE = Rejection(ErrorType.NOT_A_FILE, "This is a device or a pipe in a tar, no photo file.")
LEADS_NOWHERE = Rejection(ErrorType.NOT_A_FILE, "This is a link that leads to no file in its tar.")
TOO_MANY_LINKS = Rejection(
    ErrorType.NOT_A_FILE, f"This is a link in a tar that has more than {MAX_LINKS:,}; unpack it."
)
TOO_LARGE = Rejection(
    ErrorType.TOO_LARGE, f"In a shard, a photo has {MAX_PHOTO_BYTES:,} bytes at most; unpack it."
)
NO_BYTES = Rejection(ErrorType.MISSING, "The row has neither bytes nor a path.")

# (folder or shard, why it, or the rest of it, can't be read)
Unread = Callable[[str, str], object]


class Shard(NamedTuple):
    """A tar or a Parquet file of an input.

    name: its path below the folder that all of them are in, which says the same on every machine.
    """

    path: str
    name: str


class Item(NamedTuple):
    """One photo of a shard.

    name: in a tar its path, without `./`; in Parquet what the id column says, or the path, or else
        the file and the row, `photos-00000.parquet:0000012`.
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


def shards_of(source: str) -> list[Shard]:
    """The tars or Parquet files that `a-{000..999}.tar`, a glob or a name stands for, sorted.

    Their names start at the last folder that is the same for all.

    Raises:
        UsageError: a glob matches nothing.
        OSError: the store can't be reached.
    """
    if not is_url(source) and Path(source).exists():
        return [Shard(source, posixpath.basename(source))]
    paths: set[str] = set()
    for name in _numbered(source):
        paths.update(_matching(name) if _WILD.search(name) else [name])
    if not paths:
        raise UsageError(f"There is no {source}; check the path.")
    above = _without_scheme(_VARIABLE.split(source)[0]).rpartition("/")[0]
    return [
        Shard(path, _without_scheme(path).removeprefix(above).lstrip("/")) for path in sorted(paths)
    ]


def _without_scheme(path: str) -> str:
    """A path in a store, which may answer with another scheme (`s3://` to `s3a://`)."""
    return path.partition("://")[2].lstrip("/") if is_url(path) else path


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
    """The members of a tar whose names are wanted, in its order; links after all others.

    Folders are left out. A file may be several tars, one after the other (`cat a.tar b.tar`).
    """
    links: Links = {}
    reasons: dict[str, None] = {}  # each once, though a tar with links is read twice

    def note(_shard: str, reason: str) -> None:
        reasons[reason] = None

    with _telling(shard, note), _opened_tar(shard) as tar:
        for member in _members(tar):
            name = _name_in_tar(member.name)
            is_link = member.issym() or member.islnk()
            if is_link and len(links) < MAX_LINKS:
                if (target := _link_target(member)) != name:  # where tar was given a file twice
                    links[tar.number, name] = target
            elif not member.isdir() and is_wanted(name):
                yield _member_item(tar, member, name)
    with _telling(shard, note):
        yield from _linked(shard, links, is_wanted)
    for reason in reasons:
        unread(shard, reason)


# (number of a tar in its file, name of a link in it): the path from the tar's top to its target
Links = dict[tuple[int, str], str]


def _linked(shard: str, links: Links, is_wanted: Callable[[str], bool]) -> Iterator[Item]:
    """The links of a tar whose names are wanted, each with the bytes of the member it leads to."""
    names: dict[tuple[int, str], list[str]] = {}
    for number, name in links:
        if is_wanted(name):
            target = _end_of_links(number, name, links)
            if target is None:
                yield Item(name, "", LEADS_NOWHERE)
            else:
                names.setdefault((number, target), []).append(name)
    if not names:
        return
    with _opened_tar(shard) as tar:
        for member in _members(tar):
            target = _name_in_tar(member.name)
            if not (member.isdir() or member.issym() or member.islnk()):
                for name in names.pop((tar.number, target), ()):
                    yield _member_item(tar, member, name)
            if not names:
                return
    for unfound in names.values():
        yield from (Item(name, "", LEADS_NOWHERE) for name in unfound)


def _end_of_links(number: int, name: str, links: Links) -> str | None:
    """The name that a link stands for in the end; None where it leaves its tar or goes in circles.

    Parts of the way may be links, too.
    """
    behind: list[str] = []
    ahead = name.split("/")[::-1]
    followed = 0
    while ahead:
        part = ahead.pop()
        if part == "..":
            if not behind:
                return None
            behind.pop()
        elif part not in ("", "."):
            behind.append(part)
            target = links.get((number, "/".join(behind)))
            if target is not None:
                ahead += target.split("/")[::-1]
                behind, followed = [], followed + 1
                if target.startswith("/") or followed > MAX_FOLLOWED or len(ahead) > MAX_DEPTH:
                    return None
    return "/".join(behind)


def _link_target(link: tarfile.TarInfo) -> str:
    """Where a link leads, from the top of its tar; with a leading slash where it leaves the tar."""
    if link.islnk():
        return _name_in_tar(link.linkname)  # GNU tar gives hard links absolute names, too
    return posixpath.join(posixpath.dirname(_name_in_tar(link.name)), link.linkname)


def _name_in_tar(path: str) -> str:
    return "/".join(part for part in path.split("/") if part not in ("", "."))


def _member_item(tar: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> Item:
    data = _member_bytes(tar, member)
    return Item(name, "", data, member.size, _mtime_ns(member))


def _member_bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | Rejection:
    if member.issym() or member.islnk():
        return TOO_MANY_LINKS
    extents = member.sparse or ()
    if member.size > MAX_PHOTO_BYTES or len(extents) > MAX_EXTENTS:
        return TOO_LARGE
    if not member.isreg() or (file := tar.extractfile(member)) is None:
        return NOT_A_FILE
    # In pieces, since `tarfile` copies all that it has of a sparse file at each of its extents.
    return b"".join(iter(partial(file.read, BUFFER_BYTES), b""))


def _mtime_ns(member: tarfile.TarInfo) -> int | None:
    """To the nanosecond, which the float of `tarfile` is not."""
    if int64_or_none(member.mtime) is None:
        return None
    try:
        return int64_or_none(int(Decimal(member.pax_headers.get("mtime", member.mtime)) * 10**9))
    except ArithmeticError:
        return None


class _Tars(tarfile.TarFile):
    """A file of tars, one after the other.

    file: what they are read from, compressed or not. number: which of them the latest member is in.
    is_ended: its end mark was read, and no member after it.
    """

    file: IO[bytes]
    number = 0
    is_ended = False


class _Member(tarfile.TarInfo):
    """A member whose header is checked: `tarfile` takes a damaged one for the end of the tar."""

    @classmethod
    def fromtarfile(cls, tar: _Tars) -> Self:  # type: ignore[override]
        """Read the next member.

        Raises:
            HeaderError: a block of zeros, of which two are an end mark, or the file's end after it.
            ReadError: there is neither, nor a header; or the file ends without an end mark.
        """
        assert tar.fileobj is not None
        try:
            member = super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            if not tar.is_ended:
                tar.is_ended, tar.number, tar.pax_headers = True, tar.number + 1, {}
            raise
        except tarfile.HeaderError as error:
            tar.fileobj.seek(tar.offset)
            if not tar.is_ended:
                raise tarfile.ReadError("it is damaged, or ends early") from error
            if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(AFTER_END) from error
            raise
        tar.is_ended = False
        return member

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        """Refuse headers that `tarfile` would read into memory, however large."""
        if self.size < 0 or (self.type in LEADING_HEADERS and self.size > MAX_HEADER_BYTES):
            raise tarfile.ReadError("it is damaged: the size of a header makes no sense")
        return super()._proc_member(tar)  # type: ignore[misc]


_Tars.tarinfo = _Member


@contextmanager
def _opened_tar(shard: str) -> Iterator[_Tars]:
    """A tar, compressed or not, whatever its name says.

    Raises:
        OSError: it can't be opened.
        ReadError: it is no tar.
    """
    with open_file(shard) as file:
        try:
            # With `ignore_zeros`, end marks are no end.
            tar = _Tars.open(
                fileobj=file, encoding="utf-8", errors="surrogateescape", ignore_zeros=True
            )
        except tarfile.ReadError as error:
            file.seek(0)
            is_zstd = file.read(len(ZSTD_MAGIC)) == ZSTD_MAGIC
            reason = "compressed with zstd: decompress it" if is_zstd else "no tar, or damaged"
            raise tarfile.ReadError(f"it is {reason}") from error
        tar.file = file
        with tar:
            yield tar


def _members(tar: _Tars) -> Iterator[tarfile.TarInfo]:
    """The members of all tars in a file.

    Raises:
        ReadError: a header is damaged, or the file ends early, or not with a tar.
    """
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined] # or it would keep each
        if not 0 <= member.size < 2**63:
            raise tarfile.ReadError("it is damaged: the size of a member makes no sense")
        yield member
    if tar.file.read(1):  # bzip2 and xz files end for Python where something else follows
        raise tarfile.ReadError(AFTER_END)


def read_parquet(shard: Shard, columns: Columns, unread: Unread) -> Iterator[Item]:
    """The photos of a Parquet file, in its order.

    Raises:
        UsageError: it has no such column.
    """
    with (
        _telling(shard.path, unread),
        open_file(shard.path) as opened,
        pq.ParquetFile(opened, buffer_size=BUFFER_BYTES) as file,
    ):
        _check_columns(shard.path, file.schema_arrow, columns)
        wanted = [name for name in columns if name is not None]
        rows = count()
        for batch in file.iter_batches(ROWS_READ, columns=wanted):
            items = [_item(photo) for photo in batch.column(columns.image).to_pylist()]
            names = [item.name for item in items]
            if columns.image_id is not None:
                names = _ids_in(batch.column(columns.image_id))
            for item, name, row in zip(items, names, rows, strict=False):
                yield item._replace(name=name or f"{shard.name}:{row:07}")


def _ids_in(column: pa.Array) -> list[str]:
    """Ids as texts, empty where there is none."""
    if pa.types.is_temporal(column.type):  # Python has no nanoseconds, nor years after 9999
        column = column.cast(pa.string())
    return ["" if value is None else _text(value) for value in column.to_pylist()]


def _text(value: Any) -> str:
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)


def _item(photo: Any) -> Item:
    """Of bytes, of a path, or of Hugging Face's struct of both; the path is the name."""
    if isinstance(photo, dict):
        item = _item(photo["bytes"])
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
    if not (_is_bytes(kind) or _is_path(kind) or _is_hugging_face(kind)):
        raise UsageError(
            f"{shard}: column {columns.image!r} is {kind}, neither bytes nor paths of photos: name "
            "another with --image-column"
        )


def _is_bytes(kind: pa.DataType) -> bool:
    kind = _decoded(kind)
    is_any = pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view
    return pa.types.is_fixed_size_binary(kind) or any(is_one(kind) for is_one in is_any)


def _is_path(kind: pa.DataType) -> bool:
    kind = _decoded(kind)
    is_any = pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view
    return any(is_one(kind) for is_one in is_any)


def _decoded(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_hugging_face(kind: pa.DataType) -> bool:
    """Whether it is a struct of bytes and a path, one of which may be null in all rows."""
    if not pa.types.is_struct(kind):
        return False
    fields = {field.name: field.type for field in kind}
    data, path = fields.get("bytes", pa.int8()), fields.get("path", pa.null())
    return (_is_bytes(data) or pa.types.is_null(data)) and (
        _is_path(path) or pa.types.is_null(path)
    )


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
