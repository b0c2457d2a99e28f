"""The watchdog, in real processes."""

import signal
import subprocess
import sys
import time

import pytest

START = """
import re, sys, time
from batchcap.captioning import watchdog
from batchcap.photos.listing import ImageRef
watchdog.GRACE_S = 0.5
def last_words(message):
    print("last words:", message, file=sys.stderr)
def refs(count):
    return [ImageRef(f"{n}.jpg", f"/photos/{n}.jpg") for n in range(count)]
def hang():
    time.sleep(60)
with watchdog.watching(0.5, last_words) as watching:
"""


def script(body: str) -> list[str]:
    return [sys.executable, "-c", START + "".join(f"    {line}\n" for line in body.splitlines())]


def ended(body: str, seconds: float = 30) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        script(body), capture_output=True, text=True, check=False, timeout=seconds
    )


def test_stalled_run_is_ended_with_its_stacks():
    run = ended("""list(watching.in_flight(refs(3)))
watching.landed(["1.jpg"])
hang()""")
    assert run.returncode == 1
    assert "in hang" in run.stderr
    assert run.stderr.count("most recent call first") >= 2  # of all threads
    assert run.stderr.endswith(
        "last words: no progress for 0.5 s; in flight: 0.jpg, 2.jpg; committed rows are "
        "safe: run again, without these files if it happens again\n"
    )


def test_names_are_printable_and_limited():
    run = ended(r"""list(watching.in_flight([ImageRef("a\x1b[2J\n.jpg", ""), *refs(30)]))
hang()""")
    assert "in flight: a?[2J?.jpg, 0.jpg, 1.jpg" in run.stderr
    assert "18.jpg and 11 more; committed" in run.stderr


def test_nothing_in_flight_is_reported():
    assert "in flight: none;" in ended("hang()").stderr


def test_progress_keeps_a_run_alive():
    run = ended("""for _ in range(20):
    time.sleep(0.06)
    watching.progress()
watching.landed([])
time.sleep(0.2)""")
    assert (run.returncode, run.stderr) == (0, "")


def test_nothing_is_watched_after_the_block():
    command = script("pass")
    command[-1] += "time.sleep(1.3)\n"
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert (run.returncode, run.stderr) == (0, "")


def test_a_failure_in_the_block_is_passed_on():
    run = ended("raise ZeroDivisionError")
    assert run.returncode == 1
    assert "ZeroDivisionError" in run.stderr
    assert "last words" not in run.stderr


def test_process_stuck_in_c_code_is_ended_too():
    started = time.monotonic()
    run = ended("""re.match(r"(a+)+$", "a" * 40 + "b")""")
    assert time.monotonic() - started < 15
    assert run.returncode == -signal.SIGABRT
    assert "batchcap: Python is stuck; committed rows are safe: run again" in run.stderr
    assert "in match" in run.stderr


def test_suspended_process_continues_when_resumed():
    """It was ended on waking, for example from Ctrl-Z, Slurm or a container's pause."""
    command = script("""for _ in range(20):
    time.sleep(0.1)
    watching.progress()
    print("moves", flush=True)""")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "moves\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(2)  # four times the timeout, and more than the grace
        process.send_signal(signal.SIGCONT)
        process.communicate(timeout=30)
    assert process.returncode == 0


def test_last_words_that_hang_or_fail_do_not_keep_the_process_alive():
    for words in ("time.sleep(60)", "1 / 0"):
        run = ended(f"""import contextlib
watching.progress()
last_words.__code__ = (lambda message: {words}).__code__
hang()""")
        assert run.returncode == 1


def test_progress_costs_little():
    """Each listed photo is progress: starting a thread each time took a minute for a million photos
    that were already done.
    """
    run = ended("""started = time.monotonic()
for _ in range(100_000):
    watching.progress()
print(time.monotonic() - started)""")
    assert float(run.stdout) < 1


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/null"])
def test_a_process_without_stderr_is_watched_too(redirection):
    """Some schedulers start programs so; faulthandler failed, and the run did not start."""
    command = ["bash", "-c", f'"$@" {redirection}', "bash", *script("hang()")]
    stuck = subprocess.run(command, capture_output=True, check=False, timeout=30)
    assert stuck.returncode == 1
    fine = script("print('fine')")
    fine[-1] += "\n"
    command = ["bash", "-c", f'"$@" {redirection}', "bash", *fine]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert (run.returncode, run.stdout) == (0, "fine\n")
