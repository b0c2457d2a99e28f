"""Who may import whom: files import from lower floors only, heavy libraries have one home."""

import ast
from pathlib import Path

import pytest

import batchcap

PACKAGE = Path(batchcap.__file__).parent

FLOORS = [
    {"contracts", "files", "clock", "stopping", "guard", "memory", "distribution", "id_hashes"},
    {"surroundings", "last_words"},
    {"remote"},
    {"shards"},
    {"tars"},
    {
        "evaluation.metrics",
        "evaluation.bootstrap",
        "evaluation.penn_treebank",
        "evaluation.scripts",
    },
    {"wording"},
    {"settings", "locking", "row_files", "loading", "records", "lists"},
    {"mirror"},
    {"layout"},
    {"logs", "row_index"},
    {"progress", "output"},
    {"model.config", "model.text", "model.attention", "model.runtime"},
    {"model.rejections", "model.pixels"},
    {"model.jpeg", "model.png", "model.tiff", "model.webp"},
    {"model.formats"},
    {"model.images"},
    {"model.efficientnet_lite"},
    {"model.backbones", "model.network", "model.decoding"},
    {"model.extraction", "model.loss"},
    {"model.captioner"},
    {"inputs", "options", "feature_cache"},
    {"annotations"},
    {"caption_files", "matching", "history", "model_card", "attention_figure"},
    {"evaluation.tokenisation", "evaluation.per_image", "evaluation.meteor"},
    {"evaluation.traits", "evaluation.doubts"},
    {"evaluation.result"},
    {"views"},
    {"engines", "training_data", "watchdog", "run_report", "page.thumbnails"},
    {"inventory", "worker", "page.cards"},
    {"validation", "self_critical", "arrivals"},
    {"ray_engine"},
    {"objectives"},
    {"trainer"},
    {"run", "merge", "train", "evaluate", "export", "report", "caption", "bench"},
    {"cli"},
]

HOMES = {
    "click": {"cli"},
    "fsspec": set(),  # by `_import_fsspec`
    "ray": {"ray_engine"},
    "tqdm": {"progress"},
    "jieba": {"model.text"},
    "jinja2": {"report"},
    "pi_heif": {"model.images"},
    "PIL": {"model.images", "model.pixels", "bench"},
    "openvino": set(),  # by `import_openvino`
    "matplotlib": set(),  # by `import_matplotlib`
    "pyarrow": {
        "contracts",
        "output",
        "row_files",
        "row_index",
        "shards",
        "merge",
        "caption_files",
        "evaluation.per_image",
        "ray_engine",
    },
    "pycocoevalcap": {"evaluation.metrics"},
    "safetensors": {"model.captioner", "trainer"},
    "tensorflow": {
        "model.backbones",
        "model.network",
        "model.decoding",
        "model.extraction",
        "model.captioner",
        "model.loss",
        "model.runtime",
        "training_data",
        "views",
        "self_critical",
        "objectives",
        "distribution",
        "validation",
        "trainer",
        "train",
    },
}


def modules() -> dict[str, Path]:
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in files}


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def floor_of(module: str) -> int:
    return next(number for number, floor in enumerate(FLOORS) if module in floor)


def test_every_file_has_a_floor() -> None:
    assert set().union(*FLOORS) == modules().keys()


@pytest.mark.parametrize("module", modules())
def test_a_file_imports_from_lower_floors_only(module: str) -> None:
    own = {name.removeprefix("batchcap.") for name in imports(modules()[module])}
    for imported in own & modules().keys():
        assert floor_of(imported) < floor_of(module), f"{module} imports {imported}"


@pytest.mark.parametrize("library", HOMES)
def test_a_library_is_imported_at_home_only(library: str) -> None:
    users = {
        module
        for module, path in modules().items()
        if any(name.split(".")[0] == library for name in imports(path))
    }
    assert users <= HOMES[library]


def test_functions_fit_on_a_screen() -> None:
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1 if node.end_lineno else 0
                assert length <= 60, f"{module}.{node.name} has {length} lines"
