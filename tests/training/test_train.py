"""Training on squares of plain colour: small enough to learn in seconds, real in every part.

Which epoch is best depends on how a CPU rounds, so tests in which that matters script the scores.
"""

import csv
import itertools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from click.testing import CliRunner
from helpers.commands import batchcap_here
from helpers.places import TESTS
from helpers.small_model import (
    COLOURS,
    FEATURES,
    SMALL,
    TUNED_FROM,
    make_squares,
    script_scores,
    settings_for,
    small_captioner,
    start_training,
)
from PIL import Image

from batchcap.cli import batchcap
from batchcap.errors import InputError, ModelError, OutputError, UsageError
from batchcap.model.backbones import build_backbone
from batchcap.model.config import BackboneConfig
from batchcap.model.encoder import Encoder, int8_digest
from batchcap.model.openvino_captioner import load_for_openvino
from batchcap.model.tensorflow_captioner import (
    TensorFlowCaptioner,
    load_for_tensorflow,
    round_weights,
)
from batchcap.model.vocabulary import END_ID, PADDING_ID, START_ID, UNKNOWN_ID, join_words
from batchcap.photos.images import LoadSettings, load_image
from batchcap.settings import Decay, DecodeSettings, Monitor, Objective, Precision, TrainSettings
from batchcap.training import train
from batchcap.training.data import extract_all, load_examples
from batchcap.training.loss import loss_function
from batchcap.training.phases import Likelihood
from batchcap.training.train import train_captioner
from batchcap.training.validation import Validator

EPOCHS = 3  # enough to learn the colours


@pytest.fixture(scope="module", autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_squares(tmp_path_factory.mktemp("squares"))


@pytest.fixture(scope="module")
def trained(squares: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose --out was a dangling link."""
    link = tmp_path_factory.mktemp("link") / "latest"
    link.symlink_to(tmp_path_factory.mktemp("trained") / "model")
    return train_captioner(settings_for(squares, link, epochs=EPOCHS, steps_per_epoch=32))


def history_of(model: Path) -> list[dict[str, float]]:
    with (model / "history.csv").open() as file:
        return [
            {name: float(value) for name, value in row.items() if value}
            for row in csv.DictReader(file)
        ]


def test_learns_to_name_colours(trained: Path, squares: Path) -> None:
    """Of the eight validation photos, a blind model would name two."""
    captioner = load_for_tensorflow(trained)
    images = [
        load_image(squares / "images" / f"{n:03}.png", LoadSettings(64)).pixels
        for n in range(64, 72)
    ]
    settings = DecodeSettings(captioner.config.decoder.max_length)
    captions = captioner.caption(np.stack(images), settings, [""] * 8)
    right = [
        list(COLOURS)[number % 4] in join_words(caption.words)
        for number, caption in enumerate(captions)
    ]
    assert sum(right) >= 6


def test_the_model_directory_is_whole_and_nothing_is_left_beside_it(trained: Path) -> None:
    assert sorted(path.name for path in trained.iterdir()) == [
        "README.md",
        "config.json",
        "encoder.npz",
        "history.csv",
        "history.png",
        "metrics.json",
        "model.safetensors",
        "vocabulary.txt",
    ]
    assert [path.name for path in trained.parent.iterdir()] == ["model"]
    assert not trained.is_symlink()


def test_the_trained_model_captions_alike_without_tensorflow(trained: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (8, 64, 64, 3), np.uint8)
    settings, keys = DecodeSettings(8), [""] * 8
    captions = load_for_openvino(trained).caption(pixels, settings, keys)
    expected = load_for_tensorflow(trained).caption(pixels, settings, keys)
    assert [caption.words for caption in captions] == [caption.words for caption in expected]


def test_the_card_names_data_licence_and_metrics_with_their_signature(trained: Path) -> None:
    card = (trained / "README.md").read_text(encoding="utf-8")
    metrics = json.loads((trained / "metrics.json").read_text())
    assert "Squares made by a test. CC0." in card
    assert metrics["signature"] in card
    assert f"CIDEr-D | {metrics['validation']['cider_d']:.1f}" in card
    ((_, int8),) = metrics["int8_cider_d"].items()
    assert f"In int8, the default on CPUs, CIDEr-D is: captions {int8:.1f}." in card
    assert "## Limits" in card


def test_history_has_a_row_for_each_epoch_and_a_figure(trained: Path) -> None:
    history = history_of(trained)
    assert [row["epoch"] for row in history] == list(range(1, EPOCHS + 1))
    assert history[-1]["val_loss"] < history[0]["val_loss"]
    assert {"seconds", "accuracy", "bleu_4", "cider_d"} <= history[0].keys()
    with Image.open(trained / "history.png") as curves:
        assert curves.size[0] > 600


def two_data_sets(squares: Path, folder: Path) -> dict[str, Any]:
    """The squares as two data sets, each with its own colours."""
    records = [json.loads(line) for line in (squares / "captions.jsonl").open(encoding="utf-8")]
    annotations = []
    for name, remainders in (("first", (0, 1)), ("second", (2, 3))):
        (folder / name).mkdir()
        annotations.append(folder / name / "captions.jsonl")
        lines = [json.dumps(one) for i, one in enumerate(records) if i % 4 in remainders]
        annotations[-1].write_text("\n".join(lines), encoding="utf-8")
    return {"annotations": tuple(annotations), "images": (squares / "images",) * 2}


def test_several_data_sets_have_their_own_results_and_the_mean_chooses(
    squares: Path, tmp_path: Path
) -> None:
    asked = two_data_sets(squares, tmp_path) | {"weight": (1.0, 0.5), "steps_per_epoch": 2}
    model = train_captioner(settings_for(squares, tmp_path / "model", **asked))
    metrics = json.loads((model / "metrics.json").read_text())
    sets = metrics["data_sets"]
    assert [(one["name"], one["training_photos"], one["validation_photos"]) for one in sets] == [
        ("first", 32, 4),
        ("second", 32, 4),
    ]
    for key, mean in metrics["validation"].items():
        assert mean == pytest.approx(np.mean([one["validation"][key] for one in sets]))
    history = history_of(model)
    best = history[metrics["best_epoch"] - 1]
    assert best["cider_d"] == pytest.approx(
        np.mean([best["first_cider_d"], best["second_cider_d"]])
    )
    assert best["cider_d"] == max(row["cider_d"] for row in history)
    card = (model / "README.md").read_text(encoding="utf-8")
    assert "| metric (x100) | mean of the data sets | first | second |" in card
    assert "validated on 8 others (first 32 and 4; second 32 and 4)" in card


def test_data_sets_of_a_config_file_are_trained_on(squares: Path, tmp_path: Path) -> None:
    asked = two_data_sets(squares, tmp_path)
    config = tmp_path / "train.toml"
    paths = {name: [str(path) for path in asked[name]] for name in ("annotations", "images")}
    lines = [f"{name} = {json.dumps(value)}" for name, value in paths.items()]
    config.write_text("\n".join(["[train]", *lines, "weight = [1, 0.5]", "max-length = 8", ""]))
    done = CliRunner().invoke(batchcap, ["train", "--config", str(config), "--out", "/dev/null/x"])
    assert "cannot create /dev/null" in str(done.exception)
    config.write_text(config.read_text().replace("weight = [1, 0.5]", "weight = [1]"))
    done = CliRunner().invoke(batchcap, ["train", "--config", str(config), "--out", "/dev/null/x"])
    assert "--weight occurs 1 times" in str(done.exception)


def test_captions_have_the_requested_style(squares: Path, tmp_path: Path) -> None:
    """Half of the captions say 一个 first, and only these are of the style `long`."""
    records = [json.loads(line) for line in (squares / "captions.jsonl").open(encoding="utf-8")]
    lines = [json.dumps(record | {"styles": ["long", "short"]}) for record in records]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    settings = in_all_phases(squares, tmp_path / "model", fine_tune_from=None, cider_epochs=1)
    train_captioner(
        replace(settings, annotations=(tmp_path / "captions.jsonl",), steps_per_epoch=32)
    )
    for style in ("long", "short", None, "rude"):
        asked = [] if style is None else ["--style", style]
        arguments = [squares / "images", tmp_path / f"{style}.parquet", "--limit", 16, *asked]
        done = batchcap_here("run", *arguments, "--model", tmp_path / "model")
        assert done.returncode == (2 if style == "rude" else 0), done.stderr
        if style == "rude":
            assert "has no such style; choose long or short" in done.stderr
            continue
        table = pq.read_table(tmp_path / f"{style}.parquet")
        assert json.loads(table.schema.metadata[b"batchcap.decode"])["style"] == style
        if style:
            longer = [caption.startswith("一个") for caption in table["caption"].to_pylist()]
            assert longer == [style == "long"] * 16
    assert "`--style long` or `--style short`" in (tmp_path / "model" / "README.md").read_text()
    shown = batchcap_here("model", "show", tmp_path / "model").stdout
    assert "styles       long, short" in shown


def in_all_phases(squares: Path, out: Path, **asked: Any) -> TrainSettings:
    """Two epochs of likelihood, two of fine-tuning and two of self-critical training."""
    usual = {
        "fine_tune_from": TUNED_FROM,
        "fine_tune_epochs": 2,
        "fine_tune_learning_rate": 1e-3,
        "objective": Objective.CIDER,
        "cider_epochs": 2,
        "cider_learning_rate": 1e-3,
        "cider_samples": 3,
    }
    return settings_for(squares, out, **{**usual, **asked})


def fine_tuning(squares: Path, out: Path, **asked: Any) -> TrainSettings:
    """The first two of these phases."""
    return in_all_phases(squares, out, objective=Objective.LIKELIHOOD, **asked)


def train_newest_best(settings: TrainSettings) -> Path:
    """Train where each epoch scores better than the one before."""
    with pytest.MonkeyPatch.context() as patch:
        script_scores(patch, itertools.count(1))
        return train_captioner(settings)


@pytest.fixture(scope="module")
def fine_tuned(squares: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_newest_best(fine_tuning(squares, tmp_path_factory.mktemp("tuned") / "model"))


@pytest.fixture(scope="module")
def all_phases(squares: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_newest_best(in_all_phases(squares, tmp_path_factory.mktemp("phases") / "model"))


@pytest.mark.slow
def test_phases_follow_one_another(all_phases: Path) -> None:
    history = history_of(all_phases)
    assert [row["epoch"] for row in history] == [1, 2, 3, 4, 5, 6]
    assert [("loss" in row, "reward" in row) for row in history] == (
        [(True, False)] * 4 + [(False, True)] * 2
    )
    assert history[1]["learning_rate"] == pytest.approx(0, abs=1e-6)  # at a cosine's end
    card = (all_phases / "README.md").read_text(encoding="utf-8")
    assert "fine-tuned" in card
    assert "self-critical" in card


def test_fine_tuning_starts_from_the_trained_decoder(fine_tuned: Path) -> None:
    """One with new weights would begin at the loss of the first epoch."""
    history = history_of(fine_tuned)
    assert history[2]["loss"] < history[0]["loss"]


def test_the_last_phase_sees_the_features_of_int8(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests: list[str | None] = []  # of the int8 backbone, at each extraction of features

    def extract(*given: Any, int8: Encoder | None = None) -> Any:
        digests.append(int8.digest if int8 else None)
        return extract_all(*given, int8=int8)

    monkeypatch.setattr(train, "extract_all", extract)
    settings = in_all_phases(squares, tmp_path / "model", fine_tune_from=None, cider_epochs=1)
    int8 = int8_digest(train_captioner(replace(settings, epochs=1)))
    assert int8 is not None
    first, likelihood, cider, results = [None] * 2, [None] * 2, [None, int8], [None, int8]
    assert digests == first + likelihood + cider + results


def test_without_nncf_there_is_no_int8_backbone(fine_tuned: Path) -> None:
    assert int8_digest(fine_tuned) is None
    assert json.loads((fine_tuned / "metrics.json").read_text())["int8_cider_d"] is None
    assert "int8" not in (fine_tuned / "README.md").read_text(encoding="utf-8")


def test_a_resumed_training_keeps_its_int8_backbone(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(squares, tmp_path / "model")
    training, _ = load_examples(settings)
    captioner = small_captioner(64)
    graphs = train._graphs(captioner, tmp_path, training)
    with monkeypatch.context() as patch:
        patch.setattr(train, "quantised", None)
        again = train._graphs(captioner, tmp_path, training)
    assert all(np.array_equal(again[name], graph) for name, graph in graphs.items())
    captioner.backbone.set_weights([2 * value for value in captioner.backbone.get_weights()])
    other = train._graphs(captioner, tmp_path, training)
    assert not np.array_equal(other["int8_constants"], graphs["int8_constants"])


def changed_weights(squares: Path, model: Path) -> set[str]:
    """Paths of the backbone's weights that training has changed."""
    before = build_backbone(BackboneConfig(SMALL, 64), squares / "backbone.weights.h5")
    round_weights(before.weights)
    after = load_for_tensorflow(model).backbone
    return {
        old.path.removeprefix(f"{SMALL}/")
        for old, new in zip(before.weights, after.weights, strict=True)
        if not np.array_equal(old.numpy(), new.numpy())
    }


def test_fine_tuning_changes_the_top_of_the_backbone_but_no_statistics(
    squares: Path, fine_tuned: Path
) -> None:
    assert changed_weights(squares, fine_tuned) == {"conv_3/kernel", "bn_3/gamma", "bn_3/beta"}


def test_epochs_that_are_no_better_keep_the_best_weights(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best is the last epoch before fine-tuning, so the backbone stays as it was."""
    script_scores(monkeypatch, [1.0, 2.0, 1.5, 1.5, 2.0])
    wanted = fine_tuning(squares, tmp_path / "model")
    model = train_captioner(wanted)
    assert changed_weights(squares, model) == set()
    assert json.loads((model / "metrics.json").read_text())["best_epoch"] == 2


def test_card_names_the_phases_of_the_weights(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It named fine-tuning although the best epoch came before."""
    script_scores(monkeypatch, [1.0, 2.0, 1.5, 1.5, 3.0, 2.5, 3.0])
    model = train_captioner(in_all_phases(squares, tmp_path / "model", steps_per_epoch=1))
    metrics = json.loads((model / "metrics.json").read_text())
    assert (metrics["phases"], metrics["phases_not_kept"]) == (
        ["likelihood", "cider"],
        ["fine-tuning"],
    )
    objective = (
        "Objective: likelihood, then CIDEr-D (self-critical training, rate 0.001, 3 captions"
    )
    tried = "no epoch was better, so the weights were not kept: likelihood with the backbone"
    card = (model / "README.md").read_text(encoding="utf-8")
    assert objective in card
    assert tried in card


def test_loss_decides_between_epochs_with_equal_scores(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While CIDEr-D stayed 0, the first epoch was best, and patience ended the training."""
    script_scores(monkeypatch, [0.0] * 6, losses=[3.0, 2.0, 1.0, 1.0, 1.5, 1.0])
    asked = {"epochs": 9, "patience": 2, "steps_per_epoch": 1}
    model = train_captioner(settings_for(squares, tmp_path / "model", **asked))
    metrics = json.loads((model / "metrics.json").read_text())
    assert (metrics["best_epoch"], metrics["epochs"]) == (3, 5)


def test_a_single_validation_photo_is_refused_before_work(squares: Path, tmp_path: Path) -> None:
    lines = (squares / "captions.jsonl").read_text("utf-8").splitlines()
    records = [json.loads(line) | {"split": None} for line in lines]
    annotations = tmp_path / "captions.jsonl"
    annotations.write_text("\n".join(map(json.dumps, records)), "utf-8")
    asked = {"annotations": (annotations,), "validation_count": 1}
    with pytest.raises(
        UsageError, match=r"one validation photo, and CIDEr-D.*is always 0.*--monitor loss"
    ):
        train_captioner(settings_for(squares, tmp_path / "model", **asked))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["captions.jsonl"]
    asked |= {"monitor": Monitor.LOSS, "min_count": 1000}
    with pytest.raises(InputError, match="lower --min-count"):
        train_captioner(settings_for(squares, tmp_path / "model", **asked))


def test_few_validation_photos_are_warned_about(
    caplog: pytest.LogCaptureFixture, squares: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="lower --min-count"):
        train_captioner(settings_for(squares, tmp_path / "model", min_count=1000))
    assert "CIDEr-D of the 8 validation photos of captions is uncertain" in caplog.text


@pytest.mark.slow
def test_training_killed_in_each_phase_ends_like_an_unbroken_one(
    squares: Path, all_phases: Path, tmp_path: Path
) -> None:
    wanted = in_all_phases(squares, tmp_path / "model")
    for phase in ("fine-tuning", "cider"):
        checkpoint = tmp_path / ".model.training" / f"{phase}.safetensors"
        process = start_training(wanted)
        while not checkpoint.exists() and process.poll() is None:
            time.sleep(0.02)
        process.kill()
        process.communicate()
        assert not wanted.out.exists()
    _, log = (last := start_training(wanted)).communicate(timeout=300)
    assert last.returncode == 0, log
    assert "resuming from" in log
    for resumed, whole in zip(history_of(wanted.out), history_of(all_phases), strict=True):
        assert resumed.keys() == whole.keys()
        for name in whole.keys() & {"loss", "reward", "learning_rate"}:
            assert resumed[name] == pytest.approx(whole[name], rel=1e-3)


@pytest.mark.slow
def test_interrupted_training_resumes_with_equal_settings_only(
    squares: Path, fine_tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = fine_tuning(squares, tmp_path / "model")
    with monkeypatch.context() as patch:
        script_scores(patch, [1.0, 2.0, 3.0])  # and then StopIteration, in the second phase
        with pytest.raises(StopIteration):
            train_captioner(settings)
        other_weights = tmp_path / "other.weights.h5"
        build_backbone(BackboneConfig(SMALL, 64), None).save_weights(other_weights)
        for changed in ({"dropout": 0.4}, {"backbone_weights": str(other_weights)}):
            with pytest.raises(UsageError, match=r"other settings or data"):
                train_captioner(replace(settings, **changed))
        script_scores(patch, itertools.count(4))
        train_captioner(settings)
    for resumed, whole in zip(history_of(settings.out), history_of(fine_tuned), strict=True):
        for name in ("loss", "learning_rate"):
            assert resumed[name] == pytest.approx(whole[name], rel=1e-3)


def test_a_damaged_checkpoint_is_refused(squares: Path, tmp_path: Path) -> None:
    settings = settings_for(squares, tmp_path / "model")
    (tmp_path / ".model.training").mkdir()
    (tmp_path / ".model.training" / "likelihood.safetensors").write_bytes(bytes(1000))
    with pytest.raises(InputError, match=r"likelihood.safetensors is damaged"):
        train_captioner(settings)


@pytest.mark.parametrize("layer", ["block_99_add", "relu_3"])
def test_a_layer_with_nothing_after_it_is_refused_before_work(
    layer: str, squares: Path, tmp_path: Path
) -> None:
    wanted = settings_for(squares, tmp_path / "model", fine_tune_from=layer)
    with pytest.raises(ModelError, match=rf"has no layer after '{layer}'.* such as conv_"):
        train_captioner(wanted)


def test_a_photo_lost_before_fine_tuning_is_named(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = shutil.copytree(squares / "images", tmp_path / "images")
    wanted = fine_tuning(squares, tmp_path / "model", images=(photos,), epochs=1)

    def scores_while_a_photo_is_lost() -> Iterator[float]:
        (photos / "005.png").unlink()
        yield 1.0

    script_scores(monkeypatch, scores_while_a_photo_is_lost())
    with pytest.raises(InputError, match=r"005.png has changed since the start"):
        train_captioner(wanted)


TWO_DEVICES = """
import itertools, sys
sys.path.insert(0, {tests!r})
import pytest
from helpers import small_model
import tensorflow as tf
from batchcap import cli
from batchcap.training import train
(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
train.training_strategy = lambda: tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
small_model.script_scores(pytest.MonkeyPatch(), itertools.count(1))
cli.main()
"""


def start_on_two_devices(settings: TrainSettings) -> subprocess.Popen[str]:
    """As `train_newest_best`, in a process of its own."""
    program = TWO_DEVICES.format(tests=str(TESTS))
    return start_training(settings, sys.executable, "-c", program)


@pytest.mark.slow
def test_two_devices_learn_what_one_learns(squares: Path, tmp_path: Path) -> None:
    """Rewards may differ more: other rounding may change a few sampled words."""
    wanted = in_all_phases(
        squares,
        tmp_path / "one",
        dropout=0.0,
        learning_rate=1e-3,
        fine_tune_learning_rate=1e-4,
        cider_epochs=1,
    )
    one = history_of(train_newest_best(wanted))
    wanted = replace(wanted, out=tmp_path / "two")
    _, log = start_on_two_devices(wanted).communicate(timeout=300)
    two = history_of(wanted.out)
    for here, there in zip(one[:4], two[:4], strict=True):
        assert there["loss"] == pytest.approx(here["loss"], rel=1e-3), log
    assert two[4]["reward"] == pytest.approx(one[4]["reward"], rel=0.1)


@pytest.mark.slow
def test_a_batch_that_devices_cannot_share_is_refused(squares: Path, tmp_path: Path) -> None:
    process = start_on_two_devices(settings_for(squares, tmp_path / "model", batch_size=7))
    _, log = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "--batch-size 7 does not divide among 2 GPUs" in log


@pytest.mark.slow
def test_bfloat16_trains_a_model_of_float32(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script_scores(monkeypatch, itertools.count(1))
    scripted, computed_in = Validator.results, []

    def results(validator: Validator) -> dict[str, float]:
        computed_in.append(validator.captioner.decoder.compute_dtype)
        return scripted(validator)

    monkeypatch.setattr(Validator, "results", results)
    wanted = fine_tuning(squares, tmp_path / "model", precision=Precision.BFLOAT16)
    history = history_of(train_captioner(wanted))
    # The last one is the saved model, loaded again.
    assert computed_in == [*["bfloat16"] * 4, "float32"]
    assert history[3]["loss"] < history[0]["loss"]
    assert changed_weights(squares, wanted.out) == {"conv_3/kernel", "bn_3/gamma", "bn_3/beta"}


def test_float16_is_refused(squares: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="bfloat16 or float32"):
        settings_for(squares, tmp_path / "model", precision=Precision.FLOAT16)


@pytest.mark.parametrize(
    ("flag", "value", "limit"),
    [
        ("ema_momentum", 1.0, "at most 0.99999, not 1.0"),
        ("ema_momentum", 0.99999999, "at most 0.99999"),
        ("learning_rate", 0.0, "at least 1e-07, not 0.0"),
        ("learning_rate", float("inf"), "at most 1, not inf"),
        ("learning_rate", float("nan"), "at least 1e-07, not nan"),
        ("fine_tune_learning_rate", 0.0, "at least 1e-07"),
        ("cider_learning_rate", 2.0, "at most 1"),
        ("warmup_steps", 10**30, "at most 1000000000"),
        ("steps_per_epoch", 10**30, "at most 1000000000"),
        ("epochs", 10**30, "at most 1000000000"),
        ("max_length", 10**7, "at most 1000"),
        ("vocabulary_size", 10**7, "at most 1000000"),
        ("crops", 10**6, "at most 1000"),
        ("cider_samples", 10**6, "at most 1000"),
    ],
)
def test_values_out_of_range_are_refused_with_their_limit(
    flag: str, value: float, limit: str
) -> None:
    with pytest.raises(UsageError, match=f"--{flag.replace('_', '-')} must be {limit}"):
        settings_for(Path("squares"), Path("model"), **{flag: value})


@pytest.mark.parametrize(
    "bounds", [(1.0, 1.0), (float("nan"), 1.0), (0.0, float("inf")), (-1e30, 1e30)]
)
def test_invalid_input_range_is_refused(bounds: tuple[float, float]) -> None:
    with pytest.raises(UsageError, match="--input-range must be two rising values"):
        settings_for(Path("squares"), Path("model"), input_range=bounds)


def test_a_warm_up_that_outlasts_training_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    decoder = small_captioner(64).decoder
    for warmup_steps, warnings in ((5, 0), (6, 1)):
        settings = settings_for(Path("squares"), Path("model"), epochs=2, warmup_steps=warmup_steps)
        Likelihood(settings, decoder).learning_rate(steps_per_epoch=3)
        assert len(caplog.messages) == warnings
    assert "training has 6 steps, so the rate stays below 0.005; lower it" in caplog.text


def test_unwritable_out_is_refused_before_work(squares: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="choose another --out"):
        train_captioner(settings_for(squares, tmp_path / "file" / "model"))


def test_wrong_annotations_leave_no_folder(squares: Path, tmp_path: Path) -> None:
    (tmp_path / "captions.jsonl").write_text("{")
    settings = settings_for(squares, tmp_path / "model", annotations=(tmp_path / "captions.jsonl",))
    with pytest.raises(InputError):
        train_captioner(settings)
    assert [path.name for path in tmp_path.iterdir()] == ["captions.jsonl"]


def test_a_vocabulary_without_words_is_refused(squares: Path, tmp_path: Path) -> None:
    settings = settings_for(squares, tmp_path / "model", min_count=1000)
    with pytest.raises(InputError, match="lower --min-count"):
        train_captioner(settings)


def test_existing_model_is_never_overwritten(squares: Path, trained: Path) -> None:
    with pytest.raises(UsageError, match="exists already"):
        train_captioner(settings_for(squares, trained))


def test_a_constant_learning_rate_stays(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script_scores(monkeypatch, [1.0, 1.0])
    wanted = settings_for(
        squares,
        tmp_path / "model",
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


def test_diverging_training_is_an_error(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batchcap.settings._check_limits", lambda _: None)
    wanted = settings_for(squares, tmp_path / "model", learning_rate=1e30)
    with pytest.raises(InputError, match="not finite in epoch 1"):
        train_captioner(wanted)


@pytest.fixture(scope="module")
def tiny() -> TensorFlowCaptioner:
    return small_captioner(64)


def test_the_loss_is_the_mean_over_words_that_count(tiny: TensorFlowCaptioner) -> None:
    features = np.random.default_rng(3).random((1, 4, FEATURES), np.float32)
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


def test_label_smoothing_adds_the_loss_of_a_uniform_guess(tiny: TensorFlowCaptioner) -> None:
    features = np.random.default_rng(3).random((1, 4, FEATURES), np.float32)
    captions = np.array([[[START_ID, 4, 5, END_ID]]], np.int32)
    plain, _ = loss_function(tiny.decoder, 0.0)(features, captions, False)
    smoothed, _ = loss_function(tiny.decoder, 0.1)(features, captions, False)
    logits = tiny.decoder(captions[0, :, :-1], tiny.decoder.keys_values(features)).numpy()[0]
    log_probs = tf.nn.log_softmax(logits).numpy()[
        :, 3:
    ]  # without banned words: END and three others
    expected = 0.9 * float(plain) + 0.1 * -log_probs.mean()
    assert float(smoothed) == pytest.approx(expected, rel=1e-5)
