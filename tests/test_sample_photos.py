"""The shipped model names the right thing in the photos of `tests/photos`, which are new to it."""

import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from helpers.commands import batchcap_here

# What a right caption has in it.
RIGHT = {
    "animals/cat.jpg": "猫",
    "astronaut.jpg": "宇航员|女.*(旗|火箭)|(旗|火箭).*女",
    "coffee.jpg": "咖啡|杯",
    "photographer.jpg": "(人|男).*(相机|摄像机|摄影|拍照)",
    "rocket.jpg": "火箭",
    "animals/raccoon.jpg": "浣熊",
    "flower.jpg": "花",
    "officer.jpg": "女.*(帽|制服)|(帽|制服).*女",
    "stairs.jpg": "(人|男).*(楼梯|台阶)|(楼梯|台阶).*(人|男)",
    "temple.jpg": "塔|寺|庙|楼|亭",
}
# What it gets wrong so far. No training caption names a raccoon, and those of one photo a rocket.
WRONG = (
    "astronaut.jpg",
    "coffee.jpg",
    "rocket.jpg",
    "animals/raccoon.jpg",
    "flower.jpg",
    "officer.jpg",
    "stairs.jpg",
)


@pytest.fixture(scope="module")
def captions(photos_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    output = tmp_path_factory.mktemp("samples") / "captions.parquet"
    done = batchcap_here("run", photos_folder, output)
    assert done.returncode == 0, done.stderr
    return {row["image_id"]: row["caption"] for row in pq.read_table(output).to_pylist()}


def test_each_photo_has_a_right_answer(captions: dict[str, str]) -> None:
    assert captions.keys() == RIGHT.keys()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.xfail(strict=True, reason="not yet right")])
        if name in WRONG
        else name
        for name in RIGHT
    ],
)
def test_the_right_thing_is_named(name: str, captions: dict[str, str]) -> None:
    assert re.search(RIGHT[name], captions[name]), captions[name]
