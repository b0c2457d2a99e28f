"""Files behind URLs, of a store in memory: what is told of them, and what goes wrong."""

import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import fsspec
import pytest

from batchcap import inputs, remote
from batchcap.contracts import ErrorType, LoadedImage, Rejection, UsageError
from batchcap.model.images import LoadSettings, load_image


@pytest.fixture(autouse=True)
def store() -> Iterator[fsspec.AbstractFileSystem]:
    memory = fsspec.filesystem("memory", use_listings_cache=False)
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]
    yield memory
    memory.store.clear()


def load(url: str) -> LoadedImage:
    return load_image(url, LoadSettings(32))


def test_broken_settings_of_fsspec_are_reported(tmp_path, monkeypatch):
    (tmp_path / "conf.json").write_text("{")
    monkeypatch.setenv("FSSPEC_CONFIG_DIR", str(tmp_path))
    for module in [name for name in sys.modules if name.partition(".")[0] == "fsspec"]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(UsageError, match="fsspec cannot read its settings"):
        remote.describe("memory://b/a.jpg")


@pytest.mark.parametrize("name", ["s3://b/a.jpg", "gs://b", "memory://x", "S3://b/a"])
def test_urls(name):
    assert remote.is_url(name)


@pytest.mark.parametrize("name", ["a.jpg", "/a/b://c", "c:/a", "://a", "a b://c"])
def test_names_that_are_no_urls(name):
    assert not remote.is_url(name)


def test_a_folder_is_listed_as_one_here_is(store, tmp_path):
    for name in (
        "b/1.jpg",
        "b.jpg",
        "B.JPG",
        "a/10.png",
        ".h/1.jpg",
        "a/.2.jpg",
        "x.txt",
        "照.webp",
    ):
        store.pipe(f"/root/{name}", b"x")
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    refs = list(inputs.list_images("memory://root"))
    here = inputs.list_images(f"file://{tmp_path}")
    assert [ref.image_id for ref in refs] == [ref.image_id for ref in here]
    assert refs[0].path == "memory://root/B.JPG"
    assert (refs[0].size, remote.describe(refs[0].path).mtime_ns) == (1, refs[0].mtime_ns)


def test_what_listings_and_files_say_of_a_time_is_one(store):
    """S3 tells of milliseconds in a listing and of seconds elsewhere: photos counted as changed."""
    moment = datetime(2024, 5, 17, 12, 30, 15, 250_000, tzinfo=UTC)
    told = {"type": "file", "size": 3, "ETag": '"e"'}
    one, other = (
        remote._told("s3://b/x", told | {"LastModified": moment.replace(microsecond=part)})
        for part in (250_000, 0)
    )
    assert one == other == ("s3://b/x", 3, int(moment.timestamp()) * 10**9, '3 "e"')


def test_a_photo_is_read_from_its_url_with_size_and_time(store, photos_folder):
    data = (photos_folder / "coffee.jpg").read_bytes()
    store.pipe("/root/coffee.jpg", data)
    image = load("memory://root/coffee.jpg")
    here = load_image(photos_folder / "coffee.jpg", LoadSettings(32))
    assert (image.pixels == here.pixels).all()
    assert (image.file_size, image.sha256) == (len(data), here.sha256)
    assert image.mtime_ns == remote.describe("memory://root/coffee.jpg").mtime_ns


def rejection(url: str) -> Rejection:
    pixels = load(url).pixels
    assert isinstance(pixels, Rejection)
    return pixels


def test_photos_that_a_store_does_not_give_out_are_rejected(store, monkeypatch):
    assert rejection("memory://root/none.jpg").error_type is ErrorType.MISSING
    store.pipe("/root/1.jpg", b"x")
    monkeypatch.setattr(type(store), "cat_file", lambda *_, **__: b"longer than it says")
    assert rejection("memory://root/1.jpg").error_type is ErrorType.CHANGED

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(type(store), "cat_file", refuse)
    refused = rejection("memory://root/1.jpg")
    assert refused.error_type is ErrorType.UNREADABLE
    assert "(Access Denied)" in refused.message


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (RuntimeError("no credentials\nmore"), OSError, "no credentials"),
        (FileNotFoundError("gone"), FileNotFoundError, "gone"),
        (PermissionError("Forbidden"), PermissionError, "Forbidden"),
        (TimeoutError(), OSError, "TimeoutError"),
    ],
)
def test_whatever_goes_wrong_is_an_os_error_with_a_reason(store, monkeypatch, error, kind, said):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(type(store), "cat_file", fail)
    with pytest.raises(kind) as told:
        remote.read_file("memory://root/1.jpg")
    assert (told.value.strerror, type(told.value.errno)) == (said, int)


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch):
    def lacks(*_: object, **__: object) -> None:
        raise ImportError("Please install s3fs")

    monkeypatch.setattr(fsspec.core, "url_to_fs", lacks)
    with pytest.raises(UsageError, match=r"s3:// needs a package: pip install 'batchcap\[s3\]'"):
        remote.describe("s3://b/x")


def test_files_go_there_and_back_and_new_ones_only_where_none_is(store, tmp_path):
    (tmp_path / "a").write_bytes(b"one")
    remote.upload(tmp_path / "a", "memory://root/a", must_be_new=True)
    with pytest.raises(FileExistsError):
        remote.upload(tmp_path / "a", "memory://root/a", must_be_new=True)
    remote.upload(tmp_path / "a", "memory://root/a", must_be_new=False)
    remote.download("memory://root/a", tmp_path / "b")
    assert Path(tmp_path / "b").read_bytes() == b"one"
    remote.remove("memory://root/a")
    remote.remove("memory://root/a")
    assert store.store == {}


def test_globs_give_urls_in_order(store):
    for name in ("b.tar", "a.tar", "c.txt"):
        store.pipe(f"/root/{name}", b"")
    names = [url.rpartition("/")[2] for url in remote.matching("memory://root/*.tar")]
    assert names == ["a.tar", "b.tar"]
