"""Stage 2: which guest frames a VM reaches, in entries of 1G, 2M and 4K.

The level of an entry is the smaller of the folio's order and what the *lpage rules*
allow (kvm_lpage_info): a huge entry must lie inside the memslot; the memslot's guest
address and userspace side (and in the 51-patch series the offset in the file) must
agree modulo the level's size; and all pages of it must have one attribute. Shared
memory is mapped at 4K: that is how userspace maps a file whose host faults are order 0.

Zapping takes whole entries, so that zapping one page of a 1G entry removes 1G.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, TypeAlias

from gmem.uapi.lineage import Lineage
from gmem.uapi.pages import SIZE_1G, SIZE_2M, PgRange, order_of
from gmem.vmm.core.attributes import MemoryAttributes
from gmem.vmm.core.memslots import Memslot

ORDER_1G: Final = order_of(SIZE_1G)
ORDER_2M: Final = order_of(SIZE_2M)
ORDERS: Final = (ORDER_1G, ORDER_2M, 0)
"""The levels of stage 2, largest first."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One mapping: 2^order guest frames from `gfn` on; `pfn` 0 is userspace memory."""

    gfn: int
    order: int
    private: bool
    pfn: int

    @property
    def gfns(self) -> PgRange:
        """The guest frames it maps."""
        return PgRange(self.gfn, self.gfn + (1 << self.order))


@dataclass(frozen=True, slots=True)
class Stage2Statistics:
    """A snapshot, as /sys/kernel/debug/kvm/pages_{1g,2m,4k}."""

    pages_1g: int
    pages_2m: int
    pages_4k: int


class Stage2:
    """The secondary page table of one VM; no two entries overlap."""

    def __init__(self) -> None:
        self._levels: dict[int, dict[int, Entry]] = {order: {} for order in ORDERS}

    def __iter__(self) -> Iterator[Entry]:
        """Iterate over the entries, those of the largest level first."""
        for level in self._levels.values():
            for gfn in sorted(level):
                yield level[gfn]

    def lookup(self, gfn: int) -> Entry | None:
        """Return the entry that maps `gfn`."""
        for order, level in self._levels.items():
            entry = level.get(gfn >> order << order)
            if entry is not None:
                return entry
        return None

    def install(self, entry: Entry) -> None:
        """Map an entry; what it overlaps is replaced."""
        assert entry.gfn % (1 << entry.order) == 0, entry
        self.zap(entry.gfns)
        self._levels[entry.order][entry.gfn] = entry

    def widened(self, gfns: PgRange) -> PgRange:
        """Return `gfns` and the rest of the entries that `zap` would remove with it."""
        if not gfns:
            return gfns
        ends = [self.lookup(gfns.start), self.lookup(gfns.stop - 1)]
        reached = [gfns, *(entry.gfns for entry in ends if entry is not None)]
        return PgRange(min(r.start for r in reached), max(r.stop for r in reached))

    def zap(self, gfns: PgRange) -> int:
        """Remove every entry that touches `gfns`; return how many (unmap_gfn_range)."""
        if not len(gfns):
            return 0
        return sum(_zap_level(level, order, gfns) for order, level in self._items())

    def statistics(self) -> Stage2Statistics:
        """Count the entries by level."""
        return Stage2Statistics(
            pages_1g=len(self._levels[ORDER_1G]),
            pages_2m=len(self._levels[ORDER_2M]),
            pages_4k=len(self._levels[0]),
        )

    def check(self) -> None:
        """Assert that no guest frame is mapped twice."""
        entries = sorted(self, key=lambda entry: entry.gfn)
        for low, high in pairwise(entries):
            assert low.gfns.stop <= high.gfn, (low, high)

    def _items(self) -> list[tuple[int, dict[int, Entry]]]:
        return list(self._levels.items())


def _zap_level(level: dict[int, Entry], order: int, gfns: PgRange) -> int:
    starts = gfns.huge_starts(order)
    # A wide range over a sparse table: look at what is there instead.
    if len(starts) > len(level):
        doomed = [gfn for gfn in level if gfn in starts]
    else:
        doomed = [gfn for gfn in starts if gfn in level]
    for gfn in doomed:
        del level[gfn]
    return len(doomed)


LpageRule: TypeAlias = Callable[[Memslot, MemoryAttributes, PgRange, int], bool]


def inside_slot(
    slot: Memslot, attributes: MemoryAttributes, gfns: PgRange, order: int
) -> bool:
    """Allow no huge entry over an unaligned head or tail of the memslot."""
    del attributes, order
    return slot.gfns.covers(gfns)


def userspace_agrees(
    slot: Memslot, attributes: MemoryAttributes, gfns: PgRange, order: int
) -> bool:
    """Allow a level only where base_gfn and the userspace side are equal modulo it."""
    del attributes, gfns
    return (slot.gfns.start ^ slot.userspace_page) % (1 << order) == 0


def attributes_agree(
    slot: Memslot, attributes: MemoryAttributes, gfns: PgRange, order: int
) -> bool:
    """Allow no huge entry over pages with mixed attributes."""
    del slot, order
    return not attributes.are_mixed(gfns)


def file_agrees(
    slot: Memslot, attributes: MemoryAttributes, gfns: PgRange, order: int
) -> bool:
    """Allow a level only where base_gfn and gmem.pgoff are equal modulo it."""
    del attributes, gfns
    return (slot.gfns.start ^ slot.file_page) % (1 << order) == 0


def attributes_agree_where_they_count(
    slot: Memslot, attributes: MemoryAttributes, gfns: PgRange, order: int
) -> bool:
    """As attributes_agree(), but for slots whose file says what is private."""
    return slot.gmem_only or attributes_agree(slot, attributes, gfns, order)


LPAGE_RULES: Final[dict[Lineage, tuple[LpageRule, ...]]] = {
    Lineage.RFC_V1: (inside_slot, userspace_agrees, attributes_agree),
    Lineage.RFC_V2: (
        inside_slot,
        userspace_agrees,
        file_agrees,
        attributes_agree_where_they_count,
    ),
    Lineage.IN_PLACE: (inside_slot, userspace_agrees, file_agrees, attributes_agree),
    # Its folios are of order 0, and max_order is forced to that.
    Lineage.MAINLINE: (inside_slot, userspace_agrees, attributes_agree),
}


def max_order(
    lineage: Lineage,
    slot: Memslot,
    attributes: MemoryAttributes,
    gfn: int,
    folio_order: int,
) -> int:
    """Return the order of the entry that may map private `gfn` (kvm_max_level)."""
    rules = LPAGE_RULES[lineage]
    for order in (ORDER_1G, ORDER_2M):
        gfns = PgRange(gfn, gfn + 1).rounded_out(order)
        allowed = all(rule(slot, attributes, gfns, order) for rule in rules)
        if order <= folio_order and allowed:
            return order
    return 0
