"""Listings compared with rows: new, done, changed and duplicate photos, and shards."""

import logging
import os
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from helpers.rows import captioned_row, failed_row, sum_of
from helpers.shard_files import write_parquet, write_tar
from helpers.stores import answer, status, web_server

from batchcap.captioning import inventory as inventories
from batchcap.captioning.inventory import Inventory, chunks, list_images_of
from batchcap.errors import InputError
from batchcap.photos.images import LoadSettings, load_image
from batchcap.rows.index import RowIndex, entries_of
from batchcap.rows.parquet import Row, table_of
from batchcap.schema import ImageRef, Rejection, int64_or_none
from batchcap.settings import RunSettings


def inventory(source: object, *rows: Row, **asked: Any) -> Inventory:
    settings = RunSettings(source=str(source), output=Path("out.parquet"), **asked)
    index = RowIndex([entries_of([table_of([*rows])] if rows else [])])
    return Inventory(settings, index)


def needing_rows(found: Inventory, *goes_on: Callable[[], bool]) -> Iterator[ImageRef]:
    """Yield the source's photos that need a row."""
    return found.unfinished(list_images_of(found.settings, found.note_unlisted), *goes_on)


def unfinished(*arguments: Any, **asked: Any) -> list[str]:
    return [ref.image_id for ref in needing_rows(inventory(*arguments, **asked))]


def row_of(image_id: str, data: bytes, **columns: Any) -> Row:
    content = data.decode()
    return captioned_row(image_id, content, file_size=len(data), **columns)


def test_files_are_compared_by_size_and_time(tmp_path):
    for name in ("done", "changed", "new"):
        (tmp_path / f"{name}.jpg").write_bytes(b"x")
        os.utime(tmp_path / f"{name}.jpg", ns=(0, 5))
    done = row_of("done.jpg", b"x", mtime_ns=5)
    changed = row_of("changed.jpg", b"x", mtime_ns=6)
    found = inventory(tmp_path, done, changed, row_of("gone.jpg", b"x"))
    assert [ref.image_id for ref in needing_rows(found)] == ["changed.jpg", "new.jpg"]
    assert (found.counts.new, found.counts.changed, found.counts.already_done) == (1, 1, 1)
    assert (found.complete, found.vanished) == (True, 1)


def test_photos_in_archives_are_compared_by_content(tmp_path):
    tar = write_tar(tmp_path / "x.tar", [("done.jpg", b"x"), ("changed.jpg", b"y")])
    rows = row_of("done.jpg", b"x", mtime_ns=1), row_of("changed.jpg", b"x", mtime_ns=1)
    assert unfinished(tar, *rows) == ["changed.jpg"]
    file = write_parquet(tmp_path / "x.parquet", image=[b"x", b"y"], key=["done.jpg", "new.jpg"])
    assert unfinished(file, *rows, id_column="key") == ["new.jpg"]


def test_failed_photos_in_archives_are_known_too(tmp_path):
    write_parquet(tmp_path / "x.parquet", image=[b"x", None], key=["bad", "none"])
    bad = failed_row("bad", file_size=1, sha256=sum_of("x"))
    asked: dict[str, Any] = {"id_column": "key"}
    assert unfinished(tmp_path / "x.parquet", bad, failed_row("none"), **asked) == []
    asked |= {"retry_failed": True}
    assert unfinished(tmp_path / "x.parquet", bad, failed_row("none"), **asked) == ["bad", "none"]


def test_duplicate_id_is_logged_and_skipped(tmp_path, caplog):
    for number in range(2):
        members = [(f"{number}.jpg", b"x"), ("same.jpg", f"{number}".encode())]
        write_tar(tmp_path / f"{number}.tar", members)
    found = inventory(f"{tmp_path}/*.tar")
    with caplog.at_level(logging.WARNING):
        refs = list(needing_rows(found))
    assert [ref.image_id for ref in refs] == ["0.jpg", "same.jpg", "1.jpg"]
    assert refs[1].data == b"0"
    assert "1.tar: same.jpg has the id of an earlier photo" in caplog.text
    with pytest.raises(InputError, match=r"1 photo of .* ids of earlier photos"):
        found.check_whole()


def test_repeated_line_of_a_list_is_one_photo(tmp_path):
    (tmp_path / "list.txt").write_text("b.jpg\na.jpg\nb.jpg\n./b.jpg\n")
    found = inventory(tmp_path / "list.txt")
    assert [ref.image_id for ref in needing_rows(found)] == ["b.jpg", "a.jpg"]
    found.check_whole()


def test_duplicate_id_in_parquet_files_is_logged_and_skipped(tmp_path, caplog):
    for number in range(2):
        file = tmp_path / f"{number}.parquet"
        write_parquet(file, image=[f"{number}.jpg"], key=["same"])
    found = inventory(f"{tmp_path}/*.parquet", id_column="key")
    assert [Path(ref.path).name for ref in needing_rows(found)] == ["0.jpg"]
    assert "skipping such photos; choose a column of unique ids with --id-column" in caplog.text
    assert found.duplicates == 1


def test_damaged_archive_is_reported_once_the_rest_is_done(tmp_path, caplog):
    tar = write_tar(tmp_path / "0.tar", [("0.jpg", b"x"), ("1.jpg", b"y")])
    tar.write_bytes(tar.read_bytes()[:1200])
    found = inventory(tar)
    assert [ref.image_id for ref in needing_rows(found)] == ["0.jpg"]
    assert not found.complete
    assert "could not fully read" in caplog.text
    with pytest.raises(InputError, match="1 folder or archive of"):
        found.check_whole()


def checked(source: Path, *rows: Row, **asked: Any) -> list[str]:
    return [ref.image_id for ref in inventory(source, *rows, **asked).listed()]


def write_list(folder: Path, *names: str) -> Path:
    (folder / "there.jpg").touch()
    (folder / "list.txt").write_text("\n".join(names))
    return folder / "list.txt"


def test_a_list_whose_first_hundred_new_names_are_missing_is_refused(tmp_path):
    names = [f"'{number}'" for number in range(100)]
    wrong = write_list(tmp_path, *names, "there.jpg")
    with pytest.raises(InputError, match=r"the first 100 names in .*in quotes"):
        checked(wrong)
    with pytest.raises(InputError, match="the first 100 names in "):
        checked(write_list(tmp_path, "done.jpg", *names), row_of("done.jpg", b"x"))
    right = [*names[:99], "there.jpg", *names]
    assert checked(write_list(tmp_path, *right)) == right


def test_shorter_list_is_refused_if_all_names_are_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"the 2 names in .* at {tmp_path}/a.jpg"):
        checked(write_list(tmp_path, "a.jpg", "b/b.jpg"))
    with pytest.raises(InputError, match="the only name in"):
        checked(write_list(tmp_path, "x" * 5000))
    with pytest.raises(InputError, match="the 2 names in"):
        checked(write_list(tmp_path, "a.jpg", "b.jpg"), shard="0/2")
    with pytest.raises(InputError, match="the only name in"):
        checked(write_parquet(tmp_path / "x.parquet", image=["a.jpg"]))
    assert checked(write_list(tmp_path, "a.jpg", "b.jpg"), row_of("a.jpg", b"x"))
    assert checked(write_list(tmp_path, "a.jpg", "there.jpg")) == ["a.jpg", "there.jpg"]


def test_a_list_of_urls_is_checked_too(tmp_path):
    with web_server({"/there.jpg": answer(b"x"), "/refused.jpg": status(403)}) as url:
        with pytest.raises(InputError, match=r"the 2 names in .*in quotes"):
            checked(write_list(tmp_path, f"'{url}/a.jpg'", f"'{url}/there.jpg'"))
        for name in ("there", "refused"):
            names = [f"{url}/a.jpg", f"{url}/{name}.jpg"]
            assert checked(write_list(tmp_path, *names)) == names


def test_names_of_a_list_are_held_back_until_one_exists(tmp_path):
    def names() -> Iterator[ImageRef]:
        yield ImageRef("done.jpg", "done.jpg")
        yield ImageRef("a.jpg", "a.jpg")
        yield ImageRef("there.jpg", str(tmp_path / "there.jpg"))
        raise AssertionError("read too far")

    found = inventory(write_list(tmp_path), row_of("done.jpg", b"x"))
    refs = found.checked(names())
    assert [next(refs).image_id for _ in range(3)] == ["done.jpg", "a.jpg", "there.jpg"]


def test_pieces_of_a_list_for_workers_are_checked_together(tmp_path):
    refs = [ImageRef(name, str(tmp_path / name)) for name in ("a.jpg", "b.jpg", "there.jpg")]
    found = inventory(write_list(tmp_path))
    found.check_list([refs[:1], refs[1:]])
    with pytest.raises(InputError, match="the 2 names in"):
        found.check_list([refs[:1], refs[1:2]])


def test_system_folders_are_logged_in_one_line(tmp_path, caplog):
    for name in ("lost+found", "a/lost+found", "@eaDir"):
        (tmp_path / name).mkdir(parents=True)
    with caplog.at_level(logging.INFO):
        assert list(inventory(tmp_path, exclude=("a",)).listed()) == []
    (message,) = caplog.messages
    assert message.startswith("skipping system folders (lost+found, @eaDir, ")
    assert "such as @eaDir/" in message


def test_time_beyond_64_bits_is_unknown(tmp_path):
    photo, pipe = tmp_path / "a.jpg", tmp_path / "b.jpg"
    photo.write_bytes(b"x")
    os.mkfifo(pipe)
    for path in (photo, pipe):
        os.utime(path, (13 * 10**9, 13 * 10**9))  # in 2381; some disks keep only earlier dates
    kept = int64_or_none(photo.stat().st_mtime_ns)
    assert {load_image(path, LoadSettings(32)).mtime_ns for path in (photo, pipe)} == {kept}
    rows = row_of("a.jpg", b"x", mtime_ns=kept), failed_row("b.jpg", file_size=0, mtime_ns=kept)
    assert unfinished(tmp_path, *rows) == []
    assert unfinished(tmp_path, rows[0] | {"file_size": 2}, rows[1]) == ["a.jpg"]


def test_shards_take_each_photo_once(tmp_path):
    names = [f"{number}.jpg" for number in range(100)]
    (tmp_path / "list.txt").write_text("\n".join(names))
    shards = [unfinished(tmp_path / "list.txt", shard=f"{index}/3") for index in range(3)]
    assert sorted(chain(*shards)) == sorted(names)
    assert all(len(shard) > 20 for shard in shards)


def test_chunks_grow_but_hold_few_bytes():
    def sizes(refs: list[ImageRef]) -> list[int]:
        return [len(chunk) for chunk in chunks(refs, 16, lambda: True)]

    refs = [ImageRef(str(number), "") for number in range(40)]
    assert sizes(refs) == [1, 2, 4, 8, 16, 9]
    at_hand = [ref._replace(data=b"", size=1 << 20) for ref in refs[:14]]
    assert sizes(at_hand) == [1, 2, 4, 4, 3]


def test_stopped_inventory_is_incomplete(tmp_path):
    (tmp_path / "list.txt").write_text("\n".join(map(str, range(100))))
    found = inventory(tmp_path / "list.txt")
    asked = iter([True] * 70 + [False] * 1000)
    assert 0 < len(list(needing_rows(found, lambda: next(asked)))) < 40
    assert not found.complete


def test_stores_are_asked_only_about_photos_with_rows(tmp_path, monkeypatch):
    (tmp_path / "list.txt").write_text("s3://b/1.jpg\ns3://b/2.jpg\n3.jpg\n")
    asked: list[str] = []

    def describe(ref: ImageRef) -> ImageRef:
        asked.append(ref.path)
        return ref._replace(size=1, mtime_ns=2**60)

    monkeypatch.setattr(inventories, "_described_by_store", describe)
    done = row_of("s3://b/2.jpg", b"x")
    assert unfinished(tmp_path / "list.txt", done) == ["s3://b/1.jpg", "3.jpg"]
    assert asked == ["s3://b/2.jpg"]


@pytest.mark.parametrize(
    ("head", "body", "again"),
    [
        pytest.param(answer(b"", f"Content-Length: {2**40}"), b"", False, id="too large"),
        pytest.param(answer(b"", "Content-Length: 1"), status(403), False, id="forbidden"),
        pytest.param(answer(b"", "Content-Length: 1"), status(503), True, id="busy"),
        pytest.param(answer(b"", "Content-Length: 1"), answer(b"x"), False, id="no photo"),
        pytest.param(status(404), status(404), False, id="missing"),
    ],
)
def test_failed_photos_at_urls_are_retried_only_if_the_failure_may_pass(
    tmp_path, head, body, again
):
    """Without size and time in their rows, every run took them for changed."""
    with web_server({"HEAD /a.jpg": head, "GET /a.jpg": body}) as server:
        url = f"{server}/a.jpg"
        image = load_image(url, LoadSettings(8))
        row = failed_row(
            url, file_size=image.file_size, mtime_ns=image.mtime_ns, sha256=image.sha256
        )
        (tmp_path / "list.txt").write_text(f"{url}\n")
        found = inventory(tmp_path / "list.txt", row)
        assert [ref.image_id for ref in needing_rows(found)] == [url] * again
    assert isinstance(image.pixels, Rejection)
    assert found.counts.failed_before == (not again)
