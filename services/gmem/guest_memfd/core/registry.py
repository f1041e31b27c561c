"""The inodes of one host by number, and every call that can be made on them.

Methods that return an Op are operations: they are driven, and may suspend at effects.
The others answer at once. Steps of one core must not run at the same time: whoever
drives it holds one mutex while it steps, never across an effect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from gmem.effects import Mode, Op, T, holding, perform
from gmem.guest_memfd.core import operations
from gmem.guest_memfd.core.checks import (
    require_allocatable,
    require_convert_ioctl,
    require_creatable,
    require_fallocate,
    require_range,
    require_source,
)
from gmem.guest_memfd.core.conversion import ConvertItem, require_disjoint
from gmem.guest_memfd.core.deferred import DeferredMerges
from gmem.guest_memfd.core.effects import (
    AddInode,
    Record,
    Reserve,
    ScheduleMerge,
    Unreserve,
)
from gmem.guest_memfd.core.exposure import show
from gmem.guest_memfd.core.inode import Inode, InodeOptions
from gmem.guest_memfd.core.leases import Leases, require_ttl
from gmem.guest_memfd.core.lineage import RULES, Operation
from gmem.guest_memfd.core.operations import guarded, locked
from gmem.guest_memfd.core.references import References, no_such_hold
from gmem.guest_memfd.core.restoring import restore_inodes
from gmem.guest_memfd.core.rows import inode_changes, record
from gmem.guest_memfd.core.values import (
    Binding,
    FaultOutcome,
    GuestFaultOutcome,
    Hold,
    HoldKind,
    InodeStatistics,
    UserspaceSide,
    ViewKind,
)
from gmem.guest_memfd.core.waiting import until_released
from gmem.uapi.errors import (
    OPERATION_ERRORS,
    NoSuchObject,
    NotFaultable,
    Reason,
    Unsupported,
)
from gmem.uapi.flags import FALLOC_FL_PUNCH_HOLE, Faultability
from gmem.uapi.pages import Gfn, PgOff, PgRange


@dataclass(frozen=True, slots=True)
class ByteRange:
    """A range of one inode as a caller names it: inode number and bytes."""

    inode: int
    offset: int
    size: int


class GuestMemfdCore:
    """All inodes; `owner` is what reservations are called after."""

    def __init__(self, owner: str = "guest_memfd") -> None:
        self._owner = owner
        self._inodes: dict[int, Inode] = {}
        self._next_inode = 1
        self._next_hold = 1
        self._leases = Leases()
        self.deferred = DeferredMerges()

    # Looking.

    def inode(self, number: int) -> Inode:
        """Return an inode; NoSuchObject (INODE_UNKNOWN) if it never was, or is gone."""
        inode = self._inodes.get(number)
        if inode is None or inode.gone:
            raise NoSuchObject(
                Reason.INODE_UNKNOWN,
                f"inode {number} was never issued, or is gone: create one",
                inode=number,
            )
        return inode

    def find(self, number: int) -> Inode | None:
        """Return an inode, or None if it never was, or is gone."""
        inode = self._inodes.get(number)
        return None if inode is None or inode.gone else inode

    @property
    def numbers(self) -> list[int]:
        """The numbers of the inodes that are not gone, rising."""
        return [number for number, inode in self._inodes.items() if not inode.gone]

    @property
    def handles(self) -> set[int]:
        """The reservations of all inodes, of dead ones that left something too."""
        living = {inode.handle for inode in self._inodes.values()}
        return living | self.deferred.handles

    def statistics(self) -> tuple[InodeStatistics, ...]:
        """Return a snapshot of every inode, by rising number."""
        return tuple(self.inode(number).statistics() for number in self.numbers)

    def check_all(self) -> None:
        """Assert everything that holds when no operation is under way. Slow."""
        for inode in self._inodes.values():
            inode.check_all()
        self.deferred.check()

    # Life.

    def create(self, options: InodeOptions) -> Op[int]:
        """Make an inode; return its number (KVM_CREATE_GUEST_MEMFD).

        BadRequest: FLAG_UNKNOWN, FLAG_COMBINATION, SIZE_INVALID, PAGE_SIZE_UNKNOWN.
        Exhausted: POOL_EMPTY.
        """
        rules = RULES[options.lineage]
        rules.creation.require(options)
        require_creatable(options.size, options.page_size)
        number = self._next_inode
        self._next_inode += 1

        nr_folios = options.size // options.page_size
        owner = f"{self._owner}/{number}"
        handle = yield from perform(Reserve(options.page_size, nr_folios, owner))
        mmap = rules.creation.host_mmap(options)
        try:
            yield from perform(AddInode(number, options.size, options.page_size, mmap))
        except OPERATION_ERRORS:
            yield from perform(Unreserve(handle))
            raise
        inode = Inode(number, options, handle, rules)
        initial = rules.creation.initial(options)
        if initial is not None:
            inode.faultability.store(inode.whole, initial)
            yield from show(inode, inode.whole)
        self._inodes[number] = inode
        changes = inode_changes(inode, settled=True)
        yield from perform(Record({"next_inode": self._next_inode, **changes}))
        return number

    def close(self, number: int) -> Op[None]:
        """Close the file; the inode goes when nothing else keeps it."""
        inode = self.inode(number)
        if not inode.file_open:
            raise NoSuchObject(
                Reason.INODE_UNKNOWN,
                f"the file of inode {number} is closed already: nothing to do",
                inode=number,
            )
        inode.file_open = False
        body = guarded(inode, Operation.CLOSE, operations.close(inode))
        yield from self._using([inode], body)
        if not inode.gone:
            told = record([inode], settled=True)
            told = holding(inode.invalidate_lock, Mode.EXCLUSIVE, told)
            yield from self._using([inode], told)

    def check_open_view(self, number: int, view: ViewKind, vm: str) -> None:
        """Check that a view may be opened (by `vm`'s guest process, if the guest's).

        NoSuchObject (FD_UNKNOWN) after close, NotFaultable (TOKEN_DENIED) for a VM
        without a binding.
        """
        inode = self._inodes.get(number)
        if inode is None or not inode.file_open:
            raise NoSuchObject(
                Reason.FD_UNKNOWN,
                f"inode {number} was never issued, or is closed: create one",
                inode=number,
            )
        if view is ViewKind.GUEST and not inode.bindings.has_vm(vm):
            raise NotFaultable(
                Reason.TOKEN_DENIED,
                f"no memslot of {vm or 'no VM'} is bound to inode {number}: bind one",
                inode=number,
            )

    def supports_shared(self, number: int) -> bool:
        """Tell whether an inode's shared pages are its guest's too; False if gone."""
        inode = self._inodes.get(number)
        return inode is not None and inode.options.support_shared

    def view_opened(self, number: int, view: ViewKind) -> None:
        """Count an open file of a view: it keeps the inode alive."""
        self.inode(number).references.views_open[view] += 1

    def view_released(self, number: int, view: ViewKind) -> Op[None]:
        """Uncount an open file of a view; the inode may go with it."""
        inode = self.inode(number)
        inode.references.views_open[view] -= 1
        inode.check()
        yield from self._using([inode], _nothing())

    # Memory.

    def fallocate(self, number: int, mode: int, offset: int, length: int) -> Op[None]:
        """Allocate, or punch a hole (fallocate(2)); errors in the kernel's order."""
        inode = self.inode(number)
        require_fallocate(mode, offset, length)
        if mode & FALLOC_FL_PUNCH_HOLE:
            pages = PgRange.of_bytes(offset, length).intersection(inode.whole)
            body = operations.punch_hole(inode, pages)
            operation = Operation.PUNCH
        else:
            pages = require_allocatable(offset, length, i_size=inode.i_size)
            body = operations.allocate(inode, pages)
            operation = Operation.ALLOCATE
        yield from self._using([inode], guarded(inode, operation, body))

    def host_fault(self, number: int, pgoff: PgOff) -> Op[FaultOutcome]:
        """Answer a fault in the host view: Mapped, or Sigbus with the reason."""
        inode = self.inode(number)
        body = operations.host_fault(inode, pgoff)
        return (
            yield from self._using([inode], guarded(inode, Operation.HOST_FAULT, body))
        )

    def get_pfn(
        self,
        number: int,
        vm: str,
        slot: int,
        gfn: Gfn,
        *,
        meant: Faultability | None = None,
        nr_pages: int = 1,
    ) -> Op[GuestFaultOutcome]:
        """Hand a page to a guest; InUse when the slot is not bound to it."""
        inode = self.inode(number)
        body = operations.get_pfn(
            inode, vm, slot, gfn, meant=meant, nr_pages=max(1, nr_pages)
        )
        return (
            yield from self._using([inode], guarded(inode, Operation.GET_PFN, body))
        )

    def populate(
        self, target: ByteRange, descriptor: str, source_offset: int
    ) -> Op[None]:
        """Write launch-time content into private pages that have none."""
        inode, pages = self._pages_of(target)
        require_source(source_offset, target.size)
        body = operations.populate(inode, pages, descriptor, source_offset)
        yield from self._using([inode], guarded(inode, Operation.POPULATE, body))

    def convert(
        self,
        ranges: Sequence[ByteRange],
        to: Faultability,
        *,
        validate_only: bool,
        wait_ms: int | None = None,
    ) -> Op[None]:
        """Convert ranges, one after the other; roll all of them back on failure.

        Contended (PAGE_IN_USE) with error_offset, inode, holders and count. With
        `wait_ms` it waits for the holders instead, and gives up with Contended
        (DEADLINE), having changed nothing.
        """
        if wait_ms is None:
            yield from self._attempt(ranges, to, validate_only=validate_only)
            return
        attempt = partial(
            self._attempt, ranges, to, validate_only=validate_only, waits=True
        )
        yield from until_released(attempt, partial(self._held, ranges), wait_ms)

    def _held(self, ranges: Sequence[ByteRange]) -> dict[int, References]:
        return {part.inode: self.inode(part.inode).references for part in ranges}

    def _attempt(
        self,
        ranges: Sequence[ByteRange],
        to: Faultability,
        *,
        validate_only: bool,
        waits: bool = False,
    ) -> Op[None]:
        items = [ConvertItem(*self._pages_of(target)) for target in ranges]
        require_disjoint(items)
        yield from self._convert(items, to, validate_only=validate_only, waits=waits)

    def convert_ioctl(
        self,
        number: int,
        to: Faultability,
        *,
        offset: int,
        size: int,
        error_offset: int,
    ) -> Op[None]:
        """KVM_GMEM_CONVERT_SHARED and _PRIVATE; Unsupported (IOCTL_UNKNOWN) elsewhere.

        Refusals as `convert`.
        """
        inode = self.inode(number)
        if not inode.rules.convert_ioctls:
            raise Unsupported(
                Reason.IOCTL_UNKNOWN,
                f"a file of {inode.options.lineage} is converted through its VM: use "
                "KVM_SET_MEMORY_ATTRIBUTES",
                inode=number,
            )
        pages = require_convert_ioctl(offset, size, error_offset, i_size=inode.i_size)
        if pages is not None:
            items = [ConvertItem(inode, pages)]
            yield from self._convert(items, to, validate_only=False)

    def _convert(
        self,
        items: list[ConvertItem],
        to: Faultability,
        *,
        validate_only: bool,
        waits: bool = False,
    ) -> Op[None]:
        by_number = {item.inode.number: item.inode for item in items}
        inodes = [by_number[number] for number in sorted(by_number)]
        policy = inodes[0].rules.convert
        body = policy(items, to, validate_only=validate_only, waits=waits)
        yield from self._using(inodes, locked(inodes, Operation.CONVERT, body))

    # Memslots.

    def bind(
        self,
        number: int,
        vm: str,
        slot: int,
        *,
        base_gfn: Gfn,
        offset: int,
        size: int,
        host_faultable: bool,
        vmm_target: str,
        userspace: UserspaceSide | None = None,
    ) -> Op[None]:
        """Bind a memslot's pages; NoSuchObject (FD_UNKNOWN) when the file is closed."""
        inode = self._inodes.get(number)
        if inode is None or not inode.file_open:
            raise NoSuchObject(
                Reason.FD_UNKNOWN,
                f"inode {number} was never issued, or is closed: create one",
                inode=number,
            )
        pages = require_range(offset, size, i_size=inode.i_size)
        binding = Binding(vm, slot, base_gfn, pages, host_faultable, vmm_target)
        body = operations.bind(inode, binding, userspace)
        yield from self._using([inode], guarded(inode, Operation.BIND, body))

    def unbind(self, number: int, vm: str, slot: int) -> Op[None]:
        """Remove a binding; the memory stays."""
        inode = self.inode(number)
        body = operations.unbind(inode, vm, slot)
        yield from self._using([inode], guarded(inode, Operation.UNBIND, body))

    # Holds.

    def pin(
        self,
        target: ByteRange,
        kind: HoldKind,
        *,
        holder: str,
        client: str,
        ttl_ms: int = 0,
    ) -> Op[int]:
        """Take a named hold on shared pages; return its number.

        With `ttl_ms` it is a lease: it ends by itself when it is not kept alive.
        """
        require_ttl(ttl_ms)
        inode, pages = self._pages_of(target)
        number = self._next_hold
        hold = Hold(number, kind, holder, client, inode.number, pages, ttl_ms)
        self._next_hold += 1
        body = operations.pin(inode, hold)
        yield from self._using([inode], guarded(inode, Operation.PIN, body))
        yield from self._leases.begin(hold)
        return hold.hold

    def keep_alive(self, holds: Sequence[int]) -> Op[None]:
        """Let the leases of holds begin anew; NoSuchObject (HOLDER_UNKNOWN)."""
        for hold in holds:
            live = any(hold in inode.references for inode in self._inodes.values())
            if not live and hold not in self.deferred:
                raise no_such_hold(hold)
        yield from self._leases.renew(holds)

    def lease_expired(self, hold: int, renewals: int) -> Op[bool]:
        """End a hold whose lease ran out, unless it was renewed; tell whether."""
        has_run_out = self._leases.has_run_out(hold, renewals)
        if has_run_out:
            yield from self.unpin(hold)
        return has_run_out

    def resume_leases(self) -> Op[None]:
        """Let every lease begin anew, after a restart of the service."""
        for inode in list(self._inodes.values()):
            for hold in inode.references.holds:
                yield from self._leases.begin(hold)

    def unpin(self, hold: int) -> Op[None]:
        """End a hold; NoSuchObject (HOLDER_UNKNOWN)."""
        yield from self._leases.end(hold)
        for inode in self._inodes.values():
            if hold in inode.references:
                return (yield from self._using([inode], operations.unpin(inode, hold)))
        if hold in self.deferred:
            for number in self.deferred.put(hold):
                yield from perform(ScheduleMerge(number))
            return None
        raise no_such_hold(hold)

    def client_gone(self, client: str) -> Op[None]:
        """End every hold of a client, as a process's exit does."""
        holds = [
            hold
            for inode in self._inodes.values()
            for hold in inode.references.of_client(client)
        ]
        holds += self.deferred.of_client(client)
        for hold in holds:
            # Its owner may be ending it at this moment.
            with suppress(NoSuchObject):
                yield from self.unpin(hold)

    # A journal's.

    def restore(self, rows: Mapping[str, Any], epoch: int) -> None:
        """Have the inodes of a predecessor; `epoch` keeps numbers of holds unique."""
        assert not self._inodes, "it is in use already"
        self._inodes = restore_inodes(rows)
        self._next_inode = rows.get("next_inode", 1)
        self._next_hold = max(self._next_hold, epoch << 32)

    def forget(self, number: int) -> None:
        """Drop an inode whose reservation is gone: its eviction was nearly done."""
        del self._inodes[number]

    def evict_if_unused(self, number: int) -> Op[None]:
        """Evict an inode that nothing keeps any more, where that was cut off."""
        yield from self._using([self.inode(number)], _nothing())

    # What dead inodes left behind.

    def merge(self, number: int) -> Op[None]:
        """Give back the split folios of a dead inode that are complete."""
        yield from self.deferred.run(number)
        self.deferred.check()

    # Helpers.

    def _pages_of(self, target: ByteRange) -> tuple[Inode, PgRange]:
        inode = self.inode(target.inode)
        return inode, require_range(target.offset, target.size, i_size=inode.i_size)

    def _using(self, inodes: list[Inode], body: Op[T]) -> Op[T]:
        """Run `body` while the inodes cannot be evicted; then evict what may go."""
        for inode in inodes:
            inode.users += 1
            inode.uses += 1
        try:
            return (yield from body)
        finally:
            for inode in inodes:
                inode.users -= 1
            for inode in inodes:
                yield from self._evict_if_unused(inode)

    def _evict_if_unused(self, inode: Inode) -> Op[None]:
        if inode.gone or not inode.is_unused:
            return
        inode.gone = True
        try:
            body = operations.evict(inode, self.deferred)
            yield from guarded(inode, Operation.EVICT, body)
            yield from perform(Record({f"inode/{inode.number}/": None}))
        finally:
            del self._inodes[inode.number]


def _nothing() -> Op[None]:
    yield from ()
