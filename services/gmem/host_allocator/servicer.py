"""The allocator on the wire: read the request, call the core, write the answer.

Refusals, request ids and revisions are the runtime's. No method awaits between reading
the counters and changing them: one call is one step, so there is no lock.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc

from gmem.api.host_allocator.v1 import host_allocator_pb2 as pb
from gmem.api.host_allocator.v1 import host_allocator_pb2_grpc as pb_grpc
from gmem.host_allocator import codec
from gmem.host_allocator.core.host_memory import HostMemory
from gmem.host_allocator.core.values import Charging, Folio, PoisonedFrame
from gmem.host_allocator.servicer_cgroups import CgroupCalls
from gmem.runtime.paging import paginate
from gmem.runtime.server import Runtime
from gmem.uapi.pages import PAGE_SIZE, PAGE_SIZES

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


async def start(runtime: Runtime, memory: HostMemory) -> None:
    """Serve `memory` on the server of `runtime`."""
    descriptor = pb.DESCRIPTOR.services_by_name["HostAllocatorService"]
    servicer = HostAllocatorServicer(runtime, memory)
    add = pb_grpc.add_HostAllocatorServiceServicer_to_server
    runtime.add(add, servicer, descriptor)


class HostAllocatorServicer(CgroupCalls):
    """The methods of the rpcs; their tables in the .proto say what they refuse.

    Those about cgroups are in `servicer_cgroups`.
    """

    def __init__(self, runtime: Runtime, memory: HostMemory) -> None:
        """Answer from `memory`; tell the watchers of `runtime` what changed."""
        self._runtime = runtime
        self._memory = memory
        self._host = runtime.config.host

    def _record(self, kind: str, handle: int, **details: object) -> None:
        name = codec.reservation_name(self._host, handle)
        self._runtime.events.record(f"reservation.{kind}", name, **details)

    def _record_folios(self, kind: str, handle: int, folios: Sequence[Folio]) -> None:
        """Name the first of `folios`; an event is no place for all of them."""
        pfn = {"pfn": hex(folios[0].pfn)} if folios else {}
        self._record(kind, handle, nr_folios=len(folios), **pfn)

    def _record_frame(self, kind: str, frame: PoisonedFrame) -> None:
        name = codec.frame_name(self._host, frame.pfn)
        self._runtime.events.record(f"frame.{kind}", name, handle=frame.handle)

    # What can be watched.

    async def GetCapabilities(
        self, request: pb.GetCapabilitiesRequest, context: Context
    ) -> pb.GetCapabilitiesResponse:
        """Say what this host emulates."""
        capabilities = self._runtime.capabilities(page_sizes=PAGE_SIZES)
        return pb.GetCapabilitiesResponse(capabilities=capabilities)

    async def GetStatistics(
        self, request: pb.GetStatisticsRequest, context: Context
    ) -> pb.GetStatisticsResponse:
        """Return all counters."""
        return codec.statistics_to_wire(self._host, self._memory.statistics())

    async def GetPageFlags(
        self, request: pb.GetPageFlagsRequest, context: Context
    ) -> pb.GetPageFlagsResponse:
        """Return the counts of /proc/kpageflags."""
        counts = [
            pb.PageFlagCount(flags=count.flags, nr_pages=count.nr_pages)
            for count in self._memory.page_flags()
        ]
        return pb.GetPageFlagsResponse(counts=counts)

    async def ListPools(
        self, request: pb.ListPoolsRequest, context: Context
    ) -> pb.ListPoolsResponse:
        """Return the pools by page size."""
        pools, token = paginate(
            self._memory.statistics().pools,
            page_size=request.page_size,
            page_token=request.page_token,
            scope="pools",
            key=lambda pool: pool.page_size,
        )
        wire = [codec.pool_to_wire(self._host, pool) for pool in pools]
        return pb.ListPoolsResponse(pools=wire, next_page_token=token)

    async def ListReservations(
        self, request: pb.ListReservationsRequest, context: Context
    ) -> pb.ListReservationsResponse:
        """Return the reservations by handle."""
        claims, token = paginate(
            self._memory.reservations(),
            page_size=request.page_size,
            page_token=request.page_token,
            scope="reservations",
            key=lambda claim: claim.handle,
        )
        wire = [codec.reservation_to_wire(claim) for claim in claims]
        return pb.ListReservationsResponse(reservations=wire, next_page_token=token)

    async def ListFolios(
        self, request: pb.ListFoliosRequest, context: Context
    ) -> pb.ListFoliosResponse:
        """Return what is out for a handle."""
        runs, token = paginate(
            self._memory.folios(request.handle),
            page_size=request.page_size,
            page_token=request.page_token,
            scope=f"folios {request.handle}",
            key=lambda run: run.first.pfn,
        )
        wire = [codec.folio_run_to_wire(run) for run in runs]
        return pb.ListFoliosResponse(runs=wire, next_page_token=token)

    async def Watch(
        self, request: pb.WatchRequest, context: Context
    ) -> AsyncGenerator[pb.WatchResponse]:
        """Yield what changes."""
        async with aclosing(self._runtime.events.watch(request.start_revision)) as log:
            async for events in log:
                revision = events[-1].revision
                yield pb.WatchResponse(revision=revision, events=events)

    # The switches of an administrator.

    async def UpdatePool(
        self, request: pb.UpdatePoolRequest, context: Context
    ) -> pb.UpdatePoolResponse:
        """Set nr_huge_pages, nr_overcommit_huge_pages, or both."""
        nr_huge_pages, nr_overcommit = codec.pool_sizes_from_wire(request)
        update = self._memory.update_pool(
            request.page_size,
            nr_huge_pages,
            codec.node_from_wire(request),
            nr_overcommit_huge_pages=nr_overcommit,
            validate_only=request.validate_only,
        )
        pool = codec.pool_to_wire(self._host, update.pool)
        if not request.validate_only:
            nr, missing = update.pool.nr_huge_pages, update.missing_pages
            self._runtime.events.record(
                "pool.resized", pool.name, nr_huge_pages=nr, missing_pages=missing
            )
        return pb.UpdatePoolResponse(pool=pool, missing_pages=update.missing_pages)

    async def DemotePool(
        self, request: pb.DemotePoolRequest, context: Context
    ) -> pb.DemotePoolResponse:
        """Make free pages into smaller ones."""
        demotion = self._memory.demote_pool(
            request.page_size,
            request.nr_pages,
            codec.node_from_wire(request),
            target_page_size=request.target_page_size or None,
            validate_only=request.validate_only,
        )
        response = codec.demotion_to_wire(self._host, demotion)
        if not request.validate_only:
            done, missing = demotion.demoted_pages, demotion.missing_pages
            self._runtime.events.record(
                "pool.demoted",
                response.source.name,
                demoted_pages=done,
                missing_pages=missing,
            )
        return response

    async def UpdateVmemmapOptimization(
        self, request: pb.UpdateVmemmapOptimizationRequest, context: Context
    ) -> pb.UpdateVmemmapOptimizationResponse:
        """Set the switch of HVO."""
        self._memory.update_vmemmap_optimization(enabled=request.enabled)
        name = f"hosts/{self._host}"
        self._runtime.events.record("vmemmap.switched", name, enabled=request.enabled)
        return pb.UpdateVmemmapOptimizationResponse()

    # The seven calls.

    async def Reserve(
        self, request: pb.ReserveRequest, context: Context
    ) -> pb.ReserveResponse:
        """Promise pages."""
        node = codec.node_from_wire(request)
        handle = self._memory.reserve(
            request.page_size,
            request.num_pages,
            node,
            request.owner,
            use_surplus=request.use_surplus,
            charging=Charging(request.cgroup, request.charge_rsvd),
        )
        self._record("reserved", handle, num_pages=request.num_pages)
        return pb.ReserveResponse(handle=handle)

    async def Allocate(
        self, request: pb.AllocateRequest, context: Context
    ) -> pb.AllocateResponse:
        """Take folios."""
        mempolicy = codec.mempolicy_from_wire(request.mempolicy)
        folios = self._memory.allocate(
            request.handle, mempolicy, request.page_size, request.nr_folios or 1
        )
        self._record_folios("allocated", request.handle, folios)
        return pb.AllocateResponse(folios=map(codec.folio_to_wire, folios))

    async def Split(
        self, request: pb.SplitRequest, context: Context
    ) -> pb.SplitResponse:
        """Split a folio."""
        folio = codec.folio_from_wire(request.folio)
        target = request.target_page_size or PAGE_SIZE
        restored = self._memory.split(request.handle, folio, target)
        self._record_folios("split", request.handle, [folio])
        return pb.SplitResponse(restored_vmemmap_pages=restored)

    async def Reconstruct(
        self, request: pb.ReconstructRequest, context: Context
    ) -> pb.ReconstructResponse:
        """Make a folio whole again."""
        first = codec.folio_from_wire(request.first_folio)
        folio, saved = self._memory.reconstruct(request.handle, first, request.nr_pages)
        self._record_folios("reconstructed", request.handle, [folio])
        whole = codec.folio_to_wire(folio)
        return pb.ReconstructResponse(folio=whole, saved_vmemmap_pages=saved)

    async def Free(self, request: pb.FreeRequest, context: Context) -> pb.FreeResponse:
        """Give folios back."""
        folios = codec.folios_from_wire(request.folios)
        self._memory.free(request.handle, folios)
        self._record_folios("freed", request.handle, folios)
        return pb.FreeResponse()

    async def Error(
        self, request: pb.ErrorRequest, context: Context
    ) -> pb.ErrorResponse:
        """Report a memory error."""
        folio = codec.folio_from_wire(request.folio)
        self._memory.error(request.handle, folio)
        self._record_folios("poisoned", request.handle, [folio])
        return pb.ErrorResponse()

    async def InjectMemoryError(
        self, request: pb.InjectMemoryErrorRequest, context: Context
    ) -> pb.InjectMemoryErrorResponse:
        """Poison a frame; its owner hears of it by Watch."""
        frame = self._memory.inject(request.pfn)
        self._record_frame("poisoned", frame)
        return pb.InjectMemoryErrorResponse(frame=codec.poisoned_to_wire(frame))

    async def UnpoisonMemory(
        self, request: pb.UnpoisonMemoryRequest, context: Context
    ) -> pb.UnpoisonMemoryResponse:
        """Forget the error of a frame; its owner hears of it by Watch."""
        frame = self._memory.unpoison(request.pfn)
        self._record_frame("unpoisoned", frame)
        return pb.UnpoisonMemoryResponse(frame=codec.poisoned_to_wire(frame))

    async def ListMemoryErrors(
        self, request: pb.ListMemoryErrorsRequest, context: Context
    ) -> pb.ListMemoryErrorsResponse:
        """Return the frames with an error."""
        frames, token = paginate(
            self._memory.poisoned_frames(),
            page_size=request.page_size,
            page_token=request.page_token,
            scope="memoryErrors",
            key=lambda frame: frame.pfn,
        )
        wire = [codec.poisoned_to_wire(frame) for frame in frames]
        return pb.ListMemoryErrorsResponse(frames=wire, next_page_token=token)

    async def Unreserve(
        self, request: pb.UnreserveRequest, context: Context
    ) -> pb.UnreserveResponse:
        """End a reservation."""
        self._memory.unreserve(request.handle)
        self._record("unreserved", request.handle)
        return pb.UnreserveResponse()
