"""What can be done to one inode: each function is an operation, or the body of one.

`guarded` takes the invalidate_lock as the inode's lineage says. Arguments were checked
by `checks`; what depends on state is checked here, under the lock, before anything is
changed. Every operation ends with `Inode.check()`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from gmem.effects import Acquire, Mode, Op, Release, T, Ticket, holding, perform
from gmem.guest_memfd.core.bindings import Bound
from gmem.guest_memfd.core.deferred import DeferredMerges
from gmem.guest_memfd.core.effects import (
    CountNodes,
    InvalidateEnd,
    IsUptodate,
    Prepare,
    QuiesceView,
    ReadDescriptor,
    RemoveInode,
    SetUptodate,
    TellReleased,
    Unreserve,
    ZeroPages,
)
from gmem.guest_memfd.core.exposure import (
    require_value,
    show,
    withdraw,
    withdraw_value,
)
from gmem.guest_memfd.core.folios import fill, free_orphans, get_folio, truncate
from gmem.guest_memfd.core.inode import Inode
from gmem.guest_memfd.core.invalidation import (
    announce,
    invalidate_begin,
    invalidate_end,
)
from gmem.guest_memfd.core.lineage import Operation
from gmem.guest_memfd.core.mempolicies import require_mempolicy, require_nodes
from gmem.guest_memfd.core.poison import require_usable, unusable
from gmem.guest_memfd.core.restructure import retire_whole_folios
from gmem.guest_memfd.core.rows import record
from gmem.guest_memfd.core.values import (
    Binding,
    FaultOutcome,
    GuestFaultOutcome,
    GuestPage,
    Hold,
    Mapped,
    MemPolicy,
    Sigbus,
    UserspaceSide,
    ViewKind,
    WrongAccess,
)
from gmem.uapi.errors import (
    OPERATION_ERRORS,
    BadRequest,
    KernelError,
    NoSuchObject,
    ObjectExists,
    Reason,
)
from gmem.uapi.flags import Faultability
from gmem.uapi.pages import Gfn, Pfn, PgOff, PgRange

# The inode may go with them: then there is only its end to record.
_RECORDED_AFTERWARDS: Final = (Operation.CLOSE, Operation.EVICT)


def guarded(inode: Inode, operation: Operation, body: Op[T]) -> Op[T]:
    """Run `body` with the invalidate_lock held as the lineage wants it; check after.

    What it changed is recorded while the lock is held.
    """
    mode = inode.rules.lock_modes[operation]
    if operation not in _RECORDED_AFTERWARDS:
        body = recorded(inode, body, settled=mode is Mode.EXCLUSIVE)
    reply = (
        yield from body if mode is None else holding(inode.invalidate_lock, mode, body)
    )
    inode.check()
    return reply


def locked(inodes: list[Inode], operation: Operation, body: Op[T]) -> Op[T]:
    """Run `body` with the invalidate_locks of all inodes held, in their order."""
    held: list[tuple[Inode, Ticket]] = []
    try:
        for inode in inodes:
            mode = inode.rules.lock_modes[operation]
            assert mode is Mode.EXCLUSIVE, (operation, mode)
            ticket = yield from perform(Acquire(inode.invalidate_lock, mode))
            held.append((inode, ticket))
        reply = yield from body
        for inode in inodes:
            inode.check()
        return reply
    finally:
        for inode, ticket in reversed(held):
            yield from perform(Release(inode.invalidate_lock, ticket))


def recorded(inode: Inode, body: Op[T], *, settled: bool) -> Op[T]:
    """Run `body`, then record what it changed, also where it fails."""
    try:
        return (yield from body)
    finally:
        yield from record([inode], settled=settled)


def allocate(inode: Inode, pages: PgRange) -> Op[None]:
    """Allocate a range (kvm_gmem_allocate()); what was allocated stays on ENOMEM.

    Both ends are rounded *down* to the page size: an allocation that ends inside the
    first huge page allocates nothing.
    """
    mask = (1 << inode.order) - 1
    start, stop = pages.start & ~mask, pages.stop & ~mask
    yield from fill(inode, PgRange(start, stop))


def punch_hole(inode: Inode, pages: PgRange) -> Op[None]:
    """Free whole units of a range, zero the rest; faultability stays.

    The VMs are told first: so the time in which a host fault waits is short. Nobody
    gets SIGBUS: shared pages are quiesced, not closed.
    """
    if not inode.filemap.present(pages, limit=1):
        return
    begun: list[InvalidateEnd] = []
    try:
        yield from invalidate_begin(inode, pages, begun)
        yield from _punch_quiet(inode, pages, begun)
    finally:
        yield from show(inode, pages)
        yield from invalidate_end(begun)


def host_fault(inode: Inode, pgoff: PgOff) -> Op[FaultOutcome]:
    """Answer a fault in the host view (kvm_gmem_fault()); SIGBUS is an outcome."""
    if pgoff not in inode.whole:
        return Sigbus(Reason.RANGE_PAST_END)
    if inode.faultability[pgoff] is Faultability.GUEST:
        return Sigbus(Reason.PAGE_NOT_FAULTABLE)
    try:
        require_usable(inode, PgRange(pgoff, pgoff + 1))
        entry = yield from get_folio(inode, pgoff)
    except KernelError as error:
        return Sigbus(error.reason)
    index = inode.unit_of(pgoff).start
    return Mapped(Pfn(entry.folio.pfn + pgoff - index))


def get_pfn(
    inode: Inode,
    vm: str,
    slot: int,
    gfn: Gfn,
    *,
    meant: Faultability | None,
    nr_pages: int,
) -> Op[GuestFaultOutcome]:
    """Hand a page to a guest (kvm_gmem_get_pfn()), zeroed if nobody has filled it.

    `meant` is the kind of page that the access is for, where the file decides which it
    is (kvm_gmem_is_private()); None takes either. `nr_pages` shared ones are wanted.
    InUse: BINDING_MISSING (EFAULT), BINDING_BROKEN (EIO); Poisoned: PAGE_POISONED;
    Exhausted as get_folio.
    """
    while True:
        bound = inode.bindings.require_gfn(vm, slot, gfn)
        pgoff = bound.binding.pgoff_of(gfn)
        if meant not in (None, inode.faultability[pgoff]):
            return WrongAccess()
        if _is_elsewhere(inode, pgoff):
            return _reach_shared(inode, bound, pgoff, nr_pages)
        with _access_named(inode, pgoff):
            entry = yield from get_folio(inode, pgoff)
            yield from _prepare(inode, pgoff)

        # Nothing was locked: the slot may have been unbound, and the folio punched
        # away, split or made whole, while this fault was waiting.
        unit = inode.unit_of(pgoff)
        is_bound_still = inode.bindings.require_gfn(vm, slot, gfn) is bound
        if is_bound_still and inode.filemap.get(unit.start) == entry:
            break
    with _access_named(inode, pgoff):
        require_usable(inode, PgRange(pgoff, pgoff + 1))
    pfn = Pfn(entry.folio.pfn + pgoff - unit.start)
    order = 0 if entry.split else inode.order
    if inode.faultability[pgoff] is Faultability.ALL:
        return _reach_shared(inode, bound, pgoff, nr_pages, pfn=pfn, order=order)
    page = PgRange(pgoff, pgoff + 1)
    reach = page if entry.split else unit.intersection(bound.binding.pages)
    bound.handed_out.add(reach)
    return GuestPage(pfn, order)


@contextmanager
def _access_named(inode: Inode, pgoff: int) -> Iterator[None]:
    """Have a refusal say what the access was: where the file decides, only it knows."""
    try:
        yield
    except KernelError as error:
        private = inode.faultability[pgoff] is Faultability.GUEST
        error.numbers["private"] = int(private)
        raise


def _is_elsewhere(inode: Inode, pgoff: int) -> bool:
    """Tell whether a page is shared, and shared memory is the userspace side's.

    The in-place conversion of a file without MMAP: it only says what is private.
    """
    shared = inode.faultability[pgoff] is Faultability.ALL
    return shared and bool(inode.rules.convert_ioctls) and not inode.serves_shared


def _reach_shared(
    inode: Inode,
    bound: Bound,
    pgoff: int,
    nr_pages: int,
    *,
    pfn: int = 0,
    order: int = 0,
) -> GuestPage:
    """Hand out the shared pages from `pgoff` on, as far as they are wanted."""
    wanted = PgRange(pgoff, pgoff + nr_pages).intersection(bound.binding.pages)
    reach = inode.faultability.runs_of(wanted, Faultability.ALL)[0]
    lost = unusable(inode, PgRange(pgoff + 1, max(pgoff + 1, reach.stop)))
    if lost:
        reach = PgRange(reach.start, lost[0].start)
    bound.handed_out.add(reach)
    return GuestPage(Pfn(pfn), order, shared=True, nr_pages=len(reach))


def bind(inode: Inode, binding: Binding, userspace: UserspaceSide | None) -> Op[None]:
    """Bind a memslot (kvm_gmem_bind()); its checks in the kernel's order.

    In the 39-patch series this overwrites the faultability of the range with the
    default of the VM's type; contents stay. A file that supports shared pages must be
    what userspace maps there, if it maps anything (kvm_gmem_is_same_range()).
    """
    _require_open(inode)
    if inode.vm not in ("", binding.vm):
        raise BadRequest(
            Reason.BINDING_FOREIGN_VM,
            f"inode {inode.number} belongs to {inode.vm}, not to {binding.vm}: create "
            "one for this VM",
            inode=inode.number,
        )
    if inode.serves_shared and userspace is not None:
        _require_same_range(inode, binding, userspace)
    inode.bindings.require_free(binding.vm, binding.slot, binding.pages)

    before, inode.vm = inode.vm, binding.vm
    inode.bindings.bind(binding)
    if inode.rules.bind_sets_faultability:
        try:
            yield from _store_default(inode, binding.pages, binding.host_faultable)
        except OPERATION_ERRORS:
            inode.bindings.unbind(binding.vm, binding.slot)
            inode.vm = before
            raise


def set_mempolicy(inode: Inode, pages: PgRange, policy: MemPolicy) -> Op[None]:
    """Give a range a memory policy (kvm_gmem_set_policy()); no folio moves.

    BadRequest: MEMPOLICY_INVALID, NODE_UNKNOWN.
    """
    require_mempolicy(policy)
    nr_nodes = yield from perform(CountNodes())
    require_nodes(policy, nr_nodes)

    inode.mempolicies.store(pages, policy)


def unbind(inode: Inode, vm: str, slot: int) -> Op[None]:
    """Remove a binding; memory and faultability stay. InUse (BINDING_MISSING)."""
    inode.bindings.unbind(vm, slot)
    yield from ()


def close(inode: Inode) -> Op[None]:
    """Close the file (kvm_gmem_release()): zap every VM's stage 2, drop bindings."""
    handed = inode.bindings.handed_out_in(inode.whole)
    # First, unlike the kernel, whose guest faults hold no record: one that is under way
    # finds its slot unbound, and is handed nothing behind the messages' back.
    inode.bindings.clear()
    begun: list[InvalidateEnd] = []
    try:
        yield from announce(handed, begun)
    finally:
        yield from invalidate_end(begun)


def pin(inode: Inode, hold: Hold) -> Op[None]:
    """Take a hold on shared pages, with a folio behind each (get_user_pages()).

    NotFaultable (PAGE_NOT_FAULTABLE) at the first private page, Poisoned
    (PAGE_POISONED) at the first with a memory error.
    """
    require_value(inode, hold.pages, Faultability.ALL, "convert it to shared first")
    require_usable(inode, hold.pages)
    inode.references.require_room()
    yield from fill(inode, hold.pages)

    # Other holds may have been taken meanwhile, and the lock is a shared one.
    inode.references.require_room()
    inode.references.take(hold)


def unpin(inode: Inode, hold: int) -> Op[None]:
    """End a hold; folios that were punched meanwhile go back now."""
    orphans = inode.references.put(hold)
    yield from perform(TellReleased(inode.number))
    yield from recorded(inode, free_orphans(inode, orphans), settled=False)


def populate(
    inode: Inode, pages: PgRange, descriptor: str, source_offset: int
) -> Op[None]:
    """Write launch-time content into private pages (kvm_gmem_populate()).

    NotFaultable at the first shared page; Poisoned (PAGE_POISONED) at the first with a
    memory error; ObjectExists (PAGE_PREPARED) when a page has content. The guest view
    is withdrawn meanwhile: a guest that reads would have the page zeroed and marked as
    filled.
    """
    require_value(inode, pages, Faultability.GUEST, "convert it to private first")
    require_usable(inode, pages)
    try:
        yield from withdraw_value(inode, pages, Faultability.GUEST)
        yield from _require_unprepared(inode, pages)
        yield from fill(inode, pages)
        held = yield from inode.folio_locks.take(pages.rounded_out(inode.order))
        try:
            # A guest fault may have prepared a page meanwhile: look again.
            yield from _require_unprepared(inode, pages)
            yield from perform(
                ReadDescriptor(descriptor, source_offset, inode.number, pages)
            )
            yield from perform(SetUptodate(inode.number, pages))
        finally:
            yield from inode.folio_locks.give(held)
    finally:
        yield from show(inode, pages)


def evict(inode: Inode, deferred: DeferredMerges) -> Op[None]:
    """Free everything and end the reservation (kvm_gmem_evict_inode()).

    Finishes what can be finished; then raises the first error there was.
    """
    errors: list[OSError] = []
    steps = (
        _evict_views(inode),
        inode.rules.evict_folios(inode, deferred),
        _evict_table(inode),
        _evict_reservation(inode),
    )
    for step in steps:
        try:
            yield from step
        except OPERATION_ERRORS as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _prepare(inode: Inode, pgoff: PgOff) -> Op[None]:
    """Zero a page that has no content, with its folio held: populate may be at work."""
    held = yield from inode.folio_locks.take(inode.unit_of(pgoff))
    try:
        yield from perform(Prepare(inode.number, PgRange(pgoff, pgoff + 1)))
    finally:
        yield from inode.folio_locks.give(held)


def _punch_quiet(inode: Inode, pages: PgRange, begun: list[InvalidateEnd]) -> Op[None]:
    if inode.faultability.any_in(pages, Faultability.ALL):
        yield from perform(QuiesceView(inode.number, pages))
    yield from withdraw_value(inode, pages, Faultability.GUEST)
    freed = pages.rounded_in(inode.order)
    inode.rules.require_punchable(inode, freed)
    for part in _outside(pages, freed):
        yield from perform(ZeroPages(inode.number, part))
    yield from truncate(inode, freed, begun)


def _outside(pages: PgRange, freed: PgRange) -> list[PgRange]:
    """Return head and tail of `pages` around the whole units in it."""
    if not freed:
        return [pages]
    parts = PgRange(pages.start, freed.start), PgRange(freed.stop, pages.stop)
    return [part for part in parts if part]


def _store_default(inode: Inode, pages: PgRange, host_faultable: bool) -> Op[None]:
    value = Faultability.ALL if host_faultable else Faultability.GUEST
    old = Faultability.GUEST if host_faultable else Faultability.ALL
    try:
        yield from withdraw_value(inode, pages, old)
        inode.faultability.store(pages, value)
        # The series splits at the next fault, not here.
        yield from retire_whole_folios(inode, pages)
    finally:
        yield from record([inode], settled=True)
        yield from show(inode, pages)


def _require_open(inode: Inode) -> None:
    if not inode.file_open:
        raise NoSuchObject(
            Reason.FD_UNKNOWN,
            f"the file of inode {inode.number} is closed: create another",
            inode=inode.number,
        )


def _require_same_range(
    inode: Inode, binding: Binding, userspace: UserspaceSide
) -> None:
    offset = binding.pages.offset
    if userspace != UserspaceSide(inode.number, offset):
        raise BadRequest(
            Reason.USERSPACE_ELSEWHERE,
            f"the memslot's userspace side is not the host view of inode "
            f"{inode.number} from offset {offset:#x} on: give that, or none",
            inode=inode.number,
            offset=offset,
        )


def _require_unprepared(inode: Inode, pages: PgRange) -> Op[None]:
    prepared = yield from perform(IsUptodate(inode.number, pages))
    if prepared:
        raise ObjectExists(
            Reason.PAGE_PREPARED,
            f"a page at offset {pages.offset:#x} or in the {pages.size:#x} bytes from "
            f"there of inode {inode.number} has content: punch it first, or write "
            "from the guest",
            offset=pages.offset,
            size=pages.size,
            inode=inode.number,
        )


def _evict_views(inode: Inode) -> Op[None]:
    """Have nothing cached of what has a folio."""
    for pages in _present_runs(inode):
        for view in ViewKind:
            yield from withdraw(inode, view, pages)


def _evict_table(inode: Inode) -> Op[None]:
    """Serve the views no longer; folios that left the inode left its table before."""
    yield from perform(RemoveInode(inode.number))


def _evict_reservation(inode: Inode) -> Op[None]:
    yield from perform(Unreserve(inode.handle))


def _present_runs(inode: Inode) -> list[PgRange]:
    runs: list[PgRange] = []
    for index in inode.filemap.present(inode.whole):
        unit = inode.unit_of(index)
        if runs and runs[-1].stop == unit.start:
            runs[-1] = PgRange(runs[-1].start, unit.stop)
        else:
            runs.append(unit)
    return runs
