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

# As a share of the photo, and the longer side by the shorter one (Szegedy et al. 2015, with parts
# large enough that captions stay true of them).
LEAST_AREA = 0.5
MOST_ELONGATED = 4 / 3
MOST_CHANGE = 0.3  # of brightness, contrast and saturation
WHOLE = np.array([0, 0, 1, 1], np.float32)  # top, left, bottom, right


class View(NamedTuple):
    """A view of a photo: `crop` numbers the crops from 1; 0 is the whole photo."""

    mirrored: bool = False
    crop: int = 0

    def key(self, sha256: str) -> str:
        """Return the key of its features in the cache."""
        crop = f"-crop-{self.crop}" if self.crop else ""
        return f"{sha256}{crop}{'-mirrored' if self.mirrored else ''}"


PLAIN = View()


def training_views(flip: bool, crops: int) -> tuple[View, ...]:
    """Return the whole photo and its crops; with `flip`, also every view flipped."""
    whole = (PLAIN, View(mirrored=True)) if flip else (PLAIN,)
    return (*whole, *(View(flip and crop % 2 == 1, crop) for crop in range(1, crops + 1)))


def seen(pixels: npt.NDArray[np.uint8], view: View, sha256s: Sequence[str]) -> Any:
    """Return a view of photos `uint8[B, S, S, 3]`, as an array or tensor of the same shape.

    There may be fewer `sha256s` than photos; the others only pad the batch.
    """
    if view.crop:
        boxes = np.tile(WHOLE, (len(pixels), 1))
        boxes[: len(sha256s)] = [part_of(sha256, view.crop) for sha256 in sha256s]
        places = np.arange(len(pixels), dtype=np.int32)
        cropped = tf.image.crop_and_resize(pixels, boxes, places, pixels.shape[1:3])
        pixels = tf.cast(tf.round(cropped), tf.uint8)
    return pixels[:, :, ::-1] if view.mirrored else pixels


def augmented(
    pixels: npt.NDArray[np.uint8], mirrored: npt.NDArray[np.bool_], rng: np.random.Generator
) -> npt.NDArray[np.uint8]:
    """Return a random crop of each photo of `uint8[B, S, S, 3]`, with colour jitter; some flipped.

    Hues stay, since captions name colours.
    """
    boxes = np.array([_box(rng) for _ in pixels], np.float32)
    boxes[mirrored] = boxes[mirrored][:, [0, 3, 2, 1]]  # from right to left
    seen = tf.image.crop_and_resize(pixels, boxes, np.arange(len(pixels)), pixels.shape[1:3])
    change = rng.uniform(1 - MOST_CHANGE, 1 + MOST_CHANGE, (3, len(pixels), 1, 1, 1))
    return _jitter_colours(seen, *change.astype(np.float32)).numpy()


@tf.function(jit_compile=True, autograph=False)
def _jitter_colours(pixels: Any, brightness: Any, contrast: Any, saturation: Any) -> Any:
    """Change `float32[B, S, S, 3]` by factors `float32[B, 1, 1, 1]`; return `uint8[B, S, S, 3]`."""
    mean = tf.reduce_mean(pixels, axis=(1, 2, 3), keepdims=True)
    grey = (pixels[..., 0:1] + pixels[..., 1:2] + pixels[..., 2:3]) / 3  # XLA fuses it, not a mean
    coloured = grey + saturation * (pixels - grey)
    lit = brightness * (mean + contrast * (coloured - mean))
    return tf.cast(tf.round(tf.clip_by_value(lit, 0, 255)), tf.uint8)


def part_of(sha256: str, crop: int) -> list[float]:
    """Return top, left, bottom and right of a crop, 0 to 1, derived from the photo's SHA-256."""
    return _box(np.random.default_rng((int(sha256, 16), crop)))


def _box(rng: np.random.Generator) -> list[float]:
    """Return top, left, bottom and right of a random crop, 0 to 1."""
    area = rng.uniform(LEAST_AREA, 1)
    elongation = math.exp(rng.uniform(-1, 1) * math.log(MOST_ELONGATED) / 2)
    height = min(1.0, math.sqrt(area) * elongation)
    width = min(1.0, math.sqrt(area) / elongation)
    top, left = rng.uniform(0, 1 - height), rng.uniform(0, 1 - width)
    return [top, left, top + height, left + width]
