"""Caption files as users have them, made by each test."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from batchcap.annotations import (
    ANNOTATION_READERS,
    AnnotatedImage,
    detect_format,
    read_annotations,
)
from batchcap.contracts import InputError, UsageError

FLICKR8K = Path(
    os.environ.get("BATCHCAP_FLICKR8K", Path(__file__).parents[2] / "shared/data/flickr8k-cn")
)


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
        {"image_id": "a.jpg", "captions": ["一只狗", "狗"]},
    ),
}


@pytest.mark.parametrize("format_name", ANNOTATION_READERS)
def test_each_format_is_detected_and_read_in_order_of_first_appearance(tmp_path, format_name):
    path = write(tmp_path / "captions", FORMATS[format_name])
    assert detect_format(path) == format_name
    read = [(image.image_id, image.captions) for image in read_annotations(path)]
    assert read == [("b.jpg", ("两只猫",)), ("a.jpg", ("一只狗", "狗"))]


def test_pretty_printed_coco_is_detected(tmp_path):
    path = write(tmp_path / "captions.json", json.dumps(COCO, indent=2))
    assert detect_format(path) == "coco"


def test_plain_flickr8k_has_no_kind(tmp_path):
    path = write(tmp_path / "c.txt", "a.jpg#0\tA dog .\na.jpg#1\tA cat .\n")
    assert read_annotations(path) == [AnnotatedImage("a.jpg", ("A dog .", "A cat ."), None)]


@pytest.mark.parametrize("extension", ["", ".jpg"])
def test_flickr8k_splits_stand_in_files_beside(tmp_path, extension):
    path = write(tmp_path / "c.txt", "a.jpg#zhc#0 甲\nb.jpg#zhc#0 乙\nc.jpg#zhc#0 丙\n")
    write(tmp_path / "train.txt", f"a{extension}\r\n")
    write(tmp_path / "test.txt", f"b{extension}\n")
    assert [image.split for image in read_annotations(path)] == ["train", "test", None]


def test_photo_in_two_split_files_is_wrong(tmp_path):
    path = write(tmp_path / "c.txt", "a.jpg#zhc#0 甲\n")
    write(tmp_path / "train.txt", "a\n")
    write(tmp_path / "val.txt", "a\n")
    with pytest.raises(InputError, match=r"a stands in train\.txt and in val\.txt"):
        read_annotations(path)


def test_split_is_read_from_coco_and_jsonl(tmp_path):
    assert [i.split for i in read_annotations(write(tmp_path / "c", COCO))] == ["val", None]
    records = jsonl({"image_id": "a", "caption": "甲", "split": "test"})
    assert read_annotations(write(tmp_path / "j", records))[0].split == "test"


def test_captions_are_nfc_with_single_spaces(tmp_path):
    records = jsonl({"image_id": "a", "caption": " cafe\u0301\u3000 一\t只\n狗 "})
    (image,) = read_annotations(write(tmp_path / "c.jsonl", records))
    assert image.captions == ("caf\u00e9 一 只 狗",)


def test_bom_and_crlf_are_tolerated(tmp_path):
    path = tmp_path / "c.txt"
    path.write_bytes("\ufeffa.jpg#zhc#0 甲\r\n\r\nb.jpg#zhc#0 乙\r\n".encode())
    assert [image.captions for image in read_annotations(path)] == [("甲",), ("乙",)]


WRONG = {
    "line without a caption number": ("a.jpg 一只狗\n", ":1: not `<file name>"),
    "line without caption": ("a.jpg#zhc#0 甲\nb.jpg#zhc#0\n", ":2: empty caption"),
    "caption number that stands twice": (
        "a.jpg#zhc#0 甲\na.jpg#zhc#0 乙\n",
        ":2: caption 0 of a.jpg stands twice",
    ),
    "stringified list": (
        jsonl({"image_id": "a", "caption": "['甲', '乙']"}),
        ":1: the caption is a list",
    ),
    "caption that is a number": (jsonl({"image_id": "a", "caption": 3}), ":1: the caption is 3"),
    "caption that is missing": (jsonl({"image_id": "a"}), ":1: the caption is missing"),
    "empty list of captions": (jsonl({"image_id": "a", "captions": []}), ":1: no caption"),
    "blank caption": (jsonl({"image_id": "a", "caption": " \u3000"}), ":1: empty caption"),
    "lone surrogate": (r'{"image_id": "a", "caption": "\ud800"}', ":1: the caption holds half"),
    "name that is a number": (jsonl({"image_id": 7, "caption": "甲"}), ":1: the name of the photo"),
    "record that is no object": ('{"image_id": "a", "caption": "甲"}\n[1]\n', ":2: \\[1\\] is not"),
    "broken JSON line": (
        '{"image_id": "a", "caption": "甲"}\n{"image_id" 3}\n',
        ":2:13: Expecting",
    ),
    "photo in two splits": (
        jsonl(*({"image_id": "a", "caption": "甲", "split": s} for s in ("train", "test"))),
        ":2: a stands in two splits",
    ),
    "array entry without caption": ([{"image_id": "a"}], ": entry 1: the caption is missing"),
    "array entry that is no object": ([3], ": entry 1: 3 is not an object"),
    "annotation of an unknown image": (
        {**COCO, "annotations": [*COCO["annotations"], {"image_id": 8, "caption": "x"}]},
        ": annotations entry 4: unknown image_id \\(8\\)",
    ),
    "image id that stands twice": (
        {**COCO, "images": [*COCO["images"], {"id": 7, "file_name": "c.jpg"}]},
        ": images entry 3: the id is taken",
    ),
    "image without captions": (
        {**COCO, "images": [*COCO["images"], {"id": 9, "file_name": "c.jpg"}]},
        ": c.jpg has no caption",
    ),
    "COCO without images": ({"annotations": []}, ": no list `images`"),
    "broken JSON": ('[\n {"image_id": "a",\n]', ":3:1: "),
    "empty file": ("", ": no captions"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_annotations_are_named_with_their_place(tmp_path, name):
    content, expected = WRONG[name]
    with pytest.raises(InputError, match=f"captions.in{expected}"):
        read_annotations(write(tmp_path / "captions.in", content))


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
    reason="Flickr8k-CN is not there; name its folder in BATCHCAP_FLICKR8K",
)
def test_flickr8k_cn_is_read_whole():
    images = read_annotations(FLICKR8K / "captions.zh.txt")
    assert Counter(image.split for image in images) == {"train": 6000, "val": 1000}
    assert {len(image.captions) for image in images} == {5}


def test_report_on_annotations_moves_no_cursor(tmp_path):
    document = {"images": [{"id": 1, "file_name": "\x1b[2J.jpg"}], "annotations": []}
    (tmp_path / "c.json").write_text(json.dumps(document))
    with pytest.raises(InputError) as caught:
        read_annotations(tmp_path / "c.json")
    assert "?[2J.jpg has no caption" in str(caught.value)
