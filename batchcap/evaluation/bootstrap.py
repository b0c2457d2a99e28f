"""Bootstrap: intervals and comparisons of scores by resampling images."""

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

CONFIDENCE = 0.95


def resampled(statistics: Array, resamples: int, seed: int) -> Array:
    """Return sums, `float64[resamples, S]`, of statistics `float64[n, S]` over n resampled images.

    The bootstrap of Efron (1979), with replacement; equal seeds choose the same images.
    """
    rng = np.random.default_rng(seed)
    images = len(statistics)
    return np.stack(
        [
            np.bincount(rng.integers(images, size=images), minlength=images) @ statistics
            for _ in range(resamples)
        ]
    )


def interval(values: Array) -> tuple[float, float]:
    """Return the middle 95 % of resampled values, `float64[resamples]`."""
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def p_value(differences: Array) -> float:
    """Return the two-sided p-value of a non-zero difference, from `float64[resamples]`.

    The paired bootstrap of Koehn (2004); never less than the number of resamples can show.
    """
    below = (1 + np.count_nonzero(differences <= 0)) / (1 + len(differences))
    above = (1 + np.count_nonzero(differences >= 0)) / (1 + len(differences))
    return float(min(1.0, 2 * min(below, above)))
