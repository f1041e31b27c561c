"""The vCPUs of an emulated host in the words of the cases."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, assert_never

from gmem.api.vmm.v1 import vmm_pb2 as pb
from gmem.client import program as make
from gmem.client.sync import VcpuRun
from gmem.testing.conformance import guest
from gmem.testing.conformance.guest import Exit, Instruction, Result

_ACCESSES: Final = {
    guest.Access.BY_ATTRIBUTE: pb.ACCESS_BY_ATTRIBUTE,
    guest.Access.PRIVATE: pb.ACCESS_PRIVATE,
    guest.Access.SHARED: pb.ACCESS_SHARED,
}


class EmulatedRun:
    """gmem.client's VcpuRun in the words of the cases."""

    def __init__(self, inner: VcpuRun) -> None:
        """Take over a run that has begun."""
        self._inner = inner

    def exits(self) -> Iterator[Exit]:
        """Yield exits."""
        for response in self._inner.exits():
            yield _exit(response)

    def resume(self, value: int = 0) -> None:
        """Enter the guest again."""
        self._inner.resume(value)


def to_wire(instruction: Instruction) -> pb.Instruction:
    """Return an instruction as the service takes it."""
    match instruction:
        case guest.Load(gpa, size, access):
            return make.load(gpa, size, access=_access(access))
        case guest.Store(gpa, data, access):
            return make.store(gpa, data, access=_access(access))
        case guest.Fill(gpa, size, value, access):
            return make.fill(gpa, size, value, access=_access(access))
        case guest.Verify(gpa, size, value, access):
            return make.verify(gpa, size, value, access=_access(access))
        case guest.MapGpaRange(gpa, npages, private):
            return make.map_gpa_range(gpa, npages, private=private)
        case guest.Out(port, value):
            return make.out(port, value)
        case _:
            assert_never(instruction)


def _access(access: guest.Access) -> pb.Access.ValueType:
    return _ACCESSES[access]


def _exit(response: pb.RunResponse) -> Exit:
    results = tuple(
        Result(result.data, result.count, result.value) for result in response.results
    )
    match response.WhichOneof("exit"):
        case "memory_fault":
            left = response.memory_fault
            return guest.MemoryFault(
                left.errno, left.flags, left.gpa, left.size, results
            )
        case "hypercall":
            call = response.hypercall
            return guest.HypercallExit(call.nr, tuple(call.args), results)
        case "mmio":
            mmio = response.mmio
            return guest.MmioExit(mmio.gpa, mmio.len, mmio.is_write, results)
        case "io":
            return guest.IoExit(response.io.port, response.io.value, results)
        case _:
            return guest.Halted(results)
