"""Environment variables, caches and defaults that libraries would take from the user.

Captions must not depend on a file in the home directory, on a variable that a notebook has set, or
on files beside the photos.
"""

import functools
import hashlib
import inspect
import logging
import os
import stat
import tempfile
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import platformdirs

SETTINGS = {
    # Child processes would look for modules in the working directory first.
    "PYTHONSAFEPATH": "1",
    "KERAS_BACKEND": "tensorflow",
    "KERAS_NNX_ENABLED": "false",
    "MPLBACKEND": "agg",
}
DEFAULTS = {
    "TF_CPP_MIN_LOG_LEVEL": "3",
    # Take a GPU's memory as needed, so that two workers fit on one card.
    "TF_FORCE_GPU_ALLOW_GROWTH": "true",
    # By default, TensorFlow uses oneDNN only on CPUs with AVX-512; it speeds up others too.
    "TF_ENABLE_ONEDNN_OPTS": "1",
}
# These lower the precision, whatever --precision says.
REMOVED = ("ONEDNN_DEFAULT_FPMATH_MODE", "TF_SET_ONEDNN_FPMATH_MODE")
NO_HOME = os.devnull  # as HOME: nothing can be read or written below it
PROBE_BYTES = 1 << 16

log = logging.getLogger(__name__)


def settle() -> None:
    """Set the variables that libraries read at import, for this process and its children."""
    os.environ.update(SETTINGS)
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    for name in REMOVED:
        os.environ.pop(name, None)
    try:
        Path.home()
    except RuntimeError:  # else some libraries use a folder named ~ in the working directory
        os.environ["HOME"] = NO_HOME


def settle_caches() -> None:
    """Give Keras and Matplotlib cache directories of our own: the user's contain settings too."""
    os.environ["KERAS_HOME"] = str(cache_folder("keras"))
    os.environ["MPLCONFIGDIR"] = str(cache_folder("matplotlib"))


def import_matplotlib() -> Any:
    """Import `matplotlib` with its default settings."""
    settle_caches()
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns about `matplotlibrc` files
    matplotlib = import_module("matplotlib")
    matplotlib.rcdefaults()  # the working directory may hold a `matplotlibrc`
    import_module("matplotlib.figure")  # and its dependencies
    return matplotlib


def cache_folder(name: str = "") -> Path:
    """Return the cache directory, or its subdirectory `name`.

    It is `batchcap` in the user's cache directory, and may not exist yet. If that directory is
    unusable, full, or writable by other users, a private temporary directory is used instead, and a
    warning is logged once.
    """
    return _usable(platformdirs.user_cache_path("batchcap")) / name


def code_version(*parts: ModuleType | Path | str) -> str:
    """Hash the code of modules or files and the versions of installed packages, for cache keys."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            digest.update(f"{part} {version(part)}\n".encode())
        elif isinstance(part, Path):
            digest.update(part.read_bytes())
        else:
            digest.update(inspect.getsource(part).encode())
    return digest.hexdigest()


@functools.cache
def _usable(folder: Path) -> Path:
    problem = _problem_with(folder)
    if not problem:
        return folder
    if os.environ.get("HOME") == NO_HOME:
        problem = "this user has no home directory"
    temporary = _temporary_folder()
    log.warning(
        "using the cache directory %s: %s; set XDG_CACHE_HOME to a directory of your own",
        temporary,
        problem,
    )
    return temporary


def _problem_with(folder: Path) -> str:
    """Create a directory, and return why files cannot be kept in it; empty if they can."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        # Some caches are executed, or read by libraries that trust them.
        if status.st_uid not in (0, os.geteuid()) or status.st_mode & stat.S_IWOTH:
            return f"other users can write in {folder}"
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(PROBE_BYTES))
    except OSError as error:
        return f"cannot write in {folder} ({error.strerror or error})"
    return ""


def _temporary_folder() -> Path:
    """Return a temporary directory that only this user can enter.

    It is the same each time, unless another user created it. If there is no directory for temporary
    files, it is below `NO_HOME`, where nothing can be kept.
    """
    try:
        folder = Path(tempfile.gettempdir(), f"batchcap-{os.geteuid()}")
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            status = folder.lstat()
            is_private = stat.S_ISDIR(status.st_mode) and not status.st_mode & 0o077
            if status.st_uid != os.geteuid() or not is_private:
                return Path(tempfile.mkdtemp(prefix="batchcap-"))
        return folder
    except OSError:
        return Path(NO_HOME, "batchcap")
