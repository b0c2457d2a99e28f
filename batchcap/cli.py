"""The command line: parse flags, call one function, print, exit.

Commands import their code when they are called, so that `--help` starts without TensorFlow.
"""

import io
import json
import logging
import os
import sys
import tomllib
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, NoReturn

import click

from batchcap import __version__
from batchcap.caption_files.records import read_bytes
from batchcap.errors import BatchcapError
from batchcap.model.runtime import start_tensorflow
from batchcap.process.ending import end, end_at_once
from batchcap.process.logs import configure_logging, log_event, writes_json
from batchcap.process.signals import Stopped, stop_on_signals
from batchcap.process.wording import printable_json, printable_lines
from batchcap.settings import (
    DEFAULT_MODEL,
    BenchSettings,
    CaptionSettings,
    EvaluateSettings,
    ExportSettings,
    LogFormat,
    MergeSettings,
    QuantiseSettings,
    ReportSettings,
    RunSettings,
    TrainSettings,
)
from batchcap.storage.remote import is_url, without_file_scheme

CONFIGURABLE_VERBS = ("run", "merge", "train", "evaluate", "export", "report", "caption", "bench")

log = logging.getLogger(__name__)

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code; no traceback unless `--verbose`."""
    _open_standard_streams()
    _read_names_as_utf8()
    stop_on_signals()
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        batchcap.main(arguments, prog_name="batchcap", standalone_mode=False)
        sys.exit(0)
    except click.ClickException as error:
        _show(error)
        sys.exit(error.exit_code)
    except click.Abort:  # asked for input, which we never do
        sys.exit(1)
    except Stopped as stop:
        _say("run_stopped", f"stopped by {stop.signal.name}", stop.exit_code)
        end_at_once(stop.exit_code)  # threads are still at work
    except Exception as error:
        if logging.getLogger().isEnabledFor(logging.DEBUG):
            log.debug("traceback", exc_info=True)
        end(_report(error))


def _open_standard_streams() -> None:
    """Open standard streams that the shell closed (`2>&-`) on the null device.

    Otherwise the next file opened, such as the output, would take a stream's number and receive
    what libraries print to it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # `open` takes the lowest free number, which is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if number and getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w", closefd=False))


def _read_names_as_utf8() -> None:
    """Restart in Python's UTF-8 mode where the locale has another encoding.

    Otherwise a photo's id would depend on the locale. Output to the terminal stays in its encoding.
    """
    if sys.getfilesystemencoding() == "utf-8":
        return
    os.environ["PYTHONUTF8"] = "1"
    os.environ.setdefault("PYTHONIOENCODING", f"{sys.stdout.encoding}:backslashreplace")
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def _report(error: Exception) -> int:
    if isinstance(error, BatchcapError):
        return _say("run_failed", str(error), error.exit_code)
    summary = f"{type(error).__name__}: {error}".splitlines()[0]
    return _say("run_failed", f"unexpected {summary} (--verbose shows where)", 1)


def _say(event: str, message: str, exit_code: int) -> int:
    """Report why the program ends, in the log's format."""
    if writes_json():
        log_event(log, event, message, logging.ERROR, exit_code=exit_code)
    else:
        _echo(f"batchcap: {message}", err=True)
    return exit_code


def _show(error: click.ClickException) -> None:
    text = io.StringIO()
    error.show(text)
    _echo(text.getvalue().rstrip("\n"), err=True)


def _echo(text: object, err: bool = False) -> None:
    """Print a text that may quote untrusted files."""
    click.echo(printable_lines(str(text)), err=err)


def _echo_json(value: object) -> None:
    click.echo(printable_json(json.dumps(value)))


def _configure(context: click.Context, _parameter: click.Parameter, path: Path | None) -> None:
    """Use the command's table in a TOML file as defaults; flags and the environment override it."""
    if path is None:
        return
    options = {
        option.name: option
        for option in context.command.params
        if isinstance(option, click.Option) and option.expose_value
    }
    settings: dict[str, Any] = {}
    for key, value in _read_config(path).get(str(context.info_name), {}).items():
        name = key.replace("-", "_")
        if name not in options:
            raise click.UsageError(f"{path}: [{context.info_name}] has no setting {key!r}")
        # As text, so that click checks it like a flag's value.
        option = options[name]
        if isinstance(value, list) and (option.multiple or option.nargs > 1):
            settings[name] = [str(item) for item in value]
        else:
            settings[name] = [str(value)] if option.multiple else str(value)
    context.default_map = settings


def _read_config(path: Path) -> dict[str, dict[str, Any]]:
    try:
        tables = tomllib.loads(read_bytes(path).decode("utf-8"))
    except (BatchcapError, ValueError) as error:
        raise click.UsageError(f"cannot read {path}: {error}") from error
    for name, table in tables.items():
        if name not in CONFIGURABLE_VERBS or not isinstance(table, dict):
            raise click.UsageError(
                f"{path}: unknown table {name!r}; expected one of "
                + ", ".join(f"[{verb}]" for verb in CONFIGURABLE_VERBS)
            )
    return tables


def _be_verbose(_context: click.Context, _parameter: click.Parameter, verbose: bool) -> bool:
    configure_logging(LogFormat.TEXT, verbose)
    return verbose


def options_of(settings: type[Any]) -> Decorator:
    """Add a flag for each field of a settings class that has a help text."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        hints = typing.get_type_hints(settings)
        described = [spec for spec in fields(settings) if "help" in spec.metadata]
        for spec in reversed(described):
            command = _option(spec, hints[spec.name])(command)
        return command

    return decorate


def _option(spec: Field[Any], hint: Any) -> Decorator:
    flag = "--" + spec.name.replace("_", "-")
    choices = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    if isinstance(hint, types.UnionType):
        hint = choices[0]
        choices = list(typing.get_args(hint))
    extra: dict[str, Any] = {"help": spec.metadata["help"], "show_default": True}
    if spec.default is MISSING:
        extra["required"] = True
    else:
        extra["default"] = spec.default
        extra["show_default"] = spec.default != "" and spec.default != DEFAULT_MODEL
    if "alone" in spec.metadata:
        extra |= {"is_flag": False, "flag_value": spec.metadata["alone"], "metavar": "[FILE]"}
    if hint is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", **extra)
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        extra["type"] = click.Choice([choice.value for choice in hint])
        if "default" in extra:
            extra["default"] = spec.default.value
        extra["callback"] = lambda _context, _parameter, value: hint(value)
    elif hint is Path:
        extra["type"] = click.Path(path_type=Path)
    elif typing.get_origin(hint) is tuple:
        extra |= {"multiple": True} if Ellipsis in choices else {"nargs": len(choices)}
        extra["type"] = choices[0]
    else:
        extra["type"] = hint
    return click.option(flag, **extra)


config_option = click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    is_eager=True,
    expose_value=False,
    callback=_configure,
    help="TOML file with a table of flags per command.",
)
verbose_option = click.option(
    "--verbose",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_be_verbose,
    help="Log tracebacks and details.",
)


def _path_or_url(name: str | Path) -> Path | str:
    """Return a URL as a str, anything else as a Path."""
    plain = without_file_scheme(str(name))
    return plain if is_url(plain) else Path(plain)


_captions_or_url_argument = click.argument("captions", metavar="CAPTIONS", type=_path_or_url)
_output_argument = click.argument("output", metavar="OUTPUT", type=_path_or_url)


@click.group(
    context_settings={"auto_envvar_prefix": "BATCHCAP", "help_option_names": ["-h", "--help"]}
)
@click.version_option(__version__, prog_name="batchcap")
def batchcap() -> None:
    """Chinese captions for directories of photos, in batch and unattended.

    Every flag can also be set by an environment variable, BATCHCAP_<COMMAND>_<FLAG>, and in the
    file given by --config. Flags override the environment, which overrides the file.

    Exit codes: 0 success, or nothing to do; 1 failure; 2 usage error; 3 success, but more photos
    failed than --max-failures; 4 the output belongs to another model or other settings; 5 another
    run holds the output; 130, 143 and 129 stopped by SIGINT, SIGTERM and SIGHUP after committing
    all finished rows.
    """


@batchcap.command()
@click.argument("source", metavar="INPUT")
@_output_argument
@options_of(RunSettings)
@config_option
@verbose_option
def run(**asked: Any) -> None:
    """Caption all photos of INPUT into OUTPUT, and skip those that already have a row.

    INPUT is a directory (searched recursively), a .txt file with one path per line, - for such a
    list on standard input, or tars or Parquet files of photos: a name, a glob, or
    'photos-{000..999}.tar'. OUTPUT is a .parquet file, or a directory for a data set of parts. Both
    may be URLs: s3://..., gs://...

    Every photo gets one row; if the photo cannot be read, the row says why. After a crash or a
    signal, the same command resumes.

    Example: batchcap run ./images captions.parquet
    """
    if asked["log_format"] is LogFormat.JSON:  # before checks, so that their errors are JSON too
        configure_logging(LogFormat.JSON, logging.getLogger().isEnabledFor(logging.DEBUG))
    settings = RunSettings(**asked)
    from batchcap.captioning.run import plan_run, run_captioning
    from batchcap.rows.parquet import keep_pandas_out

    keep_pandas_out()
    if settings.dry_run:
        _echo(plan_run(settings))
        return
    summary = run_captioning(settings)
    if writes_json():
        _echo_json(summary.as_json())
    else:
        _echo(summary)
    sys.exit(summary.exit_code)


@batchcap.command()
@_captions_or_url_argument
@_output_argument
@config_option
@verbose_option
def merge(**asked: Any) -> None:
    """Merge the shards that `batchcap run --shard` wrote to CAPTIONS into OUTPUT.

    CAPTIONS is the OUTPUT of these runs. A data set of many parts is compacted.

    Example: batchcap merge captions/ captions.parquet
    """
    settings = MergeSettings(**asked)
    from batchcap.rows.merge import merge_captions

    _echo(merge_captions(settings))


@batchcap.command()
@options_of(TrainSettings)
@config_option
@verbose_option
def train(**asked: Any) -> None:
    """Train a model on captioned photos, and write it to a model directory.

    Annotations are Flickr8k-CN text, AI Challenger JSON, COCO captions JSON or JSONL. After a crash
    or a signal, the same command resumes.

    Example: batchcap train --config jobs/train-default.toml --annotations captions.zh.txt
    --images ./images --out my-model
    """
    settings = TrainSettings(**asked)
    start_tensorflow()
    from batchcap.training.train import train_captioner

    _echo(f"wrote {train_captioner(settings)}")


_captions_argument = click.argument("captions", metavar="CAPTIONS", type=click.Path(path_type=Path))
_out_argument = click.argument("out", metavar="OUT", type=click.Path(path_type=Path))


@batchcap.command()
@_captions_argument
@click.argument(
    "references", metavar="[REFERENCES]", type=click.Path(path_type=Path), required=False
)
@options_of(EvaluateSettings)
@config_option
@verbose_option
def evaluate(**asked: Any) -> None:
    """Score CAPTIONS against REFERENCES; without REFERENCES, describe CAPTIONS.

    CAPTIONS is an output of `batchcap run`, COCO results, an AI Challenger submission or JSONL.
    REFERENCES are human captions in any format that training reads.

    Example: batchcap evaluate captions.parquet captions.zh.txt --per-image scores.parquet
    """
    settings = EvaluateSettings(**asked)
    from batchcap.evaluation.evaluate import evaluate_captions

    evaluation = evaluate_captions(settings)
    if settings.json:
        _echo_json(evaluation.as_json())
    else:
        _echo(evaluation)


@batchcap.command()
@_captions_argument
@_out_argument
@options_of(ExportSettings)
@config_option
@verbose_option
def export(**asked: Any) -> None:
    """Convert CAPTIONS, an output of `batchcap run`, to another program's format.

    Example: batchcap export captions.parquet results.json --format coco
    """
    settings = ExportSettings(**asked)
    from batchcap.caption_files.export import export_captions

    _echo(export_captions(settings))


@batchcap.command()
@_captions_argument
@click.argument("out", metavar="OUT.html", type=click.Path(path_type=Path))
@options_of(ReportSettings)
@config_option
@verbose_option
def report(**asked: Any) -> None:
    """Write an HTML page of CAPTIONS, an output of `batchcap run`.

    It shows photos, captions, scores and attention. The page is self-contained.

    Example: batchcap report captions.parquet report.html --images ./images
    """
    settings = ReportSettings(**asked)
    from batchcap.report.report import write_report

    _echo(write_report(settings))


@batchcap.command()
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
@options_of(CaptionSettings)
@config_option
@verbose_option
def caption(**asked: Any) -> None:
    """Print captions of photos, with the probability of each word.

    Example: batchcap caption photo.jpg --attention-figure attention.png
    """
    settings = CaptionSettings(**asked)
    from batchcap.captioning.caption import caption_images

    failed = 0
    for captioned in caption_images(settings):
        _echo(captioned, err=captioned.failed)
        failed += captioned.failed
    if failed:
        sys.exit(1)


@batchcap.command()
@options_of(BenchSettings)
@config_option
@verbose_option
def bench(**asked: Any) -> None:
    """Measure images per second on this machine, per stage and for a whole run.

    Example: batchcap bench --images ./images
    """
    settings = BenchSettings(**asked)
    from batchcap.captioning.bench import run_bench

    result = run_bench(settings)
    _echo(result.as_json() if settings.json else result)


@batchcap.group()
def model() -> None:
    """Describe or quantise a model directory."""


_model_argument = click.argument(
    "directory", metavar="[MODEL]", type=click.Path(path_type=Path), default=DEFAULT_MODEL
)


@model.command()
@_model_argument
@verbose_option
def show(directory: Path) -> None:
    """Print a model's sizes, fingerprint and metrics [default: the shipped model]."""
    from batchcap.training.model_card import describe

    _echo(describe(directory))


@model.command()
@click.argument("model", metavar="MODEL", type=click.Path(path_type=Path))
@options_of(QuantiseSettings)
@config_option
@verbose_option
def quantise(**asked: Any) -> None:
    """Add an int8 backbone to MODEL, which is about twice as fast on CPUs.

    `train` adds it if NNCF is installed: pip install 'batchcap[train]'.

    Example: batchcap model quantise my-model --images ./images
    """
    from batchcap.training.quantisation import quantise_model

    _echo(f"wrote an int8 backbone into {quantise_model(QuantiseSettings(**asked))}")


@model.command()
@_model_argument
@verbose_option
def card(directory: Path) -> None:
    """Print the model card: data, licence, results, limits."""
    from batchcap.training.model_card import read_card

    _echo(read_card(directory))
