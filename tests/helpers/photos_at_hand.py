"""Load photos from bytes, and return their pixels or errors."""

import numpy as np
import numpy.typing as npt

from batchcap.photos.images import LoadSettings, load_image
from batchcap.schema import ImageRef, LoadedImage, Rejection


def load(data: bytes, size: int = 32, name: str = "photo.jpg", **options: int) -> LoadedImage:
    """`load_image` of bytes under a name."""
    return load_image(ImageRef("", name, data=data), LoadSettings(size, **options))


def pixels_of(data: bytes, **options: int | str) -> npt.NDArray[np.uint8]:
    """The pixels of a photo that is whole."""
    image = load(data, **options)
    assert isinstance(image.pixels, np.ndarray), image.pixels
    assert image.note is None
    return image.pixels


def error_of(data: bytes, **options: int | str) -> str:
    """The error type of a rejected photo; `ok` for any other."""
    pixels = load(data, **options).pixels
    return pixels.error_type.value if isinstance(pixels, Rejection) else "ok"
