"""kvm_gmem_populate: launch-time content for private memory, by guest address."""

from __future__ import annotations

from gmem.effects import Mode, Op, holding, perform
from gmem.uapi.errors import BadRequest, InUse, NoSuchObject, NotFaultable, Reason
from gmem.uapi.flags import MemoryAttribute
from gmem.uapi.pages import PAGE_SHIFT, U64_LIMIT, PgRange
from gmem.vmm.core.attributes import require_gpa_range
from gmem.vmm.core.effects import FileRange, Populate
from gmem.vmm.core.vm import Vm


def populate_memory(
    vm: Vm, address: int, size: int, *, descriptor: str, source_offset: int
) -> Op[None]:
    """Write `size` bytes of a descriptor into private pages.

    Raises what `require_gpa_range` does, GPA_OUTSIDE_MEMSLOTS, BINDING_MISSING,
    PAGE_NOT_FAULTABLE, and the refusals of the guest_memfd service.
    """
    gfns = require_gpa_range(address, size)
    if source_offset + size >= U64_LIMIT:
        raise BadRequest(
            Reason.RANGE_WRAPS,
            f"source offset {source_offset:#x} plus {size:#x} bytes wraps: shorten it",
            offset=source_offset,
        )
    body = _populate(vm, gfns, descriptor, source_offset)
    yield from holding(vm.slots_lock, Mode.EXCLUSIVE, body)


def _populate(vm: Vm, gfns: PgRange, descriptor: str, source_offset: int) -> Op[None]:
    parts = _parts(vm, gfns)
    _require_private(vm, gfns)

    for target in parts:
        yield from perform(Populate(target, descriptor, source_offset))
        source_offset += target.size


def _parts(vm: Vm, gfns: PgRange) -> list[FileRange]:
    """Return the file ranges behind `gfns`, which must have them without a gap."""
    parts: list[FileRange] = []
    gfn = gfns.start
    while gfn < gfns.stop:
        slot = vm.memslots.find(gfn)
        if slot is None:
            raise NoSuchObject(
                Reason.GPA_OUTSIDE_MEMSLOTS,
                f"no memslot has gpa {gfn << PAGE_SHIFT:#x}: add one",
                gpa=gfn << PAGE_SHIFT,
            )
        if not slot.has_gmem:
            raise InUse(
                Reason.BINDING_MISSING,
                f"memslot {slot.region.slot} has no guest_memfd: use one that has",
                slot=slot.region.slot,
                gpa=gfn << PAGE_SHIFT,
            )
        part = slot.gfns.intersection(PgRange(gfn, gfns.stop))
        offset = slot.file_offset(gfn)
        parts.append(FileRange(slot.region.guest_memfd, offset, part.size))
        gfn = part.stop
    return parts


def _require_private(vm: Vm, gfns: PgRange) -> None:
    """Refuse what an attribute says is shared; a file that knows is asked itself."""
    runs = [
        run
        for slot, part in vm.memslots.with_gmem(gfns)
        if not vm.file_says(slot)
        for run in vm.attributes.runs(part)
    ]
    for run, attributes in runs:
        if not attributes & MemoryAttribute.PRIVATE:
            raise NotFaultable(
                Reason.PAGE_NOT_FAULTABLE,
                f"the page at gpa {run.offset:#x} is shared: convert it first",
                gpa=run.offset,
            )
