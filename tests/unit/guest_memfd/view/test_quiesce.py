from __future__ import annotations

import pytest

from gmem.guest_memfd.view.callers import is_being_killed
from gmem.guest_memfd.view.quiesce import _runs_of_pages


@pytest.mark.parametrize(
    ("pages", "inside", "runs"),
    [
        (set(), [(0, 10)], []),
        ({1, 2, 5}, [(0, 10)], [(1, 3), (5, 6)]),
        ({1, 2, 5, 11, 30}, [(2, 6), (10, 12)], [(2, 3), (5, 6), (11, 12)]),
        ({3, 4}, [(0, 4), (4, 8)], [(3, 4), (4, 5)]),
        ({99}, [(0, 4)], []),
    ],
    ids=str,
)
def test_answered_pages_become_the_runs_of_the_next_round(
    pages: set[int], inside: list[tuple[int, int]], runs: list[tuple[int, int]]
) -> None:
    assert _runs_of_pages(pages, inside) == runs


def test_init_lives_and_an_unused_pid_is_gone() -> None:
    assert not is_being_killed(1)
    assert not is_being_killed(0)
    assert is_being_killed((1 << 22) + 1)
