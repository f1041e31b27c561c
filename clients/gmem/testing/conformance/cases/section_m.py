"""M. pre_fault_memory_test: KVM_PRE_FAULT_MEMORY over a slot of 2M + 4K."""

from __future__ import annotations

from typing import Final

from gmem.testing.conformance.kvm import LINEAGES, RFC_V1, Feature, Userspace
from gmem.testing.conformance.outcomes import OK
from gmem.testing.conformance.registry import case
from gmem.testing.conformance.scene import GPA, Machine, Scene
from gmem.uapi.flags import KVM_MEM_GUEST_MEMFD
from gmem.uapi.pages import PAGE_SIZE, SIZE_2M

CALL: Final = "KVM_PRE_FAULT_MEMORY"
SIZE: Final = SIZE_2M + PAGE_SIZE
KINDS: Final = ("private", "shared")
GUESTS: Final = (Feature.GUESTS, Feature.PRIVATE_MEMORY)


def _booted(scene: Scene) -> Machine:
    """Bind a slot of 2M + 4K, all of it private or all of it shared."""
    vm = scene.vm()
    private = scene.variant == "private"
    starts_private = private and scene.dialect.private is not None
    flags = scene.dialect.private if starts_private else scene.dialect.shared
    file = scene.created(vm, SIZE, flags or 0)
    # In the first series shared memory always comes from the userspace side.
    side = Userspace(scene.memfd(SIZE)) if scene.lineage == RFC_V1 else None
    vm.set_user_memory_region2(
        slot=0,
        flags=KVM_MEM_GUEST_MEMFD,
        guest_phys_addr=GPA,
        memory_size=SIZE,
        userspace=side,
        guest_memfd=file,
    )
    machine = Machine(scene, vm, file)
    machine.boot()
    if private and not starts_private:
        got = machine.convert(0, SIZE, private=True)
        scene.expect("convert", "before the call", OK, got)
    return machine


def _called(machine: Machine, offset: int, size: int) -> tuple[str, str]:
    """Return errno and "OFFSET SIZE" of what is left."""
    error, gpa, left = machine.vm.pre_fault_memory(GPA + offset, size)
    return error, f"{gpa - GPA:#x} {left:#x}"


@case("C109", lineages=LINEAGES, variants=KINDS, needs=GUESTS)
def all_of_it(scene: Scene) -> None:
    """The first 2M: 0, and nothing is left."""
    error, left = _called(_booted(scene), 0, SIZE_2M)
    scene.expect(CALL, "first 2M", OK, error)
    scene.expect(CALL, "first 2M, left", f"{SIZE_2M:#x} 0x0", left)


@case("C110", lineages=LINEAGES, variants=KINDS, needs=GUESTS)
def past_the_slot(scene: Scene) -> None:
    """8K at 2M, of which 4K lie in the slot: 4K are left, and again ENOENT."""
    machine = _booted(scene)
    _, left = _called(machine, SIZE_2M, 2 * PAGE_SIZE)
    scene.expect(CALL, "4K past the slot", f"{SIZE:#x} {PAGE_SIZE:#x}", left)
    error, _ = _called(machine, SIZE, PAGE_SIZE)
    scene.expect(CALL, "the rest again", "ENOENT", error)


@case("C112", lineages=LINEAGES, variants=KINDS, needs=GUESTS)
def size_and_result(scene: Scene) -> None:
    """The size that is left shrinks if, and only if, the call succeeds."""
    machine = _booted(scene)
    for offset, size in ((0, SIZE_2M), (SIZE_2M, 2 * PAGE_SIZE), (SIZE, PAGE_SIZE)):
        error, _, left = machine.vm.pre_fault_memory(GPA + offset, size)
        shrank = "shrank" if left < size else "stayed"
        want = "shrank" if error == OK else "stayed"
        scene.expect(CALL, "size after it", want, shrank)
