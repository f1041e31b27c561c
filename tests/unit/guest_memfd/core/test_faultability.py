"""Faultability is a total map, cheap in fragments whatever the size of the inode."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable
from itertools import pairwise

from gmem.guest_memfd.core.faultability import FaultabilityMap, opposite
from gmem.guest_memfd.core.values import Fragment
from gmem.uapi.flags import Faultability
from gmem.uapi.pages import PgRange

GUEST, ALL = Faultability.GUEST, Faultability.ALL
PAGES_1TIB = 1 << 28


def test_a_new_map_is_private_throughout() -> None:
    pages = FaultabilityMap(512)
    assert list(pages.runs(pages.whole)) == [Fragment(pages.whole, GUEST)]
    assert pages.shared_pages == 0
    assert pages.nr_fragments == 1
    assert not pages.any_in(pages.whole, ALL)
    assert not pages.any_in(PgRange(5, 5), GUEST)


def test_do_undo_is_never_having_done_it() -> None:
    pages = FaultabilityMap(512)
    pages.store(PgRange(3, 9), ALL)
    pages.store(PgRange(5, 6), GUEST)
    assert [pages[at] for at in (2, 3, 5, 8, 9)] == [GUEST, ALL, GUEST, ALL, GUEST]
    assert pages.runs_of(PgRange(4, 9), ALL) == [PgRange(4, 5), PgRange(6, 9)]
    assert pages.runs_of(PgRange(4, 9), GUEST) == [PgRange(5, 6)]
    assert pages.nr_fragments == 5

    pages.store(PgRange(0, 512), GUEST)

    assert pages.nr_fragments == 1
    assert pages.first_fragments(9) == (Fragment(pages.whole, GUEST),)
    pages.check()


def test_listing_is_bounded() -> None:
    pages = FaultabilityMap(512)
    pages.store(PgRange(3, 9), ALL)
    assert len(pages.first_fragments(2)) == 2


def test_the_other_value() -> None:
    assert opposite(GUEST) is ALL
    assert opposite(ALL) is GUEST


def test_a_1_tib_inode_costs_its_fragments_only(
    report_line: Callable[[str], None],
) -> None:
    """100,000 conversions of random ranges; the whole stays total and merged."""
    pages = convert_at_random(100_000)
    pages.check()
    fragments = list(pages.runs(pages.whole))
    assert len(fragments) == pages.nr_fragments > 50_000
    assert all(a.pages.stop == b.pages.start for a, b in pairwise(fragments))
    assert all(a.faultability is not b.faultability for a, b in pairwise(fragments))
    report_line(
        f"faultability of 1 TiB: {pages.nr_fragments} fragments, "
        f"{pages.fragment_bytes} bytes per fragment"
    )
    assert pages.fragment_bytes <= 64


def test_fragment_bytes_is_what_is_really_taken() -> None:
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    pages = convert_at_random(3_000)
    taken = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert 0.6 <= taken / pages.nr_fragments / pages.fragment_bytes <= 1.6


def convert_at_random(count: int) -> FaultabilityMap:
    chance = random.Random(8121)
    pages = FaultabilityMap(PAGES_1TIB)
    for _ in range(count):
        start = chance.randrange(PAGES_1TIB - 64)
        value = chance.choice((GUEST, ALL))
        pages.store(PgRange(start, start + chance.randrange(1, 64)), value)
        # As each conversion does: it tells the journal.
        pages.drain()
    return pages
