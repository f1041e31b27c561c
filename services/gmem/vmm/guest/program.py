"""The instructions of a guest program: each leaves at most one Result."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Final

from gmem.uapi.flags import KVM_HC_MAP_GPA_RANGE, KVM_MAP_GPA_RANGE_ENCRYPTED
from gmem.vmm.core.exits import Access, Hlt, Hypercall, Io
from gmem.vmm.core.program import (
    Fill,
    Halt,
    Hash,
    Load,
    MapGpaRange,
    Out,
    Result,
    Ring,
    Step,
    Store,
    Verify,
    Vmcall,
)
from gmem.vmm.guest.memory import Link, VcpuMemory
from gmem.vmm.guest.ring import DEFAULT_SECONDS, RingDriver
from gmem.vmm.guest.windows import CHUNK_BYTES


class Program:
    """Executes instructions for one run."""

    def __init__(self, link: Link, memory: VcpuMemory) -> None:
        self._link = link
        self._memory = memory

    def execute(self, step: Step) -> Result | None:
        """Execute one instruction; return what it left, if that is something."""
        handler = HANDLERS[type(step.operation)]
        return handler(self, step.operation, step.access)

    def load(self, op: Load, access: Access) -> Result:
        """Read bytes into the result."""
        data = bytearray()
        self._memory.read(op.gpa, op.size, access, data.extend)
        return Result(data=bytes(data))

    def store(self, op: Store, access: Access) -> None:
        """Write bytes."""
        source = memoryview(op.data)

        def produce(target: memoryview) -> None:
            nonlocal source
            target[:] = source[: len(target)]
            source = source[len(target) :]

        self._memory.write(op.gpa, len(op.data), access, produce)

    def fill(self, op: Fill, access: Access) -> None:
        """Write one value into every byte."""
        pattern = bytes([op.value]) * min(op.size, CHUNK_BYTES)

        def produce(target: memoryview) -> None:
            target[:] = pattern[: len(target)]

        self._memory.write(op.gpa, op.size, access, produce)

    def verify(self, op: Verify, access: Access) -> Result:
        """Count the bytes that differ from a value."""
        value = bytes([op.value])
        here, count, first_gpa = op.gpa, 0, 0

        def consume(piece: memoryview) -> None:
            nonlocal here, count, first_gpa
            data = bytes(piece)
            differ = len(data) - data.count(value)
            if differ and not count:
                first_gpa = here + len(data) - len(data.lstrip(value))
            count += differ
            here += len(data)

        self._memory.read(op.gpa, op.size, access, consume)
        return Result(count=count, first_gpa=first_gpa)

    def hash(self, op: Hash, access: Access) -> Result:
        """SHA-256 of a range."""
        digest = hashlib.sha256()
        self._memory.read(op.gpa, op.size, access, digest.update)
        return Result(data=digest.digest())

    def hypercall(self, op: Vmcall, access: Access) -> Result:
        """Leave with HYPERCALL; the result is what it returned."""
        del access
        return Result(value=self._link.leave(Hypercall(op.nr, tuple(op.args))))

    def map_gpa_range(self, op: MapGpaRange, access: Access) -> Result:
        """KVM_HC_MAP_GPA_RANGE."""
        del access
        attributes = KVM_MAP_GPA_RANGE_ENCRYPTED if op.private else 0
        args = (op.gpa, op.npages, attributes)
        return Result(value=self._link.leave(Hypercall(KVM_HC_MAP_GPA_RANGE, args)))

    def ring(self, op: Ring, access: Access) -> Result:
        """Exchange requests with a device."""
        driver = RingDriver(GuestWindow(self._memory, op.gpa, access), op.size)
        seconds = op.timeout_ms / 1000 if op.timeout_ms else DEFAULT_SECONDS
        found = driver.exchange(op.requests, seconds, self._link.check)
        return Result(count=found.received, value=found.wrong)

    def out(self, op: Out, access: Access) -> None:
        """Leave with IO."""
        del access
        self._link.leave(Io(op.port, op.value))

    def halt(self, op: Halt, access: Access) -> None:
        """Leave with HLT: the run is over, so nobody answers."""
        del op, access
        self._link.leave(Hlt())


HANDLERS: Final[dict[type[Any], Callable[[Program, Any, Access], Result | None]]] = {
    Load: Program.load,
    Store: Program.store,
    Fill: Program.fill,
    Verify: Program.verify,
    Hash: Program.hash,
    Vmcall: Program.hypercall,
    MapGpaRange: Program.map_gpa_range,
    Ring: Program.ring,
    Out: Program.out,
    Halt: Program.halt,
}


class GuestWindow:
    """Guest memory from `gpa` on, as the window that a ring lies in."""

    def __init__(self, memory: VcpuMemory, gpa: int, access: Access) -> None:
        self._memory = memory
        self._gpa = gpa
        self._access = access

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` on."""
        data = bytearray()
        self._memory.read(self._gpa + offset, size, self._access, data.extend)
        return bytes(data)

    def write(self, offset: int, data: bytes) -> None:
        """Write `data` at `offset`."""

        def produce(target: memoryview) -> None:
            target[:] = data

        self._memory.write(self._gpa + offset, len(data), self._access, produce)
