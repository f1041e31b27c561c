"""Programs of a guest, and the exits that its vCPU leaves with."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias


class Access(IntEnum):
    """How the guest means an access."""

    BY_ATTRIBUTE = 1
    PRIVATE = 2
    SHARED = 3


@dataclass(frozen=True, slots=True)
class Load:
    """Read `size` bytes, 1 MiB at most; the result holds them."""

    gpa: int
    size: int
    access: Access = Access.BY_ATTRIBUTE


@dataclass(frozen=True, slots=True)
class Store:
    """Write `data`."""

    gpa: int
    data: bytes
    access: Access = Access.BY_ATTRIBUTE


@dataclass(frozen=True, slots=True)
class Fill:
    """Write `value` into every byte."""

    gpa: int
    size: int
    value: int
    access: Access = Access.BY_ATTRIBUTE


@dataclass(frozen=True, slots=True)
class Verify:
    """Count the bytes that are not `value`."""

    gpa: int
    size: int
    value: int
    access: Access = Access.BY_ATTRIBUTE


@dataclass(frozen=True, slots=True)
class MapGpaRange:
    """Hypercall KVM_HC_MAP_GPA_RANGE."""

    gpa: int
    npages: int
    private: bool


@dataclass(frozen=True, slots=True)
class Out:
    """Write to an I/O port."""

    port: int
    value: int


Instruction: TypeAlias = Load | Store | Fill | Verify | MapGpaRange | Out
"""One step of a program; behind the last the vCPU halts."""


@dataclass(frozen=True, slots=True)
class Result:
    """What one instruction left: bytes read, bytes that differ, a hypercall's ret."""

    data: bytes = b""
    count: int = 0
    value: int = 0


@dataclass(frozen=True, slots=True)
class MemoryFault:
    """KVM_EXIT_MEMORY_FAULT; KVM_RUN failed with `errno`."""

    errno: int
    flags: int
    gpa: int
    size: int
    results: tuple[Result, ...] = ()


@dataclass(frozen=True, slots=True)
class HypercallExit:
    """KVM_EXIT_HYPERCALL."""

    nr: int
    args: tuple[int, ...]
    results: tuple[Result, ...] = ()


@dataclass(frozen=True, slots=True)
class MmioExit:
    """KVM_EXIT_MMIO."""

    gpa: int
    length: int
    is_write: bool
    results: tuple[Result, ...] = ()


@dataclass(frozen=True, slots=True)
class IoExit:
    """KVM_EXIT_IO, a write."""

    port: int
    value: int
    results: tuple[Result, ...] = ()


@dataclass(frozen=True, slots=True)
class Halted:
    """KVM_EXIT_HLT: the program is over."""

    results: tuple[Result, ...] = ()


Exit: TypeAlias = MemoryFault | HypercallExit | MmioExit | IoExit | Halted
"""Why the vCPU left the guest; `results` are those since the exit before."""
