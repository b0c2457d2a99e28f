"""Describes a model directory to people: its card, and a summary. No TensorFlow."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from batchcap.errors import ModelError
from batchcap.evaluation.metrics import METRIC_NAMES, METRICS
from batchcap.model.config import (
    CARD_FILE,
    METRICS_FILE,
    WEIGHTS_FILE,
    ModelConfig,
    fingerprint,
    model_file,
    read_config,
)
from batchcap.model.encoder import int8_digest
from batchcap.model.vocabulary import SPECIAL_WORDS
from batchcap.process.wording import excerpt, printable
from batchcap.settings import TrainSettings

CARD = """\
# Model card

A Chinese image captioner made by `batchcap train`: {backbone} features of a {grid}-cell grid, read by a
transformer decoder ({layers} layers, {heads} heads, {units} units) that writes words as jieba cuts them.

## Use

`batchcap run PHOTOS captions.parquet --model THIS_DIRECTORY`

Captions everyday photos with one plain sentence of at most {max_length} words out of {word_count}.{styles}

## Data

{data_note}

Trained on {training_photos:,} photos, validated on {validation_photos:,} others{data_sets}.

## Results

On the validation photos, {decoding} decoding, best of {epochs} epochs by {monitor} (epoch {best_epoch}):

{results}

Signature: `{signature}`

## Training

Adam, peak rate {learning_rate:g}, warm-up {warmup_steps} steps, {decay} decay, batches of {batch_size} photos,
features normalised: {feature_norm}, dropout {dropout:g} (inputs {input_dropout:g}), weight average {ema_momentum:g}, label smoothing {label_smoothing:g}, mirrored photos: {flip}, crops of each photo: {crops}, seed {seed}; {minutes:.0f} minutes.
{objective}
Curves: `history.csv`, `history.png`. Backbone weights: {backbone_weights}.

## Limits

- It names what its training captions name, in their words and with their biases (of gender, age, place and occupation); it cannot read text, count well, or name people and places.
- A confident caption can be wrong: `mean_logprob` ranks captions, it is not a probability of being right.
- Drawings, screenshots, documents, aerial and medical pictures are outside of its training data.
- Not for decisions about people.
"""


def write_card(
    path: Path, config: ModelConfig, settings: TrainSettings, metrics: dict[str, Any]
) -> None:
    """Write the card, from the numbers in `metrics.json`."""
    decoder = config.decoder
    text = CARD.format(
        backbone=config.backbone.name,
        grid=decoder.grid_cells,
        layers=decoder.layers,
        heads=decoder.heads,
        units=decoder.units,
        max_length=decoder.max_length,
        word_count=_word_count(config),
        styles=_styles(decoder.styles),
        data_note=settings.data_note or "Not described by its trainer.",
        training_photos=metrics["training_photos"],
        validation_photos=metrics["validation_photos"],
        decoding=metrics["decoding"],
        epochs=metrics["epochs"],
        monitor=settings.monitor,
        best_epoch=metrics["best_epoch"],
        data_sets=_data_sets(metrics["data_sets"]),
        results=_results(metrics),
        signature=metrics["signature"],
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        decay=settings.decay,
        batch_size=settings.batch_size,
        feature_norm="yes" if settings.feature_norm else "no",
        dropout=settings.dropout,
        input_dropout=settings.input_dropout,
        ema_momentum=settings.ema_momentum,
        label_smoothing=settings.label_smoothing,
        crops=settings.crops,
        flip="yes" if settings.flip else "no",
        seed=settings.seed,
        objective=_objective(settings, metrics),
        minutes=metrics["seconds"] / 60,
        backbone_weights="imagenet (ILSVRC 2012, for research)"
        if settings.backbone_weights == "imagenet"
        else Path(settings.backbone_weights).name,
    )
    path.write_text(text, encoding="utf-8")


def _styles(styles: Sequence[str]) -> str:
    if not styles:
        return ""
    flags = " or ".join(f"`--style {style}`" for style in styles)
    return f" {flags} asks for that kind of caption."


def _data_sets(sets: list[dict[str, Any]]) -> str:
    """Return the number of photos per data set, if there are several."""
    if len(sets) == 1:
        return ""
    counts = [
        f"{one['name']} {one['training_photos']:,} and {one['validation_photos']:,}" for one in sets
    ]
    return f" ({'; '.join(counts)})"


def _results(metrics: dict[str, Any]) -> str:
    """Return a table of metrics; with several data sets, the mean, which chooses epochs, is first."""
    columns = {"value": metrics["validation"]}
    if len(metrics["data_sets"]) > 1:
        columns = {"mean of the data sets": metrics["validation"]}
        columns |= {one["name"]: one["validation"] for one in metrics["data_sets"]}
    rows = [
        [METRIC_NAMES[key], *(f"{results[key]:.1f}" for results in columns.values())]
        for key in METRICS
    ]
    header, *body = (f"| {' | '.join(cells)} |" for cells in [["metric (x100)", *columns], *rows])
    table = "\n".join([header, "|---" * (1 + len(columns)) + "|", *body])
    if metrics["int8_cider_d"] is None:
        return table
    scores = ", ".join(f"{name} {value:.1f}" for name, value in metrics["int8_cider_d"].items())
    return f"{table}\n\nThis is in float32. In int8, the default on CPUs, CIDEr-D is: {scores}."


def _objective(settings: TrainSettings, metrics: dict[str, Any]) -> str:
    """Return the phases whose weights the model has, and those that brought no better epoch."""
    described = {
        "likelihood": "likelihood",
        "fine-tuning": f"likelihood with the backbone fine-tuned after {settings.fine_tune_from} "
        f"(peak rate {settings.fine_tune_learning_rate:g})",
        "cider": f"CIDEr-D (self-critical training, rate {settings.cider_learning_rate:g}, "
        f"{settings.cider_samples} captions sampled per photo)",
    }
    kept, others = (
        [described[name] for name in metrics[key]] for key in ("phases", "phases_not_kept")
    )
    text = f"Objective: {', then '.join(kept)}."
    if others:
        text += (
            f" Then tried, but no epoch was better, so the weights were not kept: "
            f"{'; '.join(others)}."
        )
    return text


def read_card(directory: Path) -> str:
    """Return the card's text.

    Raises:
        ModelError: the directory has none, or it is unreadable.
    """
    path = model_file(directory, CARD_FILE)
    try:
        return path.read_text(encoding="utf-8-sig").rstrip()
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}): copy the model again") from error


def describe(directory: Path) -> str:
    """Return fingerprint, backbone, decoder, vocabulary, size and metrics of a model.

    Raises:
        ModelError: a file is missing or a field is wrong.
    """
    config = read_config(directory)
    backbone, decoder = config.backbone, config.decoder
    low, high = backbone.input_range
    size = model_file(directory, WEIGHTS_FILE).stat().st_size
    lines: dict[str, object] = {
        "model": directory,
        "fingerprint": fingerprint(directory),
        "format": config.format_version,
        "backbone": f"{excerpt(backbone.name)}, {backbone.image_size} px, pixels in [{low:g}, {high:g}]",
        "decoder": f"{decoder.layers} layers, {decoder.heads} heads of {decoder.key_size}, "
        f"{decoder.units} units, {decoder.grid_cells} grid cells of {decoder.feature_size}",
        "vocabulary": f"{_word_count(config)} words, captions of at most {decoder.max_length}",
        "weights": f"{size / 1e6:.1f} MB",
    }
    lines["int8"] = "no" if int8_digest(directory) is None else "yes, for CPUs"
    if decoder.styles:
        lines["styles"] = ", ".join(decoder.styles)
    text = "\n".join(f"{name:<12} {printable(str(value))}" for name, value in lines.items())
    if (directory / METRICS_FILE).is_file():
        text += f"\n\n{_describe_metrics(directory / METRICS_FILE)}"
    return text


def _word_count(config: ModelConfig) -> str:
    """Return the number of words that a caption can have, without special words."""
    return f"{config.decoder.vocabulary_size - len(SPECIAL_WORDS):,}"


def _describe_metrics(path: Path) -> str:
    """Return a table of the validation metrics of each data set, and their signature."""
    try:
        metrics = json.loads(path.read_text(encoding="utf-8-sig"))
        overall = metrics["validation"]
        sets = [one for one in metrics.get("data_sets", []) if "validation" in one]
        results = {"mean" if len(sets) > 1 else "all": overall}
        if len(sets) > 1:
            results |= {printable(excerpt(one["name"])): one["validation"] for one in sets}
        rows = {name: [float(found[key]) for key in METRICS] for name, found in results.items()}
        columns = pd.Index([METRIC_NAMES[key] for key in METRICS], name="validation".ljust(12))
        table = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
        shown = table.to_string(float_format="{:.1f}".format)
        return f"{shown}\n\n{'signature':<12} {printable(str(metrics['signature']))}"
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise ModelError(
            f"{path} is damaged ({excerpt(str(error))}): copy the model again"
        ) from error
