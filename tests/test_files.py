"""Whole or not there."""

import os
from pathlib import Path

import pytest

from batchcap.files import remove_temporaries, replace_text, replacing


def test_a_file_appears_whole_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failing_block_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_temporary_file_is_hidden_and_in_the_same_folder(tmp_path: Path) -> None:
    with replacing(tmp_path / "a.txt") as temporary:
        temporary.touch()
        assert temporary.parent == tmp_path
        assert temporary.name.startswith(".")


def test_a_disk_that_refuses_leaves_what_was_there(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "a.txt"
    replace_text(path, "old")

    def refuse(*_arguments: object, **_options: object) -> None:
        raise OSError(28, "No space left on device")

    for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "write_text")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, refuse)
            with pytest.raises(OSError, match="No space"):
                replace_text(path, "new")
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]


def test_a_pipe_or_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    """As root, writing to /dev/full made a plain file of it."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="no plain file"):
        replace_text(tmp_path / "pipe", "new")
    assert (tmp_path / "pipe").is_fifo()


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    with replacing(tmp_path / "a.txt") as temporary:
        temporary.touch()
        left = temporary.with_name(".a.txt.0123abcd.tmp")
        others = [tmp_path / name for name in (".a.txt.tmp", ".ba.txt.0123abcd.tmp", "a.txt.tmp")]
        for path in (left, *others):
            path.touch()
        remove_temporaries(tmp_path, "b.txt")
        assert temporary.exists()
        remove_temporaries(tmp_path, "a.txt")
        assert sorted(tmp_path.iterdir()) == sorted(others)
        temporary.touch()
