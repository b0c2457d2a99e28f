"""Summaries of cross-attention per word. Arrays only."""

import numpy as np
import numpy.typing as npt


def summarise_attention(weights: npt.NDArray[np.float32]) -> list[dict[str, float | int]]:
    """Summarise the cross-attention of each word.

    Args:
        weights: `float32[words, rows, columns]`, each word's weights over the grid adding up to 1.

    Returns:
        per word the centre of mass `row` and `col` in grid cells (0 is the centre of the first
        cell), the strongest cell `peak_row`, `peak_col` and its weight `peak` (the first in
        row-major order if several are equal), and the `entropy` in nats.
    """
    words, rows, columns = weights.shape
    flat = weights.reshape(words, rows * columns)
    peaks = flat.argmax(axis=1)
    summaries = {
        "row": weights.sum(axis=2) @ np.arange(rows, dtype=np.float32),
        "col": weights.sum(axis=1) @ np.arange(columns, dtype=np.float32),
        "peak_row": peaks // columns,
        "peak_col": peaks % columns,
        "peak": flat.max(axis=1, initial=0),
        "entropy": -(flat * np.log(np.maximum(flat, np.finfo(np.float32).tiny))).sum(axis=1),
    }
    columns_of_numbers = [values.tolist() for values in summaries.values()]
    return [
        dict(zip(summaries, numbers, strict=True))
        for numbers in zip(*columns_of_numbers, strict=True)
    ]
