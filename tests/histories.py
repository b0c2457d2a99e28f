"""Histories of an output: random runs, merges, kills, power cuts and failing stores, and a model.

The model knows each photo's versions and which rows were committed. After each step of a history
the output is read, as batchcap and as other programs read it, and compared with the model.

    python tests/histories.py --seed 0 --histories 5000
"""

import argparse
import errno
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import hypothesis
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from helpers.rows import METADATA, captioned_row
from helpers.simulated_kills import Death, Machine
from hypothesis import HealthCheck, Phase, given
from hypothesis import strategies as st

from batchcap.errors import BatchcapError, InputError, UsageError
from batchcap.rows import layout as layouts
from batchcap.rows.id_hashes import hashes_of, in_shard
from batchcap.rows.index import Known, newest_rows
from batchcap.rows.layout import Layout, layout_of
from batchcap.rows.merge import merge_captions
from batchcap.rows.parquet import Row, read_groups
from batchcap.rows.writer import CaptionFolder, open_captions
from batchcap.settings import MergeSettings, OnExisting
from batchcap.storage import remote
from batchcap.storage.files import make_folder

PHOTOS = tuple("abcdef")
BUCKET = "memory://bucket"
MEMORY = Path("/dev/shm")  # faster than a disk, which is simulated anyway
LEFTOVERS = (".tmp", ".lock", ".new", ".old", ".parts", ".damaged")
KINDS = FAILS, ANSWER_IS_LOST, REPEATED = "fails", "answer is lost", "repeated"


@dataclass(frozen=True)
class Fault:
    """What happens to one request to the store, by its number in the step; `kind` is of `KINDS`."""

    request: int
    kind: str


@dataclass(frozen=True)
class Run:
    """A run on one shard, before which photos have changed, come, or gone.

    The machine matters for outputs in a store.
    """

    changed: frozenset[str] = frozenset()
    removed: frozenset[str] = frozenset()
    shard: int = 0
    machine: int = 0
    rows_per_part: int = 3
    limit: int | None = None
    prune: bool = False
    overwrite: bool = False
    trouble: Death | Fault | None = None


@dataclass(frozen=True)
class Merge:
    """All shards are merged into a new output."""

    target: str = "merged.parquet"
    machine: int = 0
    trouble: Death | Fault | None = None


@dataclass(frozen=True)
class History:
    """An output, and what happens to it."""

    output: str
    is_in_store: bool
    shards: int
    steps: list[Run | Merge]


@dataclass
class Shard:
    """What the model knows of a shard.

    committed: the version of each row that must not be lost; a newer row may replace it.
    exists: a run has ended well.
    is_complete: the last run has, and saw all of the input.
    """

    committed: dict[str, int] = field(default_factory=dict)
    exists: bool = False
    is_complete: bool = False


class World:
    """The photos, the machines and the store of a history, and the model."""

    def __init__(self, history: History, root: Path, tally: Counter[str]) -> None:
        self.history, self.root, self.tally = history, root, tally
        self.machines = [Machine(root / f"machine-{number}") for number in range(2)]
        self.photos = dict.fromkeys(PHOTOS, 1)  # the versions that are in the input
        self.versions = Counter(PHOTOS)  # the newest that each photo ever had
        self.shards = [Shard() for _ in range(history.shards)]
        self.store = fsspec.filesystem("memory", use_listings_cache=False)
        self.store.store.clear()
        self.store.pseudo_dirs[:] = [""]

    def run(self, step: Run) -> None:
        """Do what `batchcap run` does, and check what it leaves."""
        self.versions.update(step.changed)
        self.photos |= {photo: self.versions[photo] for photo in sorted(step.changed)}
        self.photos = {p: v for p, v in self.photos.items() if p not in step.removed}
        number = step.shard % self.history.shards
        photos, shard = self._photos_of(number), self.shards[number]
        shard.is_complete = is_done = False
        on_existing = OnExisting.OVERWRITE if step.overwrite else OnExisting.RESUME
        with self._process(step) as store:
            try:
                layout = layout_of(self._output(step), (number, self.history.shards))
                if self.history.shards > 1:
                    make_folder(layout.output.parent)
                with open_captions(layout, METADATA, on_existing) as folder:
                    self._caption(folder, shard, step, photos)
                is_done = True
            except BatchcapError:
                if not store.has_failed:
                    raise
        seen = self._seen(number)
        current = self._check(shard, seen)
        if is_done:
            _check_done(step, photos, current, seen)
            shard.committed, shard.exists = current, True
            shard.is_complete = step.limit is None

    def merge(self, step: Merge) -> None:
        """Do what `batchcap merge` does, into an output that is new to its user; check it all."""
        self._remove_output(step)
        is_refusable = not (
            all(shard.is_complete for shard in self.shards)
            and any(shard.committed for shard in self.shards)
        )
        captions, target = self._output(step), self._output(step, step.target)
        is_done = False
        with self._process(step) as store:
            try:
                merge_captions(MergeSettings(captions=captions, output=target))
                is_done = True
            except BatchcapError as error:
                is_refusal = isinstance(error, InputError | UsageError)
                if not store.has_failed and not (is_refusal and is_refusable):
                    raise
        rows: dict[str, int] = {}
        for number, shard in enumerate(self.shards):
            rows |= self._check(shard, self._seen(number))
        self._check_merged(step.target, rows, is_done)

    def _caption(
        self, folder: CaptionFolder, shard: Shard, step: Run, photos: dict[str, int]
    ) -> None:
        """Commit rows of the photos that need one, as `batchcap run` does."""
        due = []
        for photo, version in photos.items():
            row = folder.index.find(photo)
            if row is not None:
                folder.index.mark_seen(row)
            if row is None or folder.index.compare(row, version, version) is Known.CHANGED:
                due.append(photo)
        due = due[: step.limit]
        if step.overwrite:
            shard.committed.clear()
        for start in range(0, len(due), step.rows_per_part):
            part = {photo: photos[photo] for photo in due[start : start + step.rows_per_part]}
            folder.append([row_of(photo, version) for photo, version in part.items()])
            folder.commit()
            if not (self.history.is_in_store and folder.layout.is_file):  # there, only at the end
                shard.committed |= part
            folder.drop_superseded()
        if step.prune and step.limit is None:
            folder.prune()
            for photo in shard.committed.keys() - photos.keys():
                del shard.committed[photo]
        folder.finish(complete=step.limit is None)

    def _check(self, shard: Shard, layout: Layout) -> dict[str, int]:
        """See that no row is lost, doubled or wrong, and that all files are whole.

        Returns the version of each photo, as batchcap reads it.
        """
        current, by_others = read_by_batchcap(layout), read_by_others(layout)
        lost = shard.committed.keys() - by_others.keys()
        assert not lost, f"photos without a row: {lost}"
        assert layout.output.exists() or not (shard.exists and layout.is_file)
        for photo, version in shard.committed.items():
            assert current.get(photo, 0) >= version, f"no row of {photo}, or an old one"
        for photo, versions in by_others.items():
            assert {*versions} <= {*range(1, self.versions[photo] + 1)}, f"no such row of {photo}"
        for manifest in layout.output.parent.glob(".*manifest.json"):
            json.loads(manifest.read_text(encoding="utf-8"))
        return current

    def _check_merged(self, target: str, rows: dict[str, int], is_done: bool) -> None:
        """See that a merged output has all rows; if the merge was not finished, all or none."""
        layout = Layout(self._view() / target)
        merged = read_by_batchcap(layout)
        if is_done:
            assert merged == rows
            assert not leftovers(layout)
        elif self.history.is_in_store and not layout.is_file:  # it grows part by part
            assert merged.items() <= rows.items()
        else:
            assert merged in (rows, {})

    def machine_of(self, step: Run | Merge) -> Machine:
        """The computer that does a step; files here are on one alone."""
        return self.machines[step.machine if self.history.is_in_store else 0]

    def _photos_of(self, number: int) -> dict[str, int]:
        mine = in_shard(hashes_of([*self.photos]), number, self.history.shards).tolist()
        return {p: v for (p, v), is_mine in zip(self.photos.items(), mine, strict=True) if is_mine}

    def _output(self, step: Run | Merge, name: str | None = None) -> Path | str:
        name = name or self.history.output
        return f"{BUCKET}/{name}" if self.history.is_in_store else self.machine_of(step).root / name

    def _view(self) -> Path:
        """The folder of the outputs; of those in the store, a copy."""
        if not self.history.is_in_store:
            return self.machines[0].root
        copy = Path(tempfile.mkdtemp(dir=self.root))
        for name, content in self.store.store.items():
            path = copy / name.removeprefix("/bucket/")
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_bytes(content.getvalue())
        return copy

    def _seen(self, number: int) -> Layout:
        """A shard as readers find it."""
        return layout_of(self._view() / self.history.output, (number, self.history.shards))

    def _remove_output(self, step: Merge) -> None:
        if self.history.is_in_store:
            for path in [path for path in self.store.store if f"/{step.target}" in path]:
                self.store.rm_file(path)
        elif (target := self.machine_of(step).root / step.target).is_dir():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)

    @contextmanager
    def _process(self, step: Run | Merge) -> Iterator["UnreliableStore"]:
        """What happens in the block is done by one process, which has the step's trouble."""
        machine, trouble = self.machine_of(step), step.trouble
        store = UnreliableStore(
            self.store, machine, trouble if isinstance(trouble, Fault) else None
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layouts, "cache_folder", lambda name: machine.root / name)
            patch.setattr(
                remote, "_store_and_path", lambda _, url: (store, url.removeprefix("memory:/"))
            )
            with machine.process(trouble if isinstance(trouble, Death) else None):
                yield store
        self.tally["kills"] += machine.is_dead
        self.tally["power cuts"] += machine.is_dead and trouble.power_cut is not None
        self.tally["failed requests"] += store.has_failed


class UnreliableStore:
    """A store in memory, one request to which fails, loses its answer, or is repeated.

    has_failed: whether that has happened.
    """

    def __init__(self, store: MemoryFileSystem, machine: Machine, fault: Fault | None) -> None:
        self.has_failed = False
        self._store, self._machine, self._fault = store, machine, fault
        self._requests = 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """A method of the store, which makes one request."""
        return partial(self._request, name)

    def _request(self, name: str, *arguments: Any, **options: Any) -> Any:
        if name in ("put_file", "rm_file"):
            self._machine.change()
        number, self._requests = self._requests, self._requests + 1
        fault = self._fault if self._fault and self._fault.request == number else None
        self.has_failed |= fault is not None
        if fault and fault.kind == FAILS:
            raise OSError(errno.ECONNRESET, "connection reset")
        method = getattr(self._store, name)
        answer = method(*arguments, **options)
        if fault and fault.kind == REPEATED:
            answer = method(*arguments, **options)
        if fault and fault.kind == ANSWER_IS_LOST:
            raise OSError(errno.ETIMEDOUT, "no answer")
        return answer


def row_of(photo: str, version: int) -> Row:
    """The row of a version of a photo."""
    return captioned_row(photo, f"{photo}{version}", file_size=version, mtime_ns=version)


def read_by_batchcap(layout: Layout) -> dict[str, int]:
    """The version of each photo that batchcap reads; every row must be whole, and the only one."""
    versions: dict[str, int] = {}
    for table in newest_rows(layout.row_files()):
        for row in table.to_pylist():
            photo, version = row["image_id"], row["mtime_ns"]
            assert photo not in versions, f"two rows of {photo}"
            assert row == row_of(photo, version)
            versions[photo] = version
    return versions


def read_by_others(layout: Layout) -> dict[str, list[int]]:
    """The versions of each photo that other programs read, in all files of rows."""
    versions: dict[str, list[int]] = {}
    paths = {*layout.row_files(), layout.output} if layout.is_file else layout.row_files()
    for path in filter(Path.exists, paths):
        for table in read_groups(path, ["image_id", "mtime_ns"]):
            for row in table.to_pylist():
                versions.setdefault(row["image_id"], []).append(row["mtime_ns"])
    return versions


def _check_done(step: Run, photos: dict[str, int], rows: dict[str, int], layout: Layout) -> None:
    """See that a run that ended well has left the newest rows, once, and nothing else."""
    assert read_by_others(layout) == {photo: [version] for photo, version in rows.items()}
    if step.limit is None:
        assert photos.items() <= rows.items()
        assert photos.keys() == rows.keys() or not step.prune
    assert not leftovers(layout)


def leftovers(layout: Layout) -> list[Path]:
    """Files of an output that must not outlive a run or a merge."""
    beside = layout.output.parent.glob(f".{layout.output.name}.*")
    paths = [*beside, *layout.output.rglob("*")]
    return [path for path in paths if path.name.endswith(LEFTOVERS)]


def histories() -> st.SearchStrategy[History]:
    """Histories of all kinds; the simplest is a run on a local file."""
    some_photos = st.frozensets(st.sampled_from(PHOTOS))
    changes = st.integers(0, 60) | st.integers(0, 200)  # a whole run makes some 40 to 200
    deaths = st.builds(Death, changes, st.none() | st.integers(0, 999))
    faults = st.builds(Fault, st.integers(0, 50), st.sampled_from(KINDS))
    troubles = st.none() | deaths | deaths | deaths | faults
    machines = st.integers(0, 1)
    runs = st.builds(
        Run,
        changed=some_photos,
        removed=st.just(frozenset()) | some_photos,
        shard=st.integers(0, 1),
        machine=machines,
        rows_per_part=st.integers(1, 3),
        limit=st.none() | st.integers(1, 3),
        prune=st.booleans(),
        overwrite=st.sampled_from([False] * 4 + [True]),
        trouble=troubles,
    )
    targets = st.sampled_from(["merged.parquet", "merged"])
    merges = st.builds(Merge, targets, machine=machines, trouble=troubles)
    return st.builds(
        History,
        output=st.sampled_from(["out.parquet", "out"]),
        is_in_store=st.booleans(),
        shards=st.integers(1, 2),
        steps=st.lists(runs | runs | runs | merges, min_size=2, max_size=6),
    )


def play(history: History, tally: Counter[str]) -> list[bool]:
    """Live through a history, and see that one more run makes everything whole.

    Counts in `tally` what has happened. Returns which of the steps were killed.
    """
    killed = []
    last = [Run(shard=number) for number in range(history.shards)]
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as root:
        world = World(history, Path(root), tally)
        for step in [*history.steps, *last]:
            if isinstance(step, Run):
                world.run(step)
            else:
                world.merge(step)
            killed.append(world.machine_of(step).is_dead)
            tally["steps"] += 1
    tally["histories"] += 1
    return killed[: len(history.steps)]


def search(seed: int, count: int, tally: Counter[str]) -> None:
    """Play random histories; raises the error of the shortest that fails, which is printed."""

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=[*HealthCheck],
    )
    @given(histories())
    def play_one(history: History) -> None:
        play(history, tally)

    play_one()


def main() -> None:
    """Play as many histories as the command line says, and print what has happened in them."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--histories", type=int, default=1000)
    arguments = parser.parse_args()
    tally = Counter[str]()
    try:
        search(arguments.seed, arguments.histories, tally)
    finally:
        print(f"seed {arguments.seed}:", ", ".join(f"{n} {name}" for name, n in tally.items()))


if __name__ == "__main__":
    main()
