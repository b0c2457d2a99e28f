"""The documents are true: flags, columns, reasons, recipes, commands."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers.commands import batchcap_here
from helpers.places import ROOT

from batchcap.cli import batchcap
from batchcap.schema import ARROW_SCHEMA, ErrorType
from batchcap.settings import Decay, Monitor, TrainSettings

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "jobs").glob("*.md"))]
# Commands that need a store, a cluster, archives, weights or minutes: only flags are checked.
NOT_HERE = ("s3://", "--engine ray", "photos-", " train ", " bench ", "my-model")
CAPTIONS = "{name}#0 一只 猫\n{name}#1 一只猫 在 睡觉\n"
DATA = ["--annotations", "captions.txt", "--images", "images"]
JOBS = sorted((ROOT / "jobs").glob("train-*.toml"))


def asked_of_train(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> TrainSettings:
    seen: list[TrainSettings] = []
    monkeypatch.setattr("batchcap.training.train.train_captioner", seen.append)
    result = CliRunner().invoke(batchcap, ["train", "--out", "model", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return seen[0]


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_a_recipe_opens_with_what_it_does_and_is_accepted(
    job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert job.read_text(encoding="utf-8").startswith("# ")
    data = [] if "\nannotations = " in job.read_text(encoding="utf-8") else DATA
    assert asked_of_train(monkeypatch, "--config", job, *data).vocabulary_size > 0


def test_notebook_recipe_has_the_settings_of_the_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    job = ROOT / "jobs" / "train-notebook.toml"
    settings = asked_of_train(monkeypatch, "--config", job, *DATA)
    assert settings.input_range == (0, 1)
    assert (settings.units, settings.layers, settings.heads, settings.key_size) == (256, 2, 2, 256)
    assert (settings.dropout, settings.learning_rate, settings.decay) == (0.5, 1e-4, Decay.CONSTANT)
    assert (settings.feature_norm, settings.input_dropout, settings.ema_momentum) == (False, 0, 0)
    assert (settings.max_length, settings.steps_per_epoch, settings.patience) == (50, 5000, 5)
    assert (settings.monitor, settings.flip, settings.warmup_steps) == (Monitor.LOSS, False, 0)


def test_readme_lists_the_columns_of_the_schema() -> None:
    table = README.split("| column | meaning |")[1].split("\n\n")[0]
    first_cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert re.findall(r"`(\w+)`", " ".join(first_cells)) == ARROW_SCHEMA.names


def test_the_readme_names_every_reason() -> None:
    for reason in ErrorType:
        assert f"`{reason}`" in README


@pytest.fixture(scope="module")
def shown() -> str:
    """Return the help of all commands."""
    return "".join(
        CliRunner().invoke(batchcap, [verb, "--help"]).output
        for verb in ("run", "merge", "train", "evaluate", "export", "report", "caption", "bench")
    )


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def commands_of(document: Path) -> list[str]:
    """Return the shell lines that run batchcap, without comments."""
    blocks = re.findall(r"```sh\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)
    lines = [re.sub(r"\s#.*", "", line).strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if re.search(r"(^|[ /|])batchcap ", line)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_every_flag_in_a_document_exists(document: Path, shown: str) -> None:
    for command in commands_of(document):
        for flag in re.findall(r"(?<=\s)--[a-z-]+", command.partition("batchcap ")[2]):
            assert flag in shown, (command, flag)


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_files_that_a_document_names_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for name in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (document.parent / name).exists(), name
    for name in re.findall(r"`(jobs/[\w.-]+|tests/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_links_into_documents_lead_to_headings(document: Path) -> None:
    for name, anchor in re.findall(
        r"\]\(([^)#:]+\.md)#([^)]+)\)", document.read_text(encoding="utf-8")
    ):
        text = (document.parent / name).read_text(encoding="utf-8")
        headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_the_commands_of_a_document_work(
    document: Path, tmp_path: Path, photos_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(photos_folder, tmp_path / "images")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "photos").symlink_to(photos_folder)
    names = [str(path.relative_to(photos_folder)) for path in photos_folder.rglob("*.jpg")]
    references = "".join(CAPTIONS.format(name=name) for name in names)
    (tmp_path / "references.txt").write_text(references, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for command in commands_of(document):
        if command.startswith("batchcap ") and not any(part in command for part in NOT_HERE):
            done = batchcap_here(*shlex.split(command)[1:])
            assert done.returncode == 0, (command, done.stderr)


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200
