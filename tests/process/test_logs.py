"""One line per event, as text or as JSON."""

import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from batchcap.process.logs import JsonLines, configure_logging, log_event, writes_json
from batchcap.settings import LogFormat

OURS, OTHERS = logging.getLogger("batchcap.captioning.run"), logging.getLogger("PIL.Image")


@pytest.fixture
def stderr(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], str]]:
    root, ours, noisy = (logging.getLogger(name) for name in ("", "batchcap", "PIL"))
    before = root.handlers[:], [logger.level for logger in (root, ours, noisy)]
    yield lambda: capsys.readouterr().err
    root.handlers[:] = before[0]
    for logger, level in zip((root, ours, noisy), before[1], strict=True):
        logger.setLevel(level)


def log_samples() -> None:
    log_event(OURS, "committed", "20 rows committed", logging.DEBUG, rows=20)
    log_event(OURS, "run_started", "captioning 照片", run_id="r", device="cpu")
    OURS.warning("the folder %s cannot be listed", "a\nb")
    OTHERS.info("chatter")
    OTHERS.warning("something")


def test_json_has_one_object_a_line(stderr):
    configure_logging(LogFormat.JSON, verbose=False)
    log_samples()
    assert re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}", "T", stderr()) == (
        '{"time": "T+00:00", "level": "info", "event": "run_started", "run_id": "r", '
        '"device": "cpu", "message": "captioning 照片"}\n'
        '{"time": "T+00:00", "level": "warning", "event": "message", '
        '"message": "the folder a\\nb cannot be listed"}\n'
        '{"time": "T+00:00", "level": "warning", "event": "message", "message": "something"}\n'
    )
    assert writes_json()


def test_text_is_the_message(stderr):
    configure_logging(LogFormat.TEXT, verbose=False)
    log_event(OURS, "run_started", "captioning 100 % of 照片", run_id="r")
    OTHERS.info("chatter")
    assert stderr() == "captioning 100 % of 照片\n"
    assert not writes_json()


@pytest.mark.parametrize("log_format", list(LogFormat))
def test_verbose_logs_details_but_not_of_noisy_libraries(stderr, log_format):
    configure_logging(log_format, verbose=True)
    log_samples()
    logging.getLogger("other").debug("details")
    text = stderr()
    assert "20 rows committed" in text
    assert "details" in text
    assert "chatter" not in text


def test_json_has_tracebacks_and_any_field(stderr):
    """A field that is no JSON value, such as a path, must not fail."""
    configure_logging(LogFormat.JSON, verbose=False)
    try:
        raise ZeroDivisionError("naught")
    except ZeroDivisionError:
        OURS.exception("failed")
    log_event(OURS, "event", "text", path=OURS.__class__)
    failed, event = map(json.loads, stderr().splitlines())
    assert failed["level"] == "error"
    assert failed["traceback"].endswith("ZeroDivisionError: naught")
    assert event["path"] == str(OURS.__class__)


def test_names_that_are_not_unicode_are_logged():
    program = """
import logging
from batchcap.process.logs import configure_logging
from batchcap.settings import LogFormat
configure_logging(LogFormat.JSON, verbose=False)
logging.getLogger("batchcap").info("a %s", "\\udcff\\u2028")
"""
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, capture_output=True, check=True)
    assert json.loads(run.stderr)["message"] in ("a \\udcff\u2028", "a \udcff\u2028")


OBEYED = "\x1b[2J\x07\x7f\x9b31m\u202e\u2066\u200b\u2028\U000e0001"


@pytest.mark.parametrize("log_format", list(LogFormat))
def test_nothing_that_a_terminal_obeys_is_logged(stderr, log_format):
    configure_logging(log_format, verbose=True)
    log_event(OURS, "event", f"一\u3000只\n狗{OBEYED}", field=OBEYED)
    OTHERS.warning("%s", OBEYED)
    text = stderr()
    assert text.replace("\n", "").replace("\u3000", "").isprintable()
    if log_format is LogFormat.JSON:
        ours, others = map(json.loads, text.splitlines())
        assert (ours["message"], ours["field"]) == (f"一\u3000只\n狗{OBEYED}", OBEYED)
        assert others["message"] == OBEYED
    else:
        assert text == "一\u3000只\n狗?[2J???31m?????\n?[2J???31m?????\n"


def test_a_record_is_one_line_whatever_it_contains():
    record = logging.LogRecord("a", logging.INFO, "", 0, "%s", ("\r\n\x85\u2028\x00",), None)
    line = JsonLines().format(record)
    assert "\n" not in line
    assert "\r" not in line
    assert json.loads(line)["message"] == "\r\n\x85\u2028\x00"
