"""Generates words from logits: greedy and sampled captions in one loop, beam search in another.

Ids only: no text and no photos; the network is a step function. Shapes as in `network.py`,
with T the length limit and R the images still in the batch.

Finished images leave the batch: when at most a quarter of it is unfinished, those rows are gathered
and the loop continues with a quarter of the rows. So the cost follows the number of words,
not the longest caption, and all shapes stay static.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from batchcap.model.caption import Decoded
from batchcap.model.numpy_decoding import BARRED, IMPOSSIBLE, TINY
from batchcap.model.vocabulary import END_ID, PADDING_ID, START_ID

# (tokens int32[B, C], position int32[], cache, image)
#     -> (logits float32[B, C, V], attention float32[B, C, G], cache)
# `cache` is nested tensors float32[B, C, ...], `image` nested tensors [B, ...].
Step = Callable[[Any, Any, Any, Any], tuple[Any, Any, Any]]
# (logits float32[R, V], uniforms float32[R]) -> int32[R]
Choose = Callable[[Any, Any], Any]
# (logits float32[N, V], tokens int32[N, T], position int32[]) -> float32[N, V]
LogitFilter = Callable[[Any, Any, Any], Any]

FEWEST_ROWS = 4  # a step costs about the same with fewer


@dataclass(frozen=True)
class Generation:
    """How captions are generated.

    step: the network; called first with the start ids at position 0.
    max_length: T. grid_cells: G.
    logit_filter: bars words before a choice; see `logit_filter`.
    choose: chooses a word in `decode`: `greedy` or a `sampler`.
    beam_size: K, for `beam_search`.
    length_penalty: for `beam_search`; 0 compares sums of log-probabilities, which favours short
        captions; 1 compares means.
    """

    step: Step
    max_length: int
    grid_cells: int
    logit_filter: LogitFilter
    choose: Choose
    beam_size: int = 1
    length_penalty: float = 0.0


class _Written(NamedTuple):
    """Partial captions: `[..., T]`, `[..., T]` and `[..., T, G]`."""

    tokens: Any
    log_probs: Any
    attention: Any


class _Rows(NamedTuple):
    """The images still in the batch; every tensor's first axis is R.

    unfinished: `bool[R]`, whether the image's caption is unfinished. result: the caption so far.
    working: the next step's input.
    """

    unfinished: Any
    result: Any
    working: Any


def decode(
    generation: Generation,
    cache: Any,
    image: Any,
    uniforms: Any,
    row_mask: Any,
    start: Any = START_ID,
) -> Decoded:
    """Write one caption per image, word by word, until each has reached END or T positions.

    A row does not depend on its batch mates. Log-probabilities are natural, of the unchanged logits
    (temperature 1, nothing barred).

    Args:
        generation: how to write; its `choose` takes the random numbers.
        cache: the step's state from word to word, for one caption per image.
        image: what the step reads of each image.
        uniforms: `float32[B, T]` in [0, 1), random numbers.
        row_mask: `bool[B]`; False in rows that only pad the batch, where nothing is written.
        start: `int32[]` or `int32[B]`, the id before the first word.
    """
    rows = uniforms.shape[0]

    def one_word(position: Any, rows: _Rows) -> _Rows:
        written, (last, cache, image, uniforms) = rows.result, rows.working
        logits, attention, cache = generation.step(last[:, None], position, cache, image)
        logits = logits[:, 0]
        allowed = generation.logit_filter(logits, written.tokens, position)
        word = generation.choose(allowed, uniforms[:, position])
        is_word = rows.unfinished & (word != END_ID)
        log_prob = tf.gather(logits, word, batch_dims=1) - tf.reduce_logsumexp(logits, axis=-1)
        written = _write(
            written,
            tf.where(is_word, word, PADDING_ID),
            tf.where(rows.unfinished, log_prob, 0.0),
            tf.where(is_word[:, None], attention[:, 0], 0.0),
            position,
        )
        return _Rows(is_word, written, (word, cache, image, uniforms))

    first = tf.broadcast_to(start, (rows,))
    empty = _empty((rows,), generation)
    beginning = _Rows(row_mask, empty, (first, cache, image, uniforms))
    unfinished, written = _until_finished(one_word, beginning, generation.max_length)
    return _decoded(written, finished=row_mask & ~unfinished)


def greedy(logits: Any, _uniforms: Any) -> Any:
    """Return the most probable word of each row, the lowest id in a tie."""
    # XLA does not vectorise `tf.argmax` on CPUs: it takes an eighth of a step, this a twentieth.
    is_best = logits == tf.reduce_max(logits, axis=-1, keepdims=True)
    words = tf.range(logits.shape[-1])
    return tf.reduce_min(tf.where(is_best, words, words[-1]), axis=-1)


def sampler(temperature: float, top_k: int | None, top_p: float) -> Choose:
    """Sample words from softmax(logits / temperature) by inverting its cumulative distribution.

    `top_k` keeps only that many of the most probable words, and `top_p` the fewest of these whose
    probabilities add up to it (Holtzman et al. 2020, nucleus sampling); ties go to lower ids.
    Random numbers are given, one per row and position: a row gets the same words in any batch.
    """

    def choose(logits: Any, uniforms: Any) -> Any:
        # Below TINY the division may overflow, and the most probable word is certain anyway.
        scaled = logits / max(temperature, TINY)
        size = logits.shape[-1]
        words = tf.range(size)
        if top_k is not None:
            count = min(top_k, size)
            least = tf.math.top_k(scaled, count).values[:, -1:]
            scaled = tf.where(_highest(scaled, least, count), scaled, BARRED)
        probabilities = tf.nn.softmax(scaled)
        if top_p < 1:
            falling = tf.sort(probabilities, direction="DESCENDING")
            before = tf.cumsum(falling, axis=-1, exclusive=True)
            is_enough = before >= max(top_p, TINY)  # False at the first word
            count = tf.reduce_min(tf.where(is_enough, words, size), axis=-1, keepdims=True)
            least = tf.reduce_min(tf.where(words < count, falling, 1.0), axis=-1, keepdims=True)
            probabilities = tf.where(_highest(probabilities, least, count), probabilities, 0.0)
        cumulative = tf.cumsum(probabilities, axis=-1)
        drawn = uniforms[:, None] * cumulative[:, -1:]
        # XLA adds in another order for each word, so sums can rise at words of probability 0.
        is_possible = probabilities > 0
        is_past = is_possible & (cumulative > drawn)
        last = tf.reduce_max(tf.where(is_possible, words, 0), axis=-1)
        return tf.minimum(tf.reduce_min(tf.where(is_past, words, words[-1]), axis=-1), last)

    return choose


def _highest(values: Any, least: Any, count: Any) -> Any:
    """Return `bool[N, V]`: the `count` highest per row, down to `least`; ties go to the first."""
    is_higher, is_equal = values > least, values == least
    wanted = count - tf.reduce_sum(tf.cast(is_higher, tf.int32), axis=-1, keepdims=True)
    return is_higher | (is_equal & (tf.cumsum(tf.cast(is_equal, tf.int32), axis=-1) <= wanted))


def logit_filter(min_length: int, no_repeat_ngram: int) -> LogitFilter:
    """Return a filter that bars words from being chosen; log-probabilities stay the same.

    END is barred from the first `min_length` positions, and a word wherever it would repeat an
    n-gram of `no_repeat_ngram` words (0 bars none). If all words are barred, the caption ends.
    """

    def bar(logits: Any, tokens: Any, position: Any) -> Any:
        is_end, free = tf.range(logits.shape[-1]) == END_ID, logits
        if min_length > 0:
            logits = tf.where(is_end & (position < min_length), BARRED, logits)
        if 0 < no_repeat_ngram <= tokens.shape[-1]:
            words = _repeating(tokens, position, no_repeat_ngram)
            count, places = words.shape
            rows = tf.broadcast_to(tf.range(count)[:, None], (count, places))
            barred = tf.fill((count, places), BARRED)
            at = tf.stack([rows, words], axis=-1)
            logits = tf.tensor_scatter_nd_min(logits, at, barred)
            if min_length > 0:
                is_stuck = tf.reduce_max(logits, axis=-1, keepdims=True) < IMPOSSIBLE
                logits = tf.where(is_stuck & is_end, free, logits)
        return logits

    return bar


def _repeating(tokens: Any, position: Any, n: int) -> Any:
    """Return per row the words that would repeat an n-gram: `int32[N, T - n + 1]`.

    Padding, which is barred anyway, fills the other places.
    """
    starts = tokens.shape[1] - n + 1
    repeats = tf.fill((tokens.shape[0], starts), True) & (tf.range(starts) + n - 1 < position)
    for offset in range(n - 1):
        recent = tokens[:, tf.maximum(position - n + 1 + offset, 0)]
        repeats &= tokens[:, offset : offset + starts] == recent[:, None]
    return tf.where(repeats, tokens[:, n - 1 :], PADDING_ID)


class _Beams(NamedTuple):
    """The K captions of each image that are alive, best first.

    score: `float32[R, K]`, log-probability so far.
    last: `int32[R, K]`, the last words.
    """

    written: _Written
    score: Any
    last: Any


class _Best(NamedTuple):
    """Each image's best finished caption or, until there is one, its most probable beam alive.

    score: `float32[R]`, log-probability / length ** `length_penalty`.
    finished: `int32[R]`, the number of finished captions.
    """

    written: _Written
    score: Any
    finished: Any


def beam_search(
    generation: Generation, cache: Any, image: Any, row_mask: Any, start: int = START_ID
) -> Decoded:
    """Keep the `beam_size` (K) most probable captions of each image; return the best finished one.

    At each position, every caption is extended by every word. Of the K best extensions, those by
    END are finished; the K best by other words stay alive. An image is done once K captions are
    finished, or after T positions. The best caption has the highest log-probability / length **
    `length_penalty`, where END counts as a word; if none is finished, the most probable beam alive
    is returned.

    Args:
        generation: how to write; its step takes K captions per image (C = K).
        cache: the step's state from word to word, for K captions per image.
        image: what the step reads of each image.
        row_mask: `bool[B]`; False in rows that only pad the batch.
        start: the id before the first word.
    """
    images, beam_size = row_mask.shape[0], generation.beam_size
    # Begin with one caption: the extensions of the other K - 1 rank below all of its own.
    score = tf.one_hot(tf.zeros(images, tf.int32), beam_size, on_value=0.0, off_value=BARRED)
    beams = _Beams(
        _empty((images, beam_size), generation), score, tf.fill((images, beam_size), start)
    )
    best = _Best(
        _empty((images,), generation),
        tf.zeros((images,)),  # not compared until a caption is finished
        tf.zeros((images,), tf.int32),
    )
    one_word = partial(_extend_beams, generation)
    beginning = _Rows(row_mask, best, (beams, cache, image))
    _, best = _until_finished(one_word, beginning, generation.max_length)
    return _decoded(best.written, finished=best.finished > 0)


def _extend_beams(generation: Generation, position: Any, rows: _Rows) -> _Rows:
    beams, cache, image = rows.working
    beam_size = generation.beam_size
    logits, attention, cache = generation.step(beams.last, position, cache, image)
    log_probs = tf.nn.log_softmax(logits)
    scores, sources, words = _extensions(beams, log_probs, generation.logit_filter, position)
    ends = (words == END_ID) & (tf.range(2 * beam_size) < beam_size) & (scores > IMPOSSIBLE)
    # Column 0 is the best finished caption; the others stay alive.
    first_end = tf.argmax(tf.cast(ends, tf.int32), axis=1, output_type=tf.int32)
    alive = tf.where(words == END_ID, -np.inf, scores)
    chosen = tf.concat([first_end[:, None], tf.math.top_k(alive, beam_size).indices], axis=1)
    scores, sources, words = _take((scores, sources, words), chosen)
    written = _extended(beams.written, log_probs, attention, sources, words, position)
    finished, alive = (tf.nest.map_structure(part, written) for part in (_first, _others))
    length = tf.cast(position + 1, tf.float32)
    newly_finished = tf.reduce_sum(tf.cast(ends, tf.int32), axis=1)
    best = _better(
        rows.result,
        _Best(finished, scores[:, 0] / length**generation.length_penalty, newly_finished),
        tf.nest.map_structure(_first, alive),
        rows.unfinished,
    )
    beams = _Beams(alive, scores[:, 1:], words[:, 1:])
    unfinished = rows.unfinished & (best.finished < beam_size)
    return _Rows(unfinished, best, (beams, _take(cache, sources[:, 1:]), image))


def _extensions(
    beams: _Beams, log_probs: Any, logit_filter: LogitFilter, position: Any
) -> tuple[Any, Any, Any]:
    """Return the 2K best extensions, best first: score, caption, word, each `[R, 2K]`.

    Twice as many as beams, since K of them may be by END.
    """
    images, beam_size, words = log_probs.shape
    allowed = logit_filter(
        tf.reshape(log_probs, (images * beam_size, words)),
        tf.reshape(beams.written.tokens, (images * beam_size, -1)),
        position,
    )
    totals = tf.reshape(beams.score, (images * beam_size, 1)) + allowed
    scores, flat = tf.math.top_k(tf.reshape(totals, (images, beam_size * words)), 2 * beam_size)
    return scores, flat // words, flat % words


def _extended(
    written: _Written, log_probs: Any, attention: Any, sources: Any, words: Any, position: Any
) -> _Written:
    """Return the captions `sources`, `int32[R, M]`, extended by `words`, `int32[R, M]`."""
    images, beam_size, vocabulary = log_probs.shape
    flat = tf.reshape(log_probs, (images, beam_size * vocabulary))
    written, attention = _take((written, attention), sources)
    is_word = words != END_ID
    return _write(
        written,
        tf.where(is_word, words, PADDING_ID),
        _take(flat, sources * vocabulary + words),
        tf.where(is_word[..., None], attention, 0.0),
        position,
    )


def _better(best: _Best, newly: _Best, alive: _Written, unfinished: Any) -> _Best:
    """Replace `best` in unfinished rows by a newly finished caption with a higher score.

    Rows without a finished caption get the best beam alive.
    """
    is_higher = (best.finished == 0) | (newly.score > best.score)
    is_higher &= unfinished & (newly.finished > 0)
    total = tf.where(unfinished, best.finished + newly.finished, best.finished)
    written = _where(is_higher, newly.written, _where(total == 0, alive, best.written))
    return _Best(written, tf.where(is_higher, newly.score, best.score), total)


def _until_finished(
    advance: Callable[[Any, _Rows], _Rows], rows: _Rows, max_length: int
) -> tuple[Any, Any]:
    """Advance ever fewer rows until all are finished or T positions are done.

    Returns `bool[B]`, which rows are unfinished, and the results.
    """
    results = rows.unfinished, rows.result
    places = tf.range(rows.unfinished.shape[0])
    position = tf.constant(0)

    def busy(fewest: int, position: Any, rows: _Rows) -> Any:
        return (position < max_length) & (
            tf.reduce_sum(tf.cast(rows.unfinished, tf.int32)) > fewest
        )

    def one_position(position: Any, rows: _Rows) -> tuple[Any, _Rows]:
        return position + 1, advance(position, rows)

    quarter = rows.unfinished.shape[0] // 4
    for fewer in (quarter, 0) if quarter >= FEWEST_ROWS else (0,):
        position, rows = tf.while_loop(partial(busy, fewer), one_position, (position, rows))
        scatter = partial(_scatter, places[:, None])
        results = tf.nest.map_structure(scatter, results, (rows.unfinished, rows.result))
        if fewer:
            kept = tf.math.top_k(tf.cast(rows.unfinished, tf.int32), fewer).indices
            places, rows = tf.nest.map_structure(partial(tf.gather, indices=kept), (places, rows))
    return results


def _scatter(places: Any, whole: Any, part: Any) -> Any:
    return tf.tensor_scatter_nd_update(whole, places, part)


def _empty(rows: tuple[int, ...], generation: Generation) -> _Written:
    length = generation.max_length
    return _Written(
        tf.fill((*rows, length), PADDING_ID),
        tf.zeros((*rows, length)),
        tf.zeros((*rows, length, generation.grid_cells)),
    )


def _write(written: _Written, token: Any, log_prob: Any, attention: Any, position: Any) -> _Written:
    here = tf.range(written.tokens.shape[-1]) == position
    return _Written(
        tf.where(here, token[..., None], written.tokens),
        tf.where(here, log_prob[..., None], written.log_probs),
        tf.where(here[:, None], attention[..., None, :], written.attention),
    )


def _decoded(written: _Written, finished: Any) -> Decoded:
    lengths = tf.reduce_sum(tf.cast(written.tokens != PADDING_ID, tf.int32), axis=1)
    return Decoded(written.tokens, lengths, written.log_probs, finished, written.attention)


def _take(tensors: Any, columns: Any) -> Any:
    """Gather `columns`, `int32[R, N]`, of each row of nested `[R, M, ...]`: `[R, N, ...]`."""
    return tf.nest.map_structure(lambda t: tf.gather(t, columns, batch_dims=1), tensors)


def _first(tensor: Any) -> Any:
    return tensor[:, 0]


def _others(tensor: Any) -> Any:
    return tensor[:, 1:]


def _where(is_chosen: Any, chosen: Any, others: Any) -> Any:
    """Merge nested tensors `[R, ...]`: rows of `chosen` where `is_chosen`, else of `others`."""

    def merge(one: Any, other: Any) -> Any:
        shape = (-1, *(1 for _ in one.shape[1:]))
        return tf.where(tf.reshape(is_chosen, shape), one, other)

    return tf.nest.map_structure(merge, chosen, others)
