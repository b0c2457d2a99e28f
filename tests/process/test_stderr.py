"""A library's output during its start is shown only if the start fails."""

import os
import subprocess
import sys

import pytest

from batchcap.errors import BatchcapError
from batchcap.model.runtime import start_tensorflow
from batchcap.process.stderr import kept_back


def start(printed: bytes, error: BaseException) -> None:
    with kept_back("Library"):
        os.write(2, printed)
        raise error


def test_a_start_that_succeeds_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    with kept_back("Library"):
        os.write(2, b"chatter\n")
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"


def test_a_start_that_fails_shows_its_output(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ImportError):
        start(b"no such driver\n", ImportError())
    assert (
        capfd.readouterr().err == "batchcap: Library did not start; it printed:\nno such driver\n"
    )


def test_a_start_that_is_stopped_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        start(b"chatter\n", KeyboardInterrupt())
    assert capfd.readouterr().err == ""


def test_a_failed_import_of_tensorflow_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(BatchcapError, match="cannot import TensorFlow"):
        start_tensorflow()


def test_a_crash_of_tensorflow_at_its_start_shows_the_reason() -> None:
    program = "from batchcap.model.runtime import start_tensorflow; start_tensorflow()"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"TF_XLA_FLAGS": "--tf_xla_bogus=1"},
    )
    assert done.returncode != 0
    assert done.stderr.startswith("batchcap: TensorFlow did not start; it printed:\n")
    assert "Unknown flag in TF_XLA_FLAGS: --tf_xla_bogus=1" in done.stderr
