"""Import rules: rooms import from lower levels only, and heavy libraries in one place each."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import batchcap

PACKAGE = Path(batchcap.__file__).parent

# Rooms of one level do not import each other.
LEVELS = [
    {"errors", "schema"},
    {"settings", "storage"},
    {"process"},
    {"model", "rows"},
    {"photos"},
    {"caption_files"},
    {"evaluation"},
    {"captioning", "training"},
    {"report"},
    {"cli"},
    {"__main__"},
]

HOMES = {  # rooms or files
    "click": {"cli"},
    "fsspec": set(),  # by `_import_fsspec`
    "ray": {"captioning.ray_engine"},
    "tqdm": {"process.progress"},
    "jieba": {"model.vocabulary"},
    "jinja2": {"report.report"},
    "prometheus_client": {"captioning.summary"},
    "pi_heif": {"photos.images"},
    "PIL": {"photos", "captioning.bench"},
    "openvino": set(),  # by `import_openvino`
    "matplotlib": set(),  # by `import_matplotlib`
    "pyarrow": {
        "schema",
        "rows",
        "photos.archives",
        "caption_files",
        "evaluation",
        "captioning",
    },
    "pycocoevalcap": {"evaluation.metrics"},
    "safetensors": {"model", "training.trainer"},
    "tensorflow": {"model", "training"},
}

FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
    if path != PACKAGE / "__init__.py"
}


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def own_imports(file: str) -> set[str]:
    return {name.removeprefix("batchcap.") for name in imports(FILES[file])} & FILES.keys()


def room_of(file: str) -> str:
    return file.split(".")[0]


def level_of(file: str) -> int:
    return next(number for number, rooms in enumerate(LEVELS) if room_of(file) in rooms)


def test_each_room_has_a_level() -> None:
    assert {room_of(file) for file in FILES} == set().union(*LEVELS)


@pytest.mark.parametrize("file", FILES)
def test_a_file_imports_from_its_room_and_lower_levels_only(file: str) -> None:
    for imported in own_imports(file):
        assert room_of(imported) == room_of(file) or level_of(imported) < level_of(file), imported


def test_files_do_not_import_each_other_in_circles() -> None:
    assert [*TopologicalSorter({file: own_imports(file) for file in FILES}).static_order()]


@pytest.mark.parametrize("library", HOMES)
def test_a_library_is_imported_at_home_only(library: str) -> None:
    users = {
        file
        for file, path in FILES.items()
        if any(name.split(".")[0] == library for name in imports(path))
    }
    assert {file for file in users if not {file, room_of(file)} & HOMES[library]} == set()


def test_functions_fit_on_a_screen() -> None:
    for file, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1 if node.end_lineno else 0
                assert length <= 60, f"{file}.{node.name} has {length} lines"


def test_the_package_has_few_entries() -> None:
    assert len([path for path in PACKAGE.iterdir() if path.name != "__pycache__"]) <= 18
