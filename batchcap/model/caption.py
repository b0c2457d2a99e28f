"""Captions, as the model generates them."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt


class Caption(NamedTuple):
    """The caption of one photo, of W words without END.

    ids: `int32[W]`, the words' numbers in the vocabulary. log_probs: `float32[W]`, or `float32[W +
    1]` if END was reached: natural log-probabilities of each word, then of END. finished: whether
    END was reached within the length limit. attention: `float32[W, rows, columns]`, each word's
    weights over the grid, which add up to 1.
    """

    words: list[str]
    ids: npt.NDArray[np.int32]
    log_probs: npt.NDArray[np.float32]
    finished: bool
    attention: npt.NDArray[np.float32]


class Decoded(NamedTuple):
    """Captions of a batch, as tensors or arrays.

    tokens: `int32[B, T]`, words without END, then padding. lengths: `int32[B]`, words per row.
    log_probs: `float32[B, T]`, of each word, then of END if it was reached; then zeros. finished:
    `bool[B]`, END was reached within T positions. attention: `float32[B, T, G]`, weights over the
    image for each word; then zeros.
    """

    tokens: Any
    lengths: Any
    log_probs: Any
    finished: Any
    attention: Any
