"""Pixels to features with a frozen backbone by TensorFlow. Thread-safe."""

from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from batchcap.model.backbones import extract_features
from batchcap.model.captioner import Extract
from batchcap.model.config import BackboneConfig
from batchcap.process.threads import locked_cache

# On CPUs, the activations of a few photos stay in the caches. TensorFlow spreads a call over all
# cores: 8 photos take a gigabyte less than 64 and are as fast.
PHOTOS_PER_CALL = 8


def tensorflow_extractor(
    backbone: keras.Model, config: BackboneConfig, compiled: bool = True
) -> Extract:
    """Return an extractor of features `float32[B, G, D]`.

    Its weights are constants, so that TensorFlow folds batch norm into kernels.

    A GPU gets the whole batch at once, CPUs a few photos. With `compiled` False, each layer runs by
    itself.
    """
    if not compiled:
        return partial(extract_features, backbone, config)
    on_gpu = bool(tf.config.list_physical_devices("GPU"))

    @locked_cache
    def frozen(batch: int) -> Callable[[Any], Any]:
        traced = tf.function(
            partial(extract_features, backbone, config), autograph=False
        ).get_concrete_function(
            tf.TensorSpec((batch, config.image_size, config.image_size, 3), tf.uint8)
        )
        return convert_variables_to_constants_v2(traced)

    def extract(pixels: npt.NDArray[np.uint8]) -> tf.Tensor:
        at_once = len(pixels) if on_gpu else PHOTOS_PER_CALL
        parts = [pixels[start : start + at_once] for start in range(0, len(pixels), at_once)]
        return tf.concat([frozen(len(part))(tf.constant(part))[0] for part in parts], axis=0)

    return extract
