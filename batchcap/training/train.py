"""Trains a captioner on annotated photos, and writes a model directory."""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from batchcap.errors import InputError, ModelError, OutputError, UsageError
from batchcap.evaluation.metrics import METRICS, score_captions, signature
from batchcap.evaluation.tokenisation import profile_of
from batchcap.model.backbones import (
    build_backbone,
    choose_input_range,
    computing_in,
    extract_features,
    place_of,
    train_after,
    weights_digest,
)
from batchcap.model.captioner import Extract
from batchcap.model.config import (
    CARD_FILE,
    ENCODER_FILE,
    FORMAT_VERSION,
    METRICS_FILE,
    BackboneConfig,
    DecoderConfig,
    ModelConfig,
    fingerprint,
)
from batchcap.model.encoder import INT8, Encoder, Graphs, read_graphs, write_graphs
from batchcap.model.encoder_export import export_encoder
from batchcap.model.network import build_decoder, log_frequencies
from batchcap.model.runtime import precision_of, start_tensorflow
from batchcap.model.tensorflow_captioner import (
    TensorFlowCaptioner,
    get_weights,
    load_for_tensorflow,
    round_weights,
    save_captioner,
)
from batchcap.model.vocabulary import SPECIAL_WORDS, Vocabulary
from batchcap.rows.parquet import saying_where
from batchcap.settings import Monitor, Objective, Precision, TokenKind, TrainSettings
from batchcap.storage.files import followed
from batchcap.training.augmentation import View, training_views
from batchcap.training.data import (
    AugmentedPhotos,
    CachedFeatures,
    Example,
    Sight,
    Tokens,
    TrainingBatches,
    check_each_set,
    data_set_names,
    extract_all,
    load_examples,
    load_pixels,
    numbers_of_sets,
    styles_of,
    token_table,
)
from batchcap.training.history import CURVES_FILE, HISTORY_FILE
from batchcap.training.model_card import write_card
from batchcap.training.phases import FineTuning, Likelihood, Phase, SelfCritical
from batchcap.training.quantisation import can_quantise, import_nncf, quantised
from batchcap.training.replicas import training_strategy
from batchcap.training.trainer import Record, Trainer
from batchcap.training.validation import Features, Validator

FEW_VALIDATION_PHOTOS = 20
RESULTS = ("val_loss", "val_accuracy", *METRICS)

log = logging.getLogger(__name__)


# A phase, its batches and its validator.
PhaseSetup = tuple[Phase, TrainingBatches, Validator]


def train_captioner(settings: TrainSettings) -> Path:
    """Train, or resume training, and write the model directory `settings.out`.

    Raises:
        UsageError: the model exists, its unfinished training had other settings or data, or the
            GPUs cannot share batches equally.
        InputError: annotations or photos are invalid.
        ModelError: the backbone or its weights are invalid.
        OutputError: the model's folder is not writable.
    """
    with saying_where(settings.out):
        settings = replace(settings, out=followed(settings.out))
    if settings.out.exists():
        raise UsageError(f"{settings.out} exists already: choose another --out, or delete it")
    score_captions([["a"]], [[["a"]]])  # fails now, not after an epoch, if scorers are missing
    if can_quantise():
        import_nncf()
    keras.utils.set_random_seed(settings.seed)
    training, validation = load_examples(settings)
    _check_validation(settings, validation)
    work_folder = _make_work_folder(settings.out)
    device, strategy = start_tensorflow(), training_strategy()
    input_range = choose_input_range(settings.backbone, settings.input_range)
    backbone_config = BackboneConfig(settings.backbone, settings.image_size, input_range)
    backbone = build_backbone(backbone_config, settings.backbone_weights)
    round_weights(backbone.weights)  # train on the features of the saved model
    if settings.fine_tune_from:
        place_of(settings.fine_tune_from, backbone)  # fails now if there is no such layer
    _, training = extract_all(training, backbone, backbone_config, _views(settings))
    _, validation = extract_all(validation, backbone, backbone_config)
    check_each_set(settings, training, validation)

    vocabulary = _vocabulary(settings, training)
    styles = styles_of(training)
    tokens = token_table(training, vocabulary, settings.max_length, styles)
    decoder_config = _decoder_config(settings, vocabulary, backbone, styles)
    config = ModelConfig(FORMAT_VERSION, backbone_config, decoder_config)
    with strategy.scope(), computing_in(precision_of(settings.precision)):
        decoder = build_decoder(config.decoder)
    counts = np.bincount(tokens[:, :, 1:].ravel(), minlength=len(vocabulary))
    decoder.output_logits.bias.assign(log_frequencies(counts))
    captioner = TensorFlowCaptioner(config, vocabulary, backbone, decoder)

    record = Record(_run_digest(settings, backbone, training, validation))
    log.info(
        "training on %s: %d photos with %d captions, validation on %d; %d words, %.1f M weights",
        f"{strategy.num_replicas_in_sync} x {device}",
        len(training),
        sum(len(example.captions) for example in training),
        len(validation),
        len(vocabulary),
        decoder.count_params() / 1e6,
    )
    setups = _phase_setups(settings, captioner, training, validation, tokens, strategy, work_folder)
    was_kept: dict[str, bool] = {}
    for phase, batches, validator in setups:
        trainer = Trainer(settings, phase, batches, strategy, work_folder, record)
        record = trainer.run(validator)
        was_kept[phase.name] = record.best_epoch > record.before
    return _write_model(settings, captioner, record, was_kept, work_folder, training, validation)


def _phase_setups(
    settings: TrainSettings,
    captioner: TensorFlowCaptioner,
    training: Sequence[Example],
    validation: Sequence[Example],
    tokens: Tokens,
    strategy: Any,
    work_folder: Path,
) -> Iterator[PhaseSetup]:
    """Yield the phases in turn; a phase's features are extracted when it begins.

    The last phase adapts the decoder to the features that it will mostly see: int8's, on CPUs.
    Its epochs are validated in float32, as the others are.
    """
    decoder, backbone, config = captioner.decoder, captioner.backbone, captioner.config.backbone

    names, data_sets = data_set_names(settings.annotations), numbers_of_sets(training)

    def batches(sight: Sight) -> TrainingBatches:
        return TrainingBatches(sight, tokens, data_sets, captioner.vocabulary, settings)

    def frozen(int8: Encoder | None = None) -> tuple[TrainingBatches, Validator]:
        views = _views(settings)
        validator = _validator(captioner, validation, names)
        cache, _ = extract_all(training, backbone, config, views, int8=int8)
        return batches(CachedFeatures(cache, training, views)), validator

    yield Likelihood(settings, decoder), *frozen()
    if settings.fine_tune_from:
        with strategy.scope():
            tuned = build_backbone(config, None, precision_of(settings.precision))
        tuned.set_weights(backbone.get_weights())
        train_after(settings.fine_tune_from, tuned)
        sight = AugmentedPhotos(training, config.image_size, settings.flip)
        features = _features_by(_extractor(tuned, config), validation, config)
        validator = Validator(captioner, validation, features, names)
        yield FineTuning(settings, decoder, tuned, config), batches(sight), validator
        backbone.set_weights(tuned.get_weights())
        round_weights(backbone.weights)
    if settings.objective is Objective.CIDER:
        int8 = _int8_encoder(captioner, _graphs(captioner, work_folder, training))
        yield SelfCritical(settings, decoder, tokens, data_sets), *frozen(int8)


def _extractor(backbone: keras.Model, config: BackboneConfig) -> Extract:
    """Return an extractor of features with a backbone that is still changing."""
    return tf.function(
        partial(extract_features, backbone, config), reduce_retracing=True, autograph=False
    )


def _features_by(extract: Extract, examples: Sequence[Example], config: BackboneConfig) -> Features:
    return lambda start, stop: extract(load_pixels(examples[start:stop], config.image_size))


def _check_validation(settings: TrainSettings, validation: Sequence[Example]) -> None:
    """Check that each data set has enough photos to choose an epoch by CIDEr-D."""
    if settings.monitor is not Monitor.CIDER_D:
        return
    for name, count in zip(
        data_set_names(settings.annotations), np.bincount(numbers_of_sets(validation)), strict=True
    ):
        if count == 1:
            raise UsageError(
                f"{name} has one validation photo, and CIDEr-D of a single photo is always 0: hold "
                "out more photos, or use --monitor loss"
            )
        if count < FEW_VALIDATION_PHOTOS:
            log.warning(
                "CIDEr-D of the %d validation photos of %s is uncertain: hold out %d or more, or "
                "use --monitor loss",
                count,
                name,
                FEW_VALIDATION_PHOTOS,
            )


def _views(settings: TrainSettings) -> tuple[View, ...]:
    return training_views(settings.flip, settings.crops)


def _vocabulary(settings: TrainSettings, training: Sequence[Example]) -> Vocabulary:
    captions = [words for example in training for words in example.captions]
    vocabulary = Vocabulary.build(captions, settings.vocabulary_size, settings.min_count)
    if len(vocabulary) == len(SPECIAL_WORDS):
        raise InputError(
            f"no word occurs {settings.min_count} times in "
            f"{', '.join(map(str, settings.annotations))}: lower --min-count"
        )
    return vocabulary


def _make_work_folder(out: Path) -> Path:
    """Create the hidden directory beside the model directory: fails before hours of work."""
    folder = out.with_name(f".{out.name}.training")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot create {folder}: {error.strerror}; choose another --out"
        ) from error
    return folder


def _decoder_config(
    settings: TrainSettings,
    vocabulary: Vocabulary,
    backbone: keras.Model,
    styles: tuple[str, ...],
) -> DecoderConfig:
    rows, columns, channels = backbone.output_shape[1:]
    return DecoderConfig(
        vocabulary_size=len(vocabulary),
        grid_cells=rows * columns,
        feature_size=channels,
        max_length=settings.max_length,
        units=settings.units,
        layers=settings.layers,
        heads=settings.heads,
        key_size=settings.key_size,
        dropout=settings.dropout,
        input_dropout=settings.input_dropout,
        feature_norm=settings.feature_norm,
        styles=styles,
    )


def _run_digest(
    settings: TrainSettings,
    backbone: keras.Model,
    training: Sequence[Example],
    validation: Sequence[Example],
) -> str:
    """Hash everything that must be equal to resume: most settings, backbone weights, all data."""
    ignored = {
        "annotations",
        "images",
        "out",
        "validation_annotations",
        "backbone_weights",
        "data_note",
    }
    compared = {name: value for name, value in asdict(settings).items() if name not in ignored}
    digest = hashlib.sha256(json.dumps(compared, sort_keys=True).encode())
    digest.update(weights_digest(backbone).encode())
    for side in (training, validation):
        digest.update(f"{len(side)} photos\n".encode())
        for example in side:
            rest = f"{example.captions} {example.styles} {example.data_set}"
            digest.update(f"{example.sha256} {rest}\n".encode())
    return digest.hexdigest()


def _about_set(
    number: int,
    name: str,
    results: dict[str, float],
    training: Sequence[Example],
    validation: Sequence[Example],
) -> dict[str, Any]:
    """Return the part of `metrics.json` about one data set; with results if there are several."""
    about = {
        "name": name,
        "training_photos": sum(example.data_set == number for example in training),
        "validation_photos": sum(example.data_set == number for example in validation),
    }
    own = {key: results[f"{name}_{key}"] for key in RESULTS if f"{name}_{key}" in results}
    return about | ({"validation": own} if own else {})


def _graphs(
    captioner: TensorFlowCaptioner, work_folder: Path, training: Sequence[Example]
) -> Graphs:
    """Return the encoder's graphs, with int8's if NNCF is installed: the same when resumed."""
    made_for = f"{captioner.config.backbone} {weights_digest(captioner.backbone)}"
    with suppress(ModelError):  # damaged, or of another backbone
        if (known := read_graphs(work_folder, made_for)) is not None:
            return known
    graphs = export_encoder(captioner)
    if not can_quantise():
        return graphs
    weights = get_weights(captioner.backbone, captioner.decoder)
    photos = [example.path for example in training]
    graphs = quantised(graphs, weights, captioner.config, photos)
    write_graphs(work_folder / ENCODER_FILE, made_for, graphs)
    return graphs


def _int8_encoder(captioner: TensorFlowCaptioner, graphs: Graphs) -> Encoder | None:
    return Encoder(graphs, {}, captioner.config, Precision.INT8) if INT8 in graphs else None


def _validator(
    captioner: TensorFlowCaptioner,
    validation: Sequence[Example],
    names: Sequence[str],
    int8: Encoder | None = None,
) -> Validator:
    """Return a validator on cached features, of float32 or of int8."""
    backbone, config = captioner.backbone, captioner.config.backbone
    cache, _ = extract_all(validation, backbone, config, int8=int8)
    return Validator(captioner, validation, CachedFeatures(cache, validation).whole, names)


def _int8_cider_d(
    captioner: TensorFlowCaptioner,
    graphs: Graphs,
    validation: Sequence[Example],
    names: Sequence[str],
) -> dict[str, float] | None:
    """Return CIDEr-D per data set, or None if there is no int8 backbone."""
    int8 = _int8_encoder(captioner, graphs)
    if int8 is None:
        log.info("the model gets no int8 backbone for CPUs: pip install 'batchcap[train]'")
        return None
    results = _validator(captioner, validation, names, int8).results()
    return {name: results.get(f"{name}_cider_d", results["cider_d"]) for name in names}


def _write_model(
    settings: TrainSettings,
    captioner: TensorFlowCaptioner,
    record: Record,
    was_kept: dict[str, bool],
    work_folder: Path,
    training: Sequence[Example],
    validation: Sequence[Example],
) -> Path:
    """Save the model, and validate it as it is loaded, with rounded weights."""
    unfinished = work_folder / "model"
    shutil.rmtree(unfinished, ignore_errors=True)
    save_captioner(captioner, unfinished)
    stored = load_for_tensorflow(unfinished)
    graphs = _graphs(captioner, work_folder, training)
    write_graphs(unfinished / ENCODER_FILE, fingerprint(unfinished), graphs)
    names = data_set_names(settings.annotations)
    results = _validator(stored, validation, names).results()
    metrics = {
        "validation": {key: results[key] for key in RESULTS},
        "data_sets": [
            _about_set(number, name, results, training, validation)
            for number, name in enumerate(names)
        ],
        "int8_cider_d": _int8_cider_d(stored, graphs, validation, names),
        "decoding": "greedy",
        "signature": signature(
            profile_of(TokenKind.WORDS).described, [example.captions for example in validation]
        ),
        "best_epoch": record.best_epoch,
        "phases": [name for name, kept in was_kept.items() if kept],
        "phases_not_kept": [name for name, kept in was_kept.items() if not kept],
        "epochs": len(record.history),
        "seconds": sum(row["seconds"] for row in record.history),
        "seed": settings.seed,
        "training_photos": len(training),
        "validation_photos": len(validation),
    }
    (unfinished / METRICS_FILE).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    write_card(unfinished / CARD_FILE, captioner.config, settings, metrics)
    for name in (HISTORY_FILE, CURVES_FILE):
        shutil.copy(work_folder / name, unfinished / name)
    try:
        unfinished.rename(settings.out)
    except OSError as error:
        raise OutputError(
            f"cannot move {unfinished} to {settings.out}: {error.strerror}"
        ) from error
    shutil.rmtree(work_folder)
    return settings.out
