"""Lists of names: what stands in one, however it was saved, and what may be wrong with one."""

import codecs
import re
from collections.abc import Iterator, Sequence
from typing import IO

READ_BYTES = 1 << 16
MARKS = (  # the longest first: that of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
SIGNS = (  # of names that are none, and what to do
    (r".*[\0\ufffd\udc80-\udcff].*", "are not UTF-8; save the list as UTF-8"),
    (r".*[,;\t].*", "look like lines of a table; give one name a line and nothing else"),
    (r"""(["'`]).*\1""", "stand in quotes; write them without"),
    (r"\s.*|.*\s", "begin or end with blanks; remove these"),
    (r".*\\.*", "have backslashes; write / between folders"),
    (r"[~$].*", "begin with ~ or a variable; write whole paths"),
)
OTHER_FOLDER = "may start at another folder; write them as seen from the list's, or whole paths"


def names_in(file: IO[bytes]) -> Iterator[str]:
    r"""The lines of a list, or what stands between the NULs of one, as they come; blank ones too.

    Names are surrogateescape str. Lists are UTF-8, or what their byte order mark says; UTF-16 is
    told without one where the first character is ASCII. `\r\n` ends a line as `\n` does.
    """
    separator, rest = "", ""
    for text in _texts(file):
        rest += text
        if not separator and ("\0" in rest or "\n" in rest):
            separator = "\0" if "\0" in rest else "\n"
        if separator:
            *names, rest = rest.split(separator)
            yield from (_ended(name, separator) for name in names)
    yield _ended(rest, separator)


def _ended(name: str, separator: str) -> str:
    return name if separator == "\0" else name.removesuffix("\r")


def _texts(file: IO[bytes]) -> Iterator[str]:
    read = getattr(file, "read1", file.read)  # does not wait for more than there is
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
    for mark, encoding in MARKS:
        if start.startswith(mark):
            return mark, encoding
    is_used = bytes(byte != 0 for byte in start[:4])
    return b"", {b"\1\0\1\0": "utf-16-le", b"\0\1\0\1": "utf-16-be"}.get(is_used, "utf-8")


def likely_fault(names: Sequence[str]) -> str:
    """What may be wrong with names that are none of files, and what to do, after `its names`."""
    for pattern, fault in SIGNS:
        matches = re.compile(pattern, re.DOTALL).fullmatch
        if 2 * sum(matches(name) is not None for name in names) > len(names):
            return fault
    return OTHER_FOLDER
