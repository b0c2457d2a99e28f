"""The decoding loop without a network: a step function that spells scripts, letter by letter.

The vocabulary is the four special words and a to z; in a script `.` is END.
"""

import string
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tensorflow as tf
from helpers.plain_beam import plain_beam_search
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
from batchcap.model.vocabulary import END_ID, PADDING_ID, SPECIAL_WORDS, START_ID

LETTERS = string.ascii_lowercase
FIRST_LETTER = len(SPECIAL_WORDS)
WORDS = FIRST_LETTER + len(LETTERS)
LIMIT = 8
BABBLE = "z"  # follows the end of a script
BANNED_LOGIT = -1e9
HIGHEST_UNIFORM = np.float32(1 - 2**-24)

batches = st.lists(st.text(f"{LETTERS}.", max_size=LIMIT), min_size=2, max_size=4)


def ids(script: str) -> list[int]:
    """Return LIMIT ids: those of a script, then babble."""
    chars = script.ljust(LIMIT, BABBLE)
    return [END_ID if char == "." else FIRST_LETTER + LETTERS.index(char) for char in chars]


def spell(_tokens: Any, _position: Any, rest: Any, _image: Any) -> tuple[Any, Any, Any]:
    """A step function that writes the first word of `rest` and attends to that word's cell."""
    logits = 10 * tf.one_hot(rest[:, :, 0], WORDS)
    return logits, tf.one_hot(rest[:, :, 0], WORDS), tf.roll(rest, -1, axis=2)


def generation_of(step: Any, grid_cells: int, **how: Any) -> Generation:
    """By default greedy, of LIMIT words, with nothing barred."""
    usual = {"max_length": LIMIT, "logit_filter": logit_filter(0, 0), "choose": greedy}
    return Generation(step=step, grid_cells=grid_cells, **(usual | how))


def decode_greedily(
    step: Any, cache: Any, row_mask: Any, max_length: int, cells: int, start: Any = START_ID
) -> Decoded:
    uniforms = tf.zeros((len(row_mask), max_length))
    generation = generation_of(step, cells, max_length=max_length)
    return decode(generation, cache, (), uniforms, row_mask, start)


@tf.function
def decode_rests(rests: Any, row_mask: Any) -> Decoded:
    uniforms = tf.zeros((row_mask.shape[0], LIMIT))
    return decode(generation_of(spell, WORDS), rests[:, None], (), uniforms, row_mask)


def decode_scripts(*batch: str, row_mask: list[bool] | None = None) -> Decoded:
    row_mask = row_mask or [True] * len(batch)
    decoded = decode_rests(tf.constant([*map(ids, batch)]), tf.constant(row_mask))
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


def test_first_step_reads_start_and_each_next_one_the_last_word():
    asked = []

    def listen(tokens: Any, position: Any, rest: Any, image: Any) -> tuple[Any, Any, Any]:
        asked.append((int(position), tokens.numpy().tolist()))
        return spell(tokens, position, rest, image)

    decode_greedily(listen, tf.constant([[ids("on.")]]), tf.constant([True]), LIMIT, WORDS)
    o, n, _ = ids("on.")[:3]
    assert asked == [(0, [[START_ID]]), (1, [[o]]), (2, [[n]])]


def test_rows_begin_with_their_start_ids():
    asked = []

    def listen(tokens: Any, position: Any, rest: Any, image: Any) -> tuple[Any, Any, Any]:
        asked.append(tokens.numpy().tolist())
        return spell(tokens, position, rest, image)

    row_mask, starts = tf.constant([True, True]), tf.constant([WORDS, START_ID])
    decode_greedily(listen, tf.constant([[ids(".")]] * 2), row_mask, LIMIT, WORDS, start=starts)
    assert asked == [[[WORDS], [START_ID]]]


def test_each_row_stops_at_its_own_end():
    decoded = decode_scripts("cat.", "a.", "giraffe.")
    assert spelled(decoded) == ["cat", "a", "giraffe"]
    assert decoded.finished.all()


def test_finished_row_writes_nothing_more():
    decoded = decode_scripts("cat.", "giraffe.")
    assert (decoded.tokens[0, 3:] == PADDING_ID).all()
    assert (decoded.log_probs[0, 4:] == 0).all()
    assert (decoded.attention[0, 3:] == 0).all()


def test_row_does_not_depend_on_other_rows():
    assert_same_row(decode_scripts("cat.", "giraffe."), 0, decode_scripts("cat.", "a."), 0)


def test_immediate_end_is_an_empty_finished_caption():
    decoded = decode_scripts(".", "a.")
    assert spelled(decoded) == ["", "a"]
    assert decoded.finished[0]
    assert decoded.log_probs[0, 0] < 0


@pytest.mark.parametrize("row_mask", [[False, True], [False, False]])
def test_padding_rows_stay_empty(row_mask):
    decoded = decode_scripts("cat.", "a.", row_mask=row_mask)
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
        rests = tf.constant([*map(ids, batch)])[:, None]
        return decode_greedily(counted, rests, tf.constant([True, True]), LIMIT, WORDS)

    run()
    assert steps.numpy() == expected


def test_attention_covers_words_but_not_end():
    decoded = decode_scripts("cat.", "a.")
    expected = np.zeros((LIMIT, WORDS))
    expected[range(3), ids("cat")[:3]] = 1
    np.testing.assert_array_equal(decoded.attention[0], expected)


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 2.0])
def test_log_probs_do_not_depend_on_the_temperature(temperature):
    rows = 40
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(rows, LIMIT, WORDS)).astype(np.float32)
    logits[:, :, END_ID] += 1  # so that some rows reach it
    logits[:, :, :END_ID] = BANNED_LOGIT
    uniforms = rng.random((rows, LIMIT), np.float32)

    def step(tokens: Any, position: Any, cache: Any, table: Any) -> tuple[Any, Any, Any]:
        return table[:, None, position], tf.zeros((*tokens.shape, 1)), cache

    choose = sampler(temperature, None, 1.0) if temperature else greedy
    generation = generation_of(step, 1, choose=choose)
    row_mask = tf.fill((rows,), True)
    decoded = decode(generation, (), tf.constant(logits), tf.constant(uniforms), row_mask)
    assert 0 < np.count_nonzero(decoded.finished) < rows
    expected = log_softmax(logits)
    for row in range(rows):
        words = decoded.tokens[row, : decoded.lengths[row]].numpy().tolist()
        chosen = [*words, END_ID] if decoded.finished[row] else words
        places = range(len(chosen))
        np.testing.assert_allclose(
            decoded.log_probs[row, : len(chosen)], expected[row, places, chosen], rtol=1e-4
        )


@settings(deadline=None)
@given(batches)
def test_batch_equals_its_sentences_alone(batch):
    together = decode_scripts(*batch)
    assert spelled(together) == [script.ljust(LIMIT, BABBLE).partition(".")[0] for script in batch]
    for row, script in enumerate(batch):
        assert_same_row(together, row, decode_scripts(script), 0)


def draw(
    logits: Any, temperature: float, uniforms: Any, top_k: int | None = None, top_p: float = 1.0
) -> npt.NDArray[np.int32]:
    """Sample a word per uniform, all from the same logits."""
    column = np.asarray(uniforms, np.float32)[:, None]
    rows = np.broadcast_to(np.float32(logits), (len(column), len(logits)))
    return sampler(temperature, top_k, top_p)(tf.constant(rows), column[:, 0]).numpy()


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


@pytest.mark.parametrize(("top_k", "top_p"), [(None, 1.0), (3, 1.0), (None, 0.6), (8, 0.9)])
def test_row_draws_the_same_words_in_any_batch(top_k, top_p):
    rng = np.random.default_rng(4)
    logits = tf.constant(rng.normal(size=(20, WORDS)), tf.float32)
    uniforms = rng.random(20, np.float32)
    choose = sampler(1.0, top_k, top_p)
    together = choose(logits, uniforms)
    backwards = choose(logits[::-1], uniforms[::-1])
    np.testing.assert_array_equal(backwards[::-1], together)
    for row in range(20):
        assert choose(logits[row : row + 1], uniforms[row : row + 1])[0] == together[row]


def test_each_position_has_its_own_uniform():
    def toss(tokens: Any, _position: Any, cache: Any, _image: Any) -> tuple[Any, Any, Any]:
        heads_or_tails = tf.constant([BANNED_LOGIT] * FIRST_LETTER + [0.0, 0.0])
        return heads_or_tails[None, None], tf.zeros((*tokens.shape, 1)), cache

    uniforms = tf.constant([[0.1, 0.6, 0.9, 0.2]])
    generation = generation_of(toss, 1, max_length=4, choose=sampler(1.0, None, 1.0))
    decoded = decode(generation, (), (), uniforms, tf.constant([True]))
    assert (decoded.tokens[0].numpy() - FIRST_LETTER).tolist() == [0, 1, 1, 0]


GRID = (np.arange(5000) + 0.5) / 5000


@pytest.mark.parametrize("top_k", [1, 3, WORDS, 10 * WORDS])
def test_top_k_draws_the_most_probable_words_in_proportion(top_k):
    logits = np.random.default_rng(5).normal(size=WORDS)
    probabilities = np.exp(logits)
    probabilities[np.argsort(-logits)[top_k:]] = 0
    frequencies = np.bincount(draw(logits, 1.0, GRID, top_k=top_k), minlength=WORDS) / 5000
    np.testing.assert_allclose(frequencies, probabilities / probabilities.sum(), atol=1 / 2500)


@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.9, 0.999])
def test_top_p_draws_the_fewest_words_that_reach_it(top_p):
    logits = np.random.default_rng(6).normal(size=WORDS)
    probabilities = np.exp(log_softmax(logits))
    order = np.argsort(-probabilities)
    kept = int(np.searchsorted(np.cumsum(probabilities[order]), top_p)) + 1
    probabilities[order[kept:]] = 0
    frequencies = np.bincount(draw(logits, 1.0, GRID, top_p=top_p), minlength=WORDS) / 5000
    np.testing.assert_allclose(frequencies, probabilities / probabilities.sum(), atol=1 / 2500)


def test_top_p_counts_among_the_top_k():
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    assert set(draw(logits, 1.0, GRID, top_k=2, top_p=0.5)) == {0}
    assert set(draw(logits, 1.0, GRID, top_k=2, top_p=0.6)) == {0, 1}


@pytest.mark.parametrize("uniform", [0.0, 0.5, HIGHEST_UNIFORM])
@pytest.mark.parametrize("temperature", [1e-50, 1e-38, 0.01, 1.0, 100.0])
@pytest.mark.parametrize("banned", [range(3), range(WORDS - 3, WORDS), range(0, WORDS, 2)])
def test_banned_words_are_never_drawn(banned, temperature, uniform):
    for seed in range(20):
        logits = np.random.default_rng(seed).normal(size=WORDS)
        logits[list(banned)] = BANNED_LOGIT
        assert draw(logits, temperature, [uniform])[0] not in banned


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"), [(3, 1.0, 3), (None, 0.49, 15), (20, 0.49, 10)]
)
@pytest.mark.parametrize("compiled", [False, True])
def test_ties_keep_the_lowest_ids(compiled, top_k, top_p, kept):
    choose = tf.function(sampler(1.0, top_k, top_p), jit_compile=compiled)
    drawn = choose(tf.zeros((len(GRID), WORDS)), tf.constant(GRID, tf.float32)).numpy()
    assert set(drawn) == set(range(kept))


def boundaries(logits: npt.NDArray[np.float32], kept: npt.NDArray[np.bool_]) -> Any:
    """Return the float32 numbers around the boundaries between words."""
    probabilities = np.where(kept, np.exp(np.float64(logits) - logits.max()), 0)
    sums = np.cumsum(probabilities / probabilities.sum())[kept]
    steps = np.round(sums * 2**24)[:, None] + np.arange(-16, 17)
    return np.unique(steps.clip(0, 2**24 - 1).ravel() / 2**24).astype(np.float32)


@pytest.mark.parametrize(("top_k", "top_p"), [(20, 1.0), (None, 0.9)])
def test_compiled_sampling_draws_kept_words_only(top_k, top_p):
    """XLA's cumulative sum rises even at words of probability 0: each run drew some of them."""
    size, rows = 2108, 2048
    choose = tf.function(sampler(1.0, top_k, top_p), jit_compile=True)
    for seed in range(3):
        logits = np.random.default_rng(seed).normal(0, 3, size).astype(np.float32)
        falling = np.argsort(-logits)
        probabilities = np.exp(log_softmax(logits))[falling]
        count = top_k or int(np.searchsorted(np.cumsum(probabilities), top_p)) + 1
        kept = np.isin(np.arange(size), falling[:count])
        uniforms = boundaries(logits, kept)
        table = tf.constant(np.tile(logits, (rows, 1)))
        for part in np.array_split(uniforms, 1 + len(uniforms) // rows):
            padded = tf.constant(np.pad(part, (0, rows - len(part))))
            assert kept[choose(table, padded).numpy()].all()


def test_greedy_takes_the_most_probable_word():
    assert greedy(tf.constant([[0.0, 2.0, 1.0], [3.0, -1.0, 3.0]]), None).numpy().tolist() == [1, 0]


def test_end_is_barred_before_min_length():
    bar = logit_filter(min_length=2, no_repeat_ngram=0)
    logits = 10 * tf.one_hot([END_ID], WORDS)
    tokens = tf.zeros((1, LIMIT), tf.int32)
    barred = [int(greedy(bar(logits, tokens, position), None)[0]) for position in (0, 1, 2)]
    assert barred == [0, 0, END_ID]


FEW_WORDS = FIRST_LETTER + 3


def scripted_tables(rng: np.random.Generator, images: int) -> npt.NDArray[np.float32]:
    """Logits `[images, T, V, V]` of the next word by position and last word; END is likely."""
    tables = rng.normal(0, 2, (images, LIMIT, FEW_WORDS, FEW_WORDS)).astype(np.float32)
    tables[..., END_ID] += 1
    tables[..., :END_ID] = BANNED_LOGIT
    return tables


def read_table(tokens: Any, position: Any, cache: Any, tables: Any) -> tuple[Any, Any, Any]:
    """A step function whose cache counts the words read: `[B, C, V]`."""
    logits = tf.gather(tables[:, position], tokens, batch_dims=1)
    cache = cache + tf.one_hot(tokens, FEW_WORDS)
    return logits, cache, cache


def next_in(table: npt.NDArray[np.float32]) -> Any:
    def next_log_probs(captions: list[list[int]]) -> npt.NDArray[np.float64]:
        position = len(captions[0])
        last = [words[-1] if words else START_ID for words in captions]
        return log_softmax(table[position][last])

    return next_log_probs


def assert_holds_words_then_padding(decoded: Decoded, row: int) -> None:
    words = decoded.tokens[row].numpy()
    length = int(decoded.lengths[row])
    assert (words[:length] > END_ID).all()
    assert (words[length:] == PADDING_ID).all()


@pytest.mark.parametrize("batch", [3, 16])
@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    beam_size=st.integers(1, 5),
    length_penalty=st.sampled_from([-10.0, -2.0, 0.0, 0.7, 1.0, 10.0]),
    min_length=st.integers(0, LIMIT),
    no_repeat_ngram=st.integers(0, 3),
)
def test_beam_search_equals_plain_python(
    batch, seed, beam_size, length_penalty, min_length, no_repeat_ngram
):
    tables = scripted_tables(np.random.default_rng(seed), batch)
    generation = generation_of(
        read_table,
        FEW_WORDS,
        logit_filter=logit_filter(min_length, no_repeat_ngram),
        beam_size=beam_size,
        length_penalty=length_penalty,
    )
    cache = tf.zeros((batch, beam_size, FEW_WORDS))
    decoded = beam_search(generation, cache, tf.constant(tables), tf.fill((batch,), True))
    for row, table in enumerate(tables):
        best = plain_beam_search(
            next_in(table), beam_size, length_penalty, LIMIT, min_length, no_repeat_ngram
        )
        length = int(decoded.lengths[row])
        assert_holds_words_then_padding(decoded, row)
        tokens = decoded.tokens[row, :length].numpy().tolist()
        assert (tokens, bool(decoded.finished[row])) == (best.tokens, best.finished)
        log_probs = decoded.log_probs[row, : len(best.log_probs)]
        np.testing.assert_allclose(log_probs, best.log_probs, atol=1e-4)
        assert not decoded.log_probs[row, len(best.log_probs) :].numpy().any()
        # A word's attention is its own caption's: how often each word had been read before.
        for place in range(length):
            read = np.bincount([START_ID, *tokens[:place]], minlength=FEW_WORDS)
            np.testing.assert_array_equal(decoded.attention[row, place], read)


def decode_tables(tables: npt.NDArray[np.float32], choose: Any, bar: Any) -> Decoded:
    rows = len(tables)
    generation = generation_of(read_table, FEW_WORDS, choose=choose, logit_filter=bar)
    uniforms = tf.constant(np.random.default_rng(0).random((rows, LIMIT), np.float32))
    cache = tf.zeros((rows, 1, FEW_WORDS))
    return decode(generation, cache, tf.constant(tables), uniforms, tf.fill((rows,), True))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(0, LIMIT), st.integers(1, 3))
def test_greedy_captions_repeat_no_ngram(seed, min_length, no_repeat_ngram):
    tables = scripted_tables(np.random.default_rng(seed), 4)
    tables[..., END_ID] -= 4
    decoded = decode_tables(tables, greedy, logit_filter(min_length, no_repeat_ngram))
    for row, table in enumerate(tables):
        expected = plain_beam_search(next_in(table), 1, 0.0, LIMIT, min_length, no_repeat_ngram)
        assert decoded.tokens[row, : decoded.lengths[row]].numpy().tolist() == expected.tokens
        assert bool(decoded.finished[row]) == expected.finished


@pytest.mark.parametrize("choose", [greedy, sampler(1.0, None, 1.0), sampler(1.0, 2, 0.9)])
def test_caption_ends_where_every_word_is_barred(choose):
    """Padding followed, since three words cannot fill eight positions without repeating."""
    tables = scripted_tables(np.random.default_rng(7), 20)
    decoded = decode_tables(tables, choose, logit_filter(min_length=LIMIT, no_repeat_ngram=1))
    assert decoded.lengths.numpy().tolist() == [FEW_WORDS - FIRST_LETTER] * 20
    assert decoded.finished.numpy().all()
    for row in range(20):
        assert_holds_words_then_padding(decoded, row)


@pytest.mark.parametrize("beam_size", [2, 5])
def test_best_finished_caption_is_returned_with_any_length_penalty(beam_size):
    """Lengths to the power of 10 put every score below the best one's initial value."""
    tables = np.full((1, LIMIT, FEW_WORDS, FEW_WORDS), BANNED_LOGIT, np.float32)
    tables[..., FIRST_LETTER:] = 0
    tables[..., END_ID] = 1
    generation = generation_of(
        read_table,
        FEW_WORDS,
        logit_filter=logit_filter(6, 0),
        beam_size=beam_size,
        length_penalty=-10.0,
    )
    cache = tf.zeros((1, beam_size, FEW_WORDS))
    decoded = beam_search(generation, cache, tf.constant(tables), tf.constant([True]))
    expected = plain_beam_search(next_in(tables[0]), beam_size, -10.0, LIMIT, 6)
    assert expected.finished
    assert bool(decoded.finished[0])
    # Includes END's, since the caption is finished.
    assert (decoded.log_probs[0].numpy() < 0).sum() == len(expected.log_probs)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text(f"{LETTERS}.", max_size=LIMIT), min_size=16, max_size=16))
def test_shrinking_a_large_batch_loses_no_words(batch):
    """The last quarter of 16 rows continues alone."""
    together = decode_scripts(*batch)
    assert spelled(together) == [script.ljust(LIMIT, BABBLE).partition(".")[0] for script in batch]


def test_batch_shrinks_once_at_most_a_quarter_is_unfinished():
    rows = tf.Variable(0)

    def counted(tokens: Any, *arguments: Any) -> tuple[Any, Any, Any]:
        rows.assign_add(tokens.shape[0])
        return spell(tokens, *arguments)

    @tf.function
    def run() -> Decoded:
        rests = tf.constant([*map(ids, ["a."] * 12 + ["zzzzzzz."] * 4)])[:, None]
        return decode_greedily(counted, rests, tf.fill((16,), True), LIMIT, WORDS)

    run()
    assert rows.numpy() == 2 * 16 + 6 * 4
