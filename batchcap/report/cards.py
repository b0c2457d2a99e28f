"""Rows to the page's cards and totals, in one pass. Knows no HTML.

Only sampled rows are kept in memory, their attention as one byte per cell.
"""

import base64
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt

from batchcap.caption_files.predictions import metadata_of
from batchcap.evaluation.per_image import METRICS
from batchcap.rows.parquet import Row

GRID = (7, 7)  # of rows without metadata about it
SHOWN_FAILURES = 200  # per reason

Card = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Shown:
    """A sampled row: its card for the page's script, and its photo's SHA-256."""

    card: Card
    sha256: str | None


@dataclass
class Digest:
    """Totals of all rows, and the sampled ones in the order of the file.

    `failures` are the first photos of each reason with their messages, `scored` counts the captions
    with an evaluation, `confidences` are the geometric means of the words' probabilities per
    caption.
    """

    photos: int = 0
    scored: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    failures: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    confidences: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    metadata: dict[str, str] = field(default_factory=dict)
    shown: list[Shown] = field(default_factory=list)


class Draw:
    """Samples at most `most` rows of a stream, uniformly, in the stream's order.

    Each row gets a random number, and the lowest stay: the sample depends on the rows' places, not
    on how the stream is grouped.
    """

    def __init__(self, most: int, seed: int, keep: Callable[[Row], Shown]) -> None:
        self._most, self._keep = most, keep
        self._numbers = np.random.default_rng(seed)
        self._limit = math.inf
        self._seen = 0
        self._kept: list[tuple[float, int, Shown]] = []

    def add(self, table: Any) -> None:
        """Add the next group of rows, an Arrow table."""
        numbers = self._numbers.random(len(table))
        places = np.flatnonzero(numbers < self._limit)
        for place, row in zip(places.tolist(), table.take(places).to_pylist(), strict=True):
            self._kept.append((numbers[place], self._seen + place, self._keep(row)))
        self._seen += len(table)
        if len(self._kept) >= self._most:
            self._kept = sorted(self._kept, key=itemgetter(0))[: self._most]
            self._limit = self._kept[-1][0]

    def rows(self) -> list[Shown]:
        """Return the sample."""
        return [shown for _, _, shown in sorted(self._kept, key=itemgetter(1))]


def digest_rows(
    groups: Iterator[Any], most: int, seed: int, evaluated: Mapping[str, Row]
) -> Digest:
    """Read Arrow tables of rows once; `evaluated` are the rows of an evaluation by image id."""
    digest, confidences = Digest(), [np.zeros(0)]
    draw = Draw(most, seed, lambda row: _shown(row, grid_of(digest.metadata), evaluated))
    for table in groups:
        digest.metadata |= metadata_of(table)
        digest.photos += len(table)
        _count(digest, table, evaluated)
        means = table["mean_logprob"].drop_null().to_numpy().astype(float)
        confidences.append(np.exp(means.clip(max=0)))
        draw.add(table)
    together = np.concatenate(confidences)
    digest.confidences = together[np.isfinite(together)]
    digest.shown = draw.rows()
    return digest


def _count(digest: Digest, table: Any, evaluated: Mapping[str, Row]) -> None:
    names = ("image_id", "status", "caption", "error_type", "error_message")
    columns = (table[name].to_pylist() for name in names)
    for image_id, status, caption, reason, message in zip(*columns, strict=True):
        digest.scored += _is_of(evaluated.get(image_id), caption)
        if status == "failed":
            digest.failed[reason or ""] += 1
            first = digest.failures.setdefault(reason or "", [])
            if len(first) < SHOWN_FAILURES:
                first.append((image_id, message or ""))


def grid_of(metadata: Mapping[str, str]) -> tuple[int, int]:
    """Return rows and columns of the attention grid, from the metadata of rows."""
    found = re.fullmatch("([1-9][0-9]?)x([1-9][0-9]?)", metadata.get("batchcap.grid", ""))
    return (int(found[1]), int(found[2])) if found else GRID


def _shown(row: Row, grid: tuple[int, int], evaluated: Mapping[str, Row]) -> Shown:
    words = row["tokens"] or []
    card = {
        "id": row["image_id"],
        "failed": row["status"] == "failed",
        "caption": row["caption"],
        "words": words,
        "probabilities": [_exp(value) for value in (row["token_logprobs"] or [])[: len(words)]],
        "confidence": _exp(row["mean_logprob"]),
        "cut": row["finished"] is False,
        "looks": _looks(row["attention"], len(words), grid),
        "maps": _maps(row["attention_map"], len(words), grid),
        "reason": row["error_type"],
        "message": row["error_message"],
    }
    scored = evaluated.get(row["image_id"])
    if scored is not None and _is_of(scored, row["caption"]):
        card["scores"] = {name: _number(scored[name], 1) for name in METRICS}
        card["references"] = scored["references"] or []
    return Shown(card, row["sha256"])


def _is_of(scored: Row | None, caption: str | None) -> bool:
    """Whether an evaluation is about this caption, and not an older one."""
    return scored is not None and (scored["caption"] or "") == (caption or "")


def _exp(logarithm: float | None) -> float | None:
    """Return a probability from its natural logarithm."""
    return None if logarithm is None else _number(math.exp(min(logarithm, 0.0)), 4)


def _number(value: float | None, digits: int) -> float | None:
    """Return a number that JSON has, or None."""
    return None if value is None or not math.isfinite(value) else round(value, digits)


def _looks(
    attention: list[dict[str, float] | None] | None, words: int, grid: tuple[int, int]
) -> list[list[float]]:
    """Return per word: centre (row, column), strongest cell (row, column), its weight.

    Empty if one is missing or outside the grid.
    """
    looks = []
    for look in attention or []:
        values = [_number(value, 4) for value in (look or {}).values()]
        numbers = [value for value in values if value is not None]
        if len(numbers) != 6 or not _inside(numbers[:2], grid) or not _inside(numbers[2:4], grid):
            return []
        looks.append(numbers[:5])
    return looks if len(looks) == words else []


def _inside(place: list[float], grid: tuple[int, int]) -> bool:
    return all(0 <= at <= cells - 1 for at, cells in zip(place, grid, strict=True))


def _maps(maps: list[list[float]] | None, words: int, grid: tuple[int, int]) -> str:
    """Return Base64 of `uint8[words, cells]`, 255 for the strongest cell; empty if invalid."""
    cells = grid[0] * grid[1]
    if not maps or len(maps) != words or any(len(one or ()) != cells for one in maps):
        return ""
    weights = np.nan_to_num(np.array(maps, float), nan=0, posinf=0, neginf=0).clip(0)
    strongest = weights.max(axis=1, keepdims=True)
    relative = np.divide(weights, strongest, out=np.zeros_like(weights), where=strongest > 0)
    return base64.b64encode(np.round(255 * relative).astype(np.uint8).tobytes()).decode()
