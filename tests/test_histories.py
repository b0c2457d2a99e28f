"""Kills at each change of a file, and random histories: no row is lost, duplicated or wrong."""

from collections import Counter
from dataclasses import replace
from itertools import count

import pytest
from helpers.simulated_kills import Death
from histories import PHOTOS, History, Merge, Run, play, search

ALL = frozenset(PHOTOS)
SOME = frozenset("ace")
LAST_STEPS = {
    "changed photos": [Run(), Run(changed=SOME, removed=frozenset("b"), prune=True)],
    "second try": [Run(), Run(changed=ALL, trouble=Death(30)), Run(changed=SOME)],
    "overwriting": [Run(), Run(changed=SOME, overwrite=True)],
    "merge to a file": [Run(), Merge("merged.parquet")],
    "merge to a folder": [Run(), Merge("merged")],
}
FOUND = {  # by random histories; each once lost a row
    "unsynced folder": History(
        "out",
        is_in_store=False,
        shards=2,
        steps=[Run(), Run(shard=1, trouble=Death(18, power_cut=0))],
    ),
    "old rows dropped first": History(
        "out.parquet",
        is_in_store=False,
        shards=1,
        steps=[
            Run(rows_per_part=1),
            Run(changed=frozenset("a"), trouble=Death(6)),
            Run(trouble=Death(8)),
        ],
    ),
}
OUTPUTS = ("out.parquet", "out")
PLACES = {"kill": (False, None), "power cut": (False, 1), "kill with a store": (True, None)}


def kill_everywhere(history: History, power_cut: int | None = None) -> None:
    """Kill the last step before its n-th change of a file, for each n until it survives."""
    *steps, last = history.steps
    for changes in count():
        death = Death(changes, power_cut and power_cut + changes)
        killed = play(
            replace(history, steps=[*steps, replace(last, trouble=death)]),
            Counter(),
        )
        if not killed[-1]:
            return


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_kill_at_any_change_of_a_file_loses_and_doubles_no_row(output):
    kill_everywhere(History(output, False, shards=1, steps=LAST_STEPS["changed photos"]))


@pytest.mark.slow
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("steps", [name for name in LAST_STEPS if name != "changed photos"])
def test_no_row_is_lost_or_doubled_whatever_is_killed(output, place, steps):
    is_in_store, power_cut = PLACES[place]
    kill_everywhere(History(output, is_in_store, shards=1, steps=LAST_STEPS[steps]), power_cut)


@pytest.mark.parametrize("history", FOUND.values(), ids=FOUND.keys())
def test_histories_that_once_lost_a_row_lose_none(history):
    play(history, Counter())


def test_random_histories_lose_and_double_no_row():
    search(seed=0, count=100, tally=Counter())


@pytest.mark.slow
def test_many_random_histories_lose_and_double_no_row():
    search(seed=1, count=250, tally=Counter())
