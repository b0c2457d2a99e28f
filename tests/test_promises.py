"""The tests and files that tests/README.md names exist."""

import ast
import re
from functools import cache

from helpers.places import TESTS

README = (TESTS / "README.md").read_text(encoding="utf-8")
ROWS = [line for line in README.splitlines() if re.match(r"\| (?!---|#|fault )", line)]
NAMED = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", README)


@cache
def names_in(file: str) -> frozenset[str]:
    """Return the top-level names that a file defines, without importing it."""
    names: set[str] = set()
    for node in ast.parse((TESTS / file).read_text(encoding="utf-8")).body:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Assign(targets=[ast.Name(id=name)]):
                names.add(name)
    return frozenset(names)


def test_each_named_test_exists() -> None:
    assert len(NAMED) > 100
    missing_files = {file for file, _ in NAMED if not (TESTS / file).is_file()}
    assert missing_files == set()
    assert {
        f"{file}::{name}" for file, name in NAMED if name and name not in names_in(file)
    } == set()


def test_each_row_names_a_test_or_a_command() -> None:
    assert [int(row.split("|")[1]) for row in ROWS if re.match(r"\| \d", row)] == [*range(1, 36)]
    for row in ROWS:
        assert re.search(r"`[\w/]+\.py(::\w+)?`|`\.ci/run`|outside of this repository", row), row


def test_each_named_command_exists() -> None:
    commands = re.findall(r"(?<!\S)`?((?:tests/|\.ci/)[\w/.]+\w)", README)
    assert {".ci/run", "tests/benchmarks/kill_often.py"} <= set(commands)
    for command in set(commands) - {"tests/test_x.py", "tests/README.md"}:
        assert (TESTS.parent / command).is_file(), command
    for link in re.findall(r"\]\(([^)#]+)", README):
        assert (TESTS / link).is_file(), link
