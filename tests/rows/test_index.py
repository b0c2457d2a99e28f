"""The index, compared with a plain dict."""

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from helpers.rows import METADATA, captioned_row, failed_row, sum_of
from hypothesis import given, settings
from hypothesis import strategies as st

from batchcap.rows.id_hashes import hashes_of
from batchcap.rows.index import UNKNOWN, Entries, Known, RowIndex, entries_of, newest_rows
from batchcap.rows.parquet import Row, table_of, write_rows


class Expected(NamedTuple):
    file: int
    group: int
    row: dict[str, Any]


def index_of(files: list[list[list[dict[str, Any]]]]) -> RowIndex:
    return RowIndex([entries_of(map(table_of, groups)) for groups in files])


IDS = st.one_of(
    st.sampled_from([f"{letter}.jpg" for letter in "abcdefgh"]),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8),
)
SIZES = st.one_of(st.none(), st.integers(0, 2), st.just(2**62))
IMAGES = st.dictionaries(
    IDS,
    st.tuples(
        st.integers(0, 3),  # file
        st.integers(0, 2),  # row group
        st.sampled_from(["ok", "failed", "cut"]),
        SIZES,
        SIZES,
        st.integers(0, 3),  # content
    ),
    max_size=12,
)


def row_of(image_id: str, status: str, size: Any, time: Any, content: int) -> dict[str, Any]:
    known = {"file_size": size, "mtime_ns": time}
    if status == "failed":
        return failed_row(image_id, **known)
    note = "truncated" if status == "cut" else None
    return captioned_row(image_id, content, error_type=note, **known)


def layout_of(images: dict[str, Any]) -> tuple[RowIndex, dict[str, Expected]]:
    files: list[list[list[dict[str, Any]]]] = [[[] for _ in range(3)] for _ in range(4)]
    model = {}
    for image_id, (file, group, *columns) in images.items():
        row = row_of(image_id, *columns)
        files[file][group].append(row)
        model[image_id] = Expected(file, group, row)
    return index_of(files), model


@settings(deadline=None)
@given(IMAGES, IDS, SIZES, SIZES)
def test_images_are_found_and_compared(images, stranger, size, time):
    index, model = layout_of(images)
    assert len(index) == len(model)
    assert (index.find(stranger) is not None) == (stranger in model)
    asked = (UNKNOWN if size is None else size, UNKNOWN if time is None else time)
    for image_id, (file, _, row) in model.items():
        number = index.find(image_id)
        assert index.files_of(np.array([number])) == [file]
        if (size, time) != (row["file_size"], row["mtime_ns"]):
            known = Known.CHANGED
        else:
            known = Known.DONE if row["status"] == "ok" else Known.FAILED
        assert index.compare(number, *asked) is known


@settings(deadline=None)
@given(IMAGES, st.sets(IDS))
def test_images_not_seen_have_vanished(images, seen):
    index, model = layout_of(images)
    for image_id in seen & model.keys():
        index.mark_seen(index.find(image_id))
    assert index.vanished == len(model.keys() - seen)
    for file in range(6):  # two more than exist: a run adds files
        here = {image_id for image_id, expected in model.items() if expected.file == file}
        assert index.vanished_of(file).tolist() == sorted(hashes_of(here - seen).tolist())


@settings(deadline=None)
@given(IMAGES)
def test_captioned_rows_are_found_by_sha256(images):
    index, model = layout_of(images)
    for content in range(4):
        places = [
            (file, group)
            for file, group, row in model.values()
            if row["status"] == "ok" and row["sha256"] == sum_of(content)
        ]
        assert sorted(index.places_of(sum_of(content))) == sorted(places)


@pytest.mark.parametrize("files", [[], [[]], [[[]]], [[[], []], []]])
def test_empty_index(files):
    index = index_of(files)
    assert len(index) == index.vanished == 0
    assert index.find("a.jpg") is None
    assert index.places_of(sum_of("a")) == []
    assert len(index.vanished_of(0)) == 0
    assert index.superseded == {}


def test_entries_of_a_failed_row_without_size_or_sum():
    entries = entries_of([table_of([failed_row("a.jpg")])])
    assert entries[1:] == Entries(0, UNKNOWN, UNKNOWN, 1, 0, 0)[1:]


def test_many_files_are_searched_as_one():
    index = index_of([[[captioned_row(f"{file}.jpg", file)]] for file in range(300)])
    for file in range(300):
        assert index.files_of(np.array([index.find(f"{file}.jpg")])) == [file]
        assert index.places_of(sum_of(file)) == [(file, 0)]


@given(st.lists(st.lists(st.sets(st.sampled_from("abcdef")), max_size=3), max_size=4))
def test_the_row_of_the_newest_file_counts(files):
    """Within one file, an image has one row."""
    distinct = []
    for groups in files:
        met: set[str] = set()
        distinct.append([[*(group - met), met.update(group)][:-1] for group in groups])
    rows = [
        [[captioned_row(image_id, number) for image_id in group] for group in groups]
        for number, groups in enumerate(distinct)
    ]
    newest = {row["image_id"]: row for groups in rows for group in groups for row in group}
    index = index_of(rows)
    assert len(index) == len(newest)
    for image_id, row in newest.items():
        number = index.find(image_id)
        assert row["tokens"][1] == str(index.files_of(np.array([number]))[0])
    for number, groups in enumerate(distinct):
        older = [i for group in groups for i in group if newest[i]["tokens"][1] != str(number)]
        assert sorted(index.superseded.get(number, [])) == sorted(hashes_of(older))

    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{number}.parquet") for number in range(len(rows))]
        for path, groups in zip(paths, rows, strict=True):
            write_rows(path, map(table_of, groups), METADATA)
        read = [row for table in newest_rows(paths) for row in table.to_pylist()]
    assert sorted(read, key=_id) == sorted(newest.values(), key=_id)


def _id(row: Row) -> str:
    return row["image_id"]
