"""Scores of a captioner on held-out photos, during training."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from batchcap.evaluation.metrics import score_captions
from batchcap.model.tensorflow_captioner import TensorFlowCaptioner
from batchcap.model.vocabulary import join_words, segment
from batchcap.process.wording import printable
from batchcap.settings import DecodeSettings
from batchcap.training.data import Example, token_table, trim
from batchcap.training.loss import loss_function

BATCH = 50

# (start, stop) -> features `float32[n, G, D]` of this range of validation photos
Features = Callable[[int, int], Any]
SAMPLE_TEMPERATURES = (0.0, 0.5, 1.0)


class Validator:
    """Loss, accuracy and caption metrics on held-out photos, and sample captions.

    `examples` are of the data sets `names`, one set after the other.
    """

    def __init__(
        self,
        captioner: TensorFlowCaptioner,
        examples: Sequence[Example],
        features: Features,
        names: Sequence[str] = ("",),
    ) -> None:
        self.captioner, self.examples, self.features = captioner, examples, features
        self.names = names
        limit = captioner.config.decoder.max_length
        self.tokens = token_table(examples, captioner.vocabulary, limit)
        self.references = [example.captions for example in examples]
        loss = loss_function(captioner.decoder, label_smoothing=0.0)
        self._loss = tf.function(loss, reduce_retracing=True, autograph=False)

    def results(self) -> dict[str, float]:
        """Return `val_loss`, `val_accuracy` and metrics (times 100) of greedy captions.

        With several data sets, these are means over the sets; each set's results follow as
        `NAME_cider_d`.
        """
        numbers = [example.data_set for example in self.examples]
        ends = [0, *(bisect_right(numbers, number) for number in range(len(self.names)))]
        by_set = [self._results(*bounds) for bounds in pairwise(ends)]
        means = {key: float(np.mean([one[key] for one in by_set])) for key in by_set[0]}
        if len(by_set) == 1:
            return means
        return means | {
            f"{name}_{key}": value
            for name, results in zip(self.names, by_set, strict=True)
            for key, value in results.items()
        }

    def _results(self, first: int, end: int) -> dict[str, float]:
        """Return the results of a range of photos."""
        sums = np.zeros(3)
        hypotheses: list[list[str]] = []
        for start in range(first, end, BATCH):
            features = self._features(start, end)
            tokens = self.tokens[start : min(start + BATCH, end)]
            rows = len(tokens)
            tokens = np.pad(trim(tokens), ((0, BATCH - rows), (0, 0), (0, 0)))
            sums += np.array(self._loss(features, tokens, training=False)[1])
            hypotheses += self._captions(features, 0.0)[:rows]
        loss, correct, count = sums
        scores = score_captions(
            [segment(join_words(words)) for words in hypotheses], self.references[first:end]
        )
        return {"val_loss": loss / count, "val_accuracy": correct / count} | scores.overall

    def samples(self) -> list[str]:
        """Return captions of each data set's first validation photo, at rising temperatures."""
        numbers = [example.data_set for example in self.examples]
        return [
            f"{printable(self.examples[first].image_id)}, temperature {temperature}: "
            + " ".join(self._captions(self._features(first, first + 1), temperature)[0])
            for first in (numbers.index(number) for number in range(len(self.names)))
            for temperature in SAMPLE_TEMPERATURES
        ]

    def _features(self, start: int, end: int) -> npt.NDArray[np.float32]:
        features = np.asarray(self.features(start, min(start + BATCH, end)))
        return np.pad(features, ((0, BATCH - len(features)), (0, 0), (0, 0)))

    def _captions(self, features: npt.NDArray[np.float32], temperature: float) -> list[list[str]]:
        limit = self.captioner.config.decoder.max_length
        settings = DecodeSettings(max_length=limit, temperature=temperature)
        keys = [str(row) for row in range(len(features))]
        captions = self.captioner.caption_features(features, settings, keys)
        return [caption.words for caption in captions]
