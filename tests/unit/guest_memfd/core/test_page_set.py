"""PageSet agrees with a plain set of ints, whatever is done to it."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmem.guest_memfd.core.page_set import PageSet
from gmem.uapi.pages import PgRange

NR_PAGES = 24
RANGES = st.tuples(st.integers(0, NR_PAGES), st.integers(0, NR_PAGES)).map(
    lambda pair: PgRange(min(pair), max(pair))
)


@given(st.lists(st.tuples(st.booleans(), RANGES), max_size=20), RANGES)
def test_it_is_a_set(changes: list[tuple[bool, PgRange]], pages: PgRange) -> None:
    compact, plain = PageSet(NR_PAGES), set[int]()
    for add, changed in changes:
        if add:
            compact.add(changed)
            plain |= set(changed)
        else:
            compact.discard(changed)
            plain -= set(changed)
        compact.check()

    assert {page for page in range(NR_PAGES) if page in compact} == plain
    assert compact.count == len(plain)
    assert bool(compact) is bool(plain)
    assert compact.any_in(pages) is any(page in plain for page in pages)
    assert compact.all_in(pages) is all(page in plain for page in pages)
    runs = list(compact.runs(pages))
    assert [page for run, _ in runs for page in run] == list(pages)
    assert {page for run, member in runs if member for page in run} == (
        plain & set(pages)
    )
    assert all(a[1] is not b[1] for a, b in pairwise(runs))
    assert compact.nr_runs == len(list(compact.runs(PgRange(0, NR_PAGES))))


def test_neighbours_merge() -> None:
    pages = PageSet(NR_PAGES)
    pages.add(PgRange(1, 3))
    pages.add(PgRange(5, 7))
    assert pages.nr_runs == 5

    pages.add(PgRange(3, 5))

    assert pages.members(PgRange(0, NR_PAGES)) == [PgRange(1, 7)]
    assert pages.holes(PgRange(0, 8)) == [PgRange(0, 1), PgRange(7, 8)]
    assert pages.nr_runs == 3


def test_what_is_no_number_is_no_member() -> None:
    assert "3" not in PageSet(NR_PAGES)


def test_a_page_past_the_end_is_our_bug() -> None:
    with pytest.raises(AssertionError):
        PageSet(NR_PAGES).add(PgRange(0, NR_PAGES + 1))


def test_check_finds_a_wrong_count() -> None:
    pages = PageSet(NR_PAGES)
    pages.count = 1
    with pytest.raises(AssertionError):
        pages.check()
