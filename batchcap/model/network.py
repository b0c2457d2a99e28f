"""The caption decoder: a small post-norm transformer that reads words and attends to an image.

Shapes, here and in `decoding.py`: B images, N caption rows (N = B * C, the C captions of an image
side by side), T positions, G grid cells, D feature channels, U units, H heads, K key size, V words
in the vocabulary.

The layers are the notebook's, but attention keys and values are computed by separate calls, so that
decoding can keep those of earlier words and of the image. `feature_norm` first scales all grid
cells to one size: otherwise attention falls on the faintest cells, those of background and border,
whatever the word.
"""

from functools import partial
from typing import Any, NamedTuple

import einops
import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf
from keras import ops

from batchcap.model.config import DecoderConfig
from batchcap.model.numpy_network import BANNED_LOGIT
from batchcap.model.vocabulary import BANNED_IDS


class KeysValues(NamedTuple):
    """Keys and values of attention, each `float32[rows, H, places, K]`."""

    keys: Any
    values: Any


class Attention(keras.layers.Layer):
    """Scaled dot-product attention with several heads (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, config: DecoderConfig, seen_size: int, name: str) -> None:
        super().__init__(name=name)
        self.units, self.seen_size = config.units, seen_size
        self.heads, self.scale = config.heads, config.key_size**-0.5
        width = config.heads * config.key_size
        self.query = keras.layers.Dense(width, name="query")
        self.key = keras.layers.Dense(width, name="key")
        self.value = keras.layers.Dense(width, name="value")
        self.project = keras.layers.Dense(config.units, name="project")
        self.dropout = keras.layers.Dropout(config.dropout)

    def build(self, *_: Any) -> None:
        # By hand, since keys and values are computed outside `call`; gives weights stable paths.
        self.query.build((None, None, self.units))
        self.key.build((None, None, self.seen_size))
        self.value.build((None, None, self.seen_size))
        self.project.build((None, None, self.key.units))

    def keys_values(self, x: Any) -> KeysValues:
        """Return keys and values of `float32[rows, places, channels]`."""
        return KeysValues(self._split_heads(self.key(x)), self._split_heads(self.value(x)))

    def call(
        self, x: Any, seen: KeysValues, mask: Any = None, training: bool = False
    ) -> tuple[Any, Any]:
        """Attend from `x` to keys and values.

        Args:
            x: `float32[rows, T, U]`, the queries' input.
            seen: keys and values of the same rows.
            mask: `bool[T, places]`, True where a query may look; None for everywhere.
            training: whether dropout is on.

        Returns:
            the mixed values `float32[rows, T, U]` and the weights `float32[rows, H, T, places]`.
        """
        scores = ops.einsum("nhtk,nhsk->nhts", self._split_heads(self.query(x)), seen.keys)
        scores = ops.cast(scores, "float32") * self.scale
        if mask is not None:
            scores = ops.where(mask, scores, BANNED_LOGIT)
        weights = tf.nn.softmax(scores)
        dropped = self.dropout(ops.cast(weights, seen.values.dtype), training=training)
        mixed = ops.einsum("nhts,nhsk->nhtk", dropped, seen.values)
        return self.project(einops.rearrange(mixed, "n h t k -> n t (h k)")), weights

    def _split_heads(self, x: Any) -> Any:
        return einops.rearrange(x, "n t (h k) -> n h t k", h=self.heads)


class DecoderLayer(keras.layers.Layer):
    """Causal self-attention, cross-attention, feed-forward; normalised after each."""

    def __init__(self, config: DecoderConfig, name: str) -> None:
        super().__init__(name=name)
        self.self_attention = Attention(config, config.units, "self_attention")
        self.cross_attention = Attention(config, config.feature_size, "cross_attention")
        self.widen = keras.layers.Dense(2 * config.units, activation="relu", name="widen")
        self.narrow = keras.layers.Dense(config.units, name="narrow")
        self.dropout = keras.layers.Dropout(config.dropout)
        self.norms = [
            keras.layers.LayerNormalization(name=f"{part}_norm")
            for part in ("self_attention", "cross_attention", "feed_forward")
        ]
        self.units = config.units

    def build(self, *_: Any) -> None:
        self.self_attention.build()
        self.cross_attention.build()
        self.widen.build((None, None, self.units))
        self.narrow.build((None, None, self.widen.units))
        for norm in self.norms:
            norm.build((None, None, self.units))

    def call(
        self, x: Any, past: KeysValues, mask: Any, image: KeysValues, training: bool = False
    ) -> tuple[Any, Any]:
        """Apply one layer to `float32[N, T, U]`.

        Args:
            x: the words so far, embedded.
            past: self-attention keys and values of the rows of `x`.
            mask: `bool[T, places of past]`.
            image: cross-attention keys and values, of B images: the C rows of an image share them.
            training: whether dropout is on.

        Returns:
            `float32[N, T, U]`, and the cross-attention weights `float32[B, H, C * T, G]`.
        """
        self_norm, cross_norm, feed_norm = self.norms
        from_words, _ = self.self_attention(x, past, mask, training=training)
        x = self_norm(x + from_words)
        # An image's captions are laid end to end: one product with its keys serves them all.
        images = image.keys.shape[0] or tf.shape(image.keys)[0]
        queries = einops.rearrange(x, "(b c) t u -> b (c t) u", b=images)
        from_image, weights = self.cross_attention(queries, image, training=training)
        x = cross_norm(x + ops.reshape(from_image, ops.shape(x)))
        fed = self.dropout(self.narrow(self.widen(x)), training=training)
        return feed_norm(x + fed), weights


class CaptionDecoder(keras.layers.Layer):
    """Words so far and an image's features to logits of the next word.

    `keys_values` reads the image once; `call` reads whole captions (training), `step` one more word
    of each (decoding). Both give the same logits.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(name="decoder")
        self.config = config
        # The words, then the ids that begin captions of each style.
        self.words = keras.layers.Embedding(
            config.vocabulary_size + len(config.styles), config.units, name="words"
        )
        self.positions = keras.layers.Embedding(config.max_length, config.units, name="positions")
        norm = keras.layers.LayerNormalization if config.feature_norm else keras.layers.Identity
        self.feature_norm = norm(name="feature_norm")
        self.input_dropout = keras.layers.Dropout(config.input_dropout)
        self.layers = [DecoderLayer(config, f"layer_{i}") for i in range(config.layers)]
        self.output_logits = keras.layers.Dense(
            config.vocabulary_size, dtype="float32", name="output"
        )
        banned = np.zeros(config.vocabulary_size, np.float32)
        banned[list(BANNED_IDS)] = BANNED_LOGIT
        self.banned = banned

    def build(self, *_: Any) -> None:
        self.words.build()
        self.positions.build()
        self.feature_norm.build((None, None, self.config.feature_size))
        for layer in self.layers:
            layer.build()
        self.output_logits.build((None, None, self.config.units))

    def keys_values(self, features: Any, training: bool = False) -> list[KeysValues]:
        """Return per layer the cross-attention keys and values of features `float32[B, G, D]`."""
        features = self.input_dropout(self.feature_norm(features), training=training)
        return [layer.cross_attention.keys_values(features) for layer in self.layers]

    def call(self, tokens: Any, image: list[KeysValues], training: bool = False) -> Any:
        """Return logits `float32[N, T, V]` of the word after each of `int32[N, T]`."""
        length = ops.shape(tokens)[1]
        places = ops.arange(length)
        causal = places[:, None] >= places[None, :]
        x = self.words(tokens) + self.positions(places)
        x = self.input_dropout(x, training=training)
        for layer, keys_values in zip(self.layers, image, strict=True):
            past = layer.self_attention.keys_values(x)
            x, _ = layer(x, past, causal, keys_values, training=training)
        return self.output_logits(x) + self.banned

    def empty_cache(self, images: int, captions: int, length: int) -> list[KeysValues]:
        """Return per layer an empty self-attention cache: `[B, C, H, T, K]` with T = `length`."""
        shape = (images, captions, self.config.heads, length, self.config.key_size)
        zeros = ops.zeros(shape, self.compute_dtype)
        return [KeysValues(zeros, zeros) for _ in self.layers]

    def step(
        self, tokens: Any, position: Any, cache: list[KeysValues], image: list[KeysValues]
    ) -> tuple[Any, Any, list[KeysValues]]:
        """Read one more word of each caption.

        Args:
            tokens: `int32[B, C]`, one word of each.
            position: `int32[]`, the place of these words in their captions, from 0.
            cache: from `empty_cache` or the last step.
            image: from `keys_values`.

        Returns:
            logits `float32[B, C, V]` of the next word, cross-attention averaged over layers and
            heads `float32[B, C, G]`, and the cache with these words.
        """
        images, captions = tokens.shape
        x = self.words(ops.reshape(tokens, (-1, 1))) + self.positions(ops.reshape(position, (1, 1)))
        mask = ops.arange(cache[0].keys.shape[3])[None, :] <= position
        weights_per_layer, grown = [], []
        for layer, past, keys_values in zip(self.layers, cache, image, strict=True):
            new = layer.self_attention.keys_values(x)
            past = KeysValues(*map(partial(_place, position), past, new))
            rows = KeysValues(*(einops.rearrange(t, "b c h t k -> (b c) h t k") for t in past))
            x, weights = layer(x, rows, mask, keys_values)
            weights_per_layer.append(weights)
            grown.append(past)
        attention = einops.reduce(ops.stack(weights_per_layer), "l b h c g -> b c g", "mean")
        logits = self.output_logits(x[:, 0]) + self.banned
        return ops.reshape(logits, (images, captions, -1)), attention, grown


def build_decoder(config: DecoderConfig) -> CaptionDecoder:
    """Build a decoder with random weights."""
    decoder = CaptionDecoder(config)
    decoder.build()
    return decoder


def log_frequencies(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Return the initial output bias, `float32[V]`: the log relative frequency of each word.

    With it, an untrained model already has the loss of a unigram model. Banned words do not count;
    words that never occur start as if they occurred half a time.
    """
    weights = np.maximum(counts.astype(np.float64), 0.5)
    weights[list(BANNED_IDS)] = 0
    weights /= weights.sum()
    weights[list(BANNED_IDS)] = 1
    return np.log(weights).astype(np.float32)


def _place(position: Any, cache: Any, new: Any) -> Any:
    """Put `[B * C, H, 1, K]` into `[B, C, H, T, K]` at a position."""
    new = ops.reshape(new, (*cache.shape[:3], 1, cache.shape[4]))
    return ops.slice_update(cache, (0, 0, 0, position, 0), new)
