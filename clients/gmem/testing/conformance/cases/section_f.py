"""F. private_mem_kvm_exits_test: what a guest leaves with when its memory goes."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from gmem.testing.conformance.guest import Exit, Halted, Load, MemoryFault, MmioExit
from gmem.testing.conformance.kvm import IN_PLACE, RFC_V1, Feature, Userspace
from gmem.testing.conformance.outcomes import OK
from gmem.testing.conformance.registry import case
from gmem.testing.conformance.scene import GPA, Machine, Scene
from gmem.uapi.errors import Errno
from gmem.uapi.flags import KVM_MEMORY_ATTRIBUTE_PRIVATE, KVM_MEMORY_EXIT_FLAG_PRIVATE
from gmem.uapi.pages import PAGE_SIZE

GUESTS: Final = (Feature.PRIVATE_MEMORY, Feature.GUESTS)
FAULT: Final = MemoryFault(Errno.EFAULT, KVM_MEMORY_EXIT_FLAG_PRIVATE, GPA, PAGE_SIZE)
LOADS: Final = 200
WORD: Final = 8


def _read_until_deleted(machine: Machine) -> Exit:
    """Delete slot 0 while a vCPU reads from it in a loop; return its exit."""
    reading = threading.Event()

    def read() -> Exit:
        program = [Load(GPA, WORD)] * LOADS
        while True:
            left = machine.first_exit(*program)
            reading.set()
            if not isinstance(left, Halted):
                return left

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(read)
        reading.wait()
        machine.vm.set_user_memory_region2(slot=0, guest_phys_addr=GPA, memory_size=0)
        return running.result()


def _fault(left: Exit) -> Exit:
    """Leave out what was read before the exit."""
    match left:
        case MemoryFault():
            return MemoryFault(left.errno, left.flags, left.gpa, left.size)
        case MmioExit():
            return MmioExit(left.gpa, left.length, left.is_write)
        case _:
            return left


@case("C059", lineages=(RFC_V1,), needs=GUESTS)
def slot_deleted_under_a_private_reader(scene: Scene) -> None:
    """A private page is read in a loop and its slot deleted: MEMORY_FAULT, EFAULT."""
    machine = scene.machine()
    machine.boot()
    scene.expect(
        "SET_MEMORY_ATTRIBUTES",
        "before the run",
        OK,
        machine.convert(0, PAGE_SIZE, private=True),
    )
    left = _read_until_deleted(machine)
    scene.expect("KVM_RUN", "slot deleted, private", FAULT, _fault(left))


@case("C060", lineages=(RFC_V1,), needs=GUESTS)
def private_without_a_file(scene: Scene) -> None:
    """A private page of a slot without a guest_memfd: MEMORY_FAULT, EFAULT."""
    vm = scene.vm()
    vm.set_user_memory_region2(
        slot=0,
        guest_phys_addr=GPA,
        memory_size=PAGE_SIZE,
        userspace=Userspace(scene.memfd(PAGE_SIZE)),
    )
    vm.create_vcpu()
    vm.set_memory_attributes(
        address=GPA, size=PAGE_SIZE, attributes=KVM_MEMORY_ATTRIBUTE_PRIVATE
    )
    with vm.run([Load(GPA, WORD)]) as run:
        left = next(iter(run.exits()))
    scene.expect("KVM_RUN", "private, no guest_memfd", FAULT, _fault(left))


@case("C061", lineages=(IN_PLACE,), needs=GUESTS)
def slot_deleted_where_files_have_attributes(scene: Scene) -> None:
    """A page is read in a loop and its slot deleted: an MMIO read of 8 bytes."""
    machine = scene.machine(flags=scene.dialect.private)
    machine.boot()
    left = _read_until_deleted(machine)
    want = MmioExit(GPA, WORD, is_write=False)
    scene.expect("KVM_RUN", "slot deleted", want, _fault(left))
