"""Photos to a grid of features, by CNNs trained on ImageNet."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import einops
import keras
import tensorflow as tf

from batchcap.contracts import ModelError, Precision
from batchcap.model.config import BackboneConfig
from batchcap.model.efficientnet_lite import WIDTH_AND_DEPTH, build_efficientnet_lite
from batchcap.records import shown

Shape = tuple[int, int, int]
Weights = str | None


def _of_keras(application: Callable[..., keras.Model]) -> Callable[[Weights, Shape], keras.Model]:
    return lambda weights, shape: application(weights=weights, include_top=False, input_shape=shape)


def _lite(name: str) -> Callable[[Weights, Shape], keras.Model]:
    def build(weights: Weights, shape: Shape) -> keras.Model:
        if weights == "imagenet":
            raise ValueError("they are made by jobs/convert_efficientnet_lite.py")
        backbone = build_efficientnet_lite(name, shape)
        if weights is not None:
            backbone.load_weights(weights)
        return backbone

    return build


BACKBONES = {
    "mobilenet": _of_keras(keras.applications.MobileNet),
    "mobilenet-v2": _of_keras(keras.applications.MobileNetV2),
    "efficientnet-b0": _of_keras(keras.applications.EfficientNetB0),
    "efficientnet-v2-b0": _of_keras(keras.applications.EfficientNetV2B0),
    **{name: _lite(name) for name in WIDTH_AND_DEPTH},
}


def build_backbone(
    config: BackboneConfig, weights: str | Path | None, precision: Precision = Precision.FLOAT32
) -> keras.Model:
    """A CNN from `float32[B, S, S, 3]` to `[B, S/32, S/32, D]` of a precision; float32 weights.

    `weights` is "imagenet" (fetched once by Keras), the path of a Keras HDF5 weights file without
    the classification top, or None for a model whose weights are set later.

    Raises:
        ModelError: the backbone's name is unknown, or the weights are missing or of another CNN.
    """
    if config.name not in BACKBONES:
        raise ModelError(
            f"backbone {shown(config.name)} is unknown: choose from {sorted(BACKBONES)}"
        )
    if weights not in (None, "imagenet") and not Path(weights).is_file():
        raise ModelError(f"there is no backbone weights file {weights}")
    shape = (config.image_size, config.image_size, 3)
    try:
        with computing_in(precision):
            backbone = BACKBONES[config.name](None if weights is None else str(weights), shape)
    except (ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"weights {weights} do not fit the backbone {config.name}: {reason}"
        ) from error
    backbone.trainable = False
    return backbone


@contextmanager
def computing_in(precision: Precision) -> Iterator[None]:
    """Layers made meanwhile compute in a precision; their weights are float32.

    The models of keras.applications take their precision from this global setting only.
    """
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(
        "float32" if precision is Precision.FLOAT32 else f"mixed_{precision}"
    )
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def place_of(layer: str, backbone: keras.Model) -> int:
    """Where a layer stands in a backbone, from 0.

    Raises:
        ModelError: nowhere, or at its end.
    """
    names = [each.name for each in backbone.layers]
    if layer not in names[:-1]:
        raise ModelError(
            f"nothing comes after {layer!r} in the backbone {backbone.name}: choose one of its "
            f"layers, such as {', '.join(names[-46:-1:9])}"
        )
    return names.index(layer)


def train_after(layer: str, backbone: keras.Model) -> None:
    """Make the weights of the layers after this one trainable, and no others."""
    backbone.trainable = True
    for each in backbone.layers[: 1 + place_of(layer, backbone)]:
        each.trainable = False


def feature_grid(backbone: keras.Model, config: BackboneConfig, pixels: Any) -> tf.Tensor:
    """Features `float32[B, S/32, S/32, D]` of `uint8[B, S, S, 3]` RGB pixels.

    Batch normalisation is by the statistics of ImageNet, in training too.
    """
    low, high = config.input_range
    images = tf.cast(pixels, tf.float32) * ((high - low) / 255) + low
    return tf.cast(backbone(images, training=False), tf.float32)


def extract_features(backbone: keras.Model, config: BackboneConfig, pixels: Any) -> tf.Tensor:
    """Features `float32[B, G, D]`, cells in row-major order, of `uint8[B, S, S, 3]` RGB pixels."""
    return einops.rearrange(feature_grid(backbone, config, pixels), "b h w d -> b (h w) d")


def weights_digest(backbone: keras.Model) -> str:
    """SHA-256 over the names and values of the weights."""
    digest = hashlib.sha256()
    for variable in sorted(backbone.variables, key=lambda variable: variable.path):
        digest.update(variable.path.encode())
        digest.update(variable.numpy().tobytes())
    return digest.hexdigest()
