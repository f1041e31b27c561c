"""The inodes of one host by number, and every call that can be made on them.

Methods that return an Op are operations: they are driven, and may suspend at effects.
The others answer at once. Steps of one core must not run at the same time: whoever
drives it holds one mutex while it steps, never across an effect.
"""

from __future__ import annotations

from collections.abc import Mapping

from gmem.effects import Mode, Op, holding, perform
from gmem.guest_memfd.core import operations
from gmem.guest_memfd.core.byte_calls import ByteCalls
from gmem.guest_memfd.core.checks import (
    require_allocatable,
    require_creatable,
    require_fallocate,
    require_range,
    require_source,
)
from gmem.guest_memfd.core.convert_calls import ConvertCalls
from gmem.guest_memfd.core.effects import AddInode, Record, Reserve, Unreserve
from gmem.guest_memfd.core.error_calls import ErrorCalls
from gmem.guest_memfd.core.exposure import show
from gmem.guest_memfd.core.hold_calls import HoldCalls
from gmem.guest_memfd.core.inode import Inode, InodeOptions
from gmem.guest_memfd.core.inodes import ByteRange, nothing
from gmem.guest_memfd.core.lineage import RULES, LineageRules, Operation
from gmem.guest_memfd.core.operations import guarded
from gmem.guest_memfd.core.rows import inode_changes, record
from gmem.guest_memfd.core.values import (
    Binding,
    FaultOutcome,
    GuestFaultOutcome,
    MemPolicy,
    UserspaceSide,
    ViewKind,
)
from gmem.uapi.errors import (
    OPERATION_ERRORS,
    NoSuchObject,
    NotFaultable,
    Reason,
    Unsupported,
)
from gmem.uapi.flags import FALLOC_FL_PUNCH_HOLE, Faultability
from gmem.uapi.lineage import Lineage
from gmem.uapi.pages import PAGE_SIZE, Gfn, PgOff, PgRange


class GuestMemfdCore(ByteCalls, ConvertCalls, HoldCalls, ErrorCalls):
    """All inodes; `owner` is what reservations are called after.

    `rules` are those of the host that is emulated: see `lineage.rules_of`.
    """

    def __init__(
        self,
        owner: str = "guest_memfd",
        rules: Mapping[Lineage, LineageRules] = RULES,
    ) -> None:
        super().__init__(rules)
        self._owner = owner

    # Life.

    def create(self, options: InodeOptions) -> Op[int]:
        """Make an inode; return its number (KVM_CREATE_GUEST_MEMFD).

        BadRequest: FLAG_UNKNOWN, FLAG_COMBINATION, SIZE_INVALID, PAGE_SIZE_UNKNOWN.
        NoSuchObject: CGROUP_UNKNOWN. Exhausted: CGROUP_LIMIT, POOL_EMPTY.
        """
        rules = self._rules[options.lineage]
        rules.creation.require(options)
        require_creatable(options.size, options.page_size)
        number = self._next_inode
        self._next_inode += 1

        nr_folios = options.size // options.page_size
        owner = f"{self._owner}/{number}"
        handle = yield from perform(
            Reserve(
                options.page_size,
                nr_folios,
                owner,
                options.cgroup,
                rules.charges_rsvd,
            )
        )
        mmap = rules.creation.host_mmap(options)
        try:
            added = AddInode(
                number,
                options.size,
                options.page_size,
                host_mmap=mmap,
                counts_blocks=rules.counts_blocks(options.page_size),
            )
            yield from perform(added)
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
        inode = self.open_file(number)
        if view is ViewKind.GUEST and not inode.bindings.has_vm(vm):
            raise NotFaultable(
                Reason.TOKEN_DENIED,
                f"no memslot of {vm or 'no VM'} is bound to inode {number}: bind one",
                inode=number,
            )

    def supports_shared(self, number: int) -> bool:
        """Tell whether an inode's shared pages are its guest's too; False if gone."""
        inode = self._inodes.get(number)
        return inode is not None and inode.serves_shared

    def view_opened(self, number: int, view: ViewKind) -> None:
        """Count an open file of a view: it keeps the inode alive."""
        self.inode(number).references.views_open[view] += 1

    def view_released(self, number: int, view: ViewKind) -> Op[None]:
        """Uncount an open file of a view; the inode may go with it."""
        inode = self.inode(number)
        inode.references.views_open[view] -= 1
        inode.check()
        yield from self._using([inode], nothing())

    # Memory.

    def fallocate(self, number: int, mode: int, offset: int, length: int) -> Op[None]:
        """Allocate, or punch a hole (fallocate(2)); errors in the kernel's order."""
        inode = self.inode(number)
        unit = inode.page_size if inode.rules.fallocates_folios else PAGE_SIZE
        require_fallocate(mode, offset, length, alignment=unit)
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

    def set_mempolicy(self, target: ByteRange, policy: MemPolicy) -> Op[None]:
        """Give a range a memory policy, for what is allocated later (mbind).

        Unsupported (OPERATION_UNSUPPORTED) in lineages that use the task's policy.
        """
        inode, pages = self._policed(target)
        body = operations.set_mempolicy(inode, pages, policy)
        yield from self._using([inode], guarded(inode, Operation.SET_MEMPOLICY, body))

    def mempolicies(self, target: ByteRange) -> list[tuple[PgRange, MemPolicy]]:
        """Return the memory policies of a range, as runs (get_mempolicy)."""
        inode, pages = self._policed(target)
        return inode.mempolicies.runs(pages)

    def _policed(self, target: ByteRange) -> tuple[Inode, PgRange]:
        inode, pages = self._pages_of(target)
        if not inode.rules.mempolicy_by_range:
            raise Unsupported(
                Reason.OPERATION_UNSUPPORTED,
                f"a file of {inode.options.lineage} has one memory policy, that of "
                "CreateGuestMemfd: give it there, or use MAINLINE or IN_PLACE",
                inode=inode.number,
            )
        return inode, pages

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
        inode = self.open_file(number)
        pages = require_range(offset, size, i_size=inode.i_size)
        binding = Binding(vm, slot, base_gfn, pages, host_faultable, vmm_target)
        body = operations.bind(inode, binding, userspace)
        yield from self._using([inode], guarded(inode, Operation.BIND, body))

    def unbind(self, number: int, vm: str, slot: int) -> Op[None]:
        """Remove a binding; the memory stays."""
        inode = self.inode(number)
        body = operations.unbind(inode, vm, slot)
        yield from self._using([inode], guarded(inode, Operation.UNBIND, body))
