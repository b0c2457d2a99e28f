"""The summary of a run, for people, scripts and Prometheus."""

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from batchcap.captioning.summary import (
    Counts,
    RunSummary,
    metrics_text,
    read_rate,
    write_metrics,
    write_summary,
)
from batchcap.errors import OutputError


def summary_of(**fields: Any) -> RunSummary:
    counts = Counts(**{name: fields.pop(name) for name in vars(Counts()) if name in fields})
    started_at = "2024-05-17T12:00:00+00:00"
    return RunSummary("/data/out/captions.parquet", "run-1", started_at, counts, **fields)


@pytest.fixture
def summary() -> RunSummary:
    finished = summary_of(
        captioned=80,
        reused=10,
        failed=Counter(empty=6, corrupt=4),
        already_done=900,
        failed_before=3,
        new=95,
        changed=4,
        retried=1,
        vanished=7,
        pruned=5,
        seconds=20.0,
        last_rate=1.0,
        stage_seconds={"load": 12.5, "backbone": 1e-05},
        metadata={"batchcap.model": "abc"},
        versions={"batchcap": "1"},
        ended_at="2024-05-17T12:30:00+00:00",
    )
    finished.finish(max_failures=None)
    return finished


METRICS = """\
# HELP batchcap_run_images Images of the last run, by state.
# TYPE batchcap_run_images gauge
batchcap_run_images{state="found"} 1000.0
batchcap_run_images{state="captioned"} 80.0
batchcap_run_images{state="reused"} 10.0
batchcap_run_images{state="already_done"} 900.0
batchcap_run_images{state="failed_before"} 3.0
batchcap_run_images{state="vanished"} 7.0
batchcap_run_images{state="failed"} 10.0
# HELP batchcap_run_failures Images that failed in the last run, by reason.
# TYPE batchcap_run_failures gauge
batchcap_run_failures{reason="corrupt"} 4.0
batchcap_run_failures{reason="empty"} 6.0
# HELP batchcap_run_stage_seconds Seconds of work of the last run, by stage.
# TYPE batchcap_run_stage_seconds gauge
batchcap_run_stage_seconds{stage="backbone"} 1e-05
batchcap_run_stage_seconds{stage="load"} 12.5
# HELP batchcap_run_seconds Seconds that the last run captioned.
# TYPE batchcap_run_seconds gauge
batchcap_run_seconds 20.0
# HELP batchcap_run_images_per_second Rate of the last run.
# TYPE batchcap_run_images_per_second gauge
batchcap_run_images_per_second 5.0
# HELP batchcap_run_exit_code Exit code of the last run.
# TYPE batchcap_run_exit_code gauge
batchcap_run_exit_code 0.0
# HELP batchcap_run_end_timestamp_seconds When the last run ended, in Unix time.
# TYPE batchcap_run_end_timestamp_seconds gauge
batchcap_run_end_timestamp_seconds 1.715949e+09
"""


def test_metrics_text(summary, tmp_path):
    write_metrics(tmp_path / "batchcap.prom", summary)
    assert (tmp_path / "batchcap.prom").read_text() == METRICS


@pytest.mark.parametrize("empty", [False, True])
def test_prometheus_reads_the_metrics(summary, empty):
    families = [*text_string_to_metric_families(metrics_text(summary_of() if empty else summary))]
    assert len(families) == 7
    for family in families:
        assert family.name.startswith("batchcap_run_")
        assert family.type == "gauge"
        assert family.documentation
    values = {
        (sample.name, *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }
    assert values["batchcap_run_images", "found"] == (0 if empty else 1000)
    assert values["batchcap_run_exit_code",] == (1 if empty else 0)
    assert len(values) == (11 if empty else 15)


def test_summary_json(summary, tmp_path):
    """It could not be written after a failure: `asdict` makes a Counter of a Counter's items."""
    write_summary(tmp_path / "out.summary.json", summary)
    written = json.loads((tmp_path / "out.summary.json").read_text())
    assert written == {
        "output": "captions.parquet",
        "outcome": "done",
        "found": 1000,
        "run_id": "run-1",
        "started_at": "2024-05-17T12:00:00+00:00",
        "captioned": 80,
        "reused": 10,
        "failed": {"empty": 6, "corrupt": 4},
        "already_done": 900,
        "failed_before": 3,
        "new": 95,
        "changed": 4,
        "retried": 1,
        "vanished": 7,
        "pruned": 5,
        "seconds": 20.0,
        "stage_seconds": {"load": 12.5, "backbone": 1e-05},
        "metadata": {"batchcap.model": "abc"},
        "versions": {"batchcap": "1"},
        "exit_code": 0,
        "ended_at": "2024-05-17T12:30:00+00:00",
        "images_per_second": 5.0,
    }
    assert read_rate(tmp_path / "out.summary.json") == 5.0


def test_summary_text(summary):
    assert str(summary) == (
        "/data/out/captions.parquet: 1000 found, 80 captioned, 10 reused, "
        "10 failed (6 empty, 4 corrupt), 900 already done, 7 vanished (5 dropped); "
        "20.0 s, 5.0 images/s"
    )
    assert str(summary_of()) == "/data/out/captions.parquet: 0 found, 0 captioned, 0 failed"


@pytest.mark.parametrize(("allowed", "exit_code"), [(None, 0), (13, 0), (12, 3), (0, 3)], ids=str)
def test_earlier_failures_count_too(summary, allowed, exit_code):
    summary.finish(allowed)
    assert (summary.outcome, summary.exit_code) == ("done", exit_code)


COUNTS = st.builds(
    Counts,
    captioned=st.integers(0, 9),
    new=st.integers(0, 9),
    failed=st.dictionaries(st.sampled_from(["empty", "corrupt"]), st.integers(1, 9)).map(Counter),
)


@given(COUNTS, COUNTS)
def test_counts_can_be_added_and_subtracted(first: Counts, second: Counts) -> None:
    total = replace(first, failed=first.failed.copy())
    total += second
    assert total.found == first.found + second.found
    assert total.taken == first.taken + second.taken
    back = Counter(dict.fromkeys(second.failed, 0))
    back.subtract(second.failed)
    total += Counts(captioned=-second.captioned, new=-second.new, failed=back)
    assert total == first


def test_run_without_an_end_has_failed():
    assert summary_of().as_json().items() >= {"outcome": "failed", "exit_code": 1}.items()


def test_run_with_nothing_to_do_keeps_the_last_rate():
    assert summary_of(already_done=9, seconds=1.0, last_rate=4.0).images_per_second == 4.0
    assert summary_of(captioned=9).images_per_second is None


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b"7", b'"text"', b"null", b"{}", b"\xff\xfe", b"[" * 100_000),
        *(
            b'{"images_per_second": %s}' % rate
            for rate in (b"null", b'"5"', b"true", b"0.0", b"-1.5", b"NaN", b"Infinity", b"[]")
        ),
        b'{"images_per_second": 1%s}' % (b"0" * 400),
    ],
)
def test_summary_without_a_valid_rate_has_none(tmp_path, content):
    """A damaged summary of an earlier run must not fail this one."""
    (tmp_path / "a.json").write_bytes(content)
    assert read_rate(tmp_path / "a.json") is None


def test_missing_summary_has_no_rate(tmp_path):
    assert read_rate(tmp_path / "a.json") is None
    assert read_rate(tmp_path) is None
    (tmp_path / "a.json").write_text('{"images_per_second": 5}')
    assert read_rate(tmp_path / "a.json") == 5.0


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_damaged_summary_raises_nothing(tmp_path, data):
    whole = json.dumps(summary_of(captioned=3, seconds=2.0).as_json()).encode()
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for position in data.draw(st.lists(st.integers(0, max(0, len(damaged) - 1)), max_size=3)):
        if damaged:
            damaged[position] = data.draw(st.integers(0, 255))
    (tmp_path / "a.json").write_bytes(damaged)
    rate = read_rate(tmp_path / "a.json")
    assert rate is None or rate > 0


def test_unwritable_path_is_named(summary, tmp_path):
    for write in (write_summary, write_metrics):
        with pytest.raises(OutputError, match="missing/a"):
            write(tmp_path / "missing" / "a", summary)
