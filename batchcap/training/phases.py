"""Training phases: likelihood, fine-tuning, self-critical."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from batchcap.model.backbones import extract_features
from batchcap.model.config import BackboneConfig
from batchcap.model.network import CaptionDecoder
from batchcap.settings import Decay, TrainSettings
from batchcap.training.data import Tokens, trim
from batchcap.training.loss import loss_function
from batchcap.training.replicas import joined, replica_batch
from batchcap.training.self_critical import (
    CiderD,
    advantages,
    as_captions,
    draw_function,
    draw_starts,
    of_style,
    policy_loss,
)

log = logging.getLogger(__name__)

# Trains on a batch: features or pixels, captions, data sets. Adds to the sums of an epoch,
# `float32[3]`.
Step = Callable[[Any, Any, Any], None]


class Phase(Protocol):
    """A training phase.

    name: also its checkpoint's. epochs: the maximum. variables: the weights that it trains.
    """

    name: str
    epochs: int
    decoder: CaptionDecoder
    variables: Sequence[Any]

    def learning_rate(self, steps_per_epoch: int) -> Any:
        """Return a rate, or a Keras schedule."""

    def compile_step(self, strategy: Any, optimizer: keras.Optimizer, sums: Any) -> Step:
        """Return a function that trains on a batch, each replica on its part."""

    def measured(self, sums: npt.NDArray[np.float32]) -> dict[str, float]:
        """Return an epoch's results from its sums, by history column."""


class Likelihood:
    """Trains the decoder by cross entropy."""

    name = "likelihood"

    def __init__(self, settings: TrainSettings, decoder: CaptionDecoder) -> None:
        self.settings, self.decoder = settings, decoder
        self.epochs = settings.epochs
        self.variables: Sequence[Any] = decoder.trainable_variables

    def learning_rate(self, steps_per_epoch: int) -> Any:
        peak, warmup = self.settings.learning_rate, self.settings.warmup_steps
        if self.settings.decay is Decay.CONSTANT and not warmup:
            return peak
        lowest = 0.0 if self.settings.decay is Decay.COSINE else 1.0
        steps = self.epochs * steps_per_epoch
        if warmup >= steps:
            log.warning(
                "--warmup-steps %d: training has %d steps, so the rate stays below %g; lower it",
                warmup,
                steps,
                peak,
            )
        return _warm_cosine(peak, warmup, steps, lowest)

    def features(self, seen: Any) -> Any:
        """Return features `float32[B, G, D]` of a batch, which holds them already."""
        return seen

    def compile_step(self, strategy: Any, optimizer: keras.Optimizer, sums: Any) -> Step:
        loss = loss_function(self.decoder, self.settings.label_smoothing)

        def learn(seen: Any, captions: Any) -> None:
            def replica_loss() -> tuple[Any, Any]:
                features = self.features(replica_batch(seen))
                return loss(features, replica_batch(captions), training=True)

            sums.assign_add(_descend(optimizer, self.variables, replica_loss))

        @tf.function(reduce_retracing=True, autograph=False)
        def step(seen: Any, captions: Any, data_sets: Any) -> None:
            strategy.run(learn, (seen, captions))

        return step

    def measured(self, sums: npt.NDArray[np.float32]) -> dict[str, float]:
        loss, correct, count = sums
        return {"loss": loss / count, "accuracy": correct / count}


class FineTuning(Likelihood):
    """Trains the backbone's trainable weights too, on pixels."""

    name = "fine-tuning"

    def __init__(
        self,
        settings: TrainSettings,
        decoder: CaptionDecoder,
        backbone: keras.Model,
        config: BackboneConfig,
    ) -> None:
        super().__init__(settings, decoder)
        self.backbone, self.config = backbone, config
        self.epochs = settings.fine_tune_epochs
        self.variables = [*decoder.trainable_variables, *backbone.trainable_variables]

    def learning_rate(self, steps_per_epoch: int) -> Any:
        # Without a warm-up, Adam's first steps are large enough to undo what was learned.
        total = self.epochs * steps_per_epoch
        return _warm_cosine(self.settings.fine_tune_learning_rate, total // 20, total, 0.0)

    def features(self, seen: Any) -> Any:
        return extract_features(self.backbone, self.config, seen)


class SelfCritical:
    """Trains the decoder by the CIDEr-D of sampled captions. Rewards are computed on the host."""

    name = "cider"

    def __init__(
        self,
        settings: TrainSettings,
        decoder: CaptionDecoder,
        tokens: Tokens,
        data_sets: npt.NDArray[np.int32],
    ) -> None:
        self.settings, self.decoder = settings, decoder
        self.epochs = settings.cider_epochs
        self.variables = decoder.trainable_variables
        self.rewards = [CiderD(tokens[data_sets == one]) for one in range(1 + data_sets.max())]

    def learning_rate(self, steps_per_epoch: int) -> Any:
        return self.settings.cider_learning_rate

    def compile_step(self, strategy: Any, optimizer: keras.Optimizer, sums: Any) -> Step:
        samples, length = self.settings.cider_samples, self.decoder.config.max_length
        draw_part = draw_function(self.decoder, samples)
        loss = policy_loss(self.decoder)

        @tf.function(autograph=False)
        def draw(*given: Any) -> Any:
            return strategy.run(lambda *parts: draw_part(*map(replica_batch, parts)), given)

        def learn_part(*given: Any) -> None:
            _descend(optimizer, self.variables, lambda: (loss(*map(replica_batch, given)), None))

        @tf.function(reduce_retracing=True, autograph=False)
        def learn(*given: Any) -> None:
            strategy.run(learn_part, given)

        def step(features: Any, captions: Any, data_sets: Any) -> None:
            rng = np.random.default_rng((self.settings.seed, int(optimizer.iterations.numpy())))
            uniforms = rng.random((len(features) * samples, length), np.float32)
            references = captions.numpy()
            starts = draw_starts(references, rng)
            drawn = draw(features, tf.constant(uniforms), tf.constant(starts))
            words, lengths, finished = (joined(strategy, one).numpy() for one in drawn)
            drawn = as_captions(np.repeat(starts, samples), words, lengths, finished)
            rewards = self._rewards(
                drawn.reshape(-1, samples, length + 1),
                of_style(references, starts),
                data_sets.numpy(),
            )
            gains = advantages(rewards).ravel()
            learn(features, tf.constant(trim(drawn[:, None])[:, 0]), tf.constant(gains))
            sums.assign(sums + tf.constant([rewards.sum(), finished.sum(), rewards.size]))

        return step

    def _rewards(
        self, drawn: Tokens, references: Tokens, data_sets: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.float32]:
        """Return rewards by `CiderD`, with the document frequencies of each image's data set."""
        rewards = np.zeros(drawn.shape[:2], np.float32)
        for number, reward in enumerate(self.rewards):
            images = data_sets == number
            rewards[images] = reward(drawn[images], references[images])
        return rewards

    def measured(self, sums: npt.NDArray[np.float32]) -> dict[str, float]:
        reward, finished, count = sums
        return {"reward": 100 * reward / count, "finished": finished / count}


def _descend(
    optimizer: keras.Optimizer, variables: Sequence[Any], loss: Callable[[], tuple[Any, Any]]
) -> Any:
    """Take one step along the gradient of these variables; return the loss's second value."""
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch([variable.value for variable in variables])
        mean, extra = loss()
    gradients = tape.gradient(mean, [variable.value for variable in variables])
    # Dense, since Adam squares the summands of a sparse gradient (of embeddings), not the sum.
    optimizer.apply([tf.convert_to_tensor(gradient) for gradient in gradients], variables)
    return extra


def _warm_cosine(peak: float, warmup_steps: int, steps: int, lowest: float) -> Any:
    """Return a schedule: linear warm-up to a peak, then cosine decay to `lowest` times the peak."""
    return keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0 if warmup_steps else peak,
        decay_steps=max(steps - warmup_steps, 1),
        alpha=lowest,
        warmup_target=peak if warmup_steps else None,
        warmup_steps=warmup_steps,
    )
