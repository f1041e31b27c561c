"""The rpcs about HugeTLB cgroups: part of the allocator's servicer."""

from __future__ import annotations

from typing import Any, TypeAlias

import grpc

from gmem.api.host_allocator.v1 import host_allocator_pb2 as pb
from gmem.api.host_allocator.v1 import host_allocator_pb2_grpc as pb_grpc
from gmem.host_allocator import codec
from gmem.host_allocator.core.host_memory import HostMemory
from gmem.runtime.paging import paginate
from gmem.runtime.server import Runtime

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class CgroupCalls(pb_grpc.HostAllocatorServiceServicer):
    """Answers from `_memory`, and tells the watchers of `_runtime`."""

    _memory: HostMemory
    _runtime: Runtime

    async def CreateCgroup(
        self, request: pb.CreateCgroupRequest, context: Context
    ) -> pb.CreateCgroupResponse:
        """Make a cgroup."""
        cgroup = self._memory.cgroups.create(request.name)
        self._runtime.events.record("cgroup.created", cgroup.name)
        return pb.CreateCgroupResponse(cgroup=codec.cgroup_to_wire(cgroup))

    async def UpdateCgroup(
        self, request: pb.UpdateCgroupRequest, context: Context
    ) -> pb.UpdateCgroupResponse:
        """Set limits of one page size."""
        cgroups = self._memory.cgroups
        for rsvd, limit in codec.limits_from_wire(request):
            cgroups.set_limit(request.name, request.page_size, limit, rsvd=rsvd)
        cgroup = cgroups.get(request.name)
        self._runtime.events.record("cgroup.updated", cgroup.name)
        return pb.UpdateCgroupResponse(cgroup=codec.cgroup_to_wire(cgroup))

    async def DeleteCgroup(
        self, request: pb.DeleteCgroupRequest, context: Context
    ) -> pb.DeleteCgroupResponse:
        """Remove a cgroup."""
        self._memory.delete_cgroup(request.name)
        self._runtime.events.record("cgroup.deleted", request.name)
        return pb.DeleteCgroupResponse()

    async def GetCgroup(
        self, request: pb.GetCgroupRequest, context: Context
    ) -> pb.GetCgroupResponse:
        """Return one cgroup."""
        cgroup = self._memory.cgroups.get(request.name)
        return pb.GetCgroupResponse(cgroup=codec.cgroup_to_wire(cgroup))

    async def ListCgroups(
        self, request: pb.ListCgroupsRequest, context: Context
    ) -> pb.ListCgroupsResponse:
        """Return the cgroups by name."""
        cgroups, token = paginate(
            list(self._memory.cgroups),
            page_size=request.page_size,
            page_token=request.page_token,
            scope="cgroups",
            key=lambda cgroup: cgroup.name,
        )
        wire = [codec.cgroup_to_wire(cgroup) for cgroup in cgroups]
        return pb.ListCgroupsResponse(cgroups=wire, next_page_token=token)
