"""Guest faults: what they come to, and the race that the sequence decides."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gmem.uapi.errors import Errno, Reason, make_error
from gmem.uapi.flags import MemoryAttribute, VmType
from gmem.uapi.pages import SIZE_1G, PgRange
from gmem.vmm.core.effects import Frame, GetPfn
from gmem.vmm.core.exits import (
    Access,
    FaultOutcome,
    Mapped,
    MemoryFault,
    NoSlot,
    Retry,
)
from gmem.vmm.core.fault import FAULT_PAGES_MAX, Fault, fault
from gmem.vmm.core.memslots import Region, Userspace
from gmem.vmm.core.set_region import set_user_memory_region2
from gmem.vmm.core.vm import Vm
from tests.support.vmm_world import Hand, World, new_vm

GFN = SIZE_1G >> 12
NAME = "hosts/h/guestMemfds/1"
SIDE = Userspace("descriptors/1", 0)


def vm_with(region: Region, vm_type: VmType = VmType.SW_PROTECTED) -> Vm:
    vm = new_vm(vm_type)
    World().run(set_user_memory_region2(vm, region))
    return vm


def booted(*, private: bool = True) -> Vm:
    vm = vm_with(Region(3, 4, SIZE_1G, SIZE_1G, SIDE, NAME))
    if private:
        vm.attributes.store(PgRange(GFN, 2 * GFN), MemoryAttribute.PRIVATE)
    return vm


def ask(gfn: int = GFN, access: Access = Access.BY_ATTRIBUTE, npages: int = 1) -> Fault:
    return Fault(gfn, npages, access, write=False)


def run(vm: Vm, request: Fault, world: World | None = None) -> FaultOutcome:
    outcome = (world or World()).run(fault(vm, request))
    vm.stage2.check()
    return outcome


def test_private_page_comes_from_the_file() -> None:
    vm, world = booted(), World(frame=Frame(pfn=5 * GFN + 7, order=18))
    outcome = run(vm, ask(GFN + 7), world)

    assert world.log == [GetPfn(NAME, vm.name, 3, GFN + 7)]
    assert isinstance(outcome, Mapped)
    assert (outcome.gfns, outcome.private) == (PgRange(GFN, 2 * GFN), True)
    entry = vm.stage2.lookup(GFN + 1)
    assert entry is not None
    assert (entry.order, entry.pfn) == (18, 5 * GFN)


def test_shared_pages_are_mapped_at_4k_as_far_as_they_are_touched() -> None:
    vm, world = booted(private=False), World()
    vm.attributes.store(PgRange(GFN + 3, GFN + 4), MemoryAttribute.PRIVATE)
    outcome = run(vm, ask(npages=10), world)
    assert world.log == []
    assert isinstance(outcome, Mapped)
    assert (outcome.gfns, outcome.private) == (PgRange(GFN, GFN + 3), False)
    assert vm.statistics().stage2.pages_4k == 3


def test_one_fault_maps_a_bounded_number_of_pages() -> None:
    vm = booted(private=False)
    outcome = run(vm, ask(npages=1 << 20))
    assert isinstance(outcome, Mapped)
    assert len(outcome.gfns) == FAULT_PAGES_MAX


def test_shared_pages_in_an_open_bracket_are_not_mapped_beside_another() -> None:
    vm = booted(private=False)
    vm.invalidate_begin("a conversion", PgRange(GFN + 2, GFN + 4))
    outcome = run(vm, ask(npages=10))
    assert isinstance(outcome, Mapped)
    assert outcome.gfns == PgRange(GFN, GFN + 1)
    assert vm.statistics().stage2.pages_4k == 1


@pytest.mark.parametrize(
    ("private", "access", "flags"),
    [(False, Access.PRIVATE, 8), (True, Access.SHARED, 0)],
)
def test_wrong_kind_of_access_is_a_memory_fault(
    private: bool, access: Access, flags: int
) -> None:
    vm, world = booted(private=private), World()
    outcome = run(vm, ask(GFN + 2, access), world)
    assert outcome == MemoryFault(flags, (GFN + 2) << 12, 4096, Errno.EFAULT)
    assert world.log == []


def test_private_access_in_a_default_vm_is_a_memory_fault() -> None:
    vm = vm_with(Region(0, 0, 0, 1 << 20, SIDE), VmType.DEFAULT)
    assert run(vm, ask(0, Access.PRIVATE)) == MemoryFault(8, 0)


def test_private_access_without_guest_memfd_is_a_memory_fault() -> None:
    vm = vm_with(Region(0, 0, 0, 1 << 20, SIDE))
    vm.attributes.store(PgRange(0, 1), MemoryAttribute.PRIVATE)
    assert run(vm, ask(0)) == MemoryFault(8, 0)


def test_private_access_without_memslot_is_a_memory_fault() -> None:
    vm = new_vm()
    vm.attributes.store(PgRange(9, 10), MemoryAttribute.PRIVATE)
    assert run(vm, ask(9)) == MemoryFault(8, 9 << 12)


def test_shared_access_without_memslot_is_mmio() -> None:
    assert run(new_vm(), ask(9)) == NoSlot()


def test_write_to_a_read_only_memslot_is_mmio() -> None:
    vm = vm_with(Region(0, 2, 0, 1 << 20, SIDE))
    assert run(vm, replace(ask(0), write=True)) == NoSlot()
    outcome = run(vm, ask(0))
    assert isinstance(outcome, Mapped)
    assert not outcome.writable


def test_shared_access_without_userspace_side_is_a_memory_fault() -> None:
    vm = vm_with(Region(0, 4, 0, 1 << 21, None, NAME))
    assert run(vm, ask(0)) == MemoryFault(0, 0, reason="PAGE_UNREADABLE")


@pytest.mark.parametrize(
    ("reason", "errno"),
    [
        (Reason.BINDING_MISSING, Errno.EFAULT),
        (Reason.BINDING_BROKEN, Errno.EIO),
        (Reason.SUBPOOL_EMPTY, Errno.ENOMEM),
        (Reason.VMEMMAP_RESTORE_FAILED, Errno.ENOMEM),
        (Reason.PAGE_POISONED, Errno.EHWPOISON),
        # A file that is gone is "no file".
        (Reason.INODE_UNKNOWN, Errno.EFAULT),
        (Reason.FD_UNKNOWN, Errno.EFAULT),
    ],
)
def test_refused_get_pfn_is_a_memory_fault_with_its_errno(
    reason: Reason, errno: Errno
) -> None:
    vm, world = booted(), World(refuse={GetPfn: make_error(reason, "no")})
    outcome = run(vm, ask(), world)
    assert outcome == MemoryFault(8, SIZE_1G, errno=errno, reason=reason)
    assert vm.statistics().stage2.pages_4k == 0


def test_fault_waits_while_its_page_is_invalidated() -> None:
    vm, world = booted(), World()
    gfns = PgRange(GFN + 1, GFN + 9)
    begun = vm.invalidate_begin("guest_memfd", gfns)
    assert run(vm, ask(GFN + 1), world) == Retry(begun.seq)
    assert world.log == []
    assert isinstance(run(vm, ask(GFN)), Mapped)
    vm.invalidate_end("guest_memfd", gfns)
    assert isinstance(run(vm, ask(GFN + 1)), Mapped)


@pytest.mark.parametrize("refused", [False, True])
@pytest.mark.parametrize("over", [False, True])
def test_answer_that_came_too_late_is_not_installed(over: bool, refused: bool) -> None:
    """The page was converted or punched between get_pfn's answer and its use."""
    vm = booted()
    hand = Hand(fault(vm, ask()))
    assert isinstance(hand.effect, GetPfn)
    gfns = PgRange(GFN, GFN + 1)
    notice = vm.invalidate_begin("guest_memfd", gfns)
    if over:
        notice = vm.invalidate_end("guest_memfd", gfns)
    if refused:
        hand.fail(make_error(Reason.BINDING_MISSING, "closed"))
    else:
        hand.reply(Frame(GFN, 18))
    assert hand.result() == Retry(notice.seq)
    assert list(vm.stage2) == []


def test_invalidation_delivered_twice_counts_once() -> None:
    vm = booted()
    gfns = PgRange(GFN, GFN + 1)
    first = vm.invalidate_begin("guest_memfd", gfns)
    assert vm.invalidate_begin("guest_memfd", gfns) == first
    assert vm.statistics().in_progress == 1
    last = vm.invalidate_end("guest_memfd", gfns)
    assert vm.invalidate_end("guest_memfd", gfns) == last
    assert (last.in_progress, len(last.gfns)) == (0, 0)


def test_invalidate_begin_zaps_at_once() -> None:
    vm = booted()
    run(vm, ask(), World(frame=Frame(GFN, 18)))
    assert vm.statistics().stage2.pages_1g == 1
    vm.invalidate_begin("guest_memfd", PgRange(2 * GFN - 1, 2 * GFN))
    assert vm.statistics().stage2.pages_1g == 0
