"""EfficientNet-Lite (Google 2020): EfficientNet without operations slow on CPUs or in integers.

MobileNet v2's inverted bottlenecks in EfficientNet's proportions (Tan and Le 2019), without
squeeze-and-excitation, with ReLU6 instead of swish. The stem's channels and the depth of the first
and last stages are not scaled. Pixels are in [-127/128, 1]. The last stage's output is the grid of
features; the 1x1 convolution to 1,280 channels and the classifier are omitted.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras

STEM_CHANNELS = 32
DIVISOR = 8  # of numbers of channels
EPSILON = 1e-3  # of the batch normalisation


class Stage(NamedTuple):
    """Consecutive blocks; the first has the stride, and changes the number of channels."""

    blocks: int
    kernel_size: int
    stride: int
    expansion: int
    channels: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)
# Factors for the numbers of channels and of blocks.
WIDTH_AND_DEPTH = {
    "efficientnet-lite0": (1.0, 1.0),
    "efficientnet-lite1": (1.0, 1.1),
    "efficientnet-lite2": (1.1, 1.2),
}


def build_efficientnet_lite(name: str, input_shape: tuple[int, int, int]) -> keras.Model:
    """Build a network from `float32[B, S, S, 3]` to `[B, ceil(S / 32), ceil(S / 32), D]`.

    Args:
        name: a key of `WIDTH_AND_DEPTH`.
        input_shape: (S, S, 3).
    """
    images = keras.Input(input_shape)
    x = _normalised(keras.layers.Conv2D, STEM_CHANNELS, 3, "stem", images, strides=2)
    x = keras.layers.ReLU(6.0, name="stem_relu")(x)
    for number, stage in enumerate(_blocks(*WIDTH_AND_DEPTH[name])):
        x = _block(x, stage, f"block_{number}")
    return keras.Model(images, x, name=name)


def _blocks(width: float, depth: float) -> Iterator[Stage]:
    """Yield the scaled stages, split into blocks."""
    for number, stage in enumerate(STAGES):
        is_fixed = number in (0, len(STAGES) - 1)
        scaled = stage._replace(blocks=1, channels=_rounded(stage.channels * width))
        for block in range(stage.blocks if is_fixed else math.ceil(stage.blocks * depth)):
            yield scaled if block == 0 else scaled._replace(stride=1)


def _rounded(channels: float) -> int:
    """Round to a multiple of `DIVISOR`, down by at most a tenth."""
    rounded = max(DIVISOR, int(channels + DIVISOR / 2) // DIVISOR * DIVISOR)
    return rounded + DIVISOR if rounded < 0.9 * channels else rounded


def _block(x: Any, block: Stage, name: str) -> Any:
    """Expand, convolve each channel, project; add the input if the shape is the same."""
    given, channels = x, x.shape[-1]
    if block.expansion != 1:
        x = _normalised(keras.layers.Conv2D, block.expansion * channels, 1, f"{name}_expand", x)
        x = keras.layers.ReLU(6.0, name=f"{name}_expand_relu")(x)
    x = _normalised(
        keras.layers.DepthwiseConv2D,
        None,
        block.kernel_size,
        f"{name}_depthwise",
        x,
        strides=block.stride,
    )
    x = keras.layers.ReLU(6.0, name=f"{name}_depthwise_relu")(x)
    x = _normalised(keras.layers.Conv2D, block.channels, 1, f"{name}_project", x)
    if block.stride == 1 and block.channels == channels:
        x = keras.layers.Add(name=f"{name}_add")([x, given])
    return x


def _normalised(
    layer: Any, channels: int | None, kernel_size: int, name: str, x: Any, strides: int = 1
) -> Any:
    """Apply a convolution without a bias, then batch normalisation."""
    filters = () if channels is None else (channels,)
    convolution = layer(
        *filters, kernel_size, strides=strides, padding="same", use_bias=False, name=name
    )
    norm = keras.layers.BatchNormalization(epsilon=EPSILON, name=f"{name}_norm")
    return norm(convolution(x))
