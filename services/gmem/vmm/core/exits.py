"""Why a vCPU left the guest, and what a guest fault came to: values, never errors.

KVM_RUN returns -1 with EFAULT or EHWPOISON where the exit is a MemoryFault, 0 with the
others; here all of them are values that travel in a response.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias

from gmem.uapi.errors import Errno
from gmem.uapi.flags import KVM_MEMORY_EXIT_FLAG_PRIVATE
from gmem.uapi.pages import PAGE_SHIFT, PAGE_SIZE, PgRange


class Access(IntEnum):
    """What the guest means by an access; numbers as on the wire."""

    BY_ATTRIBUTE = 1
    """As the attribute of the page says: what a software-protected VM does."""
    PRIVATE = 2
    SHARED = 3


@dataclass(frozen=True, slots=True)
class MemoryFault:
    """KVM_EXIT_MEMORY_FAULT: `flags` bit 3 where the access was private."""

    flags: int
    gpa: int
    size: int = PAGE_SIZE
    errno: int = Errno.EFAULT
    reason: str = ""

    @classmethod
    def of_page(
        cls, gfn: int, *, private: bool, errno: int = Errno.EFAULT, reason: str = ""
    ) -> MemoryFault:
        """Make the exit for one page (kvm_mmu_prepare_memory_fault_exit)."""
        flags = KVM_MEMORY_EXIT_FLAG_PRIVATE if private else 0
        return cls(flags, gfn << PAGE_SHIFT, errno=errno, reason=reason)

    @property
    def private(self) -> bool:
        """Whether the access that faulted was private."""
        return bool(self.flags & KVM_MEMORY_EXIT_FLAG_PRIVATE)


@dataclass(frozen=True, slots=True)
class Hypercall:
    """KVM_EXIT_HYPERCALL; the answer is what vmcall returns to the guest."""

    nr: int
    args: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Mmio:
    """KVM_EXIT_MMIO of at most 8 bytes; the answer to a read is its value."""

    gpa: int
    size: int
    is_write: bool
    data: bytes = b""


@dataclass(frozen=True, slots=True)
class Io:
    """KVM_EXIT_IO: a write to a port."""

    port: int
    value: int


@dataclass(frozen=True, slots=True)
class Hlt:
    """KVM_EXIT_HLT: the program is over."""


Exit: TypeAlias = MemoryFault | Hypercall | Mmio | Io | Hlt


@dataclass(frozen=True, slots=True)
class Mapped:
    """A fault that was resolved: `gfns` are reached through window `window`.

    The byte of `gfn` in the window is `(gfn - base_gfn) << PAGE_SHIFT`, for the base of
    the memslot that the window was made for.
    """

    gfns: PgRange
    window: int
    private: bool
    writable: bool
    seq: int
    """mmu_invalidate_seq when it was installed: who passes it on looks again."""


@dataclass(frozen=True, slots=True)
class Retry:
    """RET_PF_RETRY: an invalidation ran meanwhile; ask again when it is over."""

    seq: int


@dataclass(frozen=True, slots=True)
class NoSlot:
    """No memslot answers this access: the instruction is emulated as MMIO."""


FaultOutcome: TypeAlias = Mapped | Retry | NoSlot | MemoryFault
