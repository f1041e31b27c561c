"""The VMM: a loop around KVM_RUN that converts memory when the guest asks for it."""

from __future__ import annotations

import contextlib
import fcntl
import struct
from collections.abc import Sequence

from gmem.testing.conformance.guest import (
    Exit,
    Halted,
    HypercallExit,
    Instruction,
    Result,
)
from gmem.testing.conformance.kvm import GuestMemfd, Vm
from gmem.uapi.flags import (
    KVM_GMEM_CONVERT_FORMAT,
    KVM_GMEM_CONVERT_PRIVATE,
    KVM_GMEM_CONVERT_SHARED,
    KVM_HC_MAP_GPA_RANGE,
    KVM_MAP_GPA_RANGE_ENCRYPTED,
)

PAGE_SHIFT = 12
ENOSYS = 38


class TinyVmm:
    """A VM with one vCPU, whose memory at `gpa` is a guest_memfd."""

    def __init__(self, vm: Vm, memory: GuestMemfd, gpa: int) -> None:
        """Make the vCPU."""
        self._vm = vm
        self._memory = memory
        self._gpa = gpa
        vm.create_vcpu(0)

    def run(self, *program: Instruction) -> list[Result]:
        """Run a guest program until it halts; return what its instructions left."""
        results: list[Result] = []
        with self._vm.run(program) as run:
            for left in run.exits():
                results += left.results
                if isinstance(left, Halted):
                    break
                run.resume(self._handle(left))
        return results

    def _handle(self, left: Exit) -> int:
        match left:
            case HypercallExit(nr=nr, args=args) if nr == KVM_HC_MAP_GPA_RANGE:
                return self._map_gpa_range(args)
            case HypercallExit():
                return -ENOSYS
            case _:
                raise RuntimeError(f"the guest left with {left}")

    def _map_gpa_range(self, args: Sequence[int]) -> int:
        gpa, npages, attributes = args[:3]
        private = bool(attributes & KVM_MAP_GPA_RANGE_ENCRYPTED)
        # The mistake: somebody still uses a page, the kernel refuses, and the guest
        # is told that its memory is private now.
        with contextlib.suppress(OSError):
            self._convert(gpa - self._gpa, npages << PAGE_SHIFT, private=private)
        return 0

    def _convert(self, offset: int, size: int, *, private: bool) -> None:
        request = KVM_GMEM_CONVERT_PRIVATE if private else KVM_GMEM_CONVERT_SHARED
        argument = bytearray(struct.pack(KVM_GMEM_CONVERT_FORMAT, offset, size, 0))
        fcntl.ioctl(self._memory.fileno(), request, argument)
