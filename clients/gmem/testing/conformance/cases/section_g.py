"""G. set_memory_region_test: what cannot be bound; the same in every lineage."""

from __future__ import annotations

from functools import partial
from typing import Final

from gmem.testing.conformance.kvm import LINEAGES, Descriptor, GuestMemfd, Vm
from gmem.testing.conformance.outcomes import OK
from gmem.testing.conformance.registry import case
from gmem.testing.conformance.scene import GPA, Scene
from gmem.uapi.flags import KVM_MEM_GUEST_MEMFD, KVM_MEM_LOG_DIRTY_PAGES
from gmem.uapi.pages import PAGE_SIZE, SIZE_2M

CALL: Final = "SET_USER_MEMORY_REGION2"
KVM_CAP_NR_MEMSLOTS: Final = 10
NR_MEMSLOTS: Final = 32764
"""What x86 answers to it."""


def bind(
    vm: Vm,
    file: Descriptor,
    *,
    slot: int = 0,
    flags: int = KVM_MEM_GUEST_MEMFD,
    size: int = PAGE_SIZE,
    offset: int = 0,
    gpa: int = GPA,
) -> None:
    """Bind a file as the test does."""
    vm.set_user_memory_region2(
        slot=slot,
        flags=flags,
        guest_phys_addr=gpa,
        memory_size=size,
        guest_memfd=file,
        guest_memfd_offset=offset,
    )


def _file(scene: Scene, size: int = SIZE_2M) -> tuple[Vm, GuestMemfd]:
    vm = scene.vm()
    return vm, scene.created(vm, size, scene.dialect.shared)


@case("C062", lineages=LINEAGES)
def dirty_log_of_a_guest_memfd(scene: Scene) -> None:
    """LOG_DIRTY_PAGES with GUEST_MEMFD: EINVAL."""
    vm, file = _file(scene)
    flags = KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_GUEST_MEMFD
    scene.expect_call(
        CALL, "LOG_DIRTY_PAGES", "EINVAL", partial(bind, vm, file, flags=flags)
    )


@case("C063", lineages=LINEAGES, variants=("kvm", "vm", "memfd", "other-vm"))
def what_is_no_guest_memfd_of_the_vm(scene: Scene) -> None:
    """/dev/kvm, a VM, a memfd, another VM's file as guest_memfd: EINVAL each."""
    vm = scene.vm()
    wrong: Descriptor
    match scene.variant:
        case "kvm":
            wrong = scene.backend
        case "vm":
            wrong = vm
        case "memfd":
            wrong = scene.memfd(SIZE_2M)
        case _:
            _, wrong = _file(scene)
    scene.expect_call(CALL, scene.variant, "EINVAL", partial(bind, vm, wrong))


@case("C064", lineages=LINEAGES)
def unaligned_offsets(scene: Scene) -> None:
    """Offsets of 1 to 4095 in the file: EINVAL each."""
    vm, file = _file(scene)
    for offset in range(1, PAGE_SIZE):
        do = partial(bind, vm, file, offset=offset)
        scene.expect_call(CALL, f"offset {offset}", "EINVAL", do)


@case("C065", lineages=LINEAGES)
def a_right_bind(scene: Scene) -> None:
    """A right call: 0; the whole file too."""
    vm, file = _file(scene)
    scene.expect_call(CALL, "right", OK, partial(bind, vm, file))
    rest = partial(
        bind,
        vm,
        file,
        slot=1,
        gpa=GPA + PAGE_SIZE,
        size=SIZE_2M - PAGE_SIZE,
        offset=PAGE_SIZE,
    )
    scene.expect_call(CALL, "right, the rest of the file", OK, rest)


@case("C067", lineages=LINEAGES)
def one_slot_too_many(scene: Scene) -> None:
    """The slot behind the last one: EINVAL."""
    vm, file = _file(scene)
    slots = vm.check_extension(KVM_CAP_NR_MEMSLOTS) or NR_MEMSLOTS
    last = partial(bind, vm, file, slot=slots - 1)
    scene.expect_call(CALL, "last slot", OK, last)
    more = partial(bind, vm, file, slot=slots, gpa=GPA + PAGE_SIZE, offset=PAGE_SIZE)
    scene.expect_call(CALL, "behind the last slot", "EINVAL", more)
