"""Signals that end the program: at once, or after a run has committed its rows."""

import signal
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE_S = 7.0  # for work in flight; service managers and users wait ten seconds


class Stopped(BaseException):
    """Raised by a signal; unwinds like KeyboardInterrupt, so that temporary files are removed."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)

    @property
    def exit_code(self) -> int:
        """128 plus the signal's number, as in shells."""
        return 128 + self.signal


class StopRequest:
    """Whether a signal has asked the run to stop; call it to find out.

    `insisted` is True after a second signal.
    """

    number: signal.Signals | None = None
    insisted = False
    is_unhurried = False

    def __call__(self) -> bool:
        """Return True after a signal."""
        return self.number is not None

    @contextmanager
    def unhurried(self) -> Iterator[None]:
        """Suspend the time limit during the block; a second signal still stops it."""
        self.is_unhurried = True
        try:
            yield
        finally:
            self.is_unhurried = False


def stop_on_signals() -> None:
    """Raise `Stopped` in the main thread on signals, except on ignored ones."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup does SIGHUP
            signal.signal(number, _stop)


@contextmanager
def stopping_softly() -> Iterator[StopRequest]:
    """Make a first signal a request in the block; a second, or the time limit, raises `Stopped`."""
    request = StopRequest()

    def take(number: int, _frame: types.FrameType | None) -> None:
        if request.number is not None:
            if number == signal.SIGALRM and request.is_unhurried:
                return
            request.insisted = number != signal.SIGALRM
            raise Stopped(request.number)
        if number == signal.SIGALRM:  # not our own, which comes after a request
            return
        request.number = signal.Signals(number)
        # Repeatedly: an exception raised while an object is being deleted is lost.
        signal.setitimer(signal.ITIMER_REAL, GRACE_S, 1.0)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, take)
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, take)
    try:
        yield request
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, _frame: types.FrameType | None) -> NoReturn:
    raise Stopped(number)
