"""A run never writes to INPUT, needs no network, and reveals nothing about the machine."""

import getpass
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from helpers.commands import batchcap_here
from helpers.crashes import BATCHCAP, ROUNDING, difference, rows_of
from helpers.shard_files import write_tar
from PIL import ExifTags, Image

from batchcap.rows.layout import Layout

# Root without the right to bypass file modes.
AS_ANYBODY = (
    "setpriv",
    *(f"--{kind}=-dac_override,-dac_read_search" for kind in ("bounding-set", "inh-caps")),
)
WITHOUT_NETWORK = ("unshare", "--map-root-user", "--net")


def state_of(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Return mode, time and digest of everything in a folder."""
    state = {}
    for path in (folder, *folder.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
        digest = hashlib.sha256(content).hexdigest()
        state[str(path.relative_to(folder))] = (status.st_mode, status.st_mtime_ns, digest)
    return state


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Remount a folder read-only at its own path."""
    mount = ["mount", "--bind", str(folder), str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a folder")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("source", ["", "photos.tar", "photos.txt"])
def test_a_read_only_input_stays_as_it_is(source: str, photos_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(photos_folder, tmp_path / "photos")
    photos = sorted(folder.rglob("*.jpg"))
    write_tar(folder / "photos.tar", [(path.name, path.read_bytes()) for path in photos])
    (folder / "photos.txt").write_text("".join(f"{path.relative_to(folder)}\n" for path in photos))
    before = state_of(folder)
    with read_only(folder):
        done = batchcap_here("run", folder / source, tmp_path / "o.parquet")
        assert done.returncode == 0, done.stderr
        assert state_of(folder) == before
    assert rows_of(tmp_path / "o.parquet")["status"].to_pylist() == ["ok"] * len(photos)


def test_unreadable_photos_fail_and_unreadable_folders_are_named(
    photos_folder: Path, tmp_path: Path
) -> None:
    wrapper = AS_ANYBODY if os.geteuid() == 0 else ()
    if wrapper and subprocess.run([*wrapper, "true"], capture_output=True, check=False).returncode:
        pytest.skip("root cannot give up reading every file")
    folder, output = tmp_path / "photos", tmp_path / "o.parquet"
    for name in ("good.jpg", "secret.jpg", "locked/inside.jpg"):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(photos_folder / "coffee.jpg", folder / name)
    for name in ("secret.jpg", "locked"):
        (folder / name).chmod(0)
    command = [*wrapper, *BATCHCAP, "run", str(folder), str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "could not fully read locked/ (Permission denied)" in done.stderr
    assert "Traceback" not in done.stderr
    found = {row["image_id"]: row["error_type"] or "ok" for row in rows_of(output).to_pylist()}
    assert found == {"good.jpg": "ok", "secret.jpg": "unreadable"}


def test_a_run_without_network_makes_the_same_rows(photos_folder: Path, tmp_path: Path) -> None:
    if subprocess.run([*WITHOUT_NETWORK, "true"], capture_output=True, check=False).returncode:
        pytest.skip("cannot take the network from a process")
    alone, usual = tmp_path / "alone.parquet", tmp_path / "usual.parquet"
    done = subprocess.run(
        [*WITHOUT_NETWORK, *BATCHCAP, "run", str(photos_folder), str(alone)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert batchcap_here("run", photos_folder, usual).returncode == 0
    assert difference(rows_of(alone), rows_of(usual)) <= ROUNDING


class SetBack(datetime):
    """A clock that is set back by an hour each time it is read."""

    start = time.time()
    times = 0

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> "SetBack":
        cls.times += 1
        return cls.fromtimestamp(cls.start, tz) - timedelta(hours=cls.times)


def test_a_clock_that_is_set_back_skips_no_photo(
    photos_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The photos' times are then in the future."""
    metrics, output = tmp_path / "m.prom", tmp_path / "o"
    command = ("run", photos_folder, output, "--rows-per-part", 1, "--metrics-file", metrics)
    with monkeypatch.context() as patch:
        for module in ("run", "local_engine"):
            patch.setattr(f"batchcap.captioning.{module}.datetime", SetBack)
        assert batchcap_here(*command, "--batch-size", 2, "--limit", 3).returncode == 0
        assert batchcap_here(*command, "--batch-size", 2).returncode == 0
    assert SetBack.times > 4
    summary = json.loads(Layout(output).summary.read_text())
    assert (summary["captioned"], summary["already_done"]) == (7, 3)
    assert summary["seconds"] > 0
    assert min(summary["stage_seconds"].values()) >= 0
    assert not re.search(r"_seconds(\{.*\})? -", metrics.read_text())
    moments = pq.read_table(output)["created_at"].to_pylist()
    assert min(moments) < datetime.now(UTC) - timedelta(hours=1)
    assert "0 captioned, 0 failed, 10 already done" in batchcap_here(*command).stdout


def test_rows_reveal_nothing_about_the_machine_and_its_user(tmp_path: Path) -> None:
    folder, output = tmp_path / "private" / "photos", tmp_path / "o.parquet"
    folder.mkdir(parents=True)
    exif = Image.Exif()
    exif[ExifTags.Base.Artist] = "Jane Doe"
    exif[ExifTags.Base.DateTime] = "2019:08:07 06:05:04"
    exif.get_ifd(ExifTags.IFD.GPSInfo).update({1: "N", 2: (48.0, 51.0, 29.6), 3: "E"})
    Image.new("RGB", (64, 64), "red").save(folder / "gps.jpg", exif=exif, comment=b"Jane Doe")
    assert b"Jane Doe" in (folder / "gps.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes((folder / "gps.jpg").read_bytes()[:-100])
    (folder / "lost.jpg").symlink_to(folder / "nowhere")
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    (folder / "text.jpg").write_text(str(folder))
    done = batchcap_here("run", folder, output, "--attention", "full")
    assert done.returncode == 0, done.stderr
    file = pq.ParquetFile(output)
    assert file.metadata.num_rows == 5
    content = f"{file.read().to_pylist()} {file.schema_arrow.metadata} {file.metadata.created_by}"
    secrets = (str(tmp_path), str(Path.home()), str(Path.cwd()), sys.executable, "private")
    for secret in (*secrets, "Jane", "29.6", "2019:08", "GPS"):
        assert secret not in content
    for name in (socket.gethostname(), getpass.getuser()):
        assert not re.search(rf"\b{re.escape(name)}\b", content)
