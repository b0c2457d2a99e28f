"""Attention summaries against maps worked out by hand."""

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from batchcap.model.attention import summarise_attention

grids = st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7))
maps = hnp.arrays(np.float32, grids, elements=st.floats(0, 1, width=32)).filter(
    lambda weights: weights.sum(axis=(1, 2)).min() > 1e-3
)


def one_hot(*cells: tuple[int, int]) -> npt.NDArray[np.float32]:
    """A 3 x 4 map whose weight is spread evenly over the given cells."""
    weights = np.zeros((3, 4), np.float32)
    for cell in cells:
        weights[cell] = 1 / len(cells)
    return weights


def test_weight_on_one_cell():
    (summary,) = summarise_attention(one_hot((2, 1))[None])
    expected = {"row": 2, "col": 1, "peak_row": 2, "peak_col": 1, "peak": 1, "entropy": 0}
    assert summary == expected


def test_uniform_weights():
    (summary,) = summarise_attention(np.full((1, 3, 4), 1 / 12, np.float32))
    assert summary == pytest.approx(
        {
            "row": 1,
            "col": 1.5,
            "peak_row": 0,
            "peak_col": 0,
            "peak": 1 / 12,
            "entropy": math.log(12),
        }
    )


def test_first_of_two_equal_peaks_in_row_major_order():
    (summary,) = summarise_attention(one_hot((2, 0), (0, 3))[None])
    assert summary == pytest.approx(
        {
            "row": 1,
            "col": 1.5,
            "peak_row": 0,
            "peak_col": 3,
            "peak": 0.5,
            "entropy": math.log(2),
        }
    )


def test_each_word_has_its_own_summary():
    summaries = summarise_attention(np.stack([one_hot((0, 3)), one_hot((1, 0))]))
    assert [(summary["row"], summary["col"]) for summary in summaries] == [(0, 3), (1, 0)]


def test_caption_without_words_has_no_summaries():
    assert summarise_attention(np.zeros((0, 7, 7), np.float32)) == []


def test_summaries_hold_python_numbers_for_arrow_and_json():
    (summary,) = summarise_attention(one_hot((0, 0))[None])
    assert {name: type(number) for name, number in summary.items()} == {
        "row": float,
        "col": float,
        "peak_row": int,
        "peak_col": int,
        "peak": float,
        "entropy": float,
    }


@given(maps)
def test_summaries_stay_inside_the_grid_and_entropy_inside_its_bounds(weights):
    words, rows, columns = weights.shape
    weights = weights / weights.sum(axis=(1, 2), keepdims=True)
    slack = 1e-5
    summaries = summarise_attention(weights)
    assert len(summaries) == words
    for summary, of_word in zip(summaries, weights, strict=True):
        assert -slack <= summary["row"] <= rows - 1 + slack
        assert -slack <= summary["col"] <= columns - 1 + slack
        assert summary["peak"] == of_word.max() == of_word[summary["peak_row"], summary["peak_col"]]
        assert -slack <= summary["entropy"] <= math.log(rows * columns) + slack
