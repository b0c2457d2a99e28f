"""Intervals and comparisons against theory."""

import math

import numpy as np

from batchcap.evaluation.bootstrap import interval, p_value, resampled


def means(values: np.ndarray, resamples: int = 2000, seed: int = 0) -> np.ndarray:
    return resampled(values[:, np.newaxis], resamples, seed)[:, 0] / len(values)


def test_interval_of_a_mean_equals_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(1).normal(10, 2, 400)
    half_width = 1.96 * values.std() / math.sqrt(400)
    low, high = interval(means(values))
    assert abs(low - (values.mean() - half_width)) < 0.03
    assert abs(high - (values.mean() + half_width)) < 0.03


def test_intervals_hold_the_true_mean_95_times_in_100() -> None:
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(300):
        low, high = interval(means(rng.normal(0, 1, 100), resamples=300))
        held += low <= 0 <= high
    assert 270 <= held <= 297  # 285, give or take 3.2 standard deviations


def test_equal_seeds_choose_the_same_images() -> None:
    values = np.arange(50.0)[:, np.newaxis]
    assert (resampled(values, 20, 3) == resampled(values, 20, 3)).all()
    assert (resampled(values, 20, 3) != resampled(values, 20, 4)).any()


def test_equal_scores_have_no_difference() -> None:
    values = np.random.default_rng(3).random(200)
    difference = means(values) - means(values)
    assert interval(difference) == (0, 0)
    assert p_value(difference) == 1


def test_a_small_difference_on_every_image_is_found_where_single_intervals_overlap() -> None:
    values = np.random.default_rng(4).normal(50, 30, 500)
    better = values + np.random.default_rng(5).normal(1, 2, 500)
    assert interval(means(better))[0] < interval(means(values))[1]
    difference = means(better) - means(values)
    assert interval(difference)[0] > 0
    assert p_value(difference) < 0.01


def test_p_is_never_less_than_the_resamples_can_show() -> None:
    assert p_value(np.ones(999)) == 2 / 1000
