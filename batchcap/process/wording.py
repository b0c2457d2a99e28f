"""Counts, values and untrusted names in messages."""

import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager

from batchcap.errors import InputError, UsageError

LONGEST_EXCERPT = 100


def printable(text: str) -> str:
    """Return untrusted text on one line, without control and invisible characters."""
    return "".join(char if _is_visible(char) else "?" for char in text)


def printable_lines(text: str) -> str:
    """Apply `printable` to each line of a text; tabs become spaces."""
    return "\n".join(map(printable, text.expandtabs().split("\n")))


def printable_json(text: str) -> str:
    """Escape control and invisible characters in JSON; its values stay the same."""
    return "".join(char if _is_visible(char) or char == "\n" else _escaped(char) for char in text)


def excerpt(text: str) -> str:
    """Return the beginning of an untrusted text, on one line."""
    return printable(text[:LONGEST_EXCERPT])


def _is_visible(char: str) -> bool:
    """Whether a character only prints itself; spaces of any width do."""
    return char.isprintable() or unicodedata.category(char) == "Zs"


def _escaped(char: str) -> str:
    units = char.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4))


def counted(count: int, noun: str, nouns: str = "") -> str:
    """Return `1 caption`, `2 captions`; `nouns` is the plural if it is not `noun` with an s."""
    return f"{count} {noun if count == 1 else nouns or noun + 's'}"


def shown(value: object) -> str:
    """Return a short form of a value for a report."""
    return "missing" if value is None else repr(value)[:40]


@contextmanager
def saying_which(file: object) -> Iterator[None]:
    """Turn file system errors of the block into errors that a user can act on.

    Raises:
        UsageError: for a FileNotFoundError in the block.
        InputError: for any other OSError.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise UsageError(f"there is no {file}: check the path") from error
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror or error})") from error
