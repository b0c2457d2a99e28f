"""Verb: fit a captioner to annotated photos, and write it as a model directory."""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import keras
import numpy as np

from batchcap.contracts import InputError, OutputError, UsageError
from batchcap.evaluation.metrics import score_captions, signature
from batchcap.evaluation.tokenisation import profile_of
from batchcap.history import CURVES_FILE, HISTORY_FILE
from batchcap.model.backbones import build_backbone, weights_digest
from batchcap.model.captioner import Captioner, round_weights, save_captioner
from batchcap.model.config import (
    CARD_FILE,
    FORMAT_VERSION,
    METRICS_FILE,
    BackboneConfig,
    DecoderConfig,
    ModelConfig,
)
from batchcap.model.network import CaptionDecoder, build_decoder, log_frequencies
from batchcap.model.runtime import start_tensorflow
from batchcap.model.text import SPECIAL_WORDS, Vocabulary
from batchcap.model_card import write_card
from batchcap.objectives import Likelihood, Phase, SelfCritical
from batchcap.settings import Objective, TokenKind, TrainSettings
from batchcap.trainer import Trainer
from batchcap.training_data import (
    Example,
    Features,
    Tokens,
    TrainingBatches,
    extract_all,
    load_examples,
    token_table,
)
from batchcap.validation import Judge
from batchcap.views import training_views

log = logging.getLogger(__name__)


def train_captioner(settings: TrainSettings) -> Path:
    """Train, or go on training, and write the model directory `settings.out`.

    Raises:
        UsageError: the model exists, or its unfinished training had other settings or data.
        InputError: annotations or photos.
        ModelError: the backbone or its weights.
        OutputError: the place of the model can't be written to.
    """
    if settings.out.exists():
        raise UsageError(f"{settings.out} exists already: choose another --out, or delete it")
    score_captions([["a"]], [[["a"]]])  # says now, not after an epoch, that the scorers are missing
    keras.utils.set_random_seed(settings.seed)
    training, validation = load_examples(settings)
    work_folder = _make_work_folder(settings.out)
    backbone_config = BackboneConfig(settings.backbone, settings.image_size, settings.input_range)
    backbone = build_backbone(backbone_config, settings.backbone_weights)
    round_weights(backbone.variables)  # the features trained on are those the model will see
    views = training_views(settings.flip, settings.crops)
    cache, training = extract_all(training, backbone, backbone_config, views)
    cache, validation = extract_all(validation, backbone, backbone_config)

    captions = [words for example in training for words in example.captions]
    vocabulary = Vocabulary.build(captions, settings.vocabulary_size, settings.min_count)
    if len(vocabulary) == len(SPECIAL_WORDS):
        raise InputError(
            f"no word is {settings.min_count} times in {settings.annotations}: lower --min-count"
        )
    tokens = token_table(training, vocabulary, settings.max_length)
    config = ModelConfig(
        FORMAT_VERSION, backbone_config, _decoder_config(settings, vocabulary, cache.row_shape)
    )
    decoder = build_decoder(config.decoder)
    counts = np.bincount(tokens[:, :, 1:].ravel(), minlength=len(vocabulary))
    decoder.output_logits.bias.assign(log_frequencies(counts))
    captioner = Captioner(config, vocabulary, backbone, decoder)

    batches = TrainingBatches(Features(cache, training, views), tokens, vocabulary, settings)
    judge = Judge(captioner, validation, Features(cache, validation))
    run = _run_digest(settings, backbone, training, validation)
    log.info(
        "training on %s: %d photos with %d captions, judged on %d; %d words, %.1f M weights",
        *(start_tensorflow(), len(training), len(captions), len(validation), len(vocabulary)),
        sum(variable.numpy().size for variable in decoder.trainable_variables) / 1e6,
    )
    trainer: Trainer | None = None
    for phase in _phases(settings, decoder, tokens):
        trainer = Trainer(settings, phase, captioner, batches, work_folder, run, trainer)
        trainer.run(judge)
    assert trainer is not None
    return _write_model(settings, trainer, judge)


def _phases(settings: TrainSettings, decoder: CaptionDecoder, tokens: Tokens) -> Iterator[Phase]:
    yield Likelihood(settings, decoder)
    if settings.objective is Objective.CIDER:
        yield SelfCritical(settings, decoder, tokens)


def _make_work_folder(out: Path) -> Path:
    """The hidden folder beside the model to be, made before hours of work are put into it."""
    folder = out.with_name(f".{out.name}.training")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot make {folder}: {error.strerror}; choose another --out"
        ) from error
    return folder


def _decoder_config(
    settings: TrainSettings, vocabulary: Vocabulary, grid: tuple[int, int]
) -> DecoderConfig:
    return DecoderConfig(
        vocabulary_size=len(vocabulary),
        grid_cells=grid[0],
        feature_size=grid[1],
        max_length=settings.max_length,
        units=settings.units,
        layers=settings.layers,
        heads=settings.heads,
        key_size=settings.key_size,
        dropout=settings.dropout,
        input_dropout=settings.input_dropout,
        feature_norm=settings.feature_norm,
    )


def _run_digest(
    settings: TrainSettings,
    backbone: keras.Model,
    training: Sequence[Example],
    validation: Sequence[Example],
) -> str:
    """What must be equal for training to go on: settings but places, backbone, all the data."""
    places = {
        "annotations",
        "images",
        "out",
        "validation_annotations",
        "backbone_weights",
        "data_note",
    }
    wishes = {name: value for name, value in asdict(settings).items() if name not in places}
    digest = hashlib.sha256(json.dumps(wishes, sort_keys=True).encode())
    digest.update(weights_digest(backbone).encode())
    for side in (training, validation):
        digest.update(f"{len(side)} photos\n".encode())
        for example in side:
            digest.update(f"{example.sha256} {example.captions}\n".encode())
    return digest.hexdigest()


def _write_model(settings: TrainSettings, trainer: Trainer, judge: Judge) -> Path:
    """The best epoch's weights, rounded as they are stored, judged once more and written."""
    captioner, record = trainer.captioner, trainer.record
    unfinished = trainer.folder / "model"
    shutil.rmtree(unfinished, ignore_errors=True)
    for variable in captioner.decoder.trainable_variables:
        variable.assign(trainer.best[variable.path])
    round_weights(captioner.decoder.trainable_variables)
    save_captioner(captioner, unfinished)
    metrics = {
        "validation": judge.results(),
        "decoding": "greedy",
        "signature": signature(profile_of(TokenKind.WORDS).described, judge.references),
        "best_epoch": record.best_epoch,
        "epochs": len(record.history),
        "seconds": sum(row["seconds"] for row in record.history),
        "seed": settings.seed,
        "training_photos": len(trainer.batches.captions),
        "validation_photos": len(judge.examples),
    }
    (unfinished / METRICS_FILE).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    write_card(unfinished / CARD_FILE, captioner.config, settings, metrics)
    for name in (HISTORY_FILE, CURVES_FILE):
        shutil.copy(trainer.folder / name, unfinished / name)
    try:
        unfinished.rename(settings.out)
    except OSError as error:
        raise OutputError(
            f"cannot move {unfinished} to {settings.out}: {error.strerror}"
        ) from error
    shutil.rmtree(trainer.folder)
    return settings.out
