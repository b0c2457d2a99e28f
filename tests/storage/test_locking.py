"""The lock, between real processes."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from batchcap.errors import LockedError, OutputError
from batchcap.storage.locking import locked

HOLDER = """
import sys, subprocess
from pathlib import Path
from batchcap.storage.locking import locked
with locked(Path(sys.argv[1])):
    child = subprocess.Popen(["sleep", "60"], close_fds=False) if "child" in sys.argv else None
    print(child.pid if child else "held", flush=True)
    sys.stdin.read()
"""
RACER = """
import sys, time
from pathlib import Path
from batchcap.errors import LockedError
from batchcap.storage.locking import locked
lock, held, end = Path(sys.argv[1]), Path(sys.argv[2]), time.monotonic() + 1.0
times = 0
while time.monotonic() < end:
    try:
        with locked(lock):
            held.touch(exist_ok=False)  # FileExistsError: two hold it at once
            time.sleep(0.001)
            held.unlink()
            times += 1
    except LockedError:
        time.sleep(0.002)
print(times)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / ".out.lock"


def started(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)


def test_a_second_process_is_refused_until_the_first_has_ended(path):
    with started(HOLDER, path) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LockedError, match=str(path)) as refusal, locked(path):
            pass
        assert refusal.value.exit_code == 5
        holder.communicate()
    assert not path.exists()
    with locked(path):
        assert path.exists()
    assert not path.exists()


def test_a_holder_that_was_killed_leaves_no_lock(path):
    with started(HOLDER, path) as holder:
        holder.stdout.readline()
        holder.kill()
    assert path.exists()
    with locked(path):
        pass
    assert not path.exists()


def test_programs_that_a_holder_has_started_do_not_hold_the_lock(path):
    with started(HOLDER, path, "child") as holder:
        child = int(holder.stdout.readline())
        holder.kill()
        holder.wait()
        try:
            os.kill(child, 0)  # is still alive
            with locked(path):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_failure_frees_the_lock(path):
    with pytest.raises(ZeroDivisionError), locked(path):
        raise ZeroDivisionError
    with locked(path):
        pass


def test_only_one_of_many_processes_holds_the_lock_at_a_time(path, tmp_path):
    racers = [started(RACER, path, tmp_path / "held") for _ in range(4)]
    counts = [int(racer.communicate()[0]) for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * len(racers)
    assert sum(counts) > 20


def test_only_one_of_many_threads_holds_the_lock_at_a_time(path, tmp_path):
    held = tmp_path / "held"

    def race(_number: int) -> int:
        times = 0
        for _ in range(50):
            with suppress(LockedError), locked(path):
                held.touch(exist_ok=False)
                held.unlink()
                times += 1
        return times

    with ThreadPoolExecutor(20) as pool:
        assert sum(pool.map(race, range(20))) >= 20
    assert not path.exists()


def test_the_lock_file_of_another_run_is_kept(path):
    """If someone removes a run's lock file, a second run locks a new one. The first run must not
    remove that, or a third could start beside the second.
    """
    with locked(path):
        path.unlink()
        second = started(HOLDER, path)
        assert second.stdout.readline() == "held\n"
    with pytest.raises(LockedError), locked(path):
        pass
    second.communicate()


def test_a_lock_file_that_cannot_be_removed_is_unlocked(path, monkeypatch):
    """Nor does the error replace that of the run."""

    def refuse(_path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch, locked(path):
        patch.setattr(Path, "unlink", refuse)
    with locked(path):
        pass


def test_a_lock_file_that_cannot_be_written_is_reported(tmp_path):
    with pytest.raises(OutputError, match="No such file or directory"), locked(tmp_path / "a/lock"):
        pass


def test_a_file_system_without_locks_is_reported(path, monkeypatch):
    def refuse(*_arguments: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(OutputError, match="file system with locks"), locked(path):
        pass
