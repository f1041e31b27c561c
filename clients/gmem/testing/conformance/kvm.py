"""What a case asks of a kernel: the calls of KVM and guest_memfd, blocking.

Two kernels answer: an emulated host (`emulator.py`) and the one of this machine, over
/dev/kvm. A case is written against these classes alone and never asks which it is. What
a kernel refuses is an OSError with the errno of the call; what it lets a process die of
is seen at a real process (`toucher.py`).

A GuestMemfd is a descriptor: fstat, fallocate, ioctl, read and mmap go to the file
itself, through whatever serves it. Nobody maps it in this process: one page that is
refused would end the run.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType
from typing import TYPE_CHECKING, Final, Protocol, Self, TypeAlias, runtime_checkable

from gmem.testing.conformance.guest import Exit, Instruction
from gmem.uapi.flags import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, VmType

if TYPE_CHECKING:
    from gmem.testing.conformance.toucher import Window

RFC_V1: Final = "RFC_V1"
RFC_V2: Final = "RFC_V2"
IN_PLACE: Final = "IN_PLACE"
MAINLINE: Final = "MAINLINE"
LINEAGES: Final = (RFC_V1, RFC_V2, IN_PLACE, MAINLINE)
"""Names as in gmem.uapi.lineage; a kernel says which of them it has."""


class Feature(StrEnum):
    """What a case may need that not every kernel has."""

    GUESTS = "vCPUs that run small programs"
    PRIVATE_MEMORY = "VMs with memory attributes"
    PINS = "pins and references by name"
    POOLS = "counters of the HugeTLB pools, read beside other programs"
    OWN_POOLS = "HugeTLB pools that nobody else uses"
    HUGETLB_FILES = "other files of the pools, as far as they count"
    MACHINE_HUGE_PAGES = "huge pages of the machine itself"
    USERSPACE_VMA = "a check that userspace_addr maps the same file"
    NUMA = "two NUMA nodes"
    CGROUPS = "counters of a HugeTLB cgroup"
    MEMORY_ERRORS = "memory errors of pages of a file"


class KillPolicy(StrEnum):
    """How a page comes to its memory error, and so who hears of it at once."""

    EARLY = "injected, KILL_EARLY"
    ADVICE = "MADV_HWPOISON"
    LATE = "injected, KILL_LATE"


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a kernel can answer.

    `page_sizes` has the lineages that it plays, each with its page sizes in bytes;
    `missing` says of a Feature that is not there why; `nothing` why no case can be
    played at all.
    """

    page_sizes: Mapping[str, Sequence[int]]
    features: frozenset[Feature]
    missing: Mapping[Feature, str] = field(default_factory=dict)
    nothing: str = ""


@dataclass(frozen=True, slots=True)
class Pool:
    """The counters of one page size, in huge pages."""

    nr: int
    free: int
    resv: int
    surplus: int
    overcommit: int


@dataclass(frozen=True, slots=True)
class Cgroup:
    """hugetlb.<size>.* of one cgroup, in bytes; a limit of -1 is none."""

    usage: int
    limit: int
    max_usage: int
    rsvd_usage: int
    rsvd_limit: int
    rsvd_max_usage: int


@runtime_checkable
class HasFileno(Protocol):
    """Anything with a descriptor."""

    def fileno(self) -> int:
        """Return the descriptor."""


@dataclass(frozen=True, slots=True)
class Userspace:
    """A memslot's userspace_addr: where a file is mapped MAP_SHARED, from `offset` on.

    Whoever plays the VMM makes that mapping; `offset` stands for the address where the
    address is looked at, so it may be unaligned.
    """

    file: HasFileno
    offset: int = 0


class Hold(AbstractContextManager["Hold"]):
    """Pages that somebody uses; leaving the `with` lets go of them."""

    @abstractmethod
    def close(self) -> None:
        """Let go; harmless when repeated."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class MemoryFailure(ABC):
    """A page with a memory error; `close` forgets the error, where nobody has."""

    result: str
    """What memory_failure() returned: "0", or the name of an errno."""
    named: str
    """Who is signalled at once: "nobody", or that processes are named for it alone."""

    @abstractmethod
    def unpoison(self) -> None:
        """Forget the error, in the file or, once it is punched, of the frame."""

    @abstractmethod
    def close(self) -> None:
        """Forget it; harmless when repeated."""


class GuestMemfd(ABC):
    """A file of KVM_CREATE_GUEST_MEMFD and what its system calls do."""

    def __init__(self, fd: int, size: int) -> None:
        """Own `fd`."""
        self._fd = fd
        self.size = size

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._fd

    def fstat(self) -> os.stat_result:
        """Return what fstat says."""
        return os.fstat(self._fd)

    def fallocate(self, mode: int, offset: int, length: int) -> None:
        """Make the system call itself: os.posix_fallocate has no mode."""
        arguments = (
            ctypes.c_int(self._fd),
            ctypes.c_int(mode),
            ctypes.c_int64(offset),
            ctypes.c_int64(length),
        )
        if _LIBC.fallocate(*arguments) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def allocate(self, offset: int, length: int) -> None:
        """Allocate a range: FALLOC_FL_KEEP_SIZE."""
        self.fallocate(FALLOC_FL_KEEP_SIZE, offset, length)

    def punch_hole(self, offset: int, length: int) -> None:
        """Drop a range: FALLOC_FL_PUNCH_HOLE."""
        self.fallocate(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, offset, length)

    def ftruncate(self, size: int) -> None:
        """Change the size, which no guest_memfd lets one do."""
        os.ftruncate(self._fd, size)

    def ioctl(self, request: int, argument: bytearray) -> None:
        """Make an ioctl on the file; `argument` is read and written."""
        fcntl.ioctl(self._fd, request, argument)

    def pin(self, offset: int, size: int, *, plain: bool = False) -> Hold:
        """Hold pages: a longterm pin, or a `plain` reference (Feature.PINS)."""
        raise NotImplementedError(f"no {Feature.PINS}: {offset}, {size}, {plain}")

    def memory_failure(self, offset: int, policy: KillPolicy) -> MemoryFailure:
        """Have a page lost to a memory error (Feature.MEMORY_ERRORS)."""
        raise NotImplementedError(f"no {Feature.MEMORY_ERRORS}: {offset}, {policy}")

    def mbind(self, window: Window, mode: int, nodes: int, page: range) -> None:
        """Give bytes of a mapping a policy (Feature.NUMA); `nodes` is a bit mask."""
        window.mbind(mode, nodes, page.start, len(page))

    def get_mempolicy(self, window: Window, offset: int) -> tuple[int, int]:
        """Return mode and node mask of the policy at a place (Feature.NUMA)."""
        return window.get_mempolicy(offset)

    def node_of(self, window: Window, offset: int) -> int:
        """Return the node of a page that is mapped and bound (Feature.NUMA)."""
        return window.node_of(offset)

    @abstractmethod
    def close(self) -> None:
        """Close the file; mappings of other processes stay. Harmless when repeated."""


class VcpuRun(Protocol):
    """KVM_RUN in a loop."""

    def exits(self) -> Iterator[Exit]:
        """Yield exits; after each but Halted the caller must `resume`, or leave."""

    def resume(self, value: int = 0) -> None:
        """Enter the guest again with what a hypercall or an MMIO read yields."""


class Vm(ABC):
    """A file of KVM_CREATE_VM."""

    @abstractmethod
    def create_guest_memfd(
        self, size: int, flags: int, page_order: int = 0
    ) -> GuestMemfd:
        """KVM_CREATE_GUEST_MEMFD, with flag bits and fields of the lineage."""

    @abstractmethod
    def set_user_memory_region2(
        self,
        *,
        slot: int,
        guest_phys_addr: int,
        memory_size: int,
        flags: int = 0,
        userspace: Userspace | None = None,
        guest_memfd: Descriptor | None = None,
        guest_memfd_offset: int = 0,
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION2: exactly these numbers, right or wrong.

        `userspace` None is userspace_addr 0; where the kernel needs an address for a
        slot that no case touches through it, it makes anonymous memory itself.
        """

    @abstractmethod
    def check_extension(self, capability: int) -> int:
        """KVM_CHECK_EXTENSION on the VM."""

    @abstractmethod
    def close(self) -> None:
        """Close the VM; its guest ends. Harmless when repeated."""

    def set_memory_attributes(
        self, *, address: int, size: int, attributes: int, flags: int = 0
    ) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES (Feature.PRIVATE_MEMORY)."""
        raise NotImplementedError(
            f"no {Feature.PRIVATE_MEMORY}: {address}, {size}, {attributes}, {flags}"
        )

    def create_vcpu(self, vcpu: int = 0) -> None:
        """KVM_CREATE_VCPU (Feature.GUESTS)."""
        raise NotImplementedError(f"no {Feature.GUESTS}: {vcpu}")

    def run(
        self, program: Sequence[Instruction], *, vcpu: int = 0
    ) -> AbstractContextManager[VcpuRun]:
        """KVM_RUN of a program; `with vm.run(...) as run` (Feature.GUESTS)."""
        raise NotImplementedError(f"no {Feature.GUESTS}: {program}, {vcpu}")

    def pre_fault_memory(
        self, gpa: int, size: int, *, vcpu: int = 0
    ) -> tuple[str, int, int]:
        """KVM_PRE_FAULT_MEMORY; return errno's name or "0", and gpa and size left."""
        raise NotImplementedError(f"no {Feature.GUESTS}: {gpa}, {size}, {vcpu}")


class HugetlbFile(ABC):
    """Another user of a pool: memfd_create(MFD_HUGETLB) of one huge page."""

    @abstractmethod
    def mmap(self) -> None:
        """Map all of it MAP_SHARED."""

    @abstractmethod
    def touch(self) -> None:
        """Write one byte."""

    @abstractmethod
    def munmap(self) -> None:
        """Unmap it."""

    @abstractmethod
    def madvise(self, advice: int) -> None:
        """Call madvise with where it was mapped; the result does not matter."""

    @abstractmethod
    def close(self) -> None:
        """Close it."""


class Backend(ABC):
    """One kernel."""

    name: str
    """What `--backend` calls it."""

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What it can answer; asked before any case."""

    @abstractmethod
    def create_vm(self, *, lineage: str, vm_type: VmType) -> Vm:
        """KVM_CREATE_VM."""

    def begin(self) -> None:  # noqa: B027 - not every kernel has something to do
        """Get ready for a case."""

    def leftovers(self) -> list[str]:
        """Return a sentence for each thing that a case left behind."""
        return []

    def pools(self) -> Mapping[int, Pool]:
        """Return the counters of the pools by page size (Feature.POOLS)."""
        raise NotImplementedError(f"no {Feature.POOLS}")

    def cgroup(self, page_size: int) -> Cgroup:
        """Return the counters of the cgroup that pays (Feature.CGROUPS)."""
        raise NotImplementedError(f"no {Feature.CGROUPS}: {page_size}")

    def hugetlb_file(self, page_size: int) -> HugetlbFile:
        """Make another user of a pool (Feature.HUGETLB_FILES)."""
        raise NotImplementedError(f"no {Feature.HUGETLB_FILES}: {page_size}")

    @abstractmethod
    def close(self) -> None:
        """End everything."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


Descriptor: TypeAlias = GuestMemfd | Vm | Backend | HasFileno
"""What may be given as a guest_memfd, also where it is none: a VM, /dev/kvm, a file."""

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
