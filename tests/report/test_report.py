"""The page's content, for any rows."""

import base64
import hashlib
import io
import json
import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.commands import batchcap_here
from helpers.places import ROOT
from helpers.report import PHOTOS, evaluation, make_photo
from helpers.rows import LOOK, METADATA, captioned_row, failed_row
from helpers.shard_files import write_tar
from helpers.stores import environment, s3_server
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageColor

from batchcap.errors import InputError, UsageError
from batchcap.report.cards import SHOWN_FAILURES, digest_rows, grid_of
from batchcap.report.report import histogram, json_for_html, last_run, made_with, write_report
from batchcap.rows.parquet import Row, table_of, write_rows
from batchcap.settings import ReportSettings


def data_of(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found[1])


def cards_of(path: Path) -> dict[str, dict[str, Any]]:
    return {card["id"]: card for card in data_of(path)["cards"]}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from("<>&\u2028\u2029"),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(JSON)
def test_json_in_the_page_is_unchanged_and_ends_no_element(value: Any) -> None:
    text = json_for_html(value)
    assert json.loads(text) == value
    assert not set(text) & set("<>&\u2028\u2029")


def sampled(groups: list[int], most: int, seed: int) -> list[str]:
    ids = iter(range(sum(groups)))
    tables = [table_of([captioned_row(next(ids)) for _ in range(size)]) for size in groups]
    return [shown.card["id"] for shown in digest_rows(iter(tables), most, seed, {}).shown]


def test_sample_depends_on_the_seed_but_not_on_row_groups() -> None:
    sample = sampled([50], most=20, seed=1)
    assert len(set(sample)) == 20
    assert sample == sorted(sample, key=int)
    assert sampled([7, 0, 30, 13], most=20, seed=1) == sample
    assert sampled([50], most=20, seed=2) != sample


def test_all_rows_are_shown_up_to_the_sample_size() -> None:
    assert sampled([3, 2], most=5, seed=0) == [*"01234"]


def test_each_row_is_equally_likely_to_be_sampled() -> None:
    counts = dict.fromkeys([*"0123456789"], 0)
    for seed in range(300):
        for image_id in sampled([4, 6], most=5, seed=seed):
            counts[image_id] += 1
    assert min(counts.values()) > 150 - 45  # five standard deviations
    assert max(counts.values()) < 150 + 45


def test_counts_and_histogram_cover_all_rows_if_a_sample_is_shown(
    write: Callable[..., Path],
) -> None:
    rows = [captioned_row(n) for n in range(30)] + [failed_row(n) for n in range(30, 35)]
    page = write(rows, sample=3)
    text = page.read_text(encoding="utf-8")
    assert len(data_of(page)["cards"]) == 3
    assert "A sample: 3 of 35 photos, chosen at random with seed 0." in text
    assert "<dt>photos</dt><dd>35</dd>" in text
    assert "<dt>failed</dt><dd>5</dd>" in text
    assert "75 to 80 %: 30." in text


def test_a_folder_of_parts_is_read_like_a_file(tmp_path: Path, write: Callable[..., Path]) -> None:
    folder = tmp_path / "captions"
    folder.mkdir()
    for n in range(2):
        write_rows(folder / f"part-00000{n}.parquet", [table_of([captioned_row(n)])], METADATA)
    assert [*cards_of(write([], captions=folder))] == ["0", "1"]


def test_an_output_without_rows_gives_a_page_without_photos(write: Callable[..., Path]) -> None:
    assert cards_of(write([])) == {}


@pytest.mark.parametrize("name", ["a.png", "folder/猫.png", "\udcff.png", "back\\slash.png"])
def test_photos_are_found_by_their_id(
    tmp_path: Path, write: Callable[..., Path], name: str
) -> None:
    sha256 = make_photo(tmp_path / "photos" / name)
    escaped = name.replace("\\", "\\\\").encode("utf-8", "surrogateescape")
    image_id = escaped.decode("utf-8", "backslashreplace")
    page = write([captioned_row(image_id, sha256=sha256)], images=tmp_path / "photos")
    card = cards_of(page)[image_id]
    assert base64.b64decode(card["photo"])[8:12] == b"WEBP"
    assert card["size"] == [200, 150]


def test_paths_in_a_list_are_relative_to_its_folder(
    tmp_path: Path, write: Callable[..., Path]
) -> None:
    sums = [make_photo(tmp_path / name) for name in ("lists/a.png", "b.png")]
    (tmp_path / "lists" / "list.txt").write_text("a.png\n../b.png\n")
    ids = ["a.png", "../b.png", str(tmp_path / "b.png")]
    rows = [captioned_row(*row) for row in zip(ids, [*"abc"], strict=True)]
    for row, sha256 in zip(rows, [*sums, sums[1]], strict=True):
        row["sha256"] = sha256
    cards = cards_of(write(rows, images=tmp_path / "lists" / "list.txt"))
    assert all("photo" in card for card in cards.values())


def rows_of(photos: dict[str, bytes]) -> list[Row]:
    """A row for each photo."""
    return [
        captioned_row(name, sha256=hashlib.sha256(data).hexdigest())
        for name, data in photos.items()
    ]


def assert_shows(page: Path, photos: Iterable[str]) -> None:
    """Assert that each of these cards has its photo, in its colour."""
    cards = cards_of(page)
    for name, colour in zip(photos, PHOTOS.values(), strict=False):
        with Image.open(io.BytesIO(base64.b64decode(cards[name]["photo"]))) as shown:
            pixel = np.array(shown.convert("RGB"))[5, 5].astype(int)
        assert np.abs(pixel - ImageColor.getrgb(colour)).max() < 20


def tars_of(folder: Path, photos: dict[str, bytes], *names: str) -> None:
    """Write the photos, in turn, to these tars, each with a film that has no caption."""
    for number, name in enumerate(names):
        members = list(photos.items())[number :: len(names)]
        write_tar(folder / name, [*members, (f"film-{number}.mp4", b"film")])


@pytest.mark.parametrize("source", ["x-0.tar", "x-*.tar", "x-{0..1}.tar", "x-0.tar.gz"])
def test_photos_are_found_in_tars(
    tmp_path: Path, write: Callable[..., Path], photos: dict[str, bytes], source: str
) -> None:
    if source.endswith(".gz"):
        write_tar(tmp_path / source, photos.items(), "w:gz")
    else:
        tars_of(tmp_path, photos, *(["x-0.tar"] if source == "x-0.tar" else ["x-0.tar", "x-1.tar"]))
    assert_shows(write(rows_of(photos), images=tmp_path / source), photos)


def test_photos_are_found_in_parquet_files_by_the_named_columns(
    tmp_path: Path, write: Callable[..., Path], photos: dict[str, bytes]
) -> None:
    table = pa.table({"bytes": list(photos.values()), "key": ["x", "y", "z"]})
    pq.write_table(table, tmp_path / "p-0.parquet")
    by_key = dict(zip("xyz", photos.values(), strict=True))
    source = {"images": tmp_path / "p-*.parquet", "image_column": "bytes"}
    assert_shows(write(rows_of(by_key), **source, id_column="key"), by_key)
    (tmp_path / "captions.parquet").unlink()
    by_row = {f"p-0.parquet:{n:07}": data for n, data in enumerate(photos.values())}
    assert_shows(write(rows_of(by_row), **source), by_row)
    with pytest.raises(UsageError, match=r"has no column 'image'.*--image-column"):
        write(rows_of(by_row), images=tmp_path / "p-0.parquet")


def test_first_of_two_photos_with_one_id_is_shown(
    tmp_path: Path, write: Callable[..., Path], photos: dict[str, bytes]
) -> None:
    write_tar(tmp_path / "0.tar", [("a.png", photos["a.png"])])
    write_tar(tmp_path / "1.tar", [("a.png", photos["d.png"]), ("b/c.png", photos["b/c.png"])])
    page = write(rows_of(photos), images=tmp_path / "*.tar")
    assert_shows(page, ["a.png", "b/c.png"])
    assert cards_of(page)["d.png"]["problem"] == "The photo was not found."


def test_photos_in_an_archive_that_has_changed_are_not_shown(
    tmp_path: Path, write: Callable[..., Path], photos: dict[str, bytes]
) -> None:
    write_tar(tmp_path / "x.tar", [("a.png", photos["d.png"]), ("b/c.png", b"no photo")])
    cards = cards_of(write(rows_of(photos), images=tmp_path / "x.tar"))
    assert not any("photo" in card for card in cards.values())
    assert cards["a.png"]["problem"] == "The photo has changed since it was captioned."


def test_report_finds_the_photos_of_any_input_of_run(
    tmp_path: Path, photos: dict[str, bytes]
) -> None:
    """`report --images` takes whatever `run` takes."""
    tars_of(tmp_path, photos, "x-0.tar", "x-1.tar")
    (tmp_path / "list.txt").write_text("photos/a.png\nphotos/d.png\n")
    for number, source in enumerate(("photos", "list.txt", "x-{0..1}.tar")):
        captions, page = tmp_path / f"{number}.parquet", tmp_path / f"{number}.html"
        given = str(tmp_path / source)
        assert batchcap_here("run", given, captions).returncode == 0
        done = batchcap_here("report", captions, page, "--images", given)
        assert done.returncode == 0, done.stderr
        cards = cards_of(page).values()
        assert cards
        assert all("photo" in card for card in cards)


def test_photos_are_found_behind_urls(
    tmp_path: Path, photos: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = tmp_path / "captions.parquet"
    write_rows(captions, [table_of(rows_of(photos))], METADATA)
    tars_of(tmp_path, photos, "x-0.tar", "x-1.tar")
    with s3_server() as port:
        for name, value in environment(port).items():
            monkeypatch.setenv(name, value)
        store = fsspec.filesystem("s3")
        store.mkdir("bucket")
        store.put(str(tmp_path / "photos"), "bucket/photos", recursive=True)
        for number in (0, 1):
            store.put(str(tmp_path / f"x-{number}.tar"), f"bucket/x-{number}.tar")
        store.pipe("bucket/odd//a.png", photos["a.png"])
        store.pipe("bucket/list.txt", "".join(f"photos/{name}\n" for name in photos).encode())
        listed = tmp_path / "listed.parquet"
        names = {f"photos/{name}": data for name, data in photos.items()}
        write_rows(listed, [table_of(rows_of(names))], METADATA)
        odd = tmp_path / "odd.parquet"
        write_rows(odd, [table_of(rows_of({"/a.png": photos["a.png"]}))], METADATA)
        for source, rows, ids in (
            ("s3://bucket/odd", odd, ["/a.png"]),
            ("s3://bucket/photos", captions, photos),
            ("s3://bucket/photos/", captions, photos),
            ("s3://bucket/x-*.tar", captions, photos),
            ("s3://bucket/list.txt", listed, names),
        ):
            page = tmp_path / "page.html"
            write_report(ReportSettings(captions=rows, out=page, images=source))
            assert_shows(page, ids)


def test_url_ids_are_requested_for_lists_only(
    tmp_path: Path, write: Callable[..., Path], photos: dict[str, bytes]
) -> None:
    """A stranger's captions must not make the report contact a server."""
    asked: list[str] = []

    class Asked(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def do_HEAD(self) -> None:
            self.do_GET()

    with ThreadingHTTPServer(("127.0.0.1", 0), Asked) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        row = captioned_row(f"http://127.0.0.1:{server.server_port}/a.png")
        assert not any("photo" in card for card in cards_of(write([row], images=tmp_path)).values())
        assert not asked
        (tmp_path / "list.txt").touch()
        write([row], images=tmp_path / "list.txt")
        assert asked
        server.shutdown()


@pytest.mark.parametrize(
    "source", ["nowhere", "nowhere.txt", "nowhere.tar", "x-{0..9}.tar", "no*.tar", "x.zip"]
)
def test_missing_or_unsupported_input_is_refused(
    tmp_path: Path, write: Callable[..., Path], source: str
) -> None:
    with pytest.raises((UsageError, InputError), match=r"check the path|unsupported archive"):
        write([captioned_row(0)], images=tmp_path / source)


def test_card_says_why_a_photo_is_not_shown(tmp_path: Path, write: Callable[..., Path]) -> None:
    make_photo(tmp_path / "changed.png")
    (tmp_path / "text.png").write_text("secret")
    secret = hashlib.sha256(b"secret").hexdigest()
    rows = [captioned_row("missing.png"), captioned_row("changed.png")]
    cards = cards_of(write([*rows, captioned_row("text.png", sha256=secret)], images=tmp_path))
    assert not any("photo" in card for card in cards.values())
    assert cards["missing.png"]["problem"] == "The photo was not found."
    assert cards["changed.png"]["problem"] == "The photo has changed since it was captioned."
    assert "not an image format" in cards["text.png"]["problem"]


def test_message_names_the_page_and_how_to_show_photos(tmp_path: Path) -> None:
    captions = tmp_path / "captions.parquet"
    write_rows(captions, [table_of([captioned_row(0), captioned_row(1)])], METADATA)
    asked = {"captions": captions, "out": tmp_path / "page.html"}
    line = r".*page\.html: 2 of 2 photos, 0\.0 MiB; add --images INPUT to show the photos"
    assert re.fullmatch(line, write_report(ReportSettings(**asked)))
    assert write_report(ReportSettings(**asked, images=str(tmp_path))).endswith("MiB; 2 missing")


def test_page_cannot_replace_the_files_it_is_made_from(
    tmp_path: Path, write: Callable[..., Path]
) -> None:
    page = write([captioned_row(0)])
    page.unlink()
    os.link(tmp_path / "captions.parquet", page)
    with pytest.raises(UsageError, match="overwrite"):
        write([])


def test_page_replaces_plain_files_only(tmp_path: Path, write: Callable[..., Path]) -> None:
    page = write([captioned_row(0)])
    page.rename(tmp_path / "other.html")
    page.symlink_to("other.html")
    before = (tmp_path / "other.html").stat().st_ino
    write([captioned_row(0)])
    assert page.is_symlink()
    assert (tmp_path / "other.html").stat().st_ino != before
    page.unlink()
    page.mkdir()
    with pytest.raises(UsageError, match="is a directory"):
        write([])


def test_page_inside_the_directory_of_a_run_is_refused(
    tmp_path: Path, write: Callable[..., Path]
) -> None:
    with pytest.raises(UsageError, match="the directory of a run"):
        write([], captions=tmp_path)


def test_failed_report_leaves_the_old_page(tmp_path: Path, write: Callable[..., Path]) -> None:
    page = write([captioned_row(0)])
    before = page.read_bytes()
    (tmp_path / "captions.parquet").write_bytes(b"PAR1damaged")
    with pytest.raises(InputError):
        write([])
    assert page.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"captions.parquet", "page.html"}


def test_report_imports_no_tensorflow(tmp_path: Path) -> None:
    write_rows(tmp_path / "c.parquet", [table_of([captioned_row(0)])], METADATA)
    code = (
        "import sys; from batchcap.cli import batchcap; "
        "batchcap(['report', 'c.parquet', 'p.html', '--images', '.'], standalone_mode=False); "
        "assert not {'tensorflow', 'keras'} & sys.modules.keys()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "p.html").exists()


def test_no_path_of_the_machine_is_in_the_page(tmp_path: Path, write: Callable[..., Path]) -> None:
    sha256 = make_photo(tmp_path / "a.png")
    page = write([captioned_row("a.png", sha256=sha256), failed_row("b.png")], images=tmp_path)
    assert str(tmp_path) not in page.read_text(encoding="utf-8")


def test_content_security_policy_names_the_pages_style_and_script(
    write: Callable[..., Path],
) -> None:
    text = write([captioned_row(0)]).read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)
    assert policy
    assert "unsafe" not in policy[1]
    for kind in ("style", "script"):
        block = re.search(f'<{kind}(?: type="module")?>(.*?)</{kind}>', text, re.DOTALL)
        assert block
        digest = base64.b64encode(hashlib.sha256(block[1].encode()).digest()).decode()
        named = re.search(f"{kind}-src '([^']+)'", policy[1].replace("&#39;", "'"))
        assert named
        assert named[1] == f"sha256-{digest}"


def test_only_the_first_failures_of_a_reason_are_named(write: Callable[..., Path]) -> None:
    rows = [failed_row(f"photo {n:03}", error_message="bad") for n in range(SHOWN_FAILURES + 5)]
    text = write(rows).read_text(encoding="utf-8")
    assert "<bdi>photo 199</bdi>" in text
    assert "<bdi>photo 200</bdi>" not in text
    assert "and 5 more" in text


def test_page_says_how_captions_were_made() -> None:
    decode = '{"max_length": 20, "beam_size": 5, "length_penalty": 1.0}'
    facts = made_with({**METADATA, "batchcap.model": "ab" * 32, "batchcap.decode": decode})
    assert facts["Model"] == "ab" * 6
    assert facts["Words"] == "beam of 5, at most 20 words, length penalty 1.0"
    assert made_with({"batchcap.decode": "[]"}) == {"Words": "[]"}
    assert made_with({}) == {}


def test_last_run_is_shown_from_its_summary(tmp_path: Path, write: Callable[..., Path]) -> None:
    summary = {
        "outcome": "done",
        "images_per_second": 12.34,
        "stage_seconds": {"load": 1, "write": 0.5},
    }
    (tmp_path / "captions.summary.json").write_text(json.dumps(summary))
    text = write([captioned_row(0)]).read_text(encoding="utf-8")
    assert "12.3 photos a second" in text
    assert "<dt>All threads</dt><dd><bdi>load 1.0 s, write 0.5 s</bdi></dd>" in text


@pytest.mark.parametrize("text", ["", "[]", "{", '{"stage_seconds": 3, "outcome": "\\ud800"}'])
def test_damaged_summary_is_ignored(tmp_path: Path, write: Callable[..., Path], text: str) -> None:
    (tmp_path / "captions.summary.json").write_text(text)
    assert cards_of(write([captioned_row(0)]))


def test_old_summary_is_shown_in_part() -> None:
    assert last_run({"seconds": None, "started_at": "2026-01-02T03:04:05+00:00"}) == {
        "Started": "2026-01-02 03:04:05 UTC"
    }


def test_bars_are_as_high_as_their_counts() -> None:
    bars = histogram(np.array([0.01, 0.02, 0.5, 1.0]))["bars"]
    assert bars[0] == (0, 2, 1.0)
    assert bars[10] == (50, 1, 0.5)
    assert bars[19] == (95, 1, 0.5)


@pytest.mark.parametrize(
    ("text", "grid"),
    [("4x6", (4, 6)), ("7x7", (7, 7)), ("", (7, 7)), ("0x3", (7, 7)), ("9" * 5000 + "x3", (7, 7))],
)
def test_grid_is_the_files_or_the_shipped_models(text: str, grid: tuple[int, int]) -> None:
    assert grid_of({"batchcap.grid": text}) == grid


def test_attention_is_kept_relative_to_the_strongest_cell(write: Callable[..., Path]) -> None:
    maps = [[0.1] * 5 + [0.5], [0.0] * 6]
    row = captioned_row("a", attention_map=maps)
    card = cards_of(write([row], {**METADATA, "batchcap.grid": "2x3"}))["a"]
    assert [*base64.b64decode(card["maps"])] == [51] * 5 + [255] + [0] * 6
    assert card["looks"] == []  # its strongest cell is in the third row, outside the grid


@pytest.mark.parametrize(
    "columns",
    [
        {"attention_map": [[0.5, 0.5]] * 2, "attention": None},
        {"attention_map": [[math.nan] * 49] * 2, "attention": [{**LOOK, "peak_row": 9}] * 2},
        {"attention_map": [None, None], "attention": [None, LOOK]},
        {"token_logprobs": [math.nan, math.inf], "mean_logprob": math.nan},
        {"tokens": None, "token_logprobs": None, "finished": None},
        {"caption": "", "tokens": [], "token_logprobs": [], "attention": [], "attention_map": []},
    ],
)
def test_inconsistent_rows_still_make_a_card(
    write: Callable[..., Path], columns: dict[str, Any]
) -> None:
    card = cards_of(write([captioned_row("a", **columns)]))["a"]
    assert card["looks"] == [] or "attention" not in columns


def test_scores_and_references_are_shown_with_their_own_captions(
    tmp_path: Path, write: Callable[..., Path]
) -> None:
    captions = ["一只photo", "另一句"]
    scored = evaluation(tmp_path / "scores.parquet", ["a", "b"], captions, [50.04, 10.0])
    page = write([captioned_row(n) for n in "abc"], evaluation=scored)
    cards = cards_of(page)
    assert cards["a"]["scores"]["cider_d"] == 50.0
    assert cards["a"]["scores"]["meteor"] is None
    assert cards["a"]["references"] == ["人写的a"]
    assert not any("scores" in cards[n] for n in "bc")
    text = page.read_text(encoding="utf-8")
    assert "<dt>CIDEr-D</dt><dd>81.3</dd>" in text
    assert "Scores of 1 caption: <bdi>signature|of|all</bdi>" in text


def test_an_evaluation_of_other_captions_is_refused(
    tmp_path: Path, write: Callable[..., Path]
) -> None:
    scored = evaluation(tmp_path / "scores.parquet", ["x"], ["一只photo"], [50.0])
    with pytest.raises(InputError, match="scores of none of these captions"):
        write([captioned_row("a")], evaluation=scored)
