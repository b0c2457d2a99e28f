"""Continuous batching, as an experiment: a slot whose caption is finished takes the next photo.

    python tests/benchmarks/continuous.py PHOTOS

Compared with batchcap's compaction (finished captions leave the batch) on the same features. The
keys and values of all photos are ready, so this is the best that continuous batching could reach.
Captions are checked to be equal.
"""

import argparse
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import batchcap.model  # noqa: F401, before TensorFlow, which reads the variables it sets

# isort: split
import einops
import numpy as np
import tensorflow as tf
from compare import BATCH, DECODED_PHOTOS, fastest

from batchcap.model.decoding import greedy
from batchcap.model.network import CaptionDecoder, KeysValues
from batchcap.model.tensorflow_captioner import TensorFlowCaptioner, load_for_tensorflow
from batchcap.model.vocabulary import END_ID, PADDING_ID, START_ID
from batchcap.photos.images import LoadSettings, load_image
from batchcap.photos.listing import list_images
from batchcap.settings import DEFAULT_MODEL, DecodeSettings

REFILLS = (8, 16, 32)


class Slots(NamedTuple):
    """S captions in progress; each tensor's first axis is S.

    photo: `int32[S]`, the slot's photo.
    position: `int32[S]`, of its caption's next word.
    unfinished: `bool[S]`, whether its caption is unfinished.
    """

    last: Any
    position: Any
    photo: Any
    unfinished: Any
    cache: Any
    image: Any


class Done(NamedTuple):
    """Captions of N photos, then rows for finished slots to write to."""

    tokens: Any
    log_probs: Any
    attention: Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", type=Path)
    captioner = load_for_tensorflow(DEFAULT_MODEL)
    features = list(batches_of_features(captioner, parser.parse_args().photos))
    settings = DecodeSettings(captioner.config.decoder.max_length)
    keys = [""] * BATCH

    def compaction() -> Any:
        return [
            caption.ids.tolist()
            for batch in features
            for caption in captioner.caption_features(batch, settings, keys)
        ]

    works = {"compaction": compaction} | {
        f"continuous, {refill} slots refilled at a time": continuous(captioner, features, refill)
        for refill in REFILLS
    }
    expected = compaction()
    for name, work in works.items():
        assert work() == expected, name
    print(f"| {DECODED_PHOTOS} photos, {BATCH} at a time, one thread | ms a batch |")
    print("|---|---|")
    for name, seconds in fastest(works).items():
        print(f"| {name} | {1000 * seconds / len(features):.1f} |")


def batches_of_features(captioner: TensorFlowCaptioner, photos: Path) -> Any:
    side = captioner.config.backbone.image_size
    refs = itertools.islice(list_images(str(photos)), DECODED_PHOTOS)
    pixels = np.stack([np.asarray(load_image(ref.path, LoadSettings(side)).pixels) for ref in refs])
    for start in range(0, DECODED_PHOTOS, BATCH):
        yield tf.constant(captioner.extract(pixels[start : start + BATCH]))


def continuous(
    captioner: TensorFlowCaptioner, features: list[Any], refill: int
) -> Callable[[], Any]:
    decoder = captioner.decoder
    keys_values = tf.function(decoder.keys_values)
    write = tf.function(partial(write_all, decoder, refill), jit_compile=True)

    def run() -> Any:
        parts = [keys_values(batch) for batch in features]
        image = tf.nest.map_structure(lambda *tensors: tf.concat(tensors, 0), *parts)
        tokens = write(image).tokens.numpy()[:DECODED_PHOTOS]
        return [row[row != PADDING_ID].tolist() for row in tokens]

    return run


def write_all(decoder: CaptionDecoder, refill: int, image: Any) -> Done:
    config = decoder.config
    rows, length = DECODED_PHOTOS + BATCH, config.max_length
    cache_shape = (BATCH, config.heads, length, config.key_size)
    slots = Slots(
        last=tf.fill((BATCH,), START_ID),
        position=tf.zeros((BATCH,), tf.int32),
        photo=tf.range(BATCH),
        unfinished=tf.fill((BATCH,), True),
        cache=[KeysValues(tf.zeros(cache_shape), tf.zeros(cache_shape)) for _ in decoder.layers],
        image=tf.nest.map_structure(lambda tensor: tensor[:BATCH], image),
    )
    done = Done(
        tf.fill((rows, length), PADDING_ID),
        tf.zeros((rows, length)),
        tf.zeros((rows, length, config.grid_cells)),
    )

    def full_enough(slots: Slots, _done: Done, taken: Any) -> Any:
        fewest = tf.where(taken < DECODED_PHOTOS, BATCH - refill, 0)
        return tf.reduce_sum(tf.cast(slots.unfinished, tf.int32)) > fewest

    def one_word(slots: Slots, done: Done, taken: Any) -> Any:
        return (*advance(decoder, slots, done), taken)

    def one_refill(*state: Any) -> Any:
        slots, done, taken = tf.while_loop(full_enough, one_word, state)
        slots, taken = refilled(slots, image, taken, refill)
        return slots, done, taken

    def busy(slots: Slots, _done: Done, taken: Any) -> Any:
        return tf.reduce_any(slots.unfinished) | (taken < DECODED_PHOTOS)

    _, done, _ = tf.while_loop(busy, one_refill, (slots, done, tf.constant(BATCH)))
    return done


def advance(decoder: CaptionDecoder, slots: Slots, done: Done) -> tuple[Slots, Done]:
    logits, attention, cache = step(decoder, slots)
    word = greedy(logits, None)
    log_prob = tf.gather(logits, word, batch_dims=1) - tf.reduce_logsumexp(logits, axis=-1)
    is_word = slots.unfinished & (word != END_ID)
    row = tf.where(slots.unfinished, slots.photo, DECODED_PHOTOS + tf.range(BATCH))
    place = tf.stack([row, slots.position], axis=1)
    news = Done(tf.where(is_word, word, PADDING_ID), log_prob, attention)
    done = tf.nest.map_structure(lambda t, n: tf.tensor_scatter_nd_update(t, place, n), done, news)
    last_place = decoder.config.max_length - 1
    unfinished = is_word & (slots.position < last_place)
    position = tf.minimum(slots.position + 1, last_place)
    slots = slots._replace(last=word, position=position, unfinished=unfinished, cache=cache)
    return slots, done


def step(decoder: CaptionDecoder, slots: Slots) -> tuple[Any, Any, Any]:
    """`CaptionDecoder.step`, with a position for each row."""
    x = decoder.words(slots.last[:, None]) + decoder.positions(slots.position[:, None])
    places = tf.range(decoder.config.max_length)
    mask = (places <= slots.position[:, None])[:, None, None, :]
    here = (places == slots.position[:, None])[:, None, :, None]
    weights, cache = [], []
    for layer, past, image in zip(decoder.layers, slots.cache, slots.image, strict=True):
        new = layer.self_attention.keys_values(x)
        past = KeysValues(*(tf.where(here, n, p) for n, p in zip(new, past, strict=True)))
        x, layer_weights = layer(x, past, mask, image)
        weights.append(layer_weights)
        cache.append(past)
    attention = einops.reduce(tf.stack(weights), "l n h c g -> n (c g)", "mean")
    return decoder.output_logits(x[:, 0]) + decoder.banned, attention, cache


def refilled(slots: Slots, image: Any, taken: Any, refill: int) -> tuple[Slots, Any]:
    """Give the next photos, if any, to at most `refill` finished slots."""
    which = tf.math.top_k(tf.cast(~slots.unfinished, tf.int32), refill).indices
    is_finished = ~tf.gather(slots.unfinished, which)
    photo = taken + tf.cumsum(tf.cast(is_finished, tf.int32), exclusive=True)
    is_new = is_finished & (photo < DECODED_PHOTOS)
    photo = tf.where(is_new, photo, tf.gather(slots.photo, which))

    def put(into: Any, values: Any) -> Any:
        return tf.tensor_scatter_nd_update(into, which[:, None], values)

    def if_new(tensor: Any, value: Any) -> Any:
        return put(tensor, tf.where(is_new, value, tf.gather(tensor, which)))

    slots = slots._replace(
        last=if_new(slots.last, START_ID),
        position=if_new(slots.position, 0),
        photo=put(slots.photo, photo),
        unfinished=if_new(slots.unfinished, True),
        image=tf.nest.map_structure(
            lambda t, of_all: put(t, tf.gather(of_all, photo)), slots.image, image
        ),
    )
    return slots, taken + tf.reduce_sum(tf.cast(is_new, tf.int32))


if __name__ == "__main__":
    main()
