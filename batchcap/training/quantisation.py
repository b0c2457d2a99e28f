"""Quantises a model's backbone to int8, for CPUs."""

import logging
import math
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from batchcap.errors import InputError, OutputError, UsageError
from batchcap.model.config import ENCODER_FILE, ModelConfig, fingerprint
from batchcap.model.directory import read_model_directory
from batchcap.model.encoder import INT8, Encoder, Graphs, write_graphs
from batchcap.model.openvino_captioner import read_or_export
from batchcap.model.runtime import import_openvino
from batchcap.model.weights import Weights
from batchcap.photos.images import LoadSettings, Source, load_image
from batchcap.photos.listing import list_images
from batchcap.process.threads import in_new_thread
from batchcap.schema import Rejection
from batchcap.settings import Precision, QuantiseSettings

CALIBRATION_PHOTOS = 512
FLOAT_CONVOLUTIONS = 2  # the first ones; 3 % slower, and fewer captions change
CONVOLUTIONS = ("Convolution", "GroupConvolution")

log = logging.getLogger(__name__)


def can_quantise() -> bool:
    """Return whether NNCF is installed."""
    return find_spec("nncf") is not None


def quantise_model(settings: QuantiseSettings) -> Path:
    """Add an int8 backbone to a model directory; return its path.

    Raises:
        UsageError: NNCF is not installed.
        ModelError: the model directory is wrong.
        InputError: no photo can be read.
        OutputError: the model directory is not writable.
    """
    if not can_quantise():
        raise UsageError("quantising needs NNCF: pip install 'batchcap[train]'")
    path, config, _, weights = read_model_directory(settings.model)
    photos = list(list_images(str(settings.images)))
    graphs = quantised(read_or_export(path), weights, config, photos)
    try:
        write_graphs(path / ENCODER_FILE, fingerprint(path), graphs)
    except OSError as error:
        raise OutputError(
            f"cannot write into {path} ({error.strerror}): quantise a copy of the model elsewhere"
        ) from error
    return settings.model


def quantised(
    graphs: Graphs, weights: Weights, config: ModelConfig, photos: Sequence[Source]
) -> Graphs:
    """Return the graphs with an int8 backbone added, calibrated on 512 of these photos.

    The method is NNCF's post-training quantisation: symmetric weights of 7 bits, asymmetric
    activations of 8, biases corrected for the error of each layer (Nagel et al. 2019, section 4.2).

    Raises:
        InputError: no photo can be read.
    """
    readable = _readable(_spread(photos), config.backbone.image_size)
    pixels = list(islice(readable, CALIBRATION_PHOTOS))
    if not pixels:
        raise InputError(f"none of {len(photos)} photos can be read: int8 needs some")
    log.info("quantising the backbone on %d photos", len(pixels))
    model = Encoder(graphs, weights, config, Precision.FLOAT32).model
    with redirect_stdout(None):  # progress bars
        # NNCF loads and frees OpenVINO's CPU plugin: see `openvino_core`.
        return graphs | in_new_thread(lambda: _quantised(model, pixels))


def _spread(photos: Sequence[Source]) -> Iterable[Source]:
    """Return the photos so that any number of the first come from all over the list."""
    step = max(math.ceil(len(photos) / CALIBRATION_PHOTOS), 1)
    return chain.from_iterable(photos[start::step] for start in range(step))


def _readable(photos: Iterable[Source], size: int) -> Iterable[npt.NDArray[np.uint8]]:
    for photo in photos:
        pixels = load_image(photo, LoadSettings(size)).pixels
        if not isinstance(pixels, Rejection):
            yield np.asarray(pixels)[np.newaxis]


def _quantised(model: Any, pixels: list[npt.NDArray[np.uint8]]) -> Graphs:
    openvino, nncf = import_openvino(), import_nncf()
    offline = import_module("openvino._offline_transformations")
    # NNCF corrects the biases of convolutions: batch norm must become one first.
    offline.apply_moc_transformations(model, cf=True)
    convolutions = [
        node.get_friendly_name()
        for node in model.get_ordered_ops()
        if node.get_type_name() in CONVOLUTIONS
    ]
    int8 = nncf.quantize(
        model,
        nncf.Dataset(pixels),
        subset_size=len(pixels),
        preset=nncf.QuantizationPreset.MIXED,
        fast_bias_correction=False,
        target_device=nncf.TargetDevice.CPU,
        # Without VNNI, CPUs add products in 16 bits: words would depend on the kind of CPU.
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            overflow_fix=nncf.OverflowFix.ENABLE
        ),
        ignored_scope=nncf.IgnoredScope(names=convolutions[:FLOAT_CONVOLUTIONS]),
    )
    with TemporaryDirectory() as name:
        folder = Path(name)
        openvino.save_model(int8, folder / "int8.xml", compress_to_fp16=False)
        return {
            INT8: np.fromfile(folder / "int8.xml", np.uint8),
            f"{INT8}_constants": np.fromfile(folder / "int8.bin", np.uint8),
        }


def import_nncf() -> Any:
    """Import `nncf` without its telemetry, which is OpenVINO's, and without its advice."""
    import_openvino()
    nncf = import_module("nncf")
    # Not by its `set_log_level`, which changes handlers that may be others' too.
    logging.getLogger("nncf").setLevel(logging.ERROR)
    return nncf
