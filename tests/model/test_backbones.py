"""Features against keras.applications called by hand; weights that fit and weights that do not."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import pytest

from batchcap.contracts import ModelError
from batchcap.model.backbones import build_backbone, extract_features, weights_digest
from batchcap.model.config import BackboneConfig

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
    """Random layers, of which each makes what it sees a little larger, not next to nothing."""
    keras.utils.set_random_seed(1)
    backbone = build_backbone(CONFIG, None)
    for variable in backbone.variables:
        if variable.path.endswith("gamma"):
            variable.assign(np.full(variable.shape, 5))
    return backbone


@pytest.fixture(scope="module")
def pixels() -> npt.NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)


def test_features_are_those_of_keras_in_row_major_order(backbone, pixels):
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


def test_input_range_is_what_black_and_white_become(backbone, pixels):
    config = BackboneConfig("mobilenet", image_size=SIZE, input_range=(0.0, 1.0))
    expected = backbone(pixels.astype(np.float32) / 255, training=False).numpy()
    features = extract_features(backbone, config, pixels).numpy()
    np.testing.assert_allclose(features, expected.reshape(features.shape), atol=1e-4)


def test_weights_come_from_a_file(backbone, tmp_path):
    backbone.save_weights(tmp_path / "mobilenet.weights.h5")
    loaded = build_backbone(CONFIG, tmp_path / "mobilenet.weights.h5")
    assert weights_digest(loaded) == weights_digest(backbone)


def test_backbone_is_frozen(backbone):
    assert backbone.trainable_variables == []


def test_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ModelError, match=r"'telescope' is unknown.*mobilenet"):
        build_backbone(BackboneConfig("telescope"), None)


def test_missing_weights_file_is_named(tmp_path):
    missing = tmp_path / "missing.weights.h5"
    with pytest.raises(ModelError, match=str(missing)):
        build_backbone(CONFIG, missing)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Keras says much of what it misses
def test_weights_of_another_network_are_refused(tmp_path):
    narrower = tmp_path / "narrower.weights.h5"
    mobilenet(alpha=0.25).save_weights(narrower)
    with pytest.raises(ModelError, match=f"{narrower} do not fit the backbone mobilenet"):
        build_backbone(CONFIG, narrower)


@pytest.mark.parametrize("name", ["notes.txt", "notes.h5", "notes.weights.h5"])
def test_file_that_holds_no_weights_is_refused(tmp_path: Path, name):
    notes = tmp_path / name
    notes.write_text("no weights")
    with pytest.raises(ModelError, match=str(notes)):
        build_backbone(CONFIG, notes)


def test_digest_is_of_the_weights(backbone):
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
