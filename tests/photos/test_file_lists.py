"""Lists of names as programs save them."""

import io
import os
import threading

import pytest

from batchcap.photos.file_lists import OTHER_FOLDER, likely_fault, names_in

NAMES = ["./a b.jpg", "照片/1.jpg", "c.jpg"]
LINES = "\n".join(NAMES) + "\n"


def names(data: bytes) -> list[str]:
    return [name for name in names_in(io.BytesIO(data)) if name]


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_of_any_unicode_encoding_are_names(encoding: str, end: str) -> None:
    assert names(LINES.replace("\n", end).encode(encoding)) == NAMES
    assert names(LINES.rstrip().replace("\n", end).encode(encoding)) == NAMES


def test_nul_separated_names_may_contain_anything_else() -> None:
    listed = ["./a.jpg", "line\nbreak.jpg", "end\r", " b.jpg "]
    assert names("\0".join(listed).encode() + b"\0") == listed
    assert names(b"line\nbreak.jpg\0b.jpg\0") == ["line\nbreak.jpg", "b.jpg"]


def test_names_that_are_not_utf8_keep_their_bytes() -> None:
    assert [os.fsencode(name) for name in names(b"\xff.jpg\n\xe7\x85\n")] == [
        b"\xff.jpg",
        b"\xe7\x85",
    ]


def test_names_across_read_boundaries_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchcap.photos.file_lists.READ_BYTES", 5)
    for encoding in ("utf-8", "utf-16"):
        assert names(LINES.encode(encoding)) == NAMES


def test_a_name_is_yielded_as_soon_as_a_pipe_has_it() -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as read_end, os.fdopen(writing, "wb", buffering=0) as write_end:
        write_end.write(b"1.jpg\0" + b"2.jpg\0" + b"3")
        found = names_in(read_end)
        assert [next(found), next(found)] == ["1.jpg", "2.jpg"]
        threading.Timer(0, lambda: (write_end.write(b".jpg"), write_end.close())).start()
        assert [*found] == ["3.jpg"]


@pytest.mark.parametrize(
    ("listed", "fault"),
    [
        (["'a.jpg'", '"b.jpg"'], "quotes"),
        (["path,label", "a.jpg,1"], "table"),
        (["a.jpg\t1", "b.jpg\t2"], "table"),
        (["a.jpg  ", " b.jpg"], "blanks"),
        ([r"photos\a.jpg"], "backslashes"),
        (["~/a.jpg"], "full paths"),
        (["\udcff\udcfea", "\0b"], "UTF-8"),
        (["a.jpg", "b.jpg", "'c.jpg'"], OTHER_FOLDER),
    ],
)
def test_the_fault_of_most_names_is_the_likely_one(listed: list[str], fault: str) -> None:
    assert fault in likely_fault(listed)
