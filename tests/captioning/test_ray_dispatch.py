"""Runs on Ray without its dispatch: real workers, whose answers arrive in a given order."""

import io
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers.commands import batchcap_here
from helpers.shard_files import write_tar
from PIL import Image

from batchcap.captioning.arrivals import Piece
from batchcap.captioning.local_engine import CaptionWorker
from batchcap.captioning.options import WorkerSettings
from batchcap.captioning.ray_engine import Answer, RayWorker
from batchcap.captioning.run import run_captioning
from batchcap.process.signals import Stopped
from batchcap.rows import layout as layouts
from batchcap.rows.index import RowIndex
from batchcap.settings import Engine, RunSettings

Order = Callable[[list[list[Answer]]], Iterator[Answer]]  # orders the answers of pieces


def in_turn(answers: list[list[Answer]]) -> Iterator[Answer]:
    for of_piece in answers:
        yield from of_piece


def last_first(answers: list[list[Answer]]) -> Iterator[Answer]:
    yield from in_turn(answers[::-1])


def rows_before_tallies(answers: list[list[Answer]]) -> Iterator[Answer]:
    """Yield rows of later archives first, then tallies of earlier archives first."""
    for *rows, _ in answers[::-1]:
        yield from rows
    for *_, tally in answers:
        yield tally


@contextmanager
def worker_of(
    settings: RunSettings, wanted: WorkerSettings, index: RowIndex
) -> Iterator[RayWorker]:
    """Start a worker as Ray would, with a copy of the index."""
    worker = RayWorker.__new__(RayWorker)
    worker.settings, worker.index = settings, pickle.loads(pickle.dumps(index))
    with closing(CaptionWorker(wanted, 1)) as worker.worker:
        yield worker


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> Callable[[Order], None]:
    """Return a function that sets the order of answers."""

    def dispatch(order: Order) -> None:
        def loop(pieces: Sequence[Piece], *settings: Any) -> Iterator[Answer]:
            with worker_of(*settings) as worker:
                answers = [[*worker.answers(piece)] for piece in pieces]
            yield from map(pickle.loads, map(pickle.dumps, order(answers)))

        monkeypatch.setattr("batchcap.captioning.ray_engine.run_on_ray", loop)

    return dispatch


def photo(shade: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((32, 32, 3), shade, np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def duplicates(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return two archives, both with `same.png`, `bad.png` and `copy.png`, as INPUT."""
    folder = tmp_path_factory.mktemp("archives")
    for number in range(2):
        members = [
            (f"{number}.png", photo(number)),
            ("same.png", photo(10 + number)),
            ("bad.png", [b"no photo", photo(20)][number]),
            ("copy.png", photo(30)),
        ]
        write_tar(folder / f"{number}.tar", members)
    return f"{folder}/{{0..1}}.tar"


def ray_run(source: object, output: object, *flags: object) -> Any:
    return batchcap_here("run", source, output, "--engine", "ray", "--batch-size", 2, *flags)


def sums_of(output: Path) -> dict[str, str]:
    rows = pq.read_table(output, columns=["image_id", "sha256"]).to_pylist()
    assert len({row["image_id"] for row in rows}) == len(rows)
    return {row["image_id"]: row["sha256"] for row in rows}


def files_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Return inode and time of each file except the summary."""
    return {
        str(path): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and "summary" not in path.name
    }


@pytest.fixture(scope="module")
def of_one_machine(duplicates: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    output = tmp_path_factory.mktemp("local") / "o.parquet"
    done = batchcap_here("run", duplicates, output, "--batch-size", 2)
    assert done.returncode == 1
    assert "has the id of an earlier photo" in done.stderr
    return sums_of(output)


@pytest.mark.parametrize("order", [in_turn, last_first, rows_before_tallies])
@pytest.mark.parametrize("name", ["o", "o.parquet"])
def test_an_id_in_two_archives_has_the_row_of_the_first_at_every_run(
    order: Order,
    name: str,
    duplicates: str,
    of_one_machine: dict[str, str],
    dispatched: Callable[[Order], None],
    tmp_path: Path,
) -> None:
    dispatched(order)
    output = tmp_path / name
    for number in range(3):
        before = files_of(tmp_path)
        done = ray_run(duplicates, output, "--rows-per-part", 2)
        assert done.returncode == 1
        assert "has the id of an earlier photo" in done.stderr
        assert "3 photos of" in done.stderr
        assert sums_of(output) == of_one_machine
        if number:
            assert files_of(tmp_path) == before


@pytest.mark.parametrize("order", [in_turn, last_first, rows_before_tallies])
def test_the_row_of_a_later_archive_is_replaced(
    order: Order,
    duplicates: str,
    of_one_machine: dict[str, str],
    dispatched: Callable[[Order], None],
    tmp_path: Path,
) -> None:
    assert batchcap_here("run", duplicates.replace("0..1", "1..1"), tmp_path / "o").returncode == 0
    dispatched(order)
    done = ray_run(duplicates, tmp_path / "o")
    assert done.returncode == 1
    assert "3 photos of" in done.stderr
    assert sums_of(tmp_path / "o") == of_one_machine


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of three photos."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for shade in range(3):
        (folder / f"{shade}.png").write_bytes(photo(shade))
    return folder


@pytest.mark.parametrize("name", ["o", "o.parquet"])
def test_a_run_with_nothing_to_do_writes_nothing(
    name: str, folder: Path, dispatched: Callable[[Order], None], tmp_path: Path
) -> None:
    dispatched(in_turn)
    assert ray_run(folder, tmp_path / name).returncode == 0
    before = files_of(tmp_path)
    done = ray_run(folder, tmp_path / name)
    assert done.returncode == 0
    assert "3 found, 0 captioned, 0 failed, 3 already done; " in done.stdout
    assert files_of(tmp_path) == before


def test_prune_drops_rows_of_vanished_photos(
    folder: Path, dispatched: Callable[[Order], None], tmp_path: Path
) -> None:
    dispatched(in_turn)
    assert ray_run(folder, tmp_path / "o").returncode == 0
    (folder / "0.png").unlink()
    done = ray_run(folder, tmp_path / "o", "--prune")
    assert "2 already done, 1 vanished (1 dropped)" in done.stdout
    assert sums_of(tmp_path / "o").keys() == {"1.png", "2.png"}


def test_a_run_with_nothing_to_do_leaves_the_store_alone(
    folder: Path,
    dispatched: Callable[[Order], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layouts, "cache_folder", lambda name: tmp_path / "cache" / name)
    store = fsspec.filesystem("memory", use_listings_cache=False)
    store.store.clear()
    dispatched(in_turn)
    assert ray_run(folder, "memory://bucket/o").returncode == 0

    def files() -> dict[str, Any]:
        return {name: file.modified for name, file in store.store.items() if "summary" not in name}

    before = files()
    assert len(before) == 3  # a part, the mark and the manifest
    assert ray_run(folder, "memory://bucket/o").returncode == 0
    assert files() == before
    store.store.clear()


def test_answers_without_rows_do_not_end_a_run(
    folder: Path,
    dispatched: Callable[[Order], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("batchcap.captioning.ray_engine.PHOTOS_PER_PIECE", 2)
    dispatched(in_turn)
    assert ray_run(folder, tmp_path / "o").returncode == 0
    (folder / "new.png").write_bytes(photo(9))
    monkeypatch.setattr("batchcap.process.progress.SECONDS_BETWEEN_LINES", 0.0)
    done = ray_run(folder, tmp_path / "o")
    assert done.returncode == 0, done.stderr
    assert "captioning: 0 of " in done.stderr


def test_stopped_run_commits_waiting_rows(
    duplicates: str, dispatched: Callable[[Order], None], tmp_path: Path
) -> None:
    assert batchcap_here("run", duplicates.replace("0..1", "1..1"), tmp_path / "o").returncode == 0
    folder = Path(duplicates).parent
    other = tmp_path / "archives"
    other.mkdir()
    (other / "0.tar").write_bytes((folder / "0.tar").read_bytes())
    write_tar(other / "1.tar", [("1.png", photo(99))])

    def stopped(answers: list[list[Answer]]) -> Iterator[Answer]:
        os.kill(os.getpid(), signal.SIGTERM)
        yield from answers[1]
        raise AssertionError("asked for more")

    dispatched(stopped)
    settings = RunSettings(
        source=f"{other}/{{0..1}}.tar", output=tmp_path / "o", engine=Engine.RAY, batch_size=2
    )
    with pytest.raises(Stopped):
        run_captioning(settings)
    assert [*sums_of(tmp_path / "o" / "part-000002.parquet")] == ["1.png"]


def test_worker_reports_progress_while_it_lists_done_photos(
    dispatched: Callable[[Order], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = [(f"{n}.{kind}", photo(n)) for n in range(5) for kind in ("png", "txt")]
    archive = write_tar(tmp_path / "x.tar", members)
    dispatched(in_turn)
    assert ray_run(archive, tmp_path / "o").returncode == 0

    def reports(pieces: Sequence[Piece], *settings: Any) -> Iterator[Answer]:
        with worker_of(*settings) as worker:
            for piece in pieces:
                answers = worker.answers(piece)
                worker.moves = lambda: moments.append("file")
                for answer in answers:
                    moments.append("rows" if answer.rows else "tally")
                    yield answer

    moments: list[str] = []
    monkeypatch.setattr("batchcap.captioning.ray_engine.run_on_ray", reports)
    assert ray_run(archive, tmp_path / "o").returncode == 0
    assert moments.count("file") >= len(members)
    assert [moment for moment in moments if moment != "file"] == ["tally"]


def test_rows_are_committed_in_time_even_if_no_others_arrive(
    folder: Path, dispatched: Callable[[Order], None], tmp_path: Path
) -> None:
    committed: list[int] = []

    def slowly(answers: list[list[Answer]]) -> Iterator[Answer]:
        rows, *others = in_turn(answers)
        yield rows
        time.sleep(0.5)
        yield Answer()
        committed.append(len([*(tmp_path / "o").glob("part-*.parquet")]))
        yield from others

    dispatched(slowly)
    assert ray_run(folder, tmp_path / "o", "--seconds-per-part", 0.5).returncode == 0
    assert committed == [1]
