"""Resuming outputs of earlier versions, which `golden/make_outputs.py` made."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from golden.make_outputs import NEW_PHOTO, bucket, copy_photos
from helpers import small_model  # noqa: F401 - the golden models have its backbone
from helpers.places import GOLDEN

from batchcap.caption_files.predictions import read_captions, read_rows
from batchcap.captioning.run import plan_run, run_captioning
from batchcap.captioning.summary import RunSummary
from batchcap.errors import OtherOutputError
from batchcap.rows import layout as layouts
from batchcap.rows.index import newest_rows
from batchcap.rows.layout import layout_of
from batchcap.rows.merge import merge_captions
from batchcap.rows.writer import Upgrades, check_identity
from batchcap.schema import ARROW_SCHEMA
from batchcap.settings import DEFAULT_MODEL, MergeSettings, Precision, RunSettings

OUTPUTS = GOLDEN / "outputs"
VERSIONS = sorted(path.name for path in OUTPUTS.iterdir())
OLD_IDS = ["animals/cat.jpg", "astronaut.jpg", "coffee.jpg", "photographer.jpg"]
ALL_IDS = [*OLD_IDS, NEW_PHOTO]


@pytest.fixture(params=VERSIONS)
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return shutil.copytree(OUTPUTS / request.param, tmp_path / "golden")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def old_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy_photos(tmp_path_factory.mktemp("photos"))
    (folder / NEW_PHOTO).unlink()
    return folder


@pytest.fixture(scope="module")
def store() -> Iterator[Any]:
    with bucket("golden") as store:
        yield store


def settings_for(golden: Path, source: Path, output: Path | str, **asked: Any) -> RunSettings:
    usual = {"model": golden / "model", "batch_size": 2, "min_length": 3}
    return RunSettings(source=str(source), output=output, **{**usual, **asked})


def run(golden: Path, source: Path, output: Path | str, **asked: Any) -> RunSummary:
    return run_captioning(settings_for(golden, source, output, **asked))


def rows_in(output: Path, shard: tuple[int, int] = (0, 1)) -> pa.Table:
    rows = pa.concat_tables(newest_rows(layout_of(output, shard).row_files()))
    return rows.sort_by("image_id")


def files_in(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and "summary" not in path.name]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("name", ["captions", "captions.parquet"])
def test_resumes_an_output_of_an_earlier_version(golden, photos, old_photos, name):
    before = rows_in(golden / name)
    untouched = files_in(golden)
    assert run(golden, old_photos, golden / name).counts.already_done == 4
    assert files_in(golden) == untouched
    summary = run(golden, photos, golden / name)
    assert (summary.counts.already_done, summary.counts.captioned) == (4, 1)
    rows = rows_in(golden / name)
    assert rows["image_id"].to_pylist() == ALL_IDS
    assert rows["caption_source"].to_pylist() == ["model"] * 5
    is_old = [image_id in OLD_IDS for image_id in ALL_IDS]
    assert rows.filter(pa.array(is_old)).equals(before)
    for path in layout_of(golden / name).row_files():  # other programs see one schema
        assert pq.read_schema(path).remove_metadata().equals(ARROW_SCHEMA)
        assert pq.read_schema(path).metadata[b"batchcap.schema"] == b"2"
    assert run(golden, photos, golden / name).counts.already_done == 5


def test_resumes_a_killed_run_of_an_earlier_version(golden, photos):
    summary = run(golden, photos, golden / "killed.parquet")
    assert (summary.counts.already_done, summary.counts.captioned) == (2, 3)
    assert rows_in(golden / "killed.parquet")["image_id"].to_pylist() == ALL_IDS


@pytest.mark.parametrize("name", ["shards", "shards.parquet"])
def test_resumes_and_merges_shards_of_an_earlier_version(golden, photos, name, tmp_path):
    merge_captions(MergeSettings(captions=golden / name, output=tmp_path / "old.parquet"))
    assert sorted(rows_in(tmp_path / "old.parquet")["image_id"].to_pylist()) == OLD_IDS
    done = [run(golden, photos, golden / name, shard=f"{index}/2") for index in range(2)]
    assert sum(summary.counts.already_done for summary in done) == 4
    assert sum(summary.counts.captioned for summary in done) == 1
    merge_captions(MergeSettings(captions=golden / name, output=tmp_path / "new"))
    assert rows_in(tmp_path / "new")["image_id"].to_pylist() == ALL_IDS


@pytest.mark.parametrize("name", ["captions", "captions.parquet"])
def test_resumes_an_output_of_an_earlier_version_in_a_store(
    golden, photos, store, name, tmp_path, monkeypatch
):
    monkeypatch.setattr(layouts, "cache_folder", lambda folder: tmp_path / "cache" / folder)
    store.put(f"{golden / 'store'}/", "golden/", recursive=True)
    summary = run(golden, photos, f"s3://golden/{name}")
    assert (summary.counts.already_done, summary.counts.captioned) == (4, 1)
    store.get("golden/", f"{tmp_path / 'fetched'}/", recursive=True)
    assert rows_in(tmp_path / "fetched" / name)["image_id"].to_pylist() == ALL_IDS


@pytest.mark.parametrize("name", ["captions", "captions.parquet"])
def test_reads_captions_of_an_earlier_version(golden, name):
    assert [caption.image_id for caption in read_captions(golden / name)] == OLD_IDS
    for table in read_rows(golden / name):
        assert table.schema.names == ARROW_SCHEMA.names
        assert table["caption_source"].to_pylist() == ["model"] * len(table)
        assert table["edited_at"].null_count == table["familiarity"].null_count == len(table)


def test_missing_decode_setting_means_its_default(golden, photos):
    path = golden / "captions.parquet"
    table = pq.read_table(path)
    decode = json.loads(table.schema.metadata[b"batchcap.decode"])
    del decode["no_repeat_ngram"]
    metadata = table.schema.metadata | {b"batchcap.decode": json.dumps(decode).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), path, write_page_checksum=True)
    assert "1 new" in plan_run(settings_for(golden, photos, path))
    with pytest.raises(OtherOutputError, match=r"\(no_repeat_ngram 0\).*\(no_repeat_ngram 2\)"):
        plan_run(settings_for(golden, photos, path, no_repeat_ngram=2))


def test_resumes_in_the_precision_of_the_output(golden, photos, old_photos):
    output = golden / "bfloat16"
    tensorflow = {"runtime": "tensorflow"}
    run(golden, old_photos, output, precision=Precision.BFLOAT16, **tensorflow)
    summary = run(golden, photos, output, **tensorflow)
    assert (summary.counts.already_done, summary.counts.captioned) == (4, 1)
    assert summary.metadata["batchcap.precision"] == "bfloat16"
    with pytest.raises(OtherOutputError, match="another precision"):
        run(golden, photos, output, precision=Precision.FLOAT32)


@pytest.mark.parametrize("precision", [None, b"auto", b"int3"])
def test_unknown_precision_is_refused(golden, photos, precision):
    path = golden / "captions.parquet"
    table = pq.read_table(path)
    metadata = {k: v for k, v in table.schema.metadata.items() if k != b"batchcap.precision"}
    metadata |= {b"batchcap.precision": precision} if precision else {}
    pq.write_table(table.replace_schema_metadata(metadata), path, write_page_checksum=True)
    with pytest.raises(OtherOutputError, match="another precision"):
        run(golden, photos, path)


@pytest.mark.parametrize("name", ["captions", "captions.parquet"])
def test_output_of_another_shipped_model_is_refused_with_advice(golden, photos, name):
    before = files_in(golden)
    with pytest.raises(OtherOutputError) as refusal:
        run(golden, photos, golden / name, model=DEFAULT_MODEL)
    assert refusal.value.exit_code == 4
    for way in ("--model", "--on-existing overwrite", "another OUTPUT"):
        assert way in str(refusal.value)
    assert "this version of batchcap ships" in str(refusal.value)
    assert files_in(golden) == before
    found = {"batchcap.model": "abc"}
    with pytest.raises(OtherOutputError, match="than this run's"):
        check_identity("o", [golden / "captions.parquet"], found, Upgrades())
