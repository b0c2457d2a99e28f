"""What a library prints while it starts: kept back, and shown only if the start fails.

C++ code may end the process without returning to Python. A process of its own keeps the text, so
that someone is left to show it.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

KEEPER = """
import os, sys
text = sys.stdin.buffer.read().strip()
if text:
    library = os.fsencode(sys.argv[1])
    os.write(2, b"batchcap: %s did not start; it printed:\\n%s\\n" % (library, text))
"""


@contextmanager
def kept_back(library: str) -> Iterator[None]:
    """Keep what this process prints on stderr in the block, C++ code too.

    It is shown if the block raises an Exception, or if the process ends in it.
    """
    command = [sys.executable, "-I", "-S", "-c", KEEPER, library]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # what ends this process does not end it
    ) as keeper:
        assert keeper.stdin is not None
        stderr = os.dup(2)
        os.dup2(keeper.stdin.fileno(), 2)
        failed = False
        try:
            yield
        except Exception:
            failed = True
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            if not failed:
                keeper.kill()
