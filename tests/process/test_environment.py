"""No setting of a machine, a user or a folder reaches the libraries."""

import logging
import os
import pwd
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from batchcap.process import environment
from batchcap.process.environment import cache_folder, import_matplotlib, settle


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder for temporary files, with the user's cache directory beside it."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    environment._usable.cache_clear()
    yield folder
    environment._usable.cache_clear()


def assert_is_private(folder: Path) -> None:
    assert folder.stat().st_mode & 0o777 == 0o700
    assert folder.stat().st_uid == os.geteuid()


def test_variables_of_the_user_do_not_reach_the_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setenv("TF_SET_ONEDNN_FPMATH_MODE", "BF16")
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "0")
    settle()
    assert os.environ["KERAS_BACKEND"] == "tensorflow"
    assert os.environ["MPLBACKEND"] == "agg"
    assert "TF_SET_ONEDNN_FPMATH_MODE" not in os.environ
    assert os.environ["TF_ENABLE_ONEDNN_OPTS"] == "0"  # same captions, and the user's to choose


def test_matplotlib_has_its_default_settings() -> None:
    matplotlib = import_matplotlib()
    matplotlib.rcParams["text.usetex"] = True
    assert not import_matplotlib().rcParams["text.usetex"]


def test_caches_lie_in_the_users_cache_directory(temporary: Path, tmp_path: Path) -> None:
    assert cache_folder("features") == tmp_path / "cache" / "batchcap" / "features"
    assert_is_private(tmp_path / "cache" / "batchcap")


def test_a_user_without_a_home_has_a_temporary_cache(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "")  # to be restored
    monkeypatch.delenv("HOME")
    settle()
    assert Path.home() == Path(os.devnull)  # and not `~` in the working directory
    folder = temporary / f"batchcap-{os.geteuid()}"
    assert cache_folder("keras") == cache_folder("keras") == folder / "keras"
    assert_is_private(folder)
    assert caplog.messages == [
        f"using the cache directory {folder}: this user has no home directory; "
        "set XDG_CACHE_HOME to a directory of your own"
    ]


def test_a_cache_directory_that_cannot_be_made_is_replaced(
    temporary: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").touch()
    assert cache_folder().parent == temporary
    assert f"cannot write in {tmp_path}/cache/batchcap (Not a directory)" in caplog.text


def test_a_full_cache_directory_is_replaced(
    temporary: Path, caplog: pytest.LogCaptureFixture
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with caplog.at_level(logging.WARNING):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        try:
            folder = cache_folder()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert folder.parent == temporary
    assert "batchcap (File too large)" in caplog.text


def test_a_cache_directory_that_others_can_write_is_not_used(
    temporary: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Some libraries execute the files in their caches."""
    shared = tmp_path / "cache" / "batchcap"
    shared.mkdir(parents=True)
    shared.chmod(0o777)
    assert cache_folder().parent == temporary
    assert f"other users can write in {shared}" in caplog.text


@pytest.mark.parametrize("link", [True, False])
def test_a_temporary_folder_made_by_someone_else_is_not_used(
    temporary: Path, tmp_path: Path, link: bool
) -> None:
    (tmp_path / "cache").touch()
    known = temporary / f"batchcap-{os.geteuid()}"
    if link:
        known.symlink_to(tmp_path)
    else:
        known.mkdir(mode=0o755)
    folder = cache_folder()
    assert folder.parent == temporary
    assert folder != known
    assert_is_private(folder)
