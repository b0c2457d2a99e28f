"""What a library prints while it starts: kept back, and shown only if the start fails.

C++ code may end the process without returning to Python. A process of its own keeps the text, so
that someone is left to show it.
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
    """Keep what this process prints on stderr in the block, C++ code too.

    It is shown if the block raises an Exception, or if the process ends in it.
    """
    command = [sys.executable, "-I", "-S", "-c", KEEPER, DID_NOT_START.format(library)]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # what ends this process does not end it
    ) as keeper:
        assert keeper.stdin is not None
        try:
            with stderr_to(keeper.stdin.fileno()):
                yield
        except Exception:
            raise  # its input ends, and the keeper shows it
        except BaseException:  # the run is to stop
            keeper.kill()
            raise
        keeper.kill()


@contextmanager
def stderr_to(descriptor: int) -> Iterator[None]:
    """Write to an open file what this process, C++ code too, prints on stderr in the block."""
    stderr = os.dup(2)
    os.dup2(descriptor, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
