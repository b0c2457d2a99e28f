"""Outputs in a store, here one in memory: what is copied when, and two that write at once."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from rows import METADATA, captioned_row

from batchcap import layout as layouts
from batchcap.contracts import LockedError, OutputError
from batchcap.layout import Layout, layout_of, shares_there
from batchcap.merge import merge_captions
from batchcap.output import CaptionFolder, open_captions
from batchcap.row_files import read_groups
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


def opened(layout: Layout) -> Iterator[CaptionFolder]:
    return open_captions(layout, METADATA, OnExisting.RESUME)


def run(url: str, *image_ids: object, share: tuple[int, int] = (0, 1)) -> None:
    with opened(layout_of(url, share)) as folder:
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
def test_another_machine_goes_on_from_what_is_in_the_store(url, tmp_path, monkeypatch):
    run(url, 1, 2)
    on_machine(tmp_path / "other", monkeypatch)
    with opened(layout_of(url)) as folder:
        assert len(folder.index) == 2
        folder.append([captioned_row(3)])
        folder.finish()
    on_machine(tmp_path / "third", monkeypatch)
    assert ids_in(url) == ["1", "2", "3"]


def test_parts_are_there_when_committed_and_the_manifest_follows(store):
    with opened(layout_of("memory://bucket/out")) as folder:
        folder.append([captioned_row(1)])
        assert names(store) == []
        folder.commit()
        assert names(store) == [".out.manifest.json", "out/part-000001.parquet"]


def test_only_parts_and_their_mark_are_in_the_folder(store, tmp_path, monkeypatch):
    url = "memory://bucket/out"
    run(url, 1)
    run(url, 1, share=(0, 2))
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


@pytest.mark.parametrize("is_elsewhere", [False, True])
def test_old_names_are_moved_out_of_the_folder(store, is_elsewhere, tmp_path, monkeypatch):
    url = "memory://bucket/out"
    run(url, 1)
    for name in names(store):
        if name != "out/part-000001.parquet":
            store.rm(f"/bucket/{name}")
    for name in ("_manifest.json", "_summary.json"):
        store.pipe(f"/bucket/out/{name}", b"{}")
    if is_elsewhere:
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


def test_one_file_is_there_when_it_is_whole(store):
    layout = layout_of("memory://bucket/out.parquet")
    with opened(layout) as folder:
        folder.append([captioned_row(1)])
        folder.commit()
        assert names(store) == []
    with opened(layout) as folder:  # killed there, and begun again
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
def test_rows_that_are_replaced_are_so_in_the_store(url, store, tmp_path, monkeypatch):
    run(url, 1, 2)
    with opened(layout_of(url)) as folder:
        folder.append([captioned_row(1, "other")])
        folder.finish()
    on_machine(tmp_path / "other", monkeypatch)
    assert sorted(ids_in(url)) == ["1", "2"]


def test_a_part_that_never_got_there_is_forgotten(store, monkeypatch):
    url = "memory://bucket/out"
    run(url, 1)
    monkeypatch.setattr(layouts.Mirror, "push", lambda *_: None)  # killed before
    run(url, 2)
    assert ids_in(url) == ["1"]


def test_a_part_that_was_changed_here_only_is_fetched_anew(monkeypatch):
    url = "memory://bucket/out"
    run(url, 1, 2)
    (layout_of(url).output / "part-000001.parquet").write_bytes(b"half")
    assert ids_in(url) == ["1", "2"]


def test_whole_files_are_not_fetched_again(monkeypatch):
    url = "memory://bucket/out"
    run(url, 1, 2)
    monkeypatch.setattr("batchcap.mirror.download", None)
    assert ids_in(url) == ["1", "2"]


def test_of_two_runs_on_two_machines_the_second_to_commit_is_refused(tmp_path, monkeypatch):
    url = "memory://bucket/out"
    with opened(layout_of(url)) as first:
        on_machine(tmp_path / "other", monkeypatch)
        with opened(layout_of(url)) as second:
            first.append([captioned_row(1)])
            second.append([captioned_row(1, "other")])
            second.commit()
            with pytest.raises(LockedError, match=r"part-000001\.parquet is not as this run left"):
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
def test_shares_in_a_store_are_merged_into_it(url, store, tmp_path, monkeypatch):
    for index in range(2):
        run(url, f"{index}", share=(index, 2))
    assert shares_there(url) == {(0, 2), (1, 2)}
    on_machine(tmp_path / "other", monkeypatch)
    for target in ("memory://bucket/merged", "memory://bucket/merged.parquet"):
        merge_captions(MergeSettings(captions=url, output=target))
        assert ids_in(target) == ["0", "1"]
        with pytest.raises(OutputError, match="exists"):
            merge_captions(MergeSettings(captions=url, output=target))
