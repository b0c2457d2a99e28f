"""How the program ends."""

import os
import sys
import threading
from typing import NoReturn

_left_behind = threading.Event()


def leave_threads_behind() -> None:
    """Note that a library's threads are still at work, and might crash an orderly end."""
    _left_behind.set()


def end(exit_code: int) -> NoReturn:
    """End the program, at once if threads were left behind."""
    if _left_behind.is_set():
        end_at_once(exit_code)
    sys.exit(exit_code)


def end_at_once(exit_code: int) -> NoReturn:
    """End the program without waiting for its threads, and without functions of `atexit`."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
