"""Reading caption files in the formats that users have."""

import gzip
import json
import logging
from collections import Counter
from pathlib import Path

import pytest
from helpers.places import data_set
from helpers.rows import METADATA, captioned_row, failed_row
from hypothesis import given
from hypothesis import strategies as st

from batchcap.caption_files.annotations import AnnotatedImage, clean, read_annotations
from batchcap.caption_files.export import export_captions
from batchcap.errors import InputError, UsageError
from batchcap.rows.parquet import table_of, write_rows
from batchcap.settings import ExportFormat, ExportSettings

FLICKR8K = data_set("BATCHCAP_FLICKR8K", "flickr8k-cn")


def write(path: Path, content: object) -> Path:
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    path.write_text(text, encoding="utf-8")
    return path


def jsonl(*records: object) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


COCO = {
    "images": [
        {"id": 7, "file_name": "b.jpg", "split": "val"},
        {"id": 3, "file_name": "a.jpg"},
    ],
    "annotations": [
        {"image_id": 3, "id": 1, "caption": "一只狗"},
        {"image_id": 7, "id": 2, "caption": "两只猫"},
        {"image_id": 3, "id": 3, "caption": "狗"},
    ],
}

FORMATS = {
    "flickr8k": "b.jpg#zhc#0 两只猫\na.jpg#zhc#0 一只狗\na.jpg#zhc#1 狗\n",
    "ai-challenger": [
        {"url": "http://x", "image_id": "b.jpg", "caption": ["两只猫"]},
        {"image_id": "a.jpg", "caption": ["一只狗", "狗"]},
    ],
    "coco": COCO,
    "jsonl": jsonl(
        {"image_id": "b.jpg", "caption": "两只猫"},
        {"image_id": "a.jpg", "captions": ["一只狗", "狗"], "annotations": 2, "images": 1},
    ),
    "Karpathy": {
        "dataset": "flickr8k",
        "images": [
            {"filename": "b.jpg", "split": "test", "sentences": [{"raw": "两只猫", "tokens": []}]},
            {"filename": "a.jpg", "sentences": [{"raw": "一只狗"}, {"raw": "狗"}]},
        ],
    },
    "imagefolder": jsonl(
        {"file_name": "b.jpg", "text": "两只猫", "mean_logprob": -0.5},
        {"file_name": "a.jpg", "text": ["一只狗", "狗"]},
    ),
    "CSV": "file_name,width,text\nb.jpg,3,两只猫\na.jpg,3,一只狗\na.jpg,3,狗\n",
}


B_AND_A = [("b.jpg", ("两只猫",)), ("a.jpg", ("一只狗", "狗"))]


def read(path: Path) -> list[tuple[str, tuple[str, ...]]]:
    return [(image.image_id, image.captions) for image in read_annotations(path)]


@pytest.mark.parametrize("format_name", FORMATS)
def test_each_format_is_detected_and_read_in_order_of_first_appearance(tmp_path, format_name):
    path = write(tmp_path / "captions", FORMATS[format_name])
    assert read(path) == B_AND_A


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "gzip"])
@pytest.mark.parametrize("format_name", FORMATS)
def test_each_format_is_read_in_other_encodings(tmp_path, format_name, encoding):
    path = write(tmp_path / "captions", FORMATS[format_name])
    text = path.read_text(encoding="utf-8")
    if encoding == "gzip":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text("\ufeff" * encoding.endswith("be") + text, encoding=encoding)
    assert read(path) == B_AND_A


def test_pretty_printed_coco_is_detected(tmp_path):
    assert read(write(tmp_path / "captions.json", json.dumps(COCO, indent=2))) == B_AND_A


def test_karpathys_splits_and_coco_ids_are_read(tmp_path):
    splits = ["train", "restval", "val", "test"]
    images = [
        {
            "filepath": "val2014",
            "filename": f"{split}.jpg",
            "cocoid": number,
            "imgid": 0,
            "split": split,
            "sentences": [{"raw": "一只 狗", "tokens": ["一只", "狗"]}],
        }
        for number, split in enumerate(splits, start=391895)
    ]
    path = write(tmp_path / "dataset_coco.json", {"images": images, "dataset": "coco"})
    assert read_annotations(path) == [
        AnnotatedImage("val2014/train.jpg", ("一只 狗",), "train", 391895),
        AnnotatedImage("val2014/restval.jpg", ("一只 狗",), "train", 391896),
        AnnotatedImage("val2014/val.jpg", ("一只 狗",), "val", 391897),
        AnnotatedImage("val2014/test.jpg", ("一只 狗",), "test", 391898),
    ]


def test_exported_imagefolder_is_read(tmp_path):
    (tmp_path / "a.jpg").touch()
    rows = [table_of([captioned_row("a.jpg", "狗"), failed_row("b.jpg")])]
    write_rows(tmp_path / "captions.parquet", rows, METADATA)
    path = tmp_path / "metadata.jsonl"
    export_captions(
        ExportSettings(
            captions=tmp_path / "captions.parquet", out=path, format=ExportFormat.IMAGEFOLDER
        )
    )
    assert read(path) == [("a.jpg", ("一只狗",))]


def test_number_beside_a_file_name_is_the_coco_id(tmp_path):
    record = {"image_id": 391895, "file_name": "a.jpg", "caption": "狗"}
    assert read_annotations(write(tmp_path / "c.jsonl", jsonl(record))) == [
        AnnotatedImage("a.jpg", ("狗",), number=391895)
    ]


def test_coco_ids_are_compared_whole(tmp_path):
    same_start = "2017/train/a-long-folder-name/photo-number-"
    path = write(
        tmp_path / "coco.json",
        {
            "images": [{"id": f"{same_start}{i}", "file_name": f"{i}.jpg"} for i in range(2)],
            "annotations": [
                {"image_id": f"{same_start}{i}", "caption": f"狗{i}"} for i in range(2)
            ],
        },
    )
    assert read(path) == [("0.jpg", ("狗0",)), ("1.jpg", ("狗1",))]


def test_plain_flickr8k_has_no_kind(tmp_path):
    path = write(tmp_path / "c.txt", "a.jpg#0\tA dog .\na.jpg#1\tA cat .\n")
    assert read_annotations(path) == [AnnotatedImage("a.jpg", ("A dog .", "A cat ."), None)]


HASHED = {
    "beach#1.jpg#0 一只狗": ("beach#1.jpg", "一只狗"),
    "beach#2.jpg#zhm#0 一只猫": ("beach#2.jpg", "一只猫"),
    "my #1 dog.JPG#zhb#2 狗 #3": ("my #1 dog.JPG", "狗 #3"),
    "a.jpg#0 #1 的球衣": ("a.jpg", "#1 的球衣"),
    "b.jpg#1 看 a.jpg#0 的狗": ("b.jpg", "看 a.jpg#0 的狗"),
    "2258277193_586949ec62.jpg.1#0 人": ("2258277193_586949ec62.jpg.1", "人"),
    "#.jpg#0 狗": ("#.jpg", "狗"),
}


def test_number_sign_is_part_of_a_photos_name_or_caption(tmp_path):
    path = write(tmp_path / "c.txt", "\n".join(HASHED))
    assert read(path) == [(name, (caption,)) for name, caption in HASHED.values()]


def test_names_without_an_extension_end_at_the_first_number_before_a_blank(tmp_path):
    path = write(tmp_path / "c.txt", "beach#1#0 看 a.jpg#1 的狗\nbeach#2#zhc#0 #1 的球衣\n")
    assert read(path) == [("beach#1", ("看 a.jpg#1 的狗",)), ("beach#2", ("#1 的球衣",))]


@given(
    st.one_of(
        st.text("#01. 狗").map(lambda name: f"{name}.jpg".lstrip()),
        st.from_regex("[01狗](#?[01.][01狗]?)*", fullmatch=True),
    ),
    st.sampled_from(["#", "#zhc#"]),
    st.text("#01. 狗").filter(str.strip),
)
def test_flickr8k_names_and_captions_come_back(tmp_path_factory, name, mark, caption):
    path = write(tmp_path_factory.getbasetemp() / "c.txt", f"{name}{mark}0 {caption}\n")
    assert read(path) == [(name, (clean(caption),))]


@pytest.mark.parametrize("extension", ["", ".jpg"])
def test_flickr8k_splits_are_read_from_files_beside(tmp_path, extension):
    path = write(tmp_path / "c.txt", "a.jpg#zhc#0 甲\nb.jpg#zhc#0 乙\nc.jpg#zhc#0 丙\n")
    write(tmp_path / "train.txt", f"a{extension}\r\n")
    write(tmp_path / "test.txt", f"b{extension}\n")
    assert [image.split for image in read_annotations(path)] == ["train", "test", None]


def test_photo_in_two_split_files_is_wrong(tmp_path):
    path = write(tmp_path / "c.txt", "a.jpg#zhc#0 甲\n")
    write(tmp_path / "train.txt", "a\n")
    write(tmp_path / "val.txt", "a.jpg\n")
    with pytest.raises(InputError, match=r"a\.jpg is in two splits, train and val"):
        read_annotations(path)


def test_files_that_list_no_photos_give_no_splits(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = write(tmp_path / "c.txt", "a.jpg#zhc#0 甲\nb.jpg#zhc#0 乙\n")
    write(tmp_path / "train.txt", "a\nb.jpg\n")
    write(tmp_path / "val.txt", "一个 人\n两个 人\n")
    write(tmp_path / "test.txt", "looked at on Monday:\na.jpg\n")
    assert [image.split for image in read_annotations(path)] == ["train", "train"]
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        (
            "INFO",
            f"{tmp_path}/val.txt is not used as a split: 0 of 2 lines name photos of c.txt",
        ),
        (
            "WARNING",
            f"{tmp_path}/test.txt is not used as a split: 1 of 2 lines name photos of c.txt",
        ),
    ]


def test_split_is_read_from_coco_and_jsonl(tmp_path):
    assert [i.split for i in read_annotations(write(tmp_path / "c", COCO))] == ["val", None]
    records = jsonl({"image_id": "a", "caption": "甲", "split": "test"})
    assert read_annotations(write(tmp_path / "j", records))[0].split == "test"


def test_captions_keep_their_styles_if_others_are_skipped(tmp_path):
    record = {"captions": ["甲", "", "乙"], "styles": ["short", "short", None]}
    path = write(tmp_path / "captions", jsonl({"image_id": "a", **record}))
    assert read_annotations(path) == [
        AnnotatedImage("a", ("甲", "乙"), styles=("short", None)),
    ]


def test_captions_are_nfc_with_single_spaces(tmp_path):
    records = jsonl({"image_id": "a", "caption": " cafe\u0301\u3000 一\t只\n狗 "})
    (image,) = read_annotations(write(tmp_path / "c.jsonl", records))
    assert image.captions == ("caf\u00e9 一 只 狗",)


def test_bom_and_crlf_are_tolerated(tmp_path):
    path = tmp_path / "c.txt"
    path.write_bytes("\ufeffa.jpg#zhc#0 甲\r\n\r\n\ufeffb.jpg#zhc#0 乙\r\n".encode())
    assert [image.captions for image in read_annotations(path)] == [("甲",), ("乙",)]


WRONG = {
    "line without a caption number": ("a.jpg 一只狗\n", ":1: not `<file name>"),
    "duplicate caption number": (
        "a.jpg#zhc#0 甲\na.jpg#zhc#0 乙\n",
        ":2: duplicate caption 0 of a.jpg",
    ),
    "stringified list": (
        jsonl({"image_id": "a", "caption": "['甲', '乙']"}),
        ":1: the caption is a list",
    ),
    "caption that is a number": (jsonl({"image_id": "a", "caption": 3}), ":1: the caption is 3"),
    "caption that is missing": (jsonl({"image_id": "a"}), ":1: the caption is missing"),
    "lone surrogate": (r'{"image_id": "a", "caption": "\ud800"}', ":1: the caption holds half"),
    "name that is a number": (jsonl({"image_id": 7, "caption": "甲"}), ":1: the photo's name"),
    "record that is not an object": (
        '{"image_id": "a", "caption": "甲"}\n[1]\n',
        ":2: \\[1\\] is not",
    ),
    "fewer styles than captions": (
        jsonl({"image_id": "a", "captions": ["甲", "乙"], "styles": ["short"]}),
        ":1: `styles` is \\['short'\\], not a list",
    ),
    "styles that are a string": (
        jsonl({"image_id": "a", "caption": "甲", "styles": "short"}),
        ":1: `styles` is 'short', not a list",
    ),
    "style that is not a name": (
        jsonl({"image_id": "a", "caption": "甲", "styles": ["Very short\n"]}),
        ":1: the style 'Very short\\\\n' is not",
    ),
    "broken JSON line": (
        '{"image_id": "a", "caption": "甲"}\n{"image_id" 3}\n',
        ":2:13: Expecting",
    ),
    "photo in two splits": (
        jsonl(*({"image_id": "a", "caption": "甲", "split": s} for s in ("train", "test"))),
        ":2: a is in two splits, train and test",
    ),
    "array entry without caption": ([{"image_id": "a"}], ": entry 1: the caption is missing"),
    "array entry that is not an object": ([3], ": entry 1: 3 is not an object"),
    "image id that is a list": (
        {**COCO, "annotations": [{"image_id": [3], "caption": "狗"}]},
        ": annotations entry 1: unknown image_id \\[3\\]",
    ),
    "duplicate image id": (
        {**COCO, "images": [*COCO["images"], {"id": 7, "file_name": "c.jpg"}]},
        ": images entry 3: duplicate id",
    ),
    "COCO without images": ({"annotations": []}, ": no list `images`"),
    "COCO without captions": ({"images": []}, ": no list `annotations`"),
    "sentence that is not an object": (
        {"images": [{"filename": "a.jpg", "sentences": ["狗"]}]},
        ": images entry 1: a sentence must be an object, not '狗'",
    ),
    "row with too many cells": ("file_name,text\na.jpg,狗,猫\n", ":2: more cells than"),
    "quote without an end": ('file_name,text\na.jpg,"狗\nb.jpg,猫\n', ":2: unexpected end of data"),
    "number with too many digits": ('[{"id": ' + "1" * 5000 + "}]", ": lists or objects .* digits"),
    "broken JSON": ('[\n {"image_id": "a",\n]', ":3:1: "),
    "empty file": ("", " has no captions. Known formats: Flickr8k"),
    "log": ("12:00 started\n", ":1: not `<file name>.*\nKnown formats: Flickr8k"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_annotations_are_named_with_their_place(tmp_path, name):
    content, expected = WRONG[name]
    with pytest.raises(InputError, match=f"captions.in{expected}"):
        read_annotations(write(tmp_path / "captions.in", content))


SKIPPED = {
    "line without caption": (
        "a.jpg#zhc#0 狗\nb.jpg#zhc#0\n",
        ["1 empty caption, such as {}:2", "1 photo without a caption, such as b.jpg"],
    ),
    "blank caption beside another": (
        jsonl({"image_id": "a.jpg", "captions": [" \u3000", "狗", None]}),
        ["2 empty captions, such as {}:1"],
    ),
    "lists of no captions": (
        jsonl(
            {"image_id": "b.jpg", "captions": []},
            {"image_id": "a.jpg", "caption": "狗"},
            {"image_id": "c.jpg", "captions": []},
        ),
        ["2 photos without a caption, such as b.jpg"],
    ),
    "caption that is null": (
        [{"image_id": "a.jpg", "caption": "狗"}, {"image_id": "b.jpg", "caption": None}],
        ["1 empty caption, such as {}: entry 2", "1 photo without a caption, such as b.jpg"],
    ),
    "COCO captions of another image, and an image without": (
        {
            "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "\x1b[2J.jpg"}],
            "annotations": [{"image_id": 8, "caption": "猫"}, {"image_id": 1, "caption": "狗"}],
        },
        [
            "1 caption of an unknown photo, such as {}: annotations entry 1: image_id 8",
            "1 photo without a caption, such as ?[2J.jpg",
        ],
    ),
    "photo without sentences": (
        {
            "images": [
                {"filename": "b.jpg", "sentences": []},
                {"filename": "a.jpg", "sentences": [{"raw": "狗"}]},
            ]
        },
        ["1 photo without a caption, such as b.jpg"],
    ),
    "row without a cell": (
        "file_name,text\na.jpg,狗\nb.jpg\n",
        ["1 empty caption, such as {}:3", "1 photo without a caption, such as b.jpg"],
    ),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_unusable_photos_and_captions_are_skipped_and_counted(tmp_path, caplog, name):
    content, messages = SKIPPED[name]
    path = write(tmp_path / "captions.in", content)
    assert read(path) == [("a.jpg", ("狗",))]
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: skipped {reason.format(path)}" for reason in messages
    ]


def test_damaged_gzip_file_is_named(tmp_path):
    path = tmp_path / "c.json.gz"
    path.write_bytes(gzip.compress(b"[]" * 1000)[:-9])
    with pytest.raises(InputError, match=r"c\.json\.gz is a damaged gzip file .*copy it again"):
        read_annotations(path)


def test_all_wrong_lines_are_counted_and_ten_are_shown(tmp_path):
    path = write(tmp_path / "c.txt", "a.jpg#zhc#0 甲\n" + "wrong\n" * 14)
    with pytest.raises(InputError) as caught:
        read_annotations(path)
    first, *shown = str(caught.value).splitlines()
    assert "14 wrong entries" in first
    assert [line.strip() for line in shown] == [
        f"{path}:{number}: not `<file name>#<number> <caption>`" for number in range(2, 12)
    ]


def test_lines_that_are_not_utf8_are_named(tmp_path):
    path = tmp_path / "c.txt"
    path.write_bytes("a.jpg#zhc#0 甲\nb.jpg#zhc#0 ".encode() + "乙".encode("gbk") + b"\n")
    with pytest.raises(InputError, match=r"c\.txt:2: not UTF-8"):
        read_annotations(path)


def test_json_that_is_not_utf8_is_named_with_its_line(tmp_path):
    path = tmp_path / "c.json"
    path.write_bytes(b'[\n"\xff"]')
    with pytest.raises(InputError, match=r"c\.json:2: not UTF-8"):
        read_annotations(path)


def test_missing_annotations_are_a_usage_error(tmp_path):
    with pytest.raises(UsageError):
        read_annotations(tmp_path / "none.json")


@pytest.mark.skipif(
    not (FLICKR8K / "captions.zh.txt").is_file(),
    reason="Flickr8k-CN not found; set BATCHCAP_FLICKR8K to its folder",
)
def test_flickr8k_cn_is_read_whole():
    images = read_annotations(FLICKR8K / "captions.zh.txt")
    assert Counter(image.split for image in images) == {"train": 6000, "val": 1000}
    assert {len(image.captions) for image in images} == {5}
