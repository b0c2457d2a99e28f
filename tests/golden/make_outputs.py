"""Make the golden outputs of the installed version: `python make_outputs.py FOLDER`.

Run it once at a release, and keep the folder as `outputs/schema-N`: every later version must
resume from it. The photos are four of `tests/photos`, with a fixed modification time. The model is
`tests/helpers/small_model.py`'s, with random weights.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

TESTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))

import fsspec  # noqa: E402
from helpers.small_model import small_captioner  # noqa: E402
from helpers.stores import environment, s3_server  # noqa: E402

from batchcap.captioning.run import run_captioning  # noqa: E402
from batchcap.model.tensorflow_captioner import save_captioner  # noqa: E402
from batchcap.settings import RunSettings  # noqa: E402

PHOTOS = TESTS / "photos"
NEW_PHOTO = "rocket.jpg"
NAMES = ("animals/cat.jpg", "astronaut.jpg", "coffee.jpg", "photographer.jpg", NEW_PHOTO)
PART = "part-000001.parquet"
MTIME_S = 1_700_000_000


def copy_photos(folder: Path) -> Path:
    """Copy the photos of a golden output, all with one modification time."""
    for name in NAMES:
        copy = folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(PHOTOS / name, copy)
        os.utime(copy, (MTIME_S, MTIME_S))
    return folder


@contextmanager
def bucket(name: str) -> Iterator[fsspec.AbstractFileSystem]:
    """Serve an empty bucket by a real S3 API, for `s3://` URLs in the block."""
    with s3_server() as port, mock.patch.dict(os.environ, environment(port)):
        store = fsspec.filesystem("s3", use_listings_cache=False)
        store.mkdir(name)
        yield store


def main(folder: Path) -> None:
    folder.mkdir(parents=True)
    model = folder / "model"
    save_captioner(small_captioner(64), model)
    with TemporaryDirectory() as photos, bucket("golden") as store:
        copy_photos(Path(photos))
        Path(photos, NEW_PHOTO).unlink()

        def run(output: Path | str, shard: str | None = None) -> None:
            settings = RunSettings(
                source=photos,
                output=output,
                model=model,
                batch_size=2,
                rows_per_part=2,
                min_length=3,  # an untrained model would end at once
                shard=shard,
            )
            run_captioning(settings)

        run(folder / "captions.parquet")
        run(folder / "captions")
        # As left by a first run that is killed before it joins its parts
        parts = folder / ".killed.parquet.parts"
        parts.mkdir()
        shutil.copyfile(folder / "captions" / PART, parts / PART)
        for shard in ("0/2", "1/2"):
            run(folder / "shards", shard)
            run(folder / "shards.parquet", shard)
        for name in ("captions", "captions.parquet"):
            run(f"s3://golden/{name}")
        store.get("golden/", f"{folder / 'store'}/", recursive=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
