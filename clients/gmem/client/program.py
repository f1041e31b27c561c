"""Guest programs: one function per instruction; addresses and sizes in bytes.

`access` says how the guest means an access: as the page's attribute says (the
default), private, or shared.
"""

from __future__ import annotations

from gmem.api.vmm.v1 import vmm_pb2 as pb

BY_ATTRIBUTE = pb.ACCESS_BY_ATTRIBUTE
PRIVATE = pb.ACCESS_PRIVATE
SHARED = pb.ACCESS_SHARED


def load(
    gpa: int, size: int, *, access: pb.Access.ValueType = pb.ACCESS_BY_ATTRIBUTE
) -> pb.Instruction:
    """Read `size` bytes (1 MiB at most); the result holds them."""
    return pb.Instruction(access=access, load=pb.Load(gpa=gpa, size=size))


def store(
    gpa: int, data: bytes, *, access: pb.Access.ValueType = pb.ACCESS_BY_ATTRIBUTE
) -> pb.Instruction:
    """Write `data`."""
    return pb.Instruction(access=access, store=pb.Store(gpa=gpa, data=data))


def fill(
    gpa: int,
    size: int,
    value: int,
    *,
    access: pb.Access.ValueType = pb.ACCESS_BY_ATTRIBUTE,
) -> pb.Instruction:
    """Write `value` (0 to 255) into every byte."""
    return pb.Instruction(access=access, fill=pb.Fill(gpa=gpa, size=size, value=value))


def verify(
    gpa: int,
    size: int,
    value: int,
    *,
    access: pb.Access.ValueType = pb.ACCESS_BY_ATTRIBUTE,
) -> pb.Instruction:
    """Count the bytes that are not `value`."""
    instruction = pb.Verify(gpa=gpa, size=size, value=value)
    return pb.Instruction(access=access, verify=instruction)


def hash_range(
    gpa: int, size: int, *, access: pb.Access.ValueType = pb.ACCESS_BY_ATTRIBUTE
) -> pb.Instruction:
    """SHA-256 of a range; the result holds the digest."""
    return pb.Instruction(access=access, hash=pb.Hash(gpa=gpa, size=size))


def hypercall(nr: int, *args: int) -> pb.Instruction:
    """Exit with HYPERCALL; the result holds what the VMM answered."""
    return pb.Instruction(hypercall=pb.Hypercall(nr=nr, args=args))


def map_gpa_range(gpa: int, npages: int, *, private: bool) -> pb.Instruction:
    """KVM_HC_MAP_GPA_RANGE: ask that `npages` 4K pages become private or shared."""
    instruction = pb.MapGpaRange(gpa=gpa, npages=npages, private=private)
    return pb.Instruction(map_gpa_range=instruction)


def ring(
    gpa: int,
    size: int,
    requests: int,
    *,
    timeout_ms: int = 0,
    access: pb.Access.ValueType = pb.ACCESS_SHARED,
) -> pb.Instruction:
    """Exchange `requests` requests with a device through a ring in shared memory."""
    instruction = pb.Ring(gpa=gpa, size=size, requests=requests, timeout_ms=timeout_ms)
    return pb.Instruction(access=access, ring=instruction)


def out(port: int, value: int) -> pb.Instruction:
    """Write to an I/O port: exit with IO."""
    return pb.Instruction(out=pb.Out(port=port, value=value))


def halt() -> pb.Instruction:
    """Exit with HLT: the program is over."""
    return pb.Instruction(halt=pb.Halt())
