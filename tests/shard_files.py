"""Shards of photos as their owners make them."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

MTIME = 1_600_000_000  # seconds, of every member


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(data), MTIME
            tar.addfile(member, io.BytesIO(data))
    return path


def write_parquet(path: Path, **columns: object) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def photos_of(folder: Path) -> dict[str, bytes]:
    """The bytes of the photos below a folder, by id."""
    paths = sorted(folder.rglob("*.jpg"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
