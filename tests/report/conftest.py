"""Fixtures of the report tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.report import PHOTOS, make_photo
from helpers.rows import METADATA

from batchcap.report.report import write_report
from batchcap.rows.parquet import Row, table_of, write_rows
from batchcap.settings import ReportSettings


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows and their report; returns the page's path."""

    def write_page(rows: list[Row], metadata: dict[str, str] = METADATA, **asked: Any) -> Path:
        captions = asked.pop("captions", tmp_path / "captions.parquet")
        if not captions.exists():
            write_rows(captions, [table_of(rows)], metadata)
        if "images" in asked:
            asked["images"] = str(asked["images"])
        out = tmp_path / "page.html"
        write_report(ReportSettings(captions=captions, out=out, **asked))
        return out

    return write_page


@pytest.fixture
def photos(tmp_path: Path) -> dict[str, bytes]:
    """Photos by name, also written to the folder `photos`."""
    for name, colour in PHOTOS.items():
        make_photo(tmp_path / "photos" / name, colour)
    return {name: (tmp_path / "photos" / name).read_bytes() for name in PHOTOS}
