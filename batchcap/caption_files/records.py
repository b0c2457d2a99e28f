"""Text files of records: JSON, JSON lines, CSV, plain lines; gzip files of them.

All problems of a file are collected and reported at once, each with its place.
"""

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from batchcap.errors import InputError
from batchcap.process.wording import counted, printable, saying_which

GZIP = b"\x1f\x8b"
LONGEST_HEADER = 10_000  # bytes
NAME_FIELDS = ("file_name", "image_id")
UNREADABLE_JSON = "lists or objects nested too deeply, or a number with too many digits"
SHOWN_PROBLEMS = 10


class Problems:
    """The problems of a file. In reports, `place` follows the file's name: `:12` or `: entry 3`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reports: list[str] = []

    def report(self, place: str, reason: str) -> None:
        """Add a problem."""
        self._reports.append(f"{self.path}{place}: {reason}")

    def raise_if_any(self, advice: str = "") -> None:
        """Report all problems.

        Raises:
            InputError: counts them, shows the first ten, and ends with the advice.
        """
        if not self._reports:
            return
        count = len(self._reports)
        shown = "\n".join(f"  {printable(report)}" for report in self._reports[:SHOWN_PROBLEMS])
        raise InputError(
            f"{self.path} has {counted(count, 'wrong entry', 'wrong entries')}; "
            f"correct or remove {'it' if count == 1 else 'them'}:\n{shown}"
            + (f"\n{advice}" if advice else "")
        )


def holds_records(data: bytes) -> bool:
    """Whether a text is JSON, JSON lines or CSV with a column of photos, by its beginning."""
    if _is_json(data):
        return True
    header = data.lstrip().partition(b"\n")[0][:LONGEST_HEADER].decode("utf-8", "replace")
    columns = next(csv.reader([header.strip()], skipinitialspace=True), [])
    return not set(NAME_FIELDS).isdisjoint(columns)


def _is_json(data: bytes) -> bool:
    return re.match(rb"\s*[{\[]", data) is not None


def read_records(path: Path, data: bytes, problems: Problems) -> Iterator[tuple[str, Any]]:
    """Yield (place, value) of each record of a JSON array, JSON lines or CSV with a header.

    Any other JSON value is the only record. `data` has records; wrong lines and rows are reported.

    Raises:
        InputError: it is not UTF-8, or not JSON.
    """
    if not _is_json(data):
        yield from _csv_rows(path, data, problems)
        return
    has_lines = ".jsonl" in path.suffixes and data.lstrip().startswith(b"{")
    value = None if has_lines else _json_document(path, data)
    if value is None:
        yield from _json_lines(data, problems)
    elif isinstance(value, list):
        yield from entries(value)
    else:
        yield ":1", value


def _csv_rows(path: Path, data: bytes, problems: Problems) -> Iterator[tuple[str, Any]]:
    text = io.StringIO(_decoded(path, data).lstrip(), newline="")
    reader = csv.DictReader(text, skipinitialspace=True, strict=True)
    try:
        for row in reader:
            if None in row:
                problems.report(f":{reader.line_num}", "more cells than the header")
            else:
                yield f":{reader.line_num}", row
    except csv.Error as error:
        problems.report(f":{reader.line_num + 1}", str(error))  # where the row begins


def _json_document(path: Path, data: bytes) -> Any | None:
    """Return the file's only value; None if its first value is a line of JSON lines."""
    text = _decoded(path, data)
    start = len(text) - len(text.lstrip())
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
        if not text[end:].strip():
            return value
        if "\n" not in text[start:end]:
            return None
        raise json.JSONDecodeError("Extra data", text, end)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}:{error.colno}: {error.msg}") from error
    except (RecursionError, ValueError) as error:
        raise InputError(f"{path}: {UNREADABLE_JSON}") from error


def _json_lines(data: bytes, problems: Problems) -> Iterator[tuple[str, Any]]:
    """Yield (place, value) of each non-blank line; report lines that are not JSON."""
    for place, line in text_lines(data, problems):
        try:
            yield place, json.loads(line)
        except json.JSONDecodeError as error:
            problems.report(f"{place}:{error.colno}", error.msg)
        except (RecursionError, ValueError):
            problems.report(place, UNREADABLE_JSON)


def text_lines(data: bytes, problems: Problems) -> Iterator[tuple[str, str]]:
    """Yield (place, line) of each non-blank line; report lines that are not UTF-8."""
    for number, line in enumerate(data.split(b"\n"), start=1):
        try:
            # Concatenated files have byte order marks at later lines too.
            text = line.decode("utf-8").removeprefix("\ufeff").strip()
        except UnicodeDecodeError:
            problems.report(f":{number}", "not UTF-8")
            continue
        if text:
            yield f":{number}", text


def first_of(record: dict[str, Any], *keys: str) -> Any:
    """Return the first of these fields that exists and is not null, or None."""
    return next((record[key] for key in keys if record.get(key) is not None), None)


def name_of(record: dict[str, Any]) -> Any:
    """Return the name of a record's photo: a file name is preferred to a number as `image_id`."""
    image_id = record.get("image_id")
    return image_id if isinstance(image_id, str) else first_of(record, *NAME_FIELDS)


def entries(records: list[Any], name: str = "entry") -> Iterator[tuple[str, Any]]:
    """Yield (place, value) of each record of a JSON file."""
    return ((f": {name} {number}", record) for number, record in enumerate(records, start=1))


def _decoded(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8; save the file as UTF-8") from error


def read_bytes(path: Path) -> bytes:
    """Read a text file, unpacked if it is gzip, in UTF-8 without byte order mark.

    UTF-16 is recognised by its byte order mark; other bytes are returned unchanged.

    Raises:
        UsageError: there is no such file.
        InputError: it cannot be read, or is damaged.
    """
    with saying_which(path):
        data = path.read_bytes()
    if data.startswith(GZIP):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{path} is a damaged gzip file ({error}); copy it again") from error
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            data = data.decode("utf-16").encode("utf-8")
        except UnicodeError as error:
            raise InputError(f"{path} is damaged UTF-16; save it as UTF-8") from error
    return data.removeprefix(codecs.BOM_UTF8)
