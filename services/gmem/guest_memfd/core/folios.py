"""Folios come into an inode and leave it: allocate, attach, truncate.

Filling a hole (kvm_gmem_get_folio()) is not exclusive: any number of faults may do it
at once, and in the 39-patch series a guest fault does it without the invalidate_lock.

A huge unit is held while it is looked up, allocated, split (if a page is shared) and
attached, as between hugetlb_fault_mutex_lock() and _unlock(): two faults on one unit
must not both take from a reservation that has one page left. Pages of a 4K inode are
allocated without that: whoever finds the hole filled afterwards gives its folio back.
"""

from __future__ import annotations

from itertools import pairwise

from gmem.effects import Op, perform
from gmem.guest_memfd.core.effects import (
    FOLIO_BATCH_MAX,
    Allocate,
    AttachFolio,
    ClearUptodate,
    DetachFolio,
    Free,
    InvalidateEnd,
    Reconstruct,
    Split,
)
from gmem.guest_memfd.core.exposure import show
from gmem.guest_memfd.core.filemap import Entry
from gmem.guest_memfd.core.inode import Inode
from gmem.guest_memfd.core.invalidation import invalidate_begin
from gmem.guest_memfd.core.poison import unusable
from gmem.guest_memfd.core.references import Orphan
from gmem.guest_memfd.core.values import Folio
from gmem.uapi.errors import OPERATION_ERRORS
from gmem.uapi.pages import PgRange


def get_folio(inode: Inode, pgoff: int) -> Op[Entry]:
    """Return the attached folio at `pgoff`, allocated and split as need be.

    Raises Exhausted: no folio left, or no vmemmap pages to split it.
    """
    unit = inode.unit_of(pgoff)
    while True:
        entry = inode.filemap.get(unit.start)
        if entry is not None and entry.attached:
            return entry
        if entry is None and inode.order == 0:
            yield from _add_folios(inode, unit)
        yield from _make_ready(inode, unit)


def fill(inode: Inode, pages: PgRange) -> Op[None]:
    """Have a folio behind each page; what was allocated stays when it fails.

    Holes of a 4K inode are filled FOLIO_BATCH_MAX at a time.
    """
    if inode.order > 0:
        for index in pages.huge_starts(inode.order):
            yield from get_folio(inode, index)
        return
    at = pages.start
    while at < pages.stop:
        hole = inode.filemap.next_hole(PgRange(at, pages.stop), FOLIO_BATCH_MAX)
        if hole:
            yield from _add_folios(inode, hole)
        # Also what another fault has inserted and not attached yet.
        stop = hole.stop if hole else pages.stop
        yield from _make_ready(inode, PgRange(at, stop))
        at = _first_hole(inode, PgRange(at, stop))


def truncate(inode: Inode, pages: PgRange, begun: list[InvalidateEnd]) -> Op[None]:
    """Free the folios of whole units; split ones are reconstructed first.

    The allocator takes back whole folios only. A folio that somebody holds becomes an
    orphan. Views of `pages` are withdrawn or quiesced already. A failure leaves the
    units from there on as they were. Contended (PAGE_IN_USE) where the lineage does
    not free a split folio that is held: what lies before it is gone.
    """
    at = pages.start
    limit = 1 if inode.order else FOLIO_BATCH_MAX
    while batch := inode.filemap.present(PgRange(at, pages.stop), limit):
        span = PgRange(batch[0], inode.unit_of(batch[-1]).stop)
        held = yield from inode.folio_locks.take(span)
        try:
            inode.rules.require_freeable(inode, span)
            yield from _truncate_span(inode, span, begun)
        finally:
            yield from inode.folio_locks.give(held)
        at = span.stop


def take_out(inode: Inode, indexes: list[int]) -> Op[None]:
    """Have no view reach units any more; their folios stay in the filemap, for now.

    What they hold is forgotten: whoever gets the frames next finds zeros.
    """
    yield from detach(inode, [i for i in indexes if _entry(inode, i).attached])
    for run in _consecutive(inode, indexes):
        span = PgRange(run[0], inode.unit_of(run[-1]).stop)
        yield from perform(ClearUptodate(inode.number, span))


def free_orphans(inode: Inode, orphans: list[Orphan]) -> Op[None]:
    """Give back folios whose last hold has gone."""
    for orphan in orphans:
        yield from _free(inode, [orphan.folio], [orphan.folio] * orphan.split)


def detach(inode: Inode, indexes: list[int]) -> Op[None]:
    """Have the views see holes at units; their folios stay in the filemap."""
    for run in _consecutive(inode, indexes):
        yield from perform(DetachFolio(inode.number, run[0], len(run)))
        for index in run:
            inode.filemap.set_attached(index, attached=False)


def _first_hole(inode: Inode, pages: PgRange) -> int:
    """Return where filling goes on: the first hole of `pages`, or their end.

    A guest fault holds no lock: a folio can be punched away again as soon as it is
    there, but not by whoever waits for the lock that filling holds.
    """
    hole = inode.filemap.next_hole(pages, 1)
    return hole.start if hole else pages.stop


def _add_folios(inode: Inode, hole: PgRange) -> Op[None]:
    """Allocate folios for a run of hole units and insert them, unattached.

    As many as have the memory policy of the first page, and perhaps fewer.
    """
    if inode.order == 0:
        hole = inode.mempolicies.first_run(hole)
    nr_units = len(hole) >> inode.order
    policy = inode.mempolicies.at(hole.start)
    folios = yield from perform(
        Allocate(inode.handle, inode.page_size, policy, nr_units)
    )
    assert 0 < len(folios) <= nr_units, (len(folios), nr_units)

    # Another fault may have filled a hole while this one was allocating: the loser
    # gives its folio back, as kvm_gmem_get_folio() does on -EEXIST.
    losers: list[Folio] = []
    for index, folio in zip(hole.huge_starts(inode.order), folios, strict=False):
        if inode.filemap.is_present(index):
            losers.append(folio)
        else:
            inode.filemap.insert(index, folio)
    if losers:
        yield from perform(Free(inode.handle, tuple(losers)))


def _make_ready(inode: Inode, pages: PgRange) -> Op[None]:
    """Split (if a page is shared) and attach what lies unattached in whole units.

    One huge unit, or any pages of a 4K inode.
    """
    held = yield from inode.folio_locks.take(pages)
    try:
        # Whoever held the units before has filled, attached or truncated them.
        if inode.order > 0 and not inode.filemap.is_present(pages.start):
            yield from _add_folios(inode, pages)
        waiting = inode.filemap.unattached(pages)
        for index in waiting:
            if inode.wants_split(index):
                yield from _split_unattached(inode, index)
        # A conversion that runs beside a guest fault may have made a page shared
        # meanwhile. It waits for the unit, and splits it as one that is attached.
        for run in _consecutive_frames(inode, waiting):
            yield from _attach(inode, run)
    finally:
        yield from inode.folio_locks.give(held)


def _split_unattached(inode: Inode, index: int) -> Op[None]:
    """Split a folio that no view shows; if that fails it leaves the inode."""
    entry = _entry(inode, index)
    if entry.split:
        return
    lost = unusable(inode, inode.unit_of(index))
    try:
        yield from perform(Split(inode.handle, entry.folio))
    except OPERATION_ERRORS:
        # kvm_gmem_maybe_split_folio() removes it from the filemap, which frees it. It
        # may have been attached before: the next folio here is not filled.
        yield from perform(ClearUptodate(inode.number, inode.unit_of(index)))
        yield from _drop(inode, [index])
        for part in [hole for run in lost for hole in inode.transit.holes(run)]:
            yield from show(inode, part)
        raise
    inode.filemap.set_split(index, split=True)
    if not inode.rules.restructure.keeps_content:
        # As the 39-patch series clears the folio's flags, uptodate among them.
        yield from perform(ClearUptodate(inode.number, inode.unit_of(index)))


def _attach(inode: Inode, run: list[int]) -> Op[None]:
    pfn = _entry(inode, run[0]).folio.pfn
    yield from perform(AttachFolio(inode.number, run[0], pfn, len(run)))
    for index in run:
        inode.filemap.set_attached(index, attached=True)


def _truncate_span(inode: Inode, span: PgRange, begun: list[InvalidateEnd]) -> Op[None]:
    batch = inode.filemap.present(span)
    for index in batch:
        if _entry(inode, index).split and not inode.references.holds_any(
            inode.unit_of(index)
        ):
            yield from perform(Reconstruct(inode.handle, _entry(inode, index).folio))
            inode.filemap.set_split(index, split=False)
    yield from detach(inode, [i for i in batch if _entry(inode, i).attached])
    yield from perform(ClearUptodate(inode.number, span))

    # A guest fault that holds no lock may have been handed a page since the bracket
    # began; its VM is told before the frame can be anybody else's.
    yield from invalidate_begin(inode, span, begun)
    yield from _drop(inode, batch)


def _drop(inode: Inode, indexes: list[int]) -> Op[None]:
    """Take units out of the filemap and free their folios, but for held ones."""
    freed: list[Folio] = []
    split: list[Folio] = []
    for index in indexes:
        entry = inode.filemap.remove(index)
        unit = inode.unit_of(index)
        # The allocator knows of the errors; another folio here has none.
        inode.poisoned.discard(unit)
        if not inode.references.orphan(unit, entry.folio, split=entry.split):
            freed.append(entry.folio)
            # Its hold ended a moment ago: nobody reconstructed it.
            split += [entry.folio] * entry.split
    yield from _free(inode, freed, split)


def _free(inode: Inode, folios: list[Folio], split: list[Folio]) -> Op[None]:
    """Free folios, those that are split after a reconstruction."""
    for folio in split:
        yield from perform(Reconstruct(inode.handle, folio))
    if folios:
        yield from perform(Free(inode.handle, tuple(folios)))


def _entry(inode: Inode, index: int) -> Entry:
    entry = inode.filemap.get(index)
    assert entry is not None, index
    return entry


def _consecutive(inode: Inode, indexes: list[int]) -> list[list[int]]:
    """Cut indexes into runs of neighbouring units."""
    step = 1 << inode.order
    return _runs(indexes, [b - a == step for a, b in pairwise(indexes)])


def _consecutive_frames(inode: Inode, indexes: list[int]) -> list[list[int]]:
    """Cut indexes into runs of neighbouring units whose frames are neighbours too."""
    step = 1 << inode.order
    frames = [_entry(inode, index).folio.pfn for index in indexes]
    joined = [
        b - a == step and later - sooner == step
        for (a, b), (sooner, later) in zip(
            pairwise(indexes), pairwise(frames), strict=True
        )
    ]
    return _runs(indexes, joined)


def _runs(indexes: list[int], joined: list[bool]) -> list[list[int]]:
    runs = [indexes[:1]] if indexes else []
    for index, is_joined in zip(indexes[1:], joined, strict=True):
        if is_joined:
            runs[-1].append(index)
        else:
            runs.append([index])
    return runs
