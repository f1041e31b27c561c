"""The allocator by direct call and over the wire: one interface for one suite."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import pytest
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from gmem.api.host_allocator.v1 import host_allocator_pb2 as pb
from gmem.api.types.v1 import types_pb2
from gmem.client import HostAllocatorClient
from gmem.host_allocator import codec, servicer
from gmem.host_allocator.core.host_memory import HostMemory
from gmem.host_allocator.core.values import (
    MPOL_DEFAULT,
    BootPool,
    Folio,
    MemPolicy,
)
from gmem.runtime.config import ServiceConfig
from gmem.runtime.server import Runtime, serving
from gmem.uapi.errors import KernelError, Reason
from gmem.uapi.pages import PAGE_SIZE, SIZE_1G, SIZE_2M

BACKENDS = pytest.mark.parametrize(
    "page_size",
    [SIZE_2M, SIZE_1G, PAGE_SIZE],
    ids=["hugetlb-2M", "hugetlb-1G", "base-4K"],
)
POOLS = pytest.mark.parametrize(
    "page_size", [SIZE_2M, SIZE_1G], ids=["hugetlb-2M", "hugetlb-1G"]
)
OVER_THE_WIRE = pytest.mark.parametrize("subject", ["wire"], indirect=True)
HOST = "host0"


def small_host() -> HostMemory:
    """Two nodes, each with one 1G page and two 2M pages.

    Node 0 has little beside them, so that base memory can be used up; node 1 begins
    behind that and has to reach to the next frame at which a 1G page may lie.
    """
    pools = [BootPool(SIZE_1G, 2), BootPool(SIZE_2M, 4)]
    little = 16384
    return HostMemory(
        [SIZE_1G // PAGE_SIZE + little, 2 * SIZE_1G // PAGE_SIZE + little], pools
    )


class Subject(Protocol):
    """The seven calls, awaited; statistics and reservations as plain dictionaries."""

    async def reserve(
        self,
        page_size: int,
        num_pages: int,
        node: int | None = None,
        owner: str = "",
        *,
        use_surplus: bool = False,
    ) -> int: ...

    async def allocate(
        self,
        handle: int,
        mempolicy: MemPolicy = MPOL_DEFAULT,
        page_size: int = PAGE_SIZE,
        nr_folios: int = 1,
    ) -> tuple[Folio, ...]: ...

    async def split(
        self, handle: int, folio: Folio, target_page_size: int = PAGE_SIZE
    ) -> int: ...

    async def reconstruct(
        self, handle: int, first_folio: Folio, nr_pages: int
    ) -> tuple[Folio, int]: ...

    async def free(self, handle: int, folios: Sequence[Folio]) -> None: ...

    async def error(self, handle: int, folio: Folio) -> None: ...

    async def unreserve(self, handle: int) -> None: ...

    async def update_pool(
        self, page_size: int, nr_huge_pages: int, node: int | None = None
    ) -> int: ...

    async def overcommit(self, page_size: int, nr_pages: int) -> None: ...

    async def demote_pool(
        self, page_size: int, nr_pages: int, node: int | None = None
    ) -> tuple[int, int, int]: ...

    async def statistics(self) -> dict[str, Any]: ...

    async def reservations(self) -> list[dict[str, Any]]: ...


class Core:
    """The core, called directly."""

    def __init__(self, memory: HostMemory) -> None:
        self.memory = memory

    async def reserve(
        self,
        page_size: int,
        num_pages: int,
        node: int | None = None,
        owner: str = "",
        *,
        use_surplus: bool = False,
    ) -> int:
        return self.memory.reserve(
            page_size, num_pages, node, owner, use_surplus=use_surplus
        )

    async def allocate(
        self,
        handle: int,
        mempolicy: MemPolicy = MPOL_DEFAULT,
        page_size: int = PAGE_SIZE,
        nr_folios: int = 1,
    ) -> tuple[Folio, ...]:
        return self.memory.allocate(handle, mempolicy, page_size, nr_folios)

    async def split(
        self, handle: int, folio: Folio, target_page_size: int = PAGE_SIZE
    ) -> int:
        return self.memory.split(handle, folio, target_page_size)

    async def reconstruct(
        self, handle: int, first_folio: Folio, nr_pages: int
    ) -> tuple[Folio, int]:
        return self.memory.reconstruct(handle, first_folio, nr_pages)

    async def free(self, handle: int, folios: Sequence[Folio]) -> None:
        self.memory.free(handle, folios)

    async def error(self, handle: int, folio: Folio) -> None:
        self.memory.error(handle, folio)

    async def unreserve(self, handle: int) -> None:
        self.memory.unreserve(handle)

    async def update_pool(
        self, page_size: int, nr_huge_pages: int, node: int | None = None
    ) -> int:
        return self.memory.update_pool(page_size, nr_huge_pages, node).missing_pages

    async def overcommit(self, page_size: int, nr_pages: int) -> None:
        self.memory.update_pool(page_size, nr_overcommit_huge_pages=nr_pages)

    async def demote_pool(
        self, page_size: int, nr_pages: int, node: int | None = None
    ) -> tuple[int, int, int]:
        done = self.memory.demote_pool(page_size, nr_pages, node)
        return done.demoted_pages, done.target_pages, done.missing_pages

    async def statistics(self) -> dict[str, Any]:
        return plain(codec.statistics_to_wire(HOST, self.memory.statistics()))

    async def reservations(self) -> list[dict[str, Any]]:
        claims = self.memory.reservations()
        return [plain(codec.reservation_to_wire(claim)) for claim in claims]


class Wire:
    """The service, through its client."""

    def __init__(self, client: HostAllocatorClient) -> None:
        self.client = client

    async def reserve(
        self,
        page_size: int,
        num_pages: int,
        node: int | None = None,
        owner: str = "",
        *,
        use_surplus: bool = False,
    ) -> int:
        return await self.client.reserve(
            page_size=page_size,
            num_pages=num_pages,
            node=node,
            owner=owner,
            use_surplus=use_surplus,
        )

    async def allocate(
        self,
        handle: int,
        mempolicy: MemPolicy = MPOL_DEFAULT,
        page_size: int = PAGE_SIZE,
        nr_folios: int = 1,
    ) -> tuple[Folio, ...]:
        mode = types_pb2.MemPolicy.Mode.Value(f"MODE_{mempolicy.mode.name}")
        folios = await self.client.allocate(
            handle=handle,
            page_size=page_size,
            mempolicy=types_pb2.MemPolicy(mode=mode, nodes=mempolicy.nodes),
            nr_folios=nr_folios,
        )
        return tuple(codec.folios_from_wire(folios))

    async def split(
        self, handle: int, folio: Folio, target_page_size: int = PAGE_SIZE
    ) -> int:
        return await self.client.split(
            handle=handle,
            folio=codec.folio_to_wire(folio),
            target_page_size=target_page_size,
        )

    async def reconstruct(
        self, handle: int, first_folio: Folio, nr_pages: int
    ) -> tuple[Folio, int]:
        response = await self.client.reconstruct(
            handle=handle,
            first_folio=codec.folio_to_wire(first_folio),
            nr_pages=nr_pages,
        )
        return codec.folio_from_wire(response.folio), response.saved_vmemmap_pages

    async def free(self, handle: int, folios: Sequence[Folio]) -> None:
        wire = [codec.folio_to_wire(folio) for folio in folios]
        await self.client.free(handle=handle, folios=wire)

    async def error(self, handle: int, folio: Folio) -> None:
        await self.client.error(handle=handle, folio=codec.folio_to_wire(folio))

    async def unreserve(self, handle: int) -> None:
        await self.client.unreserve(handle=handle)

    async def update_pool(
        self, page_size: int, nr_huge_pages: int, node: int | None = None
    ) -> int:
        response = await self.client.update_pool(
            page_size=page_size, nr_huge_pages=nr_huge_pages, node=node
        )
        return response.missing_pages

    async def overcommit(self, page_size: int, nr_pages: int) -> None:
        await self.client.update_pool(
            page_size=page_size, nr_overcommit_huge_pages=nr_pages
        )

    async def demote_pool(
        self, page_size: int, nr_pages: int, node: int | None = None
    ) -> tuple[int, int, int]:
        done = await self.client.demote_pool(
            page_size=page_size, nr_pages=nr_pages, node=node
        )
        return done.demoted_pages, done.target_pages, done.missing_pages

    async def statistics(self) -> dict[str, Any]:
        response = await self.client.get_statistics()
        # Which change it was is the wire's own; the counters are the core's.
        response.revision = 0
        return plain(response)

    async def reservations(self) -> list[dict[str, Any]]:
        return [plain(claim) for claim in await self.client.list_reservations()]


def plain(message: Message) -> dict[str, Any]:
    """A message with all its fields, zeros too."""
    return MessageToDict(
        message,
        always_print_fields_with_no_presence=True,
        preserving_proto_field_name=True,
    )


def levels(statistics: dict[str, Any]) -> dict[str, Any]:
    """The counters without those that only grow."""
    vmemmap = {k: v for k, v in statistics["vmemmap"].items() if "total" not in k}
    return {**statistics, "vmemmap": vmemmap}


def pool_of(statistics: dict[str, Any], page_size: int) -> dict[str, int]:
    """The counters of one pool as numbers."""
    (pool,) = [p for p in statistics["pools"] if int(p["page_size"]) == page_size]
    return {
        key: int(pool[key])
        for key in pb.Pool.DESCRIPTOR.fields_by_name
        if "huge" in key
    }


@asynccontextmanager
async def serving_memory(memory: HostMemory, run_dir: Path) -> AsyncIterator[Runtime]:
    """The real service of `memory` on a socket below `run_dir`."""
    config = ServiceConfig(service="host_allocator", host=HOST, run_dir=run_dir)

    async def start(runtime: Runtime) -> None:
        await servicer.start(runtime, memory)

    async with serving(config, start) as runtime:
        yield runtime


async def refused(
    subject: Subject, reason: Reason, call: Awaitable[object]
) -> KernelError:
    """Expect a refusal for `reason`, and that nothing moved."""
    before = await subject.statistics(), await subject.reservations()
    with pytest.raises(KernelError) as caught:
        await call
    assert caught.value.reason is reason
    assert (await subject.statistics(), await subject.reservations()) == before
    return caught.value


async def one_folio(subject: Subject, page_size: int) -> tuple[int, Folio]:
    handle = await subject.reserve(page_size, 1)
    (folio,) = await subject.allocate(handle, page_size=page_size)
    return handle, folio
