"""Properties of captions that need no references, and how well confidence predicts scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from batchcap.caption_files.annotations import read_annotations
from batchcap.caption_files.predictions import GeneratedCaption
from batchcap.evaluation.bootstrap import Array, interval, resampled
from batchcap.evaluation.metrics import ngrams
from batchcap.evaluation.tokenisation import Profile

FIFTHS = 5


@dataclass(frozen=True)
class Traits:
    """Properties of captions.

    photos: all, with or without a caption; failed: without one. words: fewest, mean and most per
    caption. vocabulary: number of different words. distinct: number of different captions.
    distinct_1, distinct_2: different words and word pairs, as shares of all (Li et al. 2016).
    unfinished, seen: shares of captions that did not reach the end, and that occur verbatim in the
    training captions; None if unknown.
    """

    photos: int
    failed: int
    empty: int
    words: tuple[int, float, int]
    vocabulary: int
    distinct: int
    distinct_1: float
    distinct_2: float
    unfinished: float | None
    seen: float | None


def traits_of(
    generated: Sequence[GeneratedCaption], profile: Profile, training_captions: Path | None
) -> Traits:
    """Return the properties of these photos' captions.

    Raises:
        UsageError: the training captions are missing.
        InputError: they are invalid.
    """
    captioned = [one for one in generated if one.caption is not None]
    words = [tuple(profile.cut(one)) for one in captioned]
    lengths = [len(caption) for caption in words] or [0]
    finished = [one.finished for one in captioned if one.finished is not None]
    return Traits(
        photos=len(generated),
        failed=len(generated) - len(captioned),
        empty=sum(not caption for caption in words),
        words=(min(lengths), float(np.mean(lengths)), max(lengths)),
        vocabulary=len({word for caption in words for word in caption}),
        distinct=len(set(words)),
        distinct_1=_distinct(words, 1),
        distinct_2=_distinct(words, 2),
        unfinished=1 - float(np.mean(finished)) if finished else None,
        seen=_seen(words, profile, training_captions) if training_captions else None,
    )


def _distinct(captions: Sequence[Sequence[str]], n: int) -> float:
    counted = [ngram for caption in captions for ngram in ngrams(caption, n)]
    return len(set(counted)) / max(len(counted), 1)


def _seen(words: Sequence[tuple[str, ...]], profile: Profile, training_captions: Path) -> float:
    training = {
        tuple(profile.cut_reference(caption))
        for image in read_annotations(training_captions)
        if image.split in (None, "train")
        for caption in image.captions
    }
    return sum(caption in training for caption in words) / max(len(words), 1)


@dataclass(frozen=True)
class Calibration:
    """How well `mean_logprob` separates good captions from bad ones.

    spearman: rank correlation with the image's CIDEr-D, with its 95 % interval. cider_d: mean,
    times 100, of each fifth of the images, by rising `mean_logprob`.
    """

    spearman: float
    interval: tuple[float, float]
    cider_d: tuple[float, ...]


def calibrate(mean_logprob: Array, cider_d: Array, resamples: int, seed: int) -> Calibration:
    """Compare confidence, `float64[n]`, with scores, `float64[n]`, of the same n >= 5 images."""
    x, y = (pd.Series(values).rank().to_numpy() for values in (mean_logprob, cider_d))
    statistics = np.column_stack([np.ones_like(x), x, y, x * x, y * y, x * y])
    order = np.argsort(mean_logprob, kind="stable")
    return Calibration(
        float(_correlation(statistics.sum(axis=0))),
        interval(_correlation(resampled(statistics, resamples, seed))),
        tuple(float(cider_d[fifth].mean()) for fifth in np.array_split(order, FIFTHS)),
    )


def _correlation(sums: Array) -> Array:
    """Return correlations of summed statistics `float64[..., 6]`; 0 if one side is constant."""
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    variances = np.maximum((n * xx - x * x) * (n * yy - y * y), 0)
    return np.where(variances > 0, (n * xy - x * y) / np.sqrt(np.maximum(variances, 1e-12)), 0.0)
