"""What must be true of memory errors: who may not reach what, and who knows of it.

All of a whole folio that has an error is lost, of a split one the bad page alone, in
every lineage.
"""

from __future__ import annotations

from collections.abc import Iterator

from gmem.guest_memfd.core.filemap import Entry
from gmem.guest_memfd.core.inode import Inode
from gmem.guest_memfd.core.inodes import ByteRange
from gmem.guest_memfd.core.values import PageState, ViewKind
from gmem.uapi.flags import Faultability
from gmem.uapi.pages import PgRange
from gmem.vmm.core.mmu import Entry as Stage2Entry
from gmem.vmm.core.vm import Vm
from tests.sim.host import Host
from tests.sim.moment import Moment, pages_of


def nobody_reaches_a_lost_page(moment: Moment) -> None:
    """A page that is lost to a memory error is in no view, mapping or stage 2.

    All of a whole folio that has one is lost, of a split one the page alone.
    """
    host = moment.host
    for inode, pages in _lost(moment) if host.errors.bad else ():
        if host.errors.changing[inode.number]:
            continue
        table = host.memory.tables.get(inode.number)
        for view in ViewKind if table is not None else ():
            assert table is not None
            states = table.views[view][pages.start : pages.stop]
            if PageState.OPEN in states:
                host.world.broken(f"{inode.number}: {pages} is lost, and {view.name}")
            if any(pgoff in pages for _who, pgoff in table.mapped[view]):
                host.world.broken(f"{inode.number}: {pages} is lost, and mapped")
        for vm, entry in _stage2_of(host, inode, pages):
            host.world.broken(f"{vm.name}: {entry}, but {pages} is lost")


def a_split_folio_with_an_error_stays_split(moment: Moment) -> None:
    """It is not made whole, which would take all of it, but to be freed."""
    host, seen = moment.host, moment.host.errors.split
    for inode, folios in moment.folios if host.errors.bad or seen else ():
        for index, entry in folios if inode.order else ():
            unit, pfn = inode.unit_of(index), entry.folio.pfn
            if not inode.poisoned.any_in(unit):
                seen.pop(pfn, None)
            elif entry.split:
                seen[pfn] = None
            elif pfn in seen and not (
                inode.gone or host.memory.is_punched(inode.number, unit)
            ):
                host.world.broken(f"{inode.number}: {entry} was split, with an error")


def _lost(moment: Moment) -> Iterator[tuple[Inode, PgRange]]:
    """Yield what is lost with each error that an inode knows of."""
    for inode, folios in moment.folios:
        for index, entry in folios if inode.poisoned else ():
            for pgoff in _bad_pages(moment.host, inode, index, entry):
                if pgoff in inode.poisoned:
                    unit, page = inode.unit_of(index), PgRange(pgoff, pgoff + 1)
                    whole = inode.order > 0 and not entry.split
                    # Who punches it may have made it whole to free it, and whoever
                    # comes next splits what is shared and in no view.
                    if (
                        not whole
                        or moment.host.memory.is_punched(inode.number, unit)
                        or (not entry.attached and _is_shared(inode, unit))
                    ):
                        unit = page
                    yield inode, unit


def _is_shared(inode: Inode, pages: PgRange) -> bool:
    return inode.faultability.any_in(pages, Faultability.ALL)


def _bad_pages(host: Host, inode: Inode, index: int, entry: Entry) -> list[int]:
    first = entry.folio.pfn
    bad = host.errors.among(PgRange(first, first + (1 << inode.order)))
    return [index + pfn - first for pfn in bad]


def _stage2_of(
    host: Host, inode: Inode, pages: PgRange
) -> Iterator[tuple[Vm, Stage2Entry]]:
    """Yield the entries that reach pages of a file through it, outside a bracket."""
    for name in host.vmm.names():
        vm = host.vmm.get(name)
        for entry in vm.stage2:
            slot = vm.memslots.find(entry.gfn)
            if slot is None or vm.invalidation.must_retry(
                vm.invalidation.seq, entry.gfns
            ):
                continue
            here = int(slot.region.guest_memfd or 0) == inode.number
            reaches = entry.private or vm.file_says(slot)
            if here and reaches and pages_of(slot, entry.gfns).overlaps(pages):
                yield vm, entry


def what_was_converted_is_shown(
    host: Host, ranges: list[ByteRange], to: Faultability
) -> None:
    """After a finished conversion, of the folios that it touched: see above.

    A folio that was lost as a whole and split loses its bad page alone. `to` is not
    looked at: what is shared and what private is another checker's.
    """
    del to
    for target in ranges if host.errors.bad else ():
        moment, inode = Moment.now(host), host.guest_memfd.inode(target.inode)
        pages = PgRange.of_bytes(target.offset, target.size).rounded_out(inode.order)
        changing = host.errors.changing[inode.number] or not _knows(moment, inode)
        if not changing and not host.memory.is_punched(inode.number, pages):
            _require_shown(moment, inode, pages)


def errors_are_known(host: Host) -> None:
    """Allocator and inodes know of each error, and of no other."""
    known = [frame.pfn for frame in host.allocator.poisoned_frames()]
    if known != sorted(host.errors.bad):
        host.world.broken(f"{known} have errors, not {host.errors.bad}")
    moment = Moment.now(host)
    for inode, _ in moment.folios:
        if not _knows(moment, inode):
            wrong = inode.poisoned.members(inode.whole)
            host.world.broken(f"{inode.number} has errors in {wrong}: {known}")


def _knows(moment: Moment, inode: Inode) -> bool:
    """Tell whether an inode knows of each error, and of no other."""
    (folios,) = [folios for other, folios in moment.folios if other is inode]
    bad = [p for i, e in folios for p in _bad_pages(moment.host, inode, i, e)]
    known = [p for run in inode.poisoned.members(inode.whole) for p in run]
    return sorted(bad) == known


def what_is_not_lost_is_shown(host: Host) -> None:
    """Each page is OPEN in the view of its faultability, and lost ones in none.

    Where a bind says what is shared, nobody can reach a page before the first.
    """
    moment = Moment.now(host)
    for inode, _ in moment.folios:
        seen = [inode.whole]
        if host.world.play.bind_resets:
            seen = host.bound.get(inode.number, [])
        for part in seen:
            _require_shown(moment, inode, part)


def _require_shown(moment: Moment, inode: Inode, pages: PgRange) -> None:
    host, span = moment.host, slice(pages.start, pages.stop)
    lost = [part for other, part in _lost(moment) if other is inode]
    for view in ViewKind:
        states = host.memory.tables[inode.number].views[view][span]
        expected = bytearray(len(pages))
        value = Faultability.ALL if view is ViewKind.HOST else Faultability.GUEST
        for run in inode.faultability.runs_of(pages, value):
            _fill(expected, run.shifted(-pages.start), PageState.OPEN)
        for part in [p.intersection(pages) for p in lost if p.overlaps(pages)]:
            _fill(expected, part.shifted(-pages.start), PageState.CLOSED)
        if states != expected:
            at = next(i for i, state in enumerate(states) if state != expected[i])
            where = f"{inode.number}, {pages.start + at:#x}, {view.name}"
            host.world.broken(f"{where}: {PageState(states[at])!r}")


def _fill(states: bytearray, pages: PgRange, state: PageState) -> None:
    states[pages.start : pages.stop] = bytes([state]) * len(pages)
