"""A program that ends its parent, a run, when Python hangs in C code there.

The run regularly writes a byte to this program's standard input. Imports only the standard
library, so that it starts quickly and takes little memory.
"""

import os
import select
import signal
import subprocess
import sys
import time


def guard(limit_s: float, tick_s: float) -> None:
    """Send SIGABRT to the parent if no byte arrives for `limit_s`; return at the end of the input.

    Time counts only while the parent is not suspended, in ticks of `tick_s`.
    """
    parent = os.getppid()
    quiet_s = 0.0
    while quiet_s < limit_s:
        began = time.monotonic()
        if select.select([0], [], [], tick_s)[0]:
            if not os.read(0, 4096):
                return
            quiet_s = 0.0
        elif not is_suspended(parent):
            quiet_s += min(time.monotonic() - began, 2 * tick_s)
    if os.getppid() == parent:
        print("batchcap: Python is stuck; committed rows are safe: run again", file=sys.stderr)
        os.kill(parent, signal.SIGABRT)


def is_suspended(process: int) -> bool:
    """Whether a process is stopped, as by SIGSTOP."""
    try:
        with open(f"/proc/{process}/stat", "rb") as status:  # noqa: PTH123 - pathlib starts slowly
            return status.read().rpartition(b")")[2].split()[0] in (b"T", b"t")
    except OSError:  # not Linux
        state = ["ps", "-o", "state=", "-p", str(process)]
        return subprocess.run(state, stdout=subprocess.PIPE).stdout.startswith(b"T")


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    guard(float(sys.argv[1]), float(sys.argv[2]))
