"""What training can raise: the phases that a training consists of."""

from collections.abc import Callable
from typing import Any, Protocol

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from batchcap.model.loss import loss_function
from batchcap.model.network import CaptionDecoder
from batchcap.self_critical import CiderD, advantages, as_captions, draw_function, policy_loss
from batchcap.settings import Decay, TrainSettings
from batchcap.training_data import Tokens, trim


class Phase(Protocol):
    """One stretch of a training, with what it raises and how.

    name: of its checkpoint.
    epochs: at most.
    """

    name: str
    epochs: int

    def learning_rate(self, steps_per_epoch: int) -> Any:
        """A rate, or a schedule of Keras."""

    def compile_step(self, optimizer: keras.Optimizer, sums: Any) -> Callable[[Any, Any], None]:
        """Make a function of features and captions of a batch that trains the decoder on them.

        It adds to `sums`, `float32[3]`.
        """

    def measured(self, sums: npt.NDArray[np.float32]) -> dict[str, float]:
        """What the sums of an epoch tell, by column of the history."""


class Likelihood:
    """Training by cross entropy."""

    name = "likelihood"

    def __init__(self, settings: TrainSettings, decoder: CaptionDecoder) -> None:
        self.settings, self.decoder = settings, decoder
        self.epochs = settings.epochs

    def learning_rate(self, steps_per_epoch: int) -> Any:
        peak, warmup = self.settings.learning_rate, self.settings.warmup_steps
        if self.settings.decay is Decay.CONSTANT and not warmup:
            return peak
        steps = self.epochs * steps_per_epoch
        return keras.optimizers.schedules.CosineDecay(
            initial_learning_rate=0.0 if warmup else peak,
            decay_steps=max(steps - warmup, 1),
            alpha=0.0 if self.settings.decay is Decay.COSINE else 1.0,
            warmup_target=peak if warmup else None,
            warmup_steps=warmup,
        )

    def compile_step(self, optimizer: keras.Optimizer, sums: Any) -> Callable[[Any, Any], None]:
        loss = loss_function(self.decoder, self.settings.label_smoothing)
        variables = self.decoder.trainable_variables

        @tf.function(reduce_retracing=True)
        def step(features: Any, captions: Any) -> None:
            with tf.GradientTape() as tape:
                mean, counted = loss(features, captions, training=True)
            optimizer.apply(tape.gradient(mean, variables), variables)
            sums.assign_add(counted)

        return step

    def measured(self, sums: npt.NDArray[np.float32]) -> dict[str, float]:
        loss, correct, count = sums
        return {"loss": loss / count, "accuracy": correct / count}


class SelfCritical:
    """Training by the CIDEr-D of drawn captions. Rewards are computed on the host."""

    name = "cider"

    def __init__(self, settings: TrainSettings, decoder: CaptionDecoder, tokens: Tokens) -> None:
        self.settings, self.decoder = settings, decoder
        self.epochs = settings.cider_epochs
        self.reward = CiderD(tokens)

    def learning_rate(self, steps_per_epoch: int) -> Any:
        return self.settings.cider_learning_rate

    def compile_step(self, optimizer: keras.Optimizer, sums: Any) -> Callable[[Any, Any], None]:
        samples, length = self.settings.cider_samples, self.decoder.config.max_length
        draw = draw_function(self.decoder, samples)
        loss = policy_loss(self.decoder)
        variables = self.decoder.trainable_variables

        @tf.function(reduce_retracing=True)
        def learn(features: Any, captions: Any, gains: Any) -> None:
            with tf.GradientTape() as tape:
                mean = loss(features, captions, gains)
            optimizer.apply(tape.gradient(mean, variables), variables)

        def step(features: Any, captions: Any) -> None:
            draws = np.random.default_rng((self.settings.seed, int(optimizer.iterations.numpy())))
            uniforms = draws.random((len(features) * samples, length), np.float32)
            words, lengths, finished = (one.numpy() for one in draw(features, uniforms))
            drawn = as_captions(words, lengths, finished)
            rewards = self.reward(drawn.reshape(-1, samples, length + 1), captions.numpy())
            learn(features, trim(drawn[:, None])[:, 0], advantages(rewards).ravel())
            sums.assign_add([rewards.sum(), finished.sum(), rewards.size])

        return step

    def measured(self, sums: npt.NDArray[np.float32]) -> dict[str, float]:
        reward, finished, count = sums
        return {"reward": 100 * reward / count, "finished": finished / count}
