"""The command line: light help, precedence of settings, exit codes, no tracebacks."""

import codecs
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from batchcap import __version__
from batchcap.cli import batchcap, main
from batchcap.errors import ModelError
from batchcap.model.vocabulary import Vocabulary
from batchcap.settings import (
    DEFAULT_MODEL,
    BenchSettings,
    CaptionSettings,
    EvaluateSettings,
    ExportSettings,
    ReportSettings,
    RunSettings,
    TrainSettings,
)
from batchcap.training.model_card import describe, read_card

VERBS = ("run", "merge", "train", "evaluate", "export", "report", "caption", "bench", "model")


def invoke(*arguments: object, **environment: str) -> Any:
    return CliRunner().invoke(batchcap, [*map(str, arguments)], env=environment)


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_a_verb_and_loads_no_tensorflow(verb: str) -> None:
    program = (
        "import sys, batchcap.cli as cli\n"
        "try: cli.main([sys.argv[1], '--help'])\n"
        "finally: assert 'tensorflow' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, verb], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Usage: batchcap {verb}")


def test_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "batchcap", "--version"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"batchcap, version {__version__}\n")


def test_files_never_get_the_number_of_a_closed_stream() -> None:
    """Otherwise libraries' messages on stderr could go into the output."""
    program = (
        "import os, batchcap.cli as cli\n"
        "try: cli.main(['no-such-verb'])\n"
        "finally: assert os.open(os.devnull, os.O_RDONLY) > 2\n"
    )
    command = 'exec "$0" -c "$1" <&- >&- 2>&-'
    done = subprocess.run(["sh", "-c", command, sys.executable, program], check=False)
    assert done.returncode == 2


def test_names_of_files_do_not_depend_on_the_locale() -> None:
    program = (
        "import os, sys\n"
        "from batchcap.cli import main\n"
        "try: main(['--version'])\n"
        "finally: print(ascii(os.fsdecode(b'\\xe7\\x8b\\x97')), sys.stdout.encoding)\n"
    )
    locale = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | locale,
    )
    assert done.stdout.splitlines()[-1] == r"'\u72d7' ascii"


def test_version_is_that_of_the_package() -> None:
    assert __version__ in invoke("--version").output


@pytest.mark.parametrize(
    ("verb", "settings"),
    [
        ("run", RunSettings),
        ("train", TrainSettings),
        ("evaluate", EvaluateSettings),
        ("export", ExportSettings),
        ("report", ReportSettings),
        ("caption", CaptionSettings),
        ("bench", BenchSettings),
    ],
)
def test_every_setting_is_a_flag_with_a_help_text(verb: str, settings: type[Any]) -> None:
    shown = invoke(verb, "--help").output
    for spec in fields(settings):
        if "help" in spec.metadata:
            assert f"--{spec.name.replace('_', '-')}" in shown


def test_flag_beats_environment_beats_file_beats_default(
    asked_of_run: list[RunSettings], tmp_path: Path
) -> None:
    config = tmp_path / "nightly.toml"
    config.write_text("[run]\nbatch-size = 5\nseed = 6\ntemperature = 0.5\n[train]\nepochs = 3\n")
    arguments = ("run", "in", "out.parquet", "--config", config)
    result = invoke(
        *arguments, "--batch-size", 7, BATCHCAP_RUN_SEED="8", BATCHCAP_RUN_BATCH_SIZE="9"
    )
    assert result.exit_code == 0, result.output
    (settings,) = asked_of_run
    assert (settings.batch_size, settings.seed, settings.temperature) == (7, 8, 0.5)
    assert settings.attention == "summary"


def test_repeatable_flag_is_a_list_everywhere(
    asked_of_run: list[RunSettings], tmp_path: Path
) -> None:
    config = tmp_path / "nightly.toml"
    config.write_text('[run]\nexclude = ["raw", "my own"]\n')
    arguments = ("run", "in", "out.parquet")
    invoke(*arguments)
    invoke(*arguments, "--config", config)
    invoke(*arguments, "--config", config, BATCHCAP_RUN_EXCLUDE="tmp *.bak")
    invoke(*arguments, "--exclude", "a b", "--exclude", "c", BATCHCAP_RUN_EXCLUDE="tmp")
    config.write_text('[run]\nexclude = "raw"\n')
    invoke(*arguments, "--config", config)
    assert [settings.exclude for settings in asked_of_run] == [
        (),
        ("raw", "my own"),
        ("tmp", "*.bak"),
        ("a b", "c"),
        ("raw",),
    ]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_file_may_begin_with_a_byte_order_mark(
    asked_of_run: list[RunSettings], tmp_path: Path, encoding: str
) -> None:
    config = tmp_path / "nightly.toml"
    config.write_text("[run]\nbatch-size = 5\n", encoding=encoding)
    result = invoke("run", "in", "out.parquet", "--config", config)
    assert result.exit_code == 0, result.output
    assert asked_of_run[0].batch_size == 5


def test_an_unknown_setting_in_a_file_is_named(tmp_path: Path) -> None:
    config = tmp_path / "typo.toml"
    config.write_text("[run]\nbatch-sise = 5\n")
    result = invoke("run", "in", "out.parquet", "--config", config)
    assert result.exit_code == 2
    assert "[run] has no setting 'batch-sise'" in result.output


@pytest.mark.parametrize(
    ("toml", "named"),
    [
        ("batch-size = 5", "batch-size"),
        ("run = 5", "run"),
        ("[runs]\nbatch-size = 5", "runs"),
        ("[run]\nbatch-size = 2.7", "2.7"),
        ("[run]\nseed = true", "True"),
        ("[run]\nlimit = []", "limit"),
        ('[run]\nsource = "in"', "source"),
        ("[train]\nflip = 2", "flip"),
        ("[train]\ninput-range = 5", "input-range"),
    ],
)
def test_a_file_is_checked_like_flags(toml: str, named: str, tmp_path: Path) -> None:
    config = tmp_path / "nightly.toml"
    config.write_text(toml)
    train_flags = ("--annotations", "a", "--images", "i", "--out", tmp_path)
    arguments = ("train", *train_flags) if "train" in toml else ("run", "in", "out.parquet")
    result = invoke(*arguments, "--config", config)
    assert result.exit_code == 2, result.output
    assert named in result.output


def test_invalid_toml_file_is_named(tmp_path: Path) -> None:
    config = tmp_path / "broken.toml"
    config.write_text("[run\n")
    result = invoke("run", "in", "out.parquet", "--config", config)
    assert result.exit_code == 2
    assert str(config) in result.output


def exit_code(*arguments: object) -> Any:
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, arguments)])
    return stopped.value.code


def test_unexpected_failure_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_settings: RunSettings) -> None:
        raise ZeroDivisionError("of a kind")

    monkeypatch.setattr("batchcap.captioning.run.run_captioning", fail)
    assert exit_code("run", "in", "out.parquet") == 1
    message = capsys.readouterr().err
    assert message == "batchcap: unexpected ZeroDivisionError: of a kind (--verbose shows where)\n"


@pytest.mark.parametrize(
    "arguments", [("\x1b[2J",), ("run", "--\x9b2J"), ("model", "show", "\u202e\x1b[2J")]
)
def test_errors_quote_no_control_characters(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(*arguments) in (1, 2)
    message = capsys.readouterr().err
    assert "2J" in message
    assert message.replace("\n", "").isprintable()


def test_verbose_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = "from batchcap.cli import main; main()"
    arguments = ["run", tmp_path, tmp_path / "o.parquet", "--verbose"]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "no photo in" in done.stderr


def test_model_show_describes_the_shipped_model() -> None:
    shown = invoke("model", "show").output
    assert "fingerprint" in shown
    assert "efficientnet-lite2, 240 px" in shown
    assert "CIDEr-D" in shown


@pytest.mark.parametrize(
    "metrics",
    [
        "{",
        "[]",
        '{"validation": {}}',
        "\udcff",
        pytest.param('{"validation": {"bleu_1": 1' + "0" * 400 + "}}", id="vast"),
        pytest.param("[" * 10**5, id="deep"),
    ],
)
def test_damaged_metrics_are_named(metrics: str, tmp_path: Path) -> None:
    shutil.copytree(DEFAULT_MODEL, tmp_path / "model")
    path = tmp_path / "model" / "metrics.json"
    path.write_bytes(metrics.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelError, match=r"metrics\.json is damaged"):
        describe(tmp_path / "model")


def test_model_files_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    names = ("config.json", "vocabulary.txt", "metrics.json", "README.md", "model.safetensors")
    for name in names:
        mark = b"" if name == "model.safetensors" else codecs.BOM_UTF8
        (tmp_path / name).write_bytes(mark + (DEFAULT_MODEL / name).read_bytes())
    lines, expected = (describe(model).splitlines() for model in (tmp_path, DEFAULT_MODEL))
    assert lines[2:] == expected[2:]  # after the name and the fingerprint
    assert read_card(tmp_path) == read_card(DEFAULT_MODEL)
    assert Vocabulary.load(tmp_path / names[1]) == Vocabulary.load(DEFAULT_MODEL / names[1])


def test_model_card_names_data_licence_and_limits() -> None:
    card = invoke("model", "card").output
    assert "Flickr8k-CN" in card
    assert "non-commercial" in card
    assert "## Limits" in card


def test_directory_without_a_model_is_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("model", "show", tmp_path) == 1
    assert "is not a model directory" in capsys.readouterr().err
