"""Where the folios of a dying inode go, by lineage. The views are withdrawn already.

At once: split folios are reconstructed and freed while the inode waits; nobody can hold
one, because a page that is held keeps its inode alive. Page by page: what is split or
held is left to the stash of the host (see `deferred`), and the inode goes. The third
way merges at once what it can, and leaves the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TypeAlias

from gmem.effects import Op, perform
from gmem.guest_memfd.core.deferred import DeferredMerges, LeftFolio
from gmem.guest_memfd.core.effects import ScheduleMerge
from gmem.guest_memfd.core.folios import take_out, truncate
from gmem.guest_memfd.core.inode import Inode
from gmem.guest_memfd.core.page_set import PageSet
from gmem.guest_memfd.core.values import Hold
from gmem.uapi.errors import OPERATION_ERRORS
from gmem.uapi.pages import PgRange

EvictPolicy: TypeAlias = Callable[[Inode, DeferredMerges], Op[None]]


def free_at_once(inode: Inode, deferred: DeferredMerges) -> Op[None]:
    """Free every folio, as the 39-patch series does."""
    del deferred
    yield from truncate(inode, inode.whole, [])


def free_page_by_page(inode: Inode, deferred: DeferredMerges) -> Op[None]:
    """Free what is whole and unheld; leave the rest to the stash.

    No reference count is looked at here (mapping_exiting()).
    """
    left = _split_or_held(inode)
    at = 0
    for index in left:
        yield from truncate(inode, PgRange(at, index), [])
        at = inode.unit_of(index).stop
    yield from truncate(inode, PgRange(at, inode.whole.stop), [])

    yield from take_out(inode, left)
    number = _leave(inode, left, deferred)
    if number is not None:
        yield from perform(ScheduleMerge(number))


def merge_then_free_page_by_page(inode: Inode, deferred: DeferredMerges) -> Op[None]:
    """Merge and free split folios that nobody holds; the rest page by page.

    What cannot be merged now takes that way too.
    """
    held = _held(inode)
    for index in inode.filemap.present(inode.whole) if inode.order else ():
        entry, unit = inode.filemap.get(index), inode.unit_of(index)
        assert entry is not None, index
        if entry.split and not held.any_in(unit):
            with suppress(*OPERATION_ERRORS):
                yield from truncate(inode, unit, [])
    yield from free_page_by_page(inode, deferred)


def _held(inode: Inode) -> PageSet:
    held = PageSet(len(inode.whole))
    for pages in inode.references.held_pages():
        held.add(pages)
    return held


def _split_or_held(inode: Inode) -> list[int]:
    held = _held(inode)
    return [
        index
        for index, entry in inode.filemap.entries(inode.whole)
        if entry.split or held.any_in(inode.unit_of(index))
    ]


def _leave(inode: Inode, left: list[int], deferred: DeferredMerges) -> int | None:
    """Move units, orphans and holds from the inode to the stash, in one step."""
    held, orphans = inode.references.leave()
    folios = [
        LeftFolio(
            orphan.folio,
            orphan.split,
            {number: [_frames(orphan.folio.pfn, inode)] for number in orphan.holders},
        )
        for orphan in orphans
    ]
    folios += [_take_unit(inode, index, held) for index in left]
    holds = [hold for hold, _ in held]
    return deferred.add(inode.number, inode.handle, folios, holds)


def _take_unit(
    inode: Inode, index: int, held: list[tuple[Hold, list[PgRange]]]
) -> LeftFolio:
    entry = inode.filemap.remove(index)
    unit = inode.unit_of(index)
    shift = entry.folio.pfn - index
    parts = {
        hold.hold: [
            part.intersection(unit).shifted(shift)
            for part in live
            if part.overlaps(unit)
        ]
        for hold, live in held
    }
    return LeftFolio(entry.folio, entry.split, {n: p for n, p in parts.items() if p})


def _frames(pfn: int, inode: Inode) -> PgRange:
    return PgRange(pfn, pfn + (1 << inode.order))
