"""KVM_SET_USER_MEMORY_REGION2: the checks, in the kernel's order, and their traces."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gmem.uapi.errors import Errno, KernelError, Reason, make_error
from gmem.uapi.flags import VmType
from gmem.uapi.pages import PAGE_SIZE, SIZE_2M, PgRange
from gmem.vmm.core.effects import (
    BindSlot,
    MapGuestView,
    MapUserspace,
    RequireDescriptor,
    UnbindSlot,
    UnmapWindow,
)
from gmem.vmm.core.exits import Access
from gmem.vmm.core.fault import Fault, fault
from gmem.vmm.core.memslots import PAGES_MAX, USER_MEM_SLOTS, Region, Userspace
from gmem.vmm.core.set_region import set_user_memory_region2
from gmem.vmm.core.vm import Vm
from tests.support.vmm_world import World, new_vm

LOG_DIRTY, READONLY, GMEM = 1, 2, 4
PLAIN = Region(0, 0, 0x10000, 0x10000, Userspace("descriptors/1", 0))
FILE = Region(1, GMEM, 0x40000000, SIZE_2M, PLAIN.userspace, "hosts/h/guestMemfds/1")
BEYOND = 1 << 64


def set_region(vm: Vm, region: Region, world: World | None = None) -> World:
    world = world or World()
    world.run(set_user_memory_region2(vm, region))
    return world


def refused(vm: Vm, region: Region, world: World | None = None) -> KernelError:
    before = vm.statistics()
    with pytest.raises(KernelError) as caught:
        set_region(vm, region, world)
    assert vm.statistics() == before
    assert vm.slots_lock.idle
    return caught.value


# One defect each, in the order in which the kernel looks; (vm type, changes) each.
DEFECTS: list[tuple[str, dict[str, Any], Reason]] = [
    ("unknown flag", {"flags": GMEM | 8}, Reason.FLAG_UNKNOWN),
    ("size", {"memory_size": 4095}, Reason.RANGE_UNALIGNED),
    ("gpa", {"guest_phys_addr": 1}, Reason.RANGE_UNALIGNED),
    ("hva", {"userspace": Userspace("descriptors/1", 12)}, Reason.RANGE_UNALIGNED),
    ("gmem offset", {"guest_memfd_offset": 1}, Reason.RANGE_UNALIGNED),
    ("gmem wrap", {"guest_memfd_offset": BEYOND - PAGE_SIZE}, Reason.RANGE_WRAPS),
    ("slot id", {"slot": USER_MEM_SLOTS}, Reason.ARGUMENT_INVALID),
    ("gpa wrap", {"guest_phys_addr": BEYOND - PAGE_SIZE}, Reason.RANGE_WRAPS),
]


@pytest.mark.parametrize(("what", "change", "reason"), DEFECTS)
def test_each_check_refuses(what: str, change: dict[str, Any], reason: Reason) -> None:
    error = refused(new_vm(), replace(FILE, **change))
    assert (error.reason, error.errno) == (reason, Errno.EINVAL)


@pytest.mark.parametrize("first", range(len(DEFECTS)))
@pytest.mark.parametrize("second", range(len(DEFECTS)))
def test_the_earlier_check_wins(first: int, second: int) -> None:
    one, other = DEFECTS[first], DEFECTS[second]
    if first >= second or set(one[1]) & set(other[1]):
        return
    error = refused(new_vm(), replace(FILE, **one[1], **other[1]))
    assert error.reason is one[2], (one[0], other[0])


@pytest.mark.parametrize("offset", range(1, PAGE_SIZE, 137))
def test_unaligned_guest_memfd_offset_is_refused(offset: int) -> None:
    error = refused(new_vm(), replace(FILE, guest_memfd_offset=offset))
    assert error.reason is Reason.RANGE_UNALIGNED


@pytest.mark.parametrize("flag", [LOG_DIRTY, READONLY])
def test_guest_memfd_goes_alone(flag: int) -> None:
    error = refused(new_vm(), replace(FILE, flags=GMEM | flag))
    assert (error.reason, error.errno) == (Reason.FLAG_COMBINATION, Errno.EINVAL)


def test_default_vm_knows_no_guest_memfd() -> None:
    error = refused(new_vm(VmType.DEFAULT), FILE)
    assert error.reason is Reason.FLAG_UNKNOWN
    assert "SW_PROTECTED" in error.sentence


def test_delete_needs_a_slot() -> None:
    error = refused(new_vm(), replace(FILE, memory_size=0))
    assert (error.reason, error.errno) == (Reason.MEMSLOT_UNKNOWN, Errno.EINVAL)


def test_memslot_has_fewer_than_2_to_31_pages() -> None:
    vm = new_vm()
    error = refused(vm, replace(PLAIN, memory_size=(PAGES_MAX + 1) * PAGE_SIZE))
    assert error.reason is Reason.RANGE_WRAPS
    set_region(vm, replace(PLAIN, memory_size=PAGES_MAX * PAGE_SIZE))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"flags": 0},
        {"guest_phys_addr": 0x80000000},
        {"memory_size": 2 * SIZE_2M},
        # Immutability is looked at before the overlap.
        {"guest_phys_addr": PLAIN.guest_phys_addr},
    ],
)
def test_memslot_with_guest_memfd_is_immutable(change: dict[str, Any]) -> None:
    vm = new_vm()
    set_region(vm, PLAIN)
    set_region(vm, FILE)
    error = refused(vm, replace(FILE, **change))
    assert (error.reason, error.errno) == (Reason.MEMSLOT_IMMUTABLE, Errno.EINVAL)


@pytest.mark.parametrize(
    "change",
    [
        {"memory_size": 0x20000},
        {"userspace": Userspace("descriptors/2", 0)},
        {"flags": READONLY},
        {"flags": GMEM},
    ],
)
def test_plain_memslot_keeps_its_shape(change: dict[str, Any]) -> None:
    vm = new_vm()
    set_region(vm, PLAIN)
    assert refused(vm, replace(PLAIN, **change)).reason is Reason.MEMSLOT_IMMUTABLE


@pytest.mark.parametrize(
    ("gpa", "size"),
    [
        (0x10000, 0x10000),
        (0x1F000, 0x1000),
        (0x1F000, 0x2000),
        (0xF000, 0x2000),
        (0, 0x40000),
    ],
)
def test_overlap_of_guest_addresses_is_eexist(gpa: int, size: int) -> None:
    vm = new_vm()
    set_region(vm, PLAIN)
    error = refused(vm, replace(PLAIN, slot=5, guest_phys_addr=gpa, memory_size=size))
    assert (error.reason, error.errno) == (Reason.MEMSLOT_OVERLAP, Errno.EEXIST)
    assert error.numbers["slot"] == 0


def test_neighbours_do_not_overlap() -> None:
    vm = new_vm()
    set_region(vm, PLAIN)
    set_region(vm, replace(PLAIN, slot=1, guest_phys_addr=0x20000))
    set_region(vm, replace(PLAIN, slot=2, guest_phys_addr=0))
    assert [slot.region.slot for slot in vm.memslots] == [2, 0, 1]


def test_create_binds_and_then_maps() -> None:
    vm = new_vm()
    world = set_region(vm, replace(FILE, guest_memfd_offset=PAGE_SIZE))
    assert [type(effect) for effect in world.log] == [
        RequireDescriptor,
        BindSlot,
        MapUserspace,
        MapGuestView,
    ]
    [bound] = world.asked(BindSlot)
    assert (bound.base_gfn, bound.offset, bound.size) == (0x40000, PAGE_SIZE, SIZE_2M)
    assert bound.host_faultable
    slot = vm.memslots.get(1)
    assert slot is not None
    assert slot.userspace_window != slot.guest_view_window


def test_memslot_without_userspace_needs_no_descriptor() -> None:
    vm = new_vm()
    world = set_region(vm, replace(FILE, userspace=None))
    assert [type(effect) for effect in world.log] == [BindSlot, MapGuestView]


@pytest.mark.parametrize(
    ("effect", "reason", "left"),
    [
        (RequireDescriptor, Reason.DESCRIPTOR_UNKNOWN, []),
        (BindSlot, Reason.FD_UNKNOWN, []),
        (BindSlot, Reason.BINDING_FOREIGN_VM, []),
        (BindSlot, Reason.BINDING_OVERLAP, []),
        (BindSlot, Reason.RANGE_PAST_END, []),
        (MapUserspace, Reason.ARGUMENT_INVALID, [UnmapWindow, UnmapWindow, UnbindSlot]),
        (MapGuestView, Reason.GUEST_GONE, [UnmapWindow, UnmapWindow, UnbindSlot]),
    ],
)
def test_refused_create_leaves_nothing(
    effect: Any, reason: Reason, left: list[Any]
) -> None:
    world = World(refuse={effect: make_error(reason, "no")})
    assert refused(new_vm(), FILE, world).reason is reason
    kinds = [type(asked) for asked in world.log]
    assert kinds[kinds.index(effect) + 1 :] == left


def test_nothing_is_created_without_a_guest() -> None:
    vm = new_vm()
    vm.guest_died()
    world = World()
    assert refused(vm, FILE, world).reason is Reason.GUEST_GONE
    assert world.log == []


def test_delete_zaps_then_unbinds() -> None:
    vm = new_vm()
    set_region(vm, FILE)
    World().run(fault(vm, Fault(0x40000, 4, Access.SHARED, write=False)))
    assert vm.statistics().stage2.pages_4k == 4

    world = set_region(vm, replace(FILE, memory_size=0))

    assert vm.statistics() == new_vm().statistics()
    assert [type(e) for e in world.log] == [UnmapWindow, UnmapWindow, UnbindSlot]
    begin, end = world.notices
    assert begin.gfns == FILE.gfns
    assert (begin.in_progress, end.in_progress) == (1, 0)
    assert end.seq > begin.seq
    set_region(vm, FILE)


@pytest.mark.parametrize("reason", [Reason.INODE_UNKNOWN, Reason.BINDING_MISSING])
def test_delete_after_close_succeeds(reason: Reason) -> None:
    vm = new_vm()
    set_region(vm, FILE)
    world = World(refuse={UnbindSlot: make_error(reason, "closed")})
    set_region(vm, replace(FILE, memory_size=0), world)
    assert len(vm.memslots) == 0


def test_another_refusal_of_the_unbind_is_told() -> None:
    vm = new_vm()
    set_region(vm, FILE)
    world = World(refuse={UnbindSlot: make_error(Reason.DEADLINE, "late")})
    with pytest.raises(KernelError, match="late"):
        set_region(vm, replace(FILE, memory_size=0), world)
    assert len(vm.memslots) == 0


@pytest.mark.parametrize("side", [PLAIN.userspace, None])
def test_plain_memslot_can_move(side: Userspace | None) -> None:
    vm = new_vm()
    old = replace(PLAIN, userspace=side)
    set_region(vm, old)
    world = set_region(vm, replace(old, guest_phys_addr=0x80000))
    slot = vm.memslots.get(0)
    assert slot is not None
    assert slot.gfns == PgRange(0x80, 0x90)
    assert world.notices[0].gfns == PgRange(0x10, 0x20)
    assert len(world.asked(UnmapWindow)) == (1 if side else 0)


def test_move_onto_another_is_an_overlap() -> None:
    vm = new_vm()
    set_region(vm, PLAIN)
    set_region(vm, FILE)
    error = refused(vm, replace(PLAIN, guest_phys_addr=FILE.guest_phys_addr))
    assert error.reason is Reason.MEMSLOT_OVERLAP


def test_refused_move_changes_nothing() -> None:
    vm = new_vm()
    set_region(vm, PLAIN)
    world = World(refuse={MapUserspace: make_error(Reason.GUEST_GONE, "gone")})
    error = refused(vm, replace(PLAIN, guest_phys_addr=0), world)
    assert error.reason is Reason.GUEST_GONE
    assert vm.memslots.find(0x10) is not None
    assert len(world.asked(UnmapWindow)) == 1


def test_dirty_logging_is_switched_without_a_zap() -> None:
    vm = new_vm()
    set_region(vm, PLAIN)
    world = set_region(vm, replace(PLAIN, flags=LOG_DIRTY))
    slot = vm.memslots.get(0)
    assert slot is not None
    assert slot.region.flags == LOG_DIRTY
    assert world.log == []
    assert world.notices == []
    assert set_region(vm, replace(PLAIN, flags=LOG_DIRTY)).log == []
