"""Profiles: ways to cut captions into words for comparison.

Scores of different profiles are not comparable.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

from batchcap.caption_files.annotations import AnnotatedImage
from batchcap.caption_files.predictions import GeneratedCaption
from batchcap.evaluation.penn_treebank import ptb_words
from batchcap.model.vocabulary import segment, segment_all
from batchcap.settings import TokenKind

HAN = "\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
CHARACTERS = re.compile(f"[{HAN}]|[^\\W_{HAN}]+")

Words = list[str]


@dataclass(frozen=True)
class Profile:
    """How generated captions and references are cut into words, and its name in a signature."""

    cut: Callable[[GeneratedCaption], Words]
    cut_reference: Callable[[str], Words]
    described: tuple[str, ...]


def profile_of(tokens: TokenKind, references: Sequence[AnnotatedImage] = ()) -> Profile:
    """Return the profile of a kind of tokens, for these references."""
    return PROFILES[tokens](references)


def characters(caption: str) -> Words:
    """Return each Chinese character, and runs of other letters and digits."""
    return CHARACTERS.findall(caption)


def _words(_references: Sequence[AnnotatedImage]) -> Profile:
    return Profile(
        lambda generated: segment(generated.caption or ""),
        segment,
        ("tok=words", _jieba(), "hmm=1", "punctuation=dropped"),
    )


def _characters(_references: Sequence[AnnotatedImage]) -> Profile:
    return Profile(
        lambda generated: characters(generated.caption or ""),
        characters,
        ("tok=char", "punctuation=dropped"),
    )


def _pretokenized(_references: Sequence[AnnotatedImage]) -> Profile:
    """Take the model's words, if the file has them, else the words between spaces."""
    return Profile(
        lambda generated: " ".join(generated.tokens or [generated.caption or ""]).split(),
        str.split,
        ("tok=pretokenized",),
    )


def _ai_challenger(references: Sequence[AnnotatedImage]) -> Profile:
    """Cut as the kit of AI Challenger 2017 does: full-width punctuation counts as words.

    Its references are cut already, with spaces; others are cut like captions.
    """
    texts = [caption for image in references for caption in image.captions]
    are_cut = sum(" " in caption for caption in texts) > len(texts) / 2
    return Profile(
        lambda generated: _ai_challenger_words(generated.caption or ""),
        ptb_words if are_cut else _ai_challenger_words,
        ("tok=ai-challenger", _jieba(), "hmm=1", f"refs_cut={'given' if are_cut else 'jieba'}"),
    )


def _ai_challenger_words(caption: str) -> Words:
    return ptb_words(" ".join(segment_all(caption.strip().replace("。", ""))))


PROFILES: dict[TokenKind, Callable[[Sequence[AnnotatedImage]], Profile]] = {
    TokenKind.WORDS: _words,
    TokenKind.AI_CHALLENGER: _ai_challenger,
    TokenKind.CHAR: _characters,
    TokenKind.PRETOKENIZED: _pretokenized,
}


def _jieba() -> str:
    return f"jieba={version('jieba')}"
