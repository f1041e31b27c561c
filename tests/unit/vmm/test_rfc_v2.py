"""What KVM does differently in RFC_V2: the file says what is private."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gmem.uapi.errors import KernelError, Reason, make_error
from gmem.uapi.flags import (
    KVM_HC_MAP_GPA_RANGE,
    KVM_MAP_GPA_RANGE_ENCRYPTED,
    MemoryAttribute,
    VmType,
)
from gmem.uapi.lineage import Lineage
from gmem.uapi.pages import PAGE_SIZE, SIZE_1G, SIZE_2M, PgRange
from gmem.vmm.core.create import FileShape, create_guest_memfd, rfc_v2_shape
from gmem.vmm.core.effects import (
    BindSlot,
    Convert,
    CreateFile,
    FileIdentity,
    FileRange,
    Frame,
    GetPfn,
    IdentifyDescriptor,
    MapGuestView,
    MapHostView,
    MapUserspace,
    Populate,
    RequireDescriptor,
)
from gmem.vmm.core.exits import (
    Access,
    Exit,
    FaultOutcome,
    Hypercall,
    Mapped,
    MemoryFault,
    Retry,
)
from gmem.vmm.core.fault import Fault, fault
from gmem.vmm.core.memslots import Region, Userspace
from gmem.vmm.core.policy import Policy, answer
from gmem.vmm.core.populate import populate_memory
from gmem.vmm.core.set_attributes import convert_memory, set_memory_attributes
from gmem.vmm.core.set_region import set_user_memory_region2
from gmem.vmm.core.vm import Vm
from tests.support.vmm_world import Hand, World, new_vm

NAME = "hosts/h/guestMemfds/1"
SHARED, INIT_PRIVATE, HUGE = 1, 2, 4
GFN = SIZE_1G >> 12
GMEM = 4
REGION = Region(3, GMEM, SIZE_1G, SIZE_1G, Userspace("descriptors/1", 0), NAME)


def shape(size: int, flags: int) -> Any:
    try:
        return rfc_v2_shape(new_vm(lineage=Lineage.RFC_V2), size, flags)
    except KernelError as error:
        return error.reason if error.errno == 22 else error


# KVM_CREATE_GUEST_MEMFD.


@pytest.mark.parametrize(
    ("size", "flags", "found"),
    [
        (PAGE_SIZE, 0, FileShape(PAGE_SIZE, PAGE_SIZE)),
        (PAGE_SIZE, SHARED, FileShape(PAGE_SIZE, PAGE_SIZE, support_shared=True)),
        (
            PAGE_SIZE,
            SHARED | INIT_PRIVATE,
            FileShape(PAGE_SIZE, PAGE_SIZE, support_shared=True, init_private=True),
        ),
        (SIZE_2M, HUGE, FileShape(SIZE_2M, SIZE_2M)),
        (SIZE_2M, HUGE | 21 << 58, FileShape(SIZE_2M, SIZE_2M)),
        (SIZE_1G, HUGE | 30 << 58, FileShape(SIZE_1G, SIZE_1G)),
        (PAGE_SIZE, INIT_PRIVATE, Reason.FLAG_COMBINATION),
        (SIZE_2M, 21 << 58, Reason.FLAG_COMBINATION),
        (PAGE_SIZE, HUGE | 12 << 58, Reason.PAGE_SIZE_UNKNOWN),
        (SIZE_2M, HUGE | 63 << 58, Reason.PAGE_SIZE_UNKNOWN),
        (0, 0, Reason.SIZE_INVALID),
        (4095, HUGE | 12 << 58, Reason.SIZE_INVALID),
        (PAGE_SIZE, HUGE, Reason.SIZE_INVALID),
        (SIZE_2M, HUGE | 30 << 58, Reason.SIZE_INVALID),
        *((PAGE_SIZE, 1 << bit, Reason.FLAG_UNKNOWN) for bit in range(3, 58)),
    ],
)
def test_the_flag_word_of_the_series(size: int, flags: int, found: object) -> None:
    assert shape(size, flags) == found


def test_create_passes_the_flags_on() -> None:
    vm, world = new_vm(lineage=Lineage.RFC_V2), World()
    world.run(create_guest_memfd(vm, SIZE_2M, HUGE | SHARED | INIT_PRIVATE))
    assert world.log == [
        CreateFile(
            vm.name,
            SIZE_2M,
            SIZE_2M,
            Lineage.RFC_V2,
            support_shared=True,
            init_private=True,
        )
    ]


# Memslots.


def booted(
    *,
    in_place: bool = True,
    region: Region = REGION,
    vm_type: VmType = VmType.SW_PROTECTED,
) -> Vm:
    vm = new_vm(vm_type, Lineage.RFC_V2)
    World(in_place=in_place).run(set_user_memory_region2(vm, region))
    return vm


def test_a_file_with_shared_pages_serves_both_kinds_of_access() -> None:
    vm, world = new_vm(lineage=Lineage.RFC_V2), World(in_place=True)
    world.run(set_user_memory_region2(vm, REGION))
    kinds = [type(effect) for effect in world.log]
    assert kinds == [
        RequireDescriptor,
        IdentifyDescriptor,
        BindSlot,
        MapHostView,
        MapGuestView,
    ]
    assert world.asked(BindSlot)[0].userspace == FileIdentity(7, 2, 0)
    [slot] = vm.memslots
    assert slot.gmem_only
    host, guest = world.asked(MapHostView)[0], world.asked(MapGuestView)[0]
    assert (slot.userspace_window, slot.guest_view_window) == (
        host.window,
        guest.window,
    )
    assert (host.name, host.offset, host.size) == (NAME, 0, SIZE_1G)


def test_without_a_userspace_side_nothing_is_compared() -> None:
    vm, world = new_vm(lineage=Lineage.RFC_V2), World(in_place=True)
    world.run(set_user_memory_region2(vm, replace(REGION, userspace=None)))
    assert world.asked(BindSlot)[0].userspace is None
    assert len(world.asked(MapHostView)) == 1


def test_a_file_without_shared_pages_leaves_userspace_as_it_is() -> None:
    vm, world = new_vm(lineage=Lineage.RFC_V2), World()
    world.run(set_user_memory_region2(vm, REGION))
    assert world.asked(MapHostView) == []
    assert len(world.asked(MapUserspace)) == 1


@pytest.mark.parametrize("vm_type", list(VmType), ids=lambda kind: kind.name)
def test_every_type_of_vm_may_have_a_guest_memfd(vm_type: VmType) -> None:
    assert len(booted(vm_type=vm_type).memslots) == 1


# Faults.


def ask(vm: Vm, world: World, access: Access, npages: int = 1) -> FaultOutcome:
    return world.run(fault(vm, Fault(GFN + 7, npages, access, write=True)))


@pytest.mark.parametrize(
    ("access", "meant"),
    [(Access.BY_ATTRIBUTE, None), (Access.PRIVATE, False), (Access.SHARED, True)],
)
@pytest.mark.parametrize("attribute", [0, 8], ids=["shared", "private"])
def test_the_file_is_asked_whatever_the_attributes_say(
    access: Access, meant: bool | None, attribute: int
) -> None:
    vm = booted()
    vm.attributes.store(PgRange(GFN + 3, GFN + 20), MemoryAttribute(attribute))
    world = World(frame=Frame(5 * GFN + 7, 18))
    found = ask(vm, world, access, 4)
    number = REGION.slot
    assert world.log == [GetPfn(NAME, vm.name, number, GFN + 7, meant, 4)]
    assert isinstance(found, Mapped)
    assert found.private
    assert found.gfns == PgRange(GFN, 2 * GFN)


def test_shared_pages_are_mapped_at_4k_as_far_as_they_go() -> None:
    vm = booted()
    world = World(frame=Frame(700, 0, shared=True, npages=3))
    found = ask(vm, world, Access.SHARED, 100)
    [slot] = vm.memslots
    assert isinstance(found, Mapped)
    assert (found.gfns, found.private) == (PgRange(GFN + 7, GFN + 10), False)
    assert found.window == slot.userspace_window
    entry = vm.stage2.lookup(GFN + 9)
    assert entry is not None
    assert (entry.order, entry.pfn) == (0, 702)


def test_beside_an_open_bracket_only_the_page_itself_is_mapped() -> None:
    vm = booted()
    vm.invalidate_begin("k", PgRange(GFN + 8, GFN + 9))
    found = ask(vm, World(frame=Frame(700, 0, shared=True, npages=3)), Access.SHARED)
    assert isinstance(found, Mapped)
    assert found.gfns == PgRange(GFN + 7, GFN + 8)


@pytest.mark.parametrize("access", [Access.PRIVATE, Access.SHARED])
def test_the_wrong_kind_of_access_leaves_the_guest(access: Access) -> None:
    vm = booted()
    found = ask(vm, World(frame=Frame(0, 0, matches=False)), access)
    private = access is Access.PRIVATE
    assert found == MemoryFault.of_page(GFN + 7, private=private)


@pytest.mark.parametrize("refused", [True, False])
def test_an_answer_that_an_invalidation_overtook_is_asked_again(refused: bool) -> None:
    vm = booted()
    hand = Hand(fault(vm, Fault(GFN, 1, Access.PRIVATE, write=False)))
    vm.invalidate_begin("k", PgRange(GFN, GFN + 1))
    if refused:
        hand.fail(make_error(Reason.SUBPOOL_EMPTY, "none left"))
    else:
        hand.reply(Frame(9, 0))
    assert isinstance(hand.result(), Retry)


def test_what_the_file_refuses_is_a_memory_fault_with_its_errno() -> None:
    vm = booted()
    world = World(refuse={GetPfn: make_error(Reason.SUBPOOL_EMPTY, "none left")})
    found = ask(vm, world, Access.SHARED)
    assert isinstance(found, MemoryFault)
    assert (found.errno, found.private) == (12, False)


# Levels.


@pytest.mark.parametrize(("offset", "order"), [(0, 18), (SIZE_2M, 9), (PAGE_SIZE, 0)])
def test_a_level_needs_guest_address_and_file_offset_to_agree(
    offset: int, order: int
) -> None:
    region = replace(
        REGION, userspace=None, guest_memfd_offset=offset, memory_size=SIZE_1G
    )
    vm = booted(region=region)
    vm.attributes.store(PgRange(GFN, GFN + 1), MemoryAttribute.PRIVATE)
    ask(vm, World(frame=Frame(GFN + 7, 18)), Access.PRIVATE)
    entry = vm.stage2.lookup(GFN + 7)
    assert entry is not None
    assert entry.order == order


def test_mixed_attributes_count_where_the_file_says_nothing() -> None:
    vm = booted(in_place=False)
    vm.attributes.store(PgRange(GFN, GFN + 600), MemoryAttribute.PRIVATE)
    ask(vm, World(frame=Frame(GFN + 7, 18)), Access.PRIVATE)
    entry = vm.stage2.lookup(GFN + 7)
    assert entry is not None
    assert entry.order == 9


# Conversion.


def test_attributes_convert_nothing() -> None:
    vm, world = booted(), World()
    op = set_memory_attributes(vm, SIZE_1G, SIZE_2M, attributes=8)
    assert world.run(op)
    assert world.asked(Convert) == []
    assert vm.attributes.is_private(GFN)


def test_a_vmm_converts_files_and_sets_attributes_elsewhere() -> None:
    vm = booted()
    plain = Region(4, 0, 2 * SIZE_1G, SIZE_2M, Userspace("descriptors/2", 0))
    World().run(set_user_memory_region2(vm, plain))
    world = World()
    world.run(convert_memory(vm, 2 * SIZE_1G - SIZE_2M, 2 * SIZE_2M, private=True))
    part = FileRange(NAME, SIZE_1G - SIZE_2M, SIZE_2M)
    assert world.asked(Convert) == [Convert((part,), to_shared=False)]
    assert not vm.attributes.is_private(2 * GFN - 1)
    assert vm.attributes.is_private(2 * GFN)


def converts(vm: Vm, reached: Exit) -> tuple[int | Exit, list[Any]]:
    world = World()
    return world.run(answer(vm, Policy.CONVERT, reached)), world.asked(Convert)


def test_the_policy_converts_what_the_guest_asks_for_and_touches() -> None:
    vm = booted()
    call = Hypercall(KVM_HC_MAP_GPA_RANGE, (SIZE_1G, 2, KVM_MAP_GPA_RANGE_ENCRYPTED))
    found, convert = converts(vm, call)
    assert found == 0
    two = FileRange(NAME, 0, 2 * PAGE_SIZE)
    assert convert == [Convert((two,), to_shared=False)]

    wrong = MemoryFault.of_page(GFN + 1, private=False)
    found, convert = converts(vm, wrong)
    assert found == 0
    one = FileRange(NAME, PAGE_SIZE, PAGE_SIZE)
    assert convert == [Convert((one,), to_shared=True)]

    gone = replace(wrong, reason="FD_UNKNOWN")
    assert converts(vm, gone) == (gone, [])


@pytest.mark.parametrize("in_place", [True, False])
def test_populate_asks_the_file_where_the_file_knows(in_place: bool) -> None:
    vm, world = booted(in_place=in_place), World()
    op = populate_memory(
        vm, SIZE_1G, PAGE_SIZE, descriptor="descriptors/9", source_offset=0
    )
    if in_place:
        world.run(op)
        assert len(world.asked(Populate)) == 1
    else:
        with pytest.raises(KernelError) as caught:
            world.run(op)
        assert caught.value.reason is Reason.PAGE_NOT_FAULTABLE
