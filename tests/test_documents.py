"""What the documents say is so: flags, columns, reasons, recipes."""

import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from helpers.places import ROOT

from batchcap.cli import batchcap
from batchcap.schema import ARROW_SCHEMA, ErrorType
from batchcap.settings import Decay, Monitor, TrainSettings

README = (ROOT / "README.md").read_text(encoding="utf-8")
JOBS = sorted((ROOT / "jobs").glob("train-*.toml"))


def asked_of_train(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> TrainSettings:
    seen: list[TrainSettings] = []
    monkeypatch.setattr("batchcap.training.train.train_captioner", seen.append)
    required = ["--annotations", "captions.txt", "--images", "images", "--out", "model"]
    result = CliRunner().invoke(batchcap, ["train", *required, *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return seen[0]


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_a_recipe_opens_with_what_it_does_and_is_accepted(
    job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert job.read_text(encoding="utf-8").startswith("# ")
    assert asked_of_train(monkeypatch, "--config", job).vocabulary_size > 0


def test_the_notebook_s_recipe_is_the_notebook_s(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = asked_of_train(monkeypatch, "--config", ROOT / "jobs" / "train-notebook.toml")
    assert settings.input_range == (0, 1)
    assert (settings.units, settings.layers, settings.heads, settings.key_size) == (256, 2, 2, 256)
    assert (settings.dropout, settings.learning_rate, settings.decay) == (0.5, 1e-4, Decay.CONSTANT)
    assert (settings.feature_norm, settings.input_dropout, settings.ema_momentum) == (False, 0, 0)
    assert (settings.max_length, settings.steps_per_epoch, settings.patience) == (50, 5000, 5)
    assert (settings.monitor, settings.flip, settings.warmup_steps) == (Monitor.LOSS, False, 0)


def test_the_readme_s_columns_are_the_schema_s() -> None:
    table = README.split("| column | meaning |")[1].split("\n\n")[0]
    first_cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert re.findall(r"`(\w+)`", " ".join(first_cells)) == ARROW_SCHEMA.names


def test_the_readme_names_every_reason() -> None:
    for reason in ErrorType:
        assert f"`{reason}`" in README


def test_every_flag_in_the_readme_exists() -> None:
    shown = "".join(
        CliRunner().invoke(batchcap, [verb, "--help"]).output
        for verb in ("run", "merge", "train", "evaluate", "export", "report", "caption")
    )
    commands = [line for line in README.splitlines() if "batchcap " in line]
    flags: set[Any] = set(re.findall(r"(?<=\s)--[a-z-]+", " ".join(commands)))
    docker = {"--rm"}
    assert flags - docker
    for flag in flags - docker:
        assert flag in shown, flag


def test_files_that_the_readme_names_exist() -> None:
    for name in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`(jobs/[\w.-]+|tests/[\w./-]+)`", README):
        assert (ROOT / name).exists(), name
