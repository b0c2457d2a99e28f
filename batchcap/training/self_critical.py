"""Self-critical sequence training (Rennie et al. 2017): sample captions, reward their CIDEr-D.

A sampled caption's baseline is the mean reward of its photo's other samples (Luo 2020). Features
have dropout, since rewards for photos that the model knows by heart say nothing.
"""

import math
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from batchcap.evaluation.metrics import LONGEST_NGRAM, ngrams
from batchcap.model.decoding import Generation, decode, logit_filter, sampler
from batchcap.model.network import CaptionDecoder
from batchcap.model.vocabulary import END_ID, PADDING_ID, START_ID
from batchcap.training.data import Tokens
from batchcap.training.replicas import summed_over_replicas

SIGMA = 6.0
REPEATED_NGRAM = 3  # words; no n-gram of this length is sampled twice in a caption

# Tf-idf weights and their norm, per length of n-gram; number of words.
Vector = tuple[list[dict[tuple[int, ...], float]], list[float], int]


class CiderD:
    """CIDEr-D (Vedantam et al. 2015) of token ids, with the training set's document frequencies.

    END counts as a word: without it, captions learn to stop in the middle of a sentence.
    """

    def __init__(self, tokens: Tokens) -> None:
        """Count the images of `int32[images, captions, T + 1]` in which each n-gram occurs."""
        self.frequency: Counter[tuple[int, ...]] = Counter()
        for captions in tokens:
            self.frequency.update(
                {ngram for row in captions for counts in _ngrams(_words(row)) for ngram in counts}
            )
        self.log_images = math.log(len(tokens))
        self._references: dict[bytes, Vector] = {}

    def __call__(self, captions: Tokens, references: Tokens) -> npt.NDArray[np.float32]:
        """Return rewards `float32[B, S]` of captions `int32[B, S, T + 1]`.

        References are `[B, C, T + 1]`. The maximum is 10.
        """
        rewards = np.zeros(captions.shape[:2], np.float32)
        for image, drawn in enumerate(captions):
            vectors = [self._reference(row) for row in references[image] if row[1] != PADDING_ID]
            for number, row in enumerate(drawn):
                caption = self._vector(_words(row))
                rewards[image, number] = np.mean([_similarity(caption, one) for one in vectors])
        return rewards

    def _reference(self, row: Tokens) -> Vector:
        key = row.tobytes()
        if key not in self._references:
            self._references[key] = self._vector(_words(row))
        return self._references[key]

    def _vector(self, words: list[int]) -> Vector:
        weights = [
            {
                ngram: count * (self.log_images - math.log(max(1, self.frequency[ngram])))
                for ngram, count in counts.items()
            }
            for counts in _ngrams(words)
        ]
        norms = [math.sqrt(sum(weight**2 for weight in one.values())) for one in weights]
        return weights, norms, len(words)


def _words(row: Tokens) -> list[int]:
    """Return the ids of a row between START and padding."""
    return [word for word in row[1:].tolist() if word != PADDING_ID]


def _ngrams(words: list[int]) -> list[Counter[tuple[int, ...]]]:
    return [Counter(ngrams(words, n)) for n in range(1, LONGEST_NGRAM + 1)]


def _similarity(caption: Vector, reference: Vector) -> float:
    weights, norms, length = caption
    others, other_norms, other_length = reference
    total = 0.0
    for weight_of, other_of, norm, other_norm in zip(
        weights, others, norms, other_norms, strict=True
    ):
        if norm and other_norm:
            common = weight_of.keys() & other_of.keys()
            product = sum(
                min(weight_of[ngram], other_of[ngram]) * other_of[ngram] for ngram in common
            )
            total += product / (norm * other_norm)
    # coco-caption counts pairs of words; the difference of lengths is the same.
    return 10 * total / LONGEST_NGRAM * math.exp(-((length - other_length) ** 2) / (2 * SIGMA**2))


def draw_function(decoder: CaptionDecoder, samples: int) -> Any:
    """Return a compiled function that samples captions.

    Its arguments are features `float32[B, G, D]`, random numbers `float32[B * S, T]` in [0, 1) and
    `int32[B]`, the start ids of each image's captions. It returns words `int32[B * S, T]`, lengths
    `int32[B * S]`, and `bool[B * S]`, whether END follows.
    """

    @tf.function(jit_compile=True, autograph=False)
    def write(image: Any, uniforms: Any, starts: Any) -> Any:
        rows, length = uniforms.shape
        image, starts = tf.nest.map_structure(
            lambda tensor: tf.repeat(tensor, samples, axis=0), (image, starts)
        )
        generation = Generation(
            step=decoder.step,
            max_length=length,
            grid_cells=decoder.config.grid_cells,
            logit_filter=logit_filter(0, REPEATED_NGRAM),
            choose=sampler(1.0, None, 1.0),
        )
        cache = decoder.empty_cache(rows, 1, length)
        return decode(generation, cache, image, uniforms, tf.ones(rows, tf.bool), starts)

    @tf.function(autograph=False)
    def draw(features: Any, uniforms: Any, starts: Any) -> tuple[Any, Any, Any]:
        decoded = write(decoder.keys_values(features, training=True), uniforms, starts)
        return decoded.tokens, decoded.lengths, decoded.finished

    return draw


def draw_starts(captions: Tokens, rng: np.random.Generator) -> Tokens:
    """Return `int32[B]`: the start id of a random caption per image of `int32[B, C, T + 1]`."""
    count = (captions[:, :, 1] != PADDING_ID).sum(axis=1)  # padding rows come last
    return captions[np.arange(len(captions)), rng.integers(count), 0]


def of_style(captions: Tokens, starts: Tokens) -> Tokens:
    """Return `captions` without those of other styles, if `starts`, `int32[B]`, is a style's id."""
    kept = (captions[:, :, 0] == starts[:, None]) | (starts == START_ID)[:, None]
    return np.where(kept[:, :, None], captions, PADDING_ID)


def as_captions(
    starts: Tokens, words: Tokens, lengths: Tokens, finished: npt.NDArray[np.bool_]
) -> Tokens:
    """Return `int32[N, T + 1]`: the start id, words, END if it was reached, padding."""
    captions = np.concatenate([starts[:, None], words], axis=1)
    captions[np.flatnonzero(finished), 1 + lengths[finished]] = END_ID
    return captions


def advantages(rewards: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return `float32[B, S]`: each reward minus the mean of the others of its image."""
    samples = rewards.shape[1]
    return (rewards - rewards.mean(axis=1, keepdims=True)) * samples / (samples - 1)


def policy_loss(decoder: CaptionDecoder) -> Any:
    """Return the loss whose gradient is the negative gradient of the expected reward.

    Returns:
        a function of features `float32[B, G, D]`, captions `int32[B * S, T + 1]` and advantages
        `float32[B * S]` to `float32[]`, the mean over the words of all replicas.
    """

    def loss(features: Any, captions: Any, gains: Any) -> Any:
        inputs, labels = captions[:, :-1], captions[:, 1:]
        logits = decoder(inputs, decoder.keys_values(features, training=True), training=True)
        log_probs = tf.gather(tf.nn.log_softmax(logits), labels, batch_dims=2)
        counted = tf.cast(labels != PADDING_ID, tf.float32)
        everywhere = summed_over_replicas(tf.reduce_sum(counted))
        return -tf.reduce_sum(log_probs * counted * gains[:, None]) / everywhere

    return loss
