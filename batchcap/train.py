"""Verb: fit a captioner to annotated photos, and write it as a model directory.

Work in progress lives in a hidden folder beside the model (`.NAME.training`): checkpoints, and the
history as CSV and picture. The same command goes on from there; the model appears when it is done.
"""

import csv
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import einops
import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf
from safetensors import safe_open
from safetensors.numpy import save_file

from batchcap.contracts import OutputError, UsageError
from batchcap.metrics import score_captions, signature
from batchcap.model.backbones import build_backbone
from batchcap.model.captioner import Captioner, Weights, save_captioner
from batchcap.model.config import (
    CARD_FILE,
    METRICS_FILE,
    BackboneConfig,
    DecoderConfig,
    DecodeSettings,
    ModelConfig,
)
from batchcap.model.network import BANNED_IDS, CaptionDecoder, build_decoder, log_frequencies
from batchcap.model.text import PADDING_ID, UNKNOWN_ID, Vocabulary, join_words, segment
from batchcap.model_card import write_card
from batchcap.progress import progress
from batchcap.settings import Decay, Monitor, TrainSettings
from batchcap.training_data import (
    Example,
    Features,
    TrainingBatches,
    extract_all,
    load_examples,
    token_table,
    trim,
)

HISTORY_FILE = "history.csv"
CURVES_FILE = "history.png"
CHECKPOINT_FILE = "checkpoint.safetensors"
SECONDS_BETWEEN_CHECKPOINTS = 120.0
SAMPLE_TEMPERATURES = (0.0, 0.5, 1.0)
VALIDATION_BATCH = 50

log = logging.getLogger(__name__)


@dataclass
class Record:
    """Where training is: all of it but the numbers of the network and the optimizer."""

    run: str
    step: int = 0
    best_epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


def train_captioner(settings: TrainSettings) -> Path:
    """Train, or go on training, and write the model directory `settings.out`.

    Raises:
        UsageError: the model exists, or its unfinished training had other settings or data.
        InputError: annotations or photos.
        ModelError: the backbone or its weights.
    """
    if settings.out.exists():
        raise UsageError(f"{settings.out} exists already: choose another --out, or delete it")
    score_captions([["a"]], [[["a"]]])  # says now, not after an epoch, that the scorers are missing
    keras.utils.set_random_seed(settings.seed)
    training, validation = load_examples(settings)
    backbone_config = BackboneConfig(settings.backbone, settings.image_size, settings.input_range)
    backbone = build_backbone(backbone_config, settings.backbone_weights)
    cache, training = extract_all(training, backbone, backbone_config, mirrored=settings.flip)
    cache, validation = extract_all(validation, backbone, backbone_config, mirrored=False)

    captions = [words for example in training for words in example.captions]
    vocabulary = Vocabulary.build(captions, settings.vocabulary_size, settings.min_count)
    tokens = token_table(training, vocabulary, settings.max_length)
    config = ModelConfig(backbone_config, _decoder_config(settings, vocabulary, cache.row_shape))
    decoder = build_decoder(config.decoder)
    counts = np.bincount(tokens[:, :, 1:].ravel(), minlength=len(vocabulary))
    decoder.output_logits.bias.assign(log_frequencies(counts))
    captioner = Captioner(config, vocabulary, backbone, decoder)

    batches = TrainingBatches(
        Features(cache, training, settings.flip), tokens, vocabulary, settings
    )
    judge = Judge(captioner, validation, Features(cache, validation, mirrored=False))
    trainer = Trainer(settings, captioner, batches, _run_digest(settings, training, validation))
    log.info(
        "training on %d photos with %d captions, judged on %d photos; %d words, %.1f M weights",
        *(len(training), len(captions), len(validation), len(vocabulary)),
        sum(variable.numpy().size for variable in decoder.trainable_variables) / 1e6,
    )
    trainer.run(judge)
    return _write_model(settings, trainer, judge)


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
    )


def _run_digest(
    settings: TrainSettings, training: Sequence[Example], validation: Sequence[Example]
) -> str:
    """What must be equal for training to go on: every setting but places, and all the data."""
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
    for example in (*training, *validation):
        digest.update(f"{example.sha256} {example.captions}\n".encode())
    return digest.hexdigest()


class Judge:
    """Validation: loss, accuracy and caption metrics on held-out photos, and sample captions."""

    def __init__(
        self, captioner: Captioner, examples: Sequence[Example], features: Features
    ) -> None:
        self.captioner, self.examples, self.features = captioner, examples, features
        limit = captioner.config.decoder.max_length
        self.tokens = token_table(examples, captioner.vocabulary, limit)
        self.references = [example.captions for example in examples]
        self._loss = loss_function(captioner.decoder, label_smoothing=0.0)

    def results(self) -> dict[str, float]:
        """`val_loss`, `val_accuracy` of known captions, and metrics (times 100) of greedy ones."""
        sums = np.zeros(3)
        hypotheses: list[list[str]] = []
        for start in range(0, len(self.examples), VALIDATION_BATCH):
            features = self._features(start)
            tokens = self.tokens[start : start + VALIDATION_BATCH]
            rows = len(tokens)
            tokens = np.pad(trim(tokens), ((0, VALIDATION_BATCH - rows), (0, 0), (0, 0)))
            sums += np.array(self._loss(features, tokens, training=False)[1])
            hypotheses += self._captions(features, 0.0)[:rows]
        loss, correct, count = sums
        scores = score_captions(
            [segment(join_words(words)) for words in hypotheses], self.references
        )
        return {"val_loss": loss / count, "val_accuracy": correct / count} | scores

    def samples(self) -> list[str]:
        """Captions of the first validation photo, at rising temperatures."""
        features = self._features(0)
        return [
            f"{self.examples[0].image_id}, temperature {temperature}: "
            + " ".join(self._captions(features, temperature)[0])
            for temperature in SAMPLE_TEMPERATURES
        ]

    def _features(self, start: int) -> npt.NDArray[np.float32]:
        features = self.features[self.features.plain[start : start + VALIDATION_BATCH]]
        return np.pad(features, ((0, VALIDATION_BATCH - len(features)), (0, 0), (0, 0)))

    def _captions(self, features: npt.NDArray[np.float32], temperature: float) -> list[list[str]]:
        limit = self.captioner.config.decoder.max_length
        settings = DecodeSettings(max_length=limit, temperature=temperature)
        live = np.ones(len(features), np.bool_)
        keys = [str(row) for row in range(len(features))]
        decoded = self.captioner.caption_features(features, live, settings, keys)
        rows = zip(decoded.tokens, decoded.lengths, strict=True)
        return [self.captioner.vocabulary.decode(ids[:length]) for ids, length in rows]


def loss_function(decoder: CaptionDecoder, label_smoothing: float) -> Any:
    """Masked cross entropy of captions given features.

    Padding and [UNK] count nothing: the one is no word, the other can't be said. With label
    smoothing (Szegedy et al. 2016, section 7) over the words that can be said.

    Returns:
        a compiled function of features `float32[B, G, D]` and captions `int32[B, C, T + 1]` to the
        mean loss in nats, `float32[]`, and `float32[3]`: the sum of unsmoothed losses, the number
        of words predicted right, the number of words.
    """
    allowed = np.ones(decoder.config.vocabulary_size, np.float32)
    allowed[list(BANNED_IDS)] = 0

    @tf.function(reduce_retracing=True)
    def loss(features: Any, captions: Any, training: bool) -> tuple[Any, Any]:
        captions = einops.rearrange(captions, "b c t -> (b c) t")
        inputs, labels = captions[:, :-1], captions[:, 1:]
        logits = decoder(inputs, decoder.keys_values(features), training=training)
        log_probs = tf.nn.log_softmax(logits)
        nll = -tf.gather(log_probs, labels, batch_dims=2)
        counted = tf.cast((labels != PADDING_ID) & (labels != UNKNOWN_ID), tf.float32)
        count = tf.reduce_sum(counted)
        nll_sum = tf.reduce_sum(nll * counted)
        right = tf.cast(tf.argmax(logits, -1, tf.int32) == labels, tf.float32)
        sums = tf.stack([nll_sum, tf.reduce_sum(right * counted), count])
        mean = nll_sum / tf.maximum(count, 1)
        if label_smoothing:
            uniform = -tf.reduce_sum(log_probs * allowed, axis=-1) / allowed.sum()
            smooth = tf.reduce_sum(uniform * counted) / tf.maximum(count, 1)
            mean = (1 - label_smoothing) * mean + label_smoothing * smooth
        return mean, sums

    return loss


class Trainer:
    """The steps, epochs and checkpoints of one training."""

    def __init__(
        self, settings: TrainSettings, captioner: Captioner, batches: TrainingBatches, run: str
    ) -> None:
        self.settings, self.captioner, self.batches = settings, captioner, batches
        self.decoder = captioner.decoder
        self.steps_per_epoch = settings.steps_per_epoch or batches.steps_per_pass
        self.optimizer = keras.optimizers.Adam(self._learning_rate())
        self.optimizer.build(self.decoder.trainable_variables)
        self.sums = tf.Variable(tf.zeros(3))  # read once an epoch: no round trip inside a step
        self.folder = settings.out.with_name(f".{settings.out.name}.training")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.record = Record(run)
        self.best: Weights = {}
        self._step = self._compile_step()

    def run(self, judge: Judge) -> None:
        """Train to the last epoch, or until `patience` epochs brought nothing better."""
        self._restore()
        while not self._finished():
            epoch = len(self.record.history) + 1
            started = time.monotonic() - self.record.seconds
            with progress(f"epoch {epoch}", self.steps_per_epoch, "step") as bar:
                bar.update(self.record.step % self.steps_per_epoch)
                self._train_epoch(epoch, started, bar)
            self._close_epoch(epoch, started, judge)
            self._checkpoint()

    def _train_epoch(self, epoch: int, started: float, bar: Any) -> None:
        saved = time.monotonic()
        for features, captions in self._batches(self.record.step, epoch * self.steps_per_epoch):
            self._step(features, captions)
            self.record.step += 1
            bar.update(1)
            if time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                self.record.seconds = time.monotonic() - started
                self._checkpoint()
                saved = time.monotonic()

    def _batches(self, start: int, stop: int) -> Iterator[tuple[Any, Any]]:
        features, captions = self.batches[start]
        kinds = (tf.float32, tf.int32)
        shapes = (features.shape, (*captions.shape[:2], None))

        def batch(step: Any) -> Any:
            arrays = tf.numpy_function(lambda step: self.batches[int(step)], [step], kinds)
            return tuple(tf.ensure_shape(a, s) for a, s in zip(arrays, shapes, strict=True))

        steps = tf.data.Dataset.range(start, stop)
        return iter(steps.map(batch, num_parallel_calls=2, deterministic=True).prefetch(2))

    def _close_epoch(self, epoch: int, started: float, judge: Judge) -> None:
        loss, correct, count = self.sums.numpy()
        self.sums.assign(tf.zeros(3))
        row = {"epoch": epoch, "loss": loss / count, "accuracy": correct / count} | judge.results()
        row |= {
            "learning_rate": float(self.optimizer.learning_rate.numpy()),
            "seconds": time.monotonic() - started,
        }
        self.record.history.append({name: float(value) for name, value in row.items()})
        self.record.seconds = 0.0
        if self._value(row) >= max(map(self._value, self.record.history)):
            self.record.best_epoch = epoch
            self.best = {v.path: v.numpy() for v in self.decoder.trainable_variables}
        log.info(
            "epoch %d: %.0f s, loss %.3f, accuracy %.3f; validation loss %.3f, accuracy %.3f, "
            "BLEU-4 %.1f, CIDEr-D %.1f%s",
            *(epoch, row["seconds"], row["loss"], row["accuracy"], row["val_loss"]),
            *(row["val_accuracy"], row["bleu_4"], row["cider_d"]),
            " (best)" if self.record.best_epoch == epoch else "",
        )
        for sample in judge.samples():
            log.info("%s", sample)
        write_history(self.record.history, self.folder)

    def _value(self, row: dict[str, float]) -> float:
        return row["cider_d"] if self.settings.monitor is Monitor.CIDER_D else -row["val_loss"]

    def _finished(self) -> bool:
        done = len(self.record.history)
        no_better = done - self.record.best_epoch >= self.settings.patience
        return done >= self.settings.epochs or (done > 0 and no_better)

    def _learning_rate(self) -> Any:
        peak, warmup = self.settings.learning_rate, self.settings.warmup_steps
        if self.settings.decay is Decay.CONSTANT and not warmup:
            return peak
        steps = self.settings.epochs * self.steps_per_epoch
        return keras.optimizers.schedules.CosineDecay(
            initial_learning_rate=0.0 if warmup else peak,
            decay_steps=max(steps - warmup, 1),
            alpha=0.0 if self.settings.decay is Decay.COSINE else 1.0,
            warmup_target=peak if warmup else None,
            warmup_steps=warmup,
        )

    def _compile_step(self) -> Any:
        loss = loss_function(self.decoder, self.settings.label_smoothing)
        variables = self.decoder.trainable_variables

        @tf.function(reduce_retracing=True)
        def step(features: Any, captions: Any) -> None:
            with tf.GradientTape() as tape:
                mean, sums = loss(features, captions, training=True)
            self.optimizer.apply(tape.gradient(mean, variables), variables)
            self.sums.assign_add(sums)

        return step

    def _state(self) -> dict[str, Any]:
        variables = {
            "decoder": self.decoder.variables,
            "optimizer": self.optimizer.variables,
            "sums": [self.sums],
        }
        return {f"{part}/{i}": v for part, group in variables.items() for i, v in enumerate(group)}

    def _checkpoint(self) -> None:
        """Save everything; a crash at any moment leaves the last checkpoint whole."""
        arrays = {name: np.asarray(variable) for name, variable in self._state().items()}
        arrays |= {f"best/{name}": value for name, value in self.best.items()}
        path = self.folder / CHECKPOINT_FILE
        with replacing(path) as temporary:
            save_file(arrays, temporary, metadata={"record": json.dumps(asdict(self.record))})

    def _restore(self) -> None:
        path = self.folder / CHECKPOINT_FILE
        if not path.exists():
            return
        with safe_open(path, framework="numpy") as saved:
            record = Record(**json.loads(saved.metadata()["record"]))
            if record.run != self.record.run:
                raise UsageError(
                    f"{self.folder} holds a training with other settings or data: "
                    "go on with those, choose another --out, or delete it"
                )
            self.record = record
            for name, variable in self._state().items():
                variable.assign(saved.get_tensor(name))
            best = [name for name in saved.keys() if name.startswith("best/")]  # noqa: SIM118
            self.best = {name.removeprefix("best/"): saved.get_tensor(name) for name in best}
        log.info("going on from %s: %d steps done", self.folder, record.step)


def write_history(history: list[dict[str, float]], folder: Path) -> None:
    """Epoch by epoch results as `history.csv` and, drawn, `history.png`."""
    from matplotlib.figure import Figure

    with replacing(folder / HISTORY_FILE) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(history[0]))
        writer.writeheader()
        writer.writerows(history)
    figure = Figure(figsize=(12, 4), layout="constrained")
    panels = {
        "loss (nats a word)": ("loss", "val_loss"),
        "share of words right": ("accuracy", "val_accuracy"),
        "validation metrics x100": ("cider_d", "bleu_4", "rouge_l"),
    }
    epochs = [row["epoch"] for row in history]
    for axes, (title, names) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for name in names:
            axes.plot(epochs, [row[name] for row in history], marker=".", label=name)
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
        axes.legend()
    with replacing(folder / CURVES_FILE) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that takes the place of `path`, synced, when the block ends well."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_model(settings: TrainSettings, trainer: Trainer, judge: Judge) -> Path:
    """The best epoch's weights, as stored in float16, judged once more and written."""
    captioner, record = trainer.captioner, trainer.record
    unfinished = trainer.folder / "model"
    shutil.rmtree(unfinished, ignore_errors=True)
    for variable in captioner.decoder.trainable_variables:
        variable.assign(trainer.best[variable.path].astype(np.float16))
    save_captioner(captioner, unfinished)
    metrics = {
        "validation": judge.results(),
        "decoding": "greedy",
        "signature": signature(judge.references),
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
