from batchcap.caption_files.annotations import AnnotatedImage
from batchcap.caption_files.matching import match
from batchcap.caption_files.predictions import GeneratedCaption
from batchcap.evaluation.warnings import (
    id_warnings,
    score_warnings,
    script_warnings,
    word_warnings,
)

FIVE = ["一只狗"] * 5


def about_ids(ours: list[GeneratedCaption], theirs: list[str]) -> list[str]:
    annotated = [AnnotatedImage(name, ("狗",)) for name in theirs]
    found = match([(one.image_id, None) for one in ours], [(name, None) for name in theirs])
    return list(id_warnings("c.json", ours, annotated, found))


def test_images_of_one_side_only_are_counted_and_one_is_named() -> None:
    ours = [GeneratedCaption(name, "狗") for name in ("a", "b\x1b[2J", "c")]
    assert about_ids(ours, ["a", "d"]) == [
        "c.json: skipped 2 captions (such as 'b?[2J') without references",
        "c.json: skipped 1 reference image (such as 'd') without a caption",
    ]


def test_photos_that_failed_are_counted() -> None:
    ours = [GeneratedCaption("a", "狗"), GeneratedCaption("b", None)]
    (warning,) = about_ids(ours, ["a", "b"])
    assert warning == "c.json: skipped 1 failed photo (such as 'b')"


def test_matching_files_give_no_warning() -> None:
    assert about_ids([GeneratedCaption("a", "狗")], ["a"]) == []
    assert list(word_warnings(["狗"], [["狗"]], [FIVE])) == []
    assert list(script_warnings("c.json", ["一只狗"], [FIVE])) == []
    assert list(score_warnings({"cider_d": 80.0}, 100)) == []


def test_captions_without_words_are_counted() -> None:
    (warning,) = word_warnings(["", "狗"], [[], ["狗"]], [FIVE, FIVE])
    assert warning == "1 caption without words, scored 0"


def test_one_reference_per_image_is_warned_about() -> None:
    (warning,) = word_warnings(["狗"], [["狗"]], [["狗"]])
    assert warning.startswith("one reference per image")


def test_captions_in_another_language_are_warned_about() -> None:
    (warning,) = script_warnings("c.json", ["a dog"], [FIVE])
    assert warning.startswith(
        "c.json: 0 % of the letters in captions are Chinese, but 100 % in references"
    )


def test_captions_in_another_script_are_warned_about() -> None:
    (warning,) = script_warnings("c.json", ["一个男孩在踢足球", "两辆车"], [["一個男孩"]])
    assert warning.startswith(
        "c.json: captions and references are in different scripts: of the characters that only "
        "one script has, 0 % in captions and 100 % in references are traditional."
    )


def test_cider_d_of_one_image_or_near_0_is_warned_about() -> None:
    assert "single image" in next(score_warnings({"cider_d": 0.0}, 1))
    assert "hardly any words in common" in next(score_warnings({"cider_d": 0.2}, 100))
