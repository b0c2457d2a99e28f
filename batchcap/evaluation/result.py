"""The result of an evaluation, as text and as JSON."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import pandas as pd

from batchcap.evaluation.metrics import METRIC_NAMES
from batchcap.evaluation.traits import Calibration, Traits

Interval = tuple[float, float]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Score:
    """A metric over all images, times 100, and its 95 % interval, if it has one."""

    value: float
    interval: Interval | None = None


@dataclass(frozen=True)
class Difference:
    """A metric of `against` on the same images, and how much higher the captions score."""

    other: float
    difference: float
    interval: Interval | None = None
    p: float | None = None


@dataclass
class Evaluation:
    """All results about captions. `scores` and `differences` are by metric."""

    captions: str
    traits: Traits
    references: str | None = None
    images: int = 0
    matched_by: str | None = None
    signature: str | None = None
    resamples: int = 0
    seed: int = 0
    scores: dict[str, Score] = field(default_factory=dict)
    calibration: Calibration | None = None
    against: str | None = None
    differences: dict[str, Difference] = field(default_factory=dict)
    doubts: list[str] = field(default_factory=list)

    def warn(self, reasons: Iterable[str]) -> None:
        """Log and keep warnings about the scores."""
        for reason in reasons:
            log.warning("%s", reason)
            self.doubts.append(reason)

    def as_json(self) -> dict[str, Any]:
        """Return all fields."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _lines(evaluation: Evaluation) -> Iterator[str]:
    if evaluation.references is not None:
        yield (
            f"{evaluation.captions} against {evaluation.references}: {evaluation.images} images, "
            f"matched by {evaluation.matched_by}"
        )
        yield ""
        yield from _scores(evaluation)
        yield ""
        yield f"signature   {evaluation.signature}"
    else:
        yield evaluation.captions
        yield ""
    yield from _traits(evaluation.traits)
    if evaluation.calibration is not None:
        yield from _calibration(evaluation.calibration)


def _scores(evaluation: Evaluation) -> Iterator[str]:
    header = [evaluation.captions, "95 % interval"]
    if evaluation.against is not None:
        header += [evaluation.against, "difference", "95 % interval", "p"]
    names = [METRIC_NAMES[metric] for metric in evaluation.scores]
    cells = [_cells(evaluation, metric) for metric in evaluation.scores]
    table = pd.DataFrame(cells, index=names, columns=pd.Index(header, name="times 100"))
    yield table.to_string()
    yield f"intervals by {evaluation.resamples} resamples of the images, seed {evaluation.seed}"


def _cells(evaluation: Evaluation, metric: str) -> list[str]:
    score = evaluation.scores[metric]
    cells = [f"{score.value:.2f}", _shown(score.interval)]
    if metric in evaluation.differences:
        found = evaluation.differences[metric]
        cells += [f"{found.other:.2f}", f"{found.difference:+.2f}", _shown(found.interval, "+")]
        cells += ["" if found.p is None else f"{found.p:.3f}"]
    return cells


def _shown(interval: Interval | None, sign: str = "") -> str:
    if interval is None:
        return ""
    low, high = interval
    return f"{low:{sign}.2f} to {high:{sign}.2f}"


def _traits(traits: Traits) -> Iterator[str]:
    fewest, mean, most = traits.words
    yield (
        f"captions    {traits.photos - traits.failed} of {traits.photos} photos, {traits.distinct} "
        f"different; {mean:.1f} words each ({fewest} to {most})"
    )
    yield (
        f"words       {traits.vocabulary} different; distinct-1 {traits.distinct_1:.3f}, "
        f"distinct-2 {traits.distinct_2:.3f}"
    )
    if traits.unfinished is not None:
        yield f"unfinished  {100 * traits.unfinished:.1f} % did not reach the end"
    if traits.seen is not None:
        yield f"seen        {100 * traits.seen:.1f} % occur in the training captions"


def _calibration(calibration: Calibration) -> Iterator[str]:
    yield (
        f"confidence  mean_logprob ranks images as CIDEr-D does: Spearman "
        f"{calibration.spearman:.2f} ({_shown(calibration.interval)}); CIDEr-D by fifths of "
        f"mean_logprob: {', '.join(f'{score:.0f}' for score in calibration.cider_d)}"
    )
