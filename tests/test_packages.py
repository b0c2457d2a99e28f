"""Wheel and sdist are built, installed and run in an empty directory."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from helpers.places import ROOT

pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run("-m", "hatchling", "build", "-d", folder, cwd=ROOT)
    return folder


@pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz"])
def test_a_package_installs_and_runs_from_an_empty_directory(
    kind: str, packages: Path, photos_folder: Path, tmp_path: Path
) -> None:
    (package,) = packages.glob(kind)
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    # Dependencies come from this environment, the package from `site`.
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--quiet", "--target"]
    run("-m", "pip", "install", *options, site, package, cwd=empty)
    where = "import batchcap; print(batchcap.__file__)"
    assert Path(run("-c", where, cwd=empty, PYTHONPATH=str(site)).strip()).is_relative_to(site)
    run("-m", "batchcap", "run", photos_folder, "o.parquet", cwd=empty, PYTHONPATH=str(site))
    assert pq.read_table(empty / "o.parquet")["status"].to_pylist() == ["ok"] * 10


def test_the_sdist_has_the_documents(packages: Path) -> None:
    (package,) = packages.glob("*.tar.gz")
    with tarfile.open(package) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "jobs/training.md"} <= names
