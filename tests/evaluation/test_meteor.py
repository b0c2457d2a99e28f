"""METEOR by the real Java program."""

import shutil

import pytest
from pycocoevalcap.meteor.meteor import Meteor

from batchcap.errors import BatchcapError, UsageError
from batchcap.evaluation.meteor import with_meteor
from batchcap.evaluation.metrics import Scores, score_captions

HYPOTHESES = [["一只", "狗", "在", "草地"], ["人", "|||"], []]
REFERENCES = [
    [["一只", "狗", "在", "草地", "上"], ["狗"]],
    [["一个", "人"], ["两个", "人"]],
    [["鱼"]],
]

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="METEOR needs Java")


def scored() -> Scores:
    return with_meteor(score_captions(HYPOTHESES, REFERENCES), HYPOTHESES, REFERENCES)


@pytest.mark.slow
@needs_java
def test_meteor_equals_pycocoevalcaps_even_with_decimal_commas(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pycocoevalcap's own driver hangs there."""
    overall, per_image = Meteor().compute_score(
        {i: [" ".join(words) for words in texts] for i, texts in enumerate(REFERENCES)},
        {i: [" ".join(words)] for i, words in enumerate(HYPOTHESES)},
    )
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    scores = scored()
    assert scores.overall["meteor"] == pytest.approx(100 * overall, abs=1e-9)
    assert scores.per_image["meteor"] == pytest.approx([100 * one for one in per_image], abs=1e-9)


@needs_java
def test_error_says_why_java_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Xss1")
    with pytest.raises(BatchcapError, match="stack size specified is too small"):
        scored()


def test_missing_java_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match="needs Java"):
        scored()
