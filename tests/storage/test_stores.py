"""Runs from and to a real S3 API; their rows equal those of a local folder of the photos."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from aiobotocore.httpsession import AIOHTTPSession
from botocore.exceptions import ConnectionClosedError
from helpers.crashes import OF_THE_RUN, ROUNDING, difference, running
from helpers.crashes import run as run_process
from helpers.rows import METADATA, captioned_row
from helpers.shard_files import photos_of, write_tar
from helpers.stores import JammingProxy, environment, s3_server

from batchcap.captioning.run import plan_run, run_captioning
from batchcap.captioning.summary import RunSummary
from batchcap.errors import InputError, UsageError
from batchcap.photos.listing import list_images
from batchcap.rows import layout as layouts
from batchcap.rows.layout import layout_of
from batchcap.rows.writer import CaptionFolder, open_captions
from batchcap.settings import OnExisting, RunSettings
from batchcap.storage import remote

TIMES = ("mtime_ns",)  # a store has its own


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with s3_server() as port, pytest.MonkeyPatch.context() as patch:
        for name, value in environment(port).items():
            patch.setenv(name, value)
        yield port


@pytest.fixture(scope="module")
def s3(port: int) -> Any:
    return fsspec.filesystem("s3", use_listings_cache=False)


@pytest.fixture(scope="module")
def photos(s3: Any, photos_folder: Path) -> dict[str, bytes]:
    """The test photos and an empty file, in `s3://photos/all/`."""
    photos = photos_of(photos_folder) | {"empty.jpg": b""}
    s3.mkdir("photos")
    s3.pipe({f"photos/all/{name}": data for name, data in photos.items()})
    s3.pipe({"photos/all/.hidden.jpg": b"x", "photos/all/notes.md": b"x"})
    return photos


@pytest.fixture(scope="module")
def of_folder(photos: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    folder = tmp_path_factory.mktemp("photos")
    for name, data in photos.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    run(folder, folder / "out.parquet")
    return pq.read_table(folder / "out.parquet").sort_by("image_id")


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where working copies of outputs are kept."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(layouts, "cache_folder", lambda name: cache / name)
    return cache


def run(source: object, output: Path | str, **asked: object) -> RunSummary:
    return run_captioning(
        RunSettings(source=str(source), output=output, **{"batch_size": 4, **asked})
    )


@contextmanager
def opened(url: str) -> Iterator[CaptionFolder]:
    with open_captions(layout_of(url), METADATA, OnExisting.RESUME) as folder:
        yield folder


def rows_in(s3: Any, *names: str) -> pa.Table:
    tables = []
    for name in names:
        with s3.open(name) as file:
            tables.append(pq.read_table(file))
    return pa.concat_tables(tables).sort_by("image_id")


def assert_same(rows: pa.Table, others: pa.Table, *but: str) -> None:
    dropped = [*OF_THE_RUN, *but]
    assert difference(rows.drop_columns(dropped), others.drop_columns(dropped)) <= ROUNDING


def test_captions_a_remote_folder_into_a_remote_data_set(s3, photos, of_folder, machine):
    s3.mkdir("sets")
    first = run("s3://photos/all", "s3://sets/out/", rows_per_part=4)
    parts = sorted(s3.glob("sets/out/part-*.parquet"))
    assert first.counts.found == 11
    assert len(parts) == 3
    assert_same(rows_in(s3, *parts), of_folder, *TIMES)
    assert s3.cat_file("sets/.out.summary.json").startswith(b"{")
    shutil.rmtree(machine)  # another machine
    settings = RunSettings(source="s3://photos/all/", output="s3://sets/out")
    assert "s3://sets/out/: 0 new, 0 changed" in plan_run(settings)
    s3.pipe("photos/all/empty.jpg", photos["coffee.jpg"])
    again = run("s3://photos/all", "s3://sets/out")
    assert (again.counts.already_done, again.counts.changed, again.counts.reused) == (10, 1, 1)
    s3.pipe("photos/all/empty.jpg", b"")


def test_captions_remote_tars_into_a_remote_file(s3, photos, of_folder, tmp_path):
    items = [*photos.items()]
    for number in range(2):
        tar = write_tar(tmp_path / f"{number}.tar", items[number::2])
        s3.put_file(str(tar), f"photos/tars/{number}.tar")
    s3.mkdir("files")
    for source in ("s3://photos/tars/{0..1}.tar", "s3://photos/tars/*.tar"):
        summary = run(source, "s3://files/out.parquet")
    assert (summary.counts.already_done, summary.counts.captioned) == (11, 0)
    assert_same(rows_in(s3, "files/out.parquet"), of_folder, *TIMES)
    assert sorted(s3.ls("files", detail=False)) == ["files/out.parquet", "files/out.summary.json"]


def test_captions_a_remote_list_of_urls_and_relative_names(s3, photos, of_folder, tmp_path):
    names = [
        name if number % 2 else f"s3://photos/all/{name}" for number, name in enumerate(photos)
    ]
    s3.pipe("photos/all/list.txt", "\n".join(names).encode())
    run("s3://photos/all/list.txt", tmp_path / "out.parquet")
    rows = pq.read_table(tmp_path / "out.parquet")
    assert rows["image_id"].to_pylist() == names
    relative = [name.removeprefix("s3://photos/all/") for name in names]
    rows = rows.set_column(0, rows.schema.field(0), pa.array(relative)).sort_by("image_id")
    assert_same(rows, of_folder, *TIMES)
    again = run("s3://photos/all/list.txt", tmp_path / "out.parquet")
    assert (again.counts.already_done, again.counts.captioned) == (11, 0)


@pytest.fixture
def losing(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], list[str]]:
    """Lose the answer to one successful request with this method and URL ending.

    The returned list gets the URL of the lost answer.
    """

    def lose(method: str, end: str) -> list[str]:
        send = AIOHTTPSession.send
        lost: list[str] = []

        async def send_and_lose(session: AIOHTTPSession, request: Any) -> Any:
            answer = await send(session, request)
            if request.method == method and request.url.endswith(end) and not lost:
                lost.append(request.url)
                raise ConnectionClosedError(endpoint_url=request.url)
            return answer

        monkeypatch.setattr(AIOHTTPSession, "send", send_and_lose)
        return lost

    return lose


@pytest.mark.parametrize("is_new", [True, False])
def test_a_repeated_request_is_not_taken_for_that_of_another_run(s3, losing, is_new):
    """Of a file that must be new, and of one that replaces a version."""
    bucket = f"lost-{is_new}".lower()
    s3.mkdir(bucket)
    with opened(f"s3://{bucket}/lost") as folder:
        folder.append([captioned_row(1)])
        if is_new:
            lost = losing("PUT", "part-000001.parquet")
        folder.commit()
        if not is_new:
            lost = losing("PUT", ".manifest.json")
        folder.finish()
    assert len(lost) == 1
    with opened(f"s3://{bucket}/lost") as folder:
        assert len(folder.index) == 1


def test_a_newer_version_is_not_replaced(s3, tmp_path):
    """S3 compares the version as it writes, not before."""
    s3.mkdir("overtaken")
    url, path = "s3://overtaken/out/part-000001.parquet", tmp_path / "x"
    path.write_bytes(b"first")
    remote.upload(path, url, replaced="")
    with pytest.raises(FileExistsError):
        remote.upload(path, url, replaced="")
    found = remote.describe(url)
    s3.pipe(url, b"other")
    with pytest.raises(FileExistsError):
        remote.upload(path, url, found.version)
    assert s3.cat_file(url) == b"other"
    remote.upload(path, url, remote.describe(url).version)
    assert s3.cat_file(url) == b"first"
    found = remote.describe(url)
    s3.rm(url)
    with pytest.raises(FileNotFoundError):
        remote.upload(path, url, found.version)


def test_a_repeated_removal_succeeds(s3, losing, tmp_path):
    s3.mkdir("removed")
    s3.pipe("removed/x", b"x")
    lost = losing("DELETE", "removed/x")
    remote.remove("s3://removed/x")
    assert (len(lost), s3.exists("removed/x")) == (1, False)


def test_odd_keys_are_listed_and_read(s3, port, tmp_path, caplog):
    """Nameless folders, a file named like a folder, characters special in URLs and patterns."""
    odd = ["//1.jpg", "sub//2.jpg", "./3.jpg", "x.jpg", "x.jpg/4.jpg", "cam1::2024.jpg"]
    odd += ["e%20 f.jpg", "g#h.jpg", "i?j.jpg", "m*[n].jpg"]
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}")
    client.create_bucket(Bucket="odd")
    for key in [*odd, "photo.jpg/"]:  # s3fs would take the last for a folder
        client.put_object(Bucket="odd", Key=f"p/{key}", Body=key.encode())
    refs = list(list_images("s3://odd/p"))
    assert [ref.image_id for ref in refs] == sorted(odd)
    assert [remote.read_file(ref.path).decode() for ref in refs] == sorted(odd)
    assert "could not fully read photo.jpg/ (it is a file too" in caplog.text
    (tmp_path / "x").write_bytes(b"x")
    remote.upload(tmp_path / "x", "s3://odd/cam1::2024.parquet", replaced="")
    assert s3.cat_file("odd/cam1::2024.parquet") == b"x"


def test_missing_sources_are_reported(photos, tmp_path):
    with pytest.raises(UsageError, match="there is no s3://photos/none/"):
        run("s3://photos/none", tmp_path / "out.parquet")
    with pytest.raises(InputError, match="no photo in s3://photos/none"):
        run("s3://photos/none.tar", tmp_path / "out.parquet")
    with pytest.raises(UsageError, match=r"gs:// needs a package: pip install 'batchcap\[gcs\]'"):
        run("gs://photos/all", tmp_path / "out.parquet")
    with pytest.raises(UsageError, match="unknown URL scheme ssss://"):
        run("ssss://photos/all", tmp_path / "out.parquet")


@pytest.fixture
def jammed(port: int) -> Iterator[Callable[[bytes], JammingProxy]]:
    proxies: list[JammingProxy] = []

    def start(mark: bytes) -> JammingProxy:
        proxies.append(JammingProxy(port, mark))
        return proxies[-1]

    yield start
    for proxy in proxies:
        proxy.close()


@pytest.mark.slow
def test_a_killed_upload_leaves_nothing_and_the_same_command_resumes(
    s3, jammed, port, photos_folder, tmp_path
):
    s3.mkdir("killed")
    # Not OpenVINO, whose export of the backbone would not be in this cache folder.
    command = [photos_folder, "s3://killed/out", "--runtime", "tensorflow"]
    command += ["--batch-size", 2, "--rows-per-part", 2]
    own = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    proxy = jammed(b"PUT /killed/out/part-000002.parquet")
    with running(*command, env=own | environment(proxy.port)) as process:
        assert proxy.jammed.wait(120)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert s3.glob("killed/out/part-*") == ["killed/out/part-000001.parquet"]
    done = run_process(*command, env=own | environment(port))
    assert done.returncode == 0, done.stderr
    assert "2 already done" in done.stdout
    rows = rows_in(s3, *s3.glob("killed/out/part-*"))
    assert rows["image_id"].to_pylist() == sorted(photos_of(photos_folder))
