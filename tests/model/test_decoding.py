"""The decoding loop without a network: a step function that spells scripts, letter by letter.

The vocabulary is the four special words and a to z; in a script `.` is END.
"""

import string
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from batchcap.model.decoding import Decoded, decode, greedy, sampler
from batchcap.model.text import END_ID, PADDING_ID, SPECIAL_WORDS, START_ID

LETTERS = string.ascii_lowercase
FIRST_LETTER = len(SPECIAL_WORDS)
WORDS = FIRST_LETTER + len(LETTERS)
LIMIT = 8
BABBLE = "z"  # what a script says when it is over
BANNED_LOGIT = -1e9
HIGHEST_UNIFORM = np.float32(1 - 2**-24)

batches = st.lists(st.text(f"{LETTERS}.", max_size=LIMIT), min_size=2, max_size=4)


def ids(script: str) -> list[int]:
    """Ids of a script and the babble after it, LIMIT of them."""
    chars = script.ljust(LIMIT, BABBLE)
    return [END_ID if char == "." else FIRST_LETTER + LETTERS.index(char) for char in chars]


def spell(_tokens: Any, _position: Any, rest: Any) -> tuple[Any, Any, Any]:
    """A step function: says the first word of `rest`, and looks at that word's cell."""
    logits = 10 * tf.one_hot(rest[:, 0], WORDS)
    return logits, tf.one_hot(rest[:, 0], WORDS), tf.roll(rest, -1, axis=1)


@tf.function
def decode_rests(rests: Any, live: Any) -> Decoded:
    return decode(spell, rests, greedy, live, max_length=LIMIT, grid_cells=WORDS)


def decode_scripts(*batch: str, live: list[bool] | None = None) -> Decoded:
    live = live or [True] * len(batch)
    decoded = decode_rests(tf.constant([*map(ids, batch)]), tf.constant(live))
    return Decoded(*(tensor.numpy() for tensor in decoded))


def spelled(decoded: Decoded) -> list[str]:
    rows = zip(decoded.tokens, decoded.lengths, strict=True)
    return ["".join(LETTERS[i - FIRST_LETTER] for i in row[:length]) for row, length in rows]


def assert_same_row(decoded: Decoded, row: int, other: Decoded, other_row: int) -> None:
    for field, other_field in zip(decoded, other, strict=True):
        np.testing.assert_array_equal(field[row], other_field[other_row])


def log_softmax(logits: Any) -> npt.NDArray[np.float64]:
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_first_word_is_asked_of_start_and_each_next_one_of_the_last():
    asked = []

    def listen(tokens: Any, position: Any, rest: Any) -> tuple[Any, Any, Any]:
        asked.append((int(position), tokens.numpy().tolist()))
        return spell(tokens, position, rest)

    decode(listen, tf.constant([ids("on.")]), greedy, tf.constant([True]), LIMIT, WORDS)
    o, n, _ = ids("on.")[:3]
    assert asked == [(0, [START_ID]), (1, [o]), (2, [n])]


def test_each_row_stops_at_its_own_end():
    decoded = decode_scripts("cat.", "a.", "giraffe.")
    assert spelled(decoded) == ["cat", "a", "giraffe"]
    assert decoded.finished.all()


def test_finished_row_writes_nothing_more():
    decoded = decode_scripts("cat.", "giraffe.")
    assert (decoded.tokens[0, 3:] == PADDING_ID).all()
    assert (decoded.log_probs[0, 4:] == 0).all()
    assert (decoded.attention[0, 3:] == 0).all()


def test_row_is_the_same_beside_other_rows():
    assert_same_row(decode_scripts("cat.", "giraffe."), 0, decode_scripts("cat.", "a."), 0)


def test_end_at_once_is_an_empty_finished_caption():
    decoded = decode_scripts(".", "a.")
    assert spelled(decoded) == ["", "a"]
    assert decoded.finished[0]
    assert decoded.log_probs[0, 0] < 0


@pytest.mark.parametrize("live", [[False, True], [False, False]])
def test_rows_born_finished_stay_empty(live):
    decoded = decode_scripts("cat.", "a.", live=live)
    assert spelled(decoded)[0] == ""
    assert not decoded.finished[0]
    assert not decoded.tokens[0].any()
    assert not decoded.log_probs[0].any()
    assert not decoded.attention[0].any()


def test_length_limit_keeps_the_last_word_and_leaves_the_row_unfinished():
    decoded = decode_scripts("elephant.")
    assert spelled(decoded) == ["elephant"]
    assert not decoded.finished[0]
    assert (decoded.log_probs[0] < 0).all()


def test_end_in_the_last_position_counts():
    decoded = decode_scripts("giraffe.")
    assert spelled(decoded) == ["giraffe"]
    assert decoded.finished[0]
    assert decoded.log_probs[0, -1] < 0


@pytest.mark.parametrize(("batch", "expected"), [(("cat.", "a."), 4), (("a.", "zzzzzzzz"), LIMIT)])
def test_loop_ends_with_the_last_row(batch, expected):
    steps = tf.Variable(0)

    def counted(*arguments: Any) -> tuple[Any, Any, Any]:
        steps.assign_add(1)
        return spell(*arguments)

    @tf.function
    def run() -> Decoded:
        rests = tf.constant([*map(ids, batch)])
        return decode(counted, rests, greedy, tf.constant([True, True]), LIMIT, WORDS)

    run()
    assert steps.numpy() == expected


def test_attention_is_of_words_and_not_of_end():
    decoded = decode_scripts("cat.", "a.")
    expected = np.zeros((LIMIT, WORDS))
    expected[range(3), ids("cat")[:3]] = 1
    np.testing.assert_array_equal(decoded.attention[0], expected)


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 2.0])
def test_log_probs_are_those_of_temperature_one(temperature):
    rows = 40
    draws = np.random.default_rng(1)
    logits = draws.normal(size=(rows, LIMIT, WORDS)).astype(np.float32)
    logits[:, :, END_ID] += 1  # so that some rows reach it
    logits[:, :, :END_ID] = BANNED_LOGIT
    uniforms = draws.random((rows, LIMIT), np.float32)

    def step(_tokens: Any, position: Any, state: Any) -> tuple[Any, Any, Any]:
        return tf.constant(logits)[:, position], tf.zeros((rows, 1)), state

    choose = sampler(temperature, uniforms) if temperature else greedy
    decoded = decode(step, (), choose, tf.fill((rows,), True), LIMIT, 1)
    assert 0 < np.count_nonzero(decoded.finished) < rows
    expected = log_softmax(logits)
    for row in range(rows):
        words = decoded.tokens[row, : decoded.lengths[row]].numpy().tolist()
        said = [*words, END_ID] if decoded.finished[row] else words
        np.testing.assert_allclose(
            decoded.log_probs[row, : len(said)], expected[row, range(len(said)), said], rtol=1e-4
        )


@settings(deadline=None)
@given(batches)
def test_batch_of_sentences_is_each_sentence_alone(batch):
    together = decode_scripts(*batch)
    assert spelled(together) == [script.ljust(LIMIT, BABBLE).partition(".")[0] for script in batch]
    for row, script in enumerate(batch):
        assert_same_row(together, row, decode_scripts(script), 0)


def draw(logits: Any, temperature: float, uniforms: Any) -> npt.NDArray[np.int32]:
    """One word per uniform, each from the same logits."""
    column = np.asarray(uniforms, np.float32)[:, None]
    rows = np.broadcast_to(np.float32(logits), (len(column), len(logits)))
    return sampler(temperature, column)(tf.constant(rows), 0).numpy()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_draws_invert_the_cumulative_distribution(temperature):
    logits = np.random.default_rng(2).normal(size=WORDS)
    grid = (np.arange(5000) + 0.5) / 5000
    cumulative = np.cumsum(np.exp(log_softmax(logits / temperature)))
    # float32 may put a boundary a hair to the left or right
    grid = grid[np.abs(grid[:, None] - cumulative).min(axis=1) > 1e-6]
    expected = np.searchsorted(cumulative, grid, side="right")
    np.testing.assert_array_equal(draw(logits, temperature, grid), expected)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_frequencies_of_draws_are_the_probabilities(temperature):
    logits = np.random.default_rng(3).normal(size=WORDS)
    drawn = draw(logits, temperature, (np.arange(5000) + 0.5) / 5000)
    frequencies = np.bincount(drawn, minlength=WORDS) / 5000
    probabilities = np.exp(log_softmax(logits / temperature))
    np.testing.assert_allclose(frequencies, probabilities, atol=1 / 5000)


def test_row_draws_the_same_words_in_any_batch():
    draws = np.random.default_rng(4)
    logits = tf.constant(draws.normal(size=(20, WORDS)), tf.float32)
    uniforms = draws.random((20, LIMIT), np.float32)
    position = 3
    together = sampler(1.0, uniforms)(logits, position)
    backwards = sampler(1.0, uniforms[::-1])(logits[::-1], position)
    np.testing.assert_array_equal(backwards[::-1], together)
    for row in range(20):
        alone = sampler(1.0, uniforms[row : row + 1])(logits[row : row + 1], position)
        assert alone[0] == together[row]


def test_each_position_has_its_own_uniform():
    uniforms = np.array([[0.1, 0.6]], np.float32)
    choose = sampler(1.0, uniforms)
    two_equal_words = tf.zeros((1, 2))
    assert [int(choose(two_equal_words, position)[0]) for position in (0, 1)] == [0, 1]


@pytest.mark.parametrize("uniform", [0.0, 0.5, HIGHEST_UNIFORM])
@pytest.mark.parametrize("temperature", [1e-50, 1e-38, 0.01, 1.0, 100.0])
@pytest.mark.parametrize("banned", [range(3), range(WORDS - 3, WORDS), range(0, WORDS, 2)])
def test_banned_words_are_never_drawn(banned, temperature, uniform):
    for seed in range(20):
        logits = np.random.default_rng(seed).normal(size=WORDS)
        logits[list(banned)] = BANNED_LOGIT
        assert draw(logits, temperature, [uniform])[0] not in banned


def test_greedy_takes_the_most_probable_word():
    assert greedy(tf.constant([[0.0, 2.0, 1.0], [3.0, -1.0, 3.0]]), 0).numpy().tolist() == [1, 0]
