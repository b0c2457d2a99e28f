"""Photos in tars, compressed or not; links between members are resolved.

Damage and garbage, which `tarfile` skips silently, are reported; concatenated tars are read.
"""

import posixpath
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from functools import partial
from typing import IO, Self

from batchcap.photos.archives import (
    BUFFER_BYTES,
    MAX_PHOTO_BYTES,
    TOO_LARGE,
    Unread,
    open_archive,
    reporting,
)
from batchcap.schema import ErrorType, ImageRef, Rejection, int64_or_none

MAX_HEADER_BYTES = 1 << 20  # of a pax header, or a long name
MAX_EXTENTS = 4096  # of a sparse file
MAX_LINKS = 1 << 18  # kept in memory, about 100 MB
MAX_FOLLOWED = 40  # links on the way to a file, as on Linux
MAX_DEPTH = 1024  # folders in a path
LEADING_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
AFTER_END = "the data after its end mark is damaged, or not a tar"

NOT_A_FILE = Rejection(ErrorType.NOT_A_FILE, "This is a device or a pipe in a tar, not a photo.")
LEADS_NOWHERE = Rejection(
    ErrorType.NOT_A_FILE,
    "This is a link that leads to no file in its tar; pack the file itself (tar -h).",
)
TOO_MANY_LINKS = Rejection(
    ErrorType.NOT_A_FILE,
    f"This is a link in a tar that has more than {MAX_LINKS:,} links; unpack the tar.",
)

# (number of a tar in its file, name of a link in it): path of its target, from the tar's top
Links = dict[tuple[int, str], str]


def read_tar(
    archive: str,
    is_wanted: Callable[[str], bool],
    unread: Unread,
    progress: Callable[[], object] = lambda: None,
) -> Iterator[ImageRef]:
    """Yield the members of a tar whose names are wanted, in its order; links last.

    `image_id` is the name in the tar, without `./` and not escaped yet; `path` is empty. Folders
    are left out. A file may hold several tars, one after the other (`cat a.tar b.tar`).
    `progress` is called for each member, wanted or not. Links are read in a second pass, so that
    memory grows with their number only.
    """
    links: Links = {}
    reasons: dict[str, None] = {}  # each once, though a tar with links is read twice

    def note(_archive: str, reason: str) -> None:
        reasons[reason] = None

    with reporting(archive, note), _opened_tar(archive) as tar:
        for member in _members(tar, progress):
            name = _name_in_tar(member.name)
            is_link = member.issym() or member.islnk()
            if is_link and len(links) < MAX_LINKS:
                target = _link_target(member)
                if member.issym() or target != name:  # a file packed twice is a link to itself
                    links[tar.number, name] = target
            elif not member.isdir() and is_wanted(name):
                yield _member_photo(tar, member, name)
    with reporting(archive, note):
        yield from _linked(archive, links, is_wanted, progress)
    for reason in reasons:
        unread(archive, reason)


def _linked(
    archive: str,
    links: Links,
    is_wanted: Callable[[str], bool],
    progress: Callable[[], object],
) -> Iterator[ImageRef]:
    """Yield the wanted links of a tar, each with the bytes of its target."""
    names: dict[tuple[int, str], list[str]] = {}
    for number, name in links:
        if is_wanted(name):
            target = _end_of_links(number, name, links)
            if target is None:
                yield ImageRef(name, "", data=LEADS_NOWHERE)
            else:
                names.setdefault((number, target), []).append(name)
    if not names:
        return
    with _opened_tar(archive) as tar:
        for member in _members(tar, progress):
            target = _name_in_tar(member.name)
            if not (member.isdir() or member.issym() or member.islnk()):
                for name in names.pop((tar.number, target), ()):
                    yield _member_photo(tar, member, name)
            if not names:
                return
    for unfound in names.values():
        yield from (ImageRef(name, "", data=LEADS_NOWHERE) for name in unfound)


def _end_of_links(number: int, name: str, links: Links) -> str | None:
    """Return the name of a link's final target; None if it leaves its tar or is circular.

    Each directory on the way may be a link, too.
    """
    behind: list[str] = []
    ahead = name.split("/")[::-1]
    followed = 0
    while ahead:
        if followed > MAX_FOLLOWED or len(ahead) > MAX_DEPTH:
            return None
        part = ahead.pop()
        if part == "..":
            if not behind:
                return None
            behind.pop()
        elif part not in ("", "."):
            behind.append(part)
            target = links.get((number, "/".join(behind)))
            if target is not None:
                if target.startswith("/"):
                    return None
                ahead += target.split("/")[::-1]
                behind, followed = [], followed + 1
    return "/".join(behind)


def _link_target(link: tarfile.TarInfo) -> str:
    """Return a link's target from the top of its tar, with a leading slash if it leaves the tar."""
    if link.islnk():
        return _name_in_tar(link.linkname)  # GNU tar gives hard links absolute names, too
    return posixpath.join(posixpath.dirname(_name_in_tar(link.name)), link.linkname)


def _name_in_tar(path: str) -> str:
    return "/".join(part for part in path.split("/") if part not in ("", "."))


def _member_photo(tar: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> ImageRef:
    data = _member_bytes(tar, member)
    return ImageRef(name, "", member.size, _mtime_ns(member), data)


def _member_bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | Rejection:
    if member.issym() or member.islnk():
        return TOO_MANY_LINKS
    extents = member.sparse or ()
    if member.size > MAX_PHOTO_BYTES or len(extents) > MAX_EXTENTS:
        return TOO_LARGE
    if not member.isreg() or (file := tar.extractfile(member)) is None:
        return NOT_A_FILE
    # In pieces, since `tarfile` copies all it has read of a sparse file at each extent.
    return b"".join(iter(partial(file.read, BUFFER_BYTES), b""))


def _mtime_ns(member: tarfile.TarInfo) -> int | None:
    """Return a member's time, more precise than the float in `tarfile`."""
    if int64_or_none(member.mtime) is None:
        return None
    try:
        return int64_or_none(int(Decimal(member.pax_headers.get("mtime", member.mtime)) * 10**9))
    except ArithmeticError:
        return None


class _Tars(tarfile.TarFile):
    """A file of concatenated tars.

    file: the file, compressed or not. number: index of the latest member's tar. is_ended: an end
    mark was read, and no member after it.
    """

    file: IO[bytes]
    number = 0
    is_ended = False


class _Member(tarfile.TarInfo):
    """A member with a checked header: `tarfile` takes a damaged one for the end of the tar."""

    @classmethod
    def fromtarfile(cls, tar: _Tars) -> Self:  # type: ignore[override]
        """Read the next member.

        Raises:
            HeaderError: a block of zeros (two are an end mark), or the file's end after that.
            ReadError: anything else that is no header, or the file's end without an end mark.
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
        """Reject headers too large for memory, which `tarfile` would read whole."""
        if self.size < 0 or (self.type in LEADING_HEADERS and self.size > MAX_HEADER_BYTES):
            raise tarfile.ReadError("it is damaged: the size of a header makes no sense")
        return super()._proc_member(tar)  # type: ignore[misc]


_Tars.tarinfo = _Member


@contextmanager
def _opened_tar(archive: str) -> Iterator[_Tars]:
    """Open a tar, compressed or not, whatever its name.

    Raises:
        OSError: it can't be opened.
        ReadError: it is not a tar.
    """
    with open_archive(archive) as file:
        try:
            # `ignore_zeros`: read on after an end mark.
            tar = _Tars.open(
                fileobj=file, encoding="utf-8", errors="surrogateescape", ignore_zeros=True
            )
        except tarfile.ReadError as error:
            file.seek(0)
            is_zstd = file.read(len(ZSTD_MAGIC)) == ZSTD_MAGIC
            reason = "compressed with zstd: decompress it" if is_zstd else "damaged, or not a tar"
            raise tarfile.ReadError(f"it is {reason}") from error
        tar.file = file
        with tar:
            yield tar


def _members(tar: _Tars, progress: Callable[[], object]) -> Iterator[tarfile.TarInfo]:
    """Yield the members of all tars in a file.

    Raises:
        ReadError: a header is damaged, or the file ends early, or other data follows.
    """
    while (member := tar.next()) is not None:
        progress()
        tar.members = []  # type: ignore[attr-defined] # else it keeps them all
        if not 0 <= member.size < 2**63:
            raise tarfile.ReadError("it is damaged: the size of a member makes no sense")
        yield member
    if tar.file.read(1):  # Python ends bzip2 and xz files at foreign data
        raise tarfile.ReadError(AFTER_END)
