"""Runs of equal values: a total map that a dictionary cannot be told from."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gmem.uapi.pages import PgRange
from gmem.vmm.core.attributes import MemoryAttributes
from gmem.vmm.core.runs import PAGES_LIMIT, RunMap

PAGES = 24
changes = st.lists(
    st.tuples(st.integers(0, PAGES), st.integers(0, PAGES), st.integers(0, 2)),
    max_size=12,
)


@given(changes)
def test_runs_hold_what_a_dictionary_holds(history: list[tuple[int, int, int]]) -> None:
    runs, model = RunMap(0), [0] * PAGES
    for one, other, value in history:
        pages = PgRange(min(one, other), max(one, other))
        runs.set(pages, value)
        model[pages.start : pages.stop] = [value] * len(pages)
        runs.check()

    assert [runs.get(page) for page in range(PAGES)] == model
    changes_of_value = sum(a != b for a, b in zip(model, [*model[1:], 0], strict=True))
    assert len(runs) == 1 + changes_of_value
    spelt = [v for run, v in runs.runs(PgRange(2, PAGES)) for _ in run]
    assert spelt == model[2:]


def test_the_last_page_can_be_set() -> None:
    runs = RunMap("a")
    runs.set(PgRange(PAGES_LIMIT - 1, PAGES_LIMIT), "b")
    assert (runs.get(PAGES_LIMIT - 1), runs.get(PAGES_LIMIT - 2)) == ("b", "a")
    assert list(runs.runs(PgRange(PAGES_LIMIT - 2, PAGES_LIMIT))) == [
        (PgRange(PAGES_LIMIT - 2, PAGES_LIMIT - 1), "a"),
        (PgRange(PAGES_LIMIT - 1, PAGES_LIMIT), "b"),
    ]


def test_attributes_are_shared_by_default_and_count_runs() -> None:
    attributes = MemoryAttributes()
    assert not attributes.is_private(PAGES_LIMIT - 1)
    assert len(attributes) == 1
