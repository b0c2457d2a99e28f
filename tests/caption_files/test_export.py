"""Exports, read back by the programs they are for: pycocotools, datasets, csv, pandas, DuckDB."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from helpers.rows import METADATA, captioned_row, failed_row, sum_of
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO

from batchcap.caption_files.annotations import AnnotatedImage, read_annotations
from batchcap.caption_files.export import EXPORTERS, export_captions
from batchcap.caption_files.matching import LEAST_HASH, coco_number, hashed_number, match, stem
from batchcap.caption_files.predictions import read_captions
from batchcap.cli import batchcap
from batchcap.errors import InputError, OutputError, UsageError
from batchcap.evaluation.evaluate import evaluate_captions
from batchcap.photos.listing import image_id_of
from batchcap.rows.parquet import Row, table_of, write_rows
from batchcap.settings import (
    CAPTIONS_THEMSELVES,
    EvaluateSettings,
    ExportFormat,
    ExportSettings,
    MatchBy,
)

OF_ROWS = (ExportFormat.JSONL, ExportFormat.CSV, ExportFormat.IMAGEFOLDER)
COCO_NAME, FLICKR_NAME = "COCO_val2014_000000391895.jpg", "1000268201_693b08cb0e.jpg"


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    """Return an output with one caption and one failure."""
    return run_of(tmp_path, captioned_row("a/1.jpg", "狗"), failed_row("b/2.jpg"))


def run_of(folder: Path, *rows: Row) -> Path:
    """Write an output of a run, with one row per row group."""
    path = folder / "captions.parquet"
    write_rows(path, [table_of([row]) for row in rows], METADATA)
    return path


def export(source: Path, name: str, form: ExportFormat, references: bool = False) -> Path:
    out = source.parent / name
    export_captions(
        ExportSettings(
            captions=source,
            out=out,
            format=form,
            references=CAPTIONS_THEMSELVES if references else None,
        )
    )
    return out


def references_of(folder: Path, captions: dict[str, list[str]], split: str | None = None) -> Path:
    """Write references as JSON lines."""
    path = folder / "people.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for image_id, texts in captions.items():
            record = {"image_id": image_id, "captions": texts, "split": split}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return path


def message_of(source: Path, name: str, form: ExportFormat) -> str:
    return export_captions(
        ExportSettings(captions=source, out=source.parent / name, format=form)
    ).replace(f"{source.parent}/", "")


def make_photo(folder: Path, name: str, content: bytes = b"photo") -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def test_coco_results_to_the_byte(captions: Path) -> None:
    out = export(captions, "results.json", ExportFormat.COCO)
    assert out.read_text("utf-8") == (
        '[\n{"image_id": 1, "caption": "一只狗", "file_name": "a/1.jpg"}\n]\n'
    )


def test_coco_references_to_the_byte(tmp_path: Path) -> None:
    people = references_of(tmp_path, {"a/1.jpg": ["狗。", "“狗”"], "b/2.jpg": ["猫"]}, split="val")
    out = export(people, "references.json", ExportFormat.COCO, references=True)
    assert out.read_text("utf-8") == (
        '{"info": {"description": "Captions of people.jsonl"}, "licenses": [], '
        '"type": "captions",\n"images": [\n'
        '{"id": 1, "file_name": "a/1.jpg", "split": "val"},\n'
        '{"id": 2, "file_name": "b/2.jpg", "split": "val"}\n'
        '],\n"annotations": [\n'
        '{"id": 1, "image_id": 1, "caption": "狗。"},\n'
        '{"id": 2, "image_id": 1, "caption": "“狗”"},\n'
        '{"id": 3, "image_id": 2, "caption": "猫"}\n'
        "]}\n"
    )


def test_ai_challenger_to_the_byte(captions: Path) -> None:
    out = export(captions, "submission.json", ExportFormat.AI_CHALLENGER)
    assert out.read_text("utf-8") == '[\n{"image_id": "1", "caption": "一只狗"}\n]\n'


def test_jsonl_to_the_byte(captions: Path) -> None:
    look = '{"row": 1.5, "col": 0.5, "peak_row": 2, "peak_col": 0, "peak": 0.25, "entropy": 3.5}'
    written = '"run_id": "r", "created_at": "2024-05-17T12:30:00.000000Z", '
    rest = '"edited_at": null, "familiarity": null}\n'
    out = export(captions, "rows.jsonl", ExportFormat.JSONL)
    assert out.read_text("utf-8") == (
        '{"image_id": "a/1.jpg", "status": "ok", "caption": "一只狗", "tokens": ["一只", "狗"], '
        '"token_ids": [7, 9], "token_logprobs": [-0.5, -0.25, -0.125], "logprob": -0.875, '
        f'"mean_logprob": -0.25, "finished": true, "attention": [{look}, {look}], '
        '"attention_map": [[0.25, 0.75], [0.5, 0.5]], "width": 640, "height": 480, '
        '"file_size": 1099511627776, "mtime_ns": 1152921504606846976, '
        f'"sha256": "{sum_of("狗")}", "error_type": null, "error_message": null, {written}'
        f'"caption_source": "model", {rest}'
        '{"image_id": "b/2.jpg", "status": "failed", "caption": null, "tokens": null, '
        '"token_ids": null, "token_logprobs": null, "logprob": null, "mean_logprob": null, '
        '"finished": null, "attention": null, "attention_map": null, "width": null, '
        '"height": null, "file_size": null, "mtime_ns": null, "sha256": null, '
        f'"error_type": "corrupt", "error_message": null, {written}'
        f'"caption_source": null, {rest}'
    )


def test_csv_to_the_byte(captions: Path) -> None:
    out = export(captions, "rows.csv", ExportFormat.CSV)
    assert out.read_bytes().decode("utf-8") == (
        "\ufeffimage_id,status,caption,tokens,logprob,mean_logprob,finished,width,height,"
        "file_size,sha256,error_type,error_message\r\n"
        "a/1.jpg,ok,一只狗,一只 狗,-0.875,-0.25,True,640,480,1099511627776,"
        f"{sum_of('狗')},,\r\n"
        "b/2.jpg,failed,,,,,,,,,,corrupt,\r\n"
    )


def test_imagefolder_to_the_byte(captions: Path) -> None:
    make_photo(captions.parent, "a/1.jpg")
    out = export(captions, "metadata.jsonl", ExportFormat.IMAGEFOLDER)
    assert out.read_text("utf-8") == (
        '{"file_name": "a/1.jpg", "text": "一只狗", "mean_logprob": -0.25}\n'
    )


def test_every_format_has_its_exporter() -> None:
    assert set(EXPORTERS) == set(ExportFormat)


@pytest.mark.parametrize(
    ("form", "name", "message"),
    [
        (ExportFormat.COCO, "o.json", "wrote o.json: 1 caption; left out 1 without a caption"),
        (ExportFormat.AI_CHALLENGER, "o", "wrote o: 1 caption; left out 1 without a caption"),
        (ExportFormat.JSONL, "o.jsonl", "wrote o.jsonl: 2 rows, 1 caption"),
        (ExportFormat.CSV, "o.csv", "wrote o.csv: 2 rows, 1 caption"),
    ],
)
def test_message_counts_captions_and_omissions(
    form: ExportFormat, name: str, message: str, captions: Path
) -> None:
    assert message_of(captions, name, form) == message


@pytest.mark.parametrize("form", ExportFormat)
def test_export_imports_nothing_heavy(form: ExportFormat, captions: Path) -> None:
    make_photo(captions.parent, "a/1.jpg")
    program = (
        "import sys, batchcap.cli as cli\n"
        "try: cli.main(sys.argv[1:])\n"
        "finally: assert not {'tensorflow', 'jieba', 'pandas'} & sys.modules.keys()\n"
    )
    arguments = ["export", captions, captions.with_name("metadata.jsonl"), "--format", form]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "1 caption" in done.stdout


@pytest.mark.parametrize(
    "names",
    [
        (COCO_NAME, "COCO_val2014_000000000042.jpg"),
        (FLICKR_NAME, "997722733_0cb5439472.jpg"),
        ("8f23ff57b9571a69.jpg", "海边.jpg"),
        (COCO_NAME, FLICKR_NAME, "海边.jpg", "1-2.jpg"),
    ],
)
def test_pycocotools_pairs_captions_and_references_exported_apart(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    source = run_of(tmp_path, *(captioned_row(f"sub/{name}", name) for name in names))
    people = references_of(tmp_path, {name: [f"人写的{name}"] for name in reversed(names)})
    results = export(source, "results.json", ExportFormat.COCO)
    references = export(people, "references.json", ExportFormat.COCO, references=True)
    coco = COCO(str(references))
    generated = coco.loadRes(str(results))
    assert len(generated.getImgIds()) == len(names)
    for number, (image,) in ((number, coco.loadImgs(number)) for number in generated.getImgIds()):
        (ours,), (theirs,) = generated.imgToAnns[number], coco.imgToAnns[number]
        assert ours["caption"] == f"一只{image['file_name']}"
        assert theirs["caption"] == f"人写的{image['file_name']}"


def test_names_of_coco_and_flickr_keep_their_numbers(tmp_path: Path) -> None:
    source = run_of(tmp_path, captioned_row(COCO_NAME), captioned_row(FLICKR_NAME))
    out = export(source, "results.json", ExportFormat.COCO)
    assert [result["image_id"] for result in json.loads(out.read_text())] == [391895, 1000268201]
    assert not (tmp_path / "results.images.json").exists()


def test_mapping_lists_hashed_ids(tmp_path: Path) -> None:
    source = run_of(tmp_path, captioned_row("海边.jpg"), failed_row("7.jpg"))
    message = message_of(source, "results.v1.json", ExportFormat.COCO)
    assert "1 id hashed from names: results.v1.images.json lists all photos' ids" in message
    images = json.loads((tmp_path / "results.v1.images.json").read_text("utf-8"))
    assert images == [
        {"id": coco_number("海边.jpg"), "file_name": "海边.jpg"},
        {"id": 7, "file_name": "7.jpg"},
    ]
    assert images[0]["id"] >= LEAST_HASH


def test_photos_that_share_a_number_get_hashes_of_their_whole_names(tmp_path: Path) -> None:
    """Even if one of them has failed: the others' ids do not depend on that."""
    source = run_of(tmp_path, captioned_row("a/1.jpg"), failed_row("b/1.jpg"), captioned_row("2"))
    message = message_of(source, "results.json", ExportFormat.COCO)
    assert "2 photos shared their numbers with others" in message
    results = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert [result["image_id"] for result in results] == [hashed_number("a/1.jpg"), 2]
    images = json.loads((tmp_path / "results.images.json").read_text("utf-8"))
    assert [image["file_name"] for image in images] == ["a/1.jpg", "b/1.jpg", "2"]


def test_duplicate_photos_are_named(tmp_path: Path) -> None:
    source = run_of(tmp_path, captioned_row("a/1.jpg"), captioned_row("a/1.jpg"))
    with pytest.raises(InputError, match=r"a/1\.jpg and a/1\.jpg get the same COCO id"):
        export(source, "results.json", ExportFormat.COCO)
    assert not (tmp_path / "results.json").exists()


def test_references_keep_the_ids_they_have(tmp_path: Path) -> None:
    people = tmp_path / "people.json"
    document = {
        "images": [{"id": 77, "file_name": "a_1.jpg"}, {"id": "x", "file_name": "b_2.jpg"}],
        "annotations": [{"image_id": 77, "caption": "狗"}, {"image_id": "x", "caption": "猫"}],
    }
    people.write_text(json.dumps(document))
    out = export(people, "references.json", ExportFormat.COCO, references=True)
    assert [(image.image_id, image.number) for image in read_annotations(out)] == [
        ("a_1.jpg", 77),
        ("b_2.jpg", 2),
    ]


def test_references_read_back_as_they_were(flickr8k: Path, tmp_path: Path) -> None:
    out = tmp_path / "references.json"
    people = flickr8k / "captions.zh.txt"
    export_captions(
        ExportSettings(
            captions=people, out=out, format=ExportFormat.COCO, references=CAPTIONS_THEMSELVES
        )
    )

    def fields_of(images: list[AnnotatedImage]) -> list[tuple[object, ...]]:
        return [(image.image_id, image.captions, image.split) for image in images]

    assert fields_of(read_annotations(out)) == fields_of(read_annotations(people))
    assert len(COCO(str(out)).getImgIds()) == len(read_annotations(people))


def test_exported_captions_match_their_references(tmp_path: Path) -> None:
    names = [COCO_NAME, FLICKR_NAME, "海边.jpg"]
    source = run_of(tmp_path, *(captioned_row(f"sub/{name}") for name in names))
    generated = read_captions(export(source, "results.json", ExportFormat.COCO))
    found = match(
        [(caption.image_id, caption.number) for caption in generated],
        [(name, None) for name in names],
    )
    assert found.pairs == [(0, 0), (1, 1), (2, 2)]


def coco_references(folder: Path, numbers: dict[str, int]) -> Path:
    """Write a COCO file whose ids are not the numbers in the names."""
    path = folder / "people.json"
    document = {
        "images": [{"id": number, "file_name": name} for name, number in numbers.items()],
        "annotations": [
            {"id": number, "image_id": number, "caption": f"人写的{name}"}
            for name, number in numbers.items()
        ],
    }
    path.write_text(json.dumps(document))
    return path


def test_results_score_like_the_rows_they_came_from(tmp_path: Path) -> None:
    """They were scored against other photos if the references had their own ids."""
    names = [f"{number}.jpg" for number in range(1, 9)]
    people = coco_references(tmp_path, {name: 1 + (i + 3) % 8 for i, name in enumerate(names)})
    source = run_of(tmp_path, *(captioned_row(name, f"人写的{name}") for name in names))
    results = export(source, "results.json", ExportFormat.COCO)
    first, second = (
        evaluate_captions(EvaluateSettings(captions=path, references=people))
        for path in (source, results)
    )
    assert (first.matched_by, second.matched_by) == ("image_id", "image_id")
    assert first.scores == second.scores
    assert first.scores["bleu_1"].value > 75


def test_results_get_the_ids_of_references(tmp_path: Path) -> None:
    people = coco_references(tmp_path, {"1.jpg": 2, "x/2.jpg": 1, "海边.jpg": 7, "9.jpg": 3})
    names = ["1.jpg", "x/2.jpg", "海边.jpg", "3.jpg"]
    source = run_of(tmp_path, *(captioned_row(name, name) for name in names))
    out = tmp_path / "results.json"
    message = export_captions(
        ExportSettings(captions=source, out=out, format=ExportFormat.COCO, references=people)
    )
    assert message == f"wrote {out}: 3 captions; left out 1 not in people.json"
    coco = COCO(str(people))
    generated = coco.loadRes(str(out))
    for number in (2, 1, 7):
        (ours,), (theirs,) = generated.imgToAnns[number], coco.imgToAnns[number]
        assert theirs["caption"] == f"人写的{ours['caption'].removeprefix('一只')}"


def test_no_captions_give_empty_results(tmp_path: Path) -> None:
    out, people = tmp_path / "results.json", coco_references(tmp_path, {"1.jpg": 2})
    settings = ExportSettings(
        captions=run_of(tmp_path), out=out, format=ExportFormat.COCO, references=people
    )
    assert export_captions(settings) == f"wrote {out}: 0 captions"
    assert json.loads(out.read_text()) == []


def test_references_give_ids_to_photos_whose_names_share_a_number(tmp_path: Path) -> None:
    """Exported separately, captions of `a/1.jpg` alone have the id 1, its references a hash."""
    people = references_of(tmp_path, {"a/1.jpg": ["狗"], "b/1.jpg": ["猫"]})
    source = run_of(tmp_path, captioned_row("a/1.jpg"))
    out = tmp_path / "results.json"
    settings = ExportSettings(captions=source, out=out, format=ExportFormat.COCO, references=people)
    assert "2 photos shared their numbers" in export_captions(settings)
    assert json.loads(out.read_text())[0]["image_id"] == hashed_number("a/1.jpg")
    references = export(people, "references.json", ExportFormat.COCO, references=True)
    assert hashed_number("a/1.jpg") in COCO(str(references)).getImgIds()


def test_differing_ids_are_reported(tmp_path: Path) -> None:
    people = coco_references(tmp_path, {"1.jpg": 1, "2.jpg": 5})
    settings = ExportSettings(
        captions=people,
        out=tmp_path / "o.json",
        format=ExportFormat.COCO,
        references=CAPTIONS_THEMSELVES,
    )
    assert export_captions(settings).endswith(
        "\n1 photo with an id other than the number in the name; export captions with "
        f"--references {people}, so that they get the same ids"
    )
    source = run_of(tmp_path, captioned_row("a/1.jpg"), captioned_row("b/1.jpg"))
    message = message_of(source, "o.json", ExportFormat.COCO)
    assert "their whole names; --references FILE gives the ids of references" in message


def test_references_that_fit_in_two_ways_are_refused(tmp_path: Path) -> None:
    people = coco_references(tmp_path, {"1.jpg": 2, "2.jpg": 1})
    source = tmp_path / "results.json"
    source.write_text('[{"image_id": 1, "caption": "狗"}, {"image_id": 2, "caption": "猫"}]')
    arguments = ["export", source, tmp_path / "o.json", "--format", "coco", "--references", people]
    refused = CliRunner().invoke(batchcap, [*map(str, arguments)])
    assert isinstance(refused.exception, InputError)
    assert "--match-by coco-id or --match-by" in str(refused.exception)
    done = CliRunner().invoke(batchcap, [*map(str, arguments), "--match-by", "number"])
    assert done.exit_code == 0
    assert [one["image_id"] for one in json.loads((tmp_path / "o.json").read_text())] == [2, 1]


@pytest.mark.parametrize("references", [None, CAPTIONS_THEMSELVES])
def test_match_by_without_references_is_refused(references: Path | None) -> None:
    with pytest.raises(UsageError, match="needs --references FILE"):
        ExportSettings(
            captions=Path(),
            out=Path(),
            format=ExportFormat.COCO,
            references=references,
            match_by=MatchBy.NAME,
        )
    with pytest.raises(UsageError, match="needs REFERENCES"):
        EvaluateSettings(captions=Path(), match_by=MatchBy.NAME)


def test_references_without_a_file_are_the_captions(tmp_path: Path) -> None:
    people = references_of(tmp_path, {"1.jpg": ["狗", "小狗"]})
    arguments = ["export", people, tmp_path / "o.json", "--format", "coco", "--references"]
    done = CliRunner().invoke(batchcap, [*map(str, arguments)])
    assert done.output.endswith("2 captions of 1 photo\n")


def test_mapping_of_an_earlier_export_is_removed(tmp_path: Path) -> None:
    mapping = tmp_path / "results.images.json"
    export(run_of(tmp_path, captioned_row("海边.jpg")), "results.json", ExportFormat.COCO)
    assert mapping.exists()
    source = run_of(tmp_path, captioned_row("1.jpg"))
    export(source, "results.json", ExportFormat.COCO)
    assert not mapping.exists()
    for foreign in ("[1]", "{", '{"a": 1}', '[{"id": 1, "file_name": "a", "width": 2}]'):
        mapping.write_text(foreign)
        export(source, "results.json", ExportFormat.COCO)
        assert mapping.read_text() == foreign


def test_photos_with_the_same_stem_are_named(tmp_path: Path) -> None:
    source = run_of(tmp_path, captioned_row("a/x.jpg"), captioned_row("b/x.png"))
    with pytest.raises(InputError, match=r"a/x\.jpg and b/x\.png have the same id"):
        export(source, "submission.json", ExportFormat.AI_CHALLENGER)


def test_empty_captions_which_the_scorer_refuses_are_left_out(tmp_path: Path) -> None:
    source = tmp_path / "results.json"
    source.write_text('[{"image_id": "a", "caption": ""}, {"image_id": "b", "caption": "狗"}]')
    message = message_of(source, "submission.json", ExportFormat.AI_CHALLENGER)
    assert message == "wrote submission.json: 1 caption; left out 1 without a caption"


def test_jsonl_reads_back_as_the_rows(captions: Path) -> None:
    out = export(captions, "rows.jsonl", ExportFormat.JSONL)
    assert read_captions(out) == read_captions(captions)
    made = pd.read_json(out, lines=True)
    assert made["caption"].to_list()[0] == "一只狗"
    assert str(made["created_at"][0]) == "2024-05-17 12:30:00+00:00"
    found = duckdb.sql(f"SELECT mtime_ns, attention[2].peak, error_type FROM '{out}'").fetchall()
    assert found == [(2**60, 0.25, None), (None, None, "corrupt")]


def test_jsonl_numbers_are_finite_and_short(tmp_path: Path) -> None:
    logprobs = [-0.1, float("nan"), float("-inf")]
    row = captioned_row(token_logprobs=logprobs, logprob=float("nan"), mean_logprob=-1e-30)
    out = export(run_of(tmp_path, row), "rows.jsonl", ExportFormat.JSONL)
    read = json.loads(out.read_text("utf-8"))
    assert (read["token_logprobs"], read["logprob"]) == ([-0.1, None, None], None)
    assert np.float32(read["mean_logprob"]) == np.float32(-1e-30)


HOSTILE = [
    *("=cmd|' /C calc'!A0", "+1", "-1", "@SUM(1)", "\t=1", "\r=1", "\n=1", "＝1", " =1"),
    *("'", "''=1", 'say "狗"', "a,b;c", "two\nlines", "a\\xff.jpg", ""),
]
SAFE = ['say "狗"', "a,b;c", "two\nlines", "a\\xff.jpg", ""]
CELLS = st.text(st.sampled_from("=+-@＝＋－＠'\" \t\r\n\0\ufeff,;a") | st.characters(codec="utf-8"))


def texts_of(out: Path, column: str) -> list[str]:
    with out.open(encoding="utf-8-sig", newline="") as file:
        return [row[column] for row in csv.DictReader(file)]


@given(texts=st.lists(CELLS, min_size=1, max_size=20))
def test_no_cell_is_a_formula_and_every_text_comes_back(
    texts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows = [failed_row(i, error_message=text) for i, text in enumerate(texts)]
    path = tmp_path_factory.mktemp("csv") / "captions.parquet"
    write_rows(path, [table_of(rows)], METADATA)
    cells = texts_of(export(path, "rows.csv", ExportFormat.CSV), "error_message")
    assert not any(cell[:1] in tuple("=+-@＝＋－＠\t\r\n") for cell in cells if cell)
    assert [cell.removeprefix("'") for cell in cells] == texts


def test_pandas_and_duckdb_read_hostile_texts(tmp_path: Path) -> None:
    rows = (captioned_row(f"{i}", caption=text) for i, text in enumerate(HOSTILE))
    out = export(run_of(tmp_path, *rows), "rows.csv", ExportFormat.CSV)
    cells = [text if text in SAFE else f"'{text}" for text in HOSTILE]
    assert texts_of(out, "caption") == cells
    made = pd.read_csv(out, keep_default_na=False)
    assert made["caption"].to_list() == cells
    assert made["logprob"].to_list() == [-0.875] * len(cells)  # a number is not a formula
    found = duckdb.sql(f"SELECT coalesce(caption, ''), logprob FROM '{out}'").fetchall()
    assert found == [(cell, -0.875) for cell in cells]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return `load_dataset` without network, and with its own cache."""
    cache = str(tmp_path_factory.mktemp("hugging-face"))
    for name, value in {
        "HF_HOME": cache,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }.items():
        monkeypatch.setenv(name, value)
    from datasets import load_dataset

    return partial(load_dataset, "imagefolder", split="train", cache_dir=cache)


def photos_under(folder: Path, names: Sequence[str], photos_folder: Path) -> None:
    """Copy photos of different sizes to these names."""
    for name, photo in zip(names, sorted(photos_folder.rglob("*.jpg")), strict=False):
        make_photo(folder, name, photo.read_bytes())


def test_datasets_loads_each_photo_with_its_caption(
    load: Any, tmp_path: Path, photos_folder: Path
) -> None:
    names = ["z.jpg", "海/边 #1%20.jpg", "two\nlines.jpg", "=1.jpg"]
    photos_under(tmp_path, names, photos_folder)
    make_photo(tmp_path, "corrupt.jpg")
    make_photo(tmp_path, ".dot.jpg")
    rows = [captioned_row(name, name) for name in names]
    source = run_of(tmp_path, failed_row("corrupt.jpg"), *rows, captioned_row("gone.jpg"))
    message = message_of(source, "metadata.jsonl", ExportFormat.IMAGEFOLDER)
    assert message == (
        "wrote metadata.jsonl: 4 captions; left out 1 without a caption, 1 not in the folder of OUT"
    )
    loaded = load(data_dir=str(tmp_path))
    assert loaded["text"][:] == [f"一只{name}" for name in names]
    for image, name in zip(loaded["image"], names, strict=True):
        assert image == Image.open(tmp_path / name)


def test_datasets_loads_names_that_look_like_splits(
    load: Any, tmp_path: Path, photos_folder: Path
) -> None:
    """`datasets` takes them for splits and drops the captions, unless given `data_files`."""
    names = ["train/1.jpg", "test/2.jpg", "val_3.jpg"]
    photos_under(tmp_path, names, photos_folder)
    source = run_of(tmp_path, *(captioned_row(name, name) for name in names))
    export(source, "metadata.jsonl", ExportFormat.IMAGEFOLDER)
    loaded = load(data_dir=str(tmp_path), data_files="metadata.jsonl")
    assert loaded["text"][:] == [f"一只{name}" for name in names]
    assert [image.size for image in loaded["image"]] == [
        Image.open(tmp_path / name).size for name in names
    ]


def test_lines_of_a_list_become_paths_below_the_folder(tmp_path: Path) -> None:
    make_photo(tmp_path, "in/a/1.jpg")
    make_photo(tmp_path, "other/2.jpg")
    lines = [f"{tmp_path}/in/a/1.jpg", "../in/a/1.jpg", "../other/2.jpg"]
    source = run_of(tmp_path, *map(captioned_row, lines))
    export(source, "in/metadata.jsonl", ExportFormat.IMAGEFOLDER)
    written = (tmp_path / "in/metadata.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["file_name"] for line in written] == ["a/1.jpg", "a/1.jpg"]


def test_names_that_datasets_cannot_open_are_left_out(tmp_path: Path) -> None:
    names = ["a\udcff.jpg", "a\\b.jpg", "c.jpg"]
    for name in names:
        make_photo(tmp_path, name)
    source = run_of(tmp_path, *(captioned_row(image_id_of(name)) for name in names))
    message = message_of(source, "metadata.jsonl", ExportFormat.IMAGEFOLDER)
    assert message == (
        "wrote metadata.jsonl: 1 caption; left out 2 whose name is not UTF-8 or has a backslash"
    )


@pytest.mark.parametrize("name", ["metadata.csv", "captions.jsonl"])
def test_imagefolder_says_which_name_it_needs(name: str, captions: Path) -> None:
    with pytest.raises(UsageError, match=r"writes metadata\.jsonl, .* beside the photos"):
        export(captions, name, ExportFormat.IMAGEFOLDER)


def test_imagefolder_says_where_it_belongs(captions: Path) -> None:
    with pytest.raises(UsageError, match=r"put metadata\.jsonl into INPUT of the run"):
        export(captions, "metadata.jsonl", ExportFormat.IMAGEFOLDER)
    assert not captions.with_name("metadata.jsonl").exists()


@pytest.mark.parametrize("form", ExportFormat)
def test_hostile_names_come_back(form: ExportFormat, tmp_path: Path) -> None:
    names = ["two\nlines.jpg", 'say "狗".jpg', "=cmd().jpg", "\u2028.jpg", "a\udcff.jpg"]
    for name in names:
        make_photo(tmp_path, name)
    ids = [image_id_of(name) for name in names]
    source = run_of(tmp_path, *map(captioned_row, ids))
    out = export(source, "metadata.jsonl", form)
    if form is ExportFormat.COCO:
        mapping = json.loads((tmp_path / "metadata.images.json").read_text("utf-8"))
        read = [image["file_name"] for image in mapping]
    elif form is ExportFormat.CSV:
        read = [cell.removeprefix("'") for cell in texts_of(out, "image_id")]
    elif form is ExportFormat.IMAGEFOLDER:
        lines = out.read_text("utf-8").split("\n")[:-1]
        read, ids = [json.loads(line)["file_name"] for line in lines], ids[:-1]
    else:
        read = [caption.image_id for caption in read_captions(out)]
        ids = [*map(stem, ids)] if form is ExportFormat.AI_CHALLENGER else ids
    assert read == ids


def test_names_with_lone_surrogates_are_written(tmp_path: Path) -> None:
    source = tmp_path / "others.json"
    source.write_text(r'[{"image_id": "\ud800", "caption": "狗"}]', "utf-8")
    out = export(source, "submission.json", ExportFormat.AI_CHALLENGER)
    assert json.loads(out.read_text("utf-8")) == [{"image_id": "\ud800", "caption": "狗"}]


@pytest.mark.parametrize("form", ExportFormat)
def test_a_folder_of_parts_is_exported_whole(form: ExportFormat, tmp_path: Path) -> None:
    folder = tmp_path / "captions"
    folder.mkdir()
    for i in range(2):
        make_photo(tmp_path, f"{i}.jpg")
        rows = table_of([captioned_row(f"{i}.jpg")])
        write_rows(folder / f"part-{i:06}.parquet", [rows], METADATA)
    assert "2 captions" in message_of(folder, "metadata.jsonl", form)


@pytest.mark.parametrize("form", ExportFormat)
@pytest.mark.parametrize("before", [None, "old content"])
def test_failed_export_leaves_out_unchanged(
    form: ExportFormat, before: str | None, captions: Path
) -> None:
    """The second row group is damaged, so that the first is written before the failure."""
    folder = captions.parent
    make_photo(folder, "a/1.jpg")
    if before is not None:
        (folder / "metadata.jsonl").write_text(before)
    column = pq.read_metadata(captions).row_group(1).column(0)
    content = bytearray(captions.read_bytes())
    content[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    captions.write_bytes(content)
    files = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(InputError, match=r"captions\.parquet"):
        export(captions, "metadata.jsonl", form)
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == files


def test_a_folder_that_is_missing_is_named(captions: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot write .*nowhere/rows\.csv: No such file"):
        export(captions, "nowhere/rows.csv", ExportFormat.CSV)


@pytest.mark.parametrize("form", OF_ROWS)
def test_formats_of_rows_need_the_rows_of_a_run(form: ExportFormat, tmp_path: Path) -> None:
    source = tmp_path / "results.json"
    source.write_text('[{"image_id": 1, "caption": "狗"}]', "utf-8")
    with pytest.raises(UsageError, match=r"needs the rows of a run, which .*results"):
        export(source, "metadata.jsonl", form)


def test_captions_of_other_programs_become_coco(tmp_path: Path) -> None:
    source = tmp_path / "submission.json"
    source.write_text('[{"image_id": "COCO_val2014_000000391895", "caption": "狗"}]', "utf-8")
    out = export(source, "results.json", ExportFormat.COCO)
    assert json.loads(out.read_text("utf-8")) == [
        {"image_id": 391895, "caption": "狗", "file_name": "COCO_val2014_000000391895"}
    ]


def test_rows_of_a_run_are_not_references(captions: Path) -> None:
    with pytest.raises(UsageError, match="omit --references"):
        export(captions, "references.json", ExportFormat.COCO, references=True)


def test_captions_are_never_overwritten(captions: Path) -> None:
    results = export(captions, "results.json", ExportFormat.COCO)
    mapping = results.rename(captions.with_name("results.images.json"))
    for source, name in [(captions, captions.name), (mapping, mapping.name), (mapping, "results")]:
        with pytest.raises(UsageError, match="overwrite"):
            export(source, name, ExportFormat.COCO)


def test_the_folder_of_a_run_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "captions"
    folder.mkdir()
    part = folder / "part-000000.parquet"
    write_rows(part, [table_of([captioned_row()])], METADATA)
    with pytest.raises(UsageError, match="the directory of a run"):
        export(folder, "captions/part-000000.parquet", ExportFormat.CSV)
    with pytest.raises(UsageError, match="give a file in it"):
        export(part, "../captions", ExportFormat.CSV)


@pytest.mark.parametrize("form", ExportFormat)
def test_pipes_and_devices_are_not_replaced(form: ExportFormat, captions: Path) -> None:
    """As root, `export captions.parquet /dev/full` replaced the device by a file."""
    pipe, link = captions.with_name("pipe"), captions.with_name("link")
    os.mkfifo(pipe)
    link.symlink_to("pipe")
    for out in (pipe, link):
        with pytest.raises(UsageError, match="not a regular file"):
            export(captions, out.name, form)
    assert pipe.is_fifo()


def test_writes_where_a_symlink_leads(captions: Path) -> None:
    """Links to regular files are followed, even dangling ones."""
    out, link = captions.with_name("far") / "out.json", captions.with_name("link.json")
    out.parent.mkdir()
    link.symlink_to("far/out.json")
    for _ in range(2):  # dangling at first
        export(captions, link.name, ExportFormat.COCO)
        assert json.loads(out.read_text())
        assert link.is_symlink()
    link.unlink()
    link.symlink_to(captions)
    with pytest.raises(UsageError, match="overwrite"):
        export(captions, link.name, ExportFormat.COCO)
    link.unlink()
    link.symlink_to(link)
    with pytest.raises(OutputError, match="symbolic links"):
        export(captions, link.name, ExportFormat.COCO)
