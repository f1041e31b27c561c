"""Does any interleaving of the three cores break an invariant?"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache

import pytest

from gmem.uapi.lineage import Lineage
from tests.sim.campaign import History, run
from tests.sim.lineages import PLAYS, lineage_of
from tests.sim.options import Options
from tests.support.sources import REPOSITORY

# Fewer seeds than these say nothing about what is seen sometimes.
SEEDS_MIN = 200


@cache
def played(seed: int, lineage: Lineage) -> History:
    """Run a history, which is the same each time (test_one_seed_is_one_history)."""
    return run(seed, lineage=lineage)


def sim(*arguments: str, hash_seed: str = "random") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.sim", *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.mark.parametrize("lineage", PLAYS)
def test_world_stays_consistent_then_converges(
    lineage: Lineage,
    request: pytest.FixtureRequest,
    report_line: Callable[[str], None],
) -> None:
    first = request.config.getoption("--first-seed")
    seeds = range(first, first + request.config.getoption("--seeds"))
    only = request.config.getoption("--lineage")
    mine = [seed for seed in seeds if (only or lineage_of(seed)) == lineage]
    marks: Counter[str] = Counter()
    for seed in mine:
        history = played(seed, lineage)
        assert not history.failure, f"{history.failure}\n{history.replay}"
        marks += history.marks
    counts = ", ".join(f"{marks[mark]} {mark}" for mark in PLAYS[lineage].sometimes)
    report_line(f"sim, {lineage}, {len(mine)} of {seeds}: {counts}")


@pytest.mark.parametrize("lineage", PLAYS)
def test_the_fixed_seeds_reach_what_they_are_there_for(lineage: Lineage) -> None:
    marks: Counter[str] = Counter()
    sometimes = PLAYS[lineage].sometimes
    # Those that are of the lineage anyhow are played already.
    for seed in sorted(range(SEEDS_MIN), key=lambda seed: lineage_of(seed) != lineage):
        marks += played(seed, lineage).marks
        if all(marks[mark] for mark in sometimes):
            return
    never = [mark for mark in sometimes if not marks[mark]]
    pytest.fail(f"{SEEDS_MIN} seeds never saw {never}")


def test_one_seed_is_one_history() -> None:
    seeds = range(12)

    def hashes() -> str:
        histories = [run(seed) for seed in seeds]
        return "".join(f"{h.seed} {h.lineage} {h.trace_hash}\n" for h in histories)

    here = hashes()
    assert here == hashes()
    assert len({line.split()[2] for line in here.splitlines()}) == len(seeds)

    for hash_seed in ("0", "1", "random"):
        again = sim("--seeds", str(len(seeds)), "--hash", hash_seed=hash_seed)
        assert again.stdout == here, again.stderr


def test_no_fault_is_on_unless_it_is_asked_for() -> None:
    assert str(Options()) == "no faults"
    assert run(0, options=Options()).failure == ""


def test_a_failing_seed_prints_one_replay_line_that_works() -> None:
    name = "a view is closed but not unmapped"
    found = sim("--seeds", "50", "--mutant", name).stdout.splitlines()
    replay = found[-1].removeprefix("python -m tests.sim ").split()

    again = sim(*replay, "--mutant", name)
    assert again.stdout.splitlines() == found
    assert sim(*replay).returncode == 0
