"""Generation in NumPy writes what TensorFlow's writes, for a network that is a table of logits."""

from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from batchcap.model.caption import Decoded
from batchcap.model.decoding import (
    Generation,
    beam_search,
    decode,
    greedy,
    logit_filter,
    sampler,
)
from batchcap.model.numpy_decoding import generate
from batchcap.model.vocabulary import BANNED_IDS, END_ID, START_ID
from batchcap.settings import DecodeSettings

LIMIT, WORDS = 7, 9
ROWS = 40  # enough for the batch to shrink
BANNED_LOGIT = -1e9

how = st.builds(
    DecodeSettings,
    max_length=st.just(LIMIT),
    beam_size=st.integers(1, 4),
    length_penalty=st.sampled_from([0.0, 0.6, 1.0]),
    temperature=st.sampled_from([0.0, 0.5, 1.0]),
    top_k=st.sampled_from([None, 1, 3, 100]),
    top_p=st.sampled_from([1.0, 0.8, 0.1]),
    min_length=st.integers(0, 4),
    no_repeat_ngram=st.integers(0, 3),
)


class Table:
    """Logits of the next word, by the image and the position, plus some by the last word.

    The image is `float32[B, T, V]`; the last word's cell gets all attention.
    """

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.by_word = rng.normal(size=(WORDS, WORDS)).astype(np.float32)
        self.image = rng.normal(size=(ROWS, LIMIT, WORDS)).astype(np.float32)
        self.image[..., END_ID] += rng.normal(size=(ROWS, 1), scale=2)
        self.image[..., list(BANNED_IDS)] = BANNED_LOGIT
        self.uniforms = rng.random((ROWS, LIMIT), np.float32)

    def read_images(self, features: Any) -> Any:
        """Return the image."""
        return features

    def empty_cache(self, captions: int, length: int) -> npt.NDArray[np.float32]:
        """Return a cache of the words so far."""
        return np.zeros((captions, length), np.float32)

    def step(self, tokens: Any, position: int, cache: Any, image: Any) -> tuple[Any, Any]:
        """Read one word as `NumpyDecoder.step` does."""
        cache[:, position] = tokens
        each = len(tokens) // len(image)
        logits = np.repeat(image[:, position], each, axis=0) + self.by_word[tokens]
        return logits, np.eye(LIMIT, dtype=np.float32)[tokens % LIMIT]

    def tensorflow_step(self, tokens: Any, position: Any, cache: Any, image: Any) -> Any:
        """Read one word as `CaptionDecoder.step` does."""
        logits = image[:, None, position] + tf.gather(self.by_word, tokens)
        return logits, tf.one_hot(tokens % LIMIT, LIMIT), cache


def generated_by_tensorflow(table: Table, asked: DecodeSettings) -> Decoded:
    generation = Generation(
        step=table.tensorflow_step,
        max_length=LIMIT,
        grid_cells=LIMIT,
        logit_filter=logit_filter(asked.min_length, asked.no_repeat_ngram),
        choose=sampler(asked.temperature, asked.top_k, asked.top_p)
        if asked.temperature
        else greedy,
        beam_size=asked.beam_size,
        length_penalty=asked.length_penalty,
    )
    image, mask = tf.constant(table.image), tf.constant([True] * ROWS)
    cache = tf.zeros((ROWS, asked.beam_size))
    if asked.beam_size > 1:
        decoded = beam_search(generation, cache, image, mask)
    else:
        decoded = decode(generation, cache, image, tf.constant(table.uniforms), mask)
    return Decoded(*(tensor.numpy() for tensor in decoded))


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), asked=how)
def test_captions_equal_tensorflows(seed: int, asked: DecodeSettings) -> None:
    table: Any = Table(seed)
    found = generate(table, table.image, asked, table.uniforms, START_ID)
    expected = generated_by_tensorflow(table, asked)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.lengths, expected.lengths)
    np.testing.assert_array_equal(found.finished, expected.finished)
    np.testing.assert_array_equal(found.attention, expected.attention)
    np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=1e-5)


def test_the_start_id_is_read_first() -> None:
    table: Any = Table(1)
    table.by_word[START_ID, END_ID] = 100
    asked = DecodeSettings(LIMIT)
    assert not generate(table, table.image, asked, table.uniforms, START_ID).lengths.any()
    assert generate(table, table.image, asked, table.uniforms, END_ID + 1).lengths.any()


def test_a_row_does_not_depend_on_other_rows() -> None:
    table: Any = Table(2)
    for beam_size in (1, 3):
        asked = DecodeSettings(LIMIT, beam_size=beam_size)
        whole = generate(table, table.image, asked, table.uniforms, START_ID)
        for row in range(ROWS):
            alone = generate(
                table, table.image[row : row + 1], asked, table.uniforms[row : row + 1], START_ID
            )
            for field, of_row in zip(whole, alone, strict=True):
                np.testing.assert_array_equal(field[row], of_row[0])
