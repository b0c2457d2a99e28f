"""How the driver of a run on Ray knows that a cluster without rows makes progress."""

import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from batchcap.captioning.ray_engine import Pulse, Workers, asking, at_most_every, with_news


def test_items_are_passed_on_and_none_means_progress() -> None:
    go_on = threading.Event()

    def items() -> Iterator[int]:
        yield 1
        assert go_on.wait(60)
        yield 2

    news = with_news(items(), lambda: True, 0.01)
    assert [next(news) for _ in range(3)] == [1, None, None]
    go_on.set()
    assert [item for item in news if item is not None] == [2]


def test_cluster_without_progress_yields_nothing() -> None:
    go_on = threading.Event()
    asked = []

    def moves() -> bool:
        asked.append(True)
        if len(asked) == 3:
            go_on.set()
        return False

    def items() -> Iterator[int]:
        assert go_on.wait(60)
        yield 1

    assert [*with_news(items(), moves, 0.01)] == [1]
    assert len(asked) >= 3


def test_a_failure_of_the_items_is_raised() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ZeroDivisionError

    news = with_news(items(), lambda: True, 60)
    assert next(news) == 1
    with pytest.raises(ZeroDivisionError):
        next(news)


def test_closing_ends_the_thread() -> None:
    before = threading.active_count()
    news = with_news(iter(range(100)), lambda: True, 60)
    assert next(news) == 0
    news.close()
    deadline = time.monotonic() + 60
    while threading.active_count() > before:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_reports_are_limited() -> None:
    reports: list[int] = []
    report = at_most_every(3600, lambda: reports.append(1))
    for _ in range(5):
        report()
    assert reports == [1]
    report = at_most_every(0, lambda: reports.append(1))
    for _ in range(5):
        report()
    assert len(reports) == 6


class Cluster:
    """The part of Ray that `asking` uses: a pulse that answers at once, or never."""

    def __init__(self) -> None:
        self.pulse, self.answers = Pulse(), True
        self.nodes: list[dict[str, Any]] = [{"NodeID": node, "Alive": True} for node in "ab"]
        self.ask = self
        self.moves = asking(self, self, Workers(2, 4, 1.0), 100)

    def remote(self) -> str:
        return "asked"

    def wait(self, asked: list[str], timeout: float) -> tuple[list[str], list[str]]:
        assert timeout == 0
        return (asked, []) if self.answers else ([], asked)

    def get(self, _asked: str) -> tuple[bool, int, int]:
        return self.pulse.ask()

    def moves_twice(self) -> list[bool]:
        """Return whether it makes progress, and whether it still does without new reports."""
        return [self.moves(), self.moves()]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    import ray

    cluster = Cluster()
    monkeypatch.setattr(ray, "nodes", lambda: cluster.nodes)
    return cluster


def test_a_cluster_without_workers_is_waited_for(cluster: Cluster) -> None:
    assert cluster.moves_twice() == [True, True]


def test_a_busy_worker_has_to_report(cluster: Cluster) -> None:
    cluster.pulse.report("1", "a", 1)
    assert cluster.moves_twice() == [True, False]
    cluster.pulse.report("1", "a", 2)
    assert cluster.moves_twice() == [True, False]


def test_idle_workers_are_waited_for_only_while_others_are_missing(cluster: Cluster) -> None:
    cluster.pulse.report("1", "a", 0)
    assert cluster.moves_twice() == [True, True]
    cluster.pulse.report("2", "b", 0)
    assert cluster.moves_twice() == [True, False]


def test_a_worker_whose_node_died_is_waited_for(cluster: Cluster) -> None:
    cluster.pulse.report("1", "a", 0)
    cluster.pulse.report("2", "b", 1)
    assert cluster.moves_twice() == [True, False]
    cluster.nodes[1] = {"NodeID": "b", "Alive": False}
    assert cluster.moves_twice() == [True, True]
    cluster.pulse.report("2", "a", 1)  # restarted by Ray
    assert cluster.moves_twice() == [True, False]


def test_cluster_that_does_not_answer_makes_no_progress(cluster: Cluster) -> None:
    cluster.answers = False
    assert cluster.moves_twice() == [False, False]
    cluster.answers = True
    assert cluster.moves()


def test_waiting_for_machines_is_logged_periodically(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start = time.monotonic()

    def logged_at(seconds: float) -> int:
        monkeypatch.setattr(time, "monotonic", lambda: start + seconds)
        with caplog.at_level(logging.WARNING):
            cluster.moves()
        return len(caplog.messages)

    assert [logged_at(seconds) for seconds in (50, 150, 200, 300)] == [0, 1, 1, 2]
    assert caplog.messages[0] == (
        "the Ray cluster has room for 0 of 2 workers of 4 CPUs and 1 GPUs, and none is busy; "
        "waiting for machines"
    )
    cluster.pulse.report("1", "a", 1)
    assert [logged_at(seconds) for seconds in (500, 700)] == [2, 2]
