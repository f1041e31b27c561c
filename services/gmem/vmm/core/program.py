"""Guest programs as values: what a vCPU is told to do, and what each step leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from gmem.vmm.core.exits import Access


@dataclass(frozen=True, slots=True)
class Load:
    """Read `size` bytes at `gpa`."""

    gpa: int
    size: int


@dataclass(frozen=True, slots=True)
class Store:
    """Write `data` at `gpa`."""

    gpa: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Fill:
    """Write the byte `value` into a range."""

    gpa: int
    size: int
    value: int


@dataclass(frozen=True, slots=True)
class Verify:
    """Count the bytes of a range that are not `value`."""

    gpa: int
    size: int
    value: int


@dataclass(frozen=True, slots=True)
class Hash:
    """SHA-256 of a range."""

    gpa: int
    size: int


@dataclass(frozen=True, slots=True)
class Vmcall:
    """Leave with HYPERCALL."""

    nr: int
    args: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class MapGpaRange:
    """KVM_HC_MAP_GPA_RANGE: ask for a conversion of `npages` pages."""

    gpa: int
    npages: int
    private: bool


@dataclass(frozen=True, slots=True)
class Ring:
    """Exchange `requests` with a device; give up `timeout_ms` after an answer."""

    gpa: int
    size: int
    requests: int
    timeout_ms: int


@dataclass(frozen=True, slots=True)
class Out:
    """Leave with IO."""

    port: int
    value: int


@dataclass(frozen=True, slots=True)
class Halt:
    """Leave with HLT."""


Operation: TypeAlias = (
    Load | Store | Fill | Verify | Hash | Vmcall | MapGpaRange | Ring | Out | Halt
)


@dataclass(frozen=True, slots=True)
class Step:
    """One instruction: what to do, and how its accesses are meant."""

    operation: Operation
    access: Access = Access.BY_ATTRIBUTE


@dataclass(frozen=True, slots=True)
class Result:
    """What a step left; which fields count depends on the operation.

    Verify: `count` bytes differ, the first at `first_gpa`. Ring: `count` answers came,
    `value` of them wrong. A hypercall: `value` is what it returned.
    """

    data: bytes = b""
    count: int = 0
    first_gpa: int = 0
    value: int = 0
