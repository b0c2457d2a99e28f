"""Backbones: CNNs trained on ImageNet that turn photos into a grid of features."""

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import einops
import keras
import numpy as np
import tensorflow as tf

from batchcap.errors import ModelError
from batchcap.model.config import BackboneConfig
from batchcap.model.efficientnet_lite import WIDTH_AND_DEPTH, build_efficientnet_lite
from batchcap.process.wording import shown
from batchcap.settings import Precision

Shape = tuple[int, int, int]
Range = tuple[float, float]
Weights = str | None
Build = Callable[[Weights, Shape], keras.Model]

# Of ImageNet's red, green and blue channels, scaled to 0 to 1.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STDDEV = (0.229, 0.224, 0.225)
MOST_UNUSUAL = 0.01  # difference without a warning, as a share of the range

log = logging.getLogger(__name__)


class Backbone(NamedTuple):
    """How to build a CNN, and what its ImageNet weights expect for black and white pixels."""

    build: Build
    input_range: Range


def _of_keras(application: Callable[..., keras.Model]) -> Build:
    return lambda weights, shape: application(weights=weights, include_top=False, input_shape=shape)


def _efficientnet_b0(weights: Weights, shape: Shape) -> keras.Model:
    """EfficientNet-B0 with constants instead of Keras's variables for colour normalisation.

    Keras's normalisation layer ignores values assigned to its variables. Only for the weights
    "imagenet" does it add a layer that divides by the square root of the standard deviation
    (`keras/applications/efficientnet.py`).
    """
    original = _of_keras(keras.applications.EfficientNetB0)(weights, shape)

    def copy(layer: keras.layers.Layer) -> keras.layers.Layer:
        if isinstance(layer, keras.layers.Normalization):
            scale = [deviation**-1.5 for deviation in IMAGENET_STDDEV]
            offset = [-mean * s for mean, s in zip(IMAGENET_MEAN, scale, strict=True)]
            return keras.layers.Rescaling(scale, offset, name=layer.name)
        config = layer.get_config()
        if isinstance(layer, keras.layers.Rescaling) and isinstance(layer.scale, list):
            config["scale"] = 1.0
        return type(layer).from_config(config)

    backbone = keras.models.clone_model(original, clone_function=copy)
    values = {weight.path: weight for weight in original.weights}
    for weight in backbone.weights:
        weight.assign(values[weight.path])
    return backbone


def _lite(name: str) -> Build:
    def build(weights: Weights, shape: Shape) -> keras.Model:
        if weights == "imagenet":
            raise ValueError("Keras has none; create them with jobs/convert_efficientnet_lite.py")
        backbone = build_efficientnet_lite(name, shape)
        if weights is not None:
            backbone.load_weights(weights)
        return backbone

    return build


BACKBONES = {
    "mobilenet": Backbone(_of_keras(keras.applications.MobileNet), (-1.0, 1.0)),
    "mobilenet-v2": Backbone(_of_keras(keras.applications.MobileNetV2), (-1.0, 1.0)),
    "efficientnet-b0": Backbone(_efficientnet_b0, (0.0, 255.0)),
    "efficientnet-v2-b0": Backbone(_of_keras(keras.applications.EfficientNetV2B0), (0.0, 255.0)),
    **{name: Backbone(_lite(name), (-127 / 128, 1.0)) for name in WIDTH_AND_DEPTH},
}


def choose_input_range(name: str, asked: Range | None) -> Range:
    """Return the requested input range, or the backbone's own; warn about an unusual one.

    Raises:
        ModelError: the backbone's name is unknown.
    """
    own = _backbone(name).input_range
    low, high = asked or own
    if max(abs(low - own[0]), abs(high - own[1])) > MOST_UNUSUAL * (own[1] - own[0]):
        log.warning(
            "--input-range %g %g: the ImageNet weights of %s expect pixels from %g to %g; omit "
            "--input-range unless you use other weights",
            low,
            high,
            name,
            *own,
        )
    return low, high


def _backbone(name: str) -> Backbone:
    if name not in BACKBONES:
        raise ModelError(f"backbone {shown(name)} is unknown: choose from {sorted(BACKBONES)}")
    return BACKBONES[name]


def build_backbone(
    config: BackboneConfig, weights: str | Path | None, precision: Precision = Precision.FLOAT32
) -> keras.Model:
    """Build a CNN from `float32[B, S, S, 3]` to `[B, S/32, S/32, D]`; weights are float32.

    `weights` is "imagenet" (downloaded once by Keras), the path of a Keras HDF5 weights file
    without the classification top, or None if weights are set later.

    Raises:
        ModelError: the backbone's name is unknown, or the weights are missing, of another CNN or
            not finite.
    """
    build = _backbone(config.name).build
    if weights not in (None, "imagenet") and not Path(weights).is_file():
        raise ModelError(f"the backbone weights file {weights} does not exist")
    shape = (config.image_size, config.image_size, 3)
    try:
        with computing_in(precision):
            backbone = build(None if weights is None else str(weights), shape)
    except (ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"weights {weights} do not fit the backbone {config.name}: {reason}"
        ) from error
    for weight in backbone.weights:
        # Folded into a kernel, a NaN can leave ReLU6 as a number, and features look fine.
        if weights is not None and not np.isfinite(weight.numpy()).all():
            raise ModelError(f"weights {weights}: {weight.path} has values that are not finite")
    backbone.trainable = False
    return backbone


@contextmanager
def computing_in(precision: Precision) -> Iterator[None]:
    """Build layers that compute in a precision; their weights are float32.

    Models of keras.applications take their precision only from this global setting.
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
    """Return the index of a layer in a backbone.

    Raises:
        ModelError: the backbone has no such layer, or no layer after it.
    """
    names = [each.name for each in backbone.layers]
    if layer not in names[:-1]:
        raise ModelError(
            f"the backbone {backbone.name} has no layer after {layer!r}: choose a layer "
            f"such as {', '.join(names[-46:-1:9])}"
        )
    return names.index(layer)


def train_after(layer: str, backbone: keras.Model) -> None:
    """Make the weights of the layers after this one trainable, and no others."""
    backbone.trainable = True
    for each in backbone.layers[: 1 + place_of(layer, backbone)]:
        each.trainable = False


def feature_grid(backbone: keras.Model, config: BackboneConfig, pixels: Any) -> tf.Tensor:
    """Return features `float32[B, S/32, S/32, D]` of `uint8[B, S, S, 3]` RGB pixels.

    Batch normalisation uses ImageNet's statistics, even in training.
    """
    low, high = config.input_range
    images = tf.cast(pixels, tf.float32) * ((high - low) / 255) + low
    return tf.cast(backbone(images, training=False), tf.float32)


def extract_features(backbone: keras.Model, config: BackboneConfig, pixels: Any) -> tf.Tensor:
    """Return features `float32[B, G, D]`, cells row by row, of `uint8[B, S, S, 3]` RGB pixels."""
    return einops.rearrange(feature_grid(backbone, config, pixels), "b h w d -> b (h w) d")


def weights_digest(backbone: keras.Model) -> str:
    """Return the SHA-256 of the weights' names and values."""
    digest = hashlib.sha256()
    for weight in sorted(backbone.weights, key=lambda weight: weight.path):
        digest.update(weight.path.encode())
        digest.update(weight.numpy().tobytes())
    return digest.hexdigest()
