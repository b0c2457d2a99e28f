"""The log: one line per event, as text or as JSON, on stderr."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

from batchcap.process.wording import printable_json, printable_lines
from batchcap.settings import LogFormat

OURS = "batchcap"
NOISY = ("matplotlib", "PIL", "h5py", "jieba", "tensorflow", "ray")
FIELDS = "event_fields"


def configure_logging(log_format: LogFormat, verbose: bool) -> None:
    """Log batchcap's own events, or with `verbose` everything; other libraries stay quiet."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if log_format is LogFormat.JSON else TextLines())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger(OURS).setLevel(logging.DEBUG if verbose else logging.INFO)
    if verbose:
        logging.getLogger().setLevel(logging.DEBUG)
        for name in NOISY:
            logging.getLogger(name).setLevel(logging.WARNING)


def writes_json() -> bool:
    """Whether the log is JSON, so that a progress bar would be out of place."""
    return any(isinstance(h.formatter, JsonLines) for h in logging.getLogger().handlers)


def log_event(
    logger: logging.Logger, event: str, text: str, level: int = logging.INFO, **fields: Any
) -> None:
    """Log `text`; in a JSON log, with the name of the event and its fields."""
    logger.log(level, "%s", text, extra={FIELDS: {"event": event, **fields}})


class TextLines(logging.Formatter):
    """Formats a record as its message, which may quote untrusted files."""

    def format(self, record: logging.LogRecord) -> str:
        """Return lines without characters that a terminal would interpret."""
        return printable_lines(super().format(record))


class JsonLines(logging.Formatter):
    """Formats a record as one JSON object: `time` (UTC), `level`, `event`, `message` and fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a single line, whatever the message contains."""
        fields = getattr(record, FIELDS, {"event": "message"})
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            **fields,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return printable_json(json.dumps(entry, ensure_ascii=False, default=str))
