"""Beam search in plain Python: lists, one caption at a time, no cache."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from batchcap.model.vocabulary import END_ID


class Best(NamedTuple):
    tokens: list[int]
    log_probs: list[float]  # END's comes last, if it was reached
    finished: bool


def plain_beam_search(
    next_log_probs: Callable[[list[list[int]]], npt.NDArray[np.float64]],
    beam_size: int,
    length_penalty: float,
    max_length: int,
    min_length: int = 0,
    no_repeat_ngram: int = 0,
) -> Best:
    """Search; `next_log_probs` returns `[captions, V]` for captions of equal length."""
    alive: list[tuple[float, list[int], list[float]]] = [(0.0, [], [])]
    finished: list[tuple[float, list[int], list[float]]] = []
    for _ in range(max_length):
        extensions = []
        table = next_log_probs([words for _, words, _ in alive])
        for (score, words, log_probs), row in zip(alive, table, strict=True):
            allowed = [
                word
                for word in np.argsort(-row, kind="stable").tolist()
                if row[word] > -1e6 and not is_barred(words, word, min_length, no_repeat_ngram)
            ]
            for word in allowed or [END_ID]:
                log_prob = float(row[word])
                extensions.append((score + log_prob, [*words, word], [*log_probs, log_prob]))
        extensions.sort(key=lambda extension: -extension[0])
        for score, words, log_probs in extensions[:beam_size]:
            if words[-1] == END_ID:
                finished.append((score / len(words) ** length_penalty, words[:-1], log_probs))
        alive = [extension for extension in extensions if extension[1][-1] != END_ID][:beam_size]
        if len(finished) >= beam_size or not alive:
            break
    if finished:
        _, words, log_probs = max(finished, key=lambda caption: caption[0])
        return Best(words, log_probs, True)
    _, words, log_probs = alive[0]
    return Best(words, log_probs, False)


def is_barred(words: list[int], word: int, min_length: int, no_repeat_ngram: int) -> bool:
    if word == END_ID:
        return len(words) < min_length
    if not 0 < no_repeat_ngram <= len(words):
        return False
    extended = [*words, word]
    ngrams = [
        tuple(extended[start : start + no_repeat_ngram])
        for start in range(len(extended) - no_repeat_ngram + 1)
    ]
    return ngrams[-1] in ngrams[:-1]
