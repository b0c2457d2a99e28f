"""Words, ids and vocabulary files, with the real jieba and a private cache."""

import os
import subprocess
import sys

import numpy as np
import pytest
from helpers.places import data_set
from hypothesis import given
from hypothesis import strategies as st

from batchcap.caption_files.annotations import clean
from batchcap.errors import ModelError
from batchcap.model.vocabulary import (
    END_ID,
    LONGEST_WORD,
    PADDING_ID,
    SPECIAL_WORDS,
    START_ID,
    UNKNOWN_ID,
    Vocabulary,
    join_words,
    mirrored_ids,
    segment,
)
from batchcap.settings import MAX_WORDS

FLICKR8K = data_set("BATCHCAP_FLICKR8K", "flickr8k-cn")


@pytest.fixture(autouse=True, scope="module")
def private_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def vocabulary(*words: str) -> Vocabulary:
    return Vocabulary((*SPECIAL_WORDS, *words))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("两只狗在草地上奔跑", ["两只", "狗", "在", "草地", "上", "奔跑"]),
        ("草地，和（一只）狗。", ["草地", "和", "一只", "狗"]),
        ("穿T恤的人\u3000和 2 dogs!", ["穿", "T恤", "的", "人", "和", "2", "dogs"]),
        ("", []),
        ("。，!?…—《》 \n", []),
    ],
)
def test_caption_is_cut_without_punctuation(text, words):
    assert segment(text) == words


def test_punctuation_stuck_to_a_word_is_stripped():
    assert segment("-abc- 50%") == ["abc", "50"]


def test_case_and_width_are_kept():
    assert "".join(segment("ＡＢ和iPhone")) == "ＡＢ和iPhone"


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "default", "-c", code]
    variables = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=variables)


def test_segmenting_is_silent_and_caches_in_a_private_folder(tmp_path):
    code = "from batchcap.model.vocabulary import segment; print(segment('一只狗'))"
    for _ in range(2):  # the second time from the cache
        done = python(code, XDG_CACHE_HOME=str(tmp_path), TMPDIR=str(tmp_path))
        assert (done.stdout, done.stderr) == ("['一只', '狗']\n", "")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["batchcap", "jieba.cache"]
    assert (tmp_path / "batchcap").stat().st_mode & 0o777 == 0o700


def test_segmenting_works_where_no_cache_can_be_written(tmp_path):
    (tmp_path / "file").touch()
    code = "from batchcap.model.vocabulary import segment; print(segment('一只狗'))"
    no_folder = str(tmp_path / "file")
    done = python(code, XDG_CACHE_HOME=no_folder, TMPDIR=str(tmp_path))
    assert done.stdout == "['一只', '狗']\n"
    assert done.stderr.startswith(f"using the cache directory {tmp_path}/batchcap-")
    assert done.stderr.count("\n") == 1


def test_importing_the_module_does_not_import_jieba():
    code = "import sys, batchcap.model.vocabulary; print('jieba' in sys.modules)"
    assert python(code).stdout == "False\n"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["一只", "狗"], "一只狗"),
        (["two", "dogs"], "two dogs"),
        (["穿", "T恤", "的", "人"], "穿T恤的人"),
        (["iPhone", "15", "手机"], "iPhone 15手机"),
        ([], ""),
        (["", "a", "", "b"], "a b"),
    ],
)
def test_words_are_joined_with_a_space_only_inside_ascii(words, text):
    assert join_words(words) == text


def test_vocabulary_takes_the_most_frequent_words_and_ties_by_code_point():
    captions = [["狗", "猫", "b"], ["狗", "a", "b"], ["狗", "猫", "罕"]]
    built = Vocabulary.build(captions, max_size=100, min_count=2)
    assert built.words == (*SPECIAL_WORDS, "狗", "b", "猫")


def test_vocabulary_counts_the_special_words_in_its_size():
    built = Vocabulary.build([["a", "a", "b"]], max_size=5, min_count=1)
    assert built.words == (*SPECIAL_WORDS, "a")
    assert len(built) == 5


def test_vocabulary_does_not_depend_on_the_order_of_captions():
    captions = [["a", "b"], ["c"], ["b", "d"]]
    assert Vocabulary.build(captions, 9, 1) == Vocabulary.build(captions[::-1], 9, 1)


def test_special_word_in_a_caption_gets_no_second_id():
    assert Vocabulary.build([["[END]"]], 100, 1).words == SPECIAL_WORDS


def test_special_words_have_the_ids_of_the_constants():
    ids = (PADDING_ID, UNKNOWN_ID, START_ID, END_ID)
    assert vocabulary().decode(ids) == ["[PAD]", "[UNK]", "[START]", "[END]"]


def test_encoding_marks_unknown_words_and_adds_nothing():
    assert vocabulary("狗", "猫").encode(["猫", "鸟", "狗"]) == [5, UNKNOWN_ID, 4]


@given(st.lists(st.sampled_from("甲乙丙丁"), max_size=8))
def test_known_words_come_back_from_their_ids(words):
    known = vocabulary(*"甲乙丙丁")
    assert known.decode(known.encode(words)) == words


def test_vocabulary_file_is_one_word_a_line(tmp_path):
    path = tmp_path / "vocabulary.txt"
    vocabulary("狗", "T恤").save(path)
    assert path.read_bytes().decode() == "[PAD]\n[UNK]\n[START]\n[END]\n狗\nT恤\n"
    assert Vocabulary.load(path) == vocabulary("狗", "T恤")


HEAD = "[PAD]\n[UNK]\n[START]\n[END]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r":1: expected \[PAD\], not ''"),
        ("[PAD]\n[UNK]\n", r":2: \[START\] is missing"),
        ("[PAD]\n[START]\n[UNK]\n[END]\n", r":2: expected \[UNK\], not '\[START\]'"),
        (HEAD + "狗\n猫\n狗\n", ":7: 狗 is already on line 5"),
        (HEAD + "狗\n\n猫\n", ":6: empty line"),
        (HEAD + "一 只\n", ":5: '一 只' is not a word"),
        (HEAD + "狗\r\n", ":5: '狗.r' is not a word"),
        (HEAD + "狗\n\x1b[2J\n", r":6: '\\x1b\[2J' is not a word"),
        (HEAD + "狗\x9b31m\n", r":5: '狗\\x9b31m' is not a word"),
        (HEAD + "狗\u202e猫\n", r":5: '狗\\u202e猫' is not a word"),
        (HEAD + "\u200b\n", r":5: '\\u200b' is not a word"),
        (HEAD + "\ue000\n", r":5: '\\ue000' is not a word"),
    ],
)
def test_invalid_vocabulary_file_is_named_with_its_line(tmp_path, text, message):
    path = tmp_path / "vocabulary.txt"
    path.write_bytes(text.encode())
    with pytest.raises(ModelError, match="vocabulary.txt" + message):
        Vocabulary.load(path)


@pytest.mark.parametrize(
    ("head", "repeated", "message"),
    [
        ("", "\x1b", r":1: expected \[PAD\], not '(\\x1b){9}\\x1:"),
        (HEAD, "a", ":5: a word of 1,000,000 characters:"),
        (HEAD, "a\n", " has more than 1,000,000 lines:"),
    ],
)
def test_huge_vocabulary_file_is_refused_with_a_short_message(tmp_path, head, repeated, message):
    path = tmp_path / "vocabulary.txt"
    path.write_text(head + repeated * MAX_WORDS)
    with pytest.raises(ModelError, match="vocabulary.txt" + message) as refused:
        Vocabulary.load(path)
    assert len(str(refused.value)) < len(str(path)) + 100


def test_vocabulary_with_words_of_a_newer_unicode_is_loaded(tmp_path):
    words = vocabulary("狗\u0378", "\U000323b0", "a" * LONGEST_WORD)
    words.save(tmp_path / "vocabulary.txt")
    assert Vocabulary.load(tmp_path / "vocabulary.txt") == words


ANY_TEXT = st.text(st.characters(exclude_categories=()))


@given(st.lists(st.one_of(ANY_TEXT, st.sampled_from(SPECIAL_WORDS), st.just("a" * 1001))))
def test_vocabulary_built_of_any_words_is_loaded_again(tmp_path_factory, words):
    path = tmp_path_factory.getbasetemp() / "vocabulary.txt"
    built = Vocabulary.build([words], max_size=100, min_count=1)
    built.save(path)
    assert Vocabulary.load(path) == built


@given(st.text(st.characters(codec="utf-8")), st.text("a\u200d狗-.\x1b", max_size=8))
def test_every_word_of_a_caption_can_be_in_a_vocabulary(text, other):
    words = {*segment(clean(text + other))}
    assert {*Vocabulary.build([words], 10**6, 1).words} == {*SPECIAL_WORDS, *words}


def test_vocabulary_that_is_missing_or_not_utf8_is_a_model_error(tmp_path):
    path = tmp_path / "vocabulary.txt"
    with pytest.raises(ModelError, match="cannot be read"):
        Vocabulary.load(path)
    path.write_bytes(b"\xff")
    with pytest.raises(ModelError, match="not UTF-8"):
        Vocabulary.load(path)


def test_mirror_swaps_left_and_right_and_leaves_the_rest():
    words = vocabulary("狗", "左边", "右边", "右手", "左右", "左")
    mirrored = mirrored_ids(words)
    assert mirrored.dtype == np.int32
    expected = ["狗", "右边", "左边", "[UNK]", "左右", "[UNK]"]
    assert words.decode(mirrored) == [*SPECIAL_WORDS, *expected]


@pytest.mark.skipif(
    not (FLICKR8K / "captions.zh.txt").is_file(),
    reason="set BATCHCAP_FLICKR8K to the folder of Flickr8k-CN",
)
def test_real_captions_are_cut_into_words_of_letters_and_digits():
    lines = (FLICKR8K / "captions.zh.txt").read_text(encoding="utf-8").splitlines()[:2000]
    for line in lines:
        words = segment(line.split(" ", 1)[1])
        assert words
        assert "".join(words).isalnum()
