"""A crash at any step of a commit loses no committed row and duplicates none."""

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from helpers.outputs import (
    OVERWRITE,
    Disk,
    Killed,
    ids_of,
    opened,
    rows_of,
    run,
    stop_before_the_end,
)
from helpers.rows import captioned_row
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from batchcap.errors import OutputError
from batchcap.rows.layout import Layout
from batchcap.rows.writer import CaptionFolder
from batchcap.storage.files import replacing


def test_failed_cleanup_is_an_output_error(file, monkeypatch):
    """A bare OSError gave a traceback, although all rows were in place."""
    stop_before_the_end(file, [captioned_row(1)])

    def refuse(_self: Path, _target: Path) -> Path:
        raise OSError(5, "Input/output error")

    with opened(file) as captions:
        monkeypatch.setattr(Path, "rename", refuse)
        with pytest.raises(OutputError, match="Input/output error"):
            captions.finish()
        monkeypatch.undo()
    run(file)
    assert ids_of(file) == ["1"]
    assert not file.parts.exists()


def test_old_file_is_copied_without_hard_links(file, monkeypatch):
    def refuse(*_paths: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    run(file, [captioned_row(1)])
    monkeypatch.setattr(os, "link", refuse)
    stop_before_the_end(file, [captioned_row(2)])
    assert ids_of(file) == ["1", "2"]
    run(file)
    assert ids_of(file) == ["1", "2"]


class Crashes(RuleBasedStateMachine):
    """Any sequence of runs, with failures and kills at any change of names, compared with a dict.

    `there` has the content of each image that the output must have from now on.
    """

    layout_name = ""

    def __init__(self) -> None:
        super().__init__()
        self._tmp = Path(tempfile.mkdtemp())
        self.layout = Layout(self._tmp / self.layout_name)
        self.disk = Disk()
        self.stack = ExitStack()
        self.captions: CaptionFolder | None = None
        self.there: dict[str, str] = {}
        self.appended: dict[str, str] = {}
        self.done: set[str] = set()  # in this run
        self.count = 0

    def teardown(self) -> None:
        self.disk.countdown = None
        self._leave()
        self._finish_undisturbed()
        self.disk.close()
        shutil.rmtree(self._tmp)

    def _leave(self) -> None:
        self.stack.close()
        self.disk.dead = False
        self.captions, self.appended, self.done = None, {}, set()

    def _finish_undisturbed(self) -> None:
        """Check that one undisturbed run completes the output, whatever happened before."""
        with opened(self.layout) as captions:
            wanted = dict.fromkeys("abcdefg", "end")
            new = [
                captioned_row(image_id, content)
                for image_id, content in wanted.items()
                if self.there.get(image_id) != content
            ]
            captions.append(new)
            captions.finish()
        found = {row["image_id"]: row["caption"] for row in rows_of(self.layout)}
        assert len(rows_of(self.layout)) == len(found)
        assert found == dict.fromkeys("abcdefg", "一只end")
        assert self.layout.is_file != self.layout.parts.is_dir()

    def _trying(self, step: Callable[[], object], countdown: int | None, killed: bool) -> bool:
        """Return whether the step succeeded; if not, the run is over."""
        self.disk.countdown, self.disk.killed = countdown, killed
        try:
            step()
        except (OutputError, OSError, Killed) as error:
            if countdown is None or not (killed or isinstance(error, OutputError)):
                raise
            self.disk.countdown = None
            lost = set(self.appended)
            self._leave()
            self._look(may_lack=lost)
            return False
        self.disk.countdown = None
        return True

    def _look(self, may_lack: set[str] | None = None) -> None:
        """Check that the output has all committed rows; those of `may_lack` may be missing."""
        rows = rows_of(self.layout)
        found = {row["image_id"]: row["caption"].removeprefix("一只") for row in rows}
        assert len(found) == len(rows), "an image has two rows"
        if may_lack is None:
            assert found == self.there
        for image_id, content in self.there.items():
            if image_id not in (may_lack or ()):
                assert found.get(image_id) == content
        assert found.keys() <= self.there.keys() | (may_lack or set())
        self.there = found

    FAILURES = st.one_of(st.none(), st.integers(0, 25))

    @precondition(lambda self: self.captions is None)
    @rule(countdown=FAILURES, killed=st.booleans())
    def open(self, countdown: int | None, killed: bool) -> None:
        def step() -> None:
            self.captions = self.stack.enter_context(opened(self.layout))

        if self._trying(step, countdown, killed):
            index = self.captions.index
            assert len(index) == len(self.there)
            assert all(index.find(image_id) is not None for image_id in self.there)

    @precondition(lambda self: self.captions is not None)
    @rule(image_ids=st.sets(st.sampled_from("abcdefg"), min_size=1))
    def append(self, image_ids: set[str]) -> None:
        image_ids -= self.done
        self.count += 1
        self.done |= image_ids
        self.appended |= dict.fromkeys(image_ids, f"v{self.count}")
        rows = [captioned_row(image_id, f"v{self.count}") for image_id in sorted(image_ids)]
        self.captions.append(rows)

    @precondition(lambda self: self.captions is not None)
    @rule(countdown=FAILURES, killed=st.booleans())
    def commit(self, countdown: int | None, killed: bool) -> None:
        if self._trying(self.captions.commit, countdown, killed):
            self.there |= self.appended
            self.appended = {}

    @precondition(lambda self: self.captions is not None)
    @rule(gone=st.sets(st.sampled_from("abcdefg")), countdown=FAILURES, killed=st.booleans())
    def end(self, gone: set[str], countdown: int | None, killed: bool) -> None:
        """End like a run: commit, prune, finish."""
        gone -= self.done
        index = self.captions.index
        for image_id in self.there.keys() - gone:
            row = index.find(image_id)
            if row is not None:
                index.mark_seen(row)

        def step() -> None:
            self.captions.commit()
            self.captions.prune()
            self.captions.finish()

        before = self.appended
        self.appended = before | dict.fromkeys(gone & self.there.keys(), "")
        if self._trying(step, countdown, killed):
            self.there = {k: v for k, v in (self.there | before).items() if k not in gone}
            self._leave()
            assert self.layout.is_file != self.layout.parts.is_dir()

    @precondition(lambda self: self.captions is not None)
    @rule()
    def stop(self) -> None:
        self._leave()

    @invariant()
    def each_image_has_the_row_it_must_have(self) -> None:
        self._look()


def crashes_of(name: str) -> Any:
    machine: Any = type("Case", (Crashes,), {"layout_name": name})
    case = machine.TestCase
    case.settings = settings(
        max_examples=25,
        stateful_step_count=15,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    return case


TestCrashesOfOneFile = crashes_of("out.parquet")


TestCrashesOfAFolder = crashes_of("out")


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("name", ["out.parquet", "out"])
def test_next_run_repairs_a_failure_at_each_change_of_names(name, killed, tmp_path):
    """The second run, with a new, a changed and a vanished image, fails at its n-th change for
    every n; a third run resumes.
    """

    def second(layout: Layout) -> None:
        with opened(layout) as captions:
            for image_id in wanted:
                row = captions.index.find(image_id)
                if row is not None:
                    captions.index.mark_seen(row)
            missing = [i for i in ("same", "new") if captions.index.find(i) is None]
            captions.append([captioned_row(i, i) for i in missing])
            captions.append([captioned_row("changed", "new bytes")])
            captions.commit()
            captions.prune()
            captions.finish()

    wanted = {"same": "一只same", "changed": "一只new bytes", "new": "一只new"}
    disk = Disk()
    try:
        for number in range(200):
            layout = Layout(tmp_path / str(number) / name)
            layout.output.parent.mkdir()
            run(layout, [captioned_row(i, i) for i in ("same", "changed", "vanished")])
            disk.countdown, disk.killed = number, killed
            failed = False
            try:
                second(layout)
            except (OutputError, Killed):
                failed = True
            undisturbed = disk.countdown is not None
            disk.countdown, disk.dead = None, False
            ids = ids_of(layout)
            assert len(set(ids)) == len(ids)
            assert "same" in ids
            second(layout)
            rows = rows_of(layout)
            assert {row["image_id"]: row["caption"] for row in rows} == wanted
            assert len(rows) == len(wanted)
            if undisturbed:
                assert not failed
                assert number > 8
                return
    finally:
        disk.close()
    pytest.fail("the changes never end")


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("name", ["out.parquet", "out"])
def test_a_failure_while_replacing_an_output_leaves_no_mixture(name, killed, tmp_path):
    """Rows of the old and of the new output are of different models."""
    disk, other = Disk(), {"batchcap.model": "def"}
    try:
        for number in range(100):
            layout = Layout(tmp_path / str(number) / name)
            layout.output.parent.mkdir()
            run(layout, [captioned_row(1, "old")], [captioned_row(2, "old")])
            disk.countdown, disk.killed = number, killed
            with suppress(OutputError, Killed), opened(layout, OVERWRITE, **other) as captions:
                captions.append([captioned_row(1, "new")])
                captions.commit()
                captions.append([captioned_row(2, "new")])
                captions.finish()
            undisturbed = disk.countdown is not None
            disk.countdown, disk.dead = None, False
            assert len({row["caption"] for row in rows_of(layout)}) <= 1
            if undisturbed:
                assert number > 8
                return
            with opened(layout, OVERWRITE, **other) as captions:
                captions.append([captioned_row(1, "end"), captioned_row(2, "end")])
                captions.finish()
            assert [row["caption"] for row in rows_of(layout)] == ["一只end"] * 2
    finally:
        disk.close()
    pytest.fail("the changes never end")


def test_temporary_file_of_another_output_is_kept(tmp_path):
    """One output's name may begin with that of another in the same folder."""
    with replacing(tmp_path / "out.parquet.old.parquet") as temporary:
        temporary.touch()
        run(Layout(tmp_path / "out.parquet"), [captioned_row(1)])
        assert temporary.exists()
