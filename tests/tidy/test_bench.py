"""Every row of the benchmark is in the code, and in the results."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench import report
from tests.bench.__main__ import WHOLE_HOSTS
from tests.bench.measuring import Target, load_targets, result_of, unmeasured
from tests.bench.rows import ROWS

# What was promised; (g) has two targets.
PROMISED = ["a", "b", "c", "d", "e", "f", "g", "g-ack", "h", "i", "j", "k", "l"]
MORE = Target("x", "this", "that", "GiB/s", "more", 0.5)
LESS = Target("y", "this", "that", "us", "less", 2)


def test_every_promised_row_has_a_target_and_is_measured() -> None:
    targets = load_targets()
    assert list(targets) == PROMISED
    assert set(ROWS) | set(WHOLE_HOSTS) == set(PROMISED)
    assert {target.better for target in targets.values()} == {"more", "less"}


@pytest.mark.parametrize(
    ("target", "rounds", "met"),
    [
        (MORE, [(1.0, 2.0), (9.0, 2.0), (1.0, 2.0)], True),
        (MORE, [(0.9, 2.0)], False),
        (LESS, [(4.0, 2.0)], True),
        (LESS, [(4.1, 2.0)], False),
    ],
)
def test_a_row_is_judged_by_the_ratio_of_its_medians(
    target: Target, rounds: list[tuple[float, float]], met: bool
) -> None:
    result = result_of(target, rounds, ["on a Tuesday"])
    assert result.met is met
    assert result.outcome == ("met" if met else "missed")
    assert bool(result.cause) is not met
    assert "on a Tuesday" in result.conditions


def test_the_results_have_every_row_also_after_a_run_of_one(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    targets = {"x": MORE, "y": LESS}
    report.write(path, targets, [unmeasured(MORE, "skipped: nothing is there")])
    report.write(path, targets, [result_of(LESS, [(1.0, 1.0)], [])])

    entries = report.read(path)
    assert [(entry["row"], entry["outcome"]) for entry in entries] == [
        ("x", "skipped: nothing is there"),
        ("y", "met"),
    ]
    assert all(set(report.FIELDS) <= set(entry) for entry in entries)
