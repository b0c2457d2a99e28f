"""Kills and power cuts within the test's process, at any change of a file. Knows no rows."""

import builtins
import io
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
REAL = {name: getattr(os, name) for name in ("open", "replace", "unlink", "mkdir", "rmdir", "link")}
REAL_OPEN = open


class Killed(BaseException):
    """The simulated process is dead: nothing that its code still does changes a file."""


@dataclass(frozen=True)
class Death:
    """The process dies after `changes` file changes, before the next one.

    With `power_cut`, the machine dies too; the number is the RNG seed for the unsynced data lost.
    """

    changes: int
    power_cut: int | None = None


@dataclass(frozen=True)
class NameChange:
    """A name that was made, removed or moved, and its file before."""

    path: Path
    source: Path | None = None  # the name that it had before
    kept: Path | None = None  # a link to the file that had the name before

    def undo(self) -> None:
        """Give the names their earlier meaning."""
        if self.source is not None:
            with suppress(FileNotFoundError):
                REAL["replace"](self.path, self.source)
        elif self.path.is_dir():
            shutil.rmtree(self.path)
        else:
            self.path.unlink(missing_ok=True)
        if self.kept is not None:
            self.path.parent.mkdir(exist_ok=True)
            REAL["link"](self.kept, self.path)

    def moved(self, old: Path, new: Path) -> "NameChange":
        """The same change, after a folder was renamed."""

        def at(path: Path | None) -> Path | None:
            return new / path.relative_to(old) if path and path.is_relative_to(old) else path

        return replace(self, path=at(self.path), source=at(self.source))


class Machine:
    """A computer whose files are in `root`, with a record of what has reached the disk.

    `changes` counts the file changes of its last process; `is_dead` is True if that was killed.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.changes = 0
        self.is_dead = False
        self._death: Death | None = None
        self._kept = root.with_name(f"{root.name}.kept")
        self._numbers = count()
        self._unsynced: list[NameChange] = []
        self._synced_sizes: dict[int, int] = {}  # by inode, of files that processes have written
        root.mkdir()
        self._kept.mkdir()

    @contextmanager
    def process(self, death: Death | None) -> Iterator[None]:
        """Run the block as a process that may die; its descriptors are closed by its own code."""
        self.changes, self.is_dead, self._death = 0, False, death
        with pytest.MonkeyPatch.context() as patch:
            for name in ("open", "replace", "unlink", "mkdir", "rmdir", "link", "fsync"):
                patch.setattr(os, name, getattr(self, f"_{name}"))
            patch.setattr(os, "rename", self._replace)
            patch.setattr(os, "remove", self._unlink)
            for module in (io, builtins):
                patch.setattr(module, "open", self._open_file)
            with suppress(Killed):
                yield
        if self.is_dead and death is not None and death.power_cut is not None:
            self._cut_power(random.Random(death.power_cut))

    def change(self) -> None:
        """Count a change that is about to happen.

        Raises:
            Killed: the process has died before it.
        """
        self.is_dead |= self._death is not None and self.changes >= self._death.changes
        if self.is_dead:
            raise Killed
        self.changes += 1

    def _cut_power(self, rng: random.Random) -> None:
        """Undo the last unsynced changes in each folder, and cut off the unsynced ends of files."""
        counts = Counter(change.path.parent for change in self._unsynced)
        lost = {folder: rng.randint(0, number) for folder, number in counts.items()}
        for change in reversed(self._unsynced):
            if lost[change.path.parent]:
                lost[change.path.parent] -= 1
                change.undo()
        for path in sorted(self.root.rglob("*")):
            status = path.stat()
            synced = self._synced_sizes.get(status.st_ino, status.st_size)
            if path.is_file() and synced < status.st_size:
                os.truncate(path, rng.randint(synced, status.st_size))
        self._unsynced.clear()
        self._synced_sizes.clear()

    def _place(self, path: Any, folder: int | None = None) -> Path:
        """Return a path that may be relative to an opened folder."""
        return Path("" if folder is None else path_of(folder), path)

    def _is_here(self, path: Any) -> bool:
        return isinstance(path, str | Path) and self._place(path).is_relative_to(self.root)

    def _keep(self, path: Path) -> Path | None:
        """Make another link to a file, so that a power cut can restore it."""
        if not path.is_file():
            return None
        kept = self._kept / f"{next(self._numbers)}"
        REAL["link"](path, kept)
        return kept

    def _open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        place = self._place(path, dir_fd)
        if not flags & WRITING or not self._is_here(place):
            return REAL["open"](path, flags, mode, dir_fd=dir_fd)
        self.change()
        is_new = not place.exists()
        descriptor = REAL["open"](place, flags, mode)
        if is_new:
            self._unsynced.append(NameChange(place))
        if is_new or flags & os.O_TRUNC:
            self._synced_sizes[os.fstat(descriptor).st_ino] = 0
        return descriptor

    def _open_file(
        self,
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Callable[[str, int], int] | None = None,
    ) -> Any:
        if not set(mode) & set("wax") or not self._is_here(file):
            return REAL_OPEN(file, mode, buffering, encoding, errors, newline, closefd, opener)
        binary = io.BufferedWriter(_WrittenFile(self, file, mode))
        return binary if "b" in mode else io.TextIOWrapper(binary, encoding, errors, newline)

    def _replace(self, source: Any, target: Any) -> None:
        self.change()
        source, target = Path(source), Path(target)
        kept = self._keep(target)
        is_folder = source.is_dir()
        REAL["replace"](source, target)
        if is_folder:
            self._unsynced = [change.moved(source, target) for change in self._unsynced]
        self._unsynced.append(NameChange(target, source, kept))

    def _unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        self.change()
        place = self._place(path, dir_fd)
        kept = self._keep(place)
        REAL["unlink"](place)
        self._unsynced.append(NameChange(place, kept=kept))

    def _mkdir(self, path: Any, mode: int = 0o777) -> None:
        self.change()
        REAL["mkdir"](path, mode)
        self._unsynced.append(NameChange(Path(path)))

    def _rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        self.change()
        REAL["rmdir"](path, dir_fd=dir_fd)

    def _link(self, source: Any, target: Any) -> None:
        self.change()
        REAL["link"](source, target)
        self._unsynced.append(NameChange(Path(target)))

    def _fsync(self, descriptor: int) -> None:
        self.change()
        status, path = os.fstat(descriptor), path_of(descriptor)
        if path.is_dir():
            self._unsynced = [change for change in self._unsynced if change.path.parent != path]
        else:
            self._synced_sizes[status.st_ino] = status.st_size


class _WrittenFile(io.FileIO):
    """A file whose writes count as changes; those of a dead process have no effect."""

    def __init__(self, machine: Machine, path: Any, mode: str) -> None:
        super().__init__(path, mode.replace("b", ""), opener=machine._open)
        self._machine = machine

    def write(self, data: Any) -> int:
        if self._machine.is_dead:
            return len(data)
        self._machine.change()
        return super().write(data)


def path_of(descriptor: int) -> Path:
    """The current path of an opened file or folder."""
    return Path(f"/proc/self/fd/{descriptor}").readlink()
