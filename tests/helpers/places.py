"""Where things are: the checkout, its recipes, the sample photos, the data sets beside it."""

import os
from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
JOBS = ROOT / "jobs"
PHOTOS = TESTS / "photos"
GOLDEN = TESTS / "golden"


def data_set(variable: str, name: str) -> Path:
    """Folder of a data set: as the environment variable says, or `shared/` beside the checkout."""
    return Path(os.environ.get(variable, ROOT.parent / "shared" / "data" / name))
