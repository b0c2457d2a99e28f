"""Outputs in a store in memory: when files are copied, and two runs that write at once."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from helpers.rows import METADATA, captioned_row

from batchcap.errors import LockedError, OtherOutputError, OutputError
from batchcap.rows import layout as layouts
from batchcap.rows import merge
from batchcap.rows.layout import Layout, check_shards, existing_shards, layout_of
from batchcap.rows.merge import merge_captions
from batchcap.rows.mirror import Mirror
from batchcap.rows.parquet import DamagedError, read_groups
from batchcap.rows.writer import CaptionFolder, open_captions, verified
from batchcap.settings import MergeSettings, OnExisting

OUTPUTS = pytest.mark.parametrize("url", ["memory://bucket/out", "memory://bucket/out.parquet"])


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[fsspec.AbstractFileSystem]:
    memory = fsspec.filesystem("memory", use_listings_cache=False)
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]
    on_machine(tmp_path / "machine", monkeypatch)
    yield memory
    memory.store.clear()


def on_machine(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "cache_folder", lambda name: cache / name)


def opened(layout: Layout) -> AbstractContextManager[CaptionFolder]:
    return open_captions(layout, METADATA, OnExisting.RESUME)


def run(url: str, *image_ids: object, shard: tuple[int, int] = (0, 1)) -> None:
    with opened(layout_of(url, shard)) as folder:
        for image_id in image_ids:
            folder.append([captioned_row(image_id)])
            folder.commit()
        folder.finish()


def names(store: fsspec.AbstractFileSystem) -> list[str]:
    return sorted(name.removeprefix("/bucket/") for name in store.store)


def ids_in(url: str) -> list[str]:
    layout = layout_of(url)
    layout.refresh()
    groups = (table for path in layout.row_files() for table in read_groups(path))
    return [image_id for table in groups for image_id in table["image_id"].to_pylist()]


@OUTPUTS
def test_another_machine_resumes_from_the_store(url, tmp_path, monkeypatch):
    run(url, 1, 2)
    on_machine(tmp_path / "other", monkeypatch)
    with opened(layout_of(url)) as folder:
        assert len(folder.index) == 2
        folder.append([captioned_row(3)])
        folder.finish()
    on_machine(tmp_path / "third", monkeypatch)
    assert ids_in(url) == ["1", "2", "3"]


def test_commit_uploads_the_part_and_the_manifest(store):
    with opened(layout_of("memory://bucket/out")) as folder:
        folder.append([captioned_row(1)])
        assert names(store) == []
        folder.commit()
        assert names(store) == [".out.manifest.json", "out/part-000001.parquet"]


def test_only_parts_and_their_mark_are_in_the_folder(store, tmp_path, monkeypatch):
    url = "memory://bucket/out"
    run(url, 1)
    run(url, 1, shard=(0, 2))
    (mark, part) = (
        name for name in names(store) if name.startswith("out/") and "shard" not in name
    )
    assert (mark[:14], part) == ("out/.complete-", "out/part-000001.parquet")
    assert store.cat_file(f"/bucket/{mark}") == b""
    assert set(names(store)) - {mark, part} == {
        ".out.manifest.json",
        ".out.shard-00000-of-00002.manifest.json",
        f"out/shard-00000-of-00002/{mark.removeprefix('out/')}",
        "out/shard-00000-of-00002/part-000001.parquet",
    }
    on_machine(tmp_path / "other", monkeypatch)
    run(url, 2)
    assert len([name for name in names(store) if name.startswith("out/.complete-")]) == 1


@pytest.mark.parametrize("on_another_machine", [False, True])
def test_old_names_are_moved_out_of_the_folder(store, on_another_machine, tmp_path, monkeypatch):
    url = "memory://bucket/out"
    run(url, 1)
    for name in names(store):
        if name != "out/part-000001.parquet":
            store.rm(f"/bucket/{name}")
    for name in ("_manifest.json", "_summary.json"):
        store.pipe(f"/bucket/out/{name}", b"{}")
    if on_another_machine:
        on_machine(tmp_path / "other", monkeypatch)
    run(url)
    found = [name for name in names(store) if ".complete-" not in name]
    assert found == [".out.manifest.json", ".out.summary.json", "out/part-000001.parquet"]
    assert store.cat_file("/bucket/.out.summary.json") == b"{}"
    assert store.cat_file("/bucket/.out.manifest.json") != b"{}"


def test_a_bucket_has_nothing_beside_it(store):
    run("memory://bucket", 1)
    found = [name for name in names(store) if ".complete-" not in name]
    assert found == ["_manifest.json", "part-000001.parquet"]
    run("memory://bucket", 2)
    assert ids_in("memory://bucket") == ["1", "2"]


def test_single_file_is_uploaded_when_it_is_whole(store):
    layout = layout_of("memory://bucket/out.parquet")
    with opened(layout) as folder:
        folder.append([captioned_row(1)])
        folder.commit()
        assert names(store) == []
    with opened(layout) as folder:  # resumed after a kill
        assert len(folder.index) == 1
        folder.finish()
    assert names(store) == ["out.parquet"]


def test_parts_of_a_file_that_somebody_has_changed_are_dropped(store):
    url = "memory://bucket/out.parquet"
    run(url, 1)
    with opened(layout_of(url)) as folder:
        folder.append([captioned_row(2)])
        folder.commit()
    store.rm("/bucket/out.parquet")
    with opened(layout_of(url)) as folder:
        assert len(folder.index) == 0


@OUTPUTS
def test_rows_are_replaced_in_the_store(url, store, tmp_path, monkeypatch):
    run(url, 1, 2)
    with opened(layout_of(url)) as folder:
        folder.append([captioned_row(1, "other")])
        folder.finish()
    on_machine(tmp_path / "other", monkeypatch)
    assert sorted(ids_in(url)) == ["1", "2"]


def test_part_that_was_never_uploaded_is_forgotten(store, monkeypatch):
    url = "memory://bucket/out"
    run(url, 1)
    monkeypatch.setattr(Mirror, "push", lambda *_: None)  # killed before
    run(url, 2)
    assert ids_in(url) == ["1"]


def test_part_changed_only_locally_is_fetched_again(monkeypatch):
    url = "memory://bucket/out"
    run(url, 1, 2)
    (layout_of(url).output / "part-000001.parquet").write_bytes(b"half")
    assert ids_in(url) == ["1", "2"]


def flip_a_bit(path: Path) -> None:
    """Damage a page of a file of rows, keeping its size and time."""
    status, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 8] ^= 1
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(DamagedError):
        list(read_groups(path))


@OUTPUTS
def test_a_damaged_copy_is_fetched_again(url, store, tmp_path, caplog):
    run(url, 1, 2)
    before = dict(store.store)
    (copy, *_) = layout_of(url).row_files()
    flip_a_bit(copy)
    with opened(layout_of(url)) as folder:
        assert len(folder.index) == 2
        folder.finish()
    assert dict(store.store) == before
    assert (caplog.text, [*tmp_path.rglob("*.damaged")]) == ("", [])
    with opened(layout_of(url)) as folder:
        folder.append([captioned_row(1, "other")])
        folder.finish()
    assert sorted(ids_in(url)) == ["1", "2"]


@OUTPUTS
def test_a_copy_with_a_damaged_footer_is_fetched_again_before_models_are_compared(url):
    run(url, 1)
    (copy, *_) = layout_of(url).row_files()
    status, data = copy.stat(), copy.read_bytes()
    copy.write_bytes(data[:-12] + bytes(12))
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    another = METADATA | {"batchcap.model": "another"}
    with (
        pytest.raises(OtherOutputError, match="another model"),
        open_captions(layout_of(url), another, OnExisting.RESUME),
    ):
        pass
    assert ids_in(url) == ["1"]


@OUTPUTS
def test_only_parts_damaged_in_the_store_are_set_aside(url, store, tmp_path, monkeypatch, caplog):
    run(url, 1, 2)
    (name, *_) = (name for name in store.store if name.endswith(".parquet"))
    (copy, *_) = layout_of(url).row_files()
    flip_a_bit(copy)
    store.pipe(name, copy.read_bytes())
    on_machine(tmp_path / "other", monkeypatch)
    with opened(layout_of(url)) as folder:
        assert len(folder.index) == (0 if url.endswith(".parquet") else 1)
    assert ".damaged; captioning its photos again" in caplog.text
    assert name not in store.store


def test_damaged_copy_of_a_file_being_resumed_is_fetched_again():
    """The first part of a killed run is a hard link to the old file."""
    url = "memory://bucket/out.parquet"
    run(url, 1, 2)
    with opened(layout_of(url)) as folder:
        folder.append([captioned_row(3)])
        folder.commit()
    layout = layout_of(url)
    flip_a_bit(layout.output)
    with pytest.raises(DamagedError):
        list(read_groups(layout.parts / "part-000000.parquet"))
    with opened(layout) as folder:
        assert len(folder.index) == 3
        folder.finish()
    assert ids_in(url) == ["1", "2", "3"]


def test_damaged_part_without_a_stored_copy_is_set_aside(caplog):
    url = "memory://bucket/out.parquet"
    with opened(layout_of(url)) as folder:
        folder.append([captioned_row(1)])
        folder.commit()
    layout = layout_of(url)
    flip_a_bit(layout.parts / "part-000001.parquet")
    with opened(layout) as folder:
        assert len(folder.index) == 0
    assert ".damaged; captioning its photos again" in caplog.text


def test_a_part_that_another_run_has_replaced_meanwhile_is_not_fetched(tmp_path, monkeypatch):
    url = "memory://bucket/out"
    run(url, 1, 2)
    layout = layout_of(url)
    with opened(layout):
        (part, *_) = layout.row_files()
        on_machine(tmp_path / "other", monkeypatch)
        run(url, 1)
        with opened(layout_of(url)) as folder:
            folder.append([captioned_row(1, "other")])
            folder.finish()
        with pytest.raises(LockedError):
            layout.fetch_again(part)


def test_parts_above_999999_are_found_on_another_machine(store, tmp_path, monkeypatch):
    url = "memory://bucket/out"
    run(url, 1)
    store.mv("/bucket/out/part-000001.parquet", "/bucket/out/part-999999.parquet")
    for number in (2, 3):
        on_machine(tmp_path / f"machine{number}", monkeypatch)
        run(url, number)
    assert ids_in(url) == ["1", "2", "3"]
    assert "out/part-1000001.parquet" in names(store)


@OUTPUTS
def test_output_in_a_store_has_shards_or_none(url):
    run(url, 1, shard=(0, 2))
    with pytest.raises(OtherOutputError, match="has 2 shards"):
        check_shards(url, 1)
    other = url.replace("out", "other")
    run(other, 1)
    check_shards(other, 1)
    with pytest.raises(OtherOutputError, match="has no shards"):
        check_shards(other, 2)


def test_whole_files_are_not_fetched_again(monkeypatch):
    url = "memory://bucket/out"
    run(url, 1, 2)
    monkeypatch.setattr("batchcap.rows.mirror.download", None)
    assert ids_in(url) == ["1", "2"]


def test_second_machine_to_commit_is_refused(tmp_path, monkeypatch):
    url = "memory://bucket/out"
    with opened(layout_of(url)) as first:
        on_machine(tmp_path / "other", monkeypatch)
        with opened(layout_of(url)) as second:
            first.append([captioned_row(1)])
            second.append([captioned_row(1, "other")])
            second.commit()
            with pytest.raises(LockedError, match=r"part-000001\.parquet has changed"):
                first.commit()
    assert ids_in(url) == ["1"]


def test_a_manifest_that_another_run_has_written_is_not_replaced(tmp_path, monkeypatch):
    url = "memory://bucket/out"
    run(url, 1)
    with opened(layout_of(url)) as first:
        on_machine(tmp_path / "other", monkeypatch)
        run(url, 2)
        first.append([captioned_row(3)])
        with pytest.raises(LockedError):
            first.commit()


def test_other_files_of_a_folder_are_left_alone(store):
    store.pipe("/bucket/out/notes.txt", b"x")
    store.pipe("/bucket/other.parquet", b"x")
    run("memory://bucket/out", 1)
    run("memory://bucket/out.parquet", 1)
    assert {"out/notes.txt", "other.parquet"} <= set(names(store))


def test_a_store_that_does_not_answer_is_named(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no such host\ntraceback")

    with opened(layout_of("memory://bucket/out")) as folder:
        folder.append([captioned_row(1)])
        monkeypatch.setattr(type(fsspec.filesystem("memory")), "put_file", refuse)
        with pytest.raises(OutputError, match=r"memory://bucket/out/part-000001\.parquet: no such"):
            folder.commit()


@OUTPUTS
def test_shards_in_a_store_are_merged_into_it(url, store, tmp_path, monkeypatch):
    for index in range(2):
        run(url, f"{index}", shard=(index, 2))
    assert existing_shards(url) == {(0, 2), (1, 2)}
    on_machine(tmp_path / "other", monkeypatch)
    for target in ("memory://bucket/merged", "memory://bucket/merged.parquet"):
        merge_captions(MergeSettings(captions=url, output=target))
        assert ids_in(target) == ["0", "1"]
        with pytest.raises(OutputError, match="exists"):
            merge_captions(MergeSettings(captions=url, output=target))


def test_shards_in_a_store_are_not_merged_into_their_own_folder(store):
    run("memory://bucket/out", 1, shard=(0, 2))
    run("memory://bucket/out", 2, shard=(1, 2))
    before = names(store)
    with pytest.raises(OutputError, match="exists"):
        merge_captions(MergeSettings(captions="memory://bucket/out", output="memory://bucket/out"))
    assert names(store) == before


@pytest.mark.parametrize("other", ["run", "merge"])
@pytest.mark.parametrize("target", ["memory://bucket/merged", "memory://bucket/merged.parquet"])
def test_a_merge_that_another_machine_overtakes_is_refused(target, other, tmp_path, monkeypatch):
    """Both first parts have the same name, which the store accepts from one of them."""
    run("memory://bucket/out", *range(3))
    run("memory://bucket/others", "other")
    monkeypatch.setattr(merge, "ROWS_PER_PART", 1)
    monkeypatch.setattr("batchcap.rows.writer.ROWS_PER_GROUP", 1)
    left = [True]

    def overtaken(path: Path) -> Iterator[pa.Table]:
        yield from verified(path)
        if left and left.pop():
            with pytest.MonkeyPatch.context() as patch:
                on_machine(tmp_path / "other", patch)
                if other == "run":
                    run(target, "other")
                else:
                    merge_captions(MergeSettings(captions="memory://bucket/others", output=target))

    monkeypatch.setattr(merge, "verified", overtaken)
    with pytest.raises(LockedError):
        merge_captions(MergeSettings(captions="memory://bucket/out", output=target))
    assert ids_in(target) == ["other"]
