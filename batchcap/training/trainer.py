"""Runs steps and epochs, and saves checkpoints: a killed training resumes exactly.

Work in progress is in a hidden directory beside the model directory: `.NAME.training`.
"""

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from batchcap.errors import InputError, UsageError
from batchcap.model.weights import Weights
from batchcap.process.progress import progress
from batchcap.settings import Monitor, TrainSettings
from batchcap.storage.files import replacing
from batchcap.training.data import TrainingBatches
from batchcap.training.history import write_history
from batchcap.training.phases import Phase
from batchcap.training.replicas import sum_variable
from batchcap.training.validation import Validator

SECONDS_BETWEEN_CHECKPOINTS = 120.0

log = logging.getLogger(__name__)


@dataclass
class Record:
    """State of a phase, apart from the network's and the optimizer's.

    before: number of epochs of earlier phases. history: includes earlier phases.
    """

    run: str
    step: int = 0
    best_epoch: int = 0
    before: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0


class Trainer:
    """Steps, epochs and checkpoints of one training phase.

    `previous` is the record of the previous phase, whose best weights are the starting point.

    Raises:
        UsageError: the GPUs cannot share batches equally.
    """

    def __init__(
        self,
        settings: TrainSettings,
        phase: Phase,
        batches: TrainingBatches,
        strategy: Any,
        folder: Path,
        previous: Record,
    ) -> None:
        replicas = strategy.num_replicas_in_sync
        if batches.batch_size % replicas:
            raise UsageError(
                f"--batch-size {batches.batch_size} does not divide among {replicas} GPUs: choose "
                f"a multiple of {replicas}"
            )
        self.settings, self.phase, self.batches = settings, phase, batches
        self.steps_per_epoch = settings.steps_per_epoch or batches.steps_per_pass
        with strategy.scope():
            self.optimizer = keras.optimizers.Adam(
                phase.learning_rate(self.steps_per_epoch),
                use_ema=settings.ema_momentum > 0,
                ema_momentum=settings.ema_momentum,
            )
            self.optimizer.build(phase.variables)
            self.sums = sum_variable(3)  # read once per epoch: no round trip in a step
        self.folder = folder
        history = list(previous.history)
        self.record = Record(previous.run, 0, previous.best_epoch, len(history), history)
        self.best = self._weights()
        self._step = phase.compile_step(strategy, self.optimizer, self.sums)

    def run(self, validator: Validator) -> Record:
        """Train to the phase's last epoch, or until `patience` epochs brought no better one.

        The weights are then those of this phase's best epoch or, if none was better, the initial
        ones.

        Raises:
            UsageError: the checkpoint is from another training.
            InputError: the checkpoint is damaged, or the loss diverged.
        """
        self._restore()
        while not self._finished():
            epoch = len(self.record.history) + 1
            started = time.monotonic() - self.record.seconds
            done = self.record.step % self.steps_per_epoch
            with progress(f"epoch {epoch}", self.steps_per_epoch, "step", done) as bar:
                self._train_epoch(epoch, started, bar)
            self._close_epoch(epoch, started, validator)
            self._checkpoint()
        for variable in self.phase.variables:
            variable.assign(self.best[variable.path])
        return self.record

    def _weights(self) -> Weights:
        return {variable.path: variable.numpy() for variable in self.phase.variables}

    def _train_epoch(self, epoch: int, started: float, bar: Any) -> None:
        saved = time.monotonic()
        stop = (epoch - self.record.before) * self.steps_per_epoch
        for batch in self._batches(self.record.step, stop):
            self._step(*batch)
            self.record.step += 1
            bar.update(1)
            if time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                self.record.seconds = time.monotonic() - started
                self._checkpoint()
                saved = time.monotonic()

    def _batches(self, start: int, stop: int) -> Iterator[tuple[Any, Any, Any]]:
        """Yield the batches of some steps, prepared ahead.

        Raises:
            InputError: a photo can't be read any more.
        """
        seen, captions, data_sets = self.batches[start]
        dtypes = (seen.dtype, captions.dtype, data_sets.dtype)
        shapes = (seen.shape, (*captions.shape[:2], None), data_sets.shape)
        failures: list[InputError] = []

        def make(step: Any) -> Any:
            try:
                return self.batches[int(step)]
            except InputError as error:
                failures.append(error)
                raise

        def batch(step: Any) -> Any:
            arrays = tf.numpy_function(make, [step], dtypes)
            return tuple(tf.ensure_shape(a, s) for a, s in zip(arrays, shapes, strict=True))

        steps = tf.data.Dataset.range(start, stop)
        try:
            yield from steps.map(batch, num_parallel_calls=2, deterministic=True).prefetch(2)
        except tf.errors.OpError as error:
            raise (failures or [error])[0] from None  # TensorFlow's message is a traceback

    def _close_epoch(self, epoch: int, started: float, validator: Validator) -> None:
        sums = self.sums.numpy()
        if not np.isfinite(sums[0]):
            raise InputError(f"the loss is not finite in epoch {epoch}: lower the learning rate")
        self.sums.assign(tf.zeros(3))
        measured = self.phase.measured(sums)
        row = {"epoch": epoch, **measured}
        with self._averaged_weights():
            row |= validator.results()
            samples = validator.samples()
            if all(self._value(row) > self._value(other) for other in self.record.history):
                self.record.best_epoch = epoch
                self.best = self._weights()
        row["learning_rate"] = float(self.optimizer.learning_rate.numpy())
        row["seconds"] = time.monotonic() - started
        self.record.history.append({name: float(value) for name, value in row.items()})
        self.record.seconds = 0.0
        log.info(
            "epoch %d: %.0f s, %s; validation: loss %.3f, accuracy %.3f, BLEU-4 %.1f, "
            "CIDEr-D %.1f%s%s",
            epoch,
            row["seconds"],
            ", ".join(f"{name} {value:.3f}" for name, value in measured.items()),
            row["val_loss"],
            row["val_accuracy"],
            row["bleu_4"],
            row["cider_d"],
            _of_sets(row, validator.names),
            " (best)" if self.record.best_epoch == epoch else "",
        )
        for sample in samples:
            log.info("%s", sample)
        write_history(self.record.history, self.folder)

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        """Assign the weights' moving average, if any; restore the last weights afterwards."""
        variables = self.phase.variables
        last = [variable.numpy() for variable in variables]
        self.optimizer.finalize_variable_values(variables)
        yield
        for variable, value in zip(variables, last, strict=True):
            variable.assign(value)

    def _value(self, row: dict[str, float]) -> tuple[float, float]:
        """Return a value that is highest for the best epoch; the loss breaks ties of CIDEr-D."""
        monitored = row["cider_d"] if self.settings.monitor is Monitor.CIDER_D else 0.0
        return monitored, -row["val_loss"]

    def _finished(self) -> bool:
        done = len(self.record.history) - self.record.before
        best = self.record.best_epoch - self.record.before
        no_better = done - max(best, 0) >= self.settings.patience
        return done >= self.phase.epochs or (done > 0 and no_better)

    @property
    def _checkpoint_file(self) -> Path:
        return self.folder / f"{self.phase.name}.safetensors"

    def _state(self) -> dict[str, Any]:
        variables = {
            "weights": self.phase.variables,
            "draws": self.phase.decoder.non_trainable_variables,  # seeds of dropout
            "optimizer": self.optimizer.variables,
            "sums": [self.sums],
        }
        return {f"{part}/{i}": v for part, group in variables.items() for i, v in enumerate(group)}

    def _checkpoint(self) -> None:
        """Save everything; a crash at any moment leaves the last checkpoint whole."""
        arrays = {name: np.asarray(variable.numpy()) for name, variable in self._state().items()}
        arrays |= {f"best/{name}": value for name, value in self.best.items()}
        path = self._checkpoint_file
        with replacing(path) as temporary:
            save_file(arrays, temporary, metadata={"record": json.dumps(asdict(self.record))})

    def _restore(self) -> None:
        path = self._checkpoint_file
        if not path.exists():
            return
        with self._open_checkpoint(path) as saved:
            record = Record(**json.loads(saved.metadata()["record"]))
            if record.run != self.record.run:
                raise UsageError(
                    f"{self.folder} holds a training with other settings or data: "
                    "use those, choose another --out, or delete it"
                )
            self.record = record
            for name, variable in self._state().items():
                variable.assign(saved.get_tensor(name))
            best = [name for name in saved.keys() if name.startswith("best/")]  # noqa: SIM118
            self.best = {name.removeprefix("best/"): saved.get_tensor(name) for name in best}
        log.info("resuming from %s: %d steps done", self.folder, record.step)

    def _open_checkpoint(self, path: Path) -> Any:
        try:
            return safe_open(path, framework="numpy")
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{path} is damaged ({error}): delete {self.folder} to start over"
            ) from error


def _of_sets(row: dict[str, float], names: Sequence[str]) -> str:
    """Return the CIDEr-D of each data set, if there are several."""
    if len(names) == 1:
        return ""
    values = [f"{name} {row[name + '_cider_d']:.1f}" for name in names]
    return f" ({', '.join(values)})"
