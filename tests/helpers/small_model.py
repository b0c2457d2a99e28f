"""A model small enough for tests: a CNN of three layers, and squares of plain colour to train on.

As a program, it is `batchcap` with that CNN as a backbone, and the newest epoch is the best.
"""

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from PIL import Image

from batchcap.evaluation.metrics import METRICS
from batchcap.model.backbones import BACKBONES, Backbone, build_backbone
from batchcap.model.config import (
    ENCODER_FILE,
    FORMAT_VERSION,
    BackboneConfig,
    DecoderConfig,
    ModelConfig,
    fingerprint,
)
from batchcap.model.encoder import write_graphs
from batchcap.model.encoder_export import export_encoder
from batchcap.model.network import build_decoder
from batchcap.model.tensorflow_captioner import TensorFlowCaptioner
from batchcap.model.vocabulary import SPECIAL_WORDS, Vocabulary
from batchcap.settings import TrainSettings
from batchcap.training import train
from batchcap.training.validation import Validator

COLOURS = {
    "红色": (220, 30, 30),
    "绿色": (30, 200, 40),
    "蓝色": (30, 40, 220),
    "白色": (250, 250, 250),
}
SMALL = "small"
FEATURES = 32
TUNED_FROM = "relu_2"  # conv_3 and bn_3 come after it
BATCHCAP = (sys.executable, __file__)


def small_cnn(weights: str | None, shape: tuple[int, int, int]) -> keras.Model:
    """A backbone that traces quickly: three convolutions, down to 1/32 of the photo's side."""
    layers = [keras.Input(shape)]
    for number, stride in enumerate((8, 2, 2), 1):
        layers += [
            keras.layers.Conv2D(FEATURES, stride, stride, use_bias=False, name=f"conv_{number}"),
            keras.layers.BatchNormalization(name=f"bn_{number}"),
            keras.layers.ReLU(name=f"relu_{number}"),
        ]
    backbone = keras.Sequential(layers, name=SMALL)
    if weights is not None:
        backbone.load_weights(weights)
    return backbone


BACKBONES[SMALL] = Backbone(small_cnn, (-1.0, 1.0))


def small_captioner(image_size: int) -> TensorFlowCaptioner:
    """A captioner of random weights that knows three words."""
    backbone_config = BackboneConfig(SMALL, image_size)
    vocabulary = Vocabulary((*SPECIAL_WORDS, "狗", "猫", "跑"))
    keras.utils.set_random_seed(2)
    backbone = build_backbone(backbone_config, None)
    rows, columns, channels = backbone.output_shape[1:]
    config = ModelConfig(
        FORMAT_VERSION,
        backbone_config,
        DecoderConfig(len(vocabulary), rows * columns, channels, units=16, key_size=8),
    )
    return TensorFlowCaptioner(config, vocabulary, backbone, build_decoder(config.decoder))


def write_encoder(captioner: TensorFlowCaptioner, directory: Path) -> None:
    """Write `encoder.npz` into the directory where the model was saved."""
    write_graphs(directory / ENCODER_FILE, fingerprint(directory), export_encoder(captioner))


def make_squares(folder: Path) -> Path:
    """64 training and 8 validation photos, captions as JSONL, and random backbone weights."""
    (folder / "images").mkdir()
    rng = np.random.default_rng(1)
    records = []
    for number in range(72):
        name, colour = list(COLOURS.items())[number % 4]
        pixels = np.clip(np.array(colour) + rng.integers(-20, 20, (64, 64, 3)), 0, 255)
        image_id = f"{number:03}.png"
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / image_id)
        captions = [f"一个{name}的方块。", f"{name}的方块"]
        split = "train" if number < 64 else "val"
        records.append({"image_id": image_id, "captions": captions, "split": split})
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (folder / "captions.jsonl").write_text(lines, encoding="utf-8")
    keras.utils.set_random_seed(0)
    small_cnn(None, (64, 64, 3)).save_weights(folder / "backbone.weights.h5")
    return folder


def settings_for(squares: Path, out: Path, **asked: Any) -> TrainSettings:
    """Settings that learn the colours in seconds, unless overridden by `asked`."""
    usual = {
        "annotations": (squares / "captions.jsonl",),
        "images": (squares / "images",),
        "out": out,
        "backbone": SMALL,
        "backbone_weights": str(squares / "backbone.weights.h5"),
        "image_size": 64,
        "min_count": 1,
        "max_length": 8,
        "units": 32,
        "key_size": 16,
        "layers": 1,
        "dropout": 0.1,
        "input_dropout": 0.0,
        "label_smoothing": 0.0,
        "batch_size": 8,
        "epochs": 2,
        "patience": 30,
        "learning_rate": 5e-3,
        "warmup_steps": 8,
        "ema_momentum": 0.9,
        "data_note": "Squares made by a test. CC0.",
    }
    return TrainSettings(**{**usual, **asked})


def training_arguments(settings: TrainSettings) -> list[str]:
    """The command line that asks for these settings."""
    asked = [(field, getattr(settings, field.name)) for field in fields(settings)]
    return ["train"] + [
        f"--{field.name.replace('_', '-')}={value}"
        for field, given in asked
        if given != field.default
        for value in (given if isinstance(given, tuple) else (given,))
    ]


def start_training(settings: TrainSettings, *program: str) -> subprocess.Popen[str]:
    """`batchcap train` in a process of its own, by `program` rather than this file if given."""
    command = [*(program or BATCHCAP), *training_arguments(settings)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def script_scores(
    patch: pytest.MonkeyPatch, scores: Iterable[float], losses: Iterable[float] = ()
) -> None:
    """Let validation return these CIDEr-D scores and losses, one per call, uncomputed.

    The models get no int8 backbone, which would be validated once more.
    """
    others = dict.fromkeys(("val_accuracy", *METRICS), 0.0)
    ciders, all_losses = iter(scores), itertools.chain(losses, itertools.repeat(0.0))
    patch.setattr(
        Validator,
        "results",
        lambda _: {**others, "cider_d": next(ciders), "val_loss": next(all_losses)},
    )
    patch.setattr(Validator, "samples", lambda _: [])
    patch.setattr(train, "can_quantise", lambda: False)


if __name__ == "__main__":
    from batchcap.cli import main

    # The scores keep rising, also in a process that resumes another's training.
    script_scores(pytest.MonkeyPatch(), iter(time.time, None))
    main()
