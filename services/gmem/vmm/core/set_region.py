"""KVM_SET_USER_MEMORY_REGION2: bind, map, commit; or zap, forget, unbind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from gmem.effects import Mode, Op, holding, perform
from gmem.uapi.errors import KernelError, Reason
from gmem.vmm.core.effects import (
    BindSlot,
    FileIdentity,
    IdentifyDescriptor,
    MapGuestView,
    MapHostView,
    MapUserspace,
    RequireDescriptor,
    UnbindSlot,
    UnmapWindow,
)
from gmem.vmm.core.memslots import Change, Memslot, Region, require_valid
from gmem.vmm.core.vm import Vm

ALREADY_UNBOUND = {Reason.INODE_UNKNOWN, Reason.BINDING_MISSING, Reason.FD_UNKNOWN}
"""Refusals of an unbind that mean it is done: the file was closed before."""


def set_user_memory_region2(vm: Vm, region: Region) -> Op[None]:
    """Create, change or (size 0) delete a memslot.

    Raises what `require_valid` and `Memslots.plan` do, the refusals of a bind,
    DESCRIPTOR_UNKNOWN and GUEST_GONE; a refused call leaves nothing behind.
    """
    require_valid(region, has_gmem=vm.has_gmem)
    yield from holding(vm.slots_lock, Mode.EXCLUSIVE, _set(vm, region))


def _set(vm: Vm, region: Region) -> Op[None]:
    yield from CHANGES[vm.memslots.plan(region)](vm, region)


def _create(vm: Vm, region: Region) -> Op[None]:
    yield from _require_backing(vm, region)
    gmem_only = False
    if region.has_gmem:
        userspace = yield from _identify(vm, region)
        gmem_only = bool((yield from perform(_bind(vm, region, userspace))))
    slot = Memslot(
        region,
        userspace_window=vm.next_window() if region.userspace or gmem_only else None,
        guest_view_window=vm.next_window() if region.has_gmem else None,
        gmem_only=gmem_only,
    )
    try:
        yield from _map(vm, slot)
    except BaseException:
        yield from _unmap(vm, slot)
        yield from _unbind(vm, slot)
        raise
    vm.memslots.put(slot)


def _require_backing(vm: Vm, region: Region) -> Op[None]:
    vm.require_guest()
    if region.userspace is not None:
        yield from perform(RequireDescriptor(region.userspace.descriptor))


def _move(vm: Vm, region: Region) -> Op[None]:
    """Give a slot without guest_memfd another guest address."""
    yield from _require_backing(vm, region)
    old = vm.memslots.get(region.slot)
    assert old is not None
    window = vm.next_window() if region.userspace else None
    slot = Memslot(region, window, None)
    try:
        yield from _map(vm, slot)
    except BaseException:
        yield from _unmap(vm, slot)
        raise
    yield from vm.changing(old.gfns, _replace(vm, old, slot))


def _delete(vm: Vm, region: Region) -> Op[None]:
    yield from delete_memslot(vm, region.slot)


def _set_flags(vm: Vm, region: Region) -> Op[None]:
    old = vm.memslots.get(region.slot)
    assert old is not None
    vm.memslots.put(Memslot(region, old.userspace_window, None))
    yield from ()


def _leave(vm: Vm, region: Region) -> Op[None]:
    del vm, region
    yield from ()


CHANGES: Final[dict[Change, Callable[[Vm, Region], Op[None]]]] = {
    Change.CREATE: _create,
    Change.DELETE: _delete,
    Change.MOVE: _move,
    Change.FLAGS_ONLY: _set_flags,
    Change.NONE: _leave,
}
"""What each change of a memslot does; the caller holds slots_lock."""


def _replace(vm: Vm, old: Memslot, new: Memslot) -> Op[None]:
    vm.memslots.put(new)
    yield from _unmap(vm, old)


def delete_memslot(vm: Vm, slot: int) -> Op[None]:
    """Take a memslot out; the memory stays. The caller holds slots_lock."""
    old = vm.memslots.remove(slot)
    yield from vm.changing(old.gfns, _unmap(vm, old))
    yield from _unbind(vm, old)


def _map(vm: Vm, slot: Memslot) -> Op[None]:
    region, base = slot.region, slot.gfns.start
    if slot.gmem_only:
        assert slot.userspace_window is not None
        shared = MapHostView(
            vm.name,
            slot.userspace_window,
            base,
            region.memory_size,
            region.guest_memfd,
            region.guest_memfd_offset,
        )
        yield from perform(shared)
    elif slot.userspace_window is not None:
        assert region.userspace is not None
        side = region.userspace
        effect = MapUserspace(
            vm.name,
            slot.userspace_window,
            base,
            region.memory_size,
            side.descriptor,
            side.offset,
        )
        yield from perform(effect)
    if slot.guest_view_window is not None:
        view = MapGuestView(
            vm.name,
            slot.guest_view_window,
            base,
            region.memory_size,
            region.guest_memfd,
            region.guest_memfd_offset,
        )
        yield from perform(view)


def _unmap(vm: Vm, slot: Memslot) -> Op[None]:
    for window in (slot.userspace_window, slot.guest_view_window):
        if window is not None:
            yield from perform(UnmapWindow(vm.name, window))


def _identify(vm: Vm, region: Region) -> Op[FileIdentity | None]:
    side = region.userspace
    if side is None or not vm.rules.looks_at_userspace:
        return None
    return (yield from perform(IdentifyDescriptor(side.descriptor, side.offset)))


def _bind(vm: Vm, region: Region, userspace: FileIdentity | None) -> BindSlot:
    return BindSlot(
        name=region.guest_memfd,
        vm=vm.name,
        slot=region.slot,
        base_gfn=region.gfns.start,
        offset=region.guest_memfd_offset,
        size=region.memory_size,
        host_faultable=vm.traits.host_faultable,
        userspace=userspace,
    )


def _unbind(vm: Vm, slot: Memslot) -> Op[None]:
    if not slot.has_gmem:
        return
    name = slot.region.guest_memfd
    try:
        yield from perform(UnbindSlot(name, vm.name, slot.region.slot))
    except KernelError as error:
        if error.reason not in ALREADY_UNBOUND:
            raise
