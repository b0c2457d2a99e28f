"""What threads share."""

import threading
from collections.abc import Callable, Hashable
from functools import cache
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)
Built = TypeVar("Built")


def locked_cache(build: Callable[[Key], Built]) -> Callable[[Key], Built]:
    """Cache like `functools.cache`, for slow functions called by several threads at once."""
    lock, cached = threading.Lock(), cache(build)

    def get(key: Key) -> Built:
        with lock:
            return cached(key)

    return get
