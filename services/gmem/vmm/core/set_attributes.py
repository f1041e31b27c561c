"""KVM_SET_MEMORY_ATTRIBUTES, and how userspace converts where that does not.

The order is that of the 39-patch series (kvm_vm_ioctl_set_mem_attributes): checks;
then under slots_lock: nothing to do -> invalidate begin and zap -> convert the files
of all memslots in the range, in one call, which also does the series' rollback ->
store the attributes, only on success -> invalidate end.

In the 51-patch series nothing is converted here. Userspace converts each file by its
own ioctl, and sets attributes only where a memslot's file has no shared pages. In
mainline no file is converted at all: attributes say how the guest accesses a page.
"""

from __future__ import annotations

from gmem.effects import Mode, Op, holding, perform
from gmem.uapi.errors import BadRequest, Contended, Reason
from gmem.uapi.flags import MemoryAttribute
from gmem.uapi.pages import PgRange
from gmem.uapi.waits import require_wait
from gmem.vmm.core.attributes import require_gpa_range
from gmem.vmm.core.effects import (
    Convert,
    FileRange,
    StartWait,
    WaitConvertible,
)
from gmem.vmm.core.memslots import Memslot
from gmem.vmm.core.vm import Vm


def set_memory_attributes(
    vm: Vm,
    address: int,
    size: int,
    *,
    attributes: int,
    flags: int = 0,
    validate_only: bool = False,
    wait_ms: int | None = None,
) -> Op[bool]:
    """Convert a gpa range, all or nothing; return whether anything changed.

    With `validate_only` everything that could refuse is asked, and nothing changes.
    With `wait_ms` it waits for whoever holds the pages, without slots_lock and with no
    bracket open, so that the guest runs on; then it begins again with every check.

    Raises BadRequest (FLAG_UNKNOWN, ATTRIBUTE_UNSUPPORTED, RANGE_EMPTY, RANGE_WRAPS,
    RANGE_UNALIGNED), Contended (PAGE_IN_USE; DEADLINE), Exhausted
    (VMEMMAP_RESTORE_FAILED).
    """
    if flags:
        raise BadRequest(Reason.FLAG_UNKNOWN, f"flags {flags:#x} must be 0: send 0")
    wanted = require_supported(vm, attributes)
    gfns = require_gpa_range(address, size)
    if wait_ms is None:
        body = _set(vm, gfns, wanted, validate_only=validate_only)
        return (yield from holding(vm.slots_lock, Mode.EXCLUSIVE, body))
    require_wait(wait_ms)
    instant = yield from perform(StartWait(wait_ms))
    while True:
        try:
            body = _set(vm, gfns, wanted, validate_only=validate_only, undone=False)
            return (yield from holding(vm.slots_lock, Mode.EXCLUSIVE, body))
        except Contended as error:
            if error.reason is not Reason.DEADLINE:
                raise
        # Memslots may change meanwhile: this only says when to look again.
        ranges = _file_ranges(vm, gfns)
        yield from perform(WaitConvertible(ranges, not wanted, instant))


def convert_memory(vm: Vm, address: int, size: int, *, private: bool) -> Op[None]:
    """Do what a VMM does when its guest wants memory private, or shared.

    Raises what `set_memory_attributes` does. Files that support shared pages are
    converted by themselves, each range of them in one call: all or nothing.
    """
    wanted = MemoryAttribute.PRIVATE if private else MemoryAttribute.SHARED
    gfns = require_gpa_range(address, size)
    slots = [
        (slot, part) for slot, part in vm.memslots.with_gmem(gfns) if vm.file_says(slot)
    ]
    yield from _convert(
        Convert(
            tuple(_file_range(slot, part) for slot, part in slots),
            to_shared=not private,
        )
    )
    for rest in _between(gfns, [part for _, part in slots]):
        yield from set_memory_attributes(vm, rest.offset, rest.size, attributes=wanted)


def require_supported(vm: Vm, attributes: int) -> MemoryAttribute:
    """Return `attributes` if the VM has them. Raises ATTRIBUTE_UNSUPPORTED."""
    # int: the complement of a flag type has only the bits that the type knows.
    supported = int(vm.attributes_supported)
    if attributes & ~supported:
        way_out = "use a SW_PROTECTED VM for private memory"
        if not vm.rules.vm_attributes:
            way_out = "convert its files (KVM_SET_MEMORY_ATTRIBUTES2, ConvertRange)"
        raise BadRequest(
            Reason.ATTRIBUTE_UNSUPPORTED,
            f"a {vm.type.name} VM of {vm.lineage} has the attributes {supported:#x}, "
            f"not {attributes:#x}: {way_out}",
            attributes=attributes,
        )
    return MemoryAttribute(attributes)


def _set(
    vm: Vm,
    gfns: PgRange,
    wanted: MemoryAttribute,
    *,
    validate_only: bool,
    undone: bool = True,
) -> Op[bool]:
    if vm.attributes.have(gfns, wanted):
        return False
    ranges = _file_ranges(vm, gfns) if vm.rules.attributes_convert else ()
    convert = Convert(ranges, not wanted, validate_only, undone)
    if validate_only:
        yield from _convert(convert)
        return False
    yield from vm.changing(gfns, _convert_and_store(vm, gfns, wanted, convert))
    return True


def _convert_and_store(
    vm: Vm, gfns: PgRange, wanted: MemoryAttribute, convert: Convert
) -> Op[None]:
    # A refusal leaves mem_attr_array as it is; what faultability is left by the
    # series' rollback is the business of the files.
    yield from _convert(convert)
    vm.attributes.store(gfns, wanted)


def _convert(convert: Convert) -> Op[None]:
    if convert.ranges:
        yield from perform(convert)


def _file_ranges(vm: Vm, gfns: PgRange) -> tuple[FileRange, ...]:
    return tuple(_file_range(slot, part) for slot, part in vm.memslots.with_gmem(gfns))


def _file_range(slot: Memslot, part: PgRange) -> FileRange:
    name = slot.region.guest_memfd
    return FileRange(name, slot.file_offset(part.start), part.size)


def _between(gfns: PgRange, parts: list[PgRange]) -> list[PgRange]:
    """Return what `parts`, which ascend, leave of `gfns`."""
    starts = [gfns.start, *(part.stop for part in parts)]
    stops = [*(part.start for part in parts), gfns.stop]
    rest = [PgRange(start, stop) for start, stop in zip(starts, stops, strict=True)]
    return [run for run in rest if run]
