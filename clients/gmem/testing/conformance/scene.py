"""What the body of a case is given: a kernel, and shorthands that clean up after it."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

from gmem.testing.conformance import deviations
from gmem.testing.conformance.deviations import Deviation
from gmem.testing.conformance.dialect import (
    DIALECTS,
    Asked,
    ConvertRefused,
    Dialect,
    create_flags,
)
from gmem.testing.conformance.guest import (
    Exit,
    Halted,
    HypercallExit,
    Instruction,
    Result,
)
from gmem.testing.conformance.kvm import (
    Backend,
    GuestMemfd,
    HasFileno,
    Userspace,
    Vm,
)
from gmem.testing.conformance.outcomes import errno_name, outcome_of, worded
from gmem.testing.conformance.registry import Planned
from gmem.testing.conformance.toucher import Toucher, Window
from gmem.uapi.flags import (
    KVM_HC_MAP_GPA_RANGE,
    KVM_MAP_GPA_RANGE_ENCRYPTED,
    KVM_MEM_GUEST_MEMFD,
    VmType,
)
from gmem.uapi.pages import PAGE_SHIFT

C = TypeVar("C", bound="Closable")

GPA: Final = 4 << 30
"""Where a guest sees its memory."""


class Closable(Protocol):
    """What ends with its scene."""

    def close(self) -> None:
        """End it."""


class CaseFailedError(Exception):
    """The kernel answered otherwise than the list says."""


class CaseSkipped(Exception):  # noqa: N818 - says what happened
    """Raised by a case that finds out only while it runs that it cannot be played."""


class File:
    """A descriptor of ours that is no guest_memfd."""

    def __init__(self, fd: int) -> None:
        """Own `fd`."""
        self._fd = fd

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._fd

    def close(self) -> None:
        """Close it."""
        os.close(self._fd)


class Scene:
    """One run of a case; everything that it makes ends with it."""

    def __init__(self, backend: Backend, planned: Planned) -> None:
        """Nothing is made before it is asked for."""
        self.backend = backend
        self.id = planned.id
        self.lineage = planned.lineage
        self.page_size = planned.page_size
        self.variant = planned.variant
        self.deviations: list[Deviation] = []
        self._stack = ExitStack()

    @property
    def dialect(self) -> Dialect:
        """How the lineage is spoken to."""
        return DIALECTS[self.lineage]

    def close(self) -> None:
        """End everything, the last first."""
        self._stack.close()

    def flags(self, flags: int) -> int:
        """Return creation flags with the bits of the page size."""
        return create_flags(self.lineage, flags, self.page_size)

    # Things.

    def vm(self, vm_type: VmType | None = None) -> Vm:
        """Make a VM; None is the type that the lineage's own tests use."""
        kind = self.dialect.vm_type if vm_type is None else vm_type
        return self._kept(self.backend.create_vm(lineage=self.lineage, vm_type=kind))

    def memory(self, vm: Vm, pages: int = 1, flags: int | None = None) -> GuestMemfd:
        """Make a file of some pages; `flags` None: one that the host may touch."""
        flags = self.flags(self.dialect.shared if flags is None else flags)
        return self.created(vm, pages * self.page_size, flags)

    def created(self, vm: Vm, size: int, flags: int) -> GuestMemfd:
        """KVM_CREATE_GUEST_MEMFD with exactly these arguments."""
        return self._kept(vm.create_guest_memfd(size, flags))

    def machine(
        self,
        pages: int = 1,
        *,
        flags: int | None = None,
        vm_type: VmType | None = None,
        userspace: Callable[[GuestMemfd], Userspace] | None = None,
    ) -> Machine:
        """Make a VM whose memslot 0 at GPA is a file of some pages."""
        vm = self.vm(vm_type)
        file = self.memory(vm, pages, flags)
        vm.set_user_memory_region2(
            slot=0,
            flags=KVM_MEM_GUEST_MEMFD,
            guest_phys_addr=GPA,
            memory_size=file.size,
            userspace=userspace(file) if userspace else None,
            guest_memfd=file,
        )
        return Machine(self, vm, file)

    def toucher(self, *files: HasFileno) -> Toucher:
        """Start a process that has the descriptors of `files`."""
        return self._kept(Toucher(*files))

    def window(self, file: GuestMemfd, length: int | None = None) -> Window:
        """Start a process that has `length` bytes of a file mapped, None: all."""
        return self.toucher(file).map(length or file.size)

    def memfd(self, size: int) -> File:
        """Make ordinary shared memory."""
        file = File(os.memfd_create("conformance", os.MFD_CLOEXEC))
        os.ftruncate(file.fileno(), size)
        return self._kept(file)

    # Claims.

    def expect(self, call: str, condition: str, want: object, got: object) -> None:
        """Compare two results; a difference is a deviation on purpose, or a fail.

        `want` may be a tuple of results that are all right.
        """
        wanted = [worded(one) for one in (want if isinstance(want, tuple) else (want,))]
        found = worded(got)
        if found in wanted:
            return
        row = deviations.find(
            self.backend.name, self.lineage, call, condition, (wanted[0], found)
        )
        if row is None:
            text = " or ".join(wanted)
            raise CaseFailedError(f"{call}, {condition}: {found} instead of {text}")
        self.deviations.append(row)

    def expect_call(
        self,
        call: str,
        condition: str,
        want: str | tuple[str, ...],
        do: Callable[[], object],
    ) -> None:
        """Make a call and compare its errno ("0" where it succeeds)."""
        self.expect(call, condition, want, outcome_of(do))

    def _kept(self, thing: C) -> C:
        self._stack.callback(thing.close)
        return thing


@dataclass(frozen=True, slots=True)
class Machine:
    """A VM whose memslot 0 at GPA is `file`."""

    scene: Scene
    vm: Vm
    file: GuestMemfd

    def convert(self, offset: int, size: int, *, private: bool) -> str:
        """Convert as the lineage does; return "0", or errno with its error_offset."""
        convert = self.scene.dialect.convert
        assert convert is not None, f"{self.scene.lineage} converts nothing"
        try:
            convert(self.vm, self.file, Asked(GPA, offset, size, private))
        except ConvertRefused as refused:
            return f"{errno_name(refused.errno)} error_offset={refused.error_offset:#x}"
        except OSError as refused:
            return errno_name(refused.errno)
        return "0"

    def boot(self, vcpus: int = 1) -> None:
        """KVM_CREATE_VCPU for each of some vCPUs."""
        for vcpu in range(vcpus):
            self.vm.create_vcpu(vcpu)

    def guest(self, *program: Instruction, vcpu: int = 0) -> list[Result]:
        """Run to HLT; MAP_GPA_RANGE is answered by a conversion.

        Raises CaseFailedError for every other exit.
        """
        results: list[Result] = []
        with self.vm.run(program, vcpu=vcpu) as run:
            for left in run.exits():
                results += left.results
                if isinstance(left, Halted):
                    return results
                if not isinstance(left, HypercallExit):
                    break
                run.resume(self._hypercall(left))
        raise CaseFailedError(f"KVM_RUN of {program} left with {worded(left)}")

    def first_exit(self, *program: Instruction, vcpu: int = 0) -> Exit:
        """Run up to the first exit, and leave it at that."""
        with self.vm.run(program, vcpu=vcpu) as run:
            return next(iter(run.exits()))

    def _hypercall(self, left: HypercallExit) -> int:
        """Do what a VMM does; return what the guest gets."""
        if left.nr != KVM_HC_MAP_GPA_RANGE:
            raise CaseFailedError(f"hypercall {left.nr} is none of MAP_GPA_RANGE")
        gpa, npages, attributes = left.args[:3]
        private = bool(attributes & KVM_MAP_GPA_RANGE_ENCRYPTED)
        answer = self.convert(gpa - GPA, npages << PAGE_SHIFT, private=private)
        if answer != "0":
            raise CaseFailedError(f"MAP_GPA_RANGE of {gpa:#x}: {answer}")
        return 0
