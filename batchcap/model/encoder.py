"""The encoder by OpenVINO, on CPUs: pixels to features. Without TensorFlow.

A model directory has the graph in `encoder.npz`: arrays, no code. For directories of earlier
versions, TensorFlow exports it once, into the user's cache.
"""

import hashlib
import logging
import math
import zipfile
import zlib
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from batchcap.errors import ModelError
from batchcap.model.config import ENCODER_FILE, ModelConfig
from batchcap.model.runtime import import_openvino, openvino_core
from batchcap.model.weights import Shapes, Weights
from batchcap.process.environment import cache_folder, code_version
from batchcap.process.threads import locked_cache
from batchcap.process.wording import excerpt
from batchcap.settings import Precision
from batchcap.storage.files import replacing

# OpenVINO's XML of each precision, its constants, and the model's fingerprint, each `uint8[bytes]`.
Graphs = dict[str, npt.NDArray[np.uint8]]
INT8 = Precision.INT8.value

PHOTOS_PER_REQUEST = 2  # the activations of a few photos stay in a core's caches
EXPORTING_CODE = ("backbones", "efficientnet_lite", "encoder_export")
HINTS = {Precision.BFLOAT16: "bf16", Precision.FLOAT16: "f16"}

# What NumPy and zipfile raise for damaged files and for strange ones.
UNREADABLE = (
    *(OSError, ValueError, EOFError, KeyError, RuntimeError, MemoryError),
    *(zipfile.BadZipFile, zlib.error),
)
LARGEST_BYTES = 2**27  # of all arrays

log = logging.getLogger(__name__)


class Encoder:
    """OpenVINO's graph of an encoder, with its weights. Thread-safe.

    `model` is the graph, `digest` its SHA-256. `shapes` has names and shapes of the weights that it
    took: none for int8, whose graph has its own.

    Args:
        graphs: of the model.
        weights: those that are inputs of the graph, and others.
        config: the size of photos.
        precision: of the computation.
    """

    def __init__(
        self,
        graphs: Graphs,
        weights: Weights,
        config: ModelConfig,
        precision: Precision,
    ) -> None:
        self._openvino, self._core = import_openvino(), openvino_core()
        self._size = config.backbone.image_size
        self._hints = {
            "PERFORMANCE_HINT": "THROUGHPUT",
            "INFERENCE_PRECISION_HINT": HINTS.get(precision, "f32"),
        }
        graph = INT8 if precision is Precision.INT8 else "float32"
        self.digest = _digest(graphs, graph)
        constants = self._openvino.Tensor(graphs[f"{graph}_constants"])
        self.model = self._core.read_model(graphs[graph].tobytes(), constants)
        self.shapes = self._insert(weights)
        self._compiled: Callable[[int], Any] = locked_cache(self._compile)

    def _insert(self, weights: Weights) -> Shapes:
        """Replace inputs by weights; return their names and shapes."""
        shapes: Shapes = {}
        for parameter in self.model.get_parameters():
            name = parameter.get_friendly_name()
            if name != "pixels":
                shapes[name] = tuple(parameter.shape)
                if name in weights and weights[name].shape == shapes[name]:
                    constant = self._openvino.op.Constant(weights[name])
                    parameter.output(0).replace(constant.output(0))
                    self.model.remove_parameter(parameter)
        return shapes

    def _compile(self, photos: int) -> Any:
        model = self.model.clone()
        model.reshape([photos, self._size, self._size, 3])
        return self._core.compile_model(model, "CPU", self._hints)

    def __call__(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return features `float32[B, G, D]` of `uint8[B, S, S, 3]`.

        Runs one request per core.
        """
        photos = math.gcd(len(pixels), PHOTOS_PER_REQUEST)
        model = self._compiled(photos)
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
        return features


def read_graphs(directory: Path, model: str) -> Graphs | None:
    """Return the graphs in `encoder.npz` of this model, or None if the directory has none.

    Raises:
        ModelError: the file is damaged, or was made for other weights.
    """
    graphs = _read_undamaged(directory / ENCODER_FILE)
    if graphs is not None and graphs["model"].tobytes() != model.encode():
        raise ModelError(
            f"{directory / ENCODER_FILE} belongs to another model: copy the model again"
        )
    return graphs


def int8_digest(directory: Path) -> str | None:
    """Return the SHA-256 of a directory's int8 graph, or None if it has none.

    Raises:
        ModelError: the file is damaged.
    """
    graphs = _read_undamaged(directory / ENCODER_FILE) or {}
    return _digest(graphs, INT8) if INT8 in graphs else None


def _digest(graphs: Graphs, name: str) -> str:
    digest = hashlib.sha256(graphs[name].tobytes())
    digest.update(graphs[f"{name}_constants"].tobytes())
    return digest.hexdigest()


def write_graphs(path: Path, model: str, graphs: Graphs) -> None:
    """Write `encoder.npz` for the model with this fingerprint."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        arrays = graphs | {"model": np.frombuffer(model.encode(), np.uint8)}
        np.savez_compressed(file, allow_pickle=False, **arrays)


def cached_graphs(model: str, export: Callable[[], Graphs]) -> Graphs:
    """Return the graphs of a model whose directory has none, from the cache if possible."""
    sources = [Path(__file__).with_name(f"{name}.py") for name in EXPORTING_CODE]
    made_by = code_version(*sources, "keras", "openvino")
    path = cache_folder("openvino") / f"{model[:32]}-{made_by[:16]}.npz"
    try:
        return _read(path)
    except UNREADABLE:
        log.info("exporting the encoder with TensorFlow, once: the model has no %s", ENCODER_FILE)
    graphs = export()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_graphs(path, model, graphs)
    except OSError as error:
        log.warning("cannot cache the exported encoder: %s is not writable (%s)", path, error)
    return graphs


def _read_undamaged(path: Path) -> Graphs | None:
    if not path.is_file():
        return None
    try:
        return _read(path)
    except UNREADABLE as error:
        raise ModelError(f"{path} is damaged ({excerpt(str(error))}): copy it again") from error


def _read(path: Path) -> Graphs:
    with zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > LARGEST_BYTES:
            raise ValueError("it is too large")
    with np.load(path, allow_pickle=False) as arrays:  # verifies a checksum of each
        graphs = dict(arrays)
    if any(array.dtype != np.uint8 for array in graphs.values()):
        raise ValueError("its arrays are not bytes")
    needed = ["model", "float32", "float32_constants"]
    if INT8 in graphs:
        needed.append(f"{INT8}_constants")
    return {name: graphs[name] for name in needed} | graphs
