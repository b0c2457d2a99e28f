"""Words against recorded ones of Stanford's tokenizer and, with Java, against its own."""

import shutil
import subprocess
from pathlib import Path

import pycocoevalcap
import pytest
from helpers.places import GOLDEN
from hypothesis import given
from hypothesis import strategies as st

from batchcap.evaluation.penn_treebank import ptb_words

WORDS = GOLDEN / "penn_treebank.tsv"
CASES = [line.split("\t") for line in WORDS.read_text(encoding="utf-8").splitlines()]
JAR = Path(next(iter(pycocoevalcap.__path__))) / "tokenizer" / "stanford-corenlp-3.4.1.jar"
# From pycocoevalcap's PTBTokenizer.
DROPPED = ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", *".?!,:-;", "--", "..."]


def test_words_equal_those_of_the_real_tokenizer() -> None:
    wrong = [caption for caption, words in CASES if ptb_words(caption) != words.split()]
    assert not wrong


@pytest.mark.skipif(shutil.which("java") is None, reason="the real tokenizer needs Java")
def test_golden_words_equal_those_of_the_real_tokenizer(tmp_path: Path) -> None:
    captions = tmp_path / "captions.txt"
    captions.write_text("\n".join(caption for caption, _ in CASES), encoding="utf-8")
    program = ["java", "-cp", str(JAR), "edu.stanford.nlp.process.PTBTokenizer"]
    done = subprocess.run(
        [*program, "-preserveLines", "-lowerCase", str(captions)], capture_output=True, check=True
    )
    lines = done.stdout.decode("utf-8").split("\n")
    for (caption, words), line in zip(CASES, lines, strict=False):
        kept = [word for word in line.rstrip().split(" ") if word not in DROPPED]
        assert " ".join(kept) == words, caption


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("一个 人 ， 两只 狗 ！", ["一个", "人", "，", "两只", "狗", "！"]),
        ("( 左 ) 一个 人 .", ["-lrb-", "左", "-rrb-", "一个", "人"]),
        ("《 红楼梦 》 “ 停 ”", ["红楼梦", "停"]),
        ("NBA T恤", ["nba", "t恤"]),
        ("", []),
    ],
)
def test_full_width_punctuation_and_brackets_count_as_words(caption: str, words: list[str]) -> None:
    assert ptb_words(caption) == words


@given(st.text())
def test_words_hold_no_space_and_no_capital(caption: str) -> None:
    for word in ptb_words(caption):
        assert word
        assert word.split() == [word]
        assert word == word.lower()
