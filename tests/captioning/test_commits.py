"""Rows are committed while they arrive, and if the engine fails."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from helpers.commands import batchcap_here
from helpers.no_model import Worker

from batchcap.captioning.local_engine import Photo
from batchcap.errors import ModelError
from batchcap.schema import ImageRef


class FailingWorker(Worker):
    """Fails after two photos."""

    def photos(self, refs: Iterable[ImageRef], *others: Any) -> Iterator[list[Photo]]:
        yield from islice(super().photos(refs, *others), 2)
        raise ModelError("the model is broken")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    for number in range(5):
        (tmp_path / "photos" / f"{number}.jpg").write_text(str(number))
    return tmp_path


def names_in(output: Path) -> list[str]:
    return sorted(pq.read_table(output)["image_id"].to_pylist())


def test_rows_finished_before_an_engine_fails_are_committed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batchcap.captioning.local_engine.CaptionWorker", FailingWorker)
    done = batchcap_here("run", folder / "photos", folder / "o", "--no-reuse")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "batchcap: the model is broken")
    assert names_in(folder / "o") == ["0.jpg", "1.jpg"]


def test_parts_have_the_requested_number_of_rows(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batchcap.captioning.local_engine.CaptionWorker", Worker)
    done = batchcap_here("run", folder / "photos", folder / "o", "--rows-per-part", 2)
    assert done.returncode == 0, done.stderr
    sizes = [pq.read_metadata(part).num_rows for part in sorted((folder / "o").glob("part-*"))]
    assert sizes == [2, 2, 1]
