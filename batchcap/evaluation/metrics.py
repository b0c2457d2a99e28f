"""Caption metrics on lists of words, as coco-caption defines them. Does not cut words."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from batchcap.errors import UsageError

Word = TypeVar("Word")
Words = Sequence[str]
Texts = dict[int, list[str]]  # per image; words joined by spaces
Array = npt.NDArray[np.float64]

LONGEST_NGRAM = 4
METRICS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d")
METRIC_NAMES = {
    "bleu_1": "BLEU-1",
    "bleu_2": "BLEU-2",
    "bleu_3": "BLEU-3",
    "bleu_4": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "cider_d": "CIDEr-D",
    "meteor": "METEOR (en)",
}
# coco-caption's: BLEU of an empty caption is 0, not undefined.
TINY, SMALL = 1e-15, 1e-9


@dataclass(frozen=True)
class Scores:
    """Metrics, times 100, of one hypothesis per image against its references.

    overall: over all images, by `METRICS`. per_image: `float64[n]` by `METRICS`; sentence BLEU is
    not the image's part of corpus BLEU. statistics: `float64[n, S]`, whose sum over images
    `overall_of` needs. CIDEr-D's document frequencies are of all n images, whichever are summed.
    """

    overall: dict[str, float]
    per_image: dict[str, Array]
    statistics: Array


def score_captions(hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]) -> Scores:
    """Score hypotheses, each against one reference or more.

    BLEU-1 to BLEU-4 (Papineni et al. 2002, closest reference length), ROUGE-L (Lin 2004, beta 1.2)
    and CIDEr-D (Vedantam et al. 2015; document frequencies from these references, so that scores of
    different sets of images do not compare), all as pycocoevalcap computes them.

    Raises:
        UsageError: pycocoevalcap is not installed.
    """
    found = {image: [" ".join(words)] for image, words in enumerate(hypotheses)}
    expected = {
        image: [" ".join(words) for words in captions] for image, captions in enumerate(references)
    }
    try:
        bleu, bleu_per_image, counts = _bleu(expected, found)
        rouge_l, rouge_l_per_image, cider_d, cider_d_per_image = _rouge_l_and_cider_d(
            expected, found
        )
    except ImportError as error:
        raise UsageError(
            "caption metrics need pycocoevalcap: pip install 'batchcap[evaluate]'"
        ) from error
    per_image = [*map(np.array, bleu_per_image), rouge_l_per_image, cider_d_per_image]
    overall = zip(METRICS, (*bleu, rouge_l, cider_d), strict=True)
    return Scores(
        {name: 100 * float(value) for name, value in overall},
        {name: 100 * scores for name, scores in zip(METRICS, per_image, strict=True)},
        np.column_stack([counts, rouge_l_per_image, cider_d_per_image]),
    )


def _bleu(expected: Texts, found: Texts) -> tuple[list[float], list[list[float]], Array]:
    """Return corpus and sentence BLEU by n-gram length, and statistics `float64[n, 11]`.

    The columns: 1, words, words of the closest reference, n-grams, n-grams that match.
    """
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=LONGEST_NGRAM)
    for image, texts in expected.items():
        scorer += (found[image][0], texts)
    overall, per_image = scorer.compute_score(option="closest")
    counts = []
    for comparison in scorer.ctest:
        length = comparison["testlen"]
        closest = min((abs(reference - length), reference) for reference in comparison["reflen"])
        counts.append([1, length, closest[1], *comparison["guess"], *comparison["correct"]])
    return overall, per_image, np.array(counts, np.float64)


def _rouge_l_and_cider_d(expected: Texts, found: Texts) -> tuple[float, Array, float, Array]:
    """Return the overall scores, and `float64[n]` per image."""
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    with contextlib.redirect_stdout(io.StringIO()):  # both print
        rouge_l, rouge_l_per_image = Rouge().compute_score(expected, found)
        cider_d, cider_d_per_image = Cider().compute_score(expected, found)
    return rouge_l, rouge_l_per_image, cider_d, np.array(cider_d_per_image)


def overall_of(sums: Array) -> Array:
    """Return `METRICS`, times 100, `float64[..., 6]`, of summed statistics, `float64[..., S]`."""
    images, length, reference_length = sums[..., 0], sums[..., 1], sums[..., 2]
    guessed, right = sums[..., 3:7], sums[..., 7:11]
    precisions = np.cumprod((right + TINY) / (guessed + SMALL), axis=-1)
    bleu = precisions ** (1 / np.arange(1, LONGEST_NGRAM + 1))
    ratio = (length + TINY) / (reference_length + SMALL)
    brevity = np.exp(np.minimum(0, 1 - 1 / ratio))
    means = sums[..., 11:] / images[..., np.newaxis]
    return 100 * np.concatenate([bleu * brevity[..., np.newaxis], means], axis=-1)


def ngrams(words: Sequence[Word], n: int) -> Iterator[tuple[Word, ...]]:
    """Return all sequences of n words."""
    return zip(*(words[start:] for start in range(n)), strict=False)


def signature(cutting: Sequence[str], references: Sequence[Sequence[Words]]) -> str:
    """Return how scores were computed; only scores with equal signatures are comparable.

    Args:
        cutting: how captions were cut into words, as `key=value`.
        references: of each image.
    """
    counts = {len(captions) for captions in references}
    per_image = str(counts.pop()) if len(counts) == 1 else f"{min(counts)}-{max(counts)}"
    return "|".join(
        [
            *cutting,
            f"refs={per_image}",
            f"n={len(references)}",
            "bleu=closest",
            "cider=D,sigma6,idf=eval",
            f"pycocoevalcap={version('pycocoevalcap')}",
        ]
    )
