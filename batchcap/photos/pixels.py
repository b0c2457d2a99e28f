"""Pictures of any kind as 8-bit RGB: depths, colour spaces, transparency."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT

WHITE_IS_ZERO = 0  # photometric interpretation of a TIFF


def is_invisible(image: Image.Image) -> bool:
    """Whether a picture is fully transparent."""
    if not image.has_transparency_data:
        return False
    _, most_opaque = _as_rgba(image).getchannel("A").getextrema()
    return most_opaque == 0


def match_transparent_colour(
    image: Image.Image, bit_depth: int, low_bytes: Callable[[], Image.Image]
) -> None:
    """Convert a PNG's transparent colour from its bit depth to the 8 bits of the decoded pixels.

    `low_bytes` decodes the low bytes of 16-bit RGB samples, to tell colours with equal high bytes
    apart.
    """
    colour = image.info.get("transparency")
    if image.mode == "L" and isinstance(colour, int):
        image.info["transparency"] = _eight_bit_sample(colour, bit_depth)
    elif image.mode == "RGB" and isinstance(colour, tuple):
        high = tuple(_eight_bit_sample(c, bit_depth) for c in colour)
        image.info["transparency"] = high
        if bit_depth == 16 and (matches := _is_colour(image, high)).any():
            matches &= _is_colour(low_bytes(), tuple(c & 0xFF for c in colour))
            del image.info["transparency"]
            image.putalpha(Image.fromarray(np.where(matches, 0, 255).astype(np.uint8)))


def _is_colour(image: Image.Image, colour: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    is_equal: npt.NDArray[np.bool_] = (np.asarray(image) == colour).all(axis=-1)
    return is_equal


def with_white_around(image: Image.Image, frame: tuple[int, int, int, int]) -> Image.Image:
    """Make the area outside the drawn frame white, as browsers do.

    Pillow leaves the palette's first colour or black there, unless the picture has transparency.
    """
    if frame == (0, 0, *image.size) or image.has_transparency_data:
        return image
    white = Image.new("RGB", image.size, "white")
    white.paste(image.crop(frame).convert("RGB"), frame[:2])
    return white


def _eight_bit_sample(sample: int, bit_depth: int) -> int:
    return sample >> 8 if bit_depth == 16 else sample * 255 // (2**bit_depth - 1)


def small_rgb(image: Image.Image, resize: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Return a resized 8-bit RGB picture, with transparency composited on white."""
    if image.mode == "I":
        return _stretched(resize(_as_floats(image)), least_high=255)
    if image.mode == "F":
        return _stretched(resize(image), least_high=1)
    return resize(_as_rgb(image))


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = _eight_bit_grey(image)
    if image.mode == "LAB":
        return _rgb_of_lab(image)
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    rgba = _as_rgba(image)
    white = Image.new("RGB", image.size, "white")
    white.paste(rgba, mask=rgba)
    return white


def _as_rgba(image: Image.Image) -> Image.Image:
    return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")


def _eight_bit_grey(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey, which Pillow's own `convert` clips; a transparent level becomes alpha."""
    samples = np.asarray(image)
    tags = getattr(image, "tag_v2", {})  # a TIFF may have 12 bits, and 0 for white
    (bits,) = tags.get(BITSPERSAMPLE, (16,))
    eight_bits = (samples >> bits - 8).astype(np.uint8)
    if tags.get(PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO:
        eight_bits = 255 - eight_bits
    grey = Image.fromarray(eight_bits)
    transparent_level = image.info.get("transparency")
    if transparent_level is not None:
        alpha = np.where(samples == transparent_level, 0, 255).astype(np.uint8)
        grey.putalpha(Image.fromarray(alpha))
    return grey


def _as_floats(image: Image.Image) -> Image.Image:
    """Convert the 32-bit integers of a TIFF; Pillow reads unsigned ones as signed."""
    samples = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    if tags.get(BITSPERSAMPLE) == (32,) and tags.get(SAMPLEFORMAT, (1,)) == (1,):
        samples = samples.view(np.uint32)
    return Image.fromarray(samples.astype(np.float32))


def _stretched(image: Image.Image, least_high: int) -> Image.Image:
    """Scale floats between 0 and `least_high`, or their own wider limits, to 8-bit RGB."""
    samples = np.nan_to_num(np.asarray(image, np.float64), posinf=0, neginf=0)
    low, high = min(samples.min(), 0), max(samples.max(), least_high)
    grey = ((samples - low) * (255 / (high - low))).round().astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def _rgb_of_lab(image: Image.Image) -> Image.Image:
    lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")
    assert converted is not None  # not in place
    return converted
