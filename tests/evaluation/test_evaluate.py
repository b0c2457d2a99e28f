"""The verb `evaluate`, from files to what it prints and writes."""

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import duckdb
import pandas as pd
import pytest
from click.testing import CliRunner, Result
from helpers.rows import METADATA, captioned_row, failed_row

from batchcap.cli import batchcap
from batchcap.errors import InputError, UsageError
from batchcap.evaluation.evaluate import evaluate_captions
from batchcap.evaluation.per_image import METRICS, SCHEMA, read_evaluation
from batchcap.rows.parquet import table_of, write_rows
from batchcap.settings import EvaluateSettings, TokenKind

REFERENCES = {
    "dogs.jpg": ["两只狗在草地上奔跑。", "草地上有两只狗"],
    "boy.jpg": ["一个男孩在踢足球。", "踢足球的小男孩"],
    "sea.jpg": ["一个女人站在海边", "海边的女人。"],
    "bike.jpg": ["一个男人骑着自行车", "骑自行车的人"],
    "cat.jpg": ["一只猫睡在沙发上", "沙发上的猫"],
    "snow.jpg": ["一个人在滑雪", "滑雪的人"],
}
GOOD = {
    "dogs.jpg": "两只狗在草地上",
    "boy.jpg": "一个男孩在踢足球",
    "sea.jpg": "一个女人在海边",
    "bike.jpg": "一个男人骑着自行车",
    "cat.jpg": "一只狗在沙发上",
    "snow.jpg": "一个人在滑雪",
}
POOR = dict.fromkeys(GOOD, "一个男人站在街上") | {"snow.jpg": "一个男孩在滑雪"}


@pytest.fixture
def references(tmp_path: Path) -> Path:
    path = tmp_path / "references.json"
    records = [{"image_id": name, "caption": texts} for name, texts in REFERENCES.items()]
    path.write_text(json.dumps(records))
    return path


def results(path: Path, captions: dict[str, str]) -> Path:
    records = [{"image_id": name, "caption": caption} for name, caption in captions.items()]
    path.write_text(json.dumps(records))
    return path


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return results(tmp_path / "good.json", GOOD)


@pytest.fixture
def poor(tmp_path: Path) -> Path:
    return results(tmp_path / "poor.json", POOR)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(batchcap, ["evaluate", *map(str, arguments)])


def test_scores_are_printed_with_intervals_and_signature(good: Path, references: Path) -> None:
    output = invoke(good, references).output
    assert "good.json against references.json: 6 images, matched by image_id" in output
    for name in ("BLEU-1", "BLEU-4", "ROUGE-L", "CIDEr-D"):
        assert f"\n{name} " in output
    assert "signature   tok=words|jieba=0.42.1|hmm=1|punctuation=dropped|refs=2|n=6" in output
    assert "captions    6 of 6 photos, 6 different; " in output
    assert output == invoke(good, references).output


def test_json_has_everything_that_is_printed(good: Path, poor: Path, references: Path) -> None:
    printed = json.loads(invoke(good, references, "--against", poor, "--json").stdout)
    assert (printed["images"], printed["matched_by"], printed["against"]) == (
        6,
        "image_id",
        "poor.json",
    )
    low, high = printed["scores"]["cider_d"]["interval"]
    assert low <= printed["scores"]["cider_d"]["value"] <= high
    assert printed["differences"]["bleu_1"]["difference"] > 0


def test_differences_are_those_of_scores_alone(good: Path, poor: Path, references: Path) -> None:
    ours, theirs, compared = (
        evaluate_captions(EvaluateSettings(captions=path, references=references, against=against))
        for path, against in ((good, None), (poor, None), (good, poor))
    )
    for metric, found in compared.differences.items():
        assert compared.scores[metric] == ours.scores[metric]
        assert found.other == theirs.scores[metric].value
        assert found.difference == ours.scores[metric].value - found.other
        assert found.interval is not None
        assert found.interval[0] <= found.difference <= found.interval[1]
    assert (compared.differences["rouge_l"].p or 1) < 0.05


def test_captions_do_not_differ_from_themselves(good: Path, references: Path) -> None:
    settings = EvaluateSettings(captions=good, references=references, against=good)
    for found in evaluate_captions(settings).differences.values():
        assert (found.difference, found.interval, found.p) == (0, (0, 0), 1)


def test_only_images_that_both_have_are_compared(
    tmp_path: Path, poor: Path, references: Path
) -> None:
    some = results(tmp_path / "some.json", dict(list(GOOD.items())[:4]))
    settings = EvaluateSettings(captions=poor, references=references, against=some)
    evaluation = evaluate_captions(settings)
    assert evaluation.images == 4
    assert "skipped 2 images captioned in only one of the two files" in evaluation.doubts


def test_scores_of_each_image_are_written(tmp_path: Path, good: Path, references: Path) -> None:
    path = tmp_path / "scores.parquet"
    settings = EvaluateSettings(captions=good, references=references, per_image=path)
    evaluation = evaluate_captions(settings)
    rows, signature, scores = read_evaluation(path)
    assert signature == evaluation.signature
    assert scores == {metric: score.value for metric, score in evaluation.scores.items()}
    assert [row["image_id"] for row in rows] == list(REFERENCES)
    assert rows[0]["references"] == REFERENCES["dogs.jpg"]
    assert rows[0]["words"] == ["两只", "狗", "在", "草地", "上"]
    assert sum(row["cider_d"] for row in rows) / 6 == pytest.approx(scores["cider_d"])
    assert pd.read_parquet(path)["bleu_4"].tolist() == [row["bleu_4"] for row in rows]
    query = f"select avg(rouge_l) from '{path}'"
    assert duckdb.sql(query).fetchall()[0] == pytest.approx((scores["rouge_l"],))
    assert set(METRICS) < set(SCHEMA.names)


def test_file_that_is_not_an_evaluation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "captions.parquet"
    write_rows(path, [table_of([captioned_row()])], METADATA)
    with pytest.raises(InputError, match="not a file of `batchcap evaluate --per-image`"):
        read_evaluation(path)


def test_rows_of_a_run_are_scored_with_their_confidence(tmp_path: Path, references: Path) -> None:
    path = tmp_path / "captions.parquet"
    rows = [
        captioned_row(name, caption=caption, mean_logprob=-0.1 * place)
        for place, (name, caption) in enumerate(GOOD.items())
    ]
    rows.append(failed_row("broken.jpg"))
    write_rows(path, [table_of(rows)], METADATA)
    result = invoke(path, references)
    assert "confidence  mean_logprob ranks images as CIDEr-D does: Spearman " in result.output
    assert "captions    6 of 7 photos" in result.output
    assert "broken.jpg" in result.stderr


def test_without_references_captions_are_described(good: Path) -> None:
    result = invoke(good, "--training-captions", good.with_name("good.json"))
    assert result.exit_code == 0, result.output
    assert "captions    6 of 6 photos" in result.output
    assert "seen        100.0 % occur in the training captions" in result.output
    assert "BLEU" not in result.output


@pytest.mark.parametrize("tokens", TokenKind)
def test_every_profile_scores(good: Path, references: Path, tokens: TokenKind) -> None:
    printed = json.loads(invoke(good, references, "--tokens", tokens, "--json").stdout)
    assert printed["signature"].startswith(f"tok={tokens}|")


def test_captions_of_other_images_are_an_error(tmp_path: Path, references: Path) -> None:
    path = results(tmp_path / "others.json", {"x.jpg": "一只狗"})
    with pytest.raises(InputError, match=r"no image in common.*'x.jpg'.*'dogs.jpg'"):
        evaluate_captions(EvaluateSettings(captions=path, references=references))


def test_references_without_words_are_warned_about(tmp_path: Path, good: Path) -> None:
    path = tmp_path / "references.jsonl"
    path.write_text('{"image_id": "dogs.jpg", "captions": ["。", "两只狗"]}\n')
    evaluation = evaluate_captions(EvaluateSettings(captions=good, references=path))
    assert "skipped 1 reference without words" in evaluation.doubts


def test_captions_in_another_script_are_warned_about(tmp_path: Path, references: Path) -> None:
    simplified = results(tmp_path / "s.json", {"bike.jpg": "一个男人骑着车", "cat.jpg": "猫"})
    traditional = results(tmp_path / "t.json", {"bike.jpg": "一個男人騎着車", "cat.jpg": "貓"})
    settings = EvaluateSettings(captions=simplified, references=references, against=traditional)
    warnings = evaluate_captions(settings).doubts
    (warning,) = [warning for warning in warnings if "script" in warning]
    assert "t.json: captions and references are in different scripts" in warning
    assert "100 % in captions and 0 % in references are traditional" in warning


@pytest.mark.parametrize("flag", ["--against", "--per-image"])
def test_flags_that_need_references_ask_for_them(good: Path, flag: str) -> None:
    result = invoke(good, flag, "x.parquet")
    assert isinstance(result.exception, UsageError)
    assert f"{flag} needs REFERENCES" in str(result.exception)


def test_error_says_how_to_install_the_metrics(
    good: Path, references: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signature read their version first, and that failed without advice."""

    def no_such_package(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu_scorer", None)
    monkeypatch.setattr("batchcap.evaluation.metrics.version", no_such_package)
    with pytest.raises(UsageError, match=r"pip install 'batchcap\[evaluate\]'"):
        evaluate_captions(EvaluateSettings(captions=good, references=references))


def test_evaluating_loads_no_tensorflow(good: Path, references: Path) -> None:
    program = (
        "import sys, batchcap.cli as cli\n"
        "try: cli.main(['evaluate', *sys.argv[1:]])\n"
        "finally: assert 'tensorflow' not in sys.modules\n"
    )
    command = [sys.executable, "-c", program, str(good), str(references)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "CIDEr-D" in done.stdout
