"""METEOR, by the Java program of its authors."""

from collections.abc import Sequence

from batchcap.evaluation.metrics import Scores, Words


def with_meteor(
    scores: Scores, hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]
) -> Scores:
    raise NotImplementedError
