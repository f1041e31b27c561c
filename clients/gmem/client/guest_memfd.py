"""The guest_memfd service as Python calls: inodes, conversions, holds, views."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing
from functools import cached_property, partial
from mmap import mmap
from typing import Final, TypeAlias

from gmem.api.guest_memfd.v1 import guest_memfd_pb2 as pb
from gmem.api.guest_memfd.v1 import guest_memfd_pb2_grpc as pb_grpc
from gmem.api.types.v1.types_pb2 import Capabilities, MemPolicy, RequestId
from gmem.client.base import ServiceClient
from gmem.uapi.pages import cut

Bytes: TypeAlias = bytes | bytearray | memoryview | mmap
"""What has bytes that can be looked at without a copy."""

PART_BYTES: Final = 1 << 20
"""Bytes of one message of WriteRange."""


class GuestMemfdClient(ServiceClient):
    """The inodes of one emulated host; offsets and sizes in bytes."""

    SERVICE = "guest_memfd"

    @cached_property
    def _stub(self) -> pb_grpc.GuestMemfdServiceAsyncStub:
        return pb_grpc.GuestMemfdServiceStub(self.connection.channel)

    async def get_capabilities(self, *, timeout: float | None = None) -> Capabilities:
        """Return what this host emulates, and where the broker is."""
        request = pb.GetCapabilitiesRequest()
        method = self._stub.GetCapabilities
        response = await self.connection.call(method, request, timeout=timeout)
        return response.capabilities

    async def create_guest_memfd(
        self,
        *,
        size: int,
        page_size: int,
        lineage: str = "",
        vm: str = "",
        mempolicy: MemPolicy | None = None,
        support_shared: bool = False,
        init_private: bool = False,
        mmap: bool = False,
        init_shared: bool = False,
        no_private_memory: bool = False,
        cgroup: str = "",
        request_id: RequestId | None = None,
    ) -> pb.GuestMemfd:
        """Make an inode; its pages are reserved at once, and charged to `cgroup`."""
        request = pb.CreateGuestMemfdRequest(
            size=size,
            page_size=page_size,
            lineage=lineage,
            vm=vm,
            mempolicy=mempolicy,
            support_shared=support_shared,
            init_private=init_private,
            mmap=mmap,
            init_shared=init_shared,
            no_private_memory=no_private_memory,
            cgroup=cgroup,
        )
        method = self._stub.CreateGuestMemfd
        return (await self.connection.mutate(method, request, request_id)).guest_memfd

    async def get_guest_memfd(self, name: str) -> pb.GuestMemfd:
        """Return one inode's state (fstat, and what the kernel does not show)."""
        request = pb.GetGuestMemfdRequest(name=name)
        response = await self.connection.call(self._stub.GetGuestMemfd, request)
        return response.guest_memfd

    async def list_guest_memfds(self) -> list[pb.GuestMemfd]:
        """Return all inodes, by number."""
        inodes: list[pb.GuestMemfd] = []
        token = ""
        while True:
            request = pb.ListGuestMemfdsRequest(page_token=token)
            response = await self.connection.call(self._stub.ListGuestMemfds, request)
            inodes += response.guest_memfds
            token = response.next_page_token
            if not token:
                return inodes

    async def delete_guest_memfd(
        self, *, name: str, request_id: RequestId | None = None
    ) -> None:
        """Close the gmem file; the inode goes with its last reference."""
        request = pb.DeleteGuestMemfdRequest(name=name)
        method = self._stub.DeleteGuestMemfd
        await self.connection.mutate(method, request, request_id)

    async def fallocate(
        self,
        *,
        name: str,
        mode: int,
        offset: int,
        length: int,
        request_id: RequestId | None = None,
    ) -> None:
        """Allocate a range, or drop it (PUNCH_HOLE), as fallocate does."""
        request = pb.FallocateRequest(
            name=name, mode=mode, offset=offset, length=length
        )
        await self.connection.mutate(self._stub.Fallocate, request, request_id)

    async def bind_memslot(
        self,
        *,
        name: str,
        vm: str,
        slot: int,
        base_gfn: int,
        offset: int,
        size: int,
        host_faultable: bool = False,
        vmm_target: str = "",
        userspace: pb.UserspaceSide | None = None,
        request_id: RequestId | None = None,
    ) -> bool:
        """Bind a memslot to a range (kvm_gmem_bind).

        Return whether the guest's shared accesses come from the file too.
        """
        request = pb.BindMemslotRequest(
            name=name,
            vm=vm,
            slot=slot,
            base_gfn=base_gfn,
            offset=offset,
            size=size,
            host_faultable=host_faultable,
            vmm_target=vmm_target,
            userspace=userspace,
        )
        method = self._stub.BindMemslot
        response = await self.connection.mutate(method, request, request_id)
        return response.support_shared

    async def unbind_memslot(
        self, *, name: str, vm: str, slot: int, request_id: RequestId | None = None
    ) -> None:
        """Undo a binding (kvm_gmem_unbind)."""
        request = pb.UnbindMemslotRequest(name=name, vm=vm, slot=slot)
        await self.connection.mutate(self._stub.UnbindMemslot, request, request_id)

    async def get_pfn(
        self,
        *,
        name: str,
        vm: str,
        slot: int,
        gfn: int,
        meant: pb.Meant.ValueType = pb.MEANT_UNSPECIFIED,
        npages: int = 1,
    ) -> pb.GetPfnResponse:
        """Return pfn and order for a guest frame, allocating it (kvm_gmem_get_pfn)."""
        request = pb.GetPfnRequest(
            name=name, vm=vm, slot=slot, gfn=gfn, meant=meant, npages=npages
        )
        return await self.connection.call(self._stub.GetPfn, request)

    async def convert_range(
        self,
        *,
        ranges: Iterable[pb.Range],
        to_shared: bool,
        validate_only: bool = False,
        wait_ms: int | None = None,
        timeout: float | None = None,
        request_id: RequestId | None = None,
    ) -> None:
        """Change the faultability of ranges: all or nothing, but in IN_PLACE.

        There each range, and in files of huge pages each of these, is for itself.

        With `wait_ms` it waits for whoever holds the pages; `timeout` is then counted
        from the end of that wait, where it is not given.
        """
        request = pb.ConvertRangeRequest(
            ranges=ranges,
            to_shared=to_shared,
            validate_only=validate_only,
            wait_ms=wait_ms,
        )
        timeout = self.connection.patience.beyond(wait_ms, timeout)
        method = self._stub.ConvertRange
        await self.connection.mutate(method, request, request_id, timeout=timeout)

    async def set_mempolicy(
        self,
        *,
        name: str,
        offset: int,
        size: int,
        mempolicy: MemPolicy,
        request_id: RequestId | None = None,
    ) -> None:
        """Give a range a memory policy, for what is allocated later (mbind)."""
        request = pb.SetMempolicyRequest(
            name=name, offset=offset, size=size, mempolicy=mempolicy
        )
        await self.connection.mutate(self._stub.SetMempolicy, request, request_id)

    async def get_mempolicy(
        self, *, name: str, offset: int, size: int
    ) -> tuple[pb.MempolicyRun, ...]:
        """Return the memory policies of a range, as runs (get_mempolicy)."""
        request = pb.GetMempolicyRequest(name=name, offset=offset, size=size)
        return tuple(
            (await self.connection.call(self._stub.GetMempolicy, request)).runs
        )

    async def populate_range(
        self,
        *,
        name: str,
        offset: int,
        size: int,
        descriptor: str,
        source_offset: int = 0,
        timeout: float | None = None,
        request_id: RequestId | None = None,
    ) -> None:
        """Copy launch-time content into private memory (kvm_gmem_populate)."""
        request = pb.PopulateRangeRequest(
            name=name,
            offset=offset,
            size=size,
            descriptor=descriptor,
            source_offset=source_offset,
        )
        method = self._stub.PopulateRange
        await self.connection.mutate(method, request, request_id, timeout=timeout)

    async def pin_pages(
        self,
        *,
        name: str,
        offset: int,
        size: int,
        holder: str,
        kind: pb.HoldKind.ValueType = pb.HOLD_KIND_PIN,
        ttl_ms: int = 0,
        request_id: RequestId | None = None,
    ) -> int:
        """Hold pages in the name of `holder`; return the hold's number.

        With `ttl_ms` the hold ends when keep_alive() has not named it for so long.
        """
        request = pb.PinPagesRequest(
            name=name,
            offset=offset,
            size=size,
            kind=kind,
            holder=holder,
            ttl_ms=ttl_ms,
        )
        method = self._stub.PinPages
        return (await self.connection.mutate(method, request, request_id)).hold

    async def keep_alive(self, *, holds: Iterable[int]) -> None:
        """Let the leases of holds begin anew; HOLDER_UNKNOWN when one has run out."""
        request = pb.KeepAliveRequest(holds=holds)
        await self.connection.call(self._stub.KeepAlive, request)

    async def unpin_pages(
        self, *, hold: int, request_id: RequestId | None = None
    ) -> None:
        """Let go of a hold."""
        request = pb.UnpinPagesRequest(hold=hold)
        await self.connection.mutate(self._stub.UnpinPages, request, request_id)

    async def inject_memory_error(
        self,
        *,
        name: str,
        offset: int,
        kill_policy: pb.KillPolicy.ValueType = pb.KILL_POLICY_UNSPECIFIED,
        request_id: RequestId | None = None,
    ) -> pb.InjectMemoryErrorResponse:
        """Give the page at `offset` a memory error; guest and host lose it.

        PAGE_POISONED where it has one, FOLIO_UNKNOWN for a hole.
        """
        request = pb.InjectMemoryErrorRequest(
            name=name, offset=offset, kill_policy=kill_policy
        )
        method = self._stub.InjectMemoryError
        return await self.connection.mutate(method, request, request_id)

    async def unpoison_memory(
        self, *, name: str, offset: int, request_id: RequestId | None = None
    ) -> int:
        """Forget the memory error of a page; return its frame. FRAME_UNKNOWN."""
        request = pb.UnpoisonMemoryRequest(name=name, offset=offset)
        method = self._stub.UnpoisonMemory
        return (await self.connection.mutate(method, request, request_id)).pfn

    async def open_view(
        self,
        *,
        name: str,
        view: pb.View.ValueType = pb.VIEW_HOST,
        vm: str = "",
        guest_pid: int = 0,
        request_id: RequestId | None = None,
    ) -> pb.OpenViewResponse:
        """Return a one-time token, and the broker that gives a descriptor for it."""
        request = pb.OpenViewRequest(name=name, view=view, vm=vm, guest_pid=guest_pid)
        method = self._stub.OpenView
        return await self.connection.mutate(method, request, request_id)

    async def read_range(
        self, *, name: str, offset: int, size: int
    ) -> AsyncGenerator[bytes]:
        """Yield the bytes of shared pages in chunks; for who can map nothing.

        It goes on where it was when the service is started again in between. Close it
        after use. NotFaultable at the first private page, whose `error_offset` it has.
        """
        end = offset + size
        at = offset

        def to_come() -> pb.ReadRangeRequest | None:
            # An empty range is the service's to refuse.
            if at >= end and size:
                return None
            return pb.ReadRangeRequest(name=name, offset=at, size=end - at)

        stream = self.connection.stream_from(self._stub.ReadRange, to_come)
        async with aclosing(stream) as responses:
            async for response in responses:
                at += len(response.data)
                yield response.data

    async def write_range(
        self,
        *,
        name: str,
        offset: int,
        data: Bytes,
        timeout: float | None = None,
        request_id: RequestId | None = None,
    ) -> None:
        """Write bytes into shared pages, for who can map nothing.

        NotFaultable at the first private page (`error_offset`); `stored` of any refusal
        says how many bytes were stored before it, and are. `timeout` is that of one
        attempt: by itself that of any call, and a second for each MiB.
        """
        with memoryview(data).cast("B") as view:
            header = pb.WriteRangeHeader(
                request_id=request_id or self.new_request_id(),
                name=name,
                offset=offset,
                size=len(view),
                digest=hashlib.blake2b(view, digest_size=16).digest(),
            )
            seconds = self.connection.patience.timeout + len(view) / PART_BYTES
            await self.connection.mutate_by_stream(
                self._stub.WriteRange,
                partial(_parts, header, view),
                timeout=seconds if timeout is None else timeout,
            )

    async def get_operation(self, name: str) -> pb.Operation:
        """Return how far the work on a dead inode's split folios is."""
        request = pb.GetOperationRequest(name=name)
        response = await self.connection.call(self._stub.GetOperation, request)
        return response.operation

    async def list_operations(self) -> list[pb.Operation]:
        """Return all operations, in the order in which they began."""
        operations: list[pb.Operation] = []
        token = ""
        while True:
            request = pb.ListOperationsRequest(page_token=token)
            response = await self.connection.call(self._stub.ListOperations, request)
            operations += response.operations
            token = response.next_page_token
            if not token:
                return operations

    def watch(self, start_revision: int = 0) -> AsyncGenerator[pb.WatchResponse]:
        """Yield changes from `start_revision` (0: from now) on; close it after use."""
        request = pb.WatchRequest(start_revision=start_revision)
        return self.connection.stream(self._stub.Watch, request)


def _parts(
    header: pb.WriteRangeHeader, data: memoryview
) -> Iterator[pb.WriteRangeRequest]:
    """Yield the messages of one WriteRange, cut so that two share no page."""
    yield pb.WriteRangeRequest(header=header)
    for offset, size in cut(header.offset, header.size, PART_BYTES):
        at = offset - header.offset
        yield pb.WriteRangeRequest(data=bytes(data[at : at + size]))
