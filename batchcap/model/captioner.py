"""A trained model: a model directory loaded, checked and run on batches of photos."""

import hashlib
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
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from batchcap.errors import ModelError
from batchcap.model.backbones import build_backbone
from batchcap.model.caption import Caption
from batchcap.model.config import (
    CONFIG_FILE,
    VOCABULARY_FILE,
    WEIGHTS_FILE,
    DecoderConfig,
    ModelConfig,
    fingerprint,
    model_file,
    read_config,
)
from batchcap.model.decoding import (
    Decoded,
    Generation,
    beam_search,
    decode,
    greedy,
    logit_filter,
    sampler,
)
from batchcap.model.extraction import (
    Extract,
    locked_cache,
    openvino_extractor,
    tensorflow_extractor,
)
from batchcap.model.network import CaptionDecoder, build_decoder
from batchcap.model.runtime import Execution
from batchcap.model.vocabulary import Vocabulary, start_ids
from batchcap.process.clock import StageClock
from batchcap.process.wording import excerpt
from batchcap.settings import DecodeSettings, Precision, Runtime

Weights = dict[str, npt.NDArray[Any]]


class Captioner:
    """Backbone, decoder and vocabulary of a model, compiled once per decode settings.

    Each batch shape is compiled once, so use one batch size and pad the last batch. Thread-safe.
    With `compiled` False, each operation runs by itself: slower, but the first caption is ready
    seconds earlier.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocabulary: Vocabulary,
        backbone: keras.Model,
        decoder: CaptionDecoder,
        extract: Extract | None = None,
        compiled: bool = True,
    ) -> None:
        self.config = config
        self.vocabulary = vocabulary
        self.backbone = backbone
        self.decoder = decoder
        self.compiled = compiled
        self.clock = StageClock()
        self.extract = extract or tensorflow_extractor(backbone, config.backbone, compiled)
        self._writers = locked_cache(self._writer)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the backbone's grid of features."""
        rows, columns = self.backbone.output_shape[1:3]
        return rows, columns

    def caption(
        self,
        pixels: npt.NDArray[np.uint8],
        settings: DecodeSettings,
        keys: list[str],
    ) -> list[Caption]:
        """Caption a batch of photos.

        Args:
            pixels: `uint8[B, S, S, 3]`, RGB; rows beyond `keys` only pad the batch.
            settings: how to decode; its `max_length` at most the model's.
            keys: a string per photo, which seeds its sampling: equal keys give equal captions.

        Raises:
            MemoryError: the device has too little for this batch.
        """
        try:
            with self.clock.stage("features"):
                features = self.extract(pixels)
            with self.clock.stage("captions"):
                return self.caption_features(features, settings, keys)
        except tf.errors.ResourceExhaustedError as error:
            raise MemoryError(f"not enough memory for {len(pixels)} photos at a time") from error

    def caption_features(
        self, features: Any, settings: DecodeSettings, keys: list[str]
    ) -> list[Caption]:
        """Caption photos, given their features `float32[B, G, D]`."""
        write = self._writers(replace(settings, seed=0))
        rows = len(features)
        row_mask = np.arange(rows) < len(keys)
        uniforms = uniform_draws(settings, keys + [""] * (rows - len(keys)))
        decoded = write(tf.constant(features), tf.constant(row_mask), tf.constant(uniforms))
        arrays = Decoded(*(tensor.numpy() for tensor in decoded))
        return [self._caption(arrays, row) for row in range(len(keys))]

    def _caption(self, decoded: Decoded, row: int) -> Caption:
        length, finished = int(decoded.lengths[row]), bool(decoded.finished[row])
        ids = decoded.tokens[row, :length]
        return Caption(
            words=self.vocabulary.decode(ids),
            ids=ids,
            log_probs=decoded.log_probs[row, : length + finished],
            finished=finished,
            attention=decoded.attention[row, :length].reshape(length, *self.grid),
        )

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


def uniform_draws(settings: DecodeSettings, keys: list[str]) -> npt.NDArray[np.float32]:
    """Return `float32[B, T]` in [0, 1): random numbers from each photo's key and the seed."""
    uniforms = np.zeros((len(keys), settings.max_length), np.float32)
    if settings.temperature > 0:
        for row, key in enumerate(keys):
            digest = hashlib.sha256(f"{settings.seed}\0{key}".encode()).digest()
            generator = np.random.default_rng(int.from_bytes(digest))
            uniforms[row] = generator.random(settings.max_length, np.float32)
    return uniforms


def load_captioner(
    directory: Path, execution: Execution | None = None, compiled: bool = True
) -> Captioner:
    """Load and check a model directory, to run as `execution` says.

    Raises:
        ModelError: a file is missing, a field is wrong, or weights do not fit.
    """
    config = read_config(directory)
    vocabulary = Vocabulary.load(model_file(directory, VOCABULARY_FILE))
    if len(vocabulary) != config.decoder.vocabulary_size:
        raise ModelError(
            f"{directory / VOCABULARY_FILE} has {len(vocabulary)} words, but {CONFIG_FILE} says "
            f"{config.decoder.vocabulary_size}: the files belong to different models"
        )
    execution = execution or Execution()
    precision = execution.precision
    weights = read_weights(directory)
    _check_sizes(config.decoder, weights, directory / CONFIG_FILE)
    backbone, decoder = _build_networks(config, precision, directory / CONFIG_FILE)
    set_weights(backbone, decoder, weights, str(directory / WEIGHTS_FILE))
    extract = None
    if execution.runtime is Runtime.OPENVINO:
        extract = openvino_extractor(backbone, config.backbone, precision, fingerprint(directory))
    return Captioner(config, vocabulary, backbone, decoder, extract, compiled)


def _check_sizes(config: DecoderConfig, weights: Weights, source: Path) -> None:
    """Check that the network is no larger than its weights, before it is built."""
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


def save_captioner(captioner: Captioner, directory: Path) -> None:
    """Write `config.json`, `vocabulary.txt` and `model.safetensors`, rounded by `as_stored`."""
    directory.mkdir(parents=True, exist_ok=True)
    config = json.dumps(asdict(captioner.config), indent=2) + "\n"
    (directory / CONFIG_FILE).write_text(config, encoding="utf-8")
    captioner.vocabulary.save(directory / VOCABULARY_FILE)
    weights = get_weights(captioner.backbone, captioner.decoder)
    stored = {name: as_stored(value) for name, value in weights.items()}
    (directory / WEIGHTS_FILE).write_bytes(save(stored))


def as_stored(weight: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return matrices and kernels as float16, vectors as float32: variances can be below 1e-8."""
    return weight.astype(np.float16 if weight.ndim > 1 else np.float32)


def round_weights(variables: Iterable[Any]) -> None:
    """Round weights to the values they will have once saved and loaded."""
    for variable in variables:
        variable.assign(as_stored(variable.numpy()).astype(np.float32))


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


def get_weights(backbone: keras.Model, decoder: CaptionDecoder) -> Weights:
    """Return all weights, by their names in `model.safetensors`."""
    return {name: variable.numpy() for name, variable in _variables(backbone, decoder).items()}


def set_weights(
    backbone: keras.Model, decoder: CaptionDecoder, weights: Weights, source: str
) -> None:
    """Assign weights to a network with the same names and shapes.

    Raises:
        ModelError: a name is missing or unknown or a shape differs; the text starts with `source`.
    """
    variables = _variables(backbone, decoder)
    if differing := sorted(variables.keys() ^ weights.keys()):
        fault = "lacks" if differing[0] in variables else "has the unknown tensor"
        raise ModelError(
            f"{source} {fault} {excerpt(differing[0])} (differing names: {len(differing)})"
        )
    for name, variable in variables.items():
        if variable.shape != weights[name].shape:
            raise ModelError(
                f"{source}: {name} has shape {weights[name].shape}, the model {variable.shape}"
            )
        variable.assign(weights[name])


def _variables(backbone: keras.Model, decoder: CaptionDecoder) -> dict[str, Any]:
    # Not `variables`, which also has dropout's seeds, under names that count up.
    named = {f"backbone/{weight.path}": weight for weight in backbone.weights}
    named |= {variable.path: variable for variable in decoder.trainable_variables}
    return dict(sorted(named.items()))
