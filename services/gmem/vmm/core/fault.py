"""The guest's page fault: from an access to an entry of stage 2, or to an exit.

As kvm_tdp_page_fault(): what the access means against the attribute, then the memslot,
then the page, and last the question whether an invalidation made the answer stale.
slots_lock is not taken; the sequence stands in for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from gmem.effects import Op, perform
from gmem.uapi.errors import Errno, KernelError, Reason
from gmem.uapi.flags import MemoryAttribute
from gmem.uapi.pages import PgRange
from gmem.vmm.core.effects import Frame, GetPfn
from gmem.vmm.core.exits import (
    Access,
    FaultOutcome,
    Mapped,
    MemoryFault,
    NoSlot,
    Retry,
)
from gmem.vmm.core.memslots import Memslot
from gmem.vmm.core.mmu import Entry, max_order
from gmem.vmm.core.vm import Vm

FAULT_PAGES_MAX: Final = 4096
"""Most shared pages that one fault maps: those the instruction goes on to touch."""


_MEANT_SHARED: Final = {
    Access.BY_ATTRIBUTE: None,
    Access.PRIVATE: False,
    Access.SHARED: True,
}


@dataclass(frozen=True, slots=True)
class Fault:
    """A guest access that missed: the page, how many follow, what is meant by it."""

    gfn: int
    npages: int
    access: Access
    write: bool


def fault(vm: Vm, request: Fault) -> Op[FaultOutcome]:
    """Resolve a guest fault; every outcome is a value."""
    seq = vm.invalidation.seq
    page = PgRange(request.gfn, request.gfn + 1)
    if vm.invalidation.must_retry(seq, page):
        return Retry(seq)

    slot = vm.memslots.find(request.gfn)
    if slot is not None and vm.file_says(slot):
        return (yield from _from_file(vm, slot, request, seq))
    private = vm.attributes.is_private(request.gfn)
    meant = _meant(request.access, private=private)
    if meant is not private:
        return MemoryFault.of_page(request.gfn, private=meant)
    if slot is not None and slot.gmem_only:
        # Whatever the attribute: the file has the page.
        either = replace(request, access=Access.BY_ATTRIBUTE)
        return (yield from _from_file(vm, slot, either, seq, attribute=private))
    if private:
        return (yield from _private(vm, slot, request.gfn, seq))
    return _shared(vm, slot, request)


def _meant(access: Access, *, private: bool) -> bool:
    if access is Access.BY_ATTRIBUTE:
        return private
    return access is Access.PRIVATE


def _private(vm: Vm, slot: Memslot | None, gfn: int, seq: int) -> Op[FaultOutcome]:
    """kvm_faultin_pfn_private: the page comes from guest_memfd."""
    if slot is None or not slot.has_gmem:
        return MemoryFault.of_page(gfn, private=True)
    failure: KernelError | None = None
    frame = Frame(0, 0)
    try:
        name = slot.region.guest_memfd
        frame = yield from perform(GetPfn(name, vm.name, slot.region.slot, gfn))
    except KernelError as error:
        failure = error
    # While guest_memfd was asked, the page may have been converted or punched, or the
    # memslot deleted: then neither the frame nor the refusal is true any more.
    if vm.invalidation.must_retry(seq, PgRange(gfn, gfn + 1)):
        return Retry(vm.invalidation.seq)
    if failure is not None:
        return _refused(gfn, failure, private=True)
    return _install_private(vm, slot, gfn, frame)


def _from_file(
    vm: Vm, slot: Memslot, request: Fault, seq: int, *, attribute: bool | None = None
) -> Op[FaultOutcome]:
    """kvm_mmu_faultin_pfn_gmem: the file has both kinds of page.

    Where no `attribute` was looked at, it says which this is: as it does not go on
    where the access means the other kind, nothing is allocated by one that is about to
    convert it.
    """
    private = request.access is Access.PRIVATE if attribute is None else attribute
    gfn = request.gfn
    name, number = slot.region.guest_memfd, slot.region.slot
    meant = _MEANT_SHARED[request.access]
    npages = max(1, min(request.npages, FAULT_PAGES_MAX))
    try:
        frame = yield from perform(
            GetPfn(name, vm.name, number, gfn, meant_shared=meant, npages=npages)
        )
    except KernelError as error:
        if vm.invalidation.must_retry(seq, PgRange(gfn, gfn + 1)):
            return Retry(vm.invalidation.seq)
        if attribute is None:
            private = bool(error.numbers.get("private", private))
        return _refused(gfn, error, private=private)
    # As in _private(): what was learnt may be history.
    if vm.invalidation.must_retry(seq, PgRange(gfn, gfn + 1)):
        return Retry(vm.invalidation.seq)
    if not frame.matches:
        return MemoryFault.of_page(gfn, private=private)
    if not frame.shared:
        kind = attribute is not False
        return _install_private(vm, slot, gfn, frame, private=kind)
    if slot.userspace_window is None:
        # Shared memory is the userspace side's, and there is none.
        reason = Reason.PAGE_UNREADABLE
        return MemoryFault.of_page(gfn, private=False, reason=reason)
    gfns = PgRange(gfn, gfn + frame.npages).intersection(slot.gfns)
    if vm.invalidation.must_retry(seq, gfns):
        gfns = PgRange(gfn, gfn + 1)
    return _install_shared(vm, slot, gfns, pfn=frame.pfn)


def _install_private(
    vm: Vm, slot: Memslot, gfn: int, frame: Frame, *, private: bool = True
) -> Mapped:
    """Map a page that the host may not fault; `private` is what accesses to it are."""
    order = max_order(vm.lineage, slot, vm.attributes, gfn, frame.order)
    # A bracket is open over other frames of the folio: their attributes are about to
    # differ, and its end zaps nothing. KVM once installed the huge page here.
    around = PgRange(gfn, gfn + 1).rounded_out(order)
    if vm.invalidation.must_retry(vm.invalidation.seq, around):
        order = 0
    base = gfn >> order << order
    pfn = frame.pfn - (gfn - base)
    entry = Entry(base, order, private=private, pfn=pfn)
    vm.stage2.install(entry)
    assert slot.guest_view_window is not None
    gfns = entry.gfns.intersection(slot.gfns)
    return Mapped(
        gfns,
        slot.guest_view_window,
        private=private,
        writable=True,
        seq=vm.invalidation.seq,
    )


def _shared(vm: Vm, slot: Memslot | None, request: Fault) -> FaultOutcome:
    """__kvm_faultin_pfn: the page comes from the userspace side."""
    if slot is None or (request.write and slot.read_only):
        return NoSlot()
    if slot.userspace_window is None:
        # userspace_addr 0 leads to no mapping: KVM_PFN_ERR_FAULT.
        reason = Reason.PAGE_UNREADABLE
        return MemoryFault.of_page(request.gfn, private=False, reason=reason)
    stop = request.gfn + max(1, min(request.npages, FAULT_PAGES_MAX))
    wanted = slot.gfns.intersection(PgRange(request.gfn, stop))
    gfns, attributes = next(vm.attributes.runs(wanted))
    assert attributes is MemoryAttribute.SHARED, gfns
    # A bracket is open over what follows the page: it may be about to be private.
    if vm.invalidation.must_retry(vm.invalidation.seq, gfns):
        gfns = PgRange(request.gfn, request.gfn + 1)
    return _install_shared(vm, slot, gfns, pfn=0)


def _install_shared(vm: Vm, slot: Memslot, gfns: PgRange, *, pfn: int) -> Mapped:
    """Map shared pages at 4K: as userspace, or with an in-place file split as it is."""
    for gfn in gfns:
        at = pfn + gfn - gfns.start if pfn else 0
        vm.stage2.install(Entry(gfn, 0, private=False, pfn=at))
    assert slot.userspace_window is not None
    return Mapped(
        gfns,
        slot.userspace_window,
        private=False,
        writable=not slot.read_only,
        seq=vm.invalidation.seq,
    )


def _refused(gfn: int, error: KernelError, *, private: bool) -> MemoryFault:
    # A guest_memfd that is gone is "no file" to the fault, and that is EFAULT.
    gone = error.errno in (Errno.ENOENT, Errno.EBADF)
    errno = Errno.EFAULT if gone else Errno(error.errno or Errno.EFAULT)
    reason = error.reason
    return MemoryFault.of_page(gfn, private=private, errno=errno, reason=reason)
