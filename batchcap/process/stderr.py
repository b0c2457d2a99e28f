"""Hold back what a library prints while it starts, and show it only if the start fails.

C++ code can end the process without returning to Python, so a separate process keeps the text.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

DID_NOT_START = "batchcap: {} did not start; it printed:\n"
KEEPER = """
import os, sys
text = sys.stdin.buffer.read().strip()
if text:
    os.write(2, os.fsencode(sys.argv[1]) + text + b"\\n")
"""


@contextmanager
def kept_back(library: str) -> Iterator[None]:
    """Hold back what this process prints on stderr during the block, also from C++ code.

    The text is shown if the block raises an Exception, or if the process ends in it.
    """
    command = [sys.executable, "-I", "-S", "-c", KEEPER, DID_NOT_START.format(library)]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # survives signals to this process's group
    ) as keeper:
        assert keeper.stdin is not None
        try:
            with stderr_to(keeper.stdin.fileno()):
                yield
        except Exception:
            raise  # which closes the keeper's input: it shows the text
        except BaseException:  # the run was stopped
            keeper.kill()
            raise
        keeper.kill()


@contextmanager
def stderr_to(descriptor: int) -> Iterator[None]:
    """Redirect this process's stderr to an open file during the block, also for C++ code."""
    stderr = os.dup(2)
    os.dup2(descriptor, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
