"""Functions called in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.crashes import is_alive, wait_until

from batchcap.errors import UsageError
from batchcap.process.children import call_in_new_process

HANGING = """
import os, pathlib, sys, time
from batchcap.process.children import call_in_new_process

def hang(path):
    pathlib.Path(path + ".new").write_text(str(os.getpid()))
    os.rename(path + ".new", path)
    time.sleep(600)

if __name__ == "__main__":
    call_in_new_process(hang, sys.argv[1])
"""


def refuse(reason: str) -> None:
    raise UsageError(reason)


def test_result_comes_from_another_process() -> None:
    assert call_in_new_process(os.getpid) != os.getpid()


def test_its_exception_is_raised_here() -> None:
    with pytest.raises(UsageError, match="not so"):
        call_in_new_process(refuse, "not so")


def test_it_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    script, file = tmp_path / "hanging.py", tmp_path / "pid"
    script.write_text(HANGING)
    with subprocess.Popen([sys.executable, script, file]) as parent:
        assert wait_until(file.exists)
        parent.kill()
    pid = int(file.read_text())
    assert wait_until(lambda: not is_alive(pid))
