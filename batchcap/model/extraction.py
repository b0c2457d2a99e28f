"""Pixels to features with a frozen backbone: by TensorFlow or, on CPUs, by OpenVINO.

Both give the same features and compile each batch shape once. Extractors are thread-safe.
"""

import logging
import math
import tempfile
import threading
import zipfile
from collections import deque
from collections.abc import Callable, Hashable
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from batchcap.model import backbones, efficientnet_lite
from batchcap.model.backbones import extract_features, feature_grid
from batchcap.model.config import BackboneConfig
from batchcap.model.runtime import import_openvino
from batchcap.process.environment import cache_folder, code_version
from batchcap.settings import Precision
from batchcap.storage.files import replacing

# uint8[B, S, S, 3] -> float32[B, G, D], an array or a tensor
Extract = Callable[[npt.NDArray[np.uint8]], Any]

Key = TypeVar("Key", bound=Hashable)
Built = TypeVar("Built")

# On CPUs, the activations of a few photos stay in the caches. TensorFlow spreads a call over all
# cores: 8 photos take a gigabyte less than 64 and are as fast. OpenVINO runs a request on one core.
PHOTOS_PER_CALL = 8
PHOTOS_PER_REQUEST = 2

log = logging.getLogger(__name__)


def tensorflow_extractor(
    backbone: keras.Model, config: BackboneConfig, compiled: bool = True
) -> Extract:
    """Return an extractor with constant weights, so that TensorFlow folds batch norm into kernels.

    A GPU gets the whole batch at once, CPUs a few photos. With `compiled` False, each layer runs by
    itself.
    """
    if not compiled:
        return partial(extract_features, backbone, config)
    on_gpu = bool(tf.config.list_physical_devices("GPU"))

    @locked_cache
    def frozen(batch: int) -> Callable[[Any], Any]:
        traced = tf.function(
            partial(extract_features, backbone, config), autograph=False
        ).get_concrete_function(
            tf.TensorSpec((batch, config.image_size, config.image_size, 3), tf.uint8)
        )
        return convert_variables_to_constants_v2(traced)

    def extract(pixels: npt.NDArray[np.uint8]) -> tf.Tensor:
        at_once = len(pixels) if on_gpu else PHOTOS_PER_CALL
        parts = [pixels[start : start + at_once] for start in range(0, len(pixels), at_once)]
        return tf.concat([frozen(len(part))(tf.constant(part))[0] for part in parts], axis=0)

    return extract


def openvino_extractor(
    backbone: keras.Model, config: BackboneConfig, precision: Precision, fingerprint: str
) -> Extract:
    """Return an extractor that runs OpenVINO, one request per core.

    The exported graph is cached under the model's fingerprint.
    """
    openvino = import_openvino()
    exported = _exported(backbone, config, fingerprint)
    core = openvino.Core()
    hints = {
        "PERFORMANCE_HINT": "THROUGHPUT",
        "INFERENCE_PRECISION_HINT": {Precision.BFLOAT16: "bf16", Precision.FLOAT16: "f16"}.get(
            precision, "f32"
        ),
    }

    @locked_cache
    def compiled(photos: int) -> Any:
        model = core.read_model(exported["graph"].tobytes(), openvino.Tensor(exported["weights"]))
        model.reshape([photos, config.image_size, config.image_size, 3])
        return core.compile_model(model, "CPU", hints)

    def extract(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        photos = math.gcd(len(pixels), PHOTOS_PER_REQUEST)
        model = compiled(photos)
        features = np.empty((len(pixels), *model.output(0).shape[1:]), np.float32)
        # Not AsyncInferQueue: with Python callbacks, it can deadlock at its end.
        idle = [
            model.create_infer_request()
            for _ in range(model.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
        ]
        under_way: deque[tuple[Any, int]] = deque()

        def finish_oldest() -> None:
            request, start = under_way.popleft()
            request.wait()
            features[start : start + photos] = request.get_output_tensor().data
            idle.append(request)

        for start in range(0, len(pixels), photos):
            if not idle:
                finish_oldest()
            request = idle.pop()
            request.start_async([pixels[start : start + photos]], share_inputs=True)
            under_way.append((request, start))
        while under_way:
            finish_oldest()
        return features.reshape(len(pixels), -1, features.shape[-1])

    return extract


def _exported(
    backbone: keras.Model, config: BackboneConfig, fingerprint: str
) -> dict[str, npt.NDArray[np.uint8]]:
    """Return OpenVINO's `graph` and `weights` of a backbone, from the cache if possible."""
    made_by = code_version(backbones, efficientnet_lite, "keras", "openvino")
    path = cache_folder("openvino") / f"{fingerprint[:32]}-{made_by[:16]}.npz"
    try:
        with np.load(path, allow_pickle=False) as arrays:  # verifies a checksum of each
            return dict(arrays)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        arrays = _export(backbone, config)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, graph=arrays["graph"], weights=arrays["weights"])
    except OSError as error:
        log.warning("cannot cache the exported backbone: %s is not writable (%s)", path, error)
    return arrays


def _export(backbone: keras.Model, config: BackboneConfig) -> dict[str, npt.NDArray[np.uint8]]:
    openvino = import_openvino()
    traced = tf.function(
        partial(feature_grid, backbone, config), autograph=False
    ).get_concrete_function(
        tf.TensorSpec((None, config.image_size, config.image_size, 3), tf.uint8)
    )
    frozen = convert_variables_to_constants_v2(traced).graph.as_graph_def()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "backbone.pb").write_bytes(frozen.SerializeToString())
        model = openvino.Core().read_model(folder / "backbone.pb")
        openvino.save_model(model, folder / "backbone.xml", compress_to_fp16=False)
        return {
            "graph": np.fromfile(folder / "backbone.xml", np.uint8),
            "weights": np.fromfile(folder / "backbone.bin", np.uint8),
        }


def locked_cache(build: Callable[[Key], Built]) -> Callable[[Key], Built]:
    """Cache like `functools.cache`, for slow functions called by several threads at once."""
    lock, cached = threading.Lock(), cache(build)

    def get(key: Key) -> Built:
        with lock:
            return cached(key)

    return get
