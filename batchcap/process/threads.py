"""Threads, and what they share."""

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from functools import cache
from typing import TypeVar

from batchcap.process.ending import leave_threads_behind

Key = TypeVar("Key", bound=Hashable)
Built = TypeVar("Built")


def locked_cache(build: Callable[[Key], Built]) -> Callable[[Key], Built]:
    """Cache like `functools.cache`, for slow functions called by several threads at once."""
    lock, cached = threading.Lock(), cache(build)

    def get(key: Key) -> Built:
        with lock:
            return cached(key)

    return get


def in_new_thread(work: Callable[[], Built]) -> Built:
    """Call `work` in a thread that ends with it; return or raise what it does."""
    future: Future[Built] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return future.result()
    finally:
        if not future.done():  # a signal has arrived
            leave_threads_behind()
