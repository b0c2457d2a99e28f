"""Fixtures of the photo tests."""

import os

import pytest

from batchcap.photos.images import LoadSettings, load_image
from batchcap.schema import LoadedImage


@pytest.fixture
def load(tmp_path):
    def load_bytes(
        data: bytes, size: int = 2, name: str = "photo.jpg", **options: int | bool
    ) -> LoadedImage:
        path = tmp_path / name
        path.write_bytes(data)
        os.utime(path, (0, 0))  # an old file, which is read without a pause
        return load_image(path, LoadSettings(size, **options))

    return load_bytes
