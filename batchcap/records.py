"""Text files of records that users bring: JSON, JSON lines, plain lines.

Everything that is wrong with a file is gathered and told at once, each with its place.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from batchcap.contracts import InputError, UsageError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
SHOWN_PROBLEMS = 10
MISSING = "missing"


class Problems:
    """What is wrong with a file. `place` follows its name in a report: `:12` or `: entry 3`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reports: list[str] = []

    def report(self, place: str, reason: str) -> None:
        """Note one."""
        self._reports.append(f"{self.path}{place}: {reason}")

    def raise_if_any(self) -> None:
        """Tell of all of them.

        Raises:
            InputError: counts them, and shows the first ten.
        """
        if not self._reports:
            return
        count = len(self._reports)
        shown = "\n".join(f"  {printable(report)}" for report in self._reports[:SHOWN_PROBLEMS])
        raise InputError(
            f"{self.path} has {counted(count, 'wrong entry', 'wrong entries')}; "
            f"correct or remove {'it' if count == 1 else 'them'}:\n{shown}"
        )


def printable(name: str) -> str:
    """A text of others without the control characters that a terminal would obey."""
    return "".join(char if char.isprintable() else "?" for char in name)


def counted(count: int, noun: str, nouns: str = "") -> str:
    """`1 caption`, `2 captions`; `nouns` is the plural, unless it is `noun` with an s."""
    return f"{count} {noun if count == 1 else nouns or noun + 's'}"


def shown(value: object) -> str:
    """A value in a report, not too long."""
    return MISSING if value is None else repr(value)[:40]


def first_line(path: Path) -> bytes:
    """The first line that is not blank, stripped; empty if there is none.

    Raises:
        UsageError: there is no such file.
        InputError: it cannot be read.
    """
    with saying_which(path), path.open("rb") as file:
        stripped = (line.removeprefix(BYTE_ORDER_MARK).strip() for line in file)
        return next((line for line in stripped if line), b"")


def text_lines(path: Path, problems: Problems) -> Iterator[tuple[str, str]]:
    """(place, line) of each line that is not blank; lines that are not UTF-8 are reported.

    Raises:
        UsageError: there is no such file.
        InputError: it cannot be read.
    """
    data = read_bytes(path)
    for number, line in enumerate(data.split(b"\n"), start=1):
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError:
            problems.report(f":{number}", "not UTF-8")
            continue
        if text:
            yield f":{number}", text


def json_lines(path: Path, problems: Problems) -> Iterator[tuple[str, Any]]:
    """(place, value) of each line that is not blank; lines that are no JSON are reported.

    Raises:
        UsageError: there is no such file.
        InputError: it cannot be read.
    """
    for place, line in text_lines(path, problems):
        try:
            yield place, json.loads(line)
        except json.JSONDecodeError as error:
            problems.report(f"{place}:{error.colno}", error.msg)
        except RecursionError:
            problems.report(place, "lists or objects within each other without end")


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        UsageError: there is no such file.
        InputError: it cannot be read, is not UTF-8, or not JSON.
    """
    data = read_bytes(path)
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8; save the file as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}:{error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise InputError(f"{path}: lists or objects within each other without end") from error


def entries(records: list[Any], name: str = "entry") -> Iterator[tuple[str, Any]]:
    """(place, value) of each of a JSON file's records."""
    return ((f": {name} {number}", record) for number, record in enumerate(records, start=1))


def read_bytes(path: Path) -> bytes:
    """A file without its byte order mark.

    Raises:
        UsageError: there is no such file.
        InputError: it cannot be read.
    """
    with saying_which(path):
        return path.read_bytes().removeprefix(BYTE_ORDER_MARK)


@contextmanager
def saying_which(file: object) -> Iterator[None]:
    """Turn what the file system says of a file into what a user can do.

    Raises:
        UsageError: for a FileNotFoundError in the block.
        InputError: for any other OSError.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise UsageError(f"There is no {file}; check the path.") from error
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror or error}).") from error
