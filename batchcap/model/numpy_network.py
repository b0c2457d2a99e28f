"""The caption decoder of `network.py` in NumPy, on CPUs: the same weights, the same logits.

Shapes as there.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from batchcap.model.config import DecoderConfig
from batchcap.model.vocabulary import BANNED_IDS

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]

BANNED_LOGIT = -1e9
EPSILON = np.float32(1e-3)  # of Keras's layer normalisation


class _Dense(NamedTuple):
    kernel: Floats
    bias: Floats

    def __call__(self, x: Floats) -> Floats:
        return x @ self.kernel + self.bias


class _Norm(NamedTuple):
    gamma: Floats
    beta: Floats

    def __call__(self, x: Floats) -> Floats:
        x = x - x.mean(axis=-1, keepdims=True)
        variance = np.square(x).mean(axis=-1, keepdims=True)
        return x * (self.gamma / np.sqrt(variance + EPSILON)) + self.beta


class _Layer(NamedTuple):
    """A layer's weights, in the order of their use.

    attend: queries, keys and values of self-attention in one product. attended, looked: outputs of
    self- and cross-attention. look: queries of cross-attention. widen, narrow: feed-forward.
    """

    attend: _Dense
    attended: _Dense
    attend_norm: _Norm
    look: _Dense
    looked: _Dense
    look_norm: _Norm
    widen: _Dense
    narrow: _Dense
    feed_norm: _Norm


class NumpyDecoder:
    """Words so far and an image's features to logits of the next word. Thread-safe.

    A product runs on one thread if BLAS does.

    Args:
        weights: of `model.safetensors`, float32, by name.
        config: the sizes.
    """

    def __init__(self, weights: dict[str, npt.NDArray[Any]], config: DecoderConfig) -> None:
        self.config = config
        self._words = weights["decoder/words/embeddings"]
        self._positions = weights["decoder/positions/embeddings"]
        self._layers = [_layer(weights, f"decoder/layer_{i}") for i in range(config.layers)]
        self._feature_norm = _norm(weights, "decoder/feature_norm") if config.feature_norm else None
        self._image = _concatenated(
            _dense(weights, f"decoder/layer_{layer}/cross_attention/{part}")
            for layer in range(config.layers)
            for part in ("key", "value")
        )
        output = _dense(weights, "decoder/output")
        banned = np.zeros_like(output.bias)
        banned[list(BANNED_IDS)] = BANNED_LOGIT
        self._output = _Dense(output.kernel, output.bias + banned)

    def read_images(self, features: Floats) -> Floats:
        """Return the images' keys and values of `float32[B, G, D]`: `float32[B, G, L, 2, H, K]`."""
        config = self.config
        if self._feature_norm is not None:
            features = self._feature_norm(features)
        shape = (*features.shape[:2], config.layers, 2, config.heads, config.key_size)
        return self._image(features.reshape(-1, features.shape[-1])).reshape(shape)

    def empty_cache(self, captions: int, length: int) -> Floats:
        """Return room for self-attention's keys and values: `float32[N, L, 2, H, T, K]`."""
        config = self.config
        shape = (captions, config.layers, 2, config.heads, length, config.key_size)
        return np.zeros(shape, np.float32)

    def step(
        self, tokens: Ids, position: int, cache: Floats, image: Floats
    ) -> tuple[Floats, Floats]:
        """Read one more word of each caption.

        Args:
            tokens: `int32[N]`, one word of each.
            position: the place of these words in their captions, from 0.
            cache: `float32[N, L, 2, H, T, K]`, where the words' keys and values are added.
            image: from `read_images`; the N / B captions of an image are side by side.

        Returns:
            logits `float32[N, V]` of the next word, and cross-attention averaged over layers and
            heads `float32[N, G]`.
        """
        x = self._words[tokens] + self._positions[position]
        captions, images, heads = len(tokens), len(image), self.config.heads
        attention = np.zeros((captions, image.shape[1]), np.float32)
        for number, layer in enumerate(self._layers):
            query, key, value = np.split(_heads(layer.attend(x), 3 * heads), 3, axis=1)
            past = cache[:, number]
            past[:, 0, :, position], past[:, 1, :, position] = key, value
            mixed, _ = _attend(query[:, :, None], past[:, :, :, : position + 1])
            x = layer.attend_norm(x + layer.attended(mixed.reshape(captions, -1)))
            query = _heads(layer.look(x), heads).reshape(images, -1, heads, self.config.key_size)
            mixed, weights = _attend(
                query.swapaxes(1, 2), image[:, :, number].transpose(0, 2, 3, 1, 4)
            )
            mixed = mixed.swapaxes(1, 2).reshape(captions, -1)
            x = layer.look_norm(x + layer.looked(mixed))
            x = layer.feed_norm(x + layer.narrow(np.maximum(layer.widen(x), 0)))
            attention += weights.mean(axis=1).reshape(captions, -1)
        return self._output(x), attention / np.float32(len(self._layers))


def _attend(query: Floats, seen: Floats) -> tuple[Floats, Floats]:
    """Attend from queries `[B, H, C, K]` to keys and values `[B, 2, H, places, K]`.

    Returns the mixed values `[B, H, C, K]` and the weights `[B, H, C, places]`.
    """
    keys, values = seen[:, 0], seen[:, 1]
    scores = np.matmul(keys, query.swapaxes(2, 3)).swapaxes(2, 3)
    scores *= np.float32(query.shape[-1] ** -0.5)
    weights = softmax(scores)
    return np.matmul(weights, values), weights


def softmax(logits: Floats) -> Floats:
    """Return the probabilities along the last axis."""
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights


def _heads(x: Floats, heads: int) -> Floats:
    return x.reshape(len(x), heads, -1)


def _layer(weights: dict[str, npt.NDArray[Any]], name: str) -> _Layer:
    parts = ("query", "key", "value")
    return _Layer(
        attend=_concatenated(_dense(weights, f"{name}/self_attention/{part}") for part in parts),
        attended=_dense(weights, f"{name}/self_attention/project"),
        attend_norm=_norm(weights, f"{name}/self_attention_norm"),
        look=_dense(weights, f"{name}/cross_attention/query"),
        looked=_dense(weights, f"{name}/cross_attention/project"),
        look_norm=_norm(weights, f"{name}/cross_attention_norm"),
        widen=_dense(weights, f"{name}/widen"),
        narrow=_dense(weights, f"{name}/narrow"),
        feed_norm=_norm(weights, f"{name}/feed_forward_norm"),
    )


def _concatenated(layers: Iterable[_Dense]) -> _Dense:
    """Return one layer with the outputs of several side by side."""
    kernels, biases = zip(*layers, strict=True)
    return _Dense(np.concatenate(kernels, axis=1), np.concatenate(biases))


def _dense(weights: dict[str, npt.NDArray[Any]], name: str) -> _Dense:
    return _Dense(weights[f"{name}/kernel"], weights[f"{name}/bias"])


def _norm(weights: dict[str, npt.NDArray[Any]], name: str) -> _Norm:
    return _Norm(weights[f"{name}/gamma"], weights[f"{name}/beta"])
