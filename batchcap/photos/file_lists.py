"""Read lists of file names in any Unicode encoding, and guess what is wrong with one."""

import codecs
import re
from collections.abc import Iterator, Sequence
from typing import IO

READ_BYTES = 1 << 16
BYTE_ORDER_MARKS = (  # the longest first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
FAULTS = (  # (pattern of wrong names, their fault and its remedy)
    (r".*[\0\ufffd\udc80-\udcff].*", "are not UTF-8; save the list as UTF-8"),
    (r".*[,;\t].*", "look like rows of a table; keep one name a line and nothing else"),
    (r"""(["'`]).*\1""", "are in quotes; remove the quotes"),
    (r"\s.*|.*\s", "start or end with blanks; remove the blanks"),
    (r".*\\.*", "contain backslashes; use / between folders"),
    (r"[~$].*", "start with ~ or a variable; write full paths"),
)
OTHER_FOLDER = (
    "may be relative to a folder other than the list's (the current one, for standard input); "
    "write full paths"
)


def names_in(file: IO[bytes]) -> Iterator[str]:
    r"""Yield the names of a list as they arrive, blank ones too, as surrogateescape str.

    Names end with NUL if the first one does, else with `\n` or `\r\n`. The byte order mark gives
    the encoding; without one it is UTF-8, or UTF-16 if that makes the first two characters ASCII.
    """
    separator, rest = "", ""
    for text in _texts(file):
        rest += text
        if not separator and ("\0" in rest or "\n" in rest):
            separator = "\0" if "\0" in rest else "\n"
        if separator:
            *names, rest = rest.split(separator)
            yield from (_without_cr(name, separator) for name in names)
    yield _without_cr(rest, separator)


def _without_cr(name: str, separator: str) -> str:
    return name if separator == "\0" else name.removesuffix("\r")


def _texts(file: IO[bytes]) -> Iterator[str]:
    read = getattr(file, "read1", file.read)  # `read1` does not wait for a pipe to fill
    start = b""
    while len(start) < len(codecs.BOM_UTF32_LE) and (data := read(READ_BYTES)):
        start += data
    mark, encoding = _encoding_of(start)
    is_utf8 = encoding == "utf-8"
    decoder = codecs.getincrementaldecoder(encoding)("surrogateescape" if is_utf8 else "replace")
    yield decoder.decode(start.removeprefix(mark))
    while data := read(READ_BYTES):
        yield decoder.decode(data)
    yield decoder.decode(b"", final=True)


def _encoding_of(start: bytes) -> tuple[bytes, str]:
    for mark, encoding in BYTE_ORDER_MARKS:
        if start.startswith(mark):
            return mark, encoding
    is_nonzero = bytes(byte != 0 for byte in start[:4])
    return b"", {b"\1\0\1\0": "utf-16-le", b"\0\1\0\1": "utf-16-be"}.get(is_nonzero, "utf-8")


def likely_fault(names: Sequence[str]) -> str:
    """Return the likely fault of names that match no file, and what to do about it.

    The text follows `they`, as in `they are in quotes; remove the quotes`.
    """
    for pattern, fault in FAULTS:
        matches = re.compile(pattern, re.DOTALL).fullmatch
        if 2 * sum(matches(name) is not None for name in names) > len(names):
            return fault
    return OTHER_FOLDER
