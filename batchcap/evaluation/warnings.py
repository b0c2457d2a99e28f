"""Warnings about scores, each a sentence for the user."""

import re
from collections.abc import Iterable, Iterator, Sequence

from batchcap.caption_files.annotations import AnnotatedImage
from batchcap.caption_files.matching import Match
from batchcap.caption_files.predictions import GeneratedCaption
from batchcap.evaluation.scripts import traditional_share
from batchcap.evaluation.tokenisation import HAN
from batchcap.process.wording import counted, printable

# Differences between captions and references without a warning: in the share of letters that are
# Chinese, and in the share of traditional characters.
MOST_HAN_DIFFERENCE = 0.5
MOST_SCRIPT_DIFFERENCE = 0.1
LEAST_CIDER_D = 1.0


def id_warnings(
    name: str,
    generated: Sequence[GeneratedCaption],
    annotated: Sequence[AnnotatedImage],
    matched: Match,
) -> Iterator[str]:
    """Warn about images with only captions of `name` or only references, and failed photos."""
    ours, theirs = ({pair[side] for pair in matched.pairs} for side in (0, 1))
    alone = [one.image_id for i, one in enumerate(generated) if i not in ours]
    if alone:
        yield f"{name}: skipped {_several(alone, 'caption')} without references"
    alone = [image.image_id for i, image in enumerate(annotated) if i not in theirs]
    if alone:
        yield f"{name}: skipped {_several(alone, 'reference image')} without a caption"
    failed = [generated[i].image_id for i, _ in matched.pairs if generated[i].caption is None]
    if failed:
        yield f"{name}: skipped {_several(failed, 'failed photo')}"


def _several(image_ids: list[str], noun: str) -> str:
    return f"{counted(len(image_ids), noun)} (such as {printable(image_ids[0])!r})"


def word_warnings(
    captions: Sequence[str], words: Sequence[list[str]], references: Sequence[Sequence[str]]
) -> Iterator[str]:
    """Warn about captions without words, and too few references.

    Args:
        captions: the texts.
        words: of each caption.
        references: the texts of each caption's image.
    """
    if empty := sum(not caption for caption in words):
        yield f"{counted(empty, 'caption')} without words, scored 0"
    if all(len(texts) == 1 for texts in references):
        yield (
            "one reference per image: scores are lower and less certain than with several, and "
            "comparable only with scores on one reference"
        )


def script_warnings(
    name: str, captions: Sequence[str], references: Sequence[Sequence[str]]
) -> Iterator[str]:
    """Warn if captions of the file `name` differ from references in language or script."""
    written = [text for texts in references for text in texts]
    ours, theirs = _han_share(captions), _han_share(written)
    if abs(ours - theirs) > MOST_HAN_DIFFERENCE:
        yield (
            f"{name}: {100 * ours:.0f} % of the letters in captions are Chinese, but "
            f"{100 * theirs:.0f} % in references: they are in different languages"
        )
    our_script, their_script = map(traditional_share, (captions, written))
    if our_script is None or their_script is None:
        return
    if abs(our_script - their_script) > MOST_SCRIPT_DIFFERENCE:
        yield (
            f"{name}: captions and references are in different scripts: of the characters that "
            f"only one script has, {100 * our_script:.0f} % in captions and "
            f"{100 * their_script:.0f} % in references are traditional. A word in two scripts is "
            "scored as two words: convert one of the files"
        )


def _han_share(texts: Iterable[str]) -> float:
    text = "".join(texts)
    letters = len(re.findall(r"[^\W\d_]", text))
    return len(re.findall(f"[{HAN}]", text)) / max(letters, 1)


def score_warnings(scores: dict[str, float], images: int) -> Iterator[str]:
    """Warn about a CIDEr-D that is always 0, or so low that something is wrong."""
    if images == 1:
        yield "CIDEr-D of a single image is always 0: its weights come from the other images"
    elif scores["cider_d"] < LEAST_CIDER_D:
        yield (
            "captions and references have hardly any words in common: check that they are of the "
            "same images and are cut into words in the same way"
        )
