"""Augmentation: crops, flips and colour jitter.

With a frozen backbone, a photo has the same few crops in every training, so that its features can
be cached. When the backbone is trained, crops and colours are random in each epoch.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tensorflow as tf

# Area as a share of the photo; longer side / shorter side. As in Szegedy et al. 2015, but large
# enough that captions stay true.
LEAST_AREA = 0.5
MOST_ELONGATED = 4 / 3
MOST_CHANGE = 0.3  # of brightness, contrast and saturation
WHOLE = np.array([0, 0, 1, 1], np.float32)  # top, left, bottom, right


class View(NamedTuple):
    """A crop of a photo, maybe mirrored; `crop` counts from 1, 0 is the whole photo."""

    mirrored: bool = False
    crop: int = 0

    def key(self, sha256: str) -> str:
        """Return the key of its features in the cache."""
        crop = f"-crop-{self.crop}" if self.crop else ""
        return f"{sha256}{crop}{'-mirrored' if self.mirrored else ''}"


PLAIN = View()


def training_views(flip: bool, crops: int) -> tuple[View, ...]:
    """Return the whole photo and its crops; `flip` adds its mirror image and flips odd crops."""
    whole = (PLAIN, View(mirrored=True)) if flip else (PLAIN,)
    return (*whole, *(View(flip and crop % 2 == 1, crop) for crop in range(1, crops + 1)))


def seen(pixels: npt.NDArray[np.uint8], view: View, sha256s: Sequence[str]) -> Any:
    """Return a view of photos `uint8[B, S, S, 3]`, as an array or tensor of the same shape.

    Photos beyond `sha256s` only pad the batch.
    """
    if view.crop:
        boxes = np.tile(WHOLE, (len(pixels), 1))
        boxes[: len(sha256s)] = [crop_box(sha256, view.crop) for sha256 in sha256s]
        places = np.arange(len(pixels), dtype=np.int32)
        cropped = tf.image.crop_and_resize(pixels, boxes, places, pixels.shape[1:3])
        pixels = tf.cast(tf.round(cropped), tf.uint8)
    return pixels[:, :, ::-1] if view.mirrored else pixels


def augmented(
    pixels: npt.NDArray[np.uint8], mirrored: npt.NDArray[np.bool_], rng: np.random.Generator
) -> npt.NDArray[np.uint8]:
    """Return a random crop of each photo of `uint8[B, S, S, 3]`, with colour jitter; some flipped.

    Hues are kept, since captions name colours.
    """
    boxes = np.array([_random_box(rng) for _ in pixels], np.float32)
    boxes[mirrored] = boxes[mirrored][:, [0, 3, 2, 1]]  # left and right swapped: flipped
    crops = tf.image.crop_and_resize(pixels, boxes, np.arange(len(pixels)), pixels.shape[1:3])
    change = rng.uniform(1 - MOST_CHANGE, 1 + MOST_CHANGE, (3, len(pixels), 1, 1, 1))
    return _jitter_colours(crops, *change.astype(np.float32)).numpy()


@tf.function(jit_compile=True, autograph=False)
def _jitter_colours(pixels: Any, brightness: Any, contrast: Any, saturation: Any) -> Any:
    """Change `float32[B, S, S, 3]` by factors `float32[B, 1, 1, 1]`; return `uint8[B, S, S, 3]`."""
    mean = tf.reduce_mean(pixels, axis=(1, 2, 3), keepdims=True)
    grey = (pixels[..., 0:1] + pixels[..., 1:2] + pixels[..., 2:3]) / 3  # XLA does not fuse a mean
    coloured = grey + saturation * (pixels - grey)
    jittered = brightness * (mean + contrast * (coloured - mean))
    return tf.cast(tf.round(tf.clip_by_value(jittered, 0, 255)), tf.uint8)


def crop_box(sha256: str, crop: int) -> list[float]:
    """Return top, left, bottom and right of a crop, 0 to 1, derived from the photo's SHA-256."""
    return _random_box(np.random.default_rng((int(sha256, 16), crop)))


def _random_box(rng: np.random.Generator) -> list[float]:
    """Return top, left, bottom and right of a random crop, 0 to 1."""
    area = rng.uniform(LEAST_AREA, 1)
    elongation = math.exp(rng.uniform(-1, 1) * math.log(MOST_ELONGATED) / 2)
    height = min(1.0, math.sqrt(area) * elongation)
    width = min(1.0, math.sqrt(area) / elongation)
    top, left = rng.uniform(0, 1 - height), rng.uniform(0, 1 - width)
    return [top, left, top + height, left + width]
