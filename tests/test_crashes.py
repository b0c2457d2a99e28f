"""Runs that are killed, stopped, stalled, starved or concurrent: real processes, real signals."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.commands import batchcap_here
from helpers.crashes import (
    BATCHCAP,
    LONG_S,
    ROUNDING,
    Chain,
    check_readable,
    children_of,
    committed,
    difference,
    leftovers,
    rows_of,
    run,
    running,
    wait_until,
)
from helpers.rows import METADATA
from PIL import Image

from batchcap.caption_files.predictions import read_rows
from batchcap.rows.layout import Layout
from batchcap.rows.writer import open_captions
from batchcap.settings import OnExisting

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/task").is_dir(), reason="looks for processes in /proc"
)

PHOTOS = 200
FLAGS = ("--rows-per-part", 32, "--batch-size", 16)
STOP_S = 10.0  # what service managers allow
AT_ONCE_S = 5.0  # less than the time allowed for batches in flight
AS_NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")


class Watched(NamedTuple):
    """An undisturbed run, as seen by others."""

    output: Path
    done: subprocess.CompletedProcess[str]
    summary: dict[str, Any]
    metrics: Path
    seen: list[int]  # numbers of rows that a reader found over time


@pytest.fixture(scope="module")
def photos(photo_crops: npt.NDArray[np.uint8], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of distinct JPEGs."""
    folder = tmp_path_factory.mktemp("crashes") / "photos"
    folder.mkdir()
    rng = np.random.default_rng(1)
    for number in range(PHOTOS):
        crop = np.roll(photo_crops[number % len(photo_crops)], rng.integers(224), axis=1)
        Image.fromarray(crop).save(folder / f"{number:03}.jpg", quality=90)
    return folder


@pytest.fixture(scope="module")
def whole(photos: Path) -> Watched:
    output, metrics = photos.parent / "whole", photos.parent / "whole.prom"
    seen: list[int] = []
    with running(
        photos, output, *FLAGS, "--log-format", "json", "--metrics-file", metrics
    ) as process:
        while process.poll() is None:
            if output.is_dir():
                seen.append(check_readable(output))
            time.sleep(0.01)
        printed, errors = process.communicate()
    assert process.returncode == 0, errors
    done = subprocess.CompletedProcess(process.args, process.returncode, printed, errors)
    return Watched(output, done, summary_of(output), metrics, seen)


def summary_of(output: Path) -> dict[str, Any]:
    return json.loads(Layout(output).summary.read_text(encoding="utf-8"))


def few(photos: Path, folder: Path, count: int) -> Path:
    """Return a folder with copies of the first photos, to be changed."""
    folder.mkdir()
    for path in sorted(photos.iterdir())[:count]:
        shutil.copy2(path, folder)
    return folder


# Kills


@pytest.mark.slow
@pytest.mark.parametrize("name", ["o.parquet", "o"])
def test_repeatedly_killed_run_equals_an_undisturbed_one(
    name: str, photos: Path, whole: Watched, tmp_path: Path
) -> None:
    """Between kills everything is readable, and no committed row is lost or redone."""
    rng = random.Random(f"1 {name}")
    phases = ["starting", "captioning", "committing"]
    phases += ["joining"] if name.endswith(".parquet") else ["captioning", "committing"]
    chain = Chain((photos, tmp_path / name, *FLAGS), rng)
    chain.go(phases, signal.SIGKILL)
    assert chain.kills == phases
    rows, expected = rows_of(chain.output), rows_of(whole.output)
    assert rows["image_id"].to_pylist() == [f"{number:03}.jpg" for number in range(PHOTOS)]
    assert difference(rows, expected) <= ROUNDING
    assert chain.largest_part < 32 + 2 * 16  # a kill costs less than a part


@pytest.mark.slow
def test_kills_while_rows_are_replaced_leave_each_photo_a_row(
    photos: Path, whole: Watched, tmp_path: Path
) -> None:
    """Old rows were dropped before new ones were written."""
    folder = shutil.copytree(photos, tmp_path / "photos")
    output = shutil.copytree(whole.output, tmp_path / "o")
    for photo in folder.iterdir():
        os.utime(photo, (1e9, 1e9))
    layout = Layout(output)
    all_ids = {photo.name for photo in photos.iterdir()}

    def rewritten() -> set[int]:
        return {path.stat().st_ino for path in layout.row_files()[:7]}

    for _ in range(3):
        before = rewritten()
        with running(folder, output, "--rows-per-part", 96, "--batch-size", 16) as process:
            assert wait_until(lambda: rewritten() != before)  # noqa: B023
            process.kill()
            process.wait()
        ids = [
            i for path in layout.row_files() for i in pq.read_table(path)["image_id"].to_pylist()
        ]
        assert set(ids) == all_ids
        current = pa.concat_tables(read_rows(output))["image_id"].to_pylist()
        assert sorted(current) == sorted(all_ids)
    assert run(folder, output).returncode == 0
    assert rows_of(output)["image_id"].to_pylist() == sorted(all_ids)
    assert set(rows_of(output)["mtime_ns"].to_pylist()) == {10**18}


def test_a_reader_sees_whole_parts_and_no_image_twice_at_any_moment(whole: Watched) -> None:
    assert whole.seen == sorted(whole.seen)
    assert len(set(whole.seen)) > 3
    assert check_readable(whole.output) == PHOTOS


@pytest.mark.slow
def test_a_reader_process_that_is_killed_costs_no_photo(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "o"
    with running(
        photos, output, "--limit", 96, "--batch-size", 16, "--rows-per-part", 16
    ) as process:
        wait_until(lambda: process.poll() is not None or [*output.glob("part-*")])
        readers = _readers_of(process.pid)
        assert readers
        for pid in readers:
            os.kill(pid, signal.SIGKILL)
        _, errors = process.communicate(timeout=LONG_S)
    assert process.returncode == 0, errors
    assert rows_of(output)["status"].to_pylist() == ["ok"] * 96


POISON = """
import os, signal, sys
def die(event, arguments):
    if event == "open" and str(arguments[0]).endswith("poison.jpg"):
        with open(os.environ["DEATHS"], "a") as file:
            print(arguments[0], file=file)
        os.kill(os.getpid(), signal.SIGKILL)
if "spawn_main" in " ".join(sys.orig_argv):
    sys.addaudithook(die)
"""


@pytest.mark.slow
def test_three_photos_of_a_thousand_that_kill_readers_cost_three_rows(
    photos: Path, tmp_path: Path
) -> None:
    folder, output, deaths = tmp_path / "photos", tmp_path / "o", tmp_path / "deaths"
    names = [f"{number:03}.jpg" for number in range(1000)]
    for number in (7, 500, 999):
        names[number] = f"{number:03}-poison.jpg"
    folder.mkdir()
    for number, name in enumerate(names):
        os.link(photos / f"{number % PHOTOS:03}.jpg", folder / name)
    (tmp_path / "sitecustomize.py").write_text(POISON)
    environment = finding_first(tmp_path) | {"DEATHS": str(deaths)}
    done = run(folder, output, "--max-failures", 2, env=environment, timeout_s=2 * LONG_S)
    assert done.returncode == 3, done.stderr
    rows = rows_of(output).to_pylist()
    reasons = {row["image_id"]: row["error_type"] or row["status"] for row in rows}
    poisoned = {name for name in names if "poison" in name}
    assert reasons == dict.fromkeys(names, "ok") | dict.fromkeys(poisoned, "quarantined")
    assert Counter(deaths.read_text().splitlines()) == {f"{folder}/{p}": 2 for p in poisoned}


def test_readers_that_cannot_start_fail_the_run_and_not_the_photos(
    photos: Path, tmp_path: Path
) -> None:
    """If Python could not start again, every photo was quarantined, with exit code 0.

    Causes were a Python of another user, and a limit on processes.
    """
    stub = "import os, sys\nif 'spawn_main' in ' '.join(sys.orig_argv):\n    os._exit(9)\n"
    (tmp_path / "sitecustomize.py").write_text(stub)
    done = run(photos, tmp_path / "o", env=finding_first(tmp_path))
    assert done.returncode == 1
    assert "cannot start a reader process: each ended with exit code 9" in done.stderr
    assert committed(tmp_path / "o") == frozenset()


def finding_first(folder: Path) -> dict[str, str]:
    """Return an environment in which Python imports from a folder first."""
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _readers_of(pid: int) -> list[int]:
    return [child for child in children_of(pid) if "spawn_main" in _command(child)]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


# Signals


def _stopped(
    photos: Path,
    output: Path,
    number: signal.Signals,
    send: Callable[[int, int], None] = os.kill,
    times: int = 1,
    has_begun: Callable[[int, Path], object] = lambda _pid, output: [*output.glob("part-*")],
) -> tuple[int, str, float]:
    """Signal a run; return its exit code, its stderr and the seconds until its end."""
    with running(photos, output, *FLAGS) as process:
        wait_until(lambda: process.poll() is not None or has_begun(process.pid, output))
        began = time.monotonic()
        for _ in range(times):
            send(process.pid, number)
            time.sleep(0.1)
        _, errors = process.communicate(timeout=LONG_S)
        return process.returncode, errors, time.monotonic() - began


def test_sigterm_ends_a_run_soon_and_commits_finished_rows(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "o"
    code, errors, seconds = _stopped(photos, output, signal.SIGTERM)
    assert (code, errors.splitlines()[-1]) == (143, "batchcap: stopped by SIGTERM")
    assert seconds < STOP_S
    assert leftovers(output) == []
    summary = summary_of(output)
    assert (summary["outcome"], summary["exit_code"]) == ("stopped", 143)
    assert 32 < summary["captioned"] == len(committed(output)) < PHOTOS


SLOW_DISK = """
import os, time
from batchcap.process import signals
signals.GRACE_S = 0.5
sync = os.fsync
os.fsync = lambda descriptor: (time.sleep(0.7), sync(descriptor))
"""


@pytest.mark.slow
def test_a_last_commit_to_a_slow_disk_loses_no_row(photos: Path, tmp_path: Path) -> None:
    """The alarm, which repeats every second, interrupted the commit."""
    (tmp_path / "sitecustomize.py").write_text(SLOW_DISK)
    output = tmp_path / "o"
    with running(photos, output, *FLAGS, env=finding_first(tmp_path)) as process:
        assert wait_until(lambda: process.poll() is not None or [*output.glob("part-*")])
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=LONG_S)
    assert process.returncode == 143
    assert 32 < summary_of(output)["captioned"] == len(committed(output)) < PHOTOS
    assert leftovers(output) == []


def test_control_c_on_a_terminal_reaches_all_processes_and_is_one_line(
    photos: Path, tmp_path: Path
) -> None:
    output = tmp_path / "o"
    code, errors, seconds = _stopped(photos, output, signal.SIGINT, os.killpg)
    assert code == 130
    assert seconds < STOP_S
    assert errors.splitlines()[1:] == ["batchcap: stopped by SIGINT"]
    assert 32 <= summary_of(output)["captioned"] == len(committed(output))


def test_control_c_while_readers_start_is_one_line_too(photos: Path, tmp_path: Path) -> None:
    """A reader takes most of a second until it ignores signals.

    Ctrl-C in that second killed the readers, each with a traceback on the terminal, and the run
    loaded the model before it stopped.
    """
    code, errors, seconds = _stopped(
        photos,
        tmp_path / "o",
        signal.SIGINT,
        os.killpg,
        has_begun=lambda pid, _output: len(_readers_of(pid)) > 1,
    )
    assert (code, errors) == (130, "batchcap: stopped by SIGINT\n")
    assert seconds < STOP_S


@pytest.mark.slow
def test_a_second_signal_ends_a_run_at_once(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "o"
    code, _, seconds = _stopped(photos, output, signal.SIGINT, os.killpg, times=2)
    assert code == 130
    assert seconds < AT_ONCE_S
    assert leftovers(output) == []
    assert len(committed(output)) >= 32


# Two runs, and photos that appear and vanish


@pytest.mark.slow
def test_of_two_runs_started_together_one_works(photos: Path, tmp_path: Path) -> None:
    for output in (tmp_path / "o", tmp_path / "o.parquet"):
        command = (photos, output, "--limit", 8)
        with running(*command) as one, running(*command) as other:
            errors = {process.wait(LONG_S): process.communicate()[1] for process in (one, other)}
        assert sorted(errors) == [0, 5]
        assert "another run" in errors[5]
        assert len(committed(output)) == 8
        assert summary_of(output)["exit_code"] == 0


def test_a_second_run_is_refused_before_the_model_is_loaded(photos: Path, tmp_path: Path) -> None:
    for name in ("tensorflow.py", "openvino.py"):
        (tmp_path / name).write_text("raise SystemExit(9)\n")
    for output in (tmp_path / "o", tmp_path / "o.parquet"):
        with open_captions(Layout(output), METADATA, OnExisting.RESUME):
            before = entries_of(tmp_path)
            done = run(photos, output, env=finding_first(tmp_path))
            assert entries_of(tmp_path) == before
        assert done.returncode == 5
        assert "another run" in done.stderr


COUNTS = ("captioned", "reused", "already_done", "new", "changed", "retried", "vanished", "pruned")


def counts_of(output: Path) -> dict[str, int]:
    """Return the counts above zero."""
    summary = summary_of(output)
    counts = {name: summary[name] for name in COUNTS} | {"failed": sum(summary["failed"].values())}
    return {name: count for name, count in counts.items() if count}


def entries_of(folder: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_mtime_ns for path in (folder, *folder.rglob("*"))}


def go(folder: Path, output: Path, *flags: object, code: int = 0) -> dict[str, int]:
    """Return the counts of a run; check that --dry-run foretells them and writes nothing."""
    before = entries_of(folder.parent)
    dry = batchcap_here("run", folder, output, *flags, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert entries_of(folder.parent) == before
    done = batchcap_here("run", folder, output, *flags)
    assert done.returncode == code, done.stderr
    made = summary_of(output)
    assert (
        f"{made['new']} new, {made['changed']} changed, {made['retried']} failed before and to be "
        f"retried; {made['already_done']} done, {made['failed_before']} of them failed; "
        f"{made['vanished']} vanished"
    ) in dry.stdout
    return counts_of(output)


@pytest.mark.parametrize("name", ["o.parquet", "o"])
def test_only_photos_that_need_it_are_captioned(name: str, photos: Path, tmp_path: Path) -> None:
    """Added, removed, changed, touched, renamed and copied photos between two runs."""
    folder, output = few(photos, tmp_path / "photos", 8), tmp_path / name
    assert go(folder, output) == {"captioned": 8, "new": 8}
    before = {row["image_id"]: row for row in rows_of(output).to_pylist()}
    shutil.copy2(photos / "020.jpg", folder / "added.jpg")
    (folder / "000.jpg").unlink()
    (folder / "001.jpg").write_bytes((photos / "021.jpg").read_bytes())
    (folder / "002.jpg").touch()
    (folder / "003.jpg").rename(folder / "renamed.jpg")
    shutil.copy2(folder / "004.jpg", folder / "copied.jpg")
    counts = {"captioned": 2, "reused": 3, "already_done": 4, "new": 3, "changed": 2, "vanished": 2}
    assert go(folder, output) == counts
    rows = {row["image_id"]: row for row in rows_of(output).to_pylist()}
    assert len(rows) == len(rows_of(output)) == 11
    for image_id, twin in {
        "002.jpg": "002.jpg",
        "renamed.jpg": "003.jpg",
        "copied.jpg": "004.jpg",
    }.items():
        assert rows[image_id]["token_logprobs"] == before[twin]["token_logprobs"]
    assert rows["002.jpg"]["mtime_ns"] == (folder / "002.jpg").stat().st_mtime_ns
    assert rows["001.jpg"]["sha256"] != before["001.jpg"]["sha256"]
    for image_id in ("000.jpg", "003.jpg", "004.jpg", "005.jpg"):
        assert rows[image_id] == before[image_id]
    assert go(folder, output, "--prune") == {"already_done": 9, "vanished": 2, "pruned": 2}
    assert set(rows_of(output)["image_id"].to_pylist()) == {path.name for path in folder.iterdir()}


def test_without_reuse_copies_are_captioned_and_failures_retried_on_request(
    photos: Path, tmp_path: Path
) -> None:
    """A file repaired with the same size and time is captioned with --retry-failed only.

    The summary of a run with a failed photo could not be written, since `asdict` makes a Counter of
    a Counter's items, which JSON refuses. Each such run exited with 1.
    """
    folder, output = few(photos, tmp_path / "photos", 3), tmp_path / "o.parquet"
    good = (folder / "000.jpg").read_bytes()
    for name in ("bad.jpg", "000.jpg"):
        (folder / name).write_bytes(bytes(len(good)))
    assert go(folder, output) == {"captioned": 2, "failed": 2, "new": 4}
    shutil.copy2(folder / "001.jpg", folder / "copied.jpg")
    status = (folder / "bad.jpg").stat()
    (folder / "bad.jpg").write_bytes(good)
    os.utime(folder / "bad.jpg", ns=(status.st_atime_ns, status.st_mtime_ns))
    done = {"captioned": 1, "already_done": 4, "new": 1}
    assert go(folder, output, "--no-reuse") == done
    (folder / "copied.jpg").touch()
    retried = {"captioned": 1, "reused": 1, "failed": 1, "already_done": 2}
    counts = {**retried, "changed": 1, "retried": 2}
    assert go(folder, output, "--retry-failed", "--max-failures", 0, code=3) == counts


def test_file_that_cannot_be_opened_is_retried_only_on_request(
    photos: Path, tmp_path: Path
) -> None:
    """Its row had no size and time, so that every later run took it for changed.

    A file that kills readers thus killed two of them every night, and no run had nothing to do.
    """
    folder, output = few(photos, tmp_path / "photos", 1), tmp_path / "o.parquet"
    os.mkfifo(folder / "pipe.jpg")
    (folder / "dangling.jpg").symlink_to(folder / "later")
    assert go(folder, output) == {"captioned": 1, "failed": 2, "new": 3}
    assert go(folder, output) == {"already_done": 3}
    shutil.copy2(photos / "001.jpg", folder / "later")
    assert go(folder, output) == {"captioned": 1, "changed": 1, "already_done": 2}


# Disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("cannot mount a file system")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)


def fill(disk: Path) -> None:
    with (disk / "ballast").open("ab", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            return


def assert_says_that_the_disk_is_full(code: int, errors: str) -> None:
    assert code == 1, errors
    assert "Traceback" not in errors
    assert "No space left on device; free the disk or choose another OUTPUT" in errors


@pytest.mark.slow
def test_a_disk_that_fills_up_costs_no_committed_row(
    photos: Path, whole: Watched, small_disk: Path, tmp_path: Path
) -> None:
    """The disk is full during commits, then full during the join, then enlarged."""
    folder, output = few(photos, tmp_path / "photos", 96), small_disk / "o.parquet"
    parts, command = Layout(output).parts, (folder, output, *FLAGS)
    with running(*command) as process:
        wait_until(lambda: process.poll() is not None or [*parts.glob("part-*")])
        fill(small_disk)
        _, errors = process.communicate(timeout=LONG_S)
    assert_says_that_the_disk_is_full(process.returncode, errors)
    kept = committed(output)
    assert 0 < len(kept) < 96
    assert leftovers(output) == []
    aside = tmp_path / "aside"
    aside.mkdir()
    for path in [*folder.iterdir()]:
        if path.name not in dict(kept):
            path.rename(aside / path.name)
    fill(small_disk)  # the space that a summary may have freed
    joined = run(*command)
    assert_says_that_the_disk_is_full(joined.returncode, joined.stderr)
    assert committed(output) == kept
    for path in aside.iterdir():
        path.rename(folder / path.name)
    refused = run(*command)
    assert refused.returncode == 1
    assert "its disk has" in refused.stderr
    remount(small_disk, "size=8m")
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert kept <= committed(output)
    rows = rows_of(output)
    assert difference(rows, rows_of(whole.output).slice(0, 96)) <= ROUNDING


def test_a_read_only_disk_is_reported_before_the_model_is_loaded(
    photos: Path, small_disk: Path, tmp_path: Path
) -> None:
    remount(small_disk, "ro")
    for name in ("tensorflow.py", "openvino.py"):
        (tmp_path / name).write_text("raise SystemExit(9)\n")
    for name in ("o", "o.parquet"):
        done = run(photos, small_disk / name, env=finding_first(tmp_path))
        assert done.returncode == 1
        assert f"cannot write {small_disk / name}: " in done.stderr
        assert "Traceback" not in done.stderr


def test_folder_without_permission_is_reported_at_once(photos: Path) -> None:
    if os.geteuid() != 0 or shutil.which(AS_NOBODY[0]) is None:
        pytest.skip("only root can become nobody")
    # Outside of pytest's folder, which other users can't enter.
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        folder = few(photos, Path(name) / "photos", 1)
        if subprocess.run([*AS_NOBODY, sys.executable, "-c", "import batchcap"]).returncode:
            pytest.skip("nobody can't run this Python")
        for output in ("o", "o.parquet"):
            command = [*AS_NOBODY, *BATCHCAP, "run", str(folder), f"{name}/{output}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 1
            assert f"cannot write {name}/{output}: " in done.stderr
            assert "Traceback" not in done.stderr


# Memory


@pytest.mark.slow
def test_memory_and_open_files_do_not_grow_with_the_number_of_rows(tmp_path: Path) -> None:
    """Use 100,000 files that are not photos, which are faster than captions."""
    folder, output = tmp_path / "photos", tmp_path / "o"
    folder.mkdir()
    for number in range(100_000):
        (folder / f"{number:06}.jpg").touch()
    seen: list[tuple[float, int]] = []
    with running(folder, output, "--rows-per-part", 10_000) as process:
        for part in range(1, 11):
            wait_until((output / f"part-{part:06}.parquet").exists, 2 * LONG_S)
            seen.append(taken_by(process.pid))
        _, errors = process.communicate(timeout=LONG_S)
    assert process.returncode == 0, errors
    mebibytes, files = zip(*seen, strict=True)
    assert max(mebibytes) - mebibytes[0] < 50
    assert max(files) - files[0] <= 2  # the part being written


def taken_by(pid: int) -> tuple[float, int]:
    """Return the resident memory of a process in MiB, and the number of its open files."""
    process = Path(f"/proc/{pid}")
    pages = int((process / "statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, sum(1 for _ in (process / "fd").iterdir())


# Exit codes, logs and stalls


def test_a_run_with_nothing_to_do_ends_at_once_without_a_model(
    photos: Path, whole: Watched
) -> None:
    program = [sys.executable, "-X", "importtime", *BATCHCAP[1:]]
    done = subprocess.run(
        [*program, "run", str(photos), str(whole.output)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert "0 captioned, 0 failed, 200 already done" in done.stdout
    assert "batchcap.captioning.run" in done.stderr
    assert "tensorflow" not in done.stderr
    assert "openvino" not in done.stderr


def test_a_run_does_not_import_pandas(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "pandas.py").write_text("raise SystemExit(9)\n")
    done = run(few(photos, tmp_path / "photos", 1), tmp_path / "o", env=finding_first(tmp_path))
    assert done.returncode == 0, done.stderr


def test_an_empty_folder_is_a_failure_unless_allowed(tmp_path: Path) -> None:
    photos, output = tmp_path / "photos", tmp_path / "p"
    photos.mkdir()
    assert batchcap_here("run", photos, tmp_path / "o").returncode == 1
    assert batchcap_here("run", photos, output, "--allow-empty").returncode == 0
    assert check_readable(output) == 0


def test_output_of_other_settings_is_exit_code_4_and_kept(
    photos: Path, whole: Watched, tmp_path: Path
) -> None:
    metrics, before = tmp_path / "m.prom", entries_of(whole.output)
    flags = ("--beam-size", 2, "--metrics-file", metrics)
    done = batchcap_here("run", photos, whole.output, *flags)
    assert done.returncode == 4
    assert "beam_size" in done.stderr
    assert "batchcap_run_exit_code 4.0\n" in metrics.read_text()
    after = entries_of(whole.output)
    assert after.keys() == before.keys()
    assert [name for name in after if after[name] != before[name]] in ([], [str(whole.output)])


def events_of(errors: str) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in errors.splitlines()]
    for event in events:
        assert event.keys() >= {"time", "level", "event", "message"}
    return events


def test_every_line_on_stderr_is_json_and_metrics_are_written(whole: Watched) -> None:
    events = events_of(whole.done.stderr)
    assert events[0]["event"] == "run_started"
    printed = json.loads(whole.done.stdout)
    assert events[0]["run_id"] == printed["run_id"] == whole.summary["run_id"]
    assert printed == whole.summary
    assert 'batchcap_run_images{state="captioned"} 200.0\n' in whole.metrics.read_text()


@pytest.mark.parametrize(("flag", "code"), [("--glob=*.none", 1), ("--rows-per-part=0", 2)])
def test_an_error_is_json_too(flag: str, code: int, photos: Path, tmp_path: Path) -> None:
    """A setting beyond its limits was reported as text, before the log was set up."""
    metrics = tmp_path / "m.prom"
    flags = (flag, "--log-format", "json", "--metrics-file", metrics)
    done = batchcap_here("run", photos, tmp_path / "o", *flags)
    assert done.returncode == code
    (event,) = events_of(done.stderr)
    assert (event["event"], event["level"], event["exit_code"]) == ("run_failed", "error", code)
    if code == 1:
        assert "batchcap_run_exit_code 1.0\n" in metrics.read_text()


@pytest.mark.slow
def test_list_without_further_lines_is_a_stall(photos: Path, tmp_path: Path) -> None:
    """Rows finished by then are committed."""
    names = [str(path) for path in sorted(photos.iterdir())[:60]]
    output = tmp_path / "o"
    with running(
        "-",
        output,
        "--batch-size",
        2,
        "--stall-timeout",
        30,  # TensorFlow starts
        stdin=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        process.stdin.write("\n".join([*names, ""]))
        process.stdin.flush()
        assert process.wait(LONG_S) == 1
        errors = process.stderr.read() if process.stderr else ""
    assert "_read_list" in errors  # where the main thread hangs
    last = errors.splitlines()[-1]
    assert last.startswith("batchcap: no progress for")
    assert "in flight: none" not in last
    summary = summary_of(output)
    assert summary["exit_code"] == 1
    assert 0 < summary["captioned"] == len(committed(output))


def test_a_listing_that_hangs_is_a_stall(tmp_path: Path) -> None:
    flags = ("--glob", "*.none", "--stall-timeout", 2)
    with running("-", tmp_path / "o", *flags, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write("a.jpg\n")
        process.stdin.flush()
        assert process.wait(LONG_S) == 1
        errors = process.stderr.read() if process.stderr else ""
    assert "_read_list" in errors  # where the main thread hangs
    assert errors.splitlines()[-1].startswith("batchcap: no progress for 2 s")


def test_a_list_that_names_no_photo_yet_is_no_stall(tmp_path: Path) -> None:
    with running(
        "-",
        tmp_path / "o",
        "--glob",
        "*.none",
        "--stall-timeout",
        3,
        stdin=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        for number in range(12):
            process.stdin.write(f"{number}.jpg\n")
            process.stdin.flush()
            time.sleep(0.5)
        _, errors = process.communicate(timeout=LONG_S)
    assert process.returncode == 1
    assert "no progress" not in errors
    assert "no photo in -" in errors


@pytest.mark.slow
def test_several_slow_photos_are_given_up_and_end_no_run(photos: Path, tmp_path: Path) -> None:
    """Together they exceeded the timeout, so that every run ended without a row."""
    folder = few(photos, tmp_path / "photos", 8)
    for number in range(4):
        (folder / f"{number:03}.jpg").rename(folder / f"slow{number}.jpg")
    (tmp_path / "sitecustomize.py").write_text(SLOW_PHOTOS)
    output = tmp_path / "o"
    done = run(folder, output, "--stall-timeout", 20, env=finding_first(tmp_path))
    assert done.returncode == 0, done.stderr
    assert summary_of(output)["failed"] == {"quarantined": 4}
    assert summary_of(output)["captioned"] == 4


SLOW_PHOTOS = """
import sys, time
if "spawn_main" in " ".join(sys.orig_argv):
    from batchcap.photos import images
    load = images.load_image
    def load_image(source, settings):
        if "/slow" in str(source):
            time.sleep(100)
        return load(source, settings)
    images.load_image = load_image
"""


def test_stall_while_tensorflow_starts_is_reported(photos: Path, tmp_path: Path) -> None:
    """A hanging GPU hangs the start of TensorFlow, during which stderr is silenced.

    The report of the stall was silenced too: the run exited with 1 and no message.
    """
    module = tmp_path / "tensorflow" / "__init__.py"
    module.parent.mkdir()
    module.write_text("import time\ntime.sleep(99)\n")
    flags = ("--runtime", "tensorflow", "--stall-timeout", 3)
    done = run(photos, tmp_path / "o", *flags, env=finding_first(tmp_path))
    assert done.returncode == 1
    assert f'File "{module}", line 2' in done.stderr
    assert "batchcap: no progress for 3 s; in flight: none" in done.stderr
