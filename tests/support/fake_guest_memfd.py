"""A guest_memfd service whose files are plain memfds: what the vmm needs of one.

Nothing is refused by itself and nothing is zeroed: a test sets `refuse` to see how the
vmm takes a refusal, and looks into `files` for the bytes. Every request is kept.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from gmem.api.guest_memfd.v1 import guest_memfd_pb2 as pb
from gmem.api.guest_memfd.v1.guest_memfd_pb2_grpc import (
    add_GuestMemfdServiceServicer_to_server,
)
from gmem.runtime.broker import Broker
from gmem.runtime.server import Runtime
from gmem.uapi.errors import KernelError
from gmem.uapi.pages import order_of
from tests.support.wire import Partial, serve

SERVICE = pb.DESCRIPTOR.services_by_name["GuestMemfdService"]


@dataclass
class MemfdFile:
    """One inode: a memfd for each view."""

    size: int
    order: int
    host: int
    guest: int

    def close(self) -> None:
        os.close(self.host)
        os.close(self.guest)


@dataclass
class FakeGuestMemfd(Partial):
    """The servicer; `delay` holds ConvertRange until it is set."""

    broker: Broker
    files: dict[str, MemfdFile] = field(default_factory=dict)
    refuse: dict[str, KernelError] = field(default_factory=dict)
    requests: list[Any] = field(default_factory=list)
    converting: asyncio.Event = field(default_factory=asyncio.Event)
    may_convert: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.may_convert.set()

    def asked(self, kind: type[Any]) -> list[Any]:
        return [request for request in self.requests if isinstance(request, kind)]

    def _note(self, rpc: str, request: Any) -> None:
        self.requests.append(request)
        if rpc in self.refuse:
            raise self.refuse[rpc]

    async def CreateGuestMemfd(
        self, request: pb.CreateGuestMemfdRequest, context: Any
    ) -> pb.CreateGuestMemfdResponse:
        self._note("CreateGuestMemfd", request)
        name = f"hosts/host0/guestMemfds/{len(self.files) + 1}"
        views = [os.memfd_create(view, os.MFD_CLOEXEC) for view in ("host", "guest")]
        for fd in views:
            os.ftruncate(fd, request.size)
        order = order_of(request.page_size)
        self.files[name] = MemfdFile(request.size, order, *views)
        return pb.CreateGuestMemfdResponse(guest_memfd=pb.GuestMemfd(name=name))

    async def BindMemslot(
        self, request: pb.BindMemslotRequest, context: Any
    ) -> pb.BindMemslotResponse:
        self._note("BindMemslot", request)
        return pb.BindMemslotResponse()

    async def UnbindMemslot(
        self, request: pb.UnbindMemslotRequest, context: Any
    ) -> pb.UnbindMemslotResponse:
        self._note("UnbindMemslot", request)
        return pb.UnbindMemslotResponse()

    async def GetPfn(
        self, request: pb.GetPfnRequest, context: Any
    ) -> pb.GetPfnResponse:
        self._note("GetPfn", request)
        order = self.files[request.name].order
        return pb.GetPfnResponse(pfn=(1 << 20) + request.gfn, order=order)

    async def ConvertRange(
        self, request: pb.ConvertRangeRequest, context: Any
    ) -> pb.ConvertRangeResponse:
        self.converting.set()
        await self.may_convert.wait()
        self._note("ConvertRange", request)
        return pb.ConvertRangeResponse()

    async def PopulateRange(
        self, request: pb.PopulateRangeRequest, context: Any
    ) -> pb.PopulateRangeResponse:
        self._note("PopulateRange", request)
        return pb.PopulateRangeResponse()

    async def OpenView(
        self, request: pb.OpenViewRequest, context: Any
    ) -> pb.OpenViewResponse:
        self._note("OpenView", request)
        fd = os.dup(self.files[request.name].guest)
        token = self.broker.mint(fd, pid=request.guest_pid)
        return pb.OpenViewResponse(token=token, broker_path=str(self.broker.path))


@asynccontextmanager
async def fake_guest_memfd(run_dir: Path) -> AsyncIterator[FakeGuestMemfd]:
    """Serve it below `run_dir`, where a vmm looks for it."""
    broker = Broker(run_dir / "guest_memfd.broker")
    servicer = FakeGuestMemfd(broker)

    async def start(runtime: Runtime) -> None:
        await broker.start()
        runtime.on_stop(broker.stop)
        add = add_GuestMemfdServiceServicer_to_server
        runtime.add(add, cast("Any", servicer), SERVICE)

    async with serve(start, run_dir, service="guest_memfd"):
        yield servicer
    for file in servicer.files.values():
        file.close()
