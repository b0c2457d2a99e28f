"""Processes that this one starts."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any, TypeVar

from batchcap.process.signals import SIGNALS

Result = TypeVar("Result")

# Forked ones would share the output's lock and the threads of libraries.
NEW_INTERPRETERS = multiprocessing.get_context("spawn")


def call_in_new_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function in a process of its own, and return what it returns or raise its exception.

    Function, arguments and result must be picklable.
    """
    with (
        ProcessPoolExecutor(1, NEW_INTERPRETERS, initializer=end_with_parent) as pool,
        signals_blocked(),
    ):
        called = pool.submit(function, *arguments)
    return called.result()


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Shield processes started in the block from the signals that end a run.

    Terminals and service managers signal all processes, but the run decides when to end.
    """
    resource_tracker.ensure_running()  # beforehand, since it unblocks signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """End this process when its parent does; if it hangs, it notices no closed connection."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: Any) -> None:
    parent.join()
    os._exit(1)
