"""Files are written whole or not at all."""

import errno
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from batchcap.storage.files import make_folder, remove_temporaries, replace_text, replacing, sync


def test_a_file_appears_whole_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failing_block_keeps_the_old_file(tmp_path: Path) -> None:
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


def test_a_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch) -> None:
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


SYNC_REFUSALS = pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF])


def refuse_sync(patch: pytest.MonkeyPatch, number: int, is_refused: Callable[[int], bool]) -> None:
    fsync = os.fsync

    def fsync_or_refuse(descriptor: int) -> None:
        if is_refused(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    patch.setattr(os, "fsync", fsync_or_refuse)


@SYNC_REFUSALS
def test_file_systems_that_cannot_sync_folders_are_accepted(number, tmp_path, monkeypatch):
    refuse_sync(monkeypatch, number, stat.S_ISDIR)
    replace_text(tmp_path / "a.txt", "new")
    make_folder(tmp_path / "b")
    assert (tmp_path / "a.txt").read_text() == "new"


@SYNC_REFUSALS
def test_a_file_that_cannot_be_synced_raises(number, tmp_path, monkeypatch):
    refuse_sync(monkeypatch, number, stat.S_ISREG)
    with pytest.raises(OSError, match=re.escape(os.strerror(number))):
        replace_text(tmp_path / "a.txt", "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_folder_on_a_broken_or_full_disk_raises(number, tmp_path, monkeypatch):
    refuse_sync(monkeypatch, number, stat.S_ISDIR)
    with pytest.raises(OSError, match=os.strerror(number)):
        make_folder(tmp_path / "b")


def test_a_folder_that_cannot_be_opened_is_not_synced(tmp_path, monkeypatch):
    def refuse(_path: Path, _flags: int) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    (tmp_path / "a.txt").touch()
    monkeypatch.setattr(os, "open", refuse)
    sync(tmp_path)
    with pytest.raises(PermissionError):
        sync(tmp_path / "a.txt")


def test_a_pipe_or_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    """Root could replace /dev/full by a plain file."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        replace_text(tmp_path / "pipe", "new")
    assert (tmp_path / "pipe").is_fifo()


def test_follows_a_symlink_and_keeps_it(tmp_path: Path) -> None:
    (tmp_path / "far" / "there").mkdir(parents=True)
    target, link, absolute = (tmp_path / name for name in ("far/there/a.txt", "link", "absolute"))
    link.symlink_to("far/b")
    (tmp_path / "far" / "b").symlink_to("there/a.txt")
    absolute.symlink_to(target)
    for path in (link, absolute):  # the first dangling
        replace_text(path, f"by {path.name}")
        assert path.is_symlink()
        assert target.read_text() == f"by {path.name}"
    with replacing(link) as temporary:
        assert temporary.parent.samefile(target.parent)
        temporary.write_text("new")
    target.unlink()
    target.parent.rmdir()
    with pytest.raises(FileNotFoundError):
        replace_text(link, "new")
    link.unlink()
    link.symlink_to(link)
    with pytest.raises(OSError, match="symbolic links"):
        replace_text(link, "new")


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666, 0o444])
def test_keeps_the_mode_of_a_file_it_replaces(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    path.chmod(mode)
    if not os.access(path, os.W_OK):
        pytest.skip("only root replaces a file that is read-only")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_new_files_follow_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "a.txt") as temporary:
            assert stat.S_IMODE(temporary.stat().st_mode) == 0o666 & ~umask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o666 & ~umask


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_root_keeps_owner_and_group_of_a_file_it_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.touch(0o640)
    os.chown(path, 1234, 5678)
    replace_text(path, "new")
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 5678)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_narrows_the_mode_when_the_group_cannot_be_kept(tmp_path: Path, monkeypatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    path = tmp_path / "a.txt"
    for mode, after in ((0o640, 0o600), (0o664, 0o644), (0o606, 0o606)):
        path.unlink(missing_ok=True)
        path.touch()
        os.chown(path, -1, 5678)
        path.chmod(mode)
        with monkeypatch.context() as patch:
            patch.setattr(os, "chown", refuse)
            replace_text(path, "new")
        assert stat.S_IMODE(path.stat().st_mode) == after


def test_refuses_a_folder_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError), replacing(tmp_path):
        pytest.fail("the work was begun")


def test_refuses_a_file_that_is_a_mount_point_before_any_work(tmp_path: Path) -> None:
    """Containers mount single files."""
    source, path = tmp_path / "a.txt", tmp_path / "b.txt"
    source.write_text("old")
    path.touch()
    try:
        subprocess.run(["mount", "--bind", str(source), str(path)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("cannot mount a file")
    try:
        with pytest.raises(OSError, match="it is a mount point"), replacing(path):
            pytest.fail("the work was begun")
        replace_text(source, "new")
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


AS_NOBODY = """
import sys
from pathlib import Path
from batchcap.storage.files import replace_text
for name in sys.argv[1:]:
    try:
        replace_text(Path(name), "new")
    except OSError as error:
        print(error.strerror)
"""


def test_keeps_read_only_files_and_other_users_files(tmp_path_factory) -> None:
    """Write permission for the folder is not enough."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("only root can become nobody")
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-c"]
    if subprocess.run([*nobody, "import batchcap.storage.files"], capture_output=True).returncode:
        pytest.skip("nobody can't run this Python")
    # Not below pytest's folder, which others can't enter.
    with tempfile.TemporaryDirectory() as name:
        read_only, sticky = Path(name) / "a" / "a.txt", Path(name) / "b" / "b.txt"
        for path, mode, folder_mode in ((read_only, 0o444, 0o777), (sticky, 0o666, 0o1777)):
            path.parent.mkdir()
            path.touch()
            path.chmod(mode)
            path.parent.chmod(folder_mode)
        Path(name).chmod(0o755)
        os.chown(read_only, 65534, 65534)
        done = subprocess.run(
            [*nobody, AS_NOBODY, str(read_only), str(sticky)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.splitlines() == [
            "it is read-only",
            "it belongs to another user and its directory is sticky",
        ]
        assert read_only.read_text() == sticky.read_text() == ""


def test_removes_only_leftovers_of_killed_processes(tmp_path: Path) -> None:
    with replacing(tmp_path / "a.txt") as temporary:
        temporary.touch()
        left = temporary.with_name(".a.txt.0123abcd.tmp")
        others = [tmp_path / name for name in (".a.txt.tmp", ".ba.txt.0123abcd.tmp", "a.txt.tmp")]
        for path in (left, *others):
            path.touch()
        remove_temporaries(tmp_path, r"b\.txt")
        assert temporary.exists()
        remove_temporaries(tmp_path, r"a\.txt")
        assert sorted(tmp_path.iterdir()) == sorted(others)
        temporary.touch()
