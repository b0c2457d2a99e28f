"""Archives of photos like those of users, and the photos listed from them."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchcap.photos.archives import USUAL_COLUMNS, Columns
from batchcap.photos.listing import list_images
from batchcap.schema import ErrorType, ImageRef, Rejection

MTIME = 1_600_000_000  # seconds, of every member


def listed(
    source: object, pattern: str | None = None, columns: Columns = USUAL_COLUMNS
) -> tuple[list[ImageRef], list[tuple[str, str]]]:
    """The photos, and the reports of archives that can't be read."""
    reports: list[tuple[str, str]] = []
    refs = list_images(str(source), pattern, lambda *one: reports.append(one), columns)
    return list(refs), reports


def ids(refs: Iterable[ImageRef]) -> list[str]:
    return [ref.image_id for ref in refs]


def failures(refs: Iterable[ImageRef]) -> list[ErrorType]:
    return [ref.data.error_type for ref in refs if isinstance(ref.data, Rejection)]


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], mode: Any = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            _add(tar, name, data)
    return path


def tar_of(*members: tuple[str, bytes | str] | tuple[str, bytes | str, dict[str, str]]) -> bytes:
    """A tar of (name, content, pax headers): `/x` is a hard link to x, `>x` a symbolic one."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content, *headers in members:
            _add(tar, name, content, *headers)
    return file.getvalue()


def _add(
    tar: tarfile.TarFile, name: str, content: bytes | str, headers: dict[str, str] | None = None
) -> None:
    member = tarfile.TarInfo(name)
    member.mtime = MTIME
    member.pax_headers = headers or {}
    if isinstance(content, str):
        member.type = tarfile.LNKTYPE if content[0] == "/" else tarfile.SYMTYPE
        member.linkname = content[1:]
        tar.addfile(member)
    else:
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def write_parquet(path: Path, **columns: object) -> Path:
    try:
        pq.write_table(pa.table(columns), path)
    except pa.ArrowNotImplementedError as error:  # views, by older versions
        pytest.skip(f"this version of pyarrow cannot write such a column: {error}")
    return path


def photos_of(folder: Path) -> dict[str, bytes]:
    """The bytes of the photos below a folder, by id."""
    paths = sorted(folder.rglob("*.jpg"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
