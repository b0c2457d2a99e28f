"""Scores from pycocoevalcap and AI Challenger's own kit; scores.json says how they were made.

BATCHCAP_AI_CHALLENGER is the folder of the kit's samples, its Evaluation/caption_eval/data.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from helpers.places import GOLDEN

from batchcap.evaluation.evaluate import evaluate_captions
from batchcap.settings import EvaluateSettings, TokenKind

SCORES = json.loads((GOLDEN / "scores.json").read_text("utf-8"))


def scores(captions: Path, references: Path, tokens: TokenKind) -> dict[str, float]:
    settings = EvaluateSettings(
        captions=captions, references=references, tokens=tokens, resamples=100
    )
    return {
        metric: score.value / 100 for metric, score in evaluate_captions(settings).scores.items()
    }


def as_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("tokens", "name"), [(TokenKind.WORDS, "words"), (TokenKind.AI_CHALLENGER, "ai_challenger")]
)
def test_scores_equal_those_of_the_original_programs(
    tmp_path: Path, tokens: TokenKind, name: str
) -> None:
    captions = as_json(tmp_path / "results.json", SCORES["results"])
    references = as_json(tmp_path / "references.json", SCORES["references"])
    assert scores(captions, references, tokens) == pytest.approx(SCORES[name], abs=1e-9)


@pytest.mark.parametrize("name", SCORES["ai_challenger_samples"])
def test_scores_of_the_kits_samples_equal_the_kits(name: str) -> None:
    folder = Path(os.environ.get("BATCHCAP_AI_CHALLENGER", ""))
    if not (folder / name).is_file():
        pytest.skip("set BATCHCAP_AI_CHALLENGER to the folder of the kit's samples")
    sample = SCORES["ai_challenger_samples"][name]
    content = (folder / name).read_bytes().replace(b"\r\n", b"\n").rstrip(b"\n")
    if hashlib.sha256(content).hexdigest() != sample["sha256"]:
        pytest.skip(f"{name} is not the sample that was scored")
    found = scores(folder / name, folder / "id_to_words.json", TokenKind.AI_CHALLENGER)
    assert found == pytest.approx(sample["scores"], abs=1e-9)
