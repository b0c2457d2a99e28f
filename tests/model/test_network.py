"""The decoder with random weights: two ways to read a caption, one result."""

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tensorflow as tf

from batchcap.model.config import DecoderConfig
from batchcap.model.network import (
    CaptionDecoder,
    KeysValues,
    build_decoder,
    log_frequencies,
)
from batchcap.model.vocabulary import BANNED_IDS

IMAGES, CELLS, CHANNELS, WORDS, LONGEST = 3, 6, 5, 11, 7
SEEN_CELL = 2
CONFIG = DecoderConfig(
    vocabulary_size=WORDS,
    grid_cells=CELLS,
    feature_size=CHANNELS,
    max_length=LONGEST,
    units=8,
    layers=2,
    heads=2,
    key_size=3,
)
WEIGHT_NAMES_OF_ONE_LAYER = """
    decoder/words/embeddings
    decoder/positions/embeddings
    decoder/layer_0/self_attention/query/kernel
    decoder/layer_0/self_attention/query/bias
    decoder/layer_0/self_attention/key/kernel
    decoder/layer_0/self_attention/key/bias
    decoder/layer_0/self_attention/value/kernel
    decoder/layer_0/self_attention/value/bias
    decoder/layer_0/self_attention/project/kernel
    decoder/layer_0/self_attention/project/bias
    decoder/layer_0/cross_attention/query/kernel
    decoder/layer_0/cross_attention/query/bias
    decoder/layer_0/cross_attention/key/kernel
    decoder/layer_0/cross_attention/key/bias
    decoder/layer_0/cross_attention/value/kernel
    decoder/layer_0/cross_attention/value/bias
    decoder/layer_0/cross_attention/project/kernel
    decoder/layer_0/cross_attention/project/bias
    decoder/layer_0/widen/kernel
    decoder/layer_0/widen/bias
    decoder/layer_0/narrow/kernel
    decoder/layer_0/narrow/bias
    decoder/layer_0/self_attention_norm/gamma
    decoder/layer_0/self_attention_norm/beta
    decoder/layer_0/cross_attention_norm/gamma
    decoder/layer_0/cross_attention_norm/beta
    decoder/layer_0/feed_forward_norm/gamma
    decoder/layer_0/feed_forward_norm/beta
    decoder/output/kernel
    decoder/output/bias
"""


@pytest.fixture(scope="module")
def decoder() -> CaptionDecoder:
    """Every weight is random, biases too, so that none can be omitted unnoticed."""
    decoder, rng = build_decoder(CONFIG), np.random.default_rng(1)
    for variable in decoder.trainable_variables:
        variable.assign(rng.normal(size=variable.shape))
    return decoder


@pytest.fixture(scope="module")
def features() -> npt.NDArray[np.float32]:
    return np.random.default_rng(2).normal(size=(IMAGES, CELLS, CHANNELS)).astype(np.float32)


def random_tokens(rows: int, length: int) -> npt.NDArray[np.int32]:
    return np.random.default_rng(3).integers(0, WORDS, (rows, length), dtype=np.int32)


def whole_logits(decoder: CaptionDecoder, tokens: Any, features: Any) -> npt.NDArray[np.float32]:
    return decoder(tokens, decoder.keys_values(features)).numpy()


def stepped(decoder: CaptionDecoder, tokens: Any, features: Any) -> tuple[Any, Any]:
    """Return logits `[B, T, V]` and attention `[B, T, G]`, reading word by word into a cache."""
    image, cache = decoder.keys_values(features), decoder.empty_cache(len(tokens), 1, LONGEST)
    logits, attention = [], []
    for position in range(tokens.shape[1]):
        step_logits, step_attention, cache = decoder.step(
            tokens[:, [position]], position, cache, image
        )
        logits.append(step_logits[:, 0])
        attention.append(step_attention[:, 0])
    return np.stack(logits, axis=1), np.stack(attention, axis=1)


@pytest.mark.parametrize("length", [1, 2, 5, LONGEST])
def test_steps_give_the_logits_of_whole_captions(decoder, features, length):
    tokens = random_tokens(IMAGES, length)
    logits, _ = stepped(decoder, tokens, features)
    np.testing.assert_allclose(logits, whole_logits(decoder, tokens, features), rtol=1e-4)


def test_steps_of_several_captions_of_an_image_equal_those_of_each(decoder, features):
    captions = 4
    tokens = random_tokens(IMAGES * captions, LONGEST).reshape(IMAGES, captions, LONGEST)
    image = decoder.keys_values(features)
    cache = decoder.empty_cache(IMAGES, captions, LONGEST)
    for position in range(LONGEST):
        logits, attention, cache = decoder.step(tokens[:, :, position], position, cache, image)
    for caption in range(captions):
        logits_alone, attention_alone = stepped(decoder, tokens[:, caption], features)
        np.testing.assert_allclose(logits[:, caption], logits_alone[:, -1], rtol=1e-4)
        np.testing.assert_allclose(attention[:, caption], attention_alone[:, -1], rtol=1e-4)


def test_captions_of_an_image_do_not_see_each_other(decoder, features):
    captions_per_image = 4
    tokens = random_tokens(IMAGES * captions_per_image, LONGEST)
    together = whole_logits(decoder, tokens, features)
    for row in range(len(tokens)):
        of_its_image = features[row // captions_per_image][None]
        alone = whole_logits(decoder, tokens[row : row + 1], of_its_image)
        np.testing.assert_allclose(together[row], alone[0], rtol=1e-4)


@pytest.mark.parametrize("feature_norm", [True, False])
def test_feature_norm_removes_the_strength_of_cells(features, feature_norm):
    decoder = build_decoder(replace(CONFIG, feature_norm=feature_norm))
    stronger = features * np.linspace(10, 90, CELLS)[:, None]
    for seen, seen_stronger in zip(
        decoder.keys_values(features * 10), decoder.keys_values(stronger), strict=True
    ):
        assert np.allclose(seen.keys, seen_stronger.keys, atol=1e-3) == feature_norm


@pytest.mark.parametrize("changed", range(1, LONGEST))
def test_later_words_change_no_earlier_logits(decoder, features, changed):
    tokens = random_tokens(IMAGES, LONGEST)
    before = whole_logits(decoder, tokens, features)
    tokens[:, changed:] = (tokens[:, changed:] + 1) % WORDS
    after = whole_logits(decoder, tokens, features)
    np.testing.assert_array_equal(after[:, :changed], before[:, :changed])
    assert (after[:, changed] != before[:, changed]).any(axis=-1).all()


def test_banned_words_have_no_probability(decoder, features):
    tokens = random_tokens(IMAGES, LONGEST)
    for logits in (whole_logits(decoder, tokens, features), stepped(decoder, tokens, features)[0]):
        probabilities = tf.nn.softmax(logits).numpy()
        is_banned = np.isin(np.arange(WORDS), BANNED_IDS)
        assert (probabilities[..., is_banned] == 0).all()
        assert (probabilities[..., ~is_banned] > 0).all()


def test_attention_of_a_step_adds_up_to_one(decoder, features):
    _, attention = stepped(decoder, random_tokens(IMAGES, LONGEST), features)
    assert attention.shape == (IMAGES, LONGEST, CELLS)
    assert (attention > 0).all()
    np.testing.assert_allclose(attention.sum(axis=-1), 1, rtol=1e-5)


def test_attention_of_a_step_is_the_mean_over_layers_and_heads():
    """All heads attend evenly, except the last layer's first, which attends to one cell."""
    decoder = build_decoder(CONFIG)
    for layer in decoder.layers:
        layer.cross_attention.query.kernel.assign(np.zeros((CONFIG.units, 6)))
        layer.cross_attention.query.bias.assign(np.ones(6))
    keys = np.zeros((CONFIG.layers, 1, CONFIG.heads, CELLS, CONFIG.key_size), np.float32)
    keys[-1, :, 0, SEEN_CELL] = 100
    image = [KeysValues(of_layer, np.zeros_like(of_layer)) for of_layer in keys]
    _, attention, _ = decoder.step(random_tokens(1, 1), 0, decoder.empty_cache(1, 1, 1), image)
    expected = 3 / 4 / CELLS + 1 / 4 * (np.arange(CELLS) == SEEN_CELL)
    np.testing.assert_allclose(attention[0, 0], expected, rtol=1e-5)


def test_dropout_works_in_training_only(decoder, features):
    tokens, image = random_tokens(IMAGES, LONGEST), decoder.keys_values(features)
    first, second = (decoder(tokens, image, training=True).numpy() for _ in range(2))
    assert (first != second).any()
    np.testing.assert_array_equal(decoder(tokens, image), decoder(tokens, image))


def test_untrained_decoder_predicts_word_frequencies(features):
    counts = np.array([900, 50, 70, 10, 20, 30, 5, 5, 20, 9, 1])
    decoder = build_decoder(CONFIG)
    decoder.output_logits.kernel.assign(np.zeros(decoder.output_logits.kernel.shape))
    decoder.output_logits.bias.assign(log_frequencies(counts))
    logits = whole_logits(decoder, random_tokens(IMAGES, LONGEST), features)
    expected = np.where(np.isin(np.arange(WORDS), BANNED_IDS), 0, counts) / 100
    np.testing.assert_allclose(
        tf.nn.softmax(logits), np.broadcast_to(expected, logits.shape), rtol=1e-5
    )


def test_words_that_never_occur_start_at_half_an_occurrence():
    frequencies = np.exp(log_frequencies(np.array([0, 0, 0, 3, 0, 1])))
    np.testing.assert_allclose(frequencies[3:], np.array([3, 0.5, 1]) / 4.5, rtol=1e-6)


def test_weight_names_are_stable():
    """They name the tensors of `model.safetensors`: with other names, no model loads."""
    config = DecoderConfig(vocabulary_size=WORDS, grid_cells=CELLS, feature_size=4, layers=1)
    names = [variable.path for variable in build_decoder(config).trainable_variables]
    assert sorted(names) == sorted(WEIGHT_NAMES_OF_ONE_LAYER.split())
