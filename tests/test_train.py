"""Training on squares of plain colour: small enough to learn in seconds, real in every part."""

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import keras
import numpy as np
import numpy.typing as npt
import pytest
import tensorflow as tf
from PIL import Image

from batchcap.contracts import InputError, ModelError, OutputError, Precision, UsageError
from batchcap.model.backbones import build_backbone
from batchcap.model.captioner import Captioner, load_captioner, round_weights
from batchcap.model.config import (
    FORMAT_VERSION,
    BackboneConfig,
    DecoderConfig,
    DecodeSettings,
    ModelConfig,
)
from batchcap.model.images import LoadSettings, load_image
from batchcap.model.loss import loss_function
from batchcap.model.network import build_decoder
from batchcap.model.text import END_ID, PADDING_ID, START_ID, UNKNOWN_ID, Vocabulary, join_words
from batchcap.settings import Decay, Objective, TrainSettings
from batchcap.train import train_captioner

COLOURS = {
    "红色": (220, 30, 30),
    "绿色": (30, 200, 40),
    "蓝色": (30, 40, 220),
    "白色": (250, 250, 250),
}


@pytest.fixture(scope="module", autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 training and 8 validation photos, captions as JSONL, and random backbone weights."""
    folder = tmp_path_factory.mktemp("squares")
    (folder / "images").mkdir()
    noise = np.random.default_rng(1)
    records = []
    for number in range(72):
        name, colour = list(COLOURS.items())[number % 4]
        pixels = np.clip(np.array(colour) + noise.integers(-20, 20, (64, 64, 3)), 0, 255)
        image_id = f"{number:03}.png"
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / image_id)
        captions = [f"一个{name}的方块。", f"{name}的方块"]
        split = "train" if number < 64 else "val"
        records.append({"image_id": image_id, "captions": captions, "split": split})
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (folder / "captions.jsonl").write_text(lines, encoding="utf-8")
    images = [
        load_image(folder / "images" / record["image_id"], LoadSettings(64)).pixels
        for record in records
    ]
    random_backbone(np.stack(images)).save_weights(folder / "backbone.weights.h5")
    return folder


def random_backbone(images: npt.NDArray[np.uint8]) -> keras.Model:
    """Random weights, normalised to these images: else little is left of them after 27 layers."""
    keras.utils.set_random_seed(0)
    backbone = build_backbone(BackboneConfig(image_size=64), None)
    backbone.trainable = True
    for layer in backbone.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0
    backbone(images / 127.5 - 1, training=True)
    return backbone


def settings_for(squares: Path, out: Path) -> TrainSettings:
    return TrainSettings(
        annotations=squares / "captions.jsonl",
        images=squares / "images",
        out=out,
        backbone_weights=str(squares / "backbone.weights.h5"),
        image_size=64,
        min_count=1,
        max_length=8,
        units=32,
        key_size=16,
        dropout=0.1,
        input_dropout=0.0,
        label_smoothing=0.0,
        batch_size=8,
        epochs=30,
        patience=30,
        learning_rate=5e-3,
        warmup_steps=8,
        ema_momentum=0.9,
        data_note="Squares made by a test. CC0.",
    )


@pytest.fixture(scope="module")
def trained(squares: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose --out was a dangling link."""
    link = tmp_path_factory.mktemp("link") / "latest"
    link.symlink_to(tmp_path_factory.mktemp("trained") / "model")
    return train_captioner(settings_for(squares, link))


def history_of(model: Path) -> list[dict[str, float]]:
    with (model / "history.csv").open() as file:
        return [
            {name: float(value) for name, value in row.items() if value}
            for row in csv.DictReader(file)
        ]


def test_it_learns_to_name_colours(trained: Path, squares: Path) -> None:
    captioner = load_captioner(trained)
    images = [
        load_image(squares / "images" / f"{n:03}.png", LoadSettings(64)).pixels
        for n in range(64, 72)
    ]
    settings = DecodeSettings(captioner.config.decoder.max_length)
    decoded = captioner.caption(np.stack(images), np.ones(8, np.bool_), settings, [""] * 8)
    captions = [
        join_words(captioner.vocabulary.decode(ids[:length]))
        for ids, length in zip(decoded.tokens, decoded.lengths, strict=True)
    ]
    right = [list(COLOURS)[number % 4] in caption for number, caption in enumerate(captions)]
    assert sum(right) >= 6  # of 8; a model blind to the photos has 2


def test_the_model_directory_is_whole_and_nothing_is_left_beside_it(trained: Path) -> None:
    assert sorted(path.name for path in trained.iterdir()) == [
        "README.md",
        "config.json",
        "history.csv",
        "history.png",
        "metrics.json",
        "model.safetensors",
        "vocabulary.txt",
    ]
    assert [path.name for path in trained.parent.iterdir()] == ["model"]
    assert not trained.is_symlink()


def test_the_card_names_data_licence_and_metrics_with_their_signature(trained: Path) -> None:
    card = (trained / "README.md").read_text(encoding="utf-8")
    metrics = json.loads((trained / "metrics.json").read_text())
    assert "Squares made by a test. CC0." in card
    assert metrics["signature"] in card
    assert f"CIDEr-D | {metrics['validation']['cider_d']:.1f}" in card
    assert "## Limits" in card


def test_history_has_a_row_an_epoch_and_a_picture(trained: Path) -> None:
    history = history_of(trained)
    assert [row["epoch"] for row in history] == list(range(1, len(history) + 1))
    assert history[-1]["val_loss"] < history[0]["val_loss"]
    assert {"seconds", "accuracy", "bleu_4", "cider_d"} <= history[0].keys()
    with Image.open(trained / "history.png") as curves:
        assert curves.size[0] > 600


BATCHCAP = "from batchcap.cli import main; main()"


def start_training(wanted: TrainSettings, program: str = BATCHCAP) -> subprocess.Popen[str]:
    asked = {field: getattr(wanted, field.name) for field in fields(wanted)}
    arguments = [
        f"--{field.name.replace('_', '-')}={value}"
        for field, value in asked.items()
        if value != field.default
    ]
    command = [sys.executable, "-c", program, "train", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill_when_there_is(checkpoint: Path, process: subprocess.Popen[str]) -> None:
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.communicate()


def self_critical(squares: Path, out: Path) -> TrainSettings:
    return replace(
        settings_for(squares, out),
        epochs=6,
        objective=Objective.CIDER,
        cider_epochs=6,
        cider_learning_rate=1e-3,
        cider_samples=3,
    )


def test_self_critical_training_goes_on_from_the_best_epoch_and_raises_its_reward(
    squares: Path, tmp_path: Path
) -> None:
    out = tmp_path / "model"
    history = history_of(train_captioner(self_critical(squares, out)))
    assert [row["epoch"] for row in history] == list(range(1, 13))
    assert all(("loss" in row) == (row["epoch"] <= 6) for row in history)
    rewards = [row["reward"] for row in history if "reward" in row]
    assert rewards[-1] > rewards[0] + 20
    assert history[-1]["finished"] > 0.9
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["validation"]["cider_d"] >= max(row["cider_d"] for row in history[:6])
    assert "self-critical" in (out / "README.md").read_text(encoding="utf-8")


def fine_tuning(squares: Path, out: Path) -> TrainSettings:
    return replace(
        settings_for(squares, out),
        epochs=4,
        fine_tune_from="conv_pw_11_relu",
        fine_tune_epochs=4,
        fine_tune_learning_rate=1e-3,
    )


def in_all_phases(squares: Path, out: Path) -> TrainSettings:
    return replace(
        fine_tuning(squares, out),
        objective=Objective.CIDER,
        cider_epochs=2,
        cider_learning_rate=1e-3,
        cider_samples=3,
    )


@pytest.fixture(scope="module")
def fine_tuned(squares: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_captioner(in_all_phases(squares, tmp_path_factory.mktemp("tuned") / "model"))


def test_a_training_that_is_killed_again_and_again_goes_on_as_if_nothing_had_happened(
    squares: Path, fine_tuned: Path, tmp_path: Path
) -> None:
    wanted = in_all_phases(squares, tmp_path / "model")
    for phase in ("fine-tuning", "cider"):
        checkpoint = tmp_path / ".model.training" / f"{phase}.safetensors"
        kill_when_there_is(checkpoint, start_training(wanted))
        assert not wanted.out.exists()
    _, log = (last := start_training(wanted)).communicate(timeout=300)
    assert last.returncode == 0, log
    assert "going on from" in log
    for resumed, whole in zip(history_of(wanted.out), history_of(fine_tuned), strict=True):
        assert resumed.keys() == whole.keys()
        for name in whole.keys() & {"loss", "val_loss", "learning_rate"}:
            assert resumed[name] == pytest.approx(whole[name], rel=1e-3)


def test_fine_tuning_changes_the_top_of_the_backbone_but_no_statistics(
    squares: Path, fine_tuned: Path
) -> None:
    before = build_backbone(BackboneConfig(image_size=64), squares / "backbone.weights.h5")
    round_weights(before.variables)
    after = load_captioner(fine_tuned).backbone
    changed = {
        old.path
        for old, new in zip(before.variables, after.variables, strict=True)
        if not np.array_equal(old.numpy(), new.numpy())
    }
    assert {path.split("/")[0].removesuffix("_bn") for path in changed} == {
        *("conv_dw_12", "conv_pw_12", "conv_dw_13", "conv_pw_13")
    }
    assert not [path for path in changed if "moving" in path]


def test_fine_tuning_goes_on_from_the_trained_decoder_and_lowers_its_loss(
    fine_tuned: Path,
) -> None:
    history = history_of(fine_tuned)
    assert [row["epoch"] for row in history if "loss" in row] == list(range(1, 9))
    assert history[7]["loss"] < history[3]["loss"]
    assert history[3]["learning_rate"] == pytest.approx(0, abs=1e-6)  # at a cosine's end
    assert "fine-tuned" in (fine_tuned / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("layer", ["block_99_add", "conv_pw_13_relu"])
def test_a_layer_with_nothing_after_it_is_refused_before_work(
    layer: str, squares: Path, tmp_path: Path
) -> None:
    wanted = replace(settings_for(squares, tmp_path / "model"), fine_tune_from=layer)
    with pytest.raises(ModelError, match=rf"nothing comes after '{layer}'.* such as conv_"):
        train_captioner(wanted)


def test_a_photo_that_is_lost_before_fine_tuning_is_named(squares: Path, tmp_path: Path) -> None:
    photos = shutil.copytree(squares / "images", tmp_path / "images")
    wanted = replace(fine_tuning(squares, tmp_path / "model"), images=photos)
    process = start_training(wanted)
    while not (tmp_path / ".model.training" / "likelihood.safetensors").exists():
        time.sleep(0.05)
    (photos / "005.png").unlink()
    _, log = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "005.png has changed since the start" in log
    assert "Traceback" not in log


TWO_DEVICES = """
import tensorflow as tf
from batchcap import cli, train
(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
train.training_strategy = lambda: tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
cli.main()
"""


def test_two_devices_learn_what_one_learns(squares: Path, tmp_path: Path) -> None:
    wanted = replace(
        fine_tuning(squares, tmp_path / "one"),
        dropout=0.0,
        learning_rate=1e-3,
        epochs=2,
        fine_tune_epochs=1,
        fine_tune_learning_rate=1e-4,
        objective=Objective.CIDER,
        cider_epochs=1,
    )
    one = history_of(train_captioner(wanted))
    wanted = replace(wanted, out=tmp_path / "two")
    _, log = start_training(wanted, TWO_DEVICES).communicate(timeout=300)
    two = history_of(wanted.out)
    for here, there in zip(one, two, strict=True):
        assert there["val_loss"] == pytest.approx(here["val_loss"], rel=1e-3), log
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-3)
    assert two[3]["reward"] == pytest.approx(one[3]["reward"], rel=0.02)


def test_a_batch_that_devices_cannot_share_is_refused(squares: Path, tmp_path: Path) -> None:
    wanted = replace(settings_for(squares, tmp_path / "model"), batch_size=7)
    process = start_training(wanted, TWO_DEVICES)
    _, log = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "--batch-size 7 can't be shared by 2 GPUs" in log


def test_bfloat16_trains_a_model_of_float32(squares: Path, tmp_path: Path) -> None:
    wanted = replace(
        fine_tuning(squares, tmp_path / "model"),
        epochs=10,
        fine_tune_epochs=1,
        precision=Precision.BFLOAT16,
    )
    history = history_of(train_captioner(wanted))
    assert history[9]["val_loss"] < history[0]["val_loss"] / 2
    metrics = json.loads((wanted.out / "metrics.json").read_text())
    captioner = load_captioner(wanted.out)
    assert captioner.decoder.compute_dtype == "float32"
    best = history[metrics["best_epoch"] - 1]
    assert metrics["validation"]["val_loss"] == pytest.approx(best["val_loss"], rel=0.05)


def test_float16_is_refused(squares: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="bfloat16, or float32"):
        replace(settings_for(squares, tmp_path / "model"), precision=Precision.FLOAT16)


def test_another_training_is_not_mixed_into_an_unfinished_one(
    squares: Path, tmp_path: Path
) -> None:
    settings = settings_for(squares, tmp_path / "model")
    process = start_training(settings)
    checkpoint = tmp_path / ".model.training" / "likelihood.safetensors"
    kill_when_there_is(checkpoint, process)
    other_weights = tmp_path / "other.weights.h5"
    build_backbone(BackboneConfig(image_size=64), None).save_weights(other_weights)
    for changed in ({"dropout": 0.4}, {"backbone_weights": str(other_weights)}):
        with pytest.raises(UsageError, match=r"other settings or data"):
            train_captioner(replace(settings, **changed))
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"likelihood.safetensors is damaged"):
        train_captioner(settings)


def test_a_place_that_cannot_be_written_is_refused_before_work(
    squares: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="choose another --out"):
        train_captioner(settings_for(squares, tmp_path / "file" / "model"))


def test_wrong_annotations_leave_no_folder(squares: Path, tmp_path: Path) -> None:
    (tmp_path / "captions.jsonl").write_text("{")
    settings = replace(
        settings_for(squares, tmp_path / "model"), annotations=tmp_path / "captions.jsonl"
    )
    with pytest.raises(InputError):
        train_captioner(settings)
    assert [path.name for path in tmp_path.iterdir()] == ["captions.jsonl"]


def test_a_vocabulary_without_words_is_refused(squares: Path, tmp_path: Path) -> None:
    settings = replace(settings_for(squares, tmp_path / "model"), min_count=1000)
    with pytest.raises(InputError, match="lower --min-count"):
        train_captioner(settings)


def test_a_model_that_exists_is_never_overwritten(squares: Path, trained: Path) -> None:
    with pytest.raises(UsageError, match="exists already"):
        train_captioner(settings_for(squares, trained))


def test_a_rate_that_stays_trains(squares: Path, tmp_path: Path) -> None:
    wanted = replace(
        settings_for(squares, tmp_path / "model"),
        decay=Decay.CONSTANT,
        epochs=1,
        steps_per_epoch=3,
        warmup_steps=0,
        captions_per_image=1,
        flip=False,
        label_smoothing=0.1,
    )
    (row,) = history_of(train_captioner(wanted))
    assert row["learning_rate"] == pytest.approx(5e-3)


def test_a_diverging_training_says_so(squares: Path, tmp_path: Path) -> None:
    wanted = replace(settings_for(squares, tmp_path / "model"), learning_rate=1e30, warmup_steps=0)
    with pytest.raises(InputError, match="no number any more in epoch 1"):
        train_captioner(wanted)


@pytest.fixture(scope="module")
def tiny() -> Captioner:
    vocabulary = Vocabulary(("[PAD]", "[UNK]", "[START]", "[END]", "狗", "猫", "跑"))
    decoder = DecoderConfig(len(vocabulary), grid_cells=4, feature_size=1024, units=16, key_size=8)
    config = ModelConfig(FORMAT_VERSION, BackboneConfig(image_size=64), decoder)
    keras.utils.set_random_seed(2)
    return Captioner(
        config, vocabulary, build_backbone(config.backbone, None), build_decoder(decoder)
    )


def test_the_loss_is_the_mean_over_words_that_count(tiny: Captioner) -> None:
    features = np.random.default_rng(3).random((1, 4, 1024), np.float32)
    captions = np.array([[[START_ID, 4, UNKNOWN_ID, 6, END_ID, PADDING_ID]]], np.int32)
    mean, (loss_sum, right, count) = loss_function(tiny.decoder, 0.0)(features, captions, False)
    inputs, labels = captions[0, :, :-1], captions[0, 0, 1:]
    logits = tiny.decoder(inputs, tiny.decoder.keys_values(features)).numpy()[0].astype(np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    counted = [0, 2, 3]  # 狗, 跑 and END: neither [UNK] nor padding
    expected = -sum(log_probs[place, labels[place]] for place in counted)
    assert float(count) == 3
    assert float(loss_sum) == pytest.approx(expected, rel=1e-5)
    assert float(mean) == pytest.approx(expected / 3, rel=1e-5)
    assert float(right) == sum(logits[place].argmax() == labels[place] for place in counted)


def test_label_smoothing_adds_the_loss_of_a_uniform_guess(tiny: Captioner) -> None:
    features = np.random.default_rng(3).random((1, 4, 1024), np.float32)
    captions = np.array([[[START_ID, 4, 5, END_ID]]], np.int32)
    plain, _ = loss_function(tiny.decoder, 0.0)(features, captions, False)
    smoothed, _ = loss_function(tiny.decoder, 0.1)(features, captions, False)
    logits = tiny.decoder(captions[0, :, :-1], tiny.decoder.keys_values(features)).numpy()[0]
    log_probs = tf.nn.log_softmax(logits).numpy()[:, 3:]  # what can be said: END and three words
    expected = 0.9 * float(plain) + 0.1 * -log_probs.mean()
    assert float(smoothed) == pytest.approx(expected, rel=1e-5)
