"""The recipes in jobs/, as tests read them."""

from click.testing import CliRunner
from helpers.places import JOBS

from batchcap.cli import batchcap
from batchcap.settings import RunSettings


def text_of(job: str) -> str:
    return (JOBS / job).read_text(encoding="utf-8")


def asked_by(arguments: list[str], asked_of_run: list[RunSettings]) -> RunSettings:
    """The run settings that these `batchcap` arguments give; `asked_of_run` is the fixture."""
    result = CliRunner().invoke(batchcap, arguments)
    assert result.exit_code == 0, result.output
    return asked_of_run[-1]
