"""The training loss. Knows neither optimizers nor data sets."""

from typing import Any

import einops
import numpy as np
import tensorflow as tf

from batchcap.model.network import CaptionDecoder
from batchcap.model.vocabulary import BANNED_IDS, PADDING_ID, UNKNOWN_ID
from batchcap.training.replicas import summed_over_replicas


def loss_function(decoder: CaptionDecoder, label_smoothing: float) -> Any:
    """Return the masked cross entropy of captions given features.

    Padding and [UNK] are masked out of the loss. Label smoothing (Szegedy et al. 2016, section 7)
    is over the words that can be generated.

    Returns:
        a function of features `float32[B, G, D]` and captions `int32[B, C, T + 1]` to the mean loss
        in nats, `float32[]`, and `float32[3]`: the sum of unsmoothed losses, the number of correct
        words, the number of words. The mean is over the words of all replicas, so that
        their losses add up.
    """
    allowed = np.ones(decoder.config.vocabulary_size, np.float32)
    allowed[list(BANNED_IDS)] = 0

    def loss(features: Any, captions: Any, training: bool) -> tuple[Any, Any]:
        captions = einops.rearrange(captions, "b c t -> (b c) t")
        inputs, labels = captions[:, :-1], captions[:, 1:]
        logits = decoder(inputs, decoder.keys_values(features, training), training=training)
        log_probs = tf.nn.log_softmax(logits)
        nll = -tf.gather(log_probs, labels, batch_dims=2)
        counted = tf.cast((labels != PADDING_ID) & (labels != UNKNOWN_ID), tf.float32)
        count = tf.reduce_sum(counted)
        nll_sum = tf.reduce_sum(nll * counted)
        right = tf.cast(tf.argmax(logits, -1, tf.int32) == labels, tf.float32)
        sums = tf.stack([nll_sum, tf.reduce_sum(right * counted), count])
        everywhere = tf.maximum(summed_over_replicas(count), 1)
        mean = nll_sum / everywhere
        if label_smoothing:
            uniform = -tf.reduce_sum(log_probs * allowed, axis=-1) / allowed.sum()
            smooth = tf.reduce_sum(uniform * counted) / everywhere
            mean = (1 - label_smoothing) * mean + label_smoothing * smooth
        return mean, sums

    return loss
