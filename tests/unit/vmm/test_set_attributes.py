"""KVM_SET_MEMORY_ATTRIBUTES: order, refusals, and what a refusal leaves: nothing."""

from __future__ import annotations

import pytest

from gmem.uapi.errors import Contended, Errno, KernelError, Reason, make_error
from gmem.uapi.flags import MemoryAttribute, VmType
from gmem.uapi.lineage import Lineage
from gmem.uapi.pages import PAGE_SIZE, SIZE_2M, PgRange
from gmem.vmm.core.effects import Convert, FileRange, Frame
from gmem.vmm.core.exits import Access, Hypercall, Io, MemoryFault
from gmem.vmm.core.fault import Fault, fault
from gmem.vmm.core.memslots import Region, Userspace
from gmem.vmm.core.policy import Policy, answer
from gmem.vmm.core.set_attributes import set_memory_attributes
from gmem.vmm.core.set_region import set_user_memory_region2
from gmem.vmm.core.vm import Vm
from tests.support.vmm_world import Hand, World, new_vm

PRIVATE = int(MemoryAttribute.PRIVATE)
ONE, TWO = "hosts/h/guestMemfds/1", "hosts/h/guestMemfds/2"
SIDE = Userspace("descriptors/1", 0)
END = 1 << 64


def booted() -> Vm:
    """2M of one file, 2M without a file, 2M of another file from its byte 4096 on."""
    vm = new_vm()
    for region in (
        Region(0, 4, 0, SIZE_2M, SIDE, ONE),
        Region(1, 0, SIZE_2M, SIZE_2M, SIDE),
        Region(2, 4, 2 * SIZE_2M, SIZE_2M, SIDE, TWO, PAGE_SIZE),
    ):
        World().run(set_user_memory_region2(vm, region))
    return vm


def convert(vm: Vm, address: int, size: int, attributes: int = PRIVATE) -> World:
    world = World()
    world.run(set_memory_attributes(vm, address, size, attributes=attributes))
    return world


@pytest.mark.parametrize(
    ("address", "size", "attributes", "flags", "reason"),
    [
        (0, PAGE_SIZE, PRIVATE, 1, Reason.FLAG_UNKNOWN),
        (0, PAGE_SIZE, 1, 0, Reason.ATTRIBUTE_UNSUPPORTED),
        (0, PAGE_SIZE, PRIVATE | 1, 0, Reason.ATTRIBUTE_UNSUPPORTED),
        (0, PAGE_SIZE, 1 << 63, 0, Reason.ATTRIBUTE_UNSUPPORTED),
        (0, 0, PRIVATE, 0, Reason.RANGE_EMPTY),
        (END - PAGE_SIZE, PAGE_SIZE, PRIVATE, 0, Reason.RANGE_WRAPS),
        (END - PAGE_SIZE, 2 * PAGE_SIZE, PRIVATE, 0, Reason.RANGE_WRAPS),
        (1 << 63, 1 << 63, PRIVATE, 0, Reason.RANGE_WRAPS),
        (1, PAGE_SIZE, PRIVATE, 0, Reason.RANGE_UNALIGNED),
        (0, PAGE_SIZE + 1, PRIVATE, 0, Reason.RANGE_UNALIGNED),
        # In the kernel's order where two are wrong.
        (1, 0, 1, 1, Reason.FLAG_UNKNOWN),
        (1, 0, 1, 0, Reason.ATTRIBUTE_UNSUPPORTED),
        (1, 0, PRIVATE, 0, Reason.RANGE_EMPTY),
        (END - 1, PAGE_SIZE, PRIVATE, 0, Reason.RANGE_WRAPS),
    ],
)
def test_bad_call_is_refused(
    address: int, size: int, attributes: int, flags: int, reason: Reason
) -> None:
    vm, world = booted(), World()
    before = vm.statistics()
    with pytest.raises(KernelError) as refused:
        world.run(
            set_memory_attributes(vm, address, size, attributes=attributes, flags=flags)
        )
    assert (refused.value.reason, refused.value.errno) == (reason, Errno.EINVAL)
    assert (vm.statistics(), world.log, world.notices) == (before, [], [])


def test_default_vm_has_no_private_attribute() -> None:
    vm = new_vm(VmType.DEFAULT)
    with pytest.raises(KernelError) as refused:
        convert(vm, 0, PAGE_SIZE)
    assert refused.value.reason is Reason.ATTRIBUTE_UNSUPPORTED
    assert convert(vm, 0, PAGE_SIZE, attributes=0).log == []


def test_one_call_converts_the_files_of_all_memslots() -> None:
    vm = booted()
    world = convert(vm, PAGE_SIZE, 2 * SIZE_2M)
    assert world.log == [
        Convert(
            (
                FileRange(ONE, PAGE_SIZE, SIZE_2M - PAGE_SIZE),
                FileRange(TWO, PAGE_SIZE, PAGE_SIZE),
            ),
            to_shared=False,
        )
    ]
    runs = list(vm.attributes.runs(PgRange(0, 3 << 9)))
    assert [(run.start, run.stop, int(value)) for run, value in runs] == [
        (0, 1, 0),
        (1, 1025, PRIVATE),
        (1025, 1536, 0),
    ]
    begin, end = world.notices
    assert (begin.gfns, begin.in_progress) == (PgRange(1, 1025), 1)
    assert (len(end.gfns), end.in_progress) == (0, 0)


def test_conversion_of_what_is_so_already_is_nothing() -> None:
    vm = booted()
    convert(vm, 0, SIZE_2M)
    before = vm.invalidation.seq
    world = convert(vm, PAGE_SIZE, PAGE_SIZE)
    assert (world.log, world.notices, vm.invalidation.seq) == ([], [], before)


def test_range_without_a_file_asks_nobody() -> None:
    vm = booted()
    world = convert(vm, SIZE_2M, SIZE_2M)
    assert world.log == []
    assert vm.attributes.is_private(512)
    assert len(world.notices) == 2


def test_order_is_zap_convert_store() -> None:
    vm = booted()
    convert(vm, 0, SIZE_2M)
    World(frame=Frame(512, 9)).run(fault(vm, Fault(0, 1, Access.PRIVATE, write=True)))
    assert vm.statistics().stage2.pages_2m == 1

    hand = Hand(set_memory_attributes(vm, 0, PAGE_SIZE, attributes=0))

    assert hand.effect == Convert((FileRange(ONE, 0, PAGE_SIZE),), to_shared=True)
    assert vm.statistics().stage2.pages_2m == 0
    assert vm.statistics().in_progress == 1
    assert vm.attributes.is_private(0)
    hand.reply()
    assert hand.result() is True
    assert not vm.attributes.is_private(0)
    assert vm.statistics().in_progress == 0


def test_refused_conversion_leaves_the_attributes() -> None:
    vm = booted()
    refusal = make_error(
        Reason.PAGE_IN_USE,
        "mapped by pid 7",
        lineage=Lineage.RFC_V1,
        error_offset=0,
    )
    world = World(refuse={Convert: refusal})
    before = vm.statistics()
    with pytest.raises(Contended) as refused:
        world.run(set_memory_attributes(vm, 0, SIZE_2M, attributes=PRIVATE))
    assert refused.value.errno == Errno.EINVAL
    assert vm.statistics() == before
    assert not vm.attributes.is_private(0)
    assert vm.slots_lock.idle
    assert vm.invalidation.in_progress == 0
    assert convert(vm, 0, SIZE_2M).asked(Convert) != []


def test_validate_only_asks_and_changes_nothing() -> None:
    vm, world = booted(), World()
    before = vm.statistics()
    op = set_memory_attributes(vm, 0, PAGE_SIZE, attributes=PRIVATE, validate_only=True)
    assert world.run(op) is False
    assert [effect.validate_only for effect in world.asked(Convert)] == [True]
    assert (vm.statistics(), world.notices) == (before, [])


def test_two_conversions_of_one_vm_come_one_after_the_other() -> None:
    vm = booted()
    first = Hand(set_memory_attributes(vm, 0, SIZE_2M, attributes=PRIVATE))
    second = Hand(set_memory_attributes(vm, 0, SIZE_2M, attributes=PRIVATE))
    assert not second.try_lock()
    first.reply()
    assert first.result() is True
    assert second.try_lock()
    # It looks again under the lock: there is nothing left to do.
    assert second.result() is False


def policy_answers(vm: Vm, reached: object, world: World | None = None) -> object:
    op = answer(vm, Policy.CONVERT, reached)  # type: ignore[arg-type]
    return (world or World()).run(op)


def test_policy_none_answers_nothing() -> None:
    reached = Hypercall(12, (0, 1, 16))
    assert World().run(answer(booted(), Policy.NONE, reached)) == reached


def test_policy_converts_on_map_gpa_range() -> None:
    vm = booted()
    assert policy_answers(vm, Hypercall(12, (0, 2, 16))) == 0
    assert vm.attributes.is_private(1)
    assert policy_answers(vm, Hypercall(12, (0, 1, 0))) == 0
    assert not vm.attributes.is_private(0)


@pytest.mark.parametrize(
    "reached",
    [
        Hypercall(12, (1, 1, 16)),
        Hypercall(12, (0, 0, 16)),
        Hypercall(12, (0, 1 << 63, 16)),
        Hypercall(12, (0, 1)),
        Hypercall(13, (0, 1, 16)),
        Io(1, 2),
        # No mismatch: the page could not be had.
        MemoryFault(0, 0, errno=Errno.EFAULT),
        MemoryFault(8, 0, errno=Errno.ENOMEM),
    ],
)
def test_policy_hands_out_the_rest(reached: object) -> None:
    vm = booted()
    before = vm.statistics()
    assert policy_answers(vm, reached) == reached
    assert vm.statistics() == before


def test_policy_converts_a_mismatched_page() -> None:
    vm = booted()
    assert policy_answers(vm, MemoryFault(8, PAGE_SIZE)) == 0
    assert [vm.attributes.is_private(gfn) for gfn in range(3)] == [False, True, False]


def test_policy_says_why_it_could_not_convert() -> None:
    world = World(refuse={Convert: make_error(Reason.PAGE_IN_USE, "pinned")})
    reached = policy_answers(booted(), MemoryFault(8, 0), world)
    assert reached == MemoryFault(8, 0, reason="PAGE_IN_USE")
