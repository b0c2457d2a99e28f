"""Figure of the attention over a photo, word by word."""

import math
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from batchcap.errors import InputError, OutputError
from batchcap.process.environment import import_matplotlib
from batchcap.storage.files import replacing

matplotlib = import_matplotlib()

# Ships Noto Sans CJK as a PyPI package, for machines without a Chinese font.
FONT_PACKAGE = "noto_cjk_sans_otc"
PREFERRED_FONTS = ("CJK", "Source Han", "WenQuanYi", "PingFang", "YaHei", "Hei")
MOST_COLUMNS = 5


def draw_attention(
    pixels: npt.NDArray[np.uint8],
    words: list[str],
    weights: npt.NDArray[np.float32],
    path: Path,
) -> None:
    """Draw the photo and, for each word, its attention.

    Args:
        pixels: `uint8[S, S, 3]`.
        words: titles of the panels.
        weights: `float32[words, rows, columns]`; each panel is scaled to its strongest cell.
        path: the PNG to write.

    Raises:
        InputError: no font here has the words' characters.
        OutputError: `path` can't be written.
    """
    font = find_font("".join(words))
    lines = math.ceil((len(words) + 1) / MOST_COLUMNS)
    columns = math.ceil((len(words) + 1) / lines)
    figure = matplotlib.figure.Figure(figsize=(2.4 * columns, 2.7 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for panel in panels:
        panel.axis("off")
    panels[0].imshow(pixels)
    height, width = pixels.shape[:2]
    for panel, word, weight in zip(panels[1:], words, weights, strict=False):
        panel.imshow(pixels)
        extent = (-0.5, width - 0.5, height - 0.5, -0.5)
        panel.imshow(weight, cmap="gray", alpha=0.6, extent=extent, vmin=0, vmax=weight.max())
        panel.set_title(word, fontproperties=font, parse_math=False)
    try:
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error


def find_font(text: str) -> Any:
    """Return a font that has every character of `text`.

    It is a font of this system, or of the package noto-cjk-sans-otc.

    Raises:
        InputError: there is none; says how to get one.
    """
    needed = {ord(char) for char in text}
    for path in _font_files():
        try:
            if needed <= matplotlib.ft2font.FT2Font(path).get_charmap().keys():
                return matplotlib.font_manager.FontProperties(fname=path, size=14)
        except (OSError, RuntimeError):  # matplotlib can't open this font
            continue
    raise InputError(
        "no installed font has these characters: install one "
        "(pip install noto-cjk-sans-otc, or your system's Noto Sans CJK) and run again"
    )


def _font_files() -> list[str]:
    """Return fonts that may have Chinese: installed ones by their names, then the package's."""
    installed = matplotlib.font_manager.findSystemFonts()
    likely = [path for path in sorted(installed) if any(n in path for n in PREFERRED_FONTS)]
    try:
        package = Path(str(import_module(FONT_PACKAGE).__file__)).parent
    except ImportError:
        return likely
    return likely + sorted(str(path) for path in package.glob("*.tt[cf]"))
