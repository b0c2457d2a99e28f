"""Captions photos on the terminal, and draws their attention."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from batchcap.captioning.options import decode_settings_of, precision_for
from batchcap.model.config import read_config
from batchcap.model.encoder import int8_digest
from batchcap.model.loading import load_captioner
from batchcap.model.runtime import choose_execution
from batchcap.model.vocabulary import join_words
from batchcap.photos.images import LoadSettings, load_image
from batchcap.process.wording import printable
from batchcap.schema import Rejection
from batchcap.settings import CaptionSettings
from batchcap.storage.remote import without_file_scheme

END_LABEL = "[END]"


@dataclass(frozen=True)
class CaptionedImage:
    """A captioned photo; `probabilities` are of each word, then of END if it was reached."""

    path: str
    words: list[str]
    probabilities: list[float]
    reason: str | None = None

    @property
    def failed(self) -> bool:
        """Whether the photo has a reason instead of a caption."""
        return self.reason is not None

    def __str__(self) -> str:
        if self.failed:
            return f"{printable(self.path)}: {printable(str(self.reason))}"
        labelled = zip([*self.words, END_LABEL], self.probabilities, strict=False)
        shown = "  ".join(f"{word} {probability:.2f}" for word, probability in labelled)
        return f"{printable(self.path)}\n{join_words(self.words)}\n  {shown}"


def caption_images(settings: CaptionSettings) -> Iterator[CaptionedImage]:
    """Caption photos one by one, in order.

    Raises:
        UsageError: the model or the machine does not support a setting.
        ModelError: the model directory is wrong.
        InputError: no font has the figure's characters.
        OutputError: the figure can't be written.
    """
    decode_settings = decode_settings_of(settings, read_config(settings.model))
    execution = choose_execution(
        settings.runtime, precision_for(settings, int8_digest(settings.model))
    )
    captioner = load_captioner(settings.model, execution, compiled=False)
    for path in settings.images:
        file = without_file_scheme(path)
        image = load_image(file, LoadSettings(captioner.config.backbone.image_size))
        if isinstance(image.pixels, Rejection):
            yield CaptionedImage(path, [], [], image.pixels.message)
            continue
        (caption,) = captioner.caption(
            image.pixels[np.newaxis], decode_settings, [str(image.sha256)]
        )
        yield CaptionedImage(path, caption.words, np.exp(caption.log_probs).tolist())
        if settings.attention_figure is not None:
            from batchcap.captioning.attention_figure import draw_attention  # slow to import

            draw_attention(
                image.pixels, caption.words, caption.attention, settings.attention_figure
            )
