"""Files behind URLs, in a store in memory and on a web server: metadata and failures."""

import gzip
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import fsspec
import pytest
from helpers.stores import answer, status, web_server

from batchcap.errors import UsageError
from batchcap.photos import listing
from batchcap.photos.images import LoadSettings, load_image
from batchcap.schema import ErrorType, LoadedImage, Rejection
from batchcap.storage import remote


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
def test_names_that_are_not_urls(name):
    assert not remote.is_url(name)


def test_a_remote_folder_is_listed_like_a_local_one(store, tmp_path):
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
    refs = list(listing.list_images("memory://root"))
    here = listing.list_images(f"file://{tmp_path}")
    assert [ref.image_id for ref in refs] == [ref.image_id for ref in here]
    assert refs[0].path == "memory://root/B.JPG"
    assert (refs[0].size, remote.describe(refs[0].path).mtime_ns) == (1, refs[0].mtime_ns)


def test_photos_below_folders_without_a_name_are_listed_and_read(store):
    names = ["/a.jpg", "//b.jpg", "sub//c.jpg", "sub//deep/d.jpg", "e.jpg"]
    store.pipe({f"/root/{name}": b"x" for name in names})
    if "/root//a.jpg" not in store.find("/root"):
        pytest.skip("this fsspec's memory store finds no file below a folder without a name")
    refs = list(listing.list_images("memory://root"))
    assert sorted(ref.image_id for ref in refs) == sorted(names)
    assert [remote.read_file(ref.path) for ref in refs] == [b"x"] * len(names)
    below = listing.list_images("memory://root/sub//")
    assert [ref.image_id for ref in below] == ["c.jpg", "deep/d.jpg"]
    with pytest.raises(UsageError, match="there is no memory://root/none//"):
        listing.list_images("memory://root/none//")


def test_a_name_with_colons_is_not_a_chain_of_urls(store):
    store.pipe("/root/cam1::2024.jpg", b"x")
    (ref,) = listing.list_images("memory://root")
    assert remote.read_file(ref.path) == b"x"
    assert remote.describe(ref.path).url == "memory://root/cam1::2024.jpg"


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("file:///a%20b/%E7%8C%AB.jpg", "/a b/猫.jpg"),
        ("file:///%ff.jpg", "/\udcff.jpg"),
        ("FILE:/data/a.jpg", "/data/a.jpg"),
        ("file://localhost/data/a.jpg", "/data/a.jpg"),
        ("file://data/a.jpg", "data/a.jpg"),
        ("file:a.jpg", "file:a.jpg"),
        ("/a%20b.jpg", "/a%20b.jpg"),
        ("s3://b/a%20b.jpg", "s3://b/a%20b.jpg"),
    ],
)
def test_file_urls_are_paths(url, path):
    assert remote.without_file_scheme(url) == path


def test_times_from_listings_and_files_agree(store):
    """S3 gives milliseconds in listings but seconds elsewhere: photos would seem to change."""
    moment = datetime(2024, 5, 17, 12, 30, 15, 250_000, tzinfo=UTC)
    info = {"type": "file", "size": 3, "ETag": '"e"'}
    one, other = (
        remote._remote_file("s3://b/x", info | {"LastModified": moment.replace(microsecond=part)})
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


def test_photos_of_unknown_size_are_read(photos_folder):
    data = (photos_folder / "coffee.jpg").read_bytes()
    packed = gzip.compress(data)
    chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data)
    answers = {
        "/closed.jpg": answer(data),
        "/chunked.jpg": answer(chunked, "Transfer-Encoding: chunked"),
        "/gzip.jpg": answer(packed, "Content-Encoding: gzip", f"Content-Length: {len(packed)}"),
        "HEAD /no-head.jpg": status(405),
        "GET /no-head.jpg": answer(data, f"Content-Length: {len(data)}"),
        "/dated.jpg": answer(data, "Last-Modified: yesterday, or 99999999999999999999"),
    }
    with web_server(answers) as server:
        images = [load(f"{server}/{path.partition('/')[2]}") for path in answers]
    assert {(image.file_size, image.width, image.mtime_ns) for image in images} == {
        (len(data), 448, None)
    }


def test_only_status_404_and_410_mean_missing():
    codes = {401: "unreadable", 403: "unreadable", 404: "missing", 410: "missing"}
    codes |= {500: "unreadable", 503: "unreadable"}
    with web_server({f"/{code}.jpg": status(code) for code in codes}) as server:
        rejections = {code: rejection(f"{server}/{code}.jpg") for code in codes}
        address = server
    assert {code: reason.error_type for code, reason in rejections.items()} == codes
    assert "(403 Answer 403)" in rejections[403].message
    gone = rejection(f"{address}/a.jpg")
    assert gone.error_type is ErrorType.UNREADABLE
    assert "Connect" in gone.message


def test_a_page_of_links_is_a_folder():
    links = ["a.jpg", "./b.jpg", "", "./", "../", "/", "sub/", "?C=N;O=D", "/sub/c.jpg"]
    page = "".join(f'<a href="{link}">x</a>' for link in links).encode()
    below = b'<a href="c.jpg">c</a> <a href="/sub/">itself</a>'
    answers = {"/": page, "/sub/": below}
    with web_server({k: answer(v, "Content-Type: text/html") for k, v in answers.items()}) as url:
        refs = list(listing.list_images(f"{url}/"))
    assert {ref.image_id for ref in refs} == {"a.jpg", "b.jpg", "sub/c.jpg"}
    assert {(ref.size, ref.mtime_ns) for ref in refs} == {(None, None)}


@pytest.mark.parametrize(
    ("size", "moment", "kept"),
    [
        (3, datetime(2400, 1, 1, tzinfo=UTC), (3, None)),
        (2**64, 1e300, (None, None)),
        (-1, float("nan"), (None, None)),
        (None, float("inf"), (None, None)),
        (0, 5, (0, 5 * 10**9)),
    ],
)
def test_sizes_and_times_beyond_64_bits_are_unknown(size, moment, kept):
    file = remote._remote_file("s3://b/x", {"type": "file", "size": size, "LastModified": moment})
    assert (file.size, file.mtime_ns) == kept


def rejection(url: str) -> Rejection:
    pixels = load(url).pixels
    assert isinstance(pixels, Rejection)
    return pixels


def test_photos_that_a_store_refuses_are_rejected(store, monkeypatch):
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
    ("error", "kind", "reason"),
    [
        (RuntimeError("no credentials\nmore"), OSError, "no credentials"),
        (FileNotFoundError("gone"), FileNotFoundError, "gone"),
        (PermissionError("Forbidden"), PermissionError, "Forbidden"),
        (TimeoutError(), OSError, "no answer in time"),
    ],
)
def test_every_failure_is_an_os_error_with_a_reason(store, monkeypatch, error, kind, reason):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(type(store), "cat_file", fail)
    with pytest.raises(kind) as raised:
        remote.read_file("memory://root/1.jpg")
    assert (raised.value.strerror, type(raised.value.errno)) == (reason, int)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    def lacks(*_: object, **__: object) -> None:
        raise ImportError("Please install s3fs")

    monkeypatch.setattr(fsspec.core, "url_to_fs", lacks)
    with pytest.raises(UsageError, match=r"s3:// needs a package: pip install 'batchcap\[s3\]'"):
        remote.describe("s3://b/x")


def test_files_are_uploaded_and_downloaded_and_new_ones_replace_none(store, tmp_path):
    (tmp_path / "a").write_bytes(b"one")
    remote.upload(tmp_path / "a", "memory://root/a", replaced="")
    with pytest.raises(FileExistsError):
        remote.upload(tmp_path / "a", "memory://root/a", replaced="")
    there = remote.describe("memory://root/a")
    remote.upload(tmp_path / "a", "memory://root/a", there.version)
    remote.download("memory://root/a", tmp_path / "b")
    assert Path(tmp_path / "b").read_bytes() == b"one"
    remote.remove("memory://root/a")
    remote.remove("memory://root/a")
    assert store.store == {}


def test_globs_yield_sorted_urls(store):
    for name in ("b.tar", "a.tar", "c.txt"):
        store.pipe(f"/root/{name}", b"")
    names = [url.rpartition("/")[2] for url in remote.matching("memory://root/*.tar")]
    assert names == ["a.tar", "b.tar"]
