"""What the VMM does about an exit by itself: nothing, or what the guest asks for.

CONVERT plays the small VMM of the series' own tests: it answers MAP_GPA_RANGE and the
memory faults of a wrong kind of access by a conversion (KVM_SET_MEMORY_ATTRIBUTES, or
the file's own ioctl where that is how the lineage does it). What is refused goes to the
caller, as does every other exit.
"""

from __future__ import annotations

from dataclasses import replace
from enum import IntEnum

from gmem.effects import Op
from gmem.uapi.errors import Errno, KernelError
from gmem.uapi.flags import (
    KVM_HC_MAP_GPA_RANGE,
    KVM_MAP_GPA_RANGE_ENCRYPTED,
)
from gmem.uapi.pages import PAGE_SHIFT
from gmem.vmm.core.exits import Exit, Hypercall, MemoryFault
from gmem.vmm.core.set_attributes import convert_memory
from gmem.vmm.core.vm import Vm


class Policy(IntEnum):
    """Who answers exits; numbers as on the wire."""

    NONE = 1
    CONVERT = 2


def answer(vm: Vm, policy: Policy, reached: Exit) -> Op[int | Exit]:
    """Return what the guest is resumed with, or the exit that the caller must see."""
    if policy is Policy.CONVERT:
        match reached:
            case Hypercall(nr=nr, args=args) if nr == KVM_HC_MAP_GPA_RANGE:
                return (yield from _map_gpa_range(vm, reached, args))
            case MemoryFault() if _is_mismatch(vm, reached):
                return (yield from _convert_page(vm, reached))
    return reached


def _is_mismatch(vm: Vm, reached: MemoryFault) -> bool:
    """Tell a wrong kind of access from a page that could not be had."""
    gfn = reached.gpa >> PAGE_SHIFT
    slot = vm.memslots.find(gfn)
    if slot is not None and vm.file_says(slot):
        # The file knows; what it refused for another reason says so.
        return reached.errno == Errno.EFAULT and not reached.reason
    private = vm.attributes.is_private(gfn)
    return reached.errno == Errno.EFAULT and reached.private is not private


def _map_gpa_range(vm: Vm, reached: Hypercall, args: tuple[int, ...]) -> Op[int | Exit]:
    if len(args) < 3:
        return reached
    gpa, npages, attributes = args[:3]
    private = bool(attributes & KVM_MAP_GPA_RANGE_ENCRYPTED)
    try:
        yield from _convert(vm, gpa, npages << PAGE_SHIFT, private=private)
    except KernelError:
        return reached
    return 0


def _convert_page(vm: Vm, reached: MemoryFault) -> Op[int | Exit]:
    try:
        yield from _convert(vm, reached.gpa, reached.size, private=reached.private)
    except KernelError as error:
        return replace(reached, reason=error.reason)
    return 0


def _convert(vm: Vm, gpa: int, size: int, *, private: bool) -> Op[None]:
    yield from convert_memory(vm, gpa, size, private=private)
