"""Rows of workers in any order, compared with one machine's rows of the same archives."""

import logging
import tempfile
from collections import Counter
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
from helpers.rows import captioned_row, failed_row
from helpers.shard_files import write_tar
from hypothesis import given
from hypothesis import strategies as st

from batchcap.captioning.arrivals import Arrivals, PieceInventory, Tally
from batchcap.captioning.inventory import Inventory, list_images_of
from batchcap.captioning.ray_engine import failures
from batchcap.captioning.summary import Counts
from batchcap.errors import BatchcapError, InputError
from batchcap.photos.archives import Archive
from batchcap.rows.index import RowIndex, entries_of
from batchcap.rows.parquet import Row, table_of
from batchcap.schema import ImageRef
from batchcap.settings import RunSettings

BAD = "z"  # the content of a photo that fails

Photos = list[tuple[str, str]]  # id and content
Sent = tuple[Archive, list[Row], Tally | None]


def index_of(rows: list[Row]) -> RowIndex:
    return RowIndex([entries_of([table_of(rows)] if rows else [])])


def inventory_of(rows: list[Row], **asked: Any) -> Inventory:
    settings = RunSettings(source="*.tar", output=Path("o"), **asked)
    return Inventory(settings, index_of(rows))


def refs_of(photos: Photos) -> list[ImageRef]:
    return [
        ImageRef(image_id, f"x.tar: {image_id}", len(content), 0, content.encode())
        for image_id, content in photos
    ]


def row_of(image_id: str, content: str) -> Row:
    row = captioned_row(image_id, content, file_size=len(content))
    if content != BAD:
        return row
    return failed_row(image_id, file_size=len(content), sha256=row["sha256"])


def archive_of(number: int) -> Archive:
    return Archive(f"/photos/{number}.tar", f"{number}.tar")


def sent_for(number: int, photos: Photos, rows: list[Row], **asked: Any) -> list[Sent]:
    """Return a worker's messages for an archive: rows one by one, then the tally."""
    whole = inventory_of(rows, **asked)
    inventory = PieceInventory(whole.settings, whole.index)
    refs = inventory.unfinished(refs_of(photos))
    made = [row_of(ref.image_id, bytes(ref.data).decode()) for ref in refs]
    archive = archive_of(number)
    return [
        *((archive, [row], None) for row in made),
        (archive, [], inventory.tally(failures(made))),
    ]


class Output:
    """An output, which checks how rows are appended."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = {row["image_id"]: row for row in rows}
        self.of_this_run: set[str] = set()
        self.taken = 0

    def append(self, rows: list[Row], again: bool) -> None:
        for row in rows:
            assert (row["image_id"] in self.of_this_run) == again
            self.of_this_run.add(row["image_id"])
            self.rows[row["image_id"]] = row
        self.taken += len(rows)


def counts_of_rows(rows: list[Row]) -> Counts:
    failed = Counter(row["error_type"] for row in rows if row["status"] == "failed")
    return Counts(captioned=len(rows) - failed.total(), failed=failed)


def of_one_machine(
    archives: list[Photos], rows: list[Row], **asked: Any
) -> tuple[Output, Inventory]:
    inventory, output = inventory_of(rows, **asked), Output(rows)
    for ref in inventory.unfinished(chain.from_iterable(map(refs_of, archives))):
        made = [row_of(ref.image_id, bytes(ref.data).decode())]
        output.append(made, again=False)
        inventory.counts += counts_of_rows(made)
    return output, inventory


def of_workers(
    sent: list[Sent], archives: int, rows: list[Row], **asked: Any
) -> tuple[Output, Inventory, Arrivals]:
    inventory, output = inventory_of(rows, **asked), Output(rows)
    arrivals = Arrivals(inventory, [archive_of(number) for number in range(archives)])
    for one in sent:
        for chunk in arrivals.take(*one):
            output.append(chunk.rows, chunk.again)
            inventory.counts += chunk.counts
    return output, inventory, arrivals


def counts_of(inventory: Inventory) -> dict[str, Any]:
    names = ("duplicates", "is_empty", "vanished", "counts")
    inventory.complete = True
    return {name: getattr(inventory, name) for name in names}


PHOTOS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(f"xy{BAD}")), max_size=4)


@given(
    st.lists(PHOTOS, min_size=1, max_size=4),
    st.dictionaries(st.sampled_from("abcd"), st.sampled_from(f"xy{BAD}")),
    st.booleans(),
    st.data(),
)
def test_workers_in_any_order_make_the_rows_and_counts_of_one_machine(
    archives: list[Photos], existing: dict[str, str], retry_failed: bool, data: st.DataObject
) -> None:
    rows = [row_of(*photo) for photo in existing.items()]
    asked = {"retry_failed": retry_failed, "rows_per_part": 2}
    sent = [iter(sent_for(n, photos, rows, **asked)) for n, photos in enumerate(archives)]
    turns = [n for n, photos in enumerate(archives) for _ in range(len(photos) + 1)]
    order = data.draw(st.permutations(turns))
    arrived = [one for number in order for one in islice(sent[number], 1)]
    expected, expected_counts = of_one_machine(archives, rows, **asked)
    output, counted, arrivals = of_workers(arrived, len(archives), rows, **asked)
    assert output.rows == expected.rows
    assert counts_of(counted) == counts_of(expected_counts)
    assert arrivals.untallied == 0
    assert [*arrivals.rest()] == []


def test_row_of_a_new_photo_is_accepted_at_once() -> None:
    arrivals = Arrivals(inventory_of([]), [archive_of(0), archive_of(1)])
    row = row_of("a", "y")
    (chunk,) = arrivals.take(archive_of(1), [row], None)
    assert (chunk.rows, chunk.again) == ([row], False)


def test_replacing_row_waits_for_earlier_archives() -> None:
    rows = [row_of("a", "x"), row_of("b", "x")]
    first = sent_for(0, [("a", "x")], rows)
    second = sent_for(1, [("a", "y"), ("b", "y")], rows)
    output, counted, _ = of_workers(second, 2, rows)
    assert output.of_this_run == set()
    output, counted, _ = of_workers([*second, *first], 2, rows)
    assert output.of_this_run == {"b"}
    assert (counted.duplicates, counted.counts.taken, counted.counts.changed) == (1, 1, 1)


def test_stopped_run_takes_each_waiting_row_once() -> None:
    rows = [row_of(image_id, "x") for image_id in "abc"]
    first = sent_for(0, [("c", "y"), ("d", "y")], rows)[:2]  # without its tally
    second = sent_for(1, [("a", "x"), ("d", "x")], rows)
    third = sent_for(2, [("a", "y"), ("b", "y"), ("c", "x")], rows)
    fourth = sent_for(3, [("b", "w"), ("c", "w")], rows)[:2]
    output, _, arrivals = of_workers([*fourth, *third, *second, *first], 4, rows)
    assert output.of_this_run == {"c", "d"}
    for chunk in arrivals.rest():
        output.append(chunk.rows, chunk.again)
    contents = {row["image_id"]: row["tokens"][1] for row in output.rows.values()}
    assert contents == {"a": "x", "b": "y", "c": "y", "d": "x"}


@pytest.mark.parametrize("archives", [[[("a", "x"), ("a", "y")]], [[("a", "x")], [("a", "x")]]])
def test_duplicate_id_is_warned_about(
    archives: list[Photos], caplog: pytest.LogCaptureFixture
) -> None:
    sent = [one for number, photos in enumerate(archives) for one in sent_for(number, photos, [])]
    with caplog.at_level(logging.WARNING):
        _, counted, _ = of_workers(sent, len(archives), [])
    (warning,) = caplog.messages
    assert "has the id of an earlier photo; skipping such photos" in warning
    assert warning.startswith(("x.tar: a", "a photo of /photos/1.tar"))
    with pytest.raises(InputError, match=r"1 photo of .* had the ids of earlier photos"):
        counted.check_whole()


def test_many_waiting_rows_are_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchcap.captioning.arrivals.BYTES_IN_MEMORY", 1)
    rows = [row_of(image_id, "x") for image_id in "abcd"]
    first = sent_for(0, [("a", "y"), ("b", "x")], rows)
    second = sent_for(1, [("c", "y")], rows)
    third = sent_for(2, [("b", "y"), ("d", "y")], rows)
    output, _, _ = of_workers([*third, *second, *first], 3, rows)
    assert output.of_this_run == {"a", "c", "d"}


def test_full_temporary_folder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row_of("a", "x")]
    sent = sent_for(1, [("a", "y")], rows)
    with Path("/dev/full").open("w+b", 0) as full:
        monkeypatch.setattr(tempfile, "SpooledTemporaryFile", lambda _size: full)
        with pytest.raises(
            BatchcapError, match=r"no room for waiting rows in .*No space left.*TMPDIR"
        ):
            of_workers(sent, 2, rows)


def test_findings_of_a_worker_are_passed_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    members = [
        ("done.jpg", b"x"),
        ("lost+found/a.jpg", b"x"),
        ("changed.jpg", b"y"),
        ("new.jpg", b"z"),
    ]
    tar = write_tar(tmp_path / "x.tar", members)
    tar.write_bytes(tar.read_bytes()[: 512 * 6 + 100])  # cut in the header of new.jpg
    rows = [row_of(name, "x") for name in ("done.jpg", "changed.jpg", "gone.jpg")]
    found = inventory_of(rows)
    found.settings = RunSettings(source=str(tar), output=Path("o"))
    piece = PieceInventory(found.settings, found.index)
    refs = list_images_of(
        piece.settings, piece.note_unlisted, Archive(str(tar), "x.tar"), piece.note_left_out
    )
    with caplog.at_level(logging.INFO):
        taken = [ref.image_id for ref in piece.unfinished(refs)]
    assert taken == ["changed.jpg"]
    assert caplog.messages == []
    arrivals = Arrivals(found, [Archive(str(tar), "x.tar")])
    (chunk,) = arrivals.take(Archive(str(tar), "x.tar"), [], piece.tally({}))
    assert chunk.rows == []
    assert (found.counts.changed, found.counts.already_done, found.counts.taken) == (1, 1, 1)
    assert (found.unlisted, found.is_empty, found.left_out) == (1, False, "lost+found/a.jpg")
    assert "skipping its remaining photos" in caplog.text


def test_nothing_is_kept_if_ids_cannot_repeat() -> None:
    rows = [row_of("a", "x")]
    arrivals = Arrivals(inventory_of(rows), [archive_of(0)])
    for one in sent_for(0, [("a", "y"), ("b", "y")], rows):
        (chunk,) = arrivals.take(*one)
        assert (chunk.rows, chunk.again) == (one[1], False)
    assert arrivals._arrived._runs == arrivals._settled._runs == []
