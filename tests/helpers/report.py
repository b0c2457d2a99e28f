"""Helpers of the report tests."""

import hashlib
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page

from batchcap.evaluation.per_image import write_evaluation


def make_photo(path: Path, colour: str = "red", size: tuple[int, int] = (320, 240)) -> str:
    """Write a photo; return its SHA-256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, "PNG")
    return hashlib.sha256(path.read_bytes()).hexdigest()


PHOTOS = {name: ("red", "green", "blue")[i] for i, name in enumerate(("a.png", "b/c.png", "d.png"))}


def evaluation(path: Path, ids: list[str], captions: list[str], cider: list[float]) -> Path:
    columns = {
        "image_id": ids,
        "caption": captions,
        "references": [[f"人写的{n}"] for n in ids],
        "cider_d": cider,
        "bleu_4": cider,
    }
    write_evaluation(path, columns, "signature|of|all", {"cider_d": 81.27, "bleu_4": 20.0})
    return path


def names(page: Page) -> list[str]:
    return page.locator(".card .name").all_text_contents()
