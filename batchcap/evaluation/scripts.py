"""Simplified and traditional characters, told apart by the encodings made for them.

GB 2312 has the characters of simplified Chinese, Big5 those of traditional Chinese. What one of
them alone has tells the script; rare characters and those that both scripts share do not.
"""

from collections.abc import Iterable
from functools import cache

HAN = range(0x4E00, 0xA000)
WRITTEN_IN_BOTH = "着"  # is missing from Big5, and written in Hong Kong


def traditional_share(texts: Iterable[str]) -> float | None:
    """The share of traditional characters among those that tell the script; None without any."""
    simplified, traditional = _telling_characters()
    counts = [0, 0]
    for text in texts:
        counts[0] += sum(char in simplified for char in text)
        counts[1] += sum(char in traditional for char in text)
    return counts[1] / sum(counts) if any(counts) else None


@cache
def _telling_characters() -> tuple[frozenset[str], frozenset[str]]:
    """Characters of simplified texts only, and of traditional ones only."""
    in_gb2312, in_big5 = map(_characters_of, ("gb2312", "big5"))
    return in_gb2312 - in_big5 - set(WRITTEN_IN_BOTH), in_big5 - in_gb2312


def _characters_of(encoding: str) -> frozenset[str]:
    return frozenset(char for char in map(chr, HAN) if char.encode(encoding, "ignore"))
