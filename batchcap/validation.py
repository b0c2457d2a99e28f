"""How good a captioner is on held-out photos, while it is trained."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from batchcap.evaluation.metrics import score_captions
from batchcap.model.captioner import Captioner
from batchcap.model.config import DecodeSettings
from batchcap.model.loss import loss_function
from batchcap.model.text import join_words, segment
from batchcap.records import printable
from batchcap.training_data import Example, token_table, trim

BATCH = 50

# Features `float32[n, G, D]` of the validation photos from one number to another.
Features = Callable[[int, int], Any]
SAMPLE_TEMPERATURES = (0.0, 0.5, 1.0)


class Judge:
    """Validation: loss, accuracy and caption metrics on held-out photos, and sample captions."""

    def __init__(
        self, captioner: Captioner, examples: Sequence[Example], features: Features
    ) -> None:
        self.captioner, self.examples, self.features = captioner, examples, features
        limit = captioner.config.decoder.max_length
        self.tokens = token_table(examples, captioner.vocabulary, limit)
        self.references = [example.captions for example in examples]
        loss = loss_function(captioner.decoder, label_smoothing=0.0)
        self._loss = tf.function(loss, reduce_retracing=True, autograph=False)

    def results(self) -> dict[str, float]:
        """`val_loss`, `val_accuracy` of known captions, and metrics (times 100) of greedy ones."""
        sums = np.zeros(3)
        hypotheses: list[list[str]] = []
        for start in range(0, len(self.examples), BATCH):
            features = self._features(start)
            tokens = self.tokens[start : start + BATCH]
            rows = len(tokens)
            tokens = np.pad(trim(tokens), ((0, BATCH - rows), (0, 0), (0, 0)))
            sums += np.array(self._loss(features, tokens, training=False)[1])
            hypotheses += self._captions(features, 0.0)[:rows]
        loss, correct, count = sums
        scores = score_captions(
            [segment(join_words(words)) for words in hypotheses], self.references
        )
        return {"val_loss": loss / count, "val_accuracy": correct / count} | scores.overall

    def samples(self) -> list[str]:
        """Captions of the first validation photo, at rising temperatures."""
        features = self._features(0)
        return [
            f"{printable(self.examples[0].image_id)}, temperature {temperature}: "
            + " ".join(self._captions(features, temperature)[0])
            for temperature in SAMPLE_TEMPERATURES
        ]

    def _features(self, start: int) -> npt.NDArray[np.float32]:
        features = np.asarray(self.features(start, min(start + BATCH, len(self.examples))))
        return np.pad(features, ((0, BATCH - len(features)), (0, 0), (0, 0)))

    def _captions(self, features: npt.NDArray[np.float32], temperature: float) -> list[list[str]]:
        limit = self.captioner.config.decoder.max_length
        settings = DecodeSettings(max_length=limit, temperature=temperature)
        live = np.ones(len(features), np.bool_)
        keys = [str(row) for row in range(len(features))]
        decoded = self.captioner.caption_features(features, live, settings, keys)
        rows = zip(decoded.tokens, decoded.lengths, strict=True)
        return [self.captioner.vocabulary.decode(ids[:length]) for ids, length in rows]
