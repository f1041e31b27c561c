"""What KVM does in IN_PLACE: files have the attributes, and VMs have none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gmem.uapi.errors import Errno, KernelError, Reason
from gmem.uapi.flags import Capability, MemoryAttribute, VmType
from gmem.uapi.lineage import Lineage
from gmem.uapi.pages import PAGE_SIZE, SIZE_1G, SIZE_2M, PgRange
from gmem.vmm.core.create import (
    FileShape,
    create_guest_memfd,
    in_place_shape,
    mainline_shape,
    rfc_v1_shape,
    rfc_v2_shape,
)
from gmem.vmm.core.effects import Convert, CreateFile, FileRange, Frame, GetPfn
from gmem.vmm.core.exits import Access, FaultOutcome, Mapped, MemoryFault, NoSlot
from gmem.vmm.core.fault import Fault, fault
from gmem.vmm.core.lineage import vm_rules_of
from gmem.vmm.core.memslots import Region, Userspace
from gmem.vmm.core.policy import Policy, answer
from gmem.vmm.core.registry import VmRegistry
from gmem.vmm.core.rows import VmRows, restore
from gmem.vmm.core.set_attributes import convert_memory, set_memory_attributes
from gmem.vmm.core.set_region import set_user_memory_region2
from gmem.vmm.core.vm import Vm
from tests.support.vmm_world import World, new_vm

NAME = "hosts/h/guestMemfds/1"
MMAP, INIT_SHARED, HUGE = 1, 2, 4
PLAIN, PROTECTED = VmType.DEFAULT, VmType.SW_PROTECTED
GFN = SIZE_1G >> 12
REGION = Region(3, 4, SIZE_1G, SIZE_2M, Userspace("descriptors/1", 0), NAME)
OFF = vm_rules_of(in_place_conversion=False)


def vm_of(vm_type: VmType = PROTECTED, *, on: bool = True) -> Vm:
    vm = new_vm(vm_type, Lineage.IN_PLACE)
    vm.table = vm_rules_of(in_place_conversion=on)
    return vm


def booted(
    vm_type: VmType = PROTECTED,
    *,
    mmap: bool = True,
    region: Region = REGION,
    on: bool = True,
) -> Vm:
    vm = vm_of(vm_type, on=on)
    World(in_place=mmap).run(set_user_memory_region2(vm, region))
    return vm


def ask(vm: Vm, world: World, access: Access, npages: int = 1) -> FaultOutcome:
    return world.run(fault(vm, Fault(GFN + 7, npages, access, write=True)))


# KVM_CREATE_GUEST_MEMFD.


@pytest.mark.parametrize("vm_type", list(VmType), ids=lambda kind: kind.name)
@pytest.mark.parametrize(
    ("size", "flags", "order", "found"),
    [
        (PAGE_SIZE, 0, 0, FileShape(PAGE_SIZE, PAGE_SIZE)),
        (
            PAGE_SIZE,
            MMAP | INIT_SHARED,
            0,
            FileShape(PAGE_SIZE, PAGE_SIZE, mmap=True, init_shared=True),
        ),
        (SIZE_2M, MMAP | HUGE, 9, FileShape(SIZE_2M, SIZE_2M, mmap=True)),
        (SIZE_1G, HUGE, 18, FileShape(SIZE_1G, SIZE_1G)),
        (SIZE_2M, 0, 9, Reason.FLAG_COMBINATION),
        (SIZE_2M, HUGE | INIT_SHARED, 9, Reason.FLAG_COMBINATION),
        (SIZE_2M, HUGE, 0, Reason.PAGE_SIZE_UNKNOWN),
        (SIZE_2M, HUGE, 10, Reason.PAGE_SIZE_UNKNOWN),
        (SIZE_2M, HUGE, 21, Reason.PAGE_SIZE_UNKNOWN),
        (SIZE_2M, HUGE, 18, Reason.SIZE_INVALID),
        (PAGE_SIZE + 1, 0, 0, Reason.SIZE_INVALID),
        (SIZE_2M, HUGE | 21 << 58, 9, Reason.FLAG_UNKNOWN),
        *((PAGE_SIZE, 1 << bit, 0, Reason.FLAG_UNKNOWN) for bit in range(3, 64)),
    ],
)
def test_flags_and_page_order(
    vm_type: VmType, size: int, flags: int, order: int, found: object
) -> None:
    vm = vm_of(vm_type)
    assert vm.extensions[Capability.GUEST_MEMFD_FLAGS] == MMAP | INIT_SHARED | HUGE
    if isinstance(found, FileShape):
        assert in_place_shape(vm, size, flags, order) == found
        return
    with pytest.raises(KernelError) as caught:
        in_place_shape(vm, size, flags, order)
    assert (caught.value.reason, caught.value.errno) == (found, 22)


@pytest.mark.parametrize("decode", [rfc_v1_shape, rfc_v2_shape, mainline_shape])
def test_no_other_lineage_has_a_page_order(decode: Any) -> None:
    with pytest.raises(KernelError) as caught:
        decode(new_vm(lineage=Lineage.MAINLINE), PAGE_SIZE, 0, 9)
    assert caught.value.reason is Reason.FLAG_COMBINATION


@pytest.mark.parametrize("vm_type", list(VmType), ids=lambda kind: kind.name)
def test_create_says_whether_the_vm_has_private_memory(vm_type: VmType) -> None:
    vm, world = vm_of(vm_type), World()
    world.run(create_guest_memfd(vm, SIZE_2M, MMAP | HUGE, page_order=9))
    assert world.log == [
        CreateFile(
            vm.name,
            SIZE_2M,
            SIZE_2M,
            Lineage.IN_PLACE,
            mmap=True,
            private_memory=vm_type is PROTECTED,
        )
    ]


# Attributes.


@pytest.mark.parametrize("attributes", [8, 1, 9])
def test_the_vm_has_no_attributes(attributes: int) -> None:
    vm, world = booted(), World()
    op = set_memory_attributes(vm, SIZE_1G, SIZE_2M, attributes=attributes)
    with pytest.raises(KernelError) as caught:
        world.run(op)
    assert caught.value.reason is Reason.ATTRIBUTE_UNSUPPORTED
    assert caught.value.errno == Errno.EINVAL
    assert "KVM_SET_MEMORY_ATTRIBUTES2" in str(caught.value)
    assert world.log == []


def test_capabilities_say_who_has_the_attributes() -> None:
    on, off = vm_of().extensions, vm_of(on=False).extensions
    assert on[Capability.MEMORY_ATTRIBUTES] == 0
    assert on[Capability.GUEST_MEMFD_MEMORY_ATTRIBUTES] == 8
    assert off[Capability.MEMORY_ATTRIBUTES] == 8
    assert Capability.GUEST_MEMFD_MEMORY_ATTRIBUTES not in off
    assert off[Capability.GUEST_MEMFD_FLAGS] == MMAP | HUGE
    plain = vm_of(PLAIN).extensions
    assert plain[Capability.GUEST_MEMFD_MEMORY_ATTRIBUTES] == 0


def test_a_vmm_converts_the_files() -> None:
    vm, world = booted(), World()
    world.run(convert_memory(vm, SIZE_1G, SIZE_2M, private=True))
    part = FileRange(NAME, 0, SIZE_2M)
    assert world.asked(Convert) == [Convert((part,), to_shared=False)]
    # There is nothing that could say it of other memory.
    beyond = convert_memory(vm, SIZE_1G, 2 * SIZE_2M, private=True)
    with pytest.raises(KernelError) as caught:
        World().run(beyond)
    assert caught.value.reason is Reason.ATTRIBUTE_UNSUPPORTED


@pytest.mark.parametrize("mmap", [True, False])
def test_the_policy_converts_the_file_that_a_guest_touched_wrongly(mmap: bool) -> None:
    vm, world = booted(mmap=mmap), World()
    wrong = MemoryFault.of_page(GFN + 1, private=True)
    assert world.run(answer(vm, Policy.CONVERT, wrong)) == 0
    one = FileRange(NAME, PAGE_SIZE, PAGE_SIZE)
    assert world.asked(Convert) == [Convert((one,), to_shared=False)]


# Faults.


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize(
    ("access", "meant"),
    [(Access.BY_ATTRIBUTE, None), (Access.PRIVATE, False), (Access.SHARED, True)],
)
def test_the_file_is_asked_what_a_page_is(
    mmap: bool, access: Access, meant: bool | None
) -> None:
    vm, world = booted(mmap=mmap), World(frame=Frame(700, 0))
    found = ask(vm, world, access, 4)
    assert world.log == [GetPfn(NAME, vm.name, REGION.slot, GFN + 7, meant, 4)]
    [slot] = vm.memslots
    assert isinstance(found, Mapped)
    assert found.window == slot.guest_view_window


def test_shared_pages_of_a_file_without_mmap_are_the_userspace_sides() -> None:
    vm = booted(mmap=False)
    [slot] = vm.memslots
    assert not slot.gmem_only
    found = ask(vm, World(frame=Frame(0, 0, shared=True, npages=3)), Access.SHARED, 9)
    assert isinstance(found, Mapped)
    assert (found.gfns, found.window) == (
        PgRange(GFN + 7, GFN + 10),
        slot.userspace_window,
    )
    bare = booted(mmap=False, region=replace(REGION, userspace=None))
    found = ask(bare, World(frame=Frame(0, 0, shared=True)), Access.BY_ATTRIBUTE)
    assert isinstance(found, MemoryFault)
    assert (found.errno, found.reason) == (Errno.EFAULT, "PAGE_UNREADABLE")


@pytest.mark.parametrize("access", [Access.PRIVATE, Access.SHARED])
def test_the_wrong_kind_of_access_leaves_the_guest(access: Access) -> None:
    found = ask(booted(), World(frame=Frame(0, 0, matches=False)), access)
    private = access is Access.PRIVATE
    assert found == MemoryFault.of_page(GFN + 7, private=private)


def test_a_vm_without_private_memory_has_shared_accesses_alone() -> None:
    vm = booted(PLAIN)
    found = ask(vm, World(frame=Frame(700, 0)), Access.SHARED)
    assert isinstance(found, Mapped)
    assert ask(vm, World(), Access.PRIVATE) == MemoryFault.of_page(
        GFN + 7, private=True
    )


def test_a_slot_that_was_deleted_is_mmio_c061() -> None:
    vm = booted()
    World().run(set_user_memory_region2(vm, Region(3, 0, 0, 0)))
    assert isinstance(ask(vm, World(), Access.BY_ATTRIBUTE), NoSlot)


@pytest.mark.parametrize(("order", "level"), [(9, 9), (18, 9), (0, 0)])
def test_a_private_huge_page_is_one_entry(order: int, level: int) -> None:
    vm = booted(region=replace(REGION, userspace=None))
    ask(vm, World(frame=Frame(GFN + 7, order)), Access.PRIVATE)
    entry = vm.stage2.lookup(GFN + 7)
    assert entry is not None
    assert entry.order == level


# The parameter.


def test_without_the_parameter_attributes_say_it_as_in_mainline() -> None:
    vm, world = booted(on=False), World()
    assert world.run(set_memory_attributes(vm, SIZE_1G, SIZE_2M, attributes=8))
    assert world.asked(Convert) == []
    assert vm.attributes.have(PgRange(GFN, GFN + 512), MemoryAttribute.PRIVATE)
    assert ask(vm, World(), Access.SHARED) == MemoryFault.of_page(
        GFN + 7, private=False
    )
    with pytest.raises(KernelError) as caught:
        in_place_shape(vm, PAGE_SIZE, INIT_SHARED)
    assert caught.value.reason is Reason.FLAG_UNKNOWN


def test_a_registry_gives_its_vms_the_rules_of_the_host() -> None:
    registry = VmRegistry("h", OFF)
    vm = World().run(registry.create("v", PROTECTED, Lineage.IN_PLACE))
    assert vm.rules is OFF[Lineage.IN_PLACE]
    again = VmRegistry("h", OFF)
    restore(again, _rows(vm))
    assert again.get(vm.name).rules is OFF[Lineage.IN_PLACE]
    same = vm_rules_of(in_place_conversion=True)
    assert {one for one in same if same[one] != OFF[one]} == {Lineage.IN_PLACE}


def _rows(vm: Vm) -> dict[str, Any]:
    registry = VmRegistry("h", OFF)
    rows = VmRows(registry)
    registry.adopt(vm)
    return rows.changes()
