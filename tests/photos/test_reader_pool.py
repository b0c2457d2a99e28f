"""The reader pool, with real processes that really die."""

import errno
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from helpers.stores import answer, web_server

from batchcap.photos.reader_pool import Readers, readers
from batchcap.schema import ErrorType, ImageRef, LoadedImage, Rejection
from batchcap.storage.remote import describe

SLOW_S = 1.0
PIXELS = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)


def load(photo: ImageRef) -> LoadedImage:
    """Kill, hang or delay this process, as the file's name says."""
    path = Path(photo.path)
    name = path.name
    if name.startswith("once"):
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            return LoadedImage(PIXELS, sha256=name)
    if name.startswith(("kill", "once-kill")):
        os.kill(os.getpid(), signal.SIGKILL)
    if name.startswith("exit"):
        os._exit(7)
    if name.startswith("raise"):
        raise ZeroDivisionError
    if name.startswith(("hang", "once-hang")):
        time.sleep(600)
    if name.startswith("slow"):
        time.sleep(SLOW_S)
    if name.startswith("pid"):
        return LoadedImage(PIXELS, file_size=os.getpid())
    return LoadedImage(PIXELS, sha256=name)


def refs(*paths: str) -> list[ImageRef]:
    return [ImageRef("", path) for path in paths]


def one(read: Readers, path: str) -> LoadedImage:
    (image,) = read(refs(path))
    return image


def noise(name: str) -> npt.NDArray[np.uint8]:
    """Random pixels, whose number depends on the name too."""
    rng = np.random.default_rng(list(name.encode()))
    return rng.integers(0, 256, (*rng.integers(1, 200, 2), 3), np.uint8)


def load_noise(photo: ImageRef) -> LoadedImage:
    if photo.path.startswith("bad"):
        return LoadedImage(Rejection(ErrorType.CORRUPT, photo.path))
    return LoadedImage(noise(photo.path))


class LoadAfterLimit:
    """Loads after limiting the size of files in its own process."""

    def __init__(self, largest: int) -> None:
        self.largest = largest

    def __call__(self, photo: ImageRef) -> LoadedImage:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.largest, self.largest))
        return load_noise(photo)


class LoadThatIsSlowToStart:
    def __reduce__(self) -> tuple[Any, ...]:
        return load_slowly_made, ()


def load_slowly_made() -> object:
    time.sleep(1.5)
    return load


def names_of_rejected(images: dict[str, LoadedImage]) -> set[str]:
    return {name for name, image in images.items() if isinstance(image.pixels, Rejection)}


def is_alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def wait_until_gone(pids: list[int], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while any(map(is_alive, pids)):
        assert time.monotonic() < end, "processes stay"
        time.sleep(0.02)


def test_a_photo_is_returned_as_loaded():
    with readers(load, 1, 60) as read:
        image = one(read, "a.jpg")
        assert one(read, "b\udcff.jpg").sha256 == "b\udcff.jpg"
    np.testing.assert_array_equal(image.pixels, PIXELS)
    assert image.sha256 == "a.jpg"


def test_each_photo_gets_its_own_pixels_whatever_was_read_before():
    names = [f"{kind}{number}" for number in range(40) for kind in ("a", "bad", "b", "c")]
    groups = [names[start : start + 7] for start in range(0, len(names), 7)]
    with readers(load_noise, 2, 60) as read, ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda group: read(refs(*group)), groups))
    for name, image in zip(names, chain.from_iterable(answers), strict=True):
        if name.startswith("bad"):
            assert image.pixels == Rejection(ErrorType.CORRUPT, name)
        else:
            np.testing.assert_array_equal(image.pixels, noise(name))


@pytest.mark.parametrize("largest", [0, 1_000, 100_000])
def test_photos_are_read_where_files_may_not_grow(largest):
    """`ulimit -f` limits files in memory too."""
    names = [f"photo{number}" for number in range(8)]
    with readers(LoadAfterLimit(largest), 1, 60) as read:
        images = read(refs(*names))
    for name, image in zip(names, images, strict=True):
        np.testing.assert_array_equal(image.pixels, noise(name))


def test_photos_are_read_where_files_in_memory_are_denied(monkeypatch):
    def denied(name: str) -> int:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(os, "memfd_create", denied, raising=False)
    with readers(load_noise, 1, 60) as read:
        np.testing.assert_array_equal(one(read, "a").pixels, noise("a"))


def test_python_files_beside_the_photos_are_not_executed(tmp_path, monkeypatch):
    """By default, Python looks for modules in the working directory first."""
    monkeypatch.chdir(tmp_path)
    for module in ("array", "pickle", "struct", "types"):
        (tmp_path / f"{module}.py").write_text("open('executed', 'w'); raise ImportError")
    with readers(load, 1, 60) as read:
        assert one(read, "a.jpg").sha256 == "a.jpg"
    assert not (tmp_path / "executed").exists()


def test_only_files_that_kill_readers_are_rejected(caplog):
    names = [f"{kind}{n}" for n in range(3) for kind in ("good", "fine", "kill", "well")]
    names += ["exit", "raise"]
    groups = [refs(*names[start : start + 5]) for start in range(0, len(names), 5)]
    with readers(load, 2, 60) as read, ThreadPoolExecutor(4) as pool:
        loaded = [image for images in pool.map(read, groups) for image in images]
    images = dict(zip(names, loaded, strict=True))
    assert names_of_rejected(images) == {"kill0", "kill1", "kill2", "exit", "raise"}
    assert images["kill0"].pixels == Rejection(
        ErrorType.QUARANTINED,
        "Two reader processes failed on this file (the second was killed by SIGKILL); "
        "check or remove it.",
    )
    assert "(the second ended with exit code 7);" in images["exit"].pixels.message
    assert "(the second ended with exit code 1);" in images["raise"].pixels.message
    assert [image.sha256 for name, image in images.items() if name[0] in "gfw"] == [
        name for name in names if name[0] in "gfw"
    ]
    assert "was killed by SIGKILL on 'kill0' alone; starting another" in " ".join(caplog.messages)


@pytest.mark.parametrize(("name", "timeout_s"), [("once-kill", 60), ("once-hang", 1)])
def test_a_file_is_retried(tmp_path, name, timeout_s):
    with readers(load, 1, timeout_s) as read:
        assert one(read, str(tmp_path / name)).sha256 == name


def test_start_up_time_does_not_count_towards_the_timeout():
    """Otherwise, a busy machine with a short --stall-timeout would reject good photos."""
    with readers(LoadThatIsSlowToStart(), 1, 1) as read:
        assert one(read, "good").sha256 == "good"


def test_a_reader_that_takes_no_data_is_replaced():
    """Without a timeout for sending, the run would stall."""
    with readers(load, 1, 1) as read:
        os.kill(one(read, "pid").file_size, signal.SIGSTOP)
        (image,) = read([ImageRef("", "good", data=bytes(1 << 24))])
    assert image.sha256 == "good"


def test_each_answer_and_each_death_counts_as_progress():
    """Slow photos, or several rejected in a row, must not look like a stall.

    The request of five photos times out; then each is read alone.
    """
    calls: list[int] = []
    read = Readers(load, 1, 3 * SLOW_S, lambda: calls.append(1))
    try:
        images = read(refs(*(f"slow{number}" for number in range(5))))
        assert not any(isinstance(image.pixels, Rejection) for image in images)
        assert len(calls) == 1 + 5
        calls.clear()
        assert isinstance(one(read, "kill").pixels, Rejection)
        assert len(calls) == 2
    finally:
        read.stop()


def test_a_file_that_hangs_readers_is_rejected_in_time():
    started = time.monotonic()
    with readers(load, 1, 1) as read:
        image = one(read, "hang")
        assert one(read, "good").sha256 == "good"
    assert time.monotonic() - started < 20
    assert isinstance(image.pixels, Rejection)
    assert image.pixels.error_type is ErrorType.QUARANTINED
    assert "did not answer within 1 s" in image.pixels.message


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_to_a_reader_do_nothing(number, caplog):
    """Terminals and service managers signal all processes, but the run decides when to end.

    A reader that is just starting ignores signals, too.
    """
    with readers(load, 1, 60) as read:
        (reader,) = multiprocessing.active_children()
        for _ in range(20):
            os.kill(reader.pid, number)
            time.sleep(0.01)
        assert one(read, "pid").file_size == reader.pid
        os.kill(reader.pid, number)
        assert one(read, "pid").file_size == reader.pid
    assert not caplog.messages


def test_signals_still_reach_this_process():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with readers(load, 2, 60):
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_no_process_is_left():
    with readers(load, 3, 60) as read:
        pids = [child.pid for child in multiprocessing.active_children()]
        assert len(pids) == 3
        one(read, "a.jpg")
    wait_until_gone(pids)


def test_readers_end_whatever_they_are_doing():
    """A hanging reader ignores the signal that Python sends to its children at exit, and Python
    would wait for it for ever. Threads that still wait for a reader must end, too.
    """
    results = []

    def read_on(name: str) -> None:
        try:
            results.append(one(read, name))
        except RuntimeError as error:
            results.append(error)

    with readers(load, 1, 600) as read:
        one(read, "good")
        pids = [child.pid for child in multiprocessing.active_children()]
        threads = [threading.Thread(target=read_on, args=("hang",), daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        started = time.monotonic()
    for thread in threads:
        thread.join(timeout=10)
    assert time.monotonic() - started < 10
    assert [str(result) for result in results] == ["the reader pool has been stopped"] * 3
    wait_until_gone(pids)
    assert multiprocessing.active_children() == []


SUSPENDED = """
import test_reader_pool
from batchcap.photos.reader_pool import readers
if __name__ == "__main__":
    with readers(test_reader_pool.load, 1, 10 * test_reader_pool.SLOW_S) as read:
        test_reader_pool.one(read, "good")
        print("ready", flush=True)
        print(test_reader_pool.one(read, "slow").sha256)
"""


def test_readers_of_a_suspended_run_are_not_replaced(tmp_path):
    """The suspension does not count towards the photo's timeout."""
    script = tmp_path / "script.py"
    script.write_text(SUSPENDED)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    with subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        start_new_session=True,
    ) as run:
        assert run.stdout.readline() == "ready\n"
        os.killpg(run.pid, signal.SIGSTOP)
        time.sleep(12 * SLOW_S)
        os.killpg(run.pid, signal.SIGCONT)
        output, errors = run.communicate(timeout=60)
    assert (run.returncode, output, errors) == (0, "slow\n", "")


RUN = """
import sys, threading, multiprocessing
import test_reader_pool
from batchcap.photos.reader_pool import Readers, readers
if __name__ == "__main__":
    with readers(test_reader_pool.load, 2, 600) as read:
        print(*{test_reader_pool.one(read, "pid").file_size for _ in range(2)}, flush=True)
        for name in sys.argv[1:]:
            threading.Thread(target=test_reader_pool.one, args=(read, name), daemon=True).start()
        threading.Event().wait(0.3)
        print("reading", flush=True)
        sys.stdin.read()
"""


@pytest.mark.parametrize("names", [[], ["hang", "hang"]], ids=["idle", "busy"])
def test_readers_end_when_their_run_is_killed(tmp_path, names):
    """Even readers that hang on a file."""
    script = tmp_path / "script.py"
    script.write_text(RUN)
    pipe, path = subprocess.PIPE, os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, script, *names]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as run:
        pids = [int(pid) for pid in run.stdout.readline().split()]
        assert len(pids) == 2
        assert run.stdout.readline() == "reading\n"
        assert all(map(is_alive, pids))
        run.kill()
    wait_until_gone(pids)


def test_readers_are_killed_first_if_memory_runs_out():
    with readers(load, 1, 60) as read:
        pid = one(read, "pid").file_size
        assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "1000\n"


def test_a_load_function_may_be_a_partial():
    with readers(partial(load), 1, 60) as read:
        assert one(read, "a.jpg").sha256 == "a.jpg"


def test_a_quarantined_file_keeps_its_size_and_time(tmp_path):
    path = tmp_path / "kill"
    path.write_bytes(b"12345")
    with readers(load, 1, 60) as read:
        image = one(read, str(path))
    assert (image.file_size, image.mtime_ns) == (5, path.stat().st_mtime_ns)


def test_a_quarantined_url_keeps_its_size_and_time():
    """Otherwise, it would kill two readers in every run."""
    headers = "Content-Length: 5", "Last-Modified: Fri, 17 May 2024 12:30:00 GMT"
    with web_server({"/kill.jpg": answer(b"12345", *headers)}) as server:
        with readers(load, 1, 60) as read:
            image = one(read, f"{server}/kill.jpg")
        file = describe(f"{server}/kill.jpg")
    assert image.pixels.error_type is ErrorType.QUARANTINED
    assert (image.file_size, image.mtime_ns) == (file.size, file.mtime_ns)
    assert image.file_size == 5


def test_a_server_that_hangs_readers_does_not_hang_the_run():
    with socket.create_server(("127.0.0.1", 0)) as silent, readers(load, 1, 1) as read:
        image = one(read, f"http://127.0.0.1:{silent.getsockname()[1]}/kill.jpg")
    assert image.pixels.error_type is ErrorType.QUARANTINED
    assert (image.file_size, image.mtime_ns) == (None, None)
