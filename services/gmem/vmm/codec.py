"""Between the wire and the core: requests become values, values become responses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, TypeAlias

from gmem.api.vmm.v1 import vmm_pb2 as pb
from gmem.uapi.errors import BadRequest, Reason
from gmem.uapi.flags import VmType
from gmem.uapi.lineage import Lineage
from gmem.uapi.pages import PgRange, page_size_of
from gmem.vmm.core.exits import Exit, Hlt, Hypercall, Io, MemoryFault, Mmio
from gmem.vmm.core.memslots import Memslot, Region, Userspace
from gmem.vmm.core.mmu import Entry
from gmem.vmm.core.runs import PAGES_LIMIT
from gmem.vmm.core.vm import Vm
from gmem.vmm.guest.messages import Left, ResultOf

Invalidate: TypeAlias = pb.InvalidateBeginRequest | pb.InvalidateEndRequest

STAGE2_ENTRIES_SHOWN: Final = 1024

VM_TYPES: Final = {
    pb.VM_TYPE_DEFAULT: VmType.DEFAULT,
    pb.VM_TYPE_SW_PROTECTED: VmType.SW_PROTECTED,
}
_WIRE_TYPES: Final = {value: key for key, value in VM_TYPES.items()}


def vm_type_from_wire(wire: pb.VmType.ValueType) -> VmType:
    """Return the VM's type. Raises BadRequest (ARGUMENT_INVALID)."""
    if wire not in VM_TYPES:
        raise invalid("type is not given: say VM_TYPE_DEFAULT or VM_TYPE_SW_PROTECTED")
    return VM_TYPES[wire]


def lineage_from_wire(wire: str) -> Lineage:
    """Return the lineage, RFC_V1 for none. Raises BadRequest (ARGUMENT_INVALID)."""
    if wire and wire not in Lineage.__members__:
        known = ", ".join(Lineage.__members__)
        raise invalid(f"lineage {wire!r} is not offered: use {known}")
    return Lineage(wire or Lineage.RFC_V1)


def notice_from_message(fields: dict[str, Any]) -> tuple[str, Invalidate]:
    """Read a message of the broker: "begin" or "end", and of what. BadRequest."""
    edge = fields.get("edge")
    if edge not in ("begin", "end"):
        raise invalid(f"edge {edge!r} is none: say 'begin' or 'end'")
    try:
        given = {key: fields[key] for key in ("vm", "gfn", "npages")}
        return edge, pb.InvalidateBeginRequest(**given)
    except (KeyError, TypeError, ValueError) as error:
        raise invalid(
            f"vm is a name, gfn and npages are numbers of pages: {error}"
        ) from error


def gfns_from_wire(request: Invalidate) -> PgRange:
    """Return the guest frames that are meant; beyond the last there is none."""
    start = min(request.gfn, PAGES_LIMIT)
    return PgRange(start, min(start + request.npages, PAGES_LIMIT))


def region_from_wire(request: pb.SetUserMemoryRegion2Request) -> Region:
    """Return the region that is asked for."""
    side = request.userspace
    return Region(
        slot=request.slot,
        flags=request.flags,
        guest_phys_addr=request.guest_phys_addr,
        memory_size=request.memory_size,
        userspace=(
            Userspace(side.descriptor, side.offset)
            if request.HasField("userspace")
            else None
        ),
        guest_memfd=request.guest_memfd,
        guest_memfd_offset=request.guest_memfd_offset,
    )


def vm_to_wire(vm: Vm) -> pb.Vm:
    """Describe a VM."""
    return pb.Vm(
        name=vm.name,
        type=_WIRE_TYPES[vm.type],
        lineage=vm.lineage.value,
        cgroup=vm.cgroup,
        memslots=[_memslot_to_wire(vm, slot) for slot in vm.memslots],
        vcpus=sorted(vm.vcpus),
        guest_pid=vm.guest_pid,
        guest_alive=vm.guest_alive,
        mmu_invalidate_seq=vm.invalidation.seq,
        extensions={int(key): value for key, value in vm.extensions.items()},
    )


def _memslot_to_wire(vm: Vm, slot: Memslot) -> pb.Memslot:
    region = slot.region
    side = region.userspace
    return pb.Memslot(
        name=f"{vm.name}/memslots/{region.slot}",
        slot=region.slot,
        flags=region.flags,
        guest_phys_addr=region.guest_phys_addr,
        memory_size=region.memory_size,
        userspace=pb.Userspace(descriptor=side.descriptor, offset=side.offset)
        if side
        else None,
        guest_memfd=region.guest_memfd,
        guest_memfd_offset=region.guest_memfd_offset,
    )


def stage2_to_wire(vm: Vm) -> pb.GetStage2Response:
    """Count a VM's stage-2 entries, and show the first of them."""
    counted = vm.stage2.statistics()
    response = pb.GetStage2Response(
        entries_1g=counted.pages_1g,
        entries_2m=counted.pages_2m,
        entries_4k=counted.pages_4k,
        mmu_invalidate_seq=vm.invalidation.seq,
    )
    for _, entry in zip(range(STAGE2_ENTRIES_SHOWN), vm.stage2, strict=False):
        response.entries.append(_entry_to_wire(entry))
    return response


def _entry_to_wire(entry: Entry) -> pb.Stage2Entry:
    return pb.Stage2Entry(
        gfn=entry.gfn,
        level_size=page_size_of(entry.order),
        private=entry.private,
        pfn=entry.pfn,
    )


def exit_of(left: Left) -> Exit:
    """Return the exit that a message of the guest process tells of."""
    match left.kind:
        case "Mmio":
            return Mmio(**left.values, data=left.blob)
        case "Hypercall":
            return Hypercall(left.values["nr"], tuple(left.values["args"]))
        case "Io":
            return Io(**left.values)
        case "MemoryFault":
            return MemoryFault(**left.values)
        case _:
            assert left.kind == "Hlt", left.kind
            return Hlt()


def exit_to_wire(
    instruction: int, results: Iterable[pb.Result], reached: Exit
) -> pb.RunResponse:
    """Make the response that tells the caller of an exit."""
    response = pb.RunResponse(instruction=instruction, results=results)
    match reached:
        case MemoryFault():
            response.memory_fault.flags = reached.flags
            response.memory_fault.gpa = reached.gpa
            response.memory_fault.size = reached.size
            response.memory_fault.errno = reached.errno
            response.memory_fault.reason = reached.reason
        case Hypercall(nr=nr, args=args):
            response.hypercall.nr = nr
            response.hypercall.args.extend(args)
        case Mmio():
            response.mmio.gpa = reached.gpa
            response.mmio.len = reached.size
            response.mmio.is_write = reached.is_write
            response.mmio.data = reached.data
        case Io(port=port, value=value):
            response.io.port = port
            response.io.value = value
        case Hlt():
            response.hlt.SetInParent()
    return response


def result_of(said: ResultOf) -> pb.Result:
    """Return the result that a message of the guest process tells of."""
    return pb.Result(
        instruction=said.instruction,
        data=said.blob,
        count=said.count,
        first_gpa=said.first_gpa,
        value=said.value,
    )


def invalid(sentence: str) -> BadRequest:
    """Make the refusal of an argument that cannot be right."""
    return BadRequest(Reason.ARGUMENT_INVALID, sentence)
