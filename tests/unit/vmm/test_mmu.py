"""Stage-2 levels as a table, and zapping of whole entries."""

from __future__ import annotations

import pytest

from gmem.uapi.flags import MemoryAttribute
from gmem.uapi.lineage import Lineage
from gmem.uapi.pages import PAGE_SHIFT, PgRange
from gmem.vmm.core.attributes import MemoryAttributes
from gmem.vmm.core.memslots import Memslot, Region, Userspace
from gmem.vmm.core.mmu import Entry, Stage2, max_order

G, M = 1 << 18, 1 << 9
PRIVATE = MemoryAttribute.PRIVATE


def slot_of(gfns: PgRange, userspace_page: int | None = None) -> Memslot:
    side = None
    if userspace_page is not None:
        side = Userspace("descriptors/1", userspace_page << PAGE_SHIFT)
    region = Region(0, 4, gfns.offset, gfns.size, side, "hosts/h/guestMemfds/1")
    return Memslot(region, None, 1)


@pytest.mark.parametrize(
    ("what", "slot", "gfn", "folio_order", "order"),
    [
        ("1G folio", slot_of(PgRange(0, 4 * G)), 5, 18, 18),
        ("2M folio", slot_of(PgRange(0, 4 * G)), 5, 9, 9),
        ("4K folio", slot_of(PgRange(0, 4 * G)), 5, 0, 0),
        ("head below 1G", slot_of(PgRange(M, 2 * G)), M, 18, 9),
        ("head below 2M", slot_of(PgRange(1, 2 * G)), 1, 18, 0),
        ("behind an unaligned head", slot_of(PgRange(G - 1, 3 * G)), G, 18, 0),
        ("behind a 2M-aligned head", slot_of(PgRange(G - M, 3 * G)), G, 18, 9),
        ("tail below 1G", slot_of(PgRange(0, G + M)), G + 3, 18, 9),
        ("tail below 2M", slot_of(PgRange(0, G + 3)), G + 1, 18, 0),
        ("before an unaligned tail", slot_of(PgRange(0, G + 3)), 7, 18, 18),
        ("userspace agrees", slot_of(PgRange(G, 3 * G), 2 * G), G, 18, 18),
        ("userspace off by 2M", slot_of(PgRange(G, 3 * G), M), G, 18, 9),
        ("userspace off by 4K", slot_of(PgRange(G, 3 * G), 1), G, 18, 0),
        ("no userspace is address 0", slot_of(PgRange(M, 3 * G)), G, 18, 9),
    ],
)
def test_level_follows_folio_and_alignment(
    what: str, slot: Memslot, gfn: int, folio_order: int, order: int
) -> None:
    attributes = MemoryAttributes()
    attributes.store(slot.gfns, PRIVATE)
    assert max_order(Lineage.RFC_V1, slot, attributes, gfn, folio_order) == order, what


@pytest.mark.parametrize(
    ("shared", "gfn", "order"),
    [
        (PgRange(G, G + 1), 0, 18),
        (PgRange(0, 1), M, 9),
        (PgRange(0, 1), 1, 0),
        (PgRange(0, M), M, 9),
        (PgRange(G - 1, G), 0, 9),
        (PgRange(0, 4 * G), 0, 18),
    ],
)
def test_mixed_attributes_allow_no_huge_entry(
    shared: PgRange, gfn: int, order: int
) -> None:
    slot, attributes = slot_of(PgRange(0, 4 * G)), MemoryAttributes()
    attributes.store(slot.gfns, PRIVATE)
    attributes.store(shared, MemoryAttribute.SHARED)
    assert max_order(Lineage.RFC_V1, slot, attributes, gfn, 18) == order


def full_table() -> Stage2:
    stage2 = Stage2()
    stage2.install(Entry(0, 18, private=True, pfn=G))
    stage2.install(Entry(G, 9, private=True, pfn=2 * G))
    stage2.install(Entry(G + M, 0, private=False, pfn=0))
    stage2.check()
    return stage2


@pytest.mark.parametrize(
    ("gfns", "left"),
    [
        (PgRange(7, 8), [(G, 9), (G + M, 0)]),
        (PgRange(G - 1, G), [(G, 9), (G + M, 0)]),
        (PgRange(G - 1, G + 1), [(G + M, 0)]),
        (PgRange(G + 3, G + 4), [(0, 18), (G + M, 0)]),
        (PgRange(G + M, G + M + 1), [(0, 18), (G, 9)]),
        (PgRange(G + M + 1, 9 * G), [(0, 18), (G, 9), (G + M, 0)]),
        (PgRange(0, 9 * G), []),
        (PgRange(5, 5), [(0, 18), (G, 9), (G + M, 0)]),
    ],
)
def test_zap_takes_whole_entries(gfns: PgRange, left: list[tuple[int, int]]) -> None:
    stage2 = full_table()
    assert stage2.zap(gfns) == 3 - len(left)
    assert [(entry.gfn, entry.order) for entry in stage2] == left


def test_lookup_finds_the_entry_of_each_level() -> None:
    stage2 = full_table()
    found = {gfn: stage2.lookup(gfn) for gfn in (0, G - 1, G + 5, G + M, G + M + 1)}
    assert {gfn: entry and entry.order for gfn, entry in found.items()} == {
        0: 18,
        G - 1: 18,
        G + 5: 9,
        G + M: 0,
        G + M + 1: None,
    }


def test_smaller_entry_replaces_a_larger_one() -> None:
    stage2 = full_table()
    stage2.install(Entry(3, 0, private=False, pfn=0))
    stage2.check()
    assert stage2.statistics().pages_1g == 0
    stage2.install(Entry(0, 18, private=True, pfn=G))
    stage2.check()
    assert stage2.lookup(3) == Entry(0, 18, private=True, pfn=G)


@pytest.mark.parametrize(
    ("gfns", "widened"),
    [
        (PgRange(G + 5, G + 6), PgRange(G, 2 * G)),
        (PgRange(G - 1, G + 1), PgRange(G - 1, 2 * G)),
        (PgRange(2 * G - 1, 2 * G + 1), PgRange(G, 2 * G + 1)),
        (PgRange(5, 6), PgRange(5, 6)),
        (PgRange(7, 7), PgRange(7, 7)),
    ],
)
def test_a_flush_covers_the_entries_that_a_zap_removes(
    gfns: PgRange, widened: PgRange
) -> None:
    stage2 = Stage2()
    stage2.install(Entry(G, 18, private=True, pfn=G))
    assert stage2.widened(gfns) == widened
