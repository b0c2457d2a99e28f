"""Work in a thread of its own."""

import threading
from concurrent.futures import Future

import pytest

from batchcap.process import threads
from batchcap.process.threads import in_new_thread


def test_the_result_is_that_of_another_thread() -> None:
    assert in_new_thread(threading.current_thread) is not threading.current_thread()


def test_an_exception_is_raised_here() -> None:
    def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError, match="x"):
        in_new_thread(fail)


@pytest.mark.parametrize("is_interrupted", [False, True])
def test_an_interrupted_wait_leaves_the_thread_behind(
    monkeypatch: pytest.MonkeyPatch, is_interrupted: bool
) -> None:
    left: list[bool] = []
    monkeypatch.setattr(threads, "leave_threads_behind", lambda: left.append(True))
    going_on = threading.Event()
    if is_interrupted:
        monkeypatch.setattr(Future, "result", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            in_new_thread(going_on.wait)
    else:
        in_new_thread(lambda: None)
    going_on.set()
    assert left == [True] * is_interrupted
