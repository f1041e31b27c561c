"""Hearing of memory errors: the allocator calls nobody, it has them watched (rule V3).

Its stream says that something has changed; what is true is then asked for and compared
with what the inodes know. So no event can be lost, and one that comes twice changes
nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import aclosing
from typing import Final

from gmem.client import HostAllocatorClient
from gmem.guest_memfd.service import GuestMemfdService
from gmem.runtime.log import logger
from gmem.uapi.errors import KernelError, TransportError

_KINDS: Final = frozenset(
    {"frame.poisoned", "frame.unpoisoned", "reservation.poisoned"}
)
AGAIN_SECONDS: Final = 0.2
"""Between two tries to reach the allocator, or to find a folio that is on its way."""
STRAY_LOOKS_MAX: Final = 25
"""Looks for a poisoned frame that no filemap has: its holder may have been punched."""


async def follow(service: GuestMemfdService, allocator: HostAllocatorClient) -> None:
    """Take from every inode what the allocator says is poisoned, for ever."""
    while True:
        try:
            async with aclosing(allocator.watch()) as stream:
                compared = False
                async for response in stream:
                    kinds = {event.kind for event in response.events}
                    # The first message says that whatever comes later is told.
                    if kinds & _KINDS or not compared:
                        await compare(service, allocator)
                        compared = True
        except (TransportError, KernelError) as error:
            logger.info("memory errors are not heard of", error=str(error))
        await asyncio.sleep(AGAIN_SECONDS)


async def compare(service: GuestMemfdService, allocator: HostAllocatorClient) -> None:
    """Have every inode know what the allocator knows."""
    for _ in range(STRAY_LOOKS_MAX):
        errors = await errors_by_handle(allocator)
        with service.mutex:
            differing, strays = service.core.differing(errors)
        for number in differing:
            for difference in await service.run(service.core.compare_errors(number)):
                kind = "inode.poisoned" if difference.bad else "inode.unpoisoned"
                offset = hex(difference.pages.offset)
                service.record(kind, number, offset=offset)
        if not strays:
            return
        await asyncio.sleep(AGAIN_SECONDS)


async def errors_by_handle(
    allocator: HostAllocatorClient,
) -> Mapping[int, Mapping[int, int]]:
    """Return what is poisoned, by reservation: frames, and how many from there on."""
    found: dict[int, dict[int, int]] = {}
    for frame in await allocator.list_memory_errors():
        found.setdefault(frame.handle, {})[frame.pfn] = frame.nr_pages
    found.pop(0, None)
    return found
