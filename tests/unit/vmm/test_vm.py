"""VMs and vCPUs: made, found, run, ended; and launch-time content."""

from __future__ import annotations

import pytest

from gmem.uapi.errors import Errno, KernelError, Reason, make_error
from gmem.uapi.flags import MemoryAttribute, VmType
from gmem.uapi.lineage import Lineage
from gmem.uapi.pages import PAGE_SIZE, SIZE_2M, PgRange
from gmem.vmm.core.effects import EndGuest, FileRange, Populate, StartGuest, UnbindSlot
from gmem.vmm.core.memslots import Region, Userspace
from gmem.vmm.core.populate import populate_memory
from gmem.vmm.core.registry import VMS_MAX, VmRegistry
from gmem.vmm.core.set_region import set_user_memory_region2
from gmem.vmm.core.vcpu import TRANSITIONS, Vcpu, VcpuEvent, VcpuState
from gmem.vmm.core.vm import VCPUS_MAX, Vm
from tests.support.vmm_world import GUEST_PID, Hand, World, new_vm

NAME = "hosts/h/guestMemfds/1"


def made(registry: VmRegistry, vm_id: str = "v") -> Vm:
    return World().run(registry.create(vm_id, VmType.SW_PROTECTED, Lineage.RFC_V1))


def reason_of(op: object) -> Reason:
    with pytest.raises(KernelError) as refused:
        World().run(op)  # type: ignore[arg-type]
    return refused.value.reason


def test_vm_is_seen_when_its_guest_runs() -> None:
    registry = VmRegistry("h")
    hand = Hand(registry.create("v", VmType.DEFAULT, Lineage.RFC_V1))
    assert hand.effect == StartGuest("hosts/h/vms/v")
    assert registry.names() == []
    hand.reply(GUEST_PID)
    vm = hand.result()
    assert (vm.guest_pid, vm.guest_alive) == (GUEST_PID, True)
    assert registry.get("hosts/h/vms/v") is vm
    assert len(registry) == 1


@pytest.mark.parametrize("vm_id", ["", "A", "a b", "a/b", "ä", "x" * 64, "v\n"])
def test_name_must_be_short_and_plain(vm_id: str) -> None:
    op = VmRegistry("h").create(vm_id, VmType.DEFAULT, Lineage.RFC_V1)
    assert reason_of(op) is Reason.ARGUMENT_INVALID


def test_name_is_taken_from_the_start_on() -> None:
    registry = VmRegistry("h")
    hand = Hand(registry.create("v", VmType.DEFAULT, Lineage.RFC_V1))
    again = registry.create("v", VmType.DEFAULT, Lineage.RFC_V1)
    assert reason_of(again) is Reason.VM_EXISTS
    hand.fail(make_error(Reason.GUEST_GONE, "did not start"))
    with pytest.raises(KernelError, match="did not start"):
        hand.result()
    made(registry)
    again = registry.create("v", VmType.DEFAULT, Lineage.RFC_V1)
    assert reason_of(again) is Reason.VM_EXISTS


def test_vms_have_a_limit() -> None:
    registry = VmRegistry("h")
    for number in range(VMS_MAX):
        made(registry, f"v{number}")
    op = registry.create("one-more", VmType.DEFAULT, Lineage.RFC_V1)
    assert reason_of(op) is Reason.LIMIT_REACHED


def test_unknown_vm_is_told() -> None:
    with pytest.raises(KernelError) as refused:
        VmRegistry("h").get("hosts/h/vms/nobody")
    assert (refused.value.reason, refused.value.errno) == (
        Reason.VM_UNKNOWN,
        Errno.ENOENT,
    )


def test_delete_unbinds_then_ends_the_guest() -> None:
    registry, world = VmRegistry("h"), World()
    vm = made(registry)
    region = Region(0, 4, 0, SIZE_2M, None, NAME)
    world.run(set_user_memory_region2(vm, region))
    world.log.clear()
    world.run(registry.delete(vm.name))
    kinds = [type(effect) for effect in world.log]
    assert kinds.index(UnbindSlot) < kinds.index(EndGuest)
    assert (registry.names(), vm.guest_alive) == ([], False)


def test_delete_waits_for_no_running_vcpu() -> None:
    registry = VmRegistry("h")
    vm = made(registry)
    vcpu = vm.create_vcpu(0)
    vcpu.start()
    before = vm.statistics()
    assert reason_of(registry.delete(vm.name)) is Reason.VCPU_RUNNING
    assert vm.statistics() == before
    vcpu.end()
    World().run(registry.delete(vm.name))


def test_second_delete_finds_nothing() -> None:
    registry = VmRegistry("h")
    vm = made(registry)
    first, second = (Hand(registry.delete(vm.name)) for _ in range(2))
    assert not second.try_lock()
    first.reply()
    assert first.ended
    second.try_lock()
    with pytest.raises(KernelError) as refused:
        second.result()
    assert refused.value.reason is Reason.VM_UNKNOWN


def test_vcpu_ids_are_below_a_limit_and_used_once() -> None:
    vm = new_vm()
    vm.create_vcpu(VCPUS_MAX - 1)
    for vcpu, reason in (
        (VCPUS_MAX - 1, Reason.VCPU_EXISTS),
        (VCPUS_MAX, Reason.LIMIT_REACHED),
    ):
        with pytest.raises(KernelError) as refused:
            vm.create_vcpu(vcpu)
        assert refused.value.reason is reason
    with pytest.raises(KernelError) as refused:
        vm.vcpu(0)
    assert refused.value.reason is Reason.VCPU_UNKNOWN
    assert vm.vcpu(VCPUS_MAX - 1).vcpu == VCPUS_MAX - 1


@pytest.mark.parametrize("state", VcpuState)
@pytest.mark.parametrize("event", VcpuEvent)
def test_what_the_table_has_not_is_refused(state: VcpuState, event: VcpuEvent) -> None:
    vcpu = Vcpu(0, state)
    if (state, event) in TRANSITIONS:
        vcpu.step(event)
        assert vcpu.state is TRANSITIONS[state, event]
        return
    with pytest.raises(KernelError) as refused:
        vcpu.step(event)
    wanted = Reason.VCPU_RUNNING if event is VcpuEvent.START else Reason.STATE_WRONG
    assert refused.value.reason is wanted
    assert vcpu.state is state


def test_run_numbers_are_never_used_twice() -> None:
    vcpu = Vcpu(0)
    assert vcpu.start() == 1
    vcpu.end()
    vcpu.end()
    assert vcpu.start() == 2


def test_death_of_the_guest_ends_its_vcpus() -> None:
    vm = new_vm()
    vm.create_vcpu(0).start()
    vm.guest_died()
    vm.require_idle()
    with pytest.raises(KernelError) as refused:
        vm.require_guest()
    assert (refused.value.reason, refused.value.errno) == (
        Reason.GUEST_GONE,
        Errno.EIO,
    )


def populated() -> Vm:
    """Two memslots side by side, of one file in two pieces; all private."""
    vm = new_vm()
    side = Userspace("descriptors/1", 0)
    for region in (
        Region(0, 4, 0, SIZE_2M, side, NAME, SIZE_2M),
        Region(1, 4, SIZE_2M, SIZE_2M, side, NAME),
        Region(2, 0, 2 * SIZE_2M, SIZE_2M, side),
    ):
        World().run(set_user_memory_region2(vm, region))
    vm.attributes.store(PgRange(0, 1 << 20), MemoryAttribute.PRIVATE)
    return vm


def test_populate_follows_the_memslots() -> None:
    world = World()
    world.run(
        populate_memory(
            populated(),
            PAGE_SIZE,
            SIZE_2M,
            descriptor="descriptors/9",
            source_offset=100,
        )
    )
    first = SIZE_2M - PAGE_SIZE
    assert world.log == [
        Populate(FileRange(NAME, SIZE_2M + PAGE_SIZE, first), "descriptors/9", 100),
        Populate(FileRange(NAME, 0, PAGE_SIZE), "descriptors/9", 100 + first),
    ]


@pytest.mark.parametrize(
    ("address", "size", "source_offset", "reason"),
    [
        (0, 0, 0, Reason.RANGE_EMPTY),
        (1, PAGE_SIZE, 0, Reason.RANGE_UNALIGNED),
        ((1 << 64) - PAGE_SIZE, PAGE_SIZE, 0, Reason.RANGE_WRAPS),
        (0, PAGE_SIZE, (1 << 64) - 1, Reason.RANGE_WRAPS),
        (2 * SIZE_2M, PAGE_SIZE, 0, Reason.BINDING_MISSING),
        (3 * SIZE_2M, PAGE_SIZE, 0, Reason.GPA_OUTSIDE_MEMSLOTS),
        (SIZE_2M, 2 * SIZE_2M, 0, Reason.BINDING_MISSING),
    ],
)
def test_populate_refuses_before_it_writes(
    address: int, size: int, source_offset: int, reason: Reason
) -> None:
    vm, world = populated(), World()
    with pytest.raises(KernelError) as refused:
        world.run(
            populate_memory(
                vm, address, size, descriptor="d", source_offset=source_offset
            )
        )
    assert refused.value.reason is reason
    assert world.log == []
    assert vm.slots_lock.idle


def test_populate_wants_private_pages() -> None:
    vm = populated()
    vm.attributes.store(PgRange(3, 4), MemoryAttribute.SHARED)
    with pytest.raises(KernelError) as refused:
        World().run(populate_memory(vm, 0, SIZE_2M, descriptor="d", source_offset=0))
    assert refused.value.reason is Reason.PAGE_NOT_FAULTABLE
    assert refused.value.numbers == {"gpa": 3 * PAGE_SIZE}
