"""Captioning on a real Ray cluster of two nodes with one processor each."""

import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from helpers import crashes
from helpers.crashes import (
    OF_THE_RUN,
    ROUNDING,
    children_of,
    committed,
    difference,
    running,
)
from helpers.shard_files import write_tar
from PIL import Image

from batchcap.captioning.ray_engine import Workers, pieces_of, workers_on
from batchcap.errors import UsageError
from batchcap.photos.archives import Archive
from batchcap.settings import DEFAULT_MODEL, Engine, RunSettings

pytestmark = pytest.mark.timeout(900)

# A cluster starts slowly on a busy machine.
run = partial(crashes.run, timeout_s=400)
wait_until = partial(crashes.wait_until, timeout_s=400)

PHOTOS, ARCHIVES = 240, 8
FLAGS = ("--batch-size", 8, "--rows-per-part", 8)
NO_PHOTO = "000.jpg"
RAY = Path(sys.executable).with_name("ray")


@pytest.fixture(scope="module")
def tars(photo_crops: npt.NDArray[np.uint8], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return tars of JPEGs, one of them invalid, as INPUT."""
    folder = tmp_path_factory.mktemp("tars")
    rng = np.random.default_rng(1)
    members = []
    for number in range(PHOTOS):
        crop = np.roll(photo_crops[number % len(photo_crops)], rng.integers(224), axis=1)
        file = io.BytesIO()
        Image.fromarray(crop).save(file, "JPEG", quality=90)
        members.append((f"{number:03}.jpg", file.getvalue()))
    members[0] = (NO_PHOTO, b"no photo")
    for number in range(ARCHIVES):
        write_tar(folder / f"photos-{number}.tar", members[number::ARCHIVES])
    return f"{folder}/photos-{{0..{ARCHIVES - 1}}}.tar"


@pytest.fixture(scope="module")
def of_one_machine(tars: str, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    output = tmp_path_factory.mktemp("local") / "o"
    assert run(tars, output, *FLAGS).returncode == 0
    return rows_of(output)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with cluster() as (address, _):
        yield address


@contextmanager
def cluster() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Start a cluster with a head node of one processor; other nodes may join."""
    os.environ["RAY_AUTH_MODE"] = "disabled"  # only this machine can reach it
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    folder = tempfile.mkdtemp(prefix="ray")  # short, since sockets are in it
    flags = (f"--port={port}", f"--temp-dir={folder}", "--include-dashboard=false")
    with node("--head", *flags) as head:
        yield f"127.0.0.1:{port}", head
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def node(*flags: str) -> Iterator[subprocess.Popen[str]]:
    """Start a node of one processor, and wait until it has joined its cluster."""
    command = [RAY, "start", "--block", "--num-cpus=1", "--node-ip-address=127.0.0.1"]
    with subprocess.Popen(
        [*command, "--disable-usage-stats", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            assert process.stdout
            assert any("Ray runtime started" in line for line in process.stdout)
            yield process
        finally:
            kill_node(process)


def rows_of(output: Path) -> pa.Table:
    parts = [str(path) for path in sorted(output.glob("part-*.parquet"))]
    return ds.dataset(parts).to_table().drop_columns(list(OF_THE_RUN)).sort_by("image_id")


def captioning_processes() -> list[int]:
    """Return the process ids of all workers on this machine."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"RayWorker" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def kill_node(process: subprocess.Popen[str]) -> None:
    """Kill a node's processes at once; its workers end when they notice."""
    for pid in children_of(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.kill()


@pytest.mark.slow
def test_two_nodes_equal_one_machine_even_if_a_worker_and_a_node_are_killed(
    tars: str, of_one_machine: pa.Table, address: str, tmp_path: Path
) -> None:
    output = tmp_path / "o"
    with (
        node(f"--address={address}") as lost,
        running(tars, output, *FLAGS, "--engine", "ray", "--address", address) as process,
    ):
        assert wait_until(lambda: committed(output))
        workers = captioning_processes()
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGKILL)
        before = len(committed(output))
        assert wait_until(lambda: len(committed(output)) > before)
        kill_node(lost)
        printed, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    assert f"{PHOTOS} found, {PHOTOS - 1} captioned, 1 failed (1 unsupported_format)" in printed
    assert difference(rows_of(output), of_one_machine) <= ROUNDING


@pytest.mark.slow
def test_same_command_resumes_an_ended_run(
    tars: str, of_one_machine: pa.Table, address: str, tmp_path: Path
) -> None:
    output = tmp_path / "o"
    folder, _, name = tars.rpartition("/")
    Path(folder, "pyarrow.py").write_text("raise ImportError")  # workers must not import it
    command = (name, output, *FLAGS, "--engine", "ray", "--address", address)
    before: frozenset[tuple[str, str]] = frozenset()
    for number, code in ((signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)):
        with running(*command, cwd=folder) as process:
            assert wait_until(lambda: committed(output) > before)  # noqa: B023
            process.send_signal(number)
            _, errors = process.communicate(timeout=400)
        assert process.returncode == code, errors
        assert before < committed(output)
        before = committed(output)
    assert len(before) < PHOTOS
    done = run(*command, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert before <= committed(output)
    assert difference(rows_of(output), of_one_machine) <= ROUNDING


# Runs batchcap while a thread uses Ray all the time, as Ray Data's threads do now and then.
WITH_BUSY_THREAD = """
import threading, time

def use_ray():
    import ray

    while not ray.is_initialized():
        time.sleep(0.01)
    time.sleep(0.5)
    worker = ray._private.worker.global_worker.core_worker
    while True:
        worker.get_current_node_id()

threading.Thread(target=use_ray, daemon=True).start()
from batchcap.cli import main
main()
"""


@pytest.mark.slow
def test_error_of_a_worker_reads_like_a_local_one(tars: str, address: str, tmp_path: Path) -> None:
    model = shutil.copytree(DEFAULT_MODEL, tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    flags = ("--engine", "ray", "--address", address, "--model", model)
    done = subprocess.run(
        [sys.executable, "-c", WITH_BUSY_THREAD, "run", tars, tmp_path / "o", *flags],
        stderr=subprocess.PIPE,
        text=True,
        timeout=400,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"batchcap: {weights} is damaged")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_stop_while_ray_starts_ends_the_run_at_once(tars: str, tmp_path: Path) -> None:
    with running(tars, tmp_path / "o", "--engine", "ray") as process:
        assert process.stderr
        assert "on Ray" in process.stderr.readline()
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert errors == "batchcap: stopped by SIGTERM\n"


@pytest.mark.slow
def test_an_id_in_two_archives_has_the_row_of_the_first_at_every_run(
    photo_crops: npt.NDArray[np.uint8], address: str, tmp_path: Path
) -> None:
    for number in range(2):
        photos: list[Any] = []
        for crop in photo_crops[40 * number :][:40]:
            file = io.BytesIO()
            Image.fromarray(crop).save(file, "PNG")
            photos.append((f"{len(photos):02}.png", file.getvalue()))
        write_tar(tmp_path / f"{number}.tar", photos[:: 1 - 2 * number])
    archives, output = f"{tmp_path}/{{0..1}}.tar", tmp_path / "o"
    local = run(archives, tmp_path / "local", *FLAGS)
    parts: list[list[str]] = []
    for _ in range(2):
        done = run(archives, output, *FLAGS, "--engine", "ray", "--address", address)
        assert (done.returncode, local.returncode) == (1, 1), done.stderr
        assert "has the id of an earlier photo" in done.stderr
        assert done.stderr.splitlines()[-1] == local.stderr.splitlines()[-1].replace("local", "o")
        assert difference(rows_of(output), rows_of(tmp_path / "local")) <= ROUNDING
        parts.append(sorted(f"{path.name} {path.stat().st_mtime_ns}" for path in output.iterdir()))
    assert parts[0] == parts[1]


@pytest.mark.slow
def test_a_cluster_that_waits_for_machines_is_not_stalled(
    tars: str, address: str, tmp_path: Path
) -> None:
    flags = ("--engine", "ray", "--address", address, "--workers", 1, "--gpus-per-worker", 1)
    with running(tars, tmp_path / "o", *flags, "--stall-timeout", 20) as process:
        assert process.stderr
        warnings = (line for line in process.stderr if "waiting for machines" in line)
        assert [next(warnings, "") != "" for _ in range(2)] == [True, True]
        process.send_signal(signal.SIGTERM)
        assert process.wait(400) == 143


@pytest.mark.slow
def test_a_cluster_that_dies_ends_the_run(tars: str, tmp_path: Path) -> None:
    output = tmp_path / "o"
    with (
        cluster() as (address, head),
        running(
            tars, output, *FLAGS, "--engine", "ray", "--address", address, "--stall-timeout", 30
        ) as process,
    ):
        assert wait_until(lambda: committed(output))
        kill_node(head)
        _, errors = process.communicate(timeout=400)
    assert process.returncode == 1
    assert "committed rows are safe" in errors.splitlines()[-1]
    assert committed(output)


def test_missing_cluster_is_reported(tars: str, tmp_path: Path) -> None:
    done = run(tars, tmp_path / "o", "--engine", "ray", "--address", "127.0.0.1:9")
    assert done.returncode == 2
    assert "cannot reach a Ray cluster at 127.0.0.1:9" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"workers": 2}, "need --engine ray"),
        ({"engine": Engine.RAY, "limit": 5}, "omit --limit"),
        ({"engine": Engine.RAY, "source": "-"}, "cannot read INPUT from standard input"),
    ],
)
def test_conflicting_settings_are_refused(asked: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RunSettings(**{"source": "photos", "output": Path("o"), **asked})


CPU_NODE = {"CPU": 16.0}
GPU_NODE = {"CPU": 64.0, "GPU": 8.0}
HEAD = {"memory": 1e9}


@pytest.mark.parametrize(
    ("nodes", "workers", "gpus", "wanted"),
    [
        ([CPU_NODE], None, None, Workers(1, 16, 0)),
        ([CPU_NODE, CPU_NODE, HEAD], None, None, Workers(2, 16, 0)),
        ([CPU_NODE, CPU_NODE], 8, None, Workers(8, 4, 0)),
        ([CPU_NODE], 40, None, Workers(40, 1, 0)),
        ([GPU_NODE, GPU_NODE, CPU_NODE], None, None, Workers(16, 8, 1)),
        ([GPU_NODE], None, 0.5, Workers(16, 4, 0.5)),
        ([GPU_NODE], 3, None, Workers(3, 8, 1)),
        ([HEAD], 4, 1, Workers(4, 1, 1)),
    ],
)
def test_workers_are_spread_over_machines(
    nodes: list[Any], workers: int, gpus: float, wanted: Workers
) -> None:
    assert workers_on(nodes, workers, gpus) == wanted


def test_pieces_are_archives_or_distinct_photos_with_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = [f"{number}.jpg" for number in range(300)]
    (tmp_path / "list.txt").write_text("\n".join([*names, "0.jpg", "s3://b/x.jpg"]))
    pieces = pieces_of(RunSettings(source="list.txt", output=Path("o")), print)
    paths = [ref.path for piece in pieces for ref in piece]
    assert paths == [*(f"{tmp_path}/{name}" for name in names), "s3://b/x.jpg"]
    tars = [write_tar(tmp_path / f"{number}.tar", []) for number in range(3)]
    pieces = pieces_of(RunSettings(source="*.tar", output=Path("o")), print)
    assert list(pieces) == [Archive(str(tar), tar.name) for tar in tars]


def test_each_listed_file_is_progress_even_if_it_is_not_a_photo(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.txt").touch()
    files: list[int] = []
    settings = RunSettings(source=str(tmp_path), output=Path("o"))
    assert [*pieces_of(settings, print, progress=lambda: files.append(1))] == []
    assert len(files) >= 5


def test_a_cluster_without_room_for_a_worker_is_refused() -> None:
    with pytest.raises(UsageError, match="lower --gpus-per-worker, or set --workers"):
        workers_on([CPU_NODE], None, 2)
