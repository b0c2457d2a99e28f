"""A model run by TensorFlow: on GPUs, in training, and as the reference of what runs on CPUs."""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf
from safetensors.numpy import save

from batchcap.errors import ModelError
from batchcap.model.backbones import build_backbone
from batchcap.model.caption import Caption, Decoded
from batchcap.model.captioner import Captioner, Extract
from batchcap.model.config import CONFIG_FILE, VOCABULARY_FILE, WEIGHTS_FILE, ModelConfig
from batchcap.model.decoding import (
    Generation,
    beam_search,
    decode,
    greedy,
    logit_filter,
    sampler,
)
from batchcap.model.directory import read_model_directory
from batchcap.model.extraction import tensorflow_extractor
from batchcap.model.network import CaptionDecoder, build_decoder
from batchcap.model.vocabulary import Vocabulary, start_ids
from batchcap.model.weights import Weights, as_stored, check_weights
from batchcap.process.threads import locked_cache
from batchcap.settings import DecodeSettings, Precision


class TensorFlowCaptioner(Captioner):
    """Backbone and decoder as Keras models, compiled once per decode settings.

    With `compiled` False, each operation runs by itself: slower, but the first caption is ready
    seconds earlier.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocabulary: Vocabulary,
        backbone: keras.Model,
        decoder: CaptionDecoder,
        compiled: bool = True,
    ) -> None:
        self.backbone = backbone
        self.decoder = decoder
        self.compiled = compiled
        self._writers = locked_cache(self._writer)
        extract: Extract = tensorflow_extractor(backbone, config.backbone, compiled)
        super().__init__(config, vocabulary, extract, self._write)

    def caption(
        self, pixels: npt.NDArray[np.uint8], settings: DecodeSettings, keys: list[str]
    ) -> list[Caption]:
        """Caption a batch of photos, as `Captioner.caption` does."""
        try:
            return super().caption(pixels, settings, keys)
        except tf.errors.ResourceExhaustedError as error:
            raise MemoryError(f"not enough memory for {len(pixels)} photos at a time") from error

    def _write(
        self, features: Any, settings: DecodeSettings, uniforms: npt.NDArray[np.float32]
    ) -> Decoded:
        write, rows = self._writers(replace(settings, seed=0)), len(features)
        row_mask = np.arange(rows) < len(uniforms)
        padded = np.pad(uniforms, [(0, rows - len(uniforms)), (0, 0)])
        decoded = write(tf.constant(features), tf.constant(row_mask), tf.constant(padded))
        return Decoded(*(tensor.numpy() for tensor in decoded))

    def _writer(self, settings: DecodeSettings) -> Callable[..., Decoded]:
        decoder, config = self.decoder, self.config.decoder
        draws = settings.temperature > 0
        generation = Generation(
            step=decoder.step,
            max_length=settings.max_length,
            grid_cells=config.grid_cells,
            logit_filter=logit_filter(settings.min_length, settings.no_repeat_ngram),
            choose=sampler(settings.temperature, settings.top_k, settings.top_p)
            if draws
            else greedy,
            beam_size=settings.beam_size,
            length_penalty=settings.length_penalty,
        )
        start = start_ids(config.vocabulary_size, config.styles)[settings.style]

        def write(image: Any, row_mask: Any, uniforms: Any) -> Decoded:
            beams = generation.beam_size
            cache = decoder.empty_cache(row_mask.shape[0], beams, generation.max_length)
            if beams > 1:
                return beam_search(generation, cache, image, row_mask, start)
            return decode(generation, cache, image, uniforms, row_mask, start)

        def run(write: Callable[..., Decoded], features: Any, *rest: Any) -> Decoded:
            return write(decoder.keys_values(features), *rest)

        if not self.compiled:
            return partial(run, write)
        # By XLA: a step is a hundred small operations, which take longer to start than to run.
        # Convolutions and large products stay outside: XLA is slow at them on CPUs.
        compiled = tf.function(write, jit_compile=True, autograph=False)
        return tf.function(partial(run, compiled), autograph=False)


def load_for_tensorflow(
    directory: Path, precision: Precision = Precision.FLOAT32, compiled: bool = True
) -> TensorFlowCaptioner:
    """Load and check a model directory.

    Raises:
        ModelError: a file is missing, a field is wrong, or weights do not fit.
    """
    path, config, vocabulary, weights = read_model_directory(directory)
    backbone, decoder = _build_networks(config, precision, path / CONFIG_FILE)
    set_weights(backbone, decoder, weights, str(path / WEIGHTS_FILE))
    return TensorFlowCaptioner(config, vocabulary, backbone, decoder, compiled)


def _build_networks(
    config: ModelConfig, precision: Precision, source: Path
) -> tuple[keras.Model, CaptionDecoder]:
    try:
        backbone = build_backbone(config.backbone, None, precision)
    except ModelError as error:
        raise ModelError(f"{source}: backbone.name: {error}") from error
    rows, columns = backbone.output_shape[1:3]
    if config.decoder.grid_cells != rows * columns:
        raise ModelError(
            f"{source}: decoder.grid_cells: {config.decoder.grid_cells}, but the backbone "
            f"gives {rows * columns}"
        )
    return backbone, build_decoder(config.decoder)


def save_captioner(captioner: TensorFlowCaptioner, directory: Path) -> None:
    """Write `config.json`, `vocabulary.txt` and `model.safetensors`, rounded by `as_stored`."""
    directory.mkdir(parents=True, exist_ok=True)
    config = json.dumps(asdict(captioner.config), indent=2) + "\n"
    (directory / CONFIG_FILE).write_text(config, encoding="utf-8")
    captioner.vocabulary.save(directory / VOCABULARY_FILE)
    weights = get_weights(captioner.backbone, captioner.decoder)
    stored = {name: as_stored(value) for name, value in weights.items()}
    (directory / WEIGHTS_FILE).write_bytes(save(stored))


def round_weights(variables: Iterable[Any]) -> None:
    """Round weights to the values they will have once saved and loaded."""
    for variable in variables:
        variable.assign(as_stored(variable.numpy()).astype(np.float32))


def get_weights(backbone: keras.Model, decoder: CaptionDecoder) -> Weights:
    """Return all weights, by their names in `model.safetensors`."""
    return {name: variable.numpy() for name, variable in variables(backbone, decoder).items()}


def set_weights(
    backbone: keras.Model, decoder: CaptionDecoder, weights: Weights, source: str
) -> None:
    """Assign weights to a network with the same names and shapes.

    Raises:
        ModelError: a name is missing or unknown or a shape differs; the text starts with `source`.
    """
    named = variables(backbone, decoder)
    shapes = {name: tuple(variable.shape) for name, variable in named.items()}
    check_weights(shapes, weights, source)
    for name, variable in named.items():
        variable.assign(weights[name])


def variables(backbone: keras.Model, decoder: CaptionDecoder) -> dict[str, Any]:
    """Return all variables with weights, by their names in `model.safetensors`."""
    # Not `variables`, which also has dropout's seeds, under names that count up.
    named = {f"backbone/{weight.path}": weight for weight in backbone.weights}
    named |= {variable.path: variable for variable in decoder.trainable_variables}
    return dict(sorted(named.items()))
