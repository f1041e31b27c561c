"""The effects that other services answer: the allocator below, the VMMs above."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import structlog

from gmem.client import HostAllocatorClient
from gmem.effects import Effect
from gmem.guest_memfd import codec
from gmem.guest_memfd.core import effects as fx
from gmem.guest_memfd.core.values import Folio
from gmem.guest_memfd.vmm_link import Edge, VmmLink
from gmem.runtime.performer import Performer
from gmem.uapi.errors import TransportError

E = TypeVar("E", bound=Effect[Any])

log = structlog.get_logger(__name__)


class RemotePorts:
    """Answers the REMOTE effects of the guest_memfd core.

    The client makes one request_id for each call and keeps it through repeats.
    """

    def __init__(self, allocator: HostAllocatorClient, client: str) -> None:
        self._allocator = allocator
        self._client = client
        self._vmms: dict[str, VmmLink] = {}
        self.lost = asyncio.Event()
        """Set when the allocator did not answer: what became of the call is unknown."""

    def register(self, performer: Performer) -> None:
        """Enter every effect of this file in the table of who answers what."""
        performer.register_remote(fx.Reserve, self._noticing(self._reserve))
        performer.register_remote(fx.CountNodes, self._count_nodes)
        performer.register_remote(fx.Allocate, self._noticing(self._allocate))
        performer.register_remote(fx.Split, self._noticing(self._split))
        performer.register_remote(fx.Reconstruct, self._noticing(self._reconstruct))
        performer.register_remote(fx.Free, self._noticing(self._free))
        performer.register_remote(fx.Unreserve, self._noticing(self._unreserve))
        performer.register_remote(fx.PoisonFrame, self._noticing(self._poison))
        performer.register_remote(fx.UnpoisonFrame, self._noticing(self._unpoison))
        performer.register_remote(fx.ListErrors, self._noticing(self._list_errors))
        performer.register_remote(fx.InvalidateBegin, self._invalidate_begin)
        performer.register_remote(fx.InvalidateEnd, self._invalidate_end)

    def _noticing(
        self, ask: Callable[[E], Awaitable[object]]
    ) -> Callable[[E], Awaitable[object]]:
        async def asked(effect: E) -> object:
            try:
                return await ask(effect)
            except TransportError:
                self.lost.set()
                raise

        return asked

    async def close(self) -> None:
        """Let go of the VMMs."""
        for vmm in self._vmms.values():
            await vmm.close()

    async def _reserve(self, effect: fx.Reserve) -> int:
        return await self._allocator.reserve(
            page_size=effect.page_size,
            num_pages=effect.num_pages,
            owner=effect.owner,
            cgroup=effect.cgroup,
            charge_rsvd=effect.charge_rsvd,
        )

    async def _count_nodes(self, effect: fx.CountNodes) -> int:
        del effect
        return len((await self._allocator.get_statistics()).nodes)

    async def _allocate(self, effect: fx.Allocate) -> tuple[Folio, ...]:
        folios = await self._allocator.allocate(
            handle=effect.handle,
            page_size=effect.page_size,
            mempolicy=codec.mempolicy_to_wire(effect.mempolicy),
            nr_folios=effect.nr_folios,
        )
        return tuple(codec.folio_from_wire(folio) for folio in folios)

    async def _split(self, effect: fx.Split) -> int:
        folio = codec.folio_to_wire(effect.folio)
        return await self._allocator.split(handle=effect.handle, folio=folio)

    async def _reconstruct(self, effect: fx.Reconstruct) -> int:
        response = await self._allocator.reconstruct(
            handle=effect.handle,
            first_folio=codec.folio_to_wire(effect.folio),
            nr_pages=1 << effect.folio.order,
        )
        return response.saved_vmemmap_pages

    async def _free(self, effect: fx.Free) -> None:
        folios = [codec.folio_to_wire(folio) for folio in effect.folios]
        await self._allocator.free(handle=effect.handle, folios=folios)

    async def _unreserve(self, effect: fx.Unreserve) -> None:
        await self._allocator.unreserve(handle=effect.handle)

    async def _poison(self, effect: fx.PoisonFrame) -> None:
        await self._allocator.inject_memory_error(effect.pfn)

    async def _unpoison(self, effect: fx.UnpoisonFrame) -> None:
        await self._allocator.unpoison_memory(effect.pfn)

    async def _list_errors(self, effect: fx.ListErrors) -> Mapping[int, int]:
        frames = await self._allocator.list_memory_errors()
        return {f.pfn: f.nr_pages for f in frames if f.handle == effect.handle}

    async def _invalidate_begin(self, effect: fx.InvalidateBegin) -> None:
        await self._vmm(effect.target).tell(Edge.BEGIN, effect.vm, effect.gfns)

    async def _invalidate_end(self, effect: fx.InvalidateEnd) -> None:
        await self._vmm(effect.target).tell(Edge.END, effect.vm, effect.gfns)

    def _vmm(self, target: str) -> VmmLink:
        if target not in self._vmms:
            self._vmms[target] = VmmLink(target, self._client)
        return self._vmms[target]
