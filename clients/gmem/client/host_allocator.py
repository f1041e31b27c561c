"""The host_allocator service as Python calls: the seven allocator calls, and pools."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from functools import cached_property
from typing import Final

from gmem.api.host_allocator.v1 import host_allocator_pb2 as pb
from gmem.api.host_allocator.v1 import host_allocator_pb2_grpc as pb_grpc
from gmem.api.types.v1.types_pb2 import Capabilities, Folio, MemPolicy, RequestId
from gmem.client.base import ServiceClient
from gmem.uapi.pages import PAGE_SIZE

_RUNS_PER_PAGE = 1000


NO_LIMIT: Final = -1
"""Given as a limit of a cgroup: `max`."""


class HostAllocatorClient(ServiceClient):
    """The allocator of one emulated host; sizes in bytes, frames as pfns."""

    SERVICE = "host_allocator"

    @cached_property
    def _stub(self) -> pb_grpc.HostAllocatorServiceAsyncStub:
        return pb_grpc.HostAllocatorServiceStub(self.connection.channel)

    async def get_capabilities(self, *, timeout: float | None = None) -> Capabilities:
        """Return what this host emulates."""
        request = pb.GetCapabilitiesRequest()
        method = self._stub.GetCapabilities
        response = await self.connection.call(method, request, timeout=timeout)
        return response.capabilities

    async def get_statistics(self) -> pb.GetStatisticsResponse:
        """Return the counters in the words of /proc/meminfo and sysfs."""
        request = pb.GetStatisticsRequest()
        return await self.connection.call(self._stub.GetStatistics, request)

    async def get_page_flags(self) -> tuple[pb.PageFlagCount, ...]:
        """Return how many frames have which word of /proc/kpageflags."""
        request = pb.GetPageFlagsRequest()
        response = await self.connection.call(self._stub.GetPageFlags, request)
        return tuple(response.counts)

    async def list_pools(self) -> list[pb.Pool]:
        """Return all pools, by page size."""
        pools: list[pb.Pool] = []
        token = ""
        while True:
            request = pb.ListPoolsRequest(page_token=token)
            response = await self.connection.call(self._stub.ListPools, request)
            pools += response.pools
            token = response.next_page_token
            if not token:
                return pools

    async def update_pool(
        self,
        *,
        page_size: int,
        nr_huge_pages: int | None = None,
        node: int | None = None,
        nr_overcommit_huge_pages: int | None = None,
        validate_only: bool = False,
        request_id: RequestId | None = None,
    ) -> pb.UpdatePoolResponse:
        """Write nr_hugepages, of one node or spread over all; may succeed in part.

        And nr_overcommit_hugepages; None leaves a number as it is.
        """
        request = pb.UpdatePoolRequest(
            page_size=page_size,
            nr_huge_pages=nr_huge_pages,
            node=node,
            nr_overcommit_huge_pages=nr_overcommit_huge_pages,
            validate_only=validate_only,
        )
        method = self._stub.UpdatePool
        return await self.connection.mutate(method, request, request_id)

    async def demote_pool(
        self,
        *,
        page_size: int,
        nr_pages: int,
        node: int | None = None,
        target_page_size: int = 0,
        validate_only: bool = False,
        request_id: RequestId | None = None,
    ) -> pb.DemotePoolResponse:
        """Make free 1G pages into 2M ones; may succeed in part."""
        request = pb.DemotePoolRequest(
            page_size=page_size,
            nr_pages=nr_pages,
            node=node,
            target_page_size=target_page_size,
            validate_only=validate_only,
        )
        method = self._stub.DemotePool
        return await self.connection.mutate(method, request, request_id)

    async def update_vmemmap_optimization(
        self, *, enabled: bool, request_id: RequestId | None = None
    ) -> None:
        """Write vm.hugetlb_optimize_vmemmap; folios are optimised from now on."""
        request = pb.UpdateVmemmapOptimizationRequest(enabled=enabled)
        method = self._stub.UpdateVmemmapOptimization
        await self.connection.mutate(method, request, request_id)

    async def reserve(
        self,
        *,
        page_size: int,
        num_pages: int,
        node: int | None = None,
        owner: str = "",
        use_surplus: bool = False,
        cgroup: str = "",
        charge_rsvd: bool = False,
        request_id: RequestId | None = None,
    ) -> int:
        """Promise `num_pages` pages to one owner; return the reservation's handle.

        `cgroup` is charged for the folios, and with `charge_rsvd` for the promise.
        """
        request = pb.ReserveRequest(
            page_size=page_size,
            num_pages=num_pages,
            node=node,
            owner=owner,
            use_surplus=use_surplus,
            cgroup=cgroup,
            charge_rsvd=charge_rsvd,
        )
        method = self._stub.Reserve
        return (await self.connection.mutate(method, request, request_id)).handle

    async def allocate(
        self,
        *,
        handle: int,
        page_size: int,
        mempolicy: MemPolicy | None = None,
        nr_folios: int = 1,
        request_id: RequestId | None = None,
    ) -> tuple[Folio, ...]:
        """Take folios of a reservation: at least one, at most `nr_folios`."""
        request = pb.AllocateRequest(
            handle=handle,
            page_size=page_size,
            mempolicy=mempolicy,
            nr_folios=nr_folios,
        )
        method = self._stub.Allocate
        response = await self.connection.mutate(method, request, request_id)
        return tuple(response.folios)

    async def split(
        self,
        *,
        handle: int,
        folio: Folio,
        target_page_size: int = PAGE_SIZE,
        request_id: RequestId | None = None,
    ) -> int:
        """Split a whole folio; return the vmemmap pages taken from base memory."""
        request = pb.SplitRequest(
            handle=handle, folio=folio, target_page_size=target_page_size
        )
        method = self._stub.Split
        response = await self.connection.mutate(method, request, request_id)
        return response.restored_vmemmap_pages

    async def reconstruct(
        self,
        *,
        handle: int,
        first_folio: Folio,
        nr_pages: int,
        request_id: RequestId | None = None,
    ) -> pb.ReconstructResponse:
        """Make split pages one folio; return it and the vmemmap pages given back."""
        request = pb.ReconstructRequest(
            handle=handle, first_folio=first_folio, nr_pages=nr_pages
        )
        method = self._stub.Reconstruct
        return await self.connection.mutate(method, request, request_id)

    async def free(
        self,
        *,
        handle: int,
        folios: Sequence[Folio],
        request_id: RequestId | None = None,
    ) -> None:
        """Give whole folios back to their reservation."""
        request = pb.FreeRequest(handle=handle, folios=folios)
        await self.connection.mutate(self._stub.Free, request, request_id)

    async def error(
        self, *, handle: int, folio: Folio, request_id: RequestId | None = None
    ) -> None:
        """Report a memory error in a folio."""
        request = pb.ErrorRequest(handle=handle, folio=folio)
        await self.connection.mutate(self._stub.Error, request, request_id)

    async def inject_memory_error(
        self, pfn: int, *, request_id: RequestId | None = None
    ) -> pb.PoisonedFrame:
        """Give one frame a memory error, whoever has it.

        PAGE_POISONED, FRAME_UNKNOWN, STATE_WRONG.
        """
        request = pb.InjectMemoryErrorRequest(pfn=pfn)
        method = self._stub.InjectMemoryError
        return (await self.connection.mutate(method, request, request_id)).frame

    async def unpoison_memory(
        self, pfn: int, *, request_id: RequestId | None = None
    ) -> pb.PoisonedFrame:
        """Forget the memory error of a frame; FRAME_UNKNOWN where it has none."""
        request = pb.UnpoisonMemoryRequest(pfn=pfn)
        method = self._stub.UnpoisonMemory
        return (await self.connection.mutate(method, request, request_id)).frame

    async def list_memory_errors(self) -> list[pb.PoisonedFrame]:
        """Return every frame with a memory error, rising."""
        frames: list[pb.PoisonedFrame] = []
        token = ""
        while True:
            request = pb.ListMemoryErrorsRequest(page_token=token)
            method = self._stub.ListMemoryErrors
            response = await self.connection.call(method, request)
            frames += response.frames
            token = response.next_page_token
            if not token:
                return frames

    async def unreserve(
        self, *, handle: int, request_id: RequestId | None = None
    ) -> None:
        """End a reservation; folios still out keep its subpool until they come back."""
        request = pb.UnreserveRequest(handle=handle)
        await self.connection.mutate(self._stub.Unreserve, request, request_id)

    async def list_folios(self, handle: int) -> list[pb.FolioRun]:
        """Return what is out for a handle, by frame. HANDLE_UNKNOWN."""
        runs: list[pb.FolioRun] = []
        token = ""
        while True:
            request = pb.ListFoliosRequest(
                handle=handle, page_size=_RUNS_PER_PAGE, page_token=token
            )
            response = await self.connection.call(self._stub.ListFolios, request)
            runs += response.runs
            token = response.next_page_token
            if not token:
                return runs

    async def create_cgroup(
        self, name: str, *, request_id: RequestId | None = None
    ) -> pb.Cgroup:
        """Make a HugeTLB cgroup without limits; CGROUP_EXISTS, CGROUP_UNKNOWN."""
        request = pb.CreateCgroupRequest(name=name)
        method = self._stub.CreateCgroup
        return (await self.connection.mutate(method, request, request_id)).cgroup

    async def update_cgroup(
        self,
        name: str,
        *,
        page_size: int,
        max: int | None = None,  # noqa: A002 - the file's name
        rsvd_max: int | None = None,
        request_id: RequestId | None = None,
    ) -> pb.Cgroup:
        """Write hugetlb.<size>.max and rsvd.max in bytes; None leaves one as it is.

        NO_LIMIT takes one away.
        """
        request = pb.UpdateCgroupRequest(
            name=name,
            page_size=page_size,
            max=_limit(max),
            rsvd_max=_limit(rsvd_max),
        )
        method = self._stub.UpdateCgroup
        return (await self.connection.mutate(method, request, request_id)).cgroup

    async def delete_cgroup(
        self, name: str, *, request_id: RequestId | None = None
    ) -> None:
        """Remove a cgroup; its charges become its parent's. OBJECT_IN_USE."""
        request = pb.DeleteCgroupRequest(name=name)
        await self.connection.mutate(self._stub.DeleteCgroup, request, request_id)

    async def get_cgroup(self, name: str = "") -> pb.Cgroup:
        """Return one cgroup; the root without a name. CGROUP_UNKNOWN."""
        request = pb.GetCgroupRequest(name=name)
        return (await self.connection.call(self._stub.GetCgroup, request)).cgroup

    async def list_cgroups(self) -> list[pb.Cgroup]:
        """Return all cgroups, by name."""
        cgroups: list[pb.Cgroup] = []
        token = ""
        while True:
            request = pb.ListCgroupsRequest(page_token=token)
            response = await self.connection.call(self._stub.ListCgroups, request)
            cgroups += response.cgroups
            token = response.next_page_token
            if not token:
                return cgroups

    async def list_reservations(self) -> list[pb.Reservation]:
        """Return all reservations, by handle."""
        reservations: list[pb.Reservation] = []
        token = ""
        while True:
            request = pb.ListReservationsRequest(page_token=token)
            method = self._stub.ListReservations
            response = await self.connection.call(method, request)
            reservations += response.reservations
            token = response.next_page_token
            if not token:
                return reservations

    def watch(self, start_revision: int = 0) -> AsyncGenerator[pb.WatchResponse]:
        """Yield changes from `start_revision` (0: from now) on; close it after use."""
        request = pb.WatchRequest(start_revision=start_revision)
        return self.connection.stream(self._stub.Watch, request)


def _limit(limit: int | None) -> pb.CgroupLimit | None:
    if limit is None:
        return None
    if limit == NO_LIMIT:
        return pb.CgroupLimit(unlimited=True)
    return pb.CgroupLimit(bytes=limit)
