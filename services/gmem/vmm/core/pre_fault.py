"""KVM_PRE_FAULT_MEMORY: stage 2 is filled as read faults of a vCPU would fill it.

It stops at the first page that cannot be had, and is successful all the same where it
mapped one before (kvm_vcpu_pre_fault_memory()): whoever wants to know why calls again
with what is left. A memslot that is being deleted, or another change of the frames that
does not end, is EAGAIN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from gmem.effects import Op, perform
from gmem.uapi.errors import (
    OPERATION_ERRORS,
    BadRequest,
    Contended,
    InUse,
    KernelError,
    NoSuchObject,
    Reason,
    make_error,
)
from gmem.uapi.pages import PAGE_SHIFT, PgRange
from gmem.vmm.core.attributes import require_gpa_range
from gmem.vmm.core.effects import Pause
from gmem.vmm.core.exits import Access, Mapped, MemoryFault, NoSlot, Retry
from gmem.vmm.core.fault import Fault, fault
from gmem.vmm.core.vm import Vm

RETRIES_MAX: Final = 8
"""Looks at a page that an invalidation covers, with a pause that doubles: 255 ms."""


@dataclass(frozen=True, slots=True)
class Remainder:
    """struct kvm_pre_fault_memory as the ioctl leaves it: what is not mapped yet."""

    gpa: int
    size: int


def pre_fault_memory(
    vm: Vm, vcpu: int, gpa: int, size: int, flags: int = 0
) -> Op[Remainder]:
    """Map `size` bytes of guest memory at `gpa`; return what is left of them.

    Raises VCPU_UNKNOWN, VCPU_RUNNING; BadRequest (FLAG_UNKNOWN, RANGE_EMPTY,
    RANGE_WRAPS, RANGE_UNALIGNED); and for the first page alone NoSuchObject
    (GPA_OUTSIDE_MEMSLOTS), Contended (MEMSLOT_CHANGING), or what its fault meets.
    """
    if vm.vcpu(vcpu).running:
        raise InUse(
            Reason.VCPU_RUNNING,
            f"vCPU {vcpu} of {vm.name} runs: end its Run stream, or use another",
            vcpu=vcpu,
        )
    if flags:
        raise BadRequest(Reason.FLAG_UNKNOWN, f"flags {flags:#x} must be 0: send 0")
    left = require_gpa_range(gpa, size)
    try:
        while left:
            mapped = yield from _map(vm, left)
            left = PgRange(min(left.stop, mapped.gfns.stop), left.stop)
    except OPERATION_ERRORS:
        if left.offset == gpa:
            raise
    return Remainder(left.offset, left.size)


def _map(vm: Vm, left: PgRange) -> Op[Mapped]:
    """Map the first page of `left`, and those that its entry reaches."""
    gpa = left.start << PAGE_SHIFT
    request = Fault(left.start, len(left), Access.BY_ATTRIBUTE, write=False)
    for attempt in range(RETRIES_MAX):
        outcome = yield from fault(vm, request)
        match outcome:
            case Mapped():
                return outcome
            case Retry():
                yield from perform(Pause(1 << attempt))
            case NoSlot():
                raise NoSuchObject(
                    Reason.GPA_OUTSIDE_MEMSLOTS,
                    f"no memslot has gpa {gpa:#x}: add one",
                    gpa=gpa,
                )
            case _:
                raise _failure(outcome)
    raise Contended(
        Reason.MEMSLOT_CHANGING,
        f"gpa {gpa:#x} is being changed, or its memslot deleted: call again",
        gpa=gpa,
    )


def _failure(met: MemoryFault) -> KernelError:
    if met.reason:
        reason = Reason(met.reason)
        return make_error(reason, f"gpa {met.gpa:#x} cannot be mapped", gpa=met.gpa)
    return InUse(
        Reason.BINDING_MISSING,
        f"gpa {met.gpa:#x} is private and has no guest_memfd: bind one",
        gpa=met.gpa,
    )
