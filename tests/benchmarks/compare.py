"""batchcap against the notebook's loop and a naive batched decoder, in one run on one machine.

    python tests/benchmarks/compare.py PHOTOS [--limit N]

Prints the tables of `README.md` beside this file. Compare ratios: rates depend on the machine.
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import batchcap.model  # noqa: F401, before TensorFlow, which reads the variables it sets

# isort: split
import numpy as np
import tensorflow as tf
from notebook_loop import notebook_loop

from batchcap.model import decoding
from batchcap.model.config import DecoderConfig
from batchcap.model.decoding import Generation, decode, greedy, logit_filter
from batchcap.model.network import CaptionDecoder, build_decoder
from batchcap.model.tensorflow_captioner import TensorFlowCaptioner, load_for_tensorflow
from batchcap.model.vocabulary import START_ID
from batchcap.photos.images import LoadSettings, load_image
from batchcap.photos.listing import list_images
from batchcap.settings import DEFAULT_MODEL, DecodeSettings

NOTEBOOK_PHOTOS = 100
DECODED_PHOTOS = 512
BATCH = 64
ROUNDS = 7
FREEZING = 1 << 30  # a `FEWEST_ROWS` with which batches never shrink

# MobileNet's grid, the vocabulary of a large data set, keys as wide as the decoder.
LARGE = DecoderConfig(
    vocabulary_size=17_303, grid_cells=49, feature_size=1024, max_length=12, key_size=256
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--limit", type=int, default=7000)
    asked = parser.parse_args()
    captioner = load_for_tensorflow(DEFAULT_MODEL)
    compare_decoders()
    compare_ways_to_decode(captioner, asked.photos)
    compare_end_to_end(captioner, asked.photos, asked.limit)


def compare_end_to_end(captioner: TensorFlowCaptioner, photos: Path, limit: int) -> None:
    baseline = notebook_rate(captioner, photos)
    stages = ("load", "features", "captions", "write", "end_to_end")
    print(f"| {limit} photos | {' | '.join(stages)} | notebook = 1 | efficiency | peak MiB |")
    print("|---" * (len(stages) + 4) + "|")
    print(f"| the notebook's loop | | | | | {baseline:.2f} | 1 | | |", flush=True)
    for runtime in ("tensorflow", "openvino"):
        result = bench(photos, limit, "--runtime", runtime)
        rates = " | ".join(f"{result[stage]:.1f}" for stage in stages)
        print(
            f"| batchcap, {runtime} | {rates} | {result['end_to_end'] / baseline:.1f} | "
            f"{result['pipeline_efficiency']:.2f} | {result['peak_memory_bytes'] / 2**20:.0f} |",
            flush=True,
        )
    print(f"\nThe notebook's loop once more: {notebook_rate(captioner, photos):.2f} images/s")


def notebook_rate(captioner: TensorFlowCaptioner, photos: Path) -> float:
    paths = [ref.path for ref in itertools.islice(list_images(str(photos)), NOTEBOOK_PHOTOS)]
    caption = notebook_loop(captioner)
    caption(paths[0])
    started = time.perf_counter()
    for path in paths:
        caption(path)
    return len(paths) / (time.perf_counter() - started)


def bench(photos: Path, limit: int, *arguments: str) -> dict[str, Any]:
    program = "from batchcap.cli import main; main()"
    command = [sys.executable, "-c", program, "bench", "--json", "--images", str(photos)]
    done = subprocess.run(
        [*command, "--limit", str(limit), *arguments], stdout=subprocess.PIPE, check=True
    )
    return json.loads(done.stdout)


def compare_decoders() -> None:
    """With random weights and END barred, so that every caption has the full length."""
    decoder = build_decoder(LARGE)
    features = tf.random.stateless_normal((BATCH, LARGE.grid_cells, LARGE.feature_size), (1, 2))
    ours, naive = cached_decoder(decoder), naive_decoder(decoder)
    same = np.mean(ours(features).numpy() == naive(features).numpy())
    product = plain_product(arithmetic(LARGE) * BATCH)
    seconds = fastest(
        {
            "batchcap": lambda: ours(features),
            "naive: prefix and image keys again at each word": lambda: naive(features),
            "one matrix product of batchcap's arithmetic": product,
        }
    )
    print(f"| {BATCH} captions of {LARGE.max_length} words out of {LARGE.vocabulary_size} | ms |")
    print("|---|---|")
    for name, taken in seconds.items():
        print(f"| {name} | {1000 * taken:.0f} |")
    own, naive_seconds, product_seconds = seconds.values()
    print(
        f"\n{naive_seconds / own:.1f} times the naive decoder, {product_seconds / own:.2f} of the "
        f"product's speed; {100 * same:.1f} % of the words are the same\n",
        flush=True,
    )


def cached_decoder(decoder: CaptionDecoder) -> Callable[[Any], Any]:
    config = decoder.config
    row_mask = tf.fill((BATCH,), True)
    uniforms = tf.zeros((BATCH, config.max_length))
    generation = Generation(
        step=decoder.step,
        max_length=config.max_length,
        grid_cells=config.grid_cells,
        logit_filter=logit_filter(min_length=config.max_length, no_repeat_ngram=0),
        choose=greedy,
    )

    @tf.function(jit_compile=True)
    def write(image: Any) -> Any:
        cache = decoder.empty_cache(BATCH, 1, config.max_length)
        return decode(generation, cache, image, uniforms, row_mask)

    return tf.function(lambda features: write(decoder.keys_values(features)).tokens)


def naive_decoder(decoder: CaptionDecoder) -> Callable[[Any], Any]:
    bar = logit_filter(min_length=decoder.config.max_length, no_repeat_ngram=0)

    @tf.function
    def next_word(tokens: Any, features: Any) -> Any:
        logits = decoder(tokens, decoder.keys_values(features))[:, -1]
        return greedy(bar(logits, tokens, 0), None)

    def write(features: Any) -> Any:
        tokens = tf.fill((BATCH, 1), START_ID)
        for _ in range(decoder.config.max_length):
            tokens = tf.concat([tokens, next_word(tokens, features)[:, None]], axis=1)
        return tokens[:, 1:]

    return write


def arithmetic(config: DecoderConfig) -> int:
    """Multiply-adds of one caption of `max_length` words, nothing computed twice."""
    width = config.heads * config.key_size
    image = 2 * config.grid_cells * config.feature_size * width
    dense = 6 * config.units * width + 4 * config.units**2
    attention = 2 * width * (config.max_length + config.grid_cells)
    word = config.layers * (dense + attention) + config.units * config.vocabulary_size
    return config.layers * image + config.max_length * word


def plain_product(multiply_adds: int) -> Callable[[], Any]:
    rows = multiply_adds // 1024**2
    left, right = tf.random.normal((rows, 1024)), tf.random.normal((1024, 1024))
    product = tf.function(tf.matmul)
    return lambda: product(left, right)


def compare_ways_to_decode(captioner: TensorFlowCaptioner, photos: Path) -> None:
    side, longest = captioner.config.backbone.image_size, captioner.config.decoder.max_length
    refs = itertools.islice(list_images(str(photos)), DECODED_PHOTOS)
    pixels = np.stack([np.asarray(load_image(ref.path, LoadSettings(side)).pixels) for ref in refs])
    features = [
        tf.constant(captioner.extract(pixels[start : start + BATCH]))
        for start in range(0, DECODED_PHOTOS, BATCH)
    ]
    keys = [str(row) for row in range(BATCH)]

    def decoding_with(fewest_rows: int = decoding.FEWEST_ROWS, **asked: Any) -> Callable[[], Any]:
        own = TensorFlowCaptioner(
            captioner.config, captioner.vocabulary, captioner.backbone, captioner.decoder
        )
        settings = DecodeSettings(longest, **asked)

        def run() -> None:
            decoding.FEWEST_ROWS = fewest_rows
            for batch in features:
                own.caption_features(batch, settings, keys)

        return run

    seconds = fastest(
        {
            "greedy": decoding_with(),
            "greedy, finished rows stay (freezing)": decoding_with(FREEZING),
            "beam 3": decoding_with(beam_size=3, length_penalty=1.0),
            "beam 5": decoding_with(beam_size=5, length_penalty=1.0),
            "temperature 1": decoding_with(temperature=1.0),
            "temperature 1, top-k 20": decoding_with(temperature=1.0, top_k=20),
            "temperature 1, top-p 0.9": decoding_with(temperature=1.0, top_p=0.9),
        }
    )
    print(f"| {DECODED_PHOTOS} photos, {BATCH} at a time, one thread | ms a batch | greedy = 1 |")
    print("|---|---|---|")
    for name, taken in seconds.items():
        batch_ms = 1000 * taken / len(features)
        print(f"| {name} | {batch_ms:.0f} | {taken / seconds['greedy']:.2f} |")
    print(flush=True)


def fastest(works: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Return each one's best seconds; they take turns, as machines drift, and compile first."""
    seconds = dict.fromkeys(works, float("inf"))
    for round_number in range(ROUNDS + 1):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            if round_number:
                seconds[name] = min(seconds[name], time.perf_counter() - started)
    return seconds


if __name__ == "__main__":
    main()
