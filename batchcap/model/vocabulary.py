"""Captions to words to ids, and back: segmentation, vocabulary, joining of words.

The only user of jieba, which is imported when the first caption is cut. Knows no photos and no
networks.
"""

import functools
import importlib
import logging
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from batchcap.errors import ModelError
from batchcap.process.environment import cache_folder
from batchcap.process.wording import excerpt, shown
from batchcap.settings import MAX_WORDS

PADDING_ID = 0
UNKNOWN_ID = 1
START_ID = 2
END_ID = 3
BANNED_IDS = (PADDING_ID, UNKNOWN_ID, START_ID)  # never written
SPECIAL_WORDS = ("[PAD]", "[UNK]", "[START]", "[END]")

LONGEST_WORD = 1000  # characters
# Unicode's control and format characters, surrogates, private use, line and paragraph separators.
# Not unassigned ones: models trained with a newer Unicode may have them in words.
ODD_CATEGORIES = frozenset(("Cc", "Cf", "Cs", "Co", "Zl", "Zp"))

MIRRORED = str.maketrans("左右", "右左")


def segment(text: str) -> list[str]:
    """Cut a caption into words by jieba's exact mode, without punctuation and whitespace."""
    return [word for word in map(_strip_punctuation, segment_all(text)) if word]


def segment_all(text: str) -> list[str]:
    """Cut a caption by jieba's exact mode, and keep everything in it."""
    return list(_tokenizer().cut(text))


def join_words(words: Iterable[str]) -> str:
    """Write words as Chinese text: a space only between two ASCII characters."""
    text = ""
    for word in words:
        touches_ascii = text[-1:].isascii() and word[:1].isascii()  # true of an empty text too
        text += f" {word}" if text and word and touches_ascii else word
    return text


def _strip_punctuation(word: str) -> str:
    """Return a word from its first letter or digit to its last; empty if it has none."""
    kept = [i for i, char in enumerate(word) if unicodedata.category(char)[0] in "LN"]
    return word[kept[0] : kept[-1] + 1] if kept else ""


@functools.cache
def _tokenizer() -> Any:
    """Return a silent jieba tokenizer with its cache in a private directory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its old escapes and pkg_resources warn on stderr
        jieba = importlib.import_module("jieba")
    jieba.setLogLevel(logging.CRITICAL + 1)  # it logs even a cache it cannot write
    tokenizer = jieba.Tokenizer()
    # Set even if not writable: jieba works without a cache, and its default is a file in /tmp that
    # anyone could have put there.
    tokenizer.tmp_dir = str(cache_folder())
    tokenizer.initialize()
    return tokenizer


@dataclass(frozen=True)
class Vocabulary:
    """The words of a model; a word's index is its id. The first four are `SPECIAL_WORDS`."""

    words: tuple[str, ...]

    @classmethod
    def build(cls, captions: Iterable[Sequence[str]], max_size: int, min_count: int) -> Self:
        """Build a vocabulary of the most frequent words of cut captions, ties by code point.

        At most `max_size` words, including the four special ones, each with at least `min_count`
        occurrences. Words that `load` would reject are skipped.
        """
        counts = Counter(word for caption in captions for word in caption)
        frequent = [
            word
            for word, count in counts.items()
            if count >= min_count and word not in SPECIAL_WORDS and not _fault_of(word)
        ]
        frequent.sort(key=lambda word: (-counts[word], word))
        return cls((*SPECIAL_WORDS, *frequent)[:max_size])

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file of one word per line; ModelError names the invalid line."""
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except OSError as error:
            raise ModelError(f"{path} cannot be read ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise ModelError(f"{path} is not UTF-8: copy the model again") from error
        if text.count("\n") > MAX_WORDS:
            raise ModelError(f"{path} has more than {MAX_WORDS:,} lines: copy the model again")
        words = text.removesuffix("\n").split("\n")
        _check_words(path, words)
        return cls(tuple(words))

    def save(self, path: Path) -> None:
        """Write one word per line in UTF-8, in the order of the ids."""
        path.write_bytes("".join(f"{word}\n" for word in self.words).encode("utf-8"))

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, words: Iterable[str]) -> list[int]:
        """Return the ids of words, UNKNOWN_ID for unknown ones; START and END are not added."""
        return [self._ids.get(word, UNKNOWN_ID) for word in words]

    def decode(self, ids: Iterable[int]) -> list[str]:
        """Return the words of ids, special ones as in the file."""
        return [self.words[word_id] for word_id in ids]

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {word: word_id for word_id, word in enumerate(self.words)}


def _check_words(path: Path, words: list[str]) -> None:
    first_line: dict[str, int] = {}
    for line, word in enumerate(words, start=1):
        if line <= len(SPECIAL_WORDS) and word != SPECIAL_WORDS[line - 1]:
            reason = f"expected {SPECIAL_WORDS[line - 1]}, not {shown(word)}"
        elif fault := _fault_of(word):
            reason = fault
        elif word in first_line:
            reason = f"{excerpt(word)} is already on line {first_line[word]}"
        else:
            first_line[word] = line
            continue
        raise ModelError(f"{path}:{line}: {reason}: copy the model again")
    if len(words) < len(SPECIAL_WORDS):
        reason = f"{SPECIAL_WORDS[len(words)]} is missing"
        raise ModelError(f"{path}:{len(words)}: {reason}: copy the model again")


def _fault_of(word: str) -> str | None:
    """Return why a vocabulary cannot have this word, or None."""
    if not word:
        return "empty line"
    if len(word) > LONGEST_WORD:
        return f"a word of {len(word):,} characters"
    if any(char.isspace() or unicodedata.category(char) in ODD_CATEGORIES for char in word):
        return f"{shown(word)} is not a word"
    return None


def start_ids(vocabulary_size: int, styles: Sequence[str]) -> dict[str | None, int]:
    """Return the id that begins captions of each style; None stands for any style."""
    return {None: START_ID} | {style: vocabulary_size + i for i, style in enumerate(styles)}


def mirrored_ids(vocabulary: Vocabulary) -> npt.NDArray[np.int32]:
    """Return `int32[V]`: the id of each word in the caption of the flipped photo.

    A word with 左 or 右 becomes its counterpart, or UNKNOWN_ID if the vocabulary has none; words
    with both, such as 左右, and all others stay.
    """
    return np.array([_mirrored_id(vocabulary, word) for word in vocabulary.words], dtype=np.int32)


def _mirrored_id(vocabulary: Vocabulary, word: str) -> int:
    names_one_side = ("左" in word) != ("右" in word)
    return vocabulary.encode([word.translate(MIRRORED) if names_one_side else word])[0]
