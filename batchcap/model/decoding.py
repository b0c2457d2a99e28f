"""Logits to words: one loop over a batch, each row stopping at its own END.

Ids only: no text, no photos, and no network either, which comes in as a step function. Shapes as in
`network.py`, with T the length limit.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from batchcap.model.text import END_ID, PADDING_ID, START_ID

# (tokens int32[B], position int32[], state)
#     -> (logits float32[B, V], attention float32[B, G], state)
Step = Callable[[Any, Any, Any], tuple[Any, Any, Any]]
# (logits float32[B, V], position int32[]) -> int32[B]
Choose = Callable[[Any, Any], Any]


class Decoded(NamedTuple):
    """Captions of a batch, as tensors or arrays.

    tokens: `int32[B, T]`, words, then padding; END left out.
    lengths: `int32[B]`, words of each row.
    log_probs: `float32[B, T]`, of each word, then of END where it was reached; then zeros.
    finished: `bool[B]`, END was reached within T positions.
    attention: `float32[B, T, G]`, where the image was looked at for each word; then zeros.
    """

    tokens: Any
    lengths: Any
    log_probs: Any
    finished: Any
    attention: Any


def decode(
    step: Step, state: Any, choose: Choose, live: Any, max_length: int, grid_cells: int
) -> Decoded:
    """Decode until every row has reached END or `max_length` positions.

    A finished row is frozen: it writes padding from then on, so that its batch mates change nothing
    in it. Log-probabilities are natural, of the logits as they come (temperature 1).

    Args:
        step: the network; called first with START at position 0.
        state: what `step` carries from word to word; nested tensors of fixed shape.
        choose: `greedy`, or what `sampler` gives.
        live: `bool[B]`; rows that only fill the batch are False, finished from birth.
        max_length: T.
        grid_cells: G.
    """
    rows = live.shape[0]
    tokens = tf.TensorArray(tf.int32, max_length, element_shape=(rows,))
    log_probs = tf.TensorArray(tf.float32, max_length, element_shape=(rows,))
    attention = tf.TensorArray(tf.float32, max_length, element_shape=(rows, grid_cells))

    def unfinished(position: Any, _last: Any, open_rows: Any, *_: Any) -> Any:
        return (position < max_length) & tf.reduce_any(open_rows)

    def one_word(
        position: Any,
        last: Any,
        open_rows: Any,
        state: Any,
        tokens: Any,
        log_probs: Any,
        attention: Any,
    ) -> tuple[Any, ...]:
        logits, looked, state = step(last, position, state)
        word = tf.where(open_rows, choose(logits, position), PADDING_ID)
        word_log_probs = tf.gather(tf.nn.log_softmax(logits), word, batch_dims=1)
        is_word = open_rows & (word != END_ID)
        return (
            position + 1,
            word,
            is_word,
            state,
            tokens.write(position, tf.where(is_word, word, PADDING_ID)),
            log_probs.write(position, tf.where(open_rows, word_log_probs, 0.0)),
            attention.write(position, tf.where(is_word[:, None], looked, 0.0)),
        )

    start = tf.fill((rows,), START_ID)
    _, _, open_rows, _, tokens, log_probs, attention = tf.while_loop(
        unfinished, one_word, (0, start, live, state, tokens, log_probs, attention)
    )
    words = tf.transpose(tokens.stack())
    return Decoded(
        tokens=words,
        lengths=tf.reduce_sum(tf.cast(words != PADDING_ID, tf.int32), axis=1),
        log_probs=tf.transpose(log_probs.stack()),
        finished=live & ~open_rows,
        attention=tf.transpose(attention.stack(), (1, 0, 2)),
    )


def greedy(logits: Any, _position: Any) -> Any:
    """The most probable word of each row."""
    return tf.argmax(logits, axis=-1, output_type=tf.int32)


def sampler(temperature: Any, uniforms: Any) -> Choose:
    """Draw words from softmax(logits / temperature) by inverting its cumulative distribution.

    `uniforms`, `float32[B, T]` in [0, 1), holds every random number beforehand, one per row and
    position: a row draws the same words in whatever batch it stands.
    """

    def choose(logits: Any, position: Any) -> Any:
        # Near 0, where the division would overflow, the most probable word is certain already.
        scaled = logits / tf.maximum(temperature, 1e-6)
        cumulative = tf.cumsum(tf.nn.softmax(scaled), axis=-1)
        drawn = uniforms[:, position, None] * cumulative[:, -1:]
        word = tf.reduce_sum(tf.cast(cumulative <= drawn, tf.int32), axis=-1)
        return tf.minimum(word, logits.shape[-1] - 1)  # rounding can push `drawn` to the very end

    return choose
