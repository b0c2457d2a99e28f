"""The configuration of a model directory, read without TensorFlow.

The directory has `config.json`, `vocabulary.txt`, `model.safetensors` (weights only), and also
`metrics.json` and the card `README.md`, which change no caption, and `encoder.npz`, which has the
same backbone for CPUs, and perhaps one in int8. Nothing in it is code.
"""

import codecs
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    TypeAdapter,
    ValidationError,
)

from batchcap.errors import ModelError
from batchcap.process.wording import excerpt
from batchcap.settings import MAX_WORDS

CONFIG_FILE = "config.json"
VOCABULARY_FILE = "vocabulary.txt"
WEIGHTS_FILE = "model.safetensors"
METRICS_FILE = "metrics.json"
CARD_FILE = "README.md"
ENCODER_FILE = "encoder.npz"
FORMAT_VERSION: Literal[1] = 1

STRICT = ConfigDict(extra="forbid", strict=True)
STYLE_NAME = r"^[a-z0-9][a-z0-9-]{0,31}$"
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]


def _rising(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] >= bounds[1]:
        raise ValueError("the first must be below the second")
    return bounds


@dataclass(frozen=True)
class BackboneConfig:
    """The backbone and its input.

    `input_range` has the values of a black and a white pixel: (-1, 1) for MobileNet's ImageNet
    weights, (0, 1) for models of the original notebook.
    """

    __pydantic_config__ = STRICT

    name: str = "mobilenet"
    image_size: Annotated[int, Field(ge=32, le=1024)] = 224
    input_range: Annotated[tuple[FiniteFloat, FiniteFloat], AfterValidator(_rising)] = (-1.0, 1.0)


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of the decoder, and dropout in training.

    `max_length` is the maximum number of words. `dropout` applies to attention weights and the
    feed-forward output, as in the notebook; `input_dropout` to features and embedded words.
    `feature_norm` normalises each grid cell's features before attention. `styles` names the styles
    of captions.
    """

    __pydantic_config__ = STRICT

    vocabulary_size: Annotated[int, Field(ge=5, le=MAX_WORDS)]
    grid_cells: Positive
    feature_size: Positive
    max_length: Positive = 30
    units: Positive = 256
    layers: Positive = 2
    heads: Positive = 2
    key_size: Positive = 128
    dropout: Share = 0.3
    input_dropout: Share = 0.0
    feature_norm: bool = False
    styles: tuple[Annotated[str, Field(pattern=STYLE_NAME)], ...] = ()


@dataclass(frozen=True)
class ModelConfig:
    """The content of `config.json`: everything needed to build the network."""

    __pydantic_config__ = STRICT

    format_version: Literal[1]
    backbone: BackboneConfig
    decoder: DecoderConfig


def read_config(directory: Path) -> ModelConfig:
    """Read `config.json`, and check every field.

    Raises:
        ModelError: not a model directory, not JSON, or a field is missing, unknown or out of range.
    """
    path = model_file(directory, CONFIG_FILE)
    try:
        return TypeAdapter(ModelConfig).validate_json(
            path.read_bytes().removeprefix(codecs.BOM_UTF8)
        )
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ModelError(f"{path}: {excerpt(field)}: {excerpt(first['msg'])}") from error


def fingerprint(directory: Path) -> str:
    """Return the SHA-256 of the names and bytes of the files that change captions.

    The int8 backbone changes those in int8 only, and has a digest of its own.
    """
    digest = hashlib.sha256()
    for name in (CONFIG_FILE, VOCABULARY_FILE, WEIGHTS_FILE):
        content = model_file(directory, name).read_bytes()
        digest.update(f"{name} {hashlib.sha256(content).hexdigest()}\n".encode())
    return digest.hexdigest()


def model_file(directory: Path, name: str) -> Path:
    """Return the path of a file that a model directory must have.

    Raises:
        ModelError: the directory lacks it.
    """
    path = directory / name
    if not path.is_file():
        raise ModelError(f"{directory} is not a model directory: it has no {name}")
    return path
