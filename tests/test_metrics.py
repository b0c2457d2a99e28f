"""Golden numbers: made by hand from the definitions, so that no scorer vouches for itself."""

import math

import pytest

from batchcap.evaluation.metrics import score_captions, signature

DOGS = [["两只", "狗", "在", "草地", "上", "奔跑"]]
CATS = [["一只", "猫", "在", "桌子", "上"]]


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


def test_cider_d_of_nothing_in_common_is_zero() -> None:
    assert score_captions([DOGS[0], CATS[0]], [CATS, DOGS]).overall["cider_d"] < 60
    assert score_captions([["树"], ["鱼"]], [DOGS, CATS]).overall["cider_d"] == 0


def test_the_signature_says_what_changes_scores() -> None:
    made = signature([DOGS * 5, CATS * 5])
    assert "refs=5|n=2" in made
    assert "jieba=" in made
    assert "refs=1-5" in signature([DOGS, CATS * 5])
