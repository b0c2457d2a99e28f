"""A model that is ready to caption photos, whatever runs it. Without TensorFlow."""

import hashlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from batchcap.model.caption import Caption, Decoded
from batchcap.model.config import ModelConfig
from batchcap.model.vocabulary import Vocabulary
from batchcap.process.clock import StageClock
from batchcap.settings import DecodeSettings

# uint8[B, S, S, 3] -> features float32[B, G, D], an array or a tensor
Extract = Callable[[npt.NDArray[np.uint8]], Any]
# (features, settings, uniforms float32[N, T]) -> arrays of N rows, the first of the B
Write = Callable[[Any, DecodeSettings, npt.NDArray[np.float32]], Decoded]


class Captioner:
    """Photos to captions: features of a batch, then words. Thread-safe.

    Each batch shape is compiled once, so use one batch size and pad the last batch.
    """

    def __init__(
        self, config: ModelConfig, vocabulary: Vocabulary, extract: Extract, write: Write
    ) -> None:
        self.config = config
        self.vocabulary = vocabulary
        self.extract = extract
        self.write = write
        self.clock = StageClock()

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the grid of features; photos are squares."""
        side = math.isqrt(self.config.decoder.grid_cells)
        return side, side

    def caption(
        self,
        pixels: npt.NDArray[np.uint8],
        settings: DecodeSettings,
        keys: list[str],
    ) -> list[Caption]:
        """Caption a batch of photos.

        Args:
            pixels: `uint8[B, S, S, 3]`, RGB; rows beyond `keys` only pad the batch.
            settings: how to decode; its `max_length` at most the model's.
            keys: a string per photo, which seeds its sampling: equal keys give equal captions.

        Raises:
            MemoryError: the device has too little for this batch.
        """
        with self.clock.stage("features"):
            features = self.extract(pixels)
        with self.clock.stage("captions"):
            return self.caption_features(features, settings, keys)

    def caption_features(
        self, features: Any, settings: DecodeSettings, keys: list[str]
    ) -> list[Caption]:
        """Caption photos, given what `extract` returned."""
        decoded = self.write(features, settings, uniform_draws(settings, keys))
        return [self._caption(decoded, row) for row in range(len(keys))]

    def _caption(self, decoded: Decoded, row: int) -> Caption:
        length, finished = int(decoded.lengths[row]), bool(decoded.finished[row])
        ids = decoded.tokens[row, :length]
        return Caption(
            words=self.vocabulary.decode(ids),
            ids=ids,
            log_probs=decoded.log_probs[row, : length + finished],
            finished=finished,
            attention=decoded.attention[row, :length].reshape(length, *self.grid),
        )


def uniform_draws(settings: DecodeSettings, keys: list[str]) -> npt.NDArray[np.float32]:
    """Return `float32[N, T]` in [0, 1): random numbers from each photo's key and the seed."""
    uniforms = np.zeros((len(keys), settings.max_length), np.float32)
    if settings.temperature > 0:
        for row, key in enumerate(keys):
            digest = hashlib.sha256(f"{settings.seed}\0{key}".encode()).digest()
            generator = np.random.default_rng(int.from_bytes(digest))
            uniforms[row] = generator.random(settings.max_length, np.float32)
    return uniforms
