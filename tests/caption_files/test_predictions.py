import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from helpers.rows import METADATA, captioned_row, failed_row

from batchcap.caption_files.predictions import (
    GeneratedCaption,
    metadata_of,
    read_captions,
    read_rows,
)
from batchcap.errors import InputError, UsageError
from batchcap.rows.parquet import table_of, write_rows


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    path = tmp_path / "captions.parquet"
    write_rows(
        path, [table_of([captioned_row("a.jpg", "狗")]), table_of([failed_row("b.jpg")])], METADATA
    )
    return path


def test_rows_of_a_run_are_captions_with_their_confidence(captions: Path) -> None:
    first, second = read_captions(captions)
    assert first == GeneratedCaption("a.jpg", "一只狗", ("一只", "狗"), -0.25, finished=True)
    assert second == GeneratedCaption("b.jpg", None)


def test_rows_have_the_metadata_of_their_file(captions: Path) -> None:
    assert metadata_of(next(read_rows(captions))) == METADATA


def test_a_folder_of_parts_is_read_in_the_order_of_its_parts(tmp_path: Path) -> None:
    folder = tmp_path / "captions"
    folder.mkdir()
    for number in (1, 0):
        path = folder / f"part-{number:06}.parquet"
        write_rows(path, [table_of([captioned_row(number)])], METADATA)
    assert [one.image_id for one in read_captions(folder)] == ["0", "1"]


def test_coco_results_and_ai_challenger_submissions_are_arrays(tmp_path: Path) -> None:
    records = [{"image_id": 7, "caption": "一只  狗"}, {"image_id": "d9a9", "caption": ""}]
    path = write(tmp_path / "results.json", json.dumps(records))
    assert read_captions(path) == [
        GeneratedCaption("7", "一只 狗", number=7),
        GeneratedCaption("d9a9", ""),
    ]


def test_json_lines_may_have_the_fields_of_rows(tmp_path: Path) -> None:
    record = {
        "image_id": "a",
        "caption": "一只狗",
        "tokens": ["一只", "狗"],
        "mean_logprob": -0.5,
        "finished": False,
        "status": "ok",
    }
    failed = {"image_id": "b", "caption": None, "status": "failed"}
    path = write(tmp_path / "c.jsonl", f"{json.dumps(record)}\n\n{json.dumps(failed)}\n")
    first, second = read_captions(path)
    assert first == GeneratedCaption("a", "一只狗", ("一只", "狗"), -0.5, finished=False)
    assert second == GeneratedCaption("b", None)


def test_image_folders_and_csv_are_captions(tmp_path: Path) -> None:
    metadata = write(tmp_path / "metadata.jsonl", '{"file_name": "a.jpg", "text": "一只狗"}\n')
    assert read_captions(metadata) == [GeneratedCaption("a.jpg", "一只狗")]
    rows = "\ufeffimage_id,status,caption\na.jpg,ok,一只狗\nb.jpg,failed,\n"
    table = write(tmp_path / "captions.csv", rows)
    assert read_captions(table) == [
        GeneratedCaption("a.jpg", "一只狗"),
        GeneratedCaption("b.jpg", None),
    ]


def test_a_photo_whose_caption_is_null_has_none(tmp_path: Path) -> None:
    path = write(tmp_path / "c.json", '[{"image_id": "a", "caption": null}]')
    assert read_captions(path) == [GeneratedCaption("a", None)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "c.json",
            '[{"image_id": 1, "caption": "a"}, {"image_id": "1", "caption": "b"}]',
            "duplicate",
        ),
        ("c.json", '[{"image_id": 1.5, "caption": "a"}]', "entry 1: image_id must be .* not 1.5"),
        ("c.json", '[{"image_id": true, "caption": "a"}]', "image_id must be .* not True"),
        ("c.json", '[{"caption": "a"}]', "image_id must be .* not missing"),
        ("c.json", '[{"image_id": 1}]', "the caption is missing"),
        ("c.txt", "a dog\n", "has no captions. Known formats: an output of batchcap run"),
        ("c.json", '{"images": []}', "image_id must be .* not missing"),
        ("c.json", '[{"image_id": 1, "caption": ["a"]}]', "the caption is \\['a'\\]"),
        ("c.json", """[{"image_id": 1, "caption": "['a', 'b']"}]""", "list written as text"),
        ("c.json", "[3]", "3 is not an object"),
        ("c.json", "[]", "has no captions"),
        ("c.json", "[" * 100_000, "nested too deeply"),
        ("c.jsonl", '{"image_id": "a"\n', "c.jsonl:1:"),
        ("c.jsonl", "", "has no captions"),
    ],
)
def test_wrong_captions_are_named_with_their_place(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read_captions(write(tmp_path / name, content))


def test_damaged_file_is_reported_with_advice(captions: Path) -> None:
    captions.write_bytes(captions.read_bytes()[:-20])
    with pytest.raises(InputError, match="repeat the run, which redoes"):
        read_captions(captions)


def test_foreign_parquet_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.parquet"
    pq.write_table(table_of([captioned_row()]).select(["image_id", "caption"]), path)
    with pytest.raises(InputError, match="has other columns than batchcap's"):
        read_captions(path)


def test_folder_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no rows"):
        read_captions(tmp_path)


@pytest.mark.parametrize("name", ["none.parquet", "none.json"])
def test_a_missing_file_is_a_usage_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="there is no"):
        read_captions(tmp_path / name)
