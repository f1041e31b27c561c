"""Who performs the core's effects: guest_memfd by RPC, the guest process by message.

Local are those that neither wait nor fail: a notice, an unmap, a look at our broker.
Conversions may write back gigabytes; their calls wait as long as the service lives.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Callable, Iterable
from typing import Final

from gmem.api.guest_memfd.v1 import guest_memfd_pb2 as pb
from gmem.client import GuestMemfdClient
from gmem.runtime.broker import Broker
from gmem.runtime.performer import Performer
from gmem.uapi.errors import BadRequest, InUse, Reason
from gmem.uapi.pages import U64_LIMIT
from gmem.vmm.core.effects import (
    BindSlot,
    Convert,
    CreateFile,
    EndGuest,
    FileIdentity,
    FileRange,
    Frame,
    GetPfn,
    IdentifyDescriptor,
    MapGuestView,
    MapHostView,
    MapUserspace,
    NotifyGuest,
    Pause,
    Populate,
    RequireDescriptor,
    StartGuest,
    StartWait,
    UnbindSlot,
    UnmapWindow,
    WaitConvertible,
)
from gmem.vmm.guest.messages import MapView, MapWindow, Unmap
from gmem.vmm.guests import Guests

_MEANT: Final = {
    None: pb.MEANT_UNSPECIFIED,
    False: pb.MEANT_PRIVATE,
    True: pb.MEANT_SHARED,
}
LONG_SECONDS: Final = 600.0
"""One attempt of a call that moves bytes; 1 GiB of dirty pages takes 8 s."""


class GuestMemfdPort:
    """Effects that the guest_memfd service answers."""

    def __init__(self, client: GuestMemfdClient, vmm_target: Callable[[], str]) -> None:
        """`vmm_target` says where InvalidateBegin and InvalidateEnd are answered."""
        self._client = client
        self._vmm_target = vmm_target

    def register(self, performer: Performer) -> None:
        """Answer the effects of this port through `performer`."""
        performer.register_remote(CreateFile, self.create_file)
        performer.register_remote(BindSlot, self.bind_slot)
        performer.register_remote(UnbindSlot, self.unbind_slot)
        performer.register_remote(GetPfn, self.get_pfn)
        performer.register_remote(Convert, self.convert)
        performer.register_local(StartWait, self.start_wait)
        performer.register_remote(Pause, self.pause)
        performer.register_remote(WaitConvertible, self.wait_convertible)
        performer.register_remote(Populate, self.populate)

    async def create_file(self, effect: CreateFile) -> str:
        """CreateGuestMemfd; return the name."""
        made = await self._client.create_guest_memfd(
            size=effect.size,
            page_size=effect.page_size,
            lineage=effect.lineage.value,
            vm=effect.vm,
            support_shared=effect.support_shared,
            init_private=effect.init_private,
            mmap=effect.mmap,
            init_shared=effect.init_shared,
            no_private_memory=not effect.private_memory,
            cgroup=effect.cgroup,
        )
        return made.name

    async def bind_slot(self, effect: BindSlot) -> bool:
        """BindMemslot."""
        side = effect.userspace
        return await self._client.bind_memslot(
            name=effect.name,
            vm=effect.vm,
            slot=effect.slot,
            base_gfn=effect.base_gfn,
            offset=_loff(effect.offset),
            size=effect.size,
            host_faultable=effect.host_faultable,
            vmm_target=self._vmm_target(),
            userspace=None
            if side is None
            else pb.UserspaceSide(
                st_dev=side.st_dev, st_ino=side.st_ino, offset=side.offset
            ),
        )

    async def unbind_slot(self, effect: UnbindSlot) -> None:
        """UnbindMemslot."""
        await self._client.unbind_memslot(
            name=effect.name, vm=effect.vm, slot=effect.slot
        )

    async def get_pfn(self, effect: GetPfn) -> Frame:
        """GetPfn."""
        found = await self._client.get_pfn(
            name=effect.name,
            vm=effect.vm,
            slot=effect.slot,
            gfn=effect.gfn,
            meant=_MEANT[effect.meant_shared],
            npages=effect.npages,
        )
        return Frame(
            found.pfn,
            found.order,
            shared=found.shared,
            npages=found.npages,
            matches=not found.wrong_access,
        )

    async def convert(self, effect: Convert) -> None:
        """ConvertRange, of all files at once."""
        await self._client.convert_range(
            ranges=_ranges(effect.ranges),
            to_shared=effect.to_shared,
            validate_only=effect.validate_only,
            wait_ms=None if effect.undone else 0,
            timeout=LONG_SECONDS,
        )

    def start_wait(self, effect: StartWait) -> int:
        """Return an instant of our clock in milliseconds."""
        return _milliseconds() + effect.milliseconds

    async def pause(self, effect: Pause) -> None:
        """Sleep."""
        await asyncio.sleep(effect.milliseconds / 1000)

    async def wait_convertible(self, effect: WaitConvertible) -> None:
        """ConvertRange that only waits; its answer is DEADLINE when time is up."""
        await self._client.convert_range(
            ranges=_ranges(effect.ranges),
            to_shared=effect.to_shared,
            validate_only=True,
            wait_ms=max(0, effect.instant - _milliseconds()),
        )

    async def populate(self, effect: Populate) -> None:
        """PopulateRange."""
        await self._client.populate_range(
            name=effect.target.name,
            offset=effect.target.offset,
            size=effect.target.size,
            descriptor=effect.descriptor,
            source_offset=effect.source_offset,
            timeout=LONG_SECONDS,
        )


class GuestPort:
    """Effects that the guest process answers."""

    def __init__(
        self,
        guests: Guests,
        broker: Broker,
        client: GuestMemfdClient,
        *,
        name: str,
        incarnation: str,
    ) -> None:
        """`name` and `incarnation` are this vmm's; guest processes add a number."""
        self._guests = guests
        self._broker = broker
        self._client = client
        self._name = name
        self._incarnation = incarnation
        self._numbers = itertools.count()

    def register(self, performer: Performer) -> None:
        """Answer the effects of this port through `performer`."""
        performer.register_local(RequireDescriptor, self.require_descriptor)
        performer.register_local(UnmapWindow, self.unmap_window)
        performer.register_local(NotifyGuest, self.notify)
        performer.register_remote(StartGuest, self.start)
        performer.register_remote(EndGuest, self.end)
        performer.register_remote(MapUserspace, self.map_userspace)
        performer.register_remote(MapGuestView, self.map_guest_view)
        performer.register_remote(MapHostView, self.map_host_view)
        performer.register_remote(IdentifyDescriptor, self.identify)

    def require_descriptor(self, effect: RequireDescriptor) -> None:
        """Look a descriptor up. Raises NoSuchObject (DESCRIPTOR_UNKNOWN)."""
        self._broker.descriptor(effect.descriptor)

    def unmap_window(self, effect: UnmapWindow) -> None:
        """Tell the guest process."""
        guest = self._guests.find(effect.vm)
        if guest is not None:
            guest.send(Unmap(effect.window))

    def notify(self, effect: NotifyGuest) -> None:
        """Tell the guest process."""
        guest = self._guests.find(effect.vm)
        if guest is not None:
            guest.notify(effect.notice)

    async def start(self, effect: StartGuest) -> int:
        """Spawn the guest process; return its pid."""
        client = f"{self._name}-guest-{effect.vm.rpartition('/')[2]}"
        incarnation = f"{self._incarnation}-{next(self._numbers)}"
        return await self._guests.start(effect.vm, client, incarnation)

    async def end(self, effect: EndGuest) -> None:
        """End the guest process."""
        await self._guests.end(effect.vm)

    async def map_userspace(self, effect: MapUserspace) -> None:
        """Send it a client's descriptor. Raises ARGUMENT_INVALID, GUEST_GONE."""
        given = self._broker.descriptor(effect.descriptor)
        message = MapWindow(effect.window, effect.base_gfn, effect.size, effect.offset)
        guest = self._guests.get(effect.vm)
        problem = await guest.map(message, effect.window, given.fd)
        guest.require_alive()
        if problem:
            raise BadRequest(
                Reason.ARGUMENT_INVALID,
                f"{effect.descriptor} ({given.label}) from byte {effect.offset:#x} on "
                f"cannot back the memslot: {problem}; give a file that is long enough",
            )

    async def identify(self, effect: IdentifyDescriptor) -> FileIdentity:
        """Look at a client's descriptor. Raises NoSuchObject (DESCRIPTOR_UNKNOWN)."""
        fd = os.dup(self._broker.descriptor(effect.descriptor).fd)
        try:
            # It may be a view, where any system call may wait for guest_memfd.
            found = await asyncio.to_thread(os.fstat, fd)
        finally:
            await asyncio.to_thread(os.close, fd)
        return FileIdentity(found.st_dev, found.st_ino, effect.offset)

    async def map_guest_view(self, effect: MapGuestView) -> None:
        """Let the guest process take its view; BINDING_BROKEN, GUEST_GONE."""
        await self._map_view(effect, pb.VIEW_GUEST)

    async def map_host_view(self, effect: MapHostView) -> None:
        """Let the guest process take the host's view; as map_guest_view."""
        await self._map_view(effect, pb.VIEW_HOST)

    async def _map_view(
        self, effect: MapGuestView | MapHostView, view: pb.View.ValueType
    ) -> None:
        guest = self._guests.get(effect.vm)
        guest.require_alive()
        opened = await self._client.open_view(
            name=effect.name, view=view, vm=effect.vm, guest_pid=guest.pid
        )
        message = MapView(
            effect.window,
            effect.base_gfn,
            effect.size,
            effect.offset,
            opened.token,
            opened.broker_path,
        )
        problem = await guest.map(message, effect.window)
        guest.require_alive()
        if problem:
            raise InUse(
                Reason.BINDING_BROKEN,
                f"the guest process cannot map {effect.name}: {problem}; see the log "
                "of guest_memfd, then set the memslot again",
            )


def _ranges(ranges: Iterable[FileRange]) -> list[pb.Range]:
    return [
        pb.Range(name=part.name, offset=part.offset, size=part.size) for part in ranges
    ]


def _milliseconds() -> int:
    return int(time.monotonic() * 1000)


def _loff(offset: int) -> int:
    """Return the loff_t that the kernel makes of an unsigned offset: maybe negative."""
    return offset - U64_LIMIT if offset >= U64_LIMIT >> 1 else offset
