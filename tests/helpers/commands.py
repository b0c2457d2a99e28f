"""Run `batchcap` in the tests' own process, where TensorFlow and models are loaded once."""

import contextlib
import copy
import functools
import io
import logging
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from batchcap import cli
from batchcap.model.runtime import Execution
from batchcap.process.clock import StageClock
from batchcap.process.signals import SIGNALS
from batchcap.settings import DEFAULT_MODEL


@contextlib.contextmanager
def sharing_the_model() -> Iterator[None]:
    """Load the shipped model once in the block: all share its networks and compiled functions.

    Runs in this process leave the C library's handling of freed memory alone.
    """
    from batchcap.captioning import caption, local_engine
    from batchcap.model.loading import load_captioner as load_anew

    load_shipped = functools.cache(functools.partial(load_anew, DEFAULT_MODEL))

    def load(directory: Path, execution: Execution, compiled: bool = True) -> Any:
        if directory != DEFAULT_MODEL:
            return load_anew(directory, execution, compiled)
        captioner = copy.copy(load_shipped(execution))
        captioner.clock = StageClock()
        return captioner

    with pytest.MonkeyPatch.context() as patch:
        for user in (caption, local_engine):
            patch.setattr(user, "load_captioner", load)
        patch.setattr(local_engine, "keep_freed_memory", lambda: None)
        yield


def batchcap_here(*arguments: object, stdin: str | bytes = "") -> subprocess.CompletedProcess[str]:
    """Run `batchcap` with these arguments; return its output and exit code."""
    given = io.BytesIO(stdin.encode() if isinstance(stdin, str) else stdin)
    with (
        _log_and_signals_restored(),
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryFile("w+") as output,
        tempfile.TemporaryFile("w+") as errors,
    ):
        patch.setattr(sys, "stdin", io.TextIOWrapper(given))
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            try:
                cli.main([*map(str, arguments)])
            except SystemExit as end:
                code = int(str(end.code))
        for file in (output, errors):
            file.seek(0)
        return subprocess.CompletedProcess(arguments, code, output.read(), errors.read())


@contextlib.contextmanager
def _log_and_signals_restored() -> Iterator[None]:
    """Restore the logging and signal handlers that `main` sets for its process."""
    loggers = [logging.getLogger(name) for name in ("", *logging.root.manager.loggerDict)]
    levels, handlers = [logger.level for logger in loggers], logging.root.handlers[:]
    signals = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        logging.root.handlers[:] = handlers
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for number, handler in signals.items():
            signal.signal(number, handler)
