import keras
import numpy as np
import pytest

from batchcap.errors import ModelError
from batchcap.model.backbones import build_backbone
from batchcap.model.config import BackboneConfig
from batchcap.model.efficientnet_lite import build_efficientnet_lite

RANGE = (-127 / 128, 1.0)
# Side, weights, and multiply-adds in millions, without the last convolution and the classifier.
SIZES = {
    "efficientnet-lite0": (224, 2_998_304, 363.8),
    "efficientnet-lite1": (240, 3_774_624, 572.7),
    "efficientnet-lite2": (260, 4_413_488, 822.0),
}


# From Google's table, with the last convolution and the classifier.
PUBLISHED_MILLIONS = {
    "efficientnet-lite0": 4.652,
    "efficientnet-lite1": 5.417,
    "efficientnet-lite2": 6.092,
}
HEAD_CHANNELS, CLASSES = 1280, 1000


def multiply_adds(network: keras.Model) -> int:
    total = 0
    for layer in network.layers:
        if isinstance(layer, keras.layers.Conv2D | keras.layers.DepthwiseConv2D):
            height, width, channels = layer.output.shape[1:]
            per_output = np.prod(layer.kernel.shape[:2])
            if not isinstance(layer, keras.layers.DepthwiseConv2D):
                per_output *= layer.kernel.shape[2]
            total += height * width * channels * int(per_output)
    return total


@pytest.mark.parametrize("name", SIZES)
def test_sizes_equal_those_of_the_published_networks(name: str) -> None:
    side, weights, millions = SIZES[name]
    network = build_efficientnet_lite(name, (side, side, 3))
    assert network.count_params() == weights
    trainable = sum(variable.numpy().size for variable in network.trainable_variables)
    head = HEAD_CHANNELS * (network.output_shape[-1] + 2) + (HEAD_CHANNELS + 1) * CLASSES
    assert (trainable + head) / 1e6 == pytest.approx(PUBLISHED_MILLIONS[name], abs=5e-3)
    assert multiply_adds(network) / 1e6 == pytest.approx(millions, abs=0.05)
    assert network.output_shape[1:3] == (-(-side // 32), -(-side // 32))


def test_weights_come_from_a_file(tmp_path) -> None:
    config = BackboneConfig("efficientnet-lite0", 64, RANGE)
    one = build_backbone(config, None)
    path = tmp_path / "lite.weights.h5"
    one.save_weights(path)
    other = build_backbone(config, path)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 64, 64, 3)).astype(np.float32)
    assert np.array_equal(one(images), other(images))
    assert not other.trainable


def test_weights_of_another_network_are_refused(tmp_path) -> None:
    path = tmp_path / "lite.weights.h5"
    build_efficientnet_lite("efficientnet-lite0", (64, 64, 3)).save_weights(path)
    with pytest.raises(ModelError, match="do not fit the backbone efficientnet-lite2"):
        build_backbone(BackboneConfig("efficientnet-lite2", 64, RANGE), path)


def test_error_says_how_to_get_imagenet_weights() -> None:
    with pytest.raises(ModelError, match=r"jobs/convert_efficientnet_lite\.py"):
        build_backbone(BackboneConfig("efficientnet-lite2", 64, RANGE), "imagenet")
