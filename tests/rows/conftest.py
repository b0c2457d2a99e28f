"""Fixtures of this room."""

from pathlib import Path

import pytest

from batchcap.rows.layout import Layout


@pytest.fixture(params=["out.parquet", "out"])
def layout(request: pytest.FixtureRequest, tmp_path: Path) -> Layout:
    return Layout(tmp_path / request.param)


@pytest.fixture
def file(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "out.parquet")


@pytest.fixture
def folder(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "out")
