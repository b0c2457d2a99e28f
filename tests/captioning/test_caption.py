"""`batchcap caption`: its output on the terminal, and the figure."""

import functools
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers.commands import batchcap_here
from helpers.crashes import BATCHCAP
from PIL import Image

from batchcap.captioning import attention_figure
from batchcap.errors import InputError, OutputError, UsageError
from batchcap.process.environment import cache_folder
from batchcap.settings import CaptionSettings

caption = functools.partial(batchcap_here, "caption")


def test_a_photo_gets_its_caption_and_a_probability_for_each_word(photos_folder: Path) -> None:
    done = caption(photos_folder / "photographer.jpg")
    assert done.returncode == 0, done.stderr
    path, sentence, words = done.stdout.splitlines()
    assert path.endswith("photographer.jpg")
    pairs = re.findall(r"(\S+) ([01]\.\d\d)", words)
    assert "".join(word for word, _ in pairs) == f"{sentence}[END]"
    assert all(0 < float(probability) <= 1 for _, probability in pairs)


def test_bad_file_is_reported_and_others_are_captioned(photos_folder: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_text("no photo")
    done = caption(bad, photos_folder / "coffee.jpg")
    assert done.returncode == 1
    assert str(bad) in done.stderr
    assert "Traceback" not in done.stderr
    assert "coffee.jpg" in done.stdout


def test_figure_does_not_depend_on_settings_of_libraries(
    photos_folder: Path, tmp_path: Path
) -> None:
    figure = tmp_path / "attention.png"
    keras_settings = tmp_path / ".keras" / "keras.json"
    keras_settings.parent.mkdir()
    keras_settings.write_text('{"image_data_format": "channels_first", "floatx": "float16"}')
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nno_such_setting: 1\n")
    environment = os.environ | {
        "HOME": str(tmp_path),
        "XDG_CACHE_HOME": str(cache_folder().parent),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }
    done = subprocess.run(
        [*BATCHCAP, "caption", photos_folder / "coffee.jpg", "--attention-figure", figure],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    with Image.open(figure) as picture:
        assert min(picture.size) > 250
        assert len(set(picture.convert("L").tobytes())) > 100


def test_figure_needs_exactly_one_photo() -> None:
    with pytest.raises(UsageError, match="one IMAGE"):
        CaptionSettings(images=("a.jpg", "b.jpg"), attention_figure=Path("f.png"))


def test_each_panel_is_titled_in_a_font_that_has_its_characters() -> None:
    font = attention_figure.find_font("狗在草地上")
    assert Path(font.get_file()).is_file()


def test_word_that_looks_like_a_formula_is_drawn_verbatim(tmp_path: Path) -> None:
    pixels, weights = np.zeros((8, 8, 3), np.uint8), np.ones((1, 7, 7), np.float32)
    attention_figure.draw_attention(pixels, [r"$\frac$"], weights, tmp_path / "f.png")
    assert (tmp_path / "f.png").stat().st_size


def test_missing_font_is_reported_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_figure.matplotlib.font_manager, "findSystemFonts", list)
    monkeypatch.setattr(attention_figure, "FONT_PACKAGE", "no_such_font_package")
    with pytest.raises(InputError, match="pip install noto-cjk-sans-otc"):
        attention_figure.find_font("狗")


def test_unwritable_figure_is_named(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "f.png"
    pixels, weights = np.zeros((8, 8, 3), np.uint8), np.ones((1, 7, 7), np.float32)
    with pytest.raises(OutputError, match="nowhere"):
        attention_figure.draw_attention(pixels, ["狗"], weights, path)
