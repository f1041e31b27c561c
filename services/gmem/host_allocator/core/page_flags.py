"""What /proc/kpageflags would show of every frame, counted by flag word.

    base memory, free       BUDDY
    boot memmap             RESERVED; vmemmap pages that were taken back have no flag
    4K folios of owners     LRU, UNEVICTABLE: pages of a guest_memfd's file
    huge folios             HUGE, and COMPOUND_HEAD or COMPOUND_TAIL
    split huge folios       as 4K folios: their pages are folios of their own

HWPOISON is added to the very frames with a memory error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Final

from gmem.host_allocator.core.base import BaseAllocator
from gmem.host_allocator.core.hugetlb import HugetlbAllocator
from gmem.host_allocator.core.nodes import NumaNode
from gmem.host_allocator.core.values import PageFlagCount
from gmem.uapi.flags import PageFlag

_IN_A_FILE: Final = PageFlag.LRU | PageFlag.UNEVICTABLE
_HEAD: Final = PageFlag.HUGE | PageFlag.COMPOUND_HEAD
_TAIL: Final = PageFlag.HUGE | PageFlag.COMPOUND_TAIL


def page_flags(
    nodes: Iterable[NumaNode], base: BaseAllocator, pools: Iterable[HugetlbAllocator]
) -> tuple[PageFlagCount, ...]:
    """Count the frames of a host by flag word, by rising word."""
    counts: Counter[int] = Counter()
    for node in nodes:
        counts[PageFlag.BUDDY] += len(node.base)
        counts[PageFlag.RESERVED] += node.reserved_memmap_pages
        counts[0] += len(node.memmap) - node.reserved_memmap_pages
        counts[_IN_A_FILE] += node.allocated_pages
    withheld = [run for node in nodes for run in node.withheld.runs()]
    poisoned = dict.fromkeys(base.hwpoison, int(_IN_A_FILE))
    for pool in pools:
        _add_pool(counts, pool)
        poisoned |= _poisoned(pool)

    for pfn, flags in poisoned.items():
        if not any(pfn in run for run in withheld):
            counts[flags] -= 1
            counts[flags | PageFlag.HWPOISON] += 1
    # The whole folio is lost with one bad frame: the kernel marks its head.
    counts[PageFlag.HWPOISON] += sum(map(len, withheld))
    return tuple(
        PageFlagCount(int(flags), nr) for flags, nr in sorted(counts.items()) if nr
    )


def _add_pool(counts: Counter[int], pool: HugetlbAllocator) -> None:
    split = sum(live.is_split for live in pool.live.values())
    whole = pool.hstate.nr_huge_pages - split
    nr_pages = 1 << pool.hstate.order
    counts[_HEAD] += whole
    counts[_TAIL] += whole * (nr_pages - 1)
    counts[_IN_A_FILE] += split * nr_pages


def _poisoned(pool: HugetlbAllocator) -> Mapping[int, int]:
    """Return the flags that poisoned frames of live folios were counted under."""
    mask = (1 << pool.hstate.order) - 1
    found: dict[int, int] = {}
    for pfn in pool.hwpoison:
        live = pool.live.get(pfn & ~mask)
        if live is not None:
            whole = _TAIL if pfn & mask else _HEAD
            found[pfn] = int(_IN_A_FILE if live.is_split else whole)
    return found
