"""Scores worked out by hand from the definitions, so that no scorer vouches for itself."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from batchcap.evaluation.metrics import METRICS, ngrams, overall_of, score_captions, signature

DOGS = [["两只", "狗", "在", "草地", "上", "奔跑"]]
CATS = [["一只", "猫", "在", "桌子", "上"]]

SENTENCES = st.lists(st.sampled_from("甲乙丙丁戊"), min_size=1, max_size=8)
IMAGES = st.lists(
    st.tuples(
        st.lists(st.sampled_from("甲乙丙丁戊"), max_size=8),
        st.lists(SENTENCES, min_size=1, max_size=3),
    ),
    min_size=2,
    max_size=6,
)


def test_a_perfect_caption_scores_in_full() -> None:
    scores = score_captions([DOGS[0], CATS[0]], [DOGS, CATS]).overall
    for name in ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l"):
        assert scores[name] == pytest.approx(100, abs=1e-3)
    assert scores["cider_d"] == pytest.approx(1000, abs=1e-6)


def test_bleu_counts_clipped_words_and_punishes_brevity() -> None:
    scores = score_captions([["狗", "狗", "草地"]], [DOGS]).overall
    precision, brevity = 2 / 3, math.exp(1 - 6 / 3)
    assert scores["bleu_1"] == pytest.approx(100 * precision * brevity, abs=1e-3)


def test_rouge_l_is_the_longest_common_subsequence_with_beta_1_2() -> None:
    scores = score_captions([["狗", "奔跑", "在", "草地"]], [DOGS]).overall
    precision, recall, beta = 3 / 4, 3 / 6, 1.2
    f = (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
    assert scores["rouge_l"] == pytest.approx(100 * f, abs=1e-6)


def test_cider_d_without_common_words_is_zero() -> None:
    assert score_captions([DOGS[0], CATS[0]], [CATS, DOGS]).overall["cider_d"] < 60
    assert score_captions([["树"], ["鱼"]], [DOGS, CATS]).overall["cider_d"] == 0


def test_a_caption_without_words_scores_0() -> None:
    scores = score_captions([[], CATS[0]], [DOGS, CATS])
    assert [scores.per_image[metric][0] for metric in METRICS] == pytest.approx([0] * 6, abs=1e-6)


@given(IMAGES)
@settings(deadline=None, max_examples=50)
def test_scores_equal_pycocoevalcaps(images: list[tuple[list[str], list[list[str]]]]) -> None:
    hypotheses, references = zip(*images, strict=True)
    found = {i: [" ".join(words)] for i, words in enumerate(hypotheses)}
    expected = {i: [" ".join(words) for words in texts] for i, texts in enumerate(references)}
    scores = score_captions(hypotheses, references)
    bleu, bleus = Bleu(4).compute_score(expected, found)
    rouge, rouges = Rouge().compute_score(expected, found)
    cider, ciders = Cider().compute_score(expected, found)
    own = 100 * np.array([*bleu, rouge, cider])
    assert list(scores.overall.values()) == pytest.approx(own.tolist(), abs=1e-9)
    for metric, values in zip(METRICS, [*bleus, rouges, ciders], strict=True):
        assert scores.per_image[metric] == pytest.approx(100 * np.array(values), abs=1e-9)


@given(IMAGES)
@settings(deadline=None, max_examples=50)
def test_statistics_sum_to_the_scores(images: list[tuple[list[str], list[list[str]]]]) -> None:
    scores = score_captions(*zip(*images, strict=True))
    summed = overall_of(scores.statistics.sum(axis=0))
    assert summed.tolist() == pytest.approx(list(scores.overall.values()), abs=1e-9)


def test_statistics_of_some_images_sum_to_their_scores() -> None:
    """Except CIDEr-D, whose weights are those of all images."""
    hypotheses, references = [DOGS[0][:4], CATS[0][:3], ["鱼"]], [DOGS, CATS, DOGS]
    some = score_captions(hypotheses[:2], references[:2]).overall
    summed = overall_of(score_captions(hypotheses, references).statistics[:2].sum(axis=0))
    assert summed[:5].tolist() == pytest.approx(list(some.values())[:5], abs=1e-9)


def test_ngrams_are_the_sequences_of_n_words() -> None:
    assert list(ngrams("abc", 2)) == [("a", "b"), ("b", "c")]
    assert list(ngrams("a", 2)) == []


def test_the_signature_says_what_changes_scores() -> None:
    made = signature(["tok=words", "jieba=1"], [DOGS * 5, CATS * 5])
    assert made.startswith("tok=words|jieba=1|refs=5|n=2|bleu=closest|cider=D")
    assert "refs=1-5" in signature([], [DOGS, CATS * 5])
