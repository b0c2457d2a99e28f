"""Helpers of the writer tests."""

import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from helpers.rows import METADATA

from batchcap.rows.index import newest_rows
from batchcap.rows.layout import Layout
from batchcap.rows.parquet import Row
from batchcap.rows.writer import open_captions
from batchcap.settings import OnExisting

RESUME, OVERWRITE, ERROR = OnExisting.RESUME, OnExisting.OVERWRITE, OnExisting.ERROR


def opened(layout: Layout, on_existing: OnExisting = RESUME, **identity: str) -> Any:
    return open_captions(layout, METADATA | identity, on_existing)


def run(layout: Layout, *parts: list[Row], on_existing: OnExisting = RESUME) -> None:
    """A run that commits each of these lists of rows as a part."""
    with opened(layout, on_existing) as captions:
        for rows in parts:
            captions.append(rows)
            captions.commit()
        captions.finish()


def stop_before_the_end(layout: Layout, *parts: list[Row]) -> None:
    with opened(layout) as captions:
        for rows in parts:
            captions.append(rows)
            captions.commit()


def rows_of(layout: Layout) -> list[Row]:
    """The rows as batchcap reads them."""
    return [row for table in newest_rows(layout.row_files()) for row in table.to_pylist()]


def ids_of(layout: Layout) -> list[str]:
    return [row["image_id"] for row in rows_of(layout)]


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class Killed(BaseException):
    """Caught by no code: from here on, the process is dead."""


class Disk:
    """Fails, or kills the process, at the `countdown`-th change of names from now on."""

    def __init__(self) -> None:
        self.countdown: int | None = None
        self.killed = self.dead = False
        self._stack = ExitStack()
        patch = pytest.MonkeyPatch()
        self._stack.callback(patch.undo)
        for owner, name in (
            *((Path, name) for name in ("replace", "rename", "mkdir", "unlink", "touch")),
            (os, "link"),
        ):
            patch.setattr(owner, name, self._counted(getattr(owner, name)))
        patch.setattr(os, "fsync", self._counted(lambda _descriptor: None))  # for speed
        patch.setattr("shutil.rmtree", self._counted(shutil.rmtree))
        patch.setattr("shutil.copyfile", self._counted(shutil.copyfile))

    def _counted(self, change: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            if self.dead:
                return None  # a `finally` that a dead process would not run
            if self.countdown is not None:
                self.countdown -= 1
                if self.countdown < 0:
                    self.countdown = None
                    if self.killed:
                        self.dead = True
                        raise Killed
                    raise OSError(28, "No space left on device")
            return change(*arguments, **options)

        return counted

    def close(self) -> None:
        self._stack.close()
