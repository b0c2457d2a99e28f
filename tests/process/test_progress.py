"""A bar on a terminal, lines in a log."""

import logging
import os
import pty
import subprocess
import sys
import termios

import pytest

from batchcap.process.progress import progress

COUNT_TO_THREE = """
from batchcap.process.progress import progress
with progress("captioning", 3, "image") as bar:
    for _ in range(3):
        bar.update(1)
"""


@pytest.mark.parametrize("columns", [100, 0])
def test_a_terminal_gets_a_bar_with_rate_and_remaining_time(columns: int) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    subprocess.run([sys.executable, "-c", COUNT_TO_THREE], stderr=theirs, check=True)
    shown = os.read(ours, 100_000).decode()
    assert "captioning" in shown
    assert "3/3" in shown
    assert "image/s" in shown


def test_a_log_of_short_work_stays_empty() -> None:
    command = [sys.executable, "-c", COUNT_TO_THREE]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_a_log_of_long_work_gets_a_line_every_half_minute(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = iter([0.0, 10.0, 20.0, 40.0, 50.0])
    monkeypatch.setattr("batchcap.process.progress.time.monotonic", lambda: next(clock))
    monkeypatch.setattr("batchcap.process.progress.sys.stderr.isatty", lambda: False)
    with caplog.at_level(logging.INFO), progress("captioning", 80, "image") as bar:
        for _ in range(4):
            bar.update(10)
    assert caplog.messages == ["captioning: 30 of 80 images, 0.8 images/s, 67 s left"]


def test_earlier_work_does_not_count_towards_the_rate(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = iter([0.0, 31.0])
    monkeypatch.setattr("batchcap.process.progress.time.monotonic", lambda: next(clock))
    monkeypatch.setattr("batchcap.process.progress.sys.stderr.isatty", lambda: False)
    with caplog.at_level(logging.INFO), progress("epoch 3", 5000, "step", done=4000) as bar:
        bar.update(31)
    assert caplog.messages == ["epoch 3: 4031 of 5000 steps, 1.0 steps/s, 969 s left"]


@pytest.mark.parametrize(
    ("total", "done", "line"),
    [
        (80, 0, "captioning: 0 of 80 images, 0.0 images/s"),
        (10, 62, "captioning: 62 of 10 images, 2.0 images/s, 0 s left"),  # the input has grown
    ],
)
def test_no_work_and_work_beyond_the_total_are_logged(
    total: int,
    done: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = iter([0.0, 31.0])
    monkeypatch.setattr("batchcap.process.progress.time.monotonic", lambda: next(clock))
    monkeypatch.setattr("batchcap.process.progress.sys.stderr.isatty", lambda: False)
    with caplog.at_level(logging.INFO), progress("captioning", total, "image") as bar:
        bar.update(done)
    assert caplog.messages == [line]
