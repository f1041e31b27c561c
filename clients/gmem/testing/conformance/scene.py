"""What the body of a case is given: a kernel, and shorthands that clean up after it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias, TypeVar

from gmem.testing.conformance import deviations
from gmem.testing.conformance.deviations import Deviation
from gmem.testing.conformance.dialect import (
    DIALECTS,
    Asked,
    ConvertRefused,
    Dialect,
    create_flags,
    page_order,
    share,
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
from gmem.testing.conformance.outcomes import OK, errno_name, outcome_of, worded
from gmem.testing.conformance.registry import Planned
from gmem.testing.conformance.toucher import Toucher, Window
from gmem.uapi.flags import (
    KVM_HC_MAP_GPA_RANGE,
    KVM_MAP_GPA_RANGE_ENCRYPTED,
    KVM_MEM_GUEST_MEMFD,
    VmType,
)
from gmem.uapi.pages import PAGE_SHIFT

T = TypeVar("T")
C = TypeVar("C", bound="Closable")

BeforeConversion: TypeAlias = Callable[[int, int, bool], None]
"""(offset, size, private): what a VMM does before it converts."""

SETTLE_SECONDS_MAX: Final = 10.0
"""How long counters may take to move: the end of a file is not waited for."""

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

    def flags(self, flags: int | None = None) -> int:
        """Return creation flags with the bits of the page size; None: see `memory`."""
        return create_flags(self.lineage, self.page_size, flags)

    # Things.

    def vm(self, vm_type: VmType | None = None) -> Vm:
        """Make a VM; None is the type that the lineage's own tests use."""
        kind = self.dialect.vm_type if vm_type is None else vm_type
        return self.kept(self.backend.create_vm(lineage=self.lineage, vm_type=kind))

    def memory(self, vm: Vm, pages: int = 1, flags: int | None = None) -> GuestMemfd:
        """Make a file of some pages; `flags` None: one that the host may touch."""
        file = self.created(vm, pages * self.page_size, self.flags(flags))
        if flags is None:
            share(self.lineage, self.page_size, vm, file)
        return file

    def created(
        self, vm: Vm, size: int, flags: int, order: int | None = None
    ) -> GuestMemfd:
        """KVM_CREATE_GUEST_MEMFD with exactly these arguments.

        `order` None is that of the page size, where the lineage has the field.
        """
        if order is None:
            order = page_order(self.lineage, self.page_size)
        return self.kept(vm.create_guest_memfd(size, flags, order))

    def machine(
        self,
        pages: int = 1,
        *,
        flags: int | None = None,
        vm_type: VmType | None = None,
        userspace: Callable[[GuestMemfd], Userspace] | None = None,
        gpa: int = GPA,
        slot: int = 0,
    ) -> Machine:
        """Make a VM whose memslot at `gpa` is a file of some pages."""
        vm = self.vm(vm_type)
        file = self.memory(vm, pages, flags)
        vm.set_user_memory_region2(
            slot=slot,
            flags=KVM_MEM_GUEST_MEMFD,
            guest_phys_addr=gpa,
            memory_size=file.size,
            userspace=userspace(file) if userspace else None,
            guest_memfd=file,
        )
        return Machine(self, vm, file, gpa)

    def toucher(self, *files: HasFileno) -> Toucher:
        """Start a process that has the descriptors of `files`."""
        return self.kept(Toucher(*files))

    def window(self, file: GuestMemfd, length: int | None = None) -> Window:
        """Start a process that has `length` bytes of a file mapped, None: all."""
        return self.toucher(file).map(length or file.size)

    def memfd(self, size: int) -> File:
        """Make ordinary shared memory."""
        file = File(os.memfd_create("conformance", os.MFD_CLOEXEC))
        os.ftruncate(file.fileno(), size)
        return self.kept(file)

    # Claims.

    def settled(self, look: Callable[[], T], want: T) -> T:
        """Look until it is as wanted, for some seconds; return what was seen last."""
        deadline = time.monotonic() + SETTLE_SECONDS_MAX
        while (seen := look()) != want and time.monotonic() < deadline:
            time.sleep(0.02)
        return seen

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

    def kept(self, thing: C) -> C:
        """Have something closed with the scene; return it."""
        self._stack.callback(thing.close)
        return thing


@dataclass(frozen=True, slots=True)
class Machine:
    """A VM whose memslots at `gpa` are `file`."""

    scene: Scene
    vm: Vm
    file: GuestMemfd
    gpa: int = GPA

    def convert(self, offset: int, size: int, *, private: bool) -> str:
        """Convert as the lineage does; return "0", or errno with its error_offset."""
        convert = self.scene.dialect.convert
        assert convert is not None, f"{self.scene.lineage} converts nothing"
        try:
            convert(self.vm, self.file, Asked(self.gpa, offset, size, private))
        except ConvertRefused as refused:
            return f"{errno_name(refused.errno)} error_offset={refused.error_offset:#x}"
        except OSError as refused:
            return errno_name(refused.errno)
        return OK

    def boot(self, vcpus: int = 1) -> None:
        """KVM_CREATE_VCPU for each of some vCPUs."""
        for vcpu in range(vcpus):
            self.vm.create_vcpu(vcpu)

    def guest(
        self, *program: Instruction, vcpu: int = 0, vmm: BeforeConversion | None = None
    ) -> list[Result]:
        """Run to HLT; MAP_GPA_RANGE is answered by a conversion.

        `vmm` does what userspace has to do before it. Raises CaseFailedError for every
        other exit.
        """
        results: list[Result] = []
        with self.vm.run(program, vcpu=vcpu) as run:
            for left in run.exits():
                results += left.results
                if isinstance(left, Halted):
                    return results
                if not isinstance(left, HypercallExit):
                    raise CaseFailedError(f"KVM_RUN left with {worded(left)}")
                run.resume(self.hypercall(left, vmm))
        raise CaseFailedError("KVM_RUN ended without HLT")

    def first_exit(self, *program: Instruction, vcpu: int = 0) -> Exit:
        """Run up to the first exit, and leave it at that."""
        with self.vm.run(program, vcpu=vcpu) as run:
            return next(iter(run.exits()))

    def hypercall(
        self, left: HypercallExit, vmm: BeforeConversion | None = None
    ) -> int:
        """Do what a VMM does for a hypercall; return what the guest gets."""
        if left.nr != KVM_HC_MAP_GPA_RANGE:
            raise CaseFailedError(f"hypercall {left.nr} is not MAP_GPA_RANGE")
        gpa, npages, attributes = left.args[:3]
        private = bool(attributes & KVM_MAP_GPA_RANGE_ENCRYPTED)
        offset, size = gpa - self.gpa, npages << PAGE_SHIFT
        if vmm is not None:
            vmm(offset, size, private)
        answer = self.convert(offset, size, private=private)
        if answer != OK:
            raise CaseFailedError(f"MAP_GPA_RANGE of {gpa:#x}: {answer}")
        return 0
