"""I. guest_memfd_test of the second series: flags, sizes, and the userspace side."""

from __future__ import annotations

from functools import partial
from typing import Final

from gmem.testing.conformance.kvm import RFC_V2, Feature, HasFileno, Userspace
from gmem.testing.conformance.outcomes import OK
from gmem.testing.conformance.registry import ALL_SIZES, case
from gmem.testing.conformance.scene import GPA, Scene
from gmem.testing.conformance.vm_types import VM_TYPES
from gmem.uapi.flags import (
    GUEST_MEMFD_FLAG_HUGETLB,
    GUEST_MEMFD_FLAG_INIT_PRIVATE,
    GUEST_MEMFD_FLAG_SUPPORT_SHARED,
    KVM_MEM_GUEST_MEMFD,
)
from gmem.uapi.pages import SIZE_2M

CALL: Final = "KVM_CREATE_GUEST_MEMFD"
BITS: Final = 64
ALONE: Final = (GUEST_MEMFD_FLAG_SUPPORT_SHARED, GUEST_MEMFD_FLAG_HUGETLB)


@case("C080", lineages=(RFC_V2,), variants=tuple(VM_TYPES))
def flags_of_the_second_series(scene: Scene) -> None:
    """SUPPORT_SHARED and HUGETLB alone, and INIT_PRIVATE beside; others EINVAL."""
    vm = scene.vm(VM_TYPES[scene.variant])
    for bit in range(BITS):
        flags = 1 << bit
        want = OK if flags in ALONE else "EINVAL"
        create = partial(scene.created, vm, SIZE_2M, flags)
        scene.expect_call(CALL, f"flag bit {bit}", want, create)
    both = GUEST_MEMFD_FLAG_SUPPORT_SHARED | GUEST_MEMFD_FLAG_INIT_PRIVATE
    create = partial(scene.created, vm, SIZE_2M, both)
    scene.expect_call(CALL, "SUPPORT_SHARED and INIT_PRIVATE", OK, create)


@case("C083", lineages=(RFC_V2,), page_sizes=ALL_SIZES)
def neither_flag(scene: Scene) -> None:
    """A file without SUPPORT_SHARED: mmap fails with ENODEV."""
    file = scene.memory(scene.vm(), 1, 0)
    do = partial(scene.toucher(file).map, file.size)
    scene.expect_call("mmap", "no SUPPORT_SHARED", "ENODEV", do)


@case("C084", lineages=(RFC_V2,), page_sizes=ALL_SIZES, variants=tuple(VM_TYPES))
def sizes_that_are_no_multiple(scene: Scene) -> None:
    """Sizes 1 and 1 + half a page: EINVAL."""
    vm = scene.vm(VM_TYPES[scene.variant])
    flags = scene.flags()
    for size in (1, 1 + scene.page_size // 2):
        create = partial(scene.created, vm, size, flags)
        scene.expect_call(CALL, "no multiple", "EINVAL", create)


@case(
    "C085",
    lineages=(RFC_V2,),
    page_sizes=ALL_SIZES,
    needs=(Feature.USERSPACE_VMA,),
)
def userspace_maps_the_file(scene: Scene) -> None:
    """userspace_addr has to be 0, or to map this file at the same offset."""
    vm, page = scene.vm(), scene.page_size
    file, other = scene.memory(vm, 2), scene.memory(vm, 2)
    memory: HasFileno = scene.memfd(2 * page)
    sides = {
        "another offset": (Userspace(file, 0), "EINVAL"),
        "another guest_memfd": (Userspace(other, page), "EINVAL"),
        "anonymous memory": (Userspace(memory, page), "EINVAL"),
        "the same range": (Userspace(file, page), OK),
        "none": (None, OK),
    }
    for slot, (condition, (side, want)) in enumerate(sides.items()):
        if condition == "none":
            vm.set_user_memory_region2(
                slot=slot - 1, guest_phys_addr=GPA, memory_size=0
            )
        bind = partial(
            vm.set_user_memory_region2,
            slot=slot,
            flags=KVM_MEM_GUEST_MEMFD,
            guest_phys_addr=GPA,
            memory_size=page,
            userspace=side,
            guest_memfd=file,
            guest_memfd_offset=page,
        )
        scene.expect_call("SET_USER_MEMORY_REGION2", condition, want, bind)
