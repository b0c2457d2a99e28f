"""Share of traditional rather than simplified characters in a text.

GB 2312 encodes the characters of simplified Chinese, Big5 those of traditional Chinese. A character
in only one of them identifies the script; rare and common characters do not.
"""

from collections.abc import Iterable
from functools import cache

CJK_IDEOGRAPHS = range(0x4E00, 0xA000)
USED_IN_BOTH = "着"  # not in Big5, but written in Hong Kong


def traditional_share(texts: Iterable[str]) -> float | None:
    """Return the share of traditional characters among the identifying ones; None without any."""
    simplified, traditional = _identifying_characters()
    both = simplified | traditional
    found = [char for text in texts for char in text if char in both]
    return sum(char in traditional for char in found) / len(found) if found else None


@cache
def _identifying_characters() -> tuple[frozenset[str], frozenset[str]]:
    """Return the characters of simplified texts only, and of traditional texts only."""
    in_gb2312, in_big5 = map(_characters_of, ("gb2312", "big5"))
    return in_gb2312 - in_big5 - set(USED_IN_BOTH), in_big5 - in_gb2312


def _characters_of(encoding: str) -> frozenset[str]:
    return frozenset(char for char in map(chr, CJK_IDEOGRAPHS) if char.encode(encoding, "ignore"))
