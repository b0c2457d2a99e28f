"""Generates words from logits in NumPy, on CPUs: what `decoding.py` does, without static shapes.

Shapes as in `network.py`, with T the length limit and R the images still in the batch. Finished
images leave the batch whenever a quarter of it is finished, so the cost follows the number of
words, not the longest caption.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from batchcap.model.caption import Decoded
from batchcap.model.numpy_network import Floats, Ids, NumpyDecoder, softmax
from batchcap.model.vocabulary import END_ID, PADDING_ID
from batchcap.settings import DecodeSettings

BARRED = -1e9
IMPOSSIBLE = -1e8  # below any sum of real log-probabilities, above any with a barred word
TINY = 1e-6
BLOCKS_PER_PLACE = 8  # enough for few candidates, few enough for fast maxima
KEPT_SHARE = 0.75  # of a batch; with fewer unfinished rows, the finished ones are dropped


def _empty(images: int, length: int, cells: int) -> Decoded:
    """Return captions without a word."""
    return Decoded(
        tokens=np.full((images, length), PADDING_ID, np.int32),
        lengths=np.zeros(images, np.int32),
        log_probs=np.zeros((images, length), np.float32),
        finished=np.zeros(images, bool),
        attention=np.zeros((images, length, cells), np.float32),
    )


def generate(
    decoder: NumpyDecoder, features: Floats, settings: DecodeSettings, uniforms: Floats, start: int
) -> Decoded:
    """Write one caption per image, word by word, until each has reached END or T positions.

    A row does not depend on its batch mates. Log-probabilities are natural, of the unchanged logits
    (temperature 1, nothing barred).

    Args:
        decoder: the network.
        features: `float32[B, G, D]`, of the images.
        settings: how to write; its `max_length` is T.
        uniforms: `float32[B, T]` in [0, 1), random numbers.
        start: the id before the first word.
    """
    image = decoder.read_images(features)
    if settings.beam_size > 1:
        return _beam_search(decoder, image, settings, start)
    length = settings.max_length
    decoded = _empty(len(image), length, image.shape[1])
    rows, last = np.arange(len(image)), np.full(len(image), start, np.int32)
    cache = decoder.empty_cache(len(image), length)
    unfinished = np.ones(len(rows), bool)
    for position in range(length):
        logits, looked = decoder.step(last, position, cache, image)
        allowed = _allowed(logits, decoded.tokens[rows], position, settings)
        last = _choose(allowed, uniforms[rows, position], settings)
        log_probs = logits[np.arange(len(rows)), last] - _log_sum_exp(logits)
        decoded.log_probs[rows[unfinished], position] = log_probs[unfinished]
        ended = unfinished & (last == END_ID)
        decoded.finished[rows[ended]] = True
        unfinished &= ~ended
        decoded.tokens[rows[unfinished], position] = last[unfinished]
        decoded.attention[rows[unfinished], position] = looked[unfinished]
        if not unfinished.any():
            break
        if unfinished.sum() <= KEPT_SHARE * len(rows):
            rows, last = rows[unfinished], last[unfinished]
            image, cache = image[unfinished], cache[unfinished]
            unfinished = np.ones(len(rows), bool)
    return _with_lengths(decoded)


def _with_lengths(decoded: Decoded) -> Decoded:
    return decoded._replace(lengths=(decoded.tokens != PADDING_ID).sum(axis=1))


def _log_sum_exp(logits: Floats) -> Floats:
    highest = logits.max(axis=-1)
    return highest + np.log(np.exp(logits - highest[:, None]).sum(axis=-1))


def _choose(logits: Floats, uniforms: Floats, settings: DecodeSettings) -> Ids:
    """Choose a word per row, `int32[R]`, by `float32[R, V]`; see `decoding.sampler`."""
    if settings.temperature == 0:
        return logits.argmax(axis=-1).astype(np.int32)
    scaled = logits / np.float32(max(settings.temperature, TINY))
    if settings.top_k is not None and settings.top_k < scaled.shape[1]:
        least = np.partition(scaled, -settings.top_k, axis=-1)[:, -settings.top_k, None]
        scaled = np.where(_highest(scaled, least, settings.top_k), scaled, BARRED)
    probabilities = softmax(scaled)
    if settings.top_p < 1:
        falling = -np.sort(-probabilities, axis=-1)
        before = np.cumsum(falling, axis=-1) - falling
        count = np.maximum((before < settings.top_p).sum(axis=-1, keepdims=True), 1)
        least = np.take_along_axis(falling, count - 1, axis=-1)
        probabilities = np.where(_highest(probabilities, least, count), probabilities, 0)
    cumulative = np.cumsum(probabilities, axis=-1)
    drawn = uniforms[:, None] * cumulative[:, -1:]
    last = probabilities.shape[1] - 1 - (probabilities[:, ::-1] > 0).argmax(axis=-1)
    return np.minimum((cumulative <= drawn).sum(axis=-1), last).astype(np.int32)


def _highest(values: Floats, least: Floats, count: int | Ids) -> npt.NDArray[np.bool_]:
    """Return `bool[R, V]`: the `count` highest per row, down to `least`; ties go to the first."""
    is_higher, is_equal = values > least, values == least
    wanted = count - is_higher.sum(axis=-1, keepdims=True)
    return is_higher | (is_equal & (np.cumsum(is_equal, axis=-1) <= wanted))


def _allowed(logits: Floats, tokens: Ids, position: int, settings: DecodeSettings) -> Floats:
    """Bar words from being chosen; see `decoding.logit_filter`."""
    ends_early = position < settings.min_length
    n = settings.no_repeat_ngram
    if not ends_early and not 0 < n <= position + 1:
        return logits
    allowed = logits.copy()
    if ends_early:
        allowed[:, END_ID] = BARRED
    if 0 < n <= position + 1:
        recent = tokens[:, position - n + 1 : position]
        for first in range(position - n + 1):
            repeats = (tokens[:, first : first + n - 1] == recent).all(axis=-1)
            allowed[repeats, tokens[repeats, first + n - 1]] = BARRED
        if ends_early:
            is_stuck = allowed.max(axis=-1) < IMPOSSIBLE
            allowed[is_stuck, END_ID] = logits[is_stuck, END_ID]
    return allowed


class _Beam(NamedTuple):
    """A caption of beam search: its last word, and the caption before that word.

    score: the sum of its log-probabilities. row: its row of the decoder's cache. log_prob,
    attention: of the last word.
    """

    score: np.float32
    word: int
    row: int
    log_prob: np.float32
    attention: Floats
    before: "_Beam | None"

    def words(self) -> "Iterator[_Beam]":
        """Yield this beam and those before it, the last word first."""
        beam: _Beam | None = self
        while beam is not None:
            yield beam
            beam = beam.before


@dataclass
class _Search:
    """An image's captions alive, best first; its best finished caption; the number of finished."""

    alive: list[_Beam]
    best: _Beam | None = None
    best_score: float = -np.inf
    finished: int = 0

    def extend(self, extensions: list[_Beam], settings: DecodeSettings) -> None:
        """Take the 2K best extensions, best first: finish those by END, keep K others alive."""
        beam_size = settings.beam_size
        ended = [
            beam
            for beam in extensions[:beam_size]
            if beam.word == END_ID and beam.score > IMPOSSIBLE
        ]
        self.alive = [beam for beam in extensions if beam.word != END_ID][:beam_size]
        self.finished += len(ended)
        if ended:
            length = sum(1 for _ in ended[0].words())
            score = float(ended[0].score) / length**settings.length_penalty
            if score > self.best_score:
                self.best, self.best_score = ended[0], score


def _beam_search(
    decoder: NumpyDecoder, image: Floats, settings: DecodeSettings, start: int
) -> Decoded:
    """Keep the K most probable captions of each image; see `decoding.beam_search`.

    An image's captions are side by side, K rows of each array; finished images leave the batch.
    """
    images, beam_size, length = len(image), settings.beam_size, settings.max_length
    decoded = _empty(images, length, image.shape[1])
    searches = [_Search([]) for _ in range(images)]
    rows = np.arange(images)
    cache = decoder.empty_cache(images * beam_size, length)
    last = np.full(images * beam_size, start, np.int32)
    tokens = np.full((images * beam_size, length), PADDING_ID, np.int32)
    # Begin with one caption: the extensions of the other K - 1 rank below all of its own.
    scores = np.tile(np.array([0] + [BARRED] * (beam_size - 1), np.float32), images)
    for position in range(length):
        logits, looked = decoder.step(last, position, cache, image)
        log_probs = logits - _log_sum_exp(logits)[:, None]
        totals = scores[:, None] + _allowed(log_probs, tokens, position, settings)
        highest = _highest_places(totals.reshape(len(rows), -1), 2 * beam_size)
        for index, row in enumerate(rows):
            alive = searches[row].alive if position else [None] * beam_size
            extensions = []
            for beam, word in zip(*divmod(highest[index], logits.shape[1]), strict=True):
                source = index * beam_size + int(beam)
                scored = totals[source, word], int(word), source, log_probs[source, word]
                extensions.append(_Beam(*scored, looked[source], before=alive[beam]))
            searches[row].extend(extensions, settings)
        unfinished = np.array([searches[row].finished < beam_size for row in rows])
        rows, image = rows[unfinished], image[unfinished]
        beams = [beam for row in rows for beam in searches[row].alive]
        if not beams:
            break
        sources = [beam.row for beam in beams]
        cache, tokens = cache[sources], tokens[sources]
        last = np.array([beam.word for beam in beams], np.int32)
        scores = np.array([beam.score for beam in beams], np.float32)
        tokens[:, position] = last
    for index, search in enumerate(searches):
        _write(decoded, index, search.best or search.alive[0], search.best is not None)
    return _with_lengths(decoded)


def _highest_places(values: Floats, count: int) -> npt.NDArray[np.int64]:
    """Return the places of the highest of each row, `[R, count]`, the highest first.

    The `count` highest are among those that reach the `count` highest maxima of blocks: there are
    few of them, and sorting whole rows would take longer than a step.
    """
    rows, size = values.shape
    starts = np.arange(0, size, max(size // (BLOCKS_PER_PLACE * count), 1))
    maxima = np.maximum.reduceat(values, starts, axis=1)
    least = np.partition(maxima, -count, axis=1)[:, -count, None]
    row, place = np.nonzero(values >= least)
    order = np.lexsort((place, -values[row, place], row))
    first = np.searchsorted(row, np.arange(rows))
    return place[order[first[:, None] + np.arange(count)]]


def _write(decoded: Decoded, row: int, caption: _Beam, is_finished: bool) -> None:
    beams = list(caption.words())[::-1]
    decoded.finished[row] = is_finished
    decoded.log_probs[row, : len(beams)] = [beam.log_prob for beam in beams]
    for position, beam in enumerate(beams[: len(beams) - is_finished]):
        decoded.tokens[row, position] = beam.word
        decoded.attention[row, position] = beam.attention
