"""A real server on a real socket, around whatever servicer a test brings."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, cast

import grpc

from gmem.api.host_allocator.v1 import host_allocator_pb2 as allocator_pb
from gmem.api.host_allocator.v1.host_allocator_pb2_grpc import (
    add_HostAllocatorServiceServicer_to_server,
)
from gmem.api.vmm.v1 import vmm_pb2
from gmem.api.vmm.v1.vmm_pb2_grpc import (
    add_VmmServiceServicer_to_server,
)
from gmem.runtime.config import ServiceConfig
from gmem.runtime.server import Runtime, open_journal, serving

ALLOCATOR = allocator_pb.DESCRIPTOR.services_by_name["HostAllocatorService"]
VMM = vmm_pb2.DESCRIPTOR.services_by_name["VmmService"]


class Partial:
    """A servicer that has only the methods a test calls."""

    def __getattr__(self, name: str) -> Any:
        if not name[0].isupper():
            raise AttributeError(name)
        return self._unimplemented

    async def _unimplemented(self, request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "not in this test")


class Allocator(Partial):
    """Answers Reserve with whatever the test says, and counts how often."""

    def __init__(self) -> None:
        self.reserve: Callable[[Any], Awaitable[int]] = self._next
        self.reserved = 0
        self.statistics: Callable[[], Awaitable[None]] | None = None

    async def _next(self, _request: Any) -> int:
        return self.reserved

    async def Reserve(self, request: Any, context: Any) -> allocator_pb.ReserveResponse:
        self.reserved += 1
        return allocator_pb.ReserveResponse(handle=await self.reserve(request))

    async def GetStatistics(
        self, request: Any, context: Any
    ) -> allocator_pb.GetStatisticsResponse:
        if self.statistics is not None:
            await self.statistics()
        return allocator_pb.GetStatisticsResponse()


def serve_allocator(
    servicer: Allocator, run_dir: Path, *, journal: bool = False, **config: Any
) -> AbstractAsyncContextManager[Runtime]:
    async def start(runtime: Runtime) -> None:
        if journal:
            runtime.use(open_journal(runtime.config))
        whole = cast("Any", servicer)
        runtime.add(add_HostAllocatorServiceServicer_to_server, whole, ALLOCATOR)

    return serve(start, run_dir, service="host_allocator", **config)


def serve_vmm(servicer: object, run_dir: Path) -> AbstractAsyncContextManager[Runtime]:
    async def start(runtime: Runtime) -> None:
        runtime.add(add_VmmServiceServicer_to_server, cast("Any", servicer), VMM)

    return serve(start, run_dir, service="vmm")


@asynccontextmanager
async def serve(
    start: Callable[[Runtime], Awaitable[None]], run_dir: Path, **config: Any
) -> AsyncIterator[Runtime]:
    settings = ServiceConfig(run_dir=run_dir, stop_seconds=1.0, **config)
    async with serving(settings, start) as runtime:
        yield runtime
