"""The recipe that makes weights for Keras of PyTorch's, on files made here."""

import importlib.util
import pickle
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from batchcap.model.efficientnet_lite import build_efficientnet_lite

RECIPE = Path(__file__).parent.parent / "jobs" / "convert_efficientnet_lite.py"


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("convert_efficientnet_lite", RECIPE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Stored:
    """Stands for a storage in a pickle, as PyTorch has it: by a persistent id."""

    def __init__(self, kind: str, key: str) -> None:
        self.kind, self.key = kind, key


class Global:
    """Is pickled as the name of a function or class that need not exist here."""

    def __init__(self, name: str) -> None:
        self.name = name


class Tensor:
    """Is pickled as a call of `torch._utils._rebuild_tensor_v2`."""

    def __init__(self, storage: Stored, offset: int, size: tuple[int, ...], strides: Any) -> None:
        self.arguments = (storage, offset, size, strides, False, OrderedDict())


class Writer(pickle._Pickler):  # type: ignore[misc, name-defined]
    def persistent_id(self, thing: Any) -> Any:
        if isinstance(thing, Stored):
            return ("storage", Global(f"torch {thing.kind}"), thing.key, "cpu", 0, None)
        return None

    def save(self, thing: Any, save_persistent_id: bool = True) -> Any:
        if isinstance(thing, Global):
            module, name = thing.name.split()
            return self.write(b"c" + f"{module}\n{name}\n".encode())
        if isinstance(thing, Tensor):
            self.save(Global("torch._utils _rebuild_tensor_v2"))
            self.save(thing.arguments)
            return self.write(b"R")
        return super().save(thing, save_persistent_id)


def write_pth(path: Path, tensors: Any, storages: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        for value in (0x1950A86A20F9469CFC6C, 1001, {}, tensors, list(storages)):
            Writer(file, protocol=2).dump(value)
        for numbers in storages.values():
            file.write(np.int64(numbers.size).tobytes() + numbers.tobytes())


def test_tensors_are_read_with_their_strides_and_types(recipe: ModuleType, tmp_path: Path) -> None:
    floats, counts = np.arange(7, dtype="<f4"), np.array([12], "<i8")
    tensors = OrderedDict(
        plain=Tensor(Stored("FloatStorage", "a"), 1, (2, 3), (3, 1)),
        turned=Tensor(Stored("FloatStorage", "a"), 1, (3, 2), (1, 3)),
        count=Tensor(Stored("LongStorage", "b"), 0, (), ()),
    )
    write_pth(tmp_path / "w.pth", tensors, {"a": floats, "b": counts})
    read = recipe.read_tensors(tmp_path / "w.pth")
    assert read["plain"].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert read["turned"].tolist() == [[1, 4], [2, 5], [3, 6]]
    assert read["count"] == 12


def test_a_file_that_wants_to_run_something_is_refused(recipe: ModuleType, tmp_path: Path) -> None:
    write_pth(tmp_path / "w.pth", OrderedDict(a=Global("os system")), {})
    with pytest.raises(pickle.UnpicklingError, match=r"os\.system has no place"):
        recipe.read_tensors(tmp_path / "w.pth")


def test_every_weight_of_the_network_is_taken_from_one_of_pytorch_s(recipe: ModuleType) -> None:
    backbone = build_efficientnet_lite("efficientnet-lite0", (64, 64, 3))
    asked: list[str] = []

    class Shapes(dict[str, np.ndarray]):
        def __missing__(self, name: str) -> np.ndarray:
            asked.append(name)
            return shapes[len(asked) - 1]

    shapes = []
    for layer in backbone.layers:
        for weight in layer.get_weights():
            is_depthwise = "depthwise" in layer.name
            order = (2, 3, 0, 1) if is_depthwise else (3, 2, 0, 1)
            shapes.append(weight.transpose(order) if weight.ndim == 4 else weight + 1)
    recipe.set_weights(backbone, Shapes())
    assert len(asked) == len(set(asked)) == len(shapes)
    assert asked[0] == "_conv_stem.weight"
    assert asked[-1] == "_blocks.15._bn2.running_var"
