"""The inodes on the wire: read the request, run the operation, write the answer.

Refusals, request ids and revisions are the runtime's; what each rpc refuses stands in
the tables of the .proto.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc

from gmem.api.guest_memfd.v1 import guest_memfd_pb2 as pb
from gmem.api.guest_memfd.v1 import guest_memfd_pb2_grpc as pb_grpc
from gmem.guest_memfd import codec, streams
from gmem.guest_memfd.core.inode import InodeOptions
from gmem.guest_memfd.core.inodes import ByteRange
from gmem.guest_memfd.core.values import UserspaceSide, ViewKind
from gmem.guest_memfd.service import GuestMemfdService
from gmem.runtime.paging import paginate
from gmem.runtime.server import Runtime
from gmem.uapi.errors import BadRequest, Reason
from gmem.uapi.flags import Faultability
from gmem.uapi.pages import PAGE_SIZE, PAGE_SIZES, Gfn

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_VIEWS = {pb.VIEW_HOST: ViewKind.HOST, pb.VIEW_GUEST: ViewKind.GUEST}


def serve(runtime: Runtime, service: GuestMemfdService, mapped_source: str) -> None:
    """Serve `service` on the server of `runtime`."""
    descriptor = pb.DESCRIPTOR.services_by_name["GuestMemfdService"]
    servicer = GuestMemfdServicer(runtime, service, mapped_source)
    add = pb_grpc.add_GuestMemfdServiceServicer_to_server
    runtime.add(add, servicer, descriptor)


class GuestMemfdServicer(pb_grpc.GuestMemfdServiceServicer):
    """The methods of the rpcs."""

    def __init__(
        self, runtime: Runtime, service: GuestMemfdService, mapped_source: str
    ) -> None:
        self._runtime = runtime
        self._service = service
        self._core = service.core
        self._names = service.names
        self._mapped_source = mapped_source

    # What can be watched.

    async def GetCapabilities(
        self, request: pb.GetCapabilitiesRequest, context: Context
    ) -> pb.GetCapabilitiesResponse:
        """Say what this host emulates, and what enforces it."""
        capabilities = self._runtime.capabilities(
            page_sizes=PAGE_SIZES,
            data_plane=self._service.session.backend,
            mapped_source=self._mapped_source,
            broker_path=str(self._service.broker.path),
        )
        return pb.GetCapabilitiesResponse(capabilities=capabilities)

    async def GetGuestMemfd(
        self, request: pb.GetGuestMemfdRequest, context: Context
    ) -> pb.GetGuestMemfdResponse:
        """Return one inode's snapshot."""
        number = self._names.inode(request.name)
        await self._service.accounting.settle([number])
        wire = self._snapshot(number)
        return pb.GetGuestMemfdResponse(guest_memfd=wire)

    async def ListGuestMemfds(
        self, request: pb.ListGuestMemfdsRequest, context: Context
    ) -> pb.ListGuestMemfdsResponse:
        """Return the inodes by number."""
        await self._service.accounting.settle(self._core.numbers)
        # One step: an inode may be evicted by another thread at any moment.
        with self._service.mutex:
            numbers, token = paginate(
                self._core.numbers,
                page_size=request.page_size,
                page_token=request.page_token,
                scope="guestMemfds",
                key=lambda number: number,
            )
            wire = [self._to_wire(number) for number in numbers]
        return pb.ListGuestMemfdsResponse(guest_memfds=wire, next_page_token=token)

    async def Watch(
        self, request: pb.WatchRequest, context: Context
    ) -> AsyncGenerator[pb.WatchResponse]:
        """Tell what changes, from a revision on."""
        events = self._runtime.events.watch(request.start_revision)
        async with aclosing(events) as batches:
            async for batch in batches:
                yield pb.WatchResponse(revision=batch[-1].revision, events=batch)

    # Life.

    async def CreateGuestMemfd(
        self, request: pb.CreateGuestMemfdRequest, context: Context
    ) -> pb.CreateGuestMemfdResponse:
        """Make an inode."""
        options = InodeOptions(
            size=request.size,
            page_size=request.page_size or PAGE_SIZE,
            lineage=codec.lineage_from_wire(request.lineage),
            vm=request.vm,
            mempolicy=codec.mempolicy_from_wire(request.mempolicy),
            support_shared=request.support_shared,
            init_private=request.init_private,
            mmap=request.mmap,
            init_shared=request.init_shared,
            private_memory=not request.no_private_memory,
            cgroup=request.cgroup,
        )
        number = await self._service.run(self._core.create(options))
        self._service.record(
            "inode.created", number, size=options.size, page_size=options.page_size
        )
        return pb.CreateGuestMemfdResponse(guest_memfd=self._snapshot(number))

    async def DeleteGuestMemfd(
        self, request: pb.DeleteGuestMemfdRequest, context: Context
    ) -> pb.DeleteGuestMemfdResponse:
        """Close the file of an inode."""
        number = self._names.inode(request.name)
        await self._service.accounting.settle([number])
        await self._service.run(self._core.close(number))
        self._service.record("inode.closed", number)
        return pb.DeleteGuestMemfdResponse()

    async def OpenView(
        self, request: pb.OpenViewRequest, context: Context
    ) -> pb.OpenViewResponse:
        """Mint a token for a view."""
        view = _view_from_wire(request.view)
        number = self._names.inode(request.name, unknown=Reason.FD_UNKNOWN)
        token = self._service.mint(
            number, view, vm=request.vm, guest_pid=request.guest_pid
        )
        path = str(self._service.broker.path)
        return pb.OpenViewResponse(token=token, broker_path=path)

    # Memory.

    async def Fallocate(
        self, request: pb.FallocateRequest, context: Context
    ) -> pb.FallocateResponse:
        """Allocate a range, or punch a hole."""
        number = self._names.inode(request.name)
        await self._service.accounting.settle([number])
        await self._service.run(
            self._core.fallocate(number, request.mode, request.offset, request.length)
        )
        self._service.record(
            "inode.fallocated",
            number,
            mode=request.mode,
            offset=hex(request.offset),
            length=hex(request.length),
        )
        return pb.FallocateResponse()

    async def GetPfn(
        self, request: pb.GetPfnRequest, context: Context
    ) -> pb.GetPfnResponse:
        """Hand a page to a guest."""
        number = self._names.inode(request.name)
        outcome = await self._service.run(
            self._core.get_pfn(
                number,
                request.vm,
                request.slot,
                Gfn(request.gfn),
                meant=codec.meant_from_wire(request.meant),
                nr_pages=request.npages,
            )
        )
        return codec.page_to_wire(outcome)

    async def ConvertRange(
        self, request: pb.ConvertRangeRequest, context: Context
    ) -> pb.ConvertRangeResponse:
        """Convert ranges, all or nothing."""
        ranges = [self._range(wire) for wire in request.ranges]
        to = Faultability.ALL if request.to_shared else Faultability.GUEST
        await self._service.accounting.settle({target.inode for target in ranges})
        await self._service.run_in_worker(
            self._core.convert(
                ranges,
                to,
                validate_only=request.validate_only,
                wait_ms=request.wait_ms if request.HasField("wait_ms") else None,
            )
        )
        if not request.validate_only:
            for target in ranges:
                self._service.record(
                    "inode.converted",
                    target.inode,
                    offset=hex(target.offset),
                    size=hex(target.size),
                    to="shared" if request.to_shared else "private",
                )
        return pb.ConvertRangeResponse()

    async def PopulateRange(
        self, request: pb.PopulateRangeRequest, context: Context
    ) -> pb.PopulateRangeResponse:
        """Write launch-time content into private pages."""
        number = self._names.inode(request.name)
        target = ByteRange(number, request.offset, request.size)
        # Refused before a folio is allocated for it.
        self._service.broker.descriptor(request.descriptor)
        await self._service.run(
            self._core.populate(target, request.descriptor, request.source_offset)
        )
        self._service.record(
            "inode.populated", number, offset=hex(request.offset), size=request.size
        )
        return pb.PopulateRangeResponse()

    async def SetMempolicy(
        self, request: pb.SetMempolicyRequest, context: Context
    ) -> pb.SetMempolicyResponse:
        """Give a range a memory policy."""
        policy = codec.mempolicy_from_wire(request.mempolicy)
        number = self._names.inode(request.name)
        target = ByteRange(number, request.offset, request.size)
        await self._service.run(self._core.set_mempolicy(target, policy))
        self._service.record(
            "inode.mempolicy_set",
            number,
            offset=hex(request.offset),
            size=hex(request.size),
            mode=policy.mode.value,
        )
        return pb.SetMempolicyResponse()

    async def GetMempolicy(
        self, request: pb.GetMempolicyRequest, context: Context
    ) -> pb.GetMempolicyResponse:
        """Return the memory policies of a range."""
        number = self._names.inode(request.name)
        target = ByteRange(number, request.offset, request.size)
        with self._service.mutex:
            runs = self._core.mempolicies(target)
        wire = [codec.mempolicy_run_to_wire(*run) for run in runs]
        return pb.GetMempolicyResponse(runs=wire)

    async def ReadRange(
        self, request: pb.ReadRangeRequest, context: Context
    ) -> AsyncGenerator[pb.ReadRangeResponse]:
        """Stream bytes of shared pages."""
        async with aclosing(streams.read(self._service, self._target(request))) as all_:
            async for response in all_:
                yield response

    async def WriteRange(
        self, request_iterator: AsyncIterator[pb.WriteRangeRequest], context: Context
    ) -> pb.WriteRangeResponse:
        """Store a stream of bytes in shared pages."""
        first = await anext(request_iterator)
        target = self._target(first.header)
        await streams.write(self._service, target, request_iterator)
        self._service.record(
            "inode.written", target.inode, offset=hex(target.offset), size=target.size
        )
        return pb.WriteRangeResponse(stored=target.size)

    # Memslots.

    async def BindMemslot(
        self, request: pb.BindMemslotRequest, context: Context
    ) -> pb.BindMemslotResponse:
        """Bind a memslot's pages."""
        number = self._names.file(request.name)
        await self._service.accounting.settle([number])
        await self._service.run(
            self._core.bind(
                number,
                request.vm,
                request.slot,
                base_gfn=Gfn(request.base_gfn),
                offset=request.offset,
                size=request.size,
                host_faultable=request.host_faultable,
                vmm_target=request.vmm_target,
                userspace=self._userspace(request),
            )
        )
        self._service.record("inode.bound", number, vm=request.vm, slot=request.slot)
        supports = self._core.supports_shared(number)
        return pb.BindMemslotResponse(support_shared=supports)

    async def UnbindMemslot(
        self, request: pb.UnbindMemslotRequest, context: Context
    ) -> pb.UnbindMemslotResponse:
        """Remove a binding."""
        number = self._names.inode(request.name)
        await self._service.run(self._core.unbind(number, request.vm, request.slot))
        self._service.record("inode.unbound", number, vm=request.vm, slot=request.slot)
        return pb.UnbindMemslotResponse()

    # Holds.

    async def PinPages(
        self, request: pb.PinPagesRequest, context: Context
    ) -> pb.PinPagesResponse:
        """Take a named hold on shared pages."""
        kind = codec.hold_kind_from_wire(request.kind)
        target = ByteRange(
            self._names.inode(request.name), request.offset, request.size
        )
        caller = request.request_id
        await self._service.accounting.settle([target.inode])
        hold = await self._service.run(
            self._core.pin(
                target,
                kind,
                holder=request.holder or caller.client,
                client=f"{caller.client}/{caller.incarnation}",
                ttl_ms=request.ttl_ms,
            )
        )
        self._service.record(
            "inode.pinned", target.inode, hold=hold, holder=request.holder
        )
        return pb.PinPagesResponse(hold=hold)

    async def KeepAlive(
        self, request: pb.KeepAliveRequest, context: Context
    ) -> pb.KeepAliveResponse:
        """Let leases begin anew."""
        await self._service.run(self._core.keep_alive(request.holds))
        return pb.KeepAliveResponse()

    async def UnpinPages(
        self, request: pb.UnpinPagesRequest, context: Context
    ) -> pb.UnpinPagesResponse:
        """End a hold."""
        await self._service.run(self._core.unpin(request.hold))
        return pb.UnpinPagesResponse()

    # Memory errors.

    async def InjectMemoryError(
        self, request: pb.InjectMemoryErrorRequest, context: Context
    ) -> pb.InjectMemoryErrorResponse:
        """Poison a page."""
        number = self._names.inode(request.name)
        kill = codec.kill_policy_from_wire(request.kill_policy)
        failure = await self._service.run(
            self._core.inject_memory_error(number, request.offset, kill)
        )
        self._service.record("inode.poisoned", number, offset=hex(request.offset))
        return codec.failure_to_wire(failure)

    async def UnpoisonMemory(
        self, request: pb.UnpoisonMemoryRequest, context: Context
    ) -> pb.UnpoisonMemoryResponse:
        """Forget the error of a page."""
        number = self._names.inode(request.name)
        pfn = await self._service.run(self._core.unpoison(number, request.offset))
        self._service.record("inode.unpoisoned", number, offset=hex(request.offset))
        return pb.UnpoisonMemoryResponse(pfn=pfn)

    # What dead inodes left behind.

    async def GetOperation(
        self, request: pb.GetOperationRequest, context: Context
    ) -> pb.GetOperationResponse:
        """Return how far a deferred merge is."""
        number = self._names.operation(request.name)
        with self._service.mutex:
            status = self._core.deferred.status(number)
        operation = codec.operation_to_wire(status, self._names)
        return pb.GetOperationResponse(operation=operation)

    async def ListOperations(
        self, request: pb.ListOperationsRequest, context: Context
    ) -> pb.ListOperationsResponse:
        """Return the deferred merges by number."""
        deferred = self._core.deferred
        with self._service.mutex:
            numbers, token = paginate(
                deferred.numbers,
                page_size=request.page_size,
                page_token=request.page_token,
                scope="operations",
                key=lambda number: number,
            )
            statuses = [deferred.status(number) for number in numbers]
        wire = [codec.operation_to_wire(status, self._names) for status in statuses]
        return pb.ListOperationsResponse(operations=wire, next_page_token=token)

    def _userspace(self, request: pb.BindMemslotRequest) -> UserspaceSide | None:
        if not request.HasField("userspace"):
            return None
        side = request.userspace
        inode = self._service.session.inode_of(side.st_dev, side.st_ino)
        return UserspaceSide(inode, side.offset)

    def _target(self, wire: pb.ReadRangeRequest | pb.WriteRangeHeader) -> ByteRange:
        number = self._names.inode(wire.name, unknown=Reason.FD_UNKNOWN)
        return ByteRange(number, wire.offset, wire.size)

    def _range(self, wire: pb.Range) -> ByteRange:
        return ByteRange(self._names.inode(wire.name), wire.offset, wire.size)

    def _snapshot(self, number: int) -> pb.GuestMemfd:
        with self._service.mutex:
            return self._to_wire(number)

    def _to_wire(self, number: int) -> pb.GuestMemfd:
        """Return an inode's message; the mutex is held."""
        inode = self._core.inode(number)
        return codec.inode_to_wire(
            inode.statistics(), self._names, inode.faultability.fragment_bytes
        )


def _view_from_wire(view: pb.View.ValueType) -> ViewKind:
    if view not in _VIEWS:
        raise BadRequest(
            Reason.ARGUMENT_INVALID,
            f"view {view} is no view: say VIEW_HOST or VIEW_GUEST",
        )
    return _VIEWS[view]
