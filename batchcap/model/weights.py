"""The weights of a model directory: read and checked without TensorFlow."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file

from batchcap.errors import ModelError
from batchcap.model.config import WEIGHTS_FILE, DecoderConfig, model_file
from batchcap.process.wording import excerpt

Weights = dict[str, npt.NDArray[Any]]
Shapes = dict[str, tuple[int, ...]]


def read_weights(directory: Path) -> Weights:
    """Return the tensors of `model.safetensors` as float32, by name.

    Raises:
        ModelError: the file is missing, damaged, or holds numbers that are not finite.
    """
    path = model_file(directory, WEIGHTS_FILE)
    try:
        weights = {name: value.astype(np.float32) for name, value in load_file(path).items()}
    except (SafetensorError, OSError, ValueError, AttributeError) as error:
        # AttributeError: numpy lacks the number type
        raise ModelError(f"{path} is damaged ({excerpt(str(error))}): copy it again") from error
    for name, value in weights.items():
        if not np.isfinite(value).all():
            raise ModelError(f"{path}: {excerpt(name)} has values that are not finite")
    return weights


def as_stored(weight: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return matrices and kernels as float16, vectors as float32: variances can be below 1e-8."""
    return weight.astype(np.float16 if weight.ndim > 1 else np.float32)


def check_sizes(config: DecoderConfig, weights: Weights, source: Path) -> None:
    """Check that the sizes in `source` are those of the weights, before a network is built.

    Raises:
        ModelError: a field and its tensor differ.
    """
    width = config.heads * config.key_size
    last_layer = f"decoder/layer_{config.layers - 1}"
    expected = {
        "vocabulary_size": (
            "decoder/words/embeddings",
            (config.vocabulary_size + len(config.styles), config.units),
        ),
        "max_length": ("decoder/positions/embeddings", (config.max_length, config.units)),
        "key_size": (f"{last_layer}/self_attention/query/kernel", (config.units, width)),
        "feature_size": (f"{last_layer}/cross_attention/key/kernel", (config.feature_size, width)),
    }
    if config.layers > len(weights):
        raise ModelError(f"{source}: decoder.layers: {config.layers}, but the weights have fewer")
    for field, (name, shape) in expected.items():
        found = weights[name].shape if name in weights else "no such tensor"
        if found != shape:
            raise ModelError(
                f"{source}: decoder.{field}: {name} must have shape {shape}, but {WEIGHTS_FILE} "
                f"has {found}"
            )


def check_weights(shapes: Shapes, weights: Weights, source: str) -> None:
    """Check that weights have the names and shapes of a network.

    Raises:
        ModelError: a name is missing or unknown or a shape differs; the text starts with `source`.
    """
    if differing := sorted(shapes.keys() ^ weights.keys()):
        fault = "lacks" if differing[0] in shapes else "has the unknown tensor"
        raise ModelError(
            f"{source} {fault} {excerpt(differing[0])} (differing names: {len(differing)})"
        )
    for name, shape in shapes.items():
        if weights[name].shape != shape:
            raise ModelError(f"{source}: {name} has shape {weights[name].shape}, the model {shape}")


def decoder_shapes(config: DecoderConfig) -> Shapes:
    """Return the shapes of the decoder's weights, by their names in `model.safetensors`."""
    units, width = config.units, config.heads * config.key_size
    shapes: Shapes = {
        "words/embeddings": (config.vocabulary_size + len(config.styles), units),
        "positions/embeddings": (config.max_length, units),
    }
    sizes = {"output": (units, config.vocabulary_size)}
    normalised = {"feature_norm": config.feature_size} if config.feature_norm else {}
    for layer in (f"layer_{number}" for number in range(config.layers)):
        for attention, seen in (
            ("self_attention", units),
            ("cross_attention", config.feature_size),
        ):
            sizes |= {
                f"{layer}/{attention}/query": (units, width),
                f"{layer}/{attention}/key": (seen, width),
                f"{layer}/{attention}/value": (seen, width),
                f"{layer}/{attention}/project": (width, units),
            }
        sizes |= {f"{layer}/widen": (units, 2 * units), f"{layer}/narrow": (2 * units, units)}
        parts = ("self_attention", "cross_attention", "feed_forward")
        normalised |= {f"{layer}/{part}_norm": units for part in parts}
    for name, size in sizes.items():
        shapes |= {f"{name}/kernel": size, f"{name}/bias": size[1:]}
    for name, channels in normalised.items():
        shapes |= {f"{name}/gamma": (channels,), f"{name}/beta": (channels,)}
    return {f"decoder/{name}": shape for name, shape in shapes.items()}
