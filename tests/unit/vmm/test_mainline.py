"""What KVM does in MAINLINE: attributes say how, GMEM_ONLY files say where from."""

from __future__ import annotations

from typing import Any

import pytest

from gmem.uapi.errors import KernelError, Reason, make_error
from gmem.uapi.flags import (
    KVM_HC_MAP_GPA_RANGE,
    KVM_MAP_GPA_RANGE_ENCRYPTED,
    Capability,
    MemoryAttribute,
    VmType,
)
from gmem.uapi.lineage import Lineage
from gmem.uapi.pages import PAGE_SIZE, SIZE_1G, SIZE_2M, PgRange
from gmem.vmm.core.create import FileShape, create_guest_memfd, mainline_shape
from gmem.vmm.core.effects import (
    Convert,
    CreateFile,
    Frame,
    GetPfn,
    IdentifyDescriptor,
    MapHostView,
    MapUserspace,
)
from gmem.vmm.core.exits import (
    Access,
    FaultOutcome,
    Hypercall,
    Mapped,
    MemoryFault,
    NoSlot,
)
from gmem.vmm.core.fault import Fault, fault
from gmem.vmm.core.memslots import Region, Userspace
from gmem.vmm.core.policy import Policy, answer
from gmem.vmm.core.populate import populate_memory
from gmem.vmm.core.set_attributes import set_memory_attributes
from gmem.vmm.core.set_region import set_user_memory_region2
from gmem.vmm.core.vm import Vm
from tests.support.vmm_world import World, new_vm

NAME = "hosts/h/guestMemfds/1"
MMAP, INIT_SHARED = 1, 2
PLAIN, SHAREABLE = VmType.SW_PROTECTED, VmType.DEFAULT
GFN = SIZE_1G >> 12
REGION = Region(3, 4, SIZE_1G, SIZE_2M, Userspace("descriptors/1", 0), NAME)


def mainline(vm_type: VmType) -> Vm:
    return new_vm(vm_type, Lineage.MAINLINE)


def booted(vm_type: VmType = PLAIN, *, gmem_only: bool = True) -> Vm:
    vm = mainline(vm_type)
    World(in_place=gmem_only).run(set_user_memory_region2(vm, REGION))
    return vm


def ask(vm: Vm, world: World, access: Access) -> FaultOutcome:
    return world.run(fault(vm, Fault(GFN + 7, 1, access, write=True)))


# Flags.


@pytest.mark.parametrize(
    ("vm_type", "flags", "found"),
    [
        (PLAIN, 0, FileShape(PAGE_SIZE, PAGE_SIZE)),
        (PLAIN, MMAP, FileShape(PAGE_SIZE, PAGE_SIZE, mmap=True)),
        (SHAREABLE, MMAP, FileShape(PAGE_SIZE, PAGE_SIZE, mmap=True)),
        (SHAREABLE, INIT_SHARED, FileShape(PAGE_SIZE, PAGE_SIZE, init_shared=True)),
        (PLAIN, INIT_SHARED, Reason.FLAG_UNKNOWN),
        (PLAIN, MMAP | INIT_SHARED, Reason.FLAG_UNKNOWN),
        *((SHAREABLE, 1 << bit, Reason.FLAG_UNKNOWN) for bit in range(2, 64)),
    ],
)
def test_the_flags_of_a_vm_are_those_of_its_capability_c068(
    vm_type: VmType, flags: int, found: object
) -> None:
    vm = mainline(vm_type)
    supported = vm.extensions[Capability.GUEST_MEMFD_FLAGS]
    assert supported == (MMAP if vm_type is PLAIN else MMAP | INIT_SHARED)
    if flags & ~supported == 0:
        assert mainline_shape(vm, PAGE_SIZE, flags) == found
        return
    with pytest.raises(KernelError) as caught:
        mainline_shape(vm, PAGE_SIZE, flags)
    assert (caught.value.reason, caught.value.errno) == (found, 22)


@pytest.mark.parametrize("size", [0, 1, 4095, PAGE_SIZE + 1])
def test_the_size_is_a_multiple_of_4k_c069(size: int) -> None:
    with pytest.raises(KernelError) as caught:
        mainline_shape(mainline(SHAREABLE), size, 0)
    assert caught.value.reason is Reason.SIZE_INVALID


def test_create_passes_the_flags_on() -> None:
    vm, world = mainline(SHAREABLE), World()
    world.run(create_guest_memfd(vm, PAGE_SIZE, MMAP | INIT_SHARED))
    assert world.log == [
        CreateFile(
            vm.name,
            PAGE_SIZE,
            PAGE_SIZE,
            Lineage.MAINLINE,
            mmap=True,
            init_shared=True,
            private_memory=False,
        )
    ]


# Memslots.


@pytest.mark.parametrize("vm_type", list(VmType), ids=lambda kind: kind.name)
def test_an_mmap_file_makes_the_slot_gmem_only_whatever_userspace_is(
    vm_type: VmType,
) -> None:
    vm, world = mainline(vm_type), World(in_place=True)
    world.run(set_user_memory_region2(vm, REGION))
    [slot] = vm.memslots
    assert slot.gmem_only
    assert len(world.asked(MapHostView)) == 1
    assert world.asked(MapUserspace) == []
    # Nobody compares the userspace side with the file.
    assert world.asked(IdentifyDescriptor) == []


# Faults.


@pytest.mark.parametrize("attribute", [0, 8], ids=["shared", "private"])
@pytest.mark.parametrize("file_shared", [True, False])
def test_the_file_has_the_page_whatever_the_attribute(
    attribute: int, file_shared: bool
) -> None:
    vm = booted()
    vm.attributes.store(PgRange(GFN, GFN + 512), MemoryAttribute(attribute))
    world = World(frame=Frame(700, 0, shared=file_shared))
    found = ask(vm, world, Access.BY_ATTRIBUTE)
    assert world.log == [GetPfn(NAME, vm.name, REGION.slot, GFN + 7, None, 1)]
    [slot] = vm.memslots
    assert isinstance(found, Mapped)
    window = slot.userspace_window if file_shared else slot.guest_view_window
    assert (found.gfns, found.window) == (PgRange(GFN + 7, GFN + 8), window)
    # What the guest remembers is what accesses are, not where the page is.
    assert found.private is (bool(attribute) and not file_shared)


@pytest.mark.parametrize("gmem_only", [True, False])
@pytest.mark.parametrize("attribute", [0, 8], ids=["shared", "private"])
def test_the_attribute_says_which_access_is_wrong(
    gmem_only: bool, attribute: int
) -> None:
    vm, world = booted(gmem_only=gmem_only), World()
    vm.attributes.store(PgRange(GFN, GFN + 512), MemoryAttribute(attribute))
    access = Access.SHARED if attribute else Access.PRIVATE
    found = ask(vm, world, access)
    assert found == MemoryFault.of_page(GFN + 7, private=not attribute)
    assert world.log == []


def test_a_file_without_mmap_has_private_memory_alone() -> None:
    vm = booted(gmem_only=False)
    [slot] = vm.memslots
    world = World(frame=Frame(700, 0))
    shared = ask(vm, world, Access.BY_ATTRIBUTE)
    assert isinstance(shared, Mapped)
    assert (shared.window, world.log) == (slot.userspace_window, [])
    vm.attributes.store(PgRange(GFN, GFN + 512), MemoryAttribute.PRIVATE)
    private = ask(vm, world, Access.BY_ATTRIBUTE)
    assert isinstance(private, Mapped)
    assert private.window == slot.guest_view_window


@pytest.mark.parametrize("attribute", [0, 8], ids=["shared", "private"])
def test_what_the_file_refuses_leaves_with_the_kind_of_the_access(
    attribute: int,
) -> None:
    vm = booted()
    vm.attributes.store(PgRange(GFN, GFN + 512), MemoryAttribute(attribute))
    world = World(refuse={GetPfn: make_error(Reason.BASE_MEMORY_EMPTY, "none")})
    found = ask(vm, world, Access.BY_ATTRIBUTE)
    assert isinstance(found, MemoryFault)
    assert (found.errno, found.private) == (12, bool(attribute))


def test_without_a_slot_shared_is_mmio_and_private_leaves() -> None:
    vm, world = mainline(PLAIN), World()
    assert isinstance(ask(vm, world, Access.BY_ATTRIBUTE), NoSlot)
    vm.attributes.store(PgRange(GFN, GFN + 512), MemoryAttribute.PRIVATE)
    found = ask(vm, world, Access.BY_ATTRIBUTE)
    assert found == MemoryFault.of_page(GFN + 7, private=True)


# Attributes.


def test_attributes_are_stored_and_no_file_is_converted() -> None:
    vm, world = booted(), World()
    assert world.run(set_memory_attributes(vm, SIZE_1G, SIZE_2M, attributes=8))
    assert world.asked(Convert) == []
    assert vm.attributes.is_private(GFN)
    assert len(world.notices) == 2


def test_a_vm_without_private_memory_has_no_attribute_for_it() -> None:
    with pytest.raises(KernelError) as caught:
        World().run(
            set_memory_attributes(booted(SHAREABLE), SIZE_1G, SIZE_2M, attributes=8)
        )
    assert caught.value.reason is Reason.ATTRIBUTE_UNSUPPORTED


def test_the_policy_sets_attributes_for_what_the_guest_asks_and_touches() -> None:
    vm = booted()
    call = Hypercall(KVM_HC_MAP_GPA_RANGE, (SIZE_1G, 2, KVM_MAP_GPA_RANGE_ENCRYPTED))
    wrong = MemoryFault.of_page(GFN + 1, private=False)
    expected: list[tuple[Any, bool]] = [(call, True), (wrong, False)]
    for reached, private in expected:
        world = World()
        assert world.run(answer(vm, Policy.CONVERT, reached)) == 0
        assert world.asked(Convert) == []
        assert vm.attributes.is_private(GFN + 1) is private
    assert vm.attributes.is_private(GFN)


def test_populate_wants_the_attribute() -> None:
    vm = booted()
    op = populate_memory(
        vm, SIZE_1G, PAGE_SIZE, descriptor="descriptors/9", source_offset=0
    )
    with pytest.raises(KernelError) as caught:
        World().run(op)
    assert caught.value.reason is Reason.PAGE_NOT_FAULTABLE
