"""Quantises a model's backbone to int8, for CPUs. Without TensorFlow."""

import logging
import sys
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

from batchcap.errors import InputError, ModelError, UsageError
from batchcap.model.config import ENCODER_FILE, fingerprint
from batchcap.model.directory import read_model_directory
from batchcap.model.encoder import INT8, Encoder, Graphs, read_graphs, write_graphs
from batchcap.model.runtime import import_openvino
from batchcap.photos.images import LoadSettings, load_image
from batchcap.photos.listing import list_images
from batchcap.rows.parquet import saying_where
from batchcap.schema import Rejection
from batchcap.settings import Precision, QuantiseSettings

CALIBRATION_PHOTOS = 512
FLOAT_CONVOLUTIONS = 2  # the first ones: 3 % slower than int8, half as many other captions
CONVOLUTIONS = ("Convolution", "GroupConvolution")

log = logging.getLogger(__name__)


def can_quantise() -> bool:
    """Return whether NNCF is installed."""
    return find_spec("nncf") is not None


def quantise_model(settings: QuantiseSettings) -> Path:
    """Add an int8 backbone to a model directory; return its path.

    Raises:
        UsageError: NNCF is not installed.
        ModelError: the model directory is wrong, or has no `encoder.npz`.
        InputError: no photo can be read.
        OutputError: the directory is not writable.
    """
    if not can_quantise():
        raise UsageError("quantising needs NNCF: pip install 'batchcap[train]'")
    path = settings.model
    with saying_where(path):
        quantise_backbone(path, [ref.path for ref in list_images(str(settings.images))])
    return path


def quantise_backbone(directory: Path, photos: Sequence[Path | str]) -> Encoder:
    """Add an int8 backbone, calibrated on 512 of these photos, to `encoder.npz`; return it.

    The method is NNCF's post-training quantisation: symmetric weights, asymmetric activations,
    biases corrected for the error of each layer (Nagel et al. 2019, section 4.2).

    Raises:
        ModelError: the model directory is wrong, or has no `encoder.npz`.
        InputError: no photo can be read.
    """
    path, config, _, weights = read_model_directory(directory)
    graphs = read_graphs(path, fingerprint(path))
    if graphs is None:
        raise ModelError(f"{path} has no {ENCODER_FILE}: train the model again")
    readable = _readable(_spread(photos), config.backbone.image_size)
    pixels = list(islice(readable, CALIBRATION_PHOTOS))
    if not pixels:
        raise InputError(f"none of {len(photos)} photos can be read: int8 needs some")
    log.info("quantising the backbone on %d photos", len(pixels))
    graphs |= _quantised(Encoder(graphs, weights, config, Precision.FLOAT32).model.clone(), pixels)
    write_graphs(path / ENCODER_FILE, fingerprint(path), graphs)
    return Encoder(graphs, weights, config, Precision.INT8)


def _spread(photos: Sequence[Path | str]) -> Iterable[Path | str]:
    """Return the photos so that any number of the first come from all over the list."""
    step = max(len(photos) // CALIBRATION_PHOTOS, 1)
    return chain.from_iterable(photos[start::step] for start in range(step))


def _readable(photos: Iterable[Path | str], size: int) -> Iterable[npt.NDArray[np.uint8]]:
    for photo in photos:
        pixels = load_image(photo, LoadSettings(size)).pixels
        if not isinstance(pixels, Rejection):
            yield np.asarray(pixels)[np.newaxis]


def _quantised(model: Any, pixels: list[npt.NDArray[np.uint8]]) -> Graphs:
    openvino, nncf = import_openvino(), _import_nncf()
    offline = import_module("openvino._offline_transformations")
    # NNCF corrects the biases of convolutions: batch norm must become one first.
    offline.apply_moc_transformations(model, cf=True)
    convolutions = [
        node.get_friendly_name()
        for node in model.get_ordered_ops()
        if node.get_type_name() in CONVOLUTIONS
    ]
    with redirect_stdout(None):  # progress bars
        int8 = nncf.quantize(
            model,
            nncf.Dataset(pixels),
            subset_size=len(pixels),
            preset=nncf.QuantizationPreset.MIXED,
            fast_bias_correction=False,
            target_device=nncf.TargetDevice.CPU,
            ignored_scope=nncf.IgnoredScope(names=convolutions[:FLOAT_CONVOLUTIONS]),
        )
    with TemporaryDirectory() as name:
        folder = Path(name)
        openvino.save_model(int8, folder / "int8.xml", compress_to_fp16=False)
        return {
            INT8: np.fromfile(folder / "int8.xml", np.uint8),
            f"{INT8}_constants": np.fromfile(folder / "int8.bin", np.uint8),
        }


def _import_nncf() -> Any:
    """Import `nncf` without its telemetry, and without its advice."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    nncf = import_module("nncf")
    nncf.set_log_level(logging.ERROR)
    return nncf
