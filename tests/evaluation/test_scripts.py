from pathlib import Path

import pytest

from batchcap.caption_files.annotations import read_annotations
from batchcap.evaluation.scripts import traditional_share


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("一个男孩在草地上踢足球,两辆车停在路边", 0),
        ("一個男孩在草地上踢足球,兩輛車停在路邊", 1),
        ("有人坐着", None),
        ("车門開", 2 / 3),
        ("a dog", None),
        ("", None),
    ],
)
def test_share_of_traditional_characters(text: str, share: float | None) -> None:
    assert traditional_share([text]) == share


def test_real_simplified_captions_have_no_traditional_characters(flickr8k: Path) -> None:
    images = read_annotations(flickr8k / "captions.zh.txt")
    share = traditional_share(caption for image in images for caption in image.captions)
    assert share is not None
    assert share < 0.001
