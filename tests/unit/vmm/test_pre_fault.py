"""KVM_PRE_FAULT_MEMORY: what is mapped, what is left, and why (C109, C110, C112)."""

from __future__ import annotations

import pytest

from gmem.uapi.errors import (
    Contended,
    Errno,
    Exhausted,
    KernelError,
    NoSuchObject,
    Reason,
)
from gmem.uapi.flags import MemoryAttribute
from gmem.uapi.pages import PAGE_SIZE, SIZE_1G, SIZE_2M, PgRange
from gmem.vmm.core.effects import Frame, GetPfn, Pause
from gmem.vmm.core.memslots import Region, Userspace
from gmem.vmm.core.pre_fault import RETRIES_MAX, Remainder, pre_fault_memory
from gmem.vmm.core.set_region import set_user_memory_region2
from gmem.vmm.core.vm import Vm
from tests.support.vmm_world import Hand, World, new_vm

GPA = SIZE_1G
SIZE = SIZE_2M + PAGE_SIZE
BOTH = pytest.mark.parametrize("private", [True, False], ids=["private", "shared"])


def booted(*, private: bool = True, side: bool = True) -> Vm:
    vm = new_vm()
    userspace = Userspace("descriptors/1", 0) if side else None
    region = Region(0, 4, GPA, SIZE, userspace, "hosts/h/guestMemfds/1")
    World().run(set_user_memory_region2(vm, region))
    if private:
        vm.attributes.store(PgRange.of_bytes(GPA, SIZE), MemoryAttribute.PRIVATE)
    vm.create_vcpu(0)
    return vm


def pre_fault(vm: Vm, gpa: int, size: int, world: World | None = None) -> Remainder:
    return (world or World()).run(pre_fault_memory(vm, 0, gpa, size))


@BOTH
def test_a_range_of_the_memslot_is_mapped_as_a_whole(private: bool) -> None:
    vm = booted(private=private)
    assert pre_fault(vm, GPA, SIZE_2M) == Remainder(GPA + SIZE_2M, 0)
    assert vm.stage2.statistics().pages_4k == 512
    assert {entry.private for entry in vm.stage2} == {private}


def test_a_huge_folio_takes_one_fault() -> None:
    vm, world = booted(), World(frame=Frame(pfn=1 << 18, order=9))
    assert pre_fault(vm, GPA, SIZE_2M, world).size == 0
    assert len(world.asked(GetPfn)) == 1
    assert vm.stage2.statistics().pages_2m == 1


def test_an_entry_that_reaches_further_leaves_nothing() -> None:
    vm, world = booted(), World(frame=Frame(pfn=1 << 18, order=9))
    assert pre_fault(vm, GPA + PAGE_SIZE, PAGE_SIZE, world) == Remainder(
        GPA + 2 * PAGE_SIZE, 0
    )


@BOTH
def test_the_end_of_the_memslot_leaves_the_rest_and_then_is_enoent(
    private: bool,
) -> None:
    vm = booted(private=private)
    left = pre_fault(vm, GPA + SIZE_2M, 2 * PAGE_SIZE)
    assert left == Remainder(GPA + SIZE, PAGE_SIZE)
    with pytest.raises(NoSuchObject) as caught:
        pre_fault(vm, left.gpa, left.size)
    assert caught.value.errno == Errno.ENOENT
    assert caught.value.reason is Reason.GPA_OUTSIDE_MEMSLOTS


def test_the_first_page_decides_what_is_raised() -> None:
    vm = booted()
    world = World(refuse={GetPfn: Exhausted(Reason.SUBPOOL_EMPTY, "none left")})
    with pytest.raises(Exhausted) as caught:
        pre_fault(vm, GPA, SIZE, world)
    assert caught.value.errno == Errno.ENOMEM
    assert caught.value.numbers["gpa"] == GPA


def test_a_later_page_that_cannot_be_had_is_no_error() -> None:
    vm = booted()
    hand = Hand(pre_fault_memory(vm, 0, GPA, 2 * PAGE_SIZE))
    hand.reply(Frame(pfn=7, order=0))
    hand.fail(Exhausted(Reason.SUBPOOL_EMPTY, "none left"))
    assert hand.result() == Remainder(GPA + PAGE_SIZE, PAGE_SIZE)


def test_private_memory_without_a_file_is_efault() -> None:
    vm = booted()
    outside = PgRange.of_bytes(GPA + SIZE, PAGE_SIZE)
    vm.attributes.store(outside, MemoryAttribute.PRIVATE)
    with pytest.raises(KernelError) as caught:
        pre_fault(vm, GPA + SIZE, PAGE_SIZE)
    assert caught.value.reason is Reason.BINDING_MISSING
    assert caught.value.errno == Errno.EFAULT


def test_shared_memory_without_a_userspace_side_is_efault() -> None:
    vm = booted(private=False, side=False)
    with pytest.raises(KernelError) as caught:
        pre_fault(vm, GPA, PAGE_SIZE)
    assert caught.value.errno == Errno.EFAULT


def test_a_change_that_ends_is_waited_for() -> None:
    vm = booted()
    gfns = PgRange.of_bytes(GPA, PAGE_SIZE)
    vm.invalidate_begin("punch", gfns)
    hand = Hand(pre_fault_memory(vm, 0, GPA, PAGE_SIZE))
    assert hand.effect == Pause(1)
    hand.reply()
    assert hand.effect == Pause(2)
    vm.invalidate_end("punch", gfns)
    hand.reply()
    hand.reply(Frame(pfn=7, order=0))
    assert hand.result().size == 0


def test_a_memslot_that_is_being_deleted_is_eagain() -> None:
    vm, world = booted(), World()
    vm.invalidate_begin("delete", PgRange.of_bytes(GPA, SIZE))
    with pytest.raises(Contended) as caught:
        pre_fault(vm, GPA, PAGE_SIZE, world)
    assert caught.value.reason is Reason.MEMSLOT_CHANGING
    assert caught.value.errno == Errno.EAGAIN
    assert len(world.asked(Pause)) == RETRIES_MAX
    assert list(vm.stage2) == []


@pytest.mark.parametrize(
    ("gpa", "size", "flags", "reason"),
    [
        (GPA, PAGE_SIZE, 1, Reason.FLAG_UNKNOWN),
        (GPA, 0, 0, Reason.RANGE_EMPTY),
        (GPA + 1, PAGE_SIZE, 0, Reason.RANGE_UNALIGNED),
        (GPA, PAGE_SIZE + 1, 0, Reason.RANGE_UNALIGNED),
        ((1 << 64) - PAGE_SIZE, 2 * PAGE_SIZE, 0, Reason.RANGE_WRAPS),
    ],
)
def test_a_call_that_cannot_be_is_einval(
    gpa: int, size: int, flags: int, reason: Reason
) -> None:
    with pytest.raises(KernelError) as caught:
        World().run(pre_fault_memory(booted(), 0, gpa, size, flags))
    assert (caught.value.reason, caught.value.errno) == (reason, Errno.EINVAL)


def test_the_vcpu_must_exist_and_not_run() -> None:
    vm = booted()
    with pytest.raises(NoSuchObject) as unknown:
        World().run(pre_fault_memory(vm, 9, GPA, PAGE_SIZE))
    assert unknown.value.reason is Reason.VCPU_UNKNOWN
    vm.vcpu(0).start()
    with pytest.raises(KernelError) as running:
        pre_fault(vm, GPA, PAGE_SIZE)
    assert running.value.reason is Reason.VCPU_RUNNING
