"""What must be true of a host at every moment: one function for each invariant.

A checker reads the cores and the model, and says in one sentence what does not hold. It
is called after every step, also while operations are half-way: what they may have left
undone is known from the requests under way (`in_flight`, `restructuring`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from gmem.guest_memfd.core.effects import AttachFolio, DetachFolio
from gmem.guest_memfd.core.faultability import opposite
from gmem.guest_memfd.core.inode import Inode
from gmem.guest_memfd.core.inodes import ByteRange
from gmem.guest_memfd.core.values import PageState, ViewKind
from gmem.host_allocator.core.vmemmap import saved_vmemmap_pages
from gmem.uapi.errors import KernelError, Reason
from gmem.uapi.flags import Faultability
from gmem.uapi.pages import PAGE_SIZE, PgRange
from gmem.vmm.core.memslots import Memslot
from gmem.vmm.core.mmu import Entry as Stage2Entry
from gmem.vmm.core.vm import Vm
from tests.sim import error_checkers
from tests.sim.host import Host
from tests.sim.moment import Moment, pages_of

_REACHABLE: Final = (PageState.OPEN, PageState.CLOSING)
_VIEWS: Final = tuple(ViewKind)


def check(host: Host) -> None:
    """Call every checker of a single moment."""
    moment = Moment.now(host)
    every_folio_is_somewhere_once(moment)
    subpools_fit_their_hstate(moment)
    filemaps_tile_without_overlap(moment)
    vmemmap_matches_structure(moment)
    host_maps_only_faultable_pages(moment)
    no_guest_mapping_of_a_changed_page(moment)
    no_byte_survives_a_hole(moment)
    faultability_is_total(moment)
    error_checkers.nobody_reaches_a_lost_page(moment)
    error_checkers.a_split_folio_with_an_error_stays_split(moment)


def every_folio_is_somewhere_once(moment: Moment) -> None:
    """A folio is free, or in one filemap, held by someone, or between two services."""
    host = moment.host
    places: dict[int, tuple[str, int, int | None]] = {}

    def place(pfn: int, kind: str, number: int, handle: int | None = None) -> None:
        if pfn in places:
            host.world.broken(f"{pfn:#x}: {places[pfn]}, and {kind} {number}")
        places[pfn] = kind, number, handle

    for inode, folios in moment.folios:
        for _, entry in folios:
            place(entry.folio.pfn, "filemap", inode.number, inode.handle)
        for orphan in inode.references.orphans:
            place(orphan.folio.pfn, "orphan", inode.number, inode.handle)
    for key, in_flight in host.allocations.in_flight.items():
        for folio in in_flight:
            place(folio.pfn, "in flight", key)
    for number, owner, pfn in _awaiting_reconstruction(host):
        place(pfn, "left by an inode, merge", number, owner)

    for key, folio in host.allocations.restructuring.items():
        # Out of the filemap already where it is made whole to be freed.
        if folio.pfn not in places:
            place(folio.pfn, "restructuring", key)

    owned = _owned(host)
    for pfn, (kind, number, handle) in places.items():
        if pfn not in owned or handle not in (None, owned[pfn]):
            host.world.broken(f"{pfn:#x} ({kind} {number}) is not its owner's")
    if len(owned) > len(places):
        # An unpin has the orphans that it frees in hand, one after the other.
        tasks = host.world.tasks.values()
        if not any(task.name.startswith("unpin") for task in tasks):
            lost = [hex(pfn) for pfn in owned if pfn not in places]
            host.world.broken(f"folios {lost} are allocated and nowhere")


def _awaiting_reconstruction(host: Host) -> Iterator[tuple[int, int, int]]:
    """Yield merge, handle and frame of what dead inodes have left."""
    for number, merge in host.guest_memfd.deferred._merges.items():
        # The first one is between the services while the merge runs.
        ready = merge.ready[1:] if merge.running else merge.ready
        for left in (*merge.waiting.values(), *ready):
            yield number, merge.handle, left.folio.pfn


def _owned(host: Host) -> dict[int, int]:
    """Return the handle of each folio that the allocator thinks guest_memfd has."""
    owned = {
        pfn: live.handle
        for pool in host.allocator.hugetlb.values()
        for pfn, live in pool.live.items()
    }
    for claim in host.allocator.base.claims.values():
        if claim.handle != host.hog:
            for frames in claim.frames:
                for run in frames.runs():
                    owned.update(dict.fromkeys(run, claim.handle))
    return owned


def subpools_fit_their_hstate(moment: Moment) -> None:
    """What subpools use is live, what they wait for is reserved, and is there."""
    world, errors = moment.host.world, moment.host.errors
    for pool in moment.host.allocator.hugetlb.values():
        used = reserved = 0
        for subpool in pool.subpools.values():
            used += subpool.used_hpages
            reserved += subpool.rsv_hpages
            if subpool.used_hpages + subpool.rsv_hpages != subpool.max_hpages:
                world.broken(f"{subpool} does not add up")
        if used != len(pool.live):
            world.broken(f"{used} folios are used, {len(pool.live)} live")
        free, resv = pool.hstate.free_huge_pages, pool.hstate.resv_huge_pages
        # A folio that was lost leaves its reservation behind.
        order = pool.hstate.order
        lost = sum(f.order == order for f in errors.apart + errors.withheld)
        if not reserved == resv <= free + lost:
            world.broken(f"subpools have {reserved} reserved, {resv=}, {free=}")


def filemaps_tile_without_overlap(moment: Moment) -> None:
    """Folios are aligned, inside i_size, and shown where the filemap says so."""
    host = moment.host
    for inode, folios in moment.folios:
        unit = 1 << inode.order
        attached = {}
        for index, entry in folios:
            aligned = index % unit == 0 and entry.folio.pfn % unit == 0
            if not aligned or index + unit > len(inode.whole):
                host.world.broken(f"inode {inode.number}: {entry} at {index:#x}")
            if entry.attached:
                attached[index] = entry.folio.pfn
        table = host.memory.tables.get(inode.number)
        if table is None or attached == table.frames or _is_attaching(host, inode):
            continue
        host.world.broken(f"{inode.number}: {attached}, not {table.frames}")


def vmemmap_matches_structure(moment: Moment) -> None:
    """Whole and free folios have given their vmemmap pages, split ones have not."""
    host = moment.host
    saved = 0
    for pool in host.allocator.hugetlb.values():
        order = pool.hstate.order
        whole = pool.hstate.nr_huge_pages
        whole -= sum(live.is_split for live in pool.live.values())
        # A lost folio whose vmemmap could not be restored has left its pool.
        whole += sum(folio.order == order for folio in host.errors.withheld)
        saved += whole * saved_vmemmap_pages(order)
    if saved != host.allocator.vmemmap.saved_pages:
        host.world.broken(f"{saved} pages saved, not {host.allocator.vmemmap}")
    moving = [folio.pfn for folio in host.allocations.restructuring.values()]
    for inode, folios in moment.folios:
        for index, entry in folios if inode.order else ():
            pfn = entry.folio.pfn
            live = host.allocator.hugetlb[inode.page_size].live[pfn]
            if live.is_split is not entry.split and pfn not in moving:
                host.world.broken(f"{inode.number}, {index:#x}: {entry}, {live}")


def host_maps_only_faultable_pages(moment: Moment) -> None:
    """A mapping leads to the folio that is there, while its view may show the page.

    The same of the guest process and its view.
    """
    host = moment.host
    for inode, _ in moment.folios:
        table = host.memory.tables.get(inode.number)
        for view in _VIEWS if table is not None else ():
            assert table is not None
            for (who, pgoff), frame in table.mapped[view].items():
                state = table.views[view][pgoff]
                where = inode.number, view.name, pgoff
                if state not in _REACHABLE:
                    host.world.broken(f"{where} is mapped by {who} in {state=}")
                if table.frame_of(pgoff) != frame and not _is_attaching(host, inode):
                    host.world.broken(f"{where}: {who} reaches another folio")
                if state == PageState.OPEN:
                    shared = inode.faultability[pgoff] is Faultability.ALL
                    if shared is not (view is ViewKind.HOST):
                        host.world.broken(f"{where} is mapped by {who}, {shared=}")


def no_guest_mapping_of_a_changed_page(moment: Moment) -> None:
    """Stage 2 agrees with filemap and attributes outside an invalidate bracket."""
    host = moment.host
    for name in host.vmm.names():
        vm = host.vmm.get(name)
        for entry in vm.stage2:
            if vm.invalidation.must_retry(vm.invalidation.seq, entry.gfns):
                continue
            slot = vm.memslots.find(entry.gfn)
            if slot is not None and vm.file_says(slot):
                _require_in_place(host, vm, entry, slot)
                continue
            for run, attributes in vm.attributes.runs(entry.gfns):
                if bool(attributes) is not entry.private:
                    host.world.broken(f"{name}: {entry}, but {run} is {attributes!r}")
            if entry.private:
                _require_current(host, vm, entry)


def _require_current(host: Host, vm: Vm, entry: Stage2Entry) -> None:
    slot = vm.memslots.find(entry.gfn)
    if slot is None:
        host.world.broken(f"{vm.name}: {entry} without a memslot")
    inode, pages = _require_frames(host, vm, entry, slot)
    number = inode.number
    for run in inode.faultability.runs_of(pages, Faultability.ALL):
        # A failed conversion leaves pages shared whose attribute is private.
        if not any(
            mix.inode == number and mix.pages.covers(run) for mix in host.memory.mixes
        ):
            host.world.broken(f"{vm.name}: {entry}, but {run} is shared")


def _require_in_place(host: Host, vm: Vm, entry: Stage2Entry, slot: Memslot) -> None:
    """The file says what is private; attributes mean nothing here."""
    inode, pages = _require_frames(host, vm, entry, slot)
    wrong = Faultability.ALL if entry.private else Faultability.GUEST
    for run in inode.faultability.runs_of(pages, wrong):
        host.world.broken(f"{vm.name}: {entry}, but {run} is {wrong.name}")


def _require_frames(
    host: Host, vm: Vm, entry: Stage2Entry, slot: Memslot
) -> tuple[Inode, PgRange]:
    """The frames of a private entry are those of the file; return file and pages.

    Shared pages are reached through the host view, whatever frame the entry names.
    """
    number = int(slot.region.guest_memfd)
    inode = host.guest_memfd._inodes.get(number)
    if inode is None:
        host.world.broken(f"{vm.name}: {entry} of inode {number}, which is gone")
    pages = pages_of(slot, entry.gfns)
    for index in pages.huge_starts(inode.order) if entry.private else ():
        found = inode.filemap.get(index)
        first = max(index, pages.start)
        pfn = entry.pfn + first - pages.start
        if found is None or found.folio.pfn + first - index != pfn:
            host.world.broken(f"{vm.name}: {entry} is stale: {found}")
    return inode, pages


def no_byte_survives_a_hole(moment: Moment) -> None:
    """What a load sees was written for this page, and after the last hole there.

    So a page that was freshly allocated reads zero.
    """
    memory = moment.host.memory
    for number, pgoff, tag in memory.readable():
        if (tag.inode, tag.pgoff) != (number, pgoff):
            moment.host.world.broken(f"inode {number}, {pgoff:#x} shows {tag}")
        if tag in memory.punched:
            moment.host.world.broken(f"{tag} survived a punch")


def faultability_is_total(moment: Moment) -> None:
    """Each page below i_size has exactly one value."""
    for inode, _ in moment.folios:
        # Where the value flips says all of it, and seldom changes.
        flips = list(inode.faultability._shared._flips)
        if moment.host.flips.get(inode.number) == flips:
            continue
        moment.host.flips[inode.number] = flips
        at, last = 0, None
        for fragment in inode.faultability.runs(inode.whole):
            if fragment.pages.start != at or fragment.faultability is last:
                moment.host.world.broken(f"inode {inode.number}: {fragment} at {at}")
            at, last = fragment.pages.stop, fragment.faultability
        if at != len(inode.whole):
            moment.host.world.broken(f"inode {inode.number}: no value from {at} on")


def split_iff_some_page_is_shared(
    host: Host, ranges: list[ByteRange], to: Faultability
) -> None:
    """After a finished conversion: split where it made shared, whole where private.

    Where a series rounds in, a conversion smaller than a folio leaves it split.
    """
    for target in ranges:
        inode = host.guest_memfd.inode(target.inode)
        pages = PgRange.of_bytes(target.offset, target.size)
        out = to is Faultability.ALL or host.world.play.rounds_out
        units = pages if out else pages.rounded_in(inode.order)
        for index in units.huge_starts(inode.order) if inode.order and units else ():
            entry = inode.filemap.get(index)
            unit = PgRange(index, index + (1 << inode.order))
            shared = inode.faultability.any_in(unit, Faultability.ALL)
            if entry is None or not entry.attached:
                continue
            # A split folio with an error is not made whole, nor is it afterwards by a
            # conversion that finds nothing to do.
            kept = entry.split and entry.folio.pfn in host.errors.marked
            if not kept and entry.split is not shared:
                host.world.broken(f"{inode.number} at {index:#x}: {entry}, {to!r}")


def what_came_before_a_refusal_is_converted(
    host: Host, ranges: list[ByteRange], to: Faultability, error: KernelError
) -> None:
    """Where huge pages are converted one by one: all of them before the one to blame.

    And not that one, as far as the range reaches into it. Files of 4K pages are one
    step for each range.
    """
    refused = error.reason in (Reason.PAGE_IN_USE, Reason.VMEMMAP_RESTORE_FAILED)
    if not refused or not host.world.play.attributes2:
        return
    blamed = int(error.numbers["inode"]), int(error.numbers["error_offset"])
    for target in ranges:
        inode = host.guest_memfd.inode(target.inode)
        pages = PgRange.of_bytes(target.offset, target.size)
        step = PgRange(pages.stop, pages.stop)
        if blamed[0] == inode.number and blamed[1] // PAGE_SIZE in pages:
            step = inode.unit_of(blamed[1] // PAGE_SIZE) if inode.order else pages
            step = step.intersection(pages)
        for run in inode.faultability.runs_of(
            PgRange(pages.start, step.start), opposite(to)
        ):
            host.world.broken(f"{target} stopped at {blamed}, and {run} is not {to!r}")
        if step:
            if not inode.faultability.any_in(step, opposite(to)):
                host.world.broken(f"{target}: {blamed} is to blame, and is {to!r}")
            behind = inode.order and step.start > pages.start
            host.world.marks["refused behind the first huge page"] += bool(behind)
            return
    host.world.broken(f"{blamed} is to blame, and not in {ranges}")


def everything_is_at_rest(host: Host) -> None:
    """What holds of an idle host beside: the cores' own checks, no open bracket."""
    host.guest_memfd.check_all()
    host.allocator.check_frames()
    error_checkers.errors_are_known(host)
    error_checkers.what_is_not_lost_is_shown(host)
    for name in host.vmm.names():
        host.vmm.get(name).stage2.check()
        if host.vmm.get(name).invalidation.in_progress:
            host.world.broken(f"{name}: a bracket was never closed")


def _is_attaching(host: Host, inode: Inode) -> bool:
    """Tell whether the table has heard of what the filemap has not noted yet."""
    return any(
        isinstance(task.effect, AttachFolio | DetachFolio)
        and task.effect.inode == inode.number
        for task in host.world.tasks.values()
    )
