"""Pages, frames and ranges."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmem.uapi.pages import (
    PAGE_SIZE,
    PAGE_SIZES,
    SIZE_1G,
    SIZE_2M,
    PgRange,
    format_size,
    order_of,
    page_size_of,
)

Ranges = st.tuples(st.integers(0, 1 << 20), st.integers(0, 1 << 20)).map(
    lambda pair: PgRange(min(pair), max(pair))
)


def test_orders_are_those_of_x86() -> None:
    assert [order_of(size) for size in PAGE_SIZES] == [0, 9, 18]
    assert [page_size_of(order_of(size)) for size in PAGE_SIZES] == list(PAGE_SIZES)
    with pytest.raises(AssertionError):
        order_of(SIZE_2M + PAGE_SIZE)


@pytest.mark.parametrize(
    ("size", "text"),
    [(SIZE_1G, "1G"), (SIZE_2M, "2M"), (PAGE_SIZE, "4K"), (0, "0B"), (4097, "4097B")],
)
def test_sizes_are_written_as_people_say_them(size: int, text: str) -> None:
    assert format_size(size) == text


def test_a_range_is_half_open_and_not_reversed() -> None:
    pages = PgRange.of_bytes(SIZE_2M, 2 * PAGE_SIZE)
    assert (pages.start, pages.stop, len(pages)) == (512, 514, 2)
    assert list(pages) == [512, 513]
    assert (pages.offset, pages.size) == (SIZE_2M, 2 * PAGE_SIZE)
    assert 512 in pages
    assert 514 not in pages
    with pytest.raises(AssertionError):
        PgRange(2, 1)
    with pytest.raises(AssertionError):
        PgRange.of_bytes(1, PAGE_SIZE)


@given(Ranges, Ranges)
def test_intersection_is_what_both_hold(one: PgRange, other: PgRange) -> None:
    both = one.intersection(other)
    assert (len(both) > 0) == (one.overlaps(other) and min(len(one), len(other)) > 0)
    if len(both):
        assert one.covers(both)
        assert other.covers(both)
        for edge in (both.start - 1, both.stop):
            assert not (edge in one and edge in other)


@given(Ranges, st.sampled_from([0, 9, 18]))
def test_rounding_goes_to_whole_folios(pages: PgRange, order: int) -> None:
    out, inner = pages.rounded_out(order), pages.rounded_in(order)
    assert out.covers(pages)
    assert len(pages) - len(inner) < 2 << order
    assert len(out) - len(pages) < 2 << order
    for edge in (out.start, out.stop, inner.start, inner.stop):
        assert edge % (1 << order) == 0
    if len(inner):
        assert pages.covers(inner)
    assert len(pages.huge_starts(order)) == len(out) >> order


@given(Ranges, st.integers(0, 1000))
def test_shifting_there_and_back_is_nothing(pages: PgRange, by: int) -> None:
    assert pages.shifted(by).shifted(-by) == pages
