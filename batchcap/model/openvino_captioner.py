"""A model run by OpenVINO and NumPy, on CPUs. Without TensorFlow."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from batchcap.errors import ModelError
from batchcap.model.captioner import Captioner
from batchcap.model.config import ENCODER_FILE, WEIGHTS_FILE, fingerprint
from batchcap.model.directory import read_model_directory
from batchcap.model.encoder import Encoder, Graphs, cached_graphs, read_graphs
from batchcap.model.numpy_decoding import generate
from batchcap.model.numpy_network import NumpyDecoder
from batchcap.model.runtime import start_tensorflow
from batchcap.model.vocabulary import start_ids
from batchcap.model.weights import check_weights, decoder_shapes
from batchcap.process.wording import excerpt
from batchcap.settings import DecodeSettings, Precision


def load_for_openvino(directory: Path, precision: Precision = Precision.FLOAT32) -> Captioner:
    """Load and check a model directory.

    From now on, BLAS uses one thread per call in this process: its own threads would wait for busy
    cores, and batches are decoded side by side anyway.

    Raises:
        ModelError: a file is missing, a field is wrong, or weights do not fit.
    """
    path, config, vocabulary, weights = read_model_directory(directory)
    graphs = read_or_export(path)
    try:
        encoder = Encoder(graphs, weights, config, precision)
    except RuntimeError as error:  # from OpenVINO
        file = path / ENCODER_FILE
        raise ModelError(f"{file} is damaged ({excerpt(str(error))}): copy it again") from error
    shapes = encoder.shapes | decoder_shapes(config.decoder)
    if precision is Precision.INT8:
        weights = {name: value for name, value in weights.items() if name.startswith("decoder/")}
    check_weights(shapes, weights, str(path / WEIGHTS_FILE))
    threadpool_limits(1, user_api="blas")
    decoder = NumpyDecoder(weights, config.decoder)
    starts = start_ids(config.decoder.vocabulary_size, config.decoder.styles)

    def write(features: Any, settings: DecodeSettings, uniforms: npt.NDArray[np.float32]) -> Any:
        start = starts[settings.style]
        return generate(decoder, features[: len(uniforms)], settings, uniforms, start)

    return Captioner(config, vocabulary, encoder, write)


def read_or_export(directory: Path) -> Graphs:
    """Return the graphs of a model directory; TensorFlow exports what earlier versions left out.

    Raises:
        ModelError: a file is missing or damaged, or belongs to another model.
    """
    model = fingerprint(directory)
    return read_graphs(directory, model) or cached_graphs(model, partial(_export, directory))


def _export(directory: Path) -> Graphs:
    start_tensorflow()
    from batchcap.model.encoder_export import export_encoder
    from batchcap.model.tensorflow_captioner import load_for_tensorflow

    return export_encoder(load_for_tensorflow(directory))
