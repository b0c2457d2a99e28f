"""Features against keras.applications called by hand; weights that fit or do not."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import pytest
from helpers.places import PHOTOS
from keras.src.applications import efficientnet

from batchcap.errors import ModelError
from batchcap.model.backbones import (
    BACKBONES,
    IMAGENET_MEAN,
    IMAGENET_STDDEV,
    build_backbone,
    choose_input_range,
    extract_features,
    weights_digest,
)
from batchcap.model.config import BackboneConfig
from batchcap.photos.images import LoadSettings, load_image

SIZE = 96
CELLS = SIZE // 32
CONFIG = BackboneConfig("mobilenet", image_size=SIZE)


def mobilenet(**options: Any) -> keras.Model:
    shape = (SIZE, SIZE, 3)
    return keras.applications.MobileNet(
        weights=None, include_top=False, input_shape=shape, **options
    )


@pytest.fixture(scope="module")
def backbone() -> keras.Model:
    """Random layers that amplify their input a little, so that features are not nearly 0."""
    keras.utils.set_random_seed(1)
    backbone = build_backbone(CONFIG, None)
    for variable in backbone.variables:
        if variable.path.endswith("gamma"):
            variable.assign(np.full(variable.shape, 5))
    return backbone


@pytest.fixture(scope="module")
def pixels() -> npt.NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)


def test_features_equal_those_of_keras_in_row_major_order(backbone, pixels):
    by_hand = mobilenet()
    by_hand.set_weights(backbone.get_weights())
    grid = by_hand(pixels.astype(np.float32) / 127.5 - 1, training=False).numpy()
    features = extract_features(backbone, CONFIG, pixels).numpy()
    assert features.shape == (2, CELLS * CELLS, 1024)
    for row in range(CELLS):
        for column in range(CELLS):
            cell = features[:, CELLS * row + column]
            np.testing.assert_allclose(cell, grid[:, row, column], atol=1e-4)
    assert len(np.unique(features[0].round(2), axis=0)) == CELLS * CELLS


def test_input_range_sets_the_values_of_black_and_white(backbone, pixels):
    config = BackboneConfig("mobilenet", image_size=SIZE, input_range=(0.0, 1.0))
    expected = backbone(pixels.astype(np.float32) / 255, training=False).numpy()
    features = extract_features(backbone, config, pixels).numpy()
    np.testing.assert_allclose(features, expected.reshape(features.shape), atol=1e-4)


def first_convolution_sees(name: str, input_range: tuple[float, float]) -> npt.NDArray[Any]:
    """Return real photos as the backbone's first convolution sees them."""
    settings = LoadSettings(SIZE)
    photos = [load_image(path, settings).pixels for path in sorted(PHOTOS.glob("*.jpg"))]
    config = BackboneConfig(name, SIZE, input_range)
    backbone = build_backbone(config, None)
    first = next(each for each in backbone.layers if isinstance(each, keras.layers.Conv2D))
    before = keras.Model(backbone.inputs, first.input)
    return extract_features(before, config, np.stack(photos)).numpy()


@pytest.mark.parametrize("name", sorted(BACKBONES.keys() - {"small"}))
def test_photos_have_a_spread_of_about_1_at_the_first_convolution(name):
    """With one range for all backbones, EfficientNet saw photos almost without contrast."""
    seen = first_convolution_sees(name, choose_input_range(name, None))
    assert 0.4 < seen.std() < 3
    assert np.abs(seen.mean()) < seen.std()


def test_unusual_input_range_is_warned_about(caplog):
    assert choose_input_range("efficientnet-b0", (0.0, 255.0)) == (0, 255)
    assert choose_input_range("efficientnet-lite0", (-1.0, 1.0)) == (-1, 1)
    assert not caplog.records
    assert choose_input_range("efficientnet-b0", (-1.0, 1.0)) == (-1, 1)
    assert "weights of efficientnet-b0 expect pixels from 0 to 255" in caplog.text


def test_efficientnet_b0_equals_that_of_keras_and_its_weights_are_complete(
    pixels, tmp_path, monkeypatch
):
    """Keras normalises in two layers that assigned weights don't reach."""
    options = {"include_top": False, "input_shape": (SIZE, SIZE, 3)}
    released = keras.applications.EfficientNetB0(weights=None, **options)
    (normalise,) = (
        layer for layer in released.layers if isinstance(layer, keras.layers.Normalization)
    )
    normalise.set_weights([np.array(IMAGENET_MEAN), np.array(IMAGENET_STDDEV) ** 2, np.array(0)])
    path = tmp_path / "b0.weights.h5"
    released.save_weights(path)
    monkeypatch.setattr(efficientnet.file_utils, "get_file", lambda *_, **__: str(path))
    theirs = keras.applications.EfficientNetB0(weights="imagenet", **options)
    expected = theirs(pixels.astype(np.float32), training=False).numpy()

    config = BackboneConfig("efficientnet-b0", SIZE, (0.0, 255.0))
    ours = [build_backbone(config, weights) for weights in ("imagenet", path, None)]
    ours[2].set_weights(ours[0].get_weights())
    for backbone in ours:
        features = extract_features(backbone, config, pixels).numpy()
        np.testing.assert_allclose(
            features, expected.reshape(features.shape), rtol=1e-3, atol=1e-3 * expected.std()
        )


@pytest.mark.parametrize("name", sorted(BACKBONES.keys() - {"small"}))
def test_features_depend_on_the_weights_alone(name, pixels):
    config = BackboneConfig(name, SIZE, choose_input_range(name, None))
    backbone, other = build_backbone(config, None), build_backbone(config, None)
    assert [weight.path for weight in backbone.weights] == [w.path for w in other.weights]
    for weight, same in zip(backbone.weights, other.weights, strict=True):
        weight.assign(weight.numpy() + 0.01)
        same.assign(weight.numpy())
    assert weights_digest(backbone) == weights_digest(other)
    np.testing.assert_array_equal(
        *(extract_features(each, config, pixels).numpy() for each in (backbone, other))
    )


def test_weights_come_from_a_file(backbone, tmp_path):
    backbone.save_weights(tmp_path / "mobilenet.weights.h5")
    loaded = build_backbone(CONFIG, tmp_path / "mobilenet.weights.h5")
    assert weights_digest(loaded) == weights_digest(backbone)


def test_backbone_is_frozen(backbone):
    assert backbone.trainable_variables == []


def test_unknown_name_is_refused_and_known_ones_are_listed():
    with pytest.raises(ModelError, match=r"'telescope' is unknown.*mobilenet"):
        build_backbone(BackboneConfig("telescope"), None)


def test_missing_weights_file_is_named(tmp_path):
    missing = tmp_path / "missing.weights.h5"
    with pytest.raises(ModelError, match=str(missing)):
        build_backbone(CONFIG, missing)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Keras warns about missing weights
def test_weights_of_another_network_are_refused(tmp_path):
    narrower = tmp_path / "narrower.weights.h5"
    mobilenet(alpha=0.25).save_weights(narrower)
    with pytest.raises(ModelError, match=f"{narrower} do not fit the backbone mobilenet"):
        build_backbone(CONFIG, narrower)


@pytest.mark.parametrize("name", ["notes.txt", "notes.h5", "notes.weights.h5"])
def test_file_without_weights_is_refused(tmp_path: Path, name):
    notes = tmp_path / name
    notes.write_text("no weights")
    with pytest.raises(ModelError, match=str(notes)):
        build_backbone(CONFIG, notes)


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(backbone, tmp_path, number):
    copy = keras.models.clone_model(backbone)
    copy.set_weights(backbone.get_weights())
    kernel = copy.weights[0].numpy()
    kernel[0, 0, 0, 0] = number
    copy.weights[0].assign(kernel)
    copy.save_weights(tmp_path / "w.weights.h5")
    with pytest.raises(ModelError, match=r"w\.weights\.h5: .*kernel has values .* not finite"):
        build_backbone(CONFIG, tmp_path / "w.weights.h5")


def test_equal_weights_have_equal_digests(backbone):
    copy = mobilenet()
    assert weights_digest(copy) != weights_digest(backbone)
    copy.set_weights(backbone.get_weights())
    assert weights_digest(copy) == weights_digest(backbone)


def test_digest_changes_with_one_number():
    network = mobilenet(alpha=0.25)
    before = weights_digest(network)
    kernel = network.variables[-1]
    numbers = kernel.numpy()
    numbers.flat[0] += 1
    kernel.assign(numbers)
    assert weights_digest(network) != before
