import numpy as np
import pytest

from batchcap.caption_files.predictions import GeneratedCaption
from batchcap.evaluation.tokenisation import profile_of
from batchcap.evaluation.traits import calibrate, traits_of
from batchcap.settings import TokenKind

WORDS = profile_of(TokenKind.WORDS)


def caption(text: str | None, finished: bool | None = True) -> GeneratedCaption:
    return GeneratedCaption("a.jpg", text, finished=finished)


def test_captions_are_counted_with_and_without_words() -> None:
    traits = traits_of([caption("一只狗。"), caption("。"), caption(None, None)], WORDS, None)
    assert (traits.photos, traits.failed, traits.empty) == (3, 1, 1)
    assert traits.words == (0, 1.0, 2)


def test_distinct_n_is_the_share_of_different_ngrams() -> None:
    captions = [caption("一只狗在奔跑"), caption("一只狗在奔跑"), caption("一只猫在奔跑")]
    traits = traits_of(captions, WORDS, None)
    assert (traits.distinct, traits.vocabulary) == (2, 5)
    assert traits.distinct_1 == pytest.approx(5 / 12)
    assert traits.distinct_2 == pytest.approx(5 / 9)


def test_unfinished_is_a_share_of_captions_where_it_is_known() -> None:
    captions = [caption("狗"), caption("狗", finished=False), caption("狗", finished=None)]
    assert traits_of(captions, WORDS, None).unfinished == 0.5
    assert traits_of([caption("狗", finished=None)], WORDS, None).unfinished is None


def test_seen_captions_occur_verbatim_in_the_training_split(tmp_path) -> None:
    training = tmp_path / "captions.jsonl"
    training.write_text(
        '{"image_id": "a", "caption": "一只狗。", "split": "train"}\n'
        '{"image_id": "b", "caption": "一只猫", "split": "val"}\n'
    )
    traits = traits_of([caption("一只狗"), caption("一只猫")], WORDS, training)
    assert traits.seen == 0.5


def test_no_captions_cause_no_division_by_zero() -> None:
    traits = traits_of([caption(None)], WORDS, None)
    assert (traits.words, traits.distinct_1) == ((0, 0.0, 0), 0)


def test_confidence_that_ranks_as_scores_do_correlates_fully() -> None:
    scores = np.arange(50.0) ** 3
    found = calibrate(-1 / (1 + scores), scores, 100, 0)
    assert found.spearman == pytest.approx(1)
    assert found.interval == pytest.approx((1, 1))
    assert list(found.cider_d) == sorted(found.cider_d)
    assert found.cider_d[0] == pytest.approx(scores[:10].mean())


def test_random_confidence_has_an_interval_around_0() -> None:
    rng = np.random.default_rng(0)
    found = calibrate(rng.random(300), rng.random(300), 500, 0)
    assert found.interval[0] < 0 < found.interval[1]


def test_constant_confidence_correlates_with_nothing() -> None:
    assert calibrate(np.ones(10), np.arange(10.0), 100, 0).spearman == 0
