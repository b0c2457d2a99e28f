"""Signals, sent to this process and to real programs."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from batchcap.process import signals
from batchcap.process.signals import SIGNALS, Stopped, stop_on_signals, stopping_softly


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    numbers = (*SIGNALS, signal.SIGALRM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def send_to_softly_stopping(*numbers: int, then: float = 0) -> signals.StopRequest:
    with stopping_softly() as stop:
        requests.append(stop)
        for number in numbers:
            send(number)
        time.sleep(then)
    return stop


requests: list[signals.StopRequest] = []  # since a stopped block returns none


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_raises_outside_of_a_run(number):
    stop_on_signals()
    with pytest.raises(Stopped) as stopped:
        send(number)
    assert stopped.value.exit_code == 128 + number
    assert not isinstance(stopped.value, Exception)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_first_signal_is_a_request(number):
    with stopping_softly() as stop:
        assert not stop()
        send(number)
        assert stop()
    assert stop.number is number
    assert not stop.insisted


def test_a_second_signal_raises_stopped_with_the_first():
    with pytest.raises(Stopped) as stopped:
        send_to_softly_stopping(signal.SIGTERM, signal.SIGINT)
    assert stopped.value.signal is signal.SIGTERM
    assert requests[-1].insisted


def test_the_time_limit_raises_stopped(monkeypatch):
    monkeypatch.setattr(signals, "GRACE_S", 0.2)
    started = time.monotonic()
    with pytest.raises(Stopped) as stopped:
        send_to_softly_stopping(signal.SIGTERM, then=30)
    assert 0.1 < time.monotonic() - started < 10
    assert stopped.value.signal is signal.SIGTERM
    assert not requests[-1].insisted


def test_the_time_limit_does_not_cut_off_a_commit(monkeypatch):
    """The alarm repeats, and would cut off the commit."""
    monkeypatch.setattr(signals, "GRACE_S", 0.1)
    committed: list[str] = []

    def commit() -> None:
        with stopping_softly() as stop:
            requests.append(stop)
            send(signal.SIGTERM)
            with stop.unhurried():
                time.sleep(1.5)  # more than the alarm's interval
                committed.append("rows")
            time.sleep(30)

    with pytest.raises(Stopped):
        commit()
    assert committed == ["rows"]
    assert not requests[-1].insisted


def test_a_second_signal_stops_a_commit_too():
    def commit() -> None:
        with stopping_softly() as stop, stop.unhurried():
            requests.append(stop)
            send(signal.SIGTERM)
            send(signal.SIGINT)
            time.sleep(30)

    with pytest.raises(Stopped):
        commit()
    assert requests[-1].insisted


def test_the_time_limit_ends_with_the_block(monkeypatch):
    monkeypatch.setattr(signals, "GRACE_S", 0.2)
    send_to_softly_stopping(signal.SIGTERM)
    time.sleep(0.4)


def test_an_alarm_without_a_request_is_ignored():
    """Otherwise, it would end the run as signal 14."""
    assert not send_to_softly_stopping(signal.SIGALRM)()


def test_handlers_are_restored():
    stop_on_signals()
    numbers = (*SIGNALS, signal.SIGALRM)
    before = [signal.getsignal(number) for number in numbers]
    send_to_softly_stopping(signal.SIGTERM)
    assert [signal.getsignal(number) for number in numbers] == before
    with pytest.raises(Stopped):
        send_to_softly_stopping(signal.SIGTERM, signal.SIGTERM)
    assert [signal.getsignal(number) for number in numbers] == before


def test_ignored_signals_stay_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop_on_signals()
    send(signal.SIGHUP)
    assert not send_to_softly_stopping(signal.SIGHUP, signal.SIGHUP)()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


PROGRAM = """
import sys, time
from batchcap.process.signals import Stopped, stop_on_signals, stopping_softly
stop_on_signals()
try:
    with stopping_softly() as stop:
        print("ready", flush=True)
        while not stop():
            time.sleep(0.01)
        print("asked", flush=True)
        if "busy" in sys.argv:
            time.sleep(30)
        raise Stopped(stop.number)
except Stopped as stopped:
    sys.exit(stopped.exit_code)
"""


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("how", ["idle", "busy"])
def test_a_program_ends_with_the_exit_code_of_its_signal(number, how):
    command = [sys.executable, "-c", PROGRAM, how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout.readline() == "ready\n"
        program.send_signal(number)
        assert program.stdout.readline() == "asked\n"
        if how == "busy":
            program.send_signal(number)
        assert program.wait(timeout=5) == 128 + number


def test_a_program_under_nohup_outlives_its_terminal():
    command = ["nohup", sys.executable, "-c", PROGRAM]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as program:
        assert program.stdout.readline() == "ready\n"
        program.send_signal(signal.SIGHUP)
        time.sleep(0.1)
        assert program.poll() is None
        program.send_signal(signal.SIGTERM)
        assert program.stdout.readline() == "asked\n"
        assert program.wait(timeout=5) == 143
