"""Paths of the checkout, its jobs, the test photos and the data sets beside it."""

import os
from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
JOBS = ROOT / "jobs"
PHOTOS = TESTS / "photos"
GOLDEN = TESTS / "golden"


def data_set(variable: str, name: str) -> Path:
    """Folder of a data set: from the environment variable, or in `shared/` beside the checkout."""
    return Path(os.environ.get(variable, ROOT.parent / "shared" / "data" / name))
