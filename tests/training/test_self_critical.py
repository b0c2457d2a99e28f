"""Rewards against pycocoevalcap's, the loss against arithmetic."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocoevalcap.cider.cider import Cider

from batchcap.model.config import DecoderConfig
from batchcap.model.network import build_decoder
from batchcap.model.vocabulary import END_ID, PADDING_ID, START_ID
from batchcap.settings import TrainSettings
from batchcap.training.phases import SelfCritical
from batchcap.training.self_critical import (
    CiderD,
    advantages,
    as_captions,
    draw_starts,
    of_style,
    policy_loss,
)

LONGEST = 7
SHORT, DETAILED = 10, 11  # ids of styles


def rows(captions: list[list[int]]) -> np.ndarray:
    """`int32[n, T + 1]`."""
    table = np.full((len(captions), LONGEST + 2), PADDING_ID, np.int32)
    for row, words in zip(table, captions, strict=True):
        row[: len(words) + 1] = [START_ID, *words]
    return table


CAPTIONS = st.lists(st.integers(4, 9), min_size=1, max_size=LONGEST).map(lambda c: [*c, END_ID])
IMAGES = st.lists(
    st.tuples(CAPTIONS, st.lists(CAPTIONS, min_size=2, max_size=2)), min_size=2, max_size=5
)


@given(IMAGES)
@settings(deadline=None, max_examples=60)
def test_rewards_equal_pycocoevalcaps_cider_d_of_words_and_end(
    images: list[tuple[list[int], list[list[int]]]],
) -> None:
    references = np.stack([rows(texts) for _, texts in images])
    captions = np.stack([rows([caption]) for caption, _ in images])
    expected = {
        i: [" ".join(map(str, text)) for text in texts] for i, (_, texts) in enumerate(images)
    }
    found = {i: [" ".join(map(str, caption))] for i, (caption, _) in enumerate(images)}
    _, scores = Cider().compute_score(expected, found)
    assert CiderD(references)(captions, references)[:, 0] == pytest.approx(scores, abs=1e-5)


def test_each_data_set_has_its_own_document_frequencies() -> None:
    """A word in every caption of its data set has no weight there."""
    settings = TrainSettings(annotations=(), images=(), out=Path(), max_length=LONGEST + 1)
    decoder = build_decoder(DecoderConfig(10, 1, 1, LONGEST + 1, units=4, layers=1, key_size=2))
    texts = [[4, 5, END_ID], [4, 6, END_ID], [7, 8, END_ID], [7, 9, END_ID]]
    tokens = np.stack([rows([text]) for text in texts])
    data_sets = np.array([0, 0, 1, 1], np.int32)
    phase = SelfCritical(settings, decoder, tokens, data_sets)
    mixed = np.array([2, 0, 3, 1])
    rewards = phase._rewards(tokens[mixed], tokens[mixed], data_sets[mixed])
    expected = [CiderD(tokens[side]) for side in (slice(0, 2), slice(2, 4))]
    for place, image in enumerate(mixed):
        own = expected[data_sets[image]](tokens[image : image + 1], tokens[image : image + 1])
        assert rewards[place] == pytest.approx(own[0])


def test_padding_references_do_not_count() -> None:
    references = np.stack([rows([[4, 5, END_ID], []]), rows([[6, 7, END_ID], [6, END_ID]])])
    reward = CiderD(references)
    alone = reward(references[:1, :1], references[:1, :1])
    assert reward(references[:1, :1], references[:1]) == pytest.approx(alone)


def test_advantage_compares_a_reward_with_the_mean_of_the_others() -> None:
    gains = advantages(np.array([[3.0, 1.0, 2.0], [5.0, 5.0, 5.0]], np.float32))
    assert gains.tolist() == [[1.5, -1.5, 0.0], [0.0, 0.0, 0.0]]


def test_samples_have_styles_of_their_images_captions() -> None:
    captions = rows([[4, END_ID], [5, END_ID], [], [6, END_ID], [7, END_ID], []]).reshape(2, 3, -1)
    captions[0, 1, 0], captions[1, :2, 0] = SHORT, (SHORT, DETAILED)
    rng = np.random.default_rng(0)
    drawn = np.array([draw_starts(captions, rng) for _ in range(50)])
    assert set(drawn[:, 0]) == {START_ID, SHORT}
    assert set(drawn[:, 1]) == {SHORT, DETAILED}


def test_style_is_rewarded_by_its_own_captions_and_no_style_by_all() -> None:
    captions = rows([[4, END_ID], [5, END_ID], [6, END_ID], [7, END_ID]]).reshape(2, 2, -1)
    captions[:, 1, 0] = SHORT
    kept = of_style(captions, np.array([START_ID, SHORT], np.int32))
    assert kept[:, :, 1].tolist() == [[4, 5], [PADDING_ID, 7]]


def test_sampled_captions_end_where_end_was_reached() -> None:
    words = np.array([[4, 5, 0], [6, 7, 8], [0, 0, 0]], np.int32)
    starts = np.array([START_ID, 9, START_ID], np.int32)
    captions = as_captions(starts, words, np.array([2, 3, 0]), np.array([True, False, True]))
    assert captions.tolist() == [
        [START_ID, 4, 5, END_ID],
        [9, 6, 7, 8],
        [START_ID, END_ID, 0, 0],
    ]


def test_loss_is_the_mean_negative_advantage_times_log_probability() -> None:
    decoder = build_decoder(
        DecoderConfig(8, grid_cells=4, feature_size=3, max_length=4, units=8, dropout=0.0)
    )
    features = np.random.default_rng(1).random((2, 4, 3), np.float32)
    captions = rows([[4, 5, END_ID], [6, END_ID]])[:, :5]
    gains = np.array([2.0, -1.0], np.float32)
    loss = policy_loss(decoder)(features, captions, gains)
    logits = decoder(captions[:, :-1], decoder.keys_values(features)).numpy().astype(np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    first = sum(log_probs[0, place, word] for place, word in enumerate([4, 5, END_ID]))
    second = sum(log_probs[1, place, word] for place, word in enumerate([6, END_ID]))
    assert float(loss) == pytest.approx(-(2.0 * first - 1.0 * second) / 5, rel=1e-5)
