"""Runs killed or refused by the kernel at each system call that puts rows on disk."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from helpers.commands import batchcap_here
from helpers.crashes import LONG_S, leftovers
from helpers.no_model import BATCHCAP, Worker

from batchcap.rows.layout import Layout

STRACE = ("strace", "-f", "-qq", "-o", "/dev/null")
RENAME = "?rename,?renameat,?renameat2"
NAMES = f"{RENAME},?link,?linkat"  # other calls change only names that no reader sees
FLAGS = ("--glob", "*", "--rows-per-part", "2", "--prune")
BEFORE = {"same": "s", "changed": "old", "gone": "g"}
AFTER = {"same": "s", "changed": "new bytes", "new": "n"}
LEAST_POLLS = 10_000


def _can_inject() -> bool:
    inject = ("-e", "trace=fsync", "-e", "inject=fsync:error=ENOSPC")
    try:
        return subprocess.run([*STRACE, *inject, "true"], capture_output=True).returncode == 0
    except OSError:
        return False


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not _can_inject(), reason="needs strace, and the right to trace"),
]


class Story:
    """An output with rows of an equal, a changed and a vanished photo; one photo is new."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.photos, self.name = folder, folder / "photos", name
        self.photos.mkdir()
        self._make(BEFORE)
        (folder / "before").mkdir()
        self.output = folder / "before" / name
        self.run_here()
        self._make(AFTER)

    def _make(self, photos: dict[str, str]) -> None:
        for path in self.photos.iterdir():
            if path.name not in photos:
                path.unlink()
        for name, content in photos.items():
            if not (self.photos / name).exists() or (self.photos / name).read_text() != content:
                (self.photos / name).write_text(content)

    def reset(self) -> None:
        """Restore the output from before the photos changed."""
        now, copy = self.folder / "now", self.folder / "copy"
        shutil.copytree(self.folder / "before", copy)
        shutil.rmtree(now, ignore_errors=True)
        copy.rename(now)  # in one step, since others are reading
        self.output = now / self.name

    def run_here(self) -> None:
        """Run undisturbed, in this process."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("batchcap.captioning.local_engine.CaptionWorker", Worker)
            done = batchcap_here("run", self.photos, self.output, *FLAGS)
        assert done.returncode == 0, done.stderr

    def run_under(self, *wrapper: str) -> subprocess.CompletedProcess[str]:
        """Run in a process that another program starts."""
        command = [*wrapper, *BATCHCAP, "run", str(self.photos), str(self.output), *FLAGS]
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=LONG_S,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"},
        )

    def captions(self) -> list[tuple[str, str]]:
        """Return names and captions of all rows; every file must be whole."""
        return sorted(
            (row["image_id"], row["caption"].removeprefix("一只"))
            for path in Layout(self.output).row_files()
            for row in pq.read_table(path, page_checksum_verification=True).to_pylist()
        )


@pytest.fixture(params=["o.parquet", "o"])
def story(request: pytest.FixtureRequest, tmp_path: Path) -> Story:
    return Story(tmp_path, request.param)


def disturbed(story: Story, calls: str, how: str) -> Iterator[subprocess.CompletedProcess[str]]:
    """Yield a run disturbed at its first such call, then one at its second, and so on."""
    for number in range(1, 1000):
        story.reset()
        inject = f"inject={calls}:{how}:when={number}"
        done = story.run_under(*STRACE, "-e", f"trace={calls}", "-e", inject)
        if done.returncode == 0:
            assert number > 8
            return
        yield done


def assert_the_next_run_completes(story: Story) -> None:
    found = story.captions()
    assert {name for name, _ in found} >= {"same"}
    assert {*found} <= {*BEFORE.items(), *AFTER.items()}
    story.run_here()
    assert story.captions() == sorted(AFTER.items())
    assert leftovers(story.output) == []


@contextmanager
def readers(folder: Path) -> Iterator[list[int]]:
    """Repeatedly open each Parquet file of a folder; yield the row counts seen."""
    ended, seen, failures = threading.Event(), [], []

    def poll() -> None:
        while not ended.is_set():
            try:
                # Hidden files and folders are not for readers.
                for path in [*folder.glob("*.parquet"), *folder.glob("o/*.parquet")]:
                    seen.append(pq.read_metadata(path).num_rows)
            except FileNotFoundError:  # removed since
                continue
            except Exception as error:
                failures.append(error)

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()
    assert failures == []


def test_a_kill_at_each_call_loses_nothing_and_readers_see_whole_files(story: Story) -> None:
    with readers(story.folder / "now") as seen:
        for killed in disturbed(story, f"{NAMES},fsync", "signal=SIGKILL"):
            assert killed.returncode in (-9, 137)
            assert_the_next_run_completes(story)
    assert len(seen) >= LEAST_POLLS


def test_a_disk_that_is_full_at_any_fsync_or_rename_ends_the_run_with_1(story: Story) -> None:
    for refused in disturbed(story, f"fsync,{RENAME}", "error=ENOSPC"):
        assert refused.returncode == 1
        assert "No space left on device" in refused.stderr
        assert "Traceback" not in refused.stderr
        assert_the_next_run_completes(story)
