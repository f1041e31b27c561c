"""Conversions that wait, and holds with a lease: real processes and real time."""

from __future__ import annotations

import asyncio
import signal
import time

import pytest

from gmem.client import GuestMemfdClient
from gmem.client.errors import Contended, Errno, NoSuchObject, Reason
from gmem.uapi.flags import FALLOC_FL_KEEP_SIZE
from gmem.uapi.pages import PAGE_SIZE
from tests.support.hosts import Host, Inode, new_inode

pytestmark = pytest.mark.fuse

WAIT_MS = 30_000


async def pin(gmem: GuestMemfdClient, inode: Inode, ttl_ms: int = 0) -> int:
    return await gmem.pin_pages(
        name=inode.name, offset=0, size=PAGE_SIZE, holder="nic", ttl_ms=ttl_ms
    )


def to_private(
    gmem: GuestMemfdClient, inode: Inode, wait_ms: int = WAIT_MS
) -> asyncio.Task[None]:
    return asyncio.create_task(
        gmem.convert_range(
            ranges=[inode.range(0, inode.size)], to_shared=False, wait_ms=wait_ms
        )
    )


async def shared_pages(inode: Inode) -> int:
    return (await inode.get()).shared_pages


async def test_a_conversion_waits_for_a_pin_and_the_lock_is_free(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_inode(clean_host, gmem)
    hold = await pin(gmem, inode)
    convert = to_private(gmem, inode)
    await asyncio.sleep(0.3)
    assert not convert.done()
    await inode.fallocate(FALLOC_FL_KEEP_SIZE, 0, inode.size)
    await gmem.unpin_pages(hold=hold)
    await convert
    assert await shared_pages(inode) == 0


async def test_a_conversion_waits_for_a_mapping(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_inode(clean_host, gmem)
    client = await inode.mapped_by("loader")
    await client.asked("raw_store", 0, 1)
    convert = to_private(gmem, inode)
    await asyncio.sleep(0.3)
    assert not convert.done()
    await client.asked("dont_need")
    await convert
    assert await shared_pages(inode) == 0


async def test_it_gives_up_in_time_names_the_holder_and_changes_nothing(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_inode(clean_host, gmem)
    hold = await pin(gmem, inode)
    before = await inode.get()
    began = time.monotonic()
    with pytest.raises(Contended) as caught:
        await to_private(gmem, inode, wait_ms=300)
    assert 0.3 <= time.monotonic() - began < WAIT_MS / 1000
    assert (caught.value.reason, caught.value.errno) == (
        Reason.DEADLINE,
        Errno.ETIMEDOUT,
    )
    assert caught.value.numbers["holders"] == "nic"
    assert await inode.get() == before
    await gmem.unpin_pages(hold=hold)


async def test_a_caller_that_goes_away_does_not_stop_it(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_inode(clean_host, gmem)
    hold = await pin(gmem, inode)
    convert = to_private(gmem, inode)
    await asyncio.sleep(0.3)
    convert.cancel()
    await asyncio.gather(convert, return_exceptions=True)
    await gmem.unpin_pages(hold=hold)
    async with asyncio.timeout(WAIT_MS / 1000):
        while await shared_pages(inode):
            await asyncio.sleep(0.05)


async def test_a_client_that_is_killed_lets_go(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_inode(clean_host, gmem)
    client = await inode.mapped_by("loader", "i7")
    await client.asked("raw_store", 0, 1)
    convert = to_private(gmem, inode)
    await asyncio.sleep(0.3)
    assert not convert.done()
    await asyncio.to_thread(client.kill)
    await convert


async def test_a_lease_that_nobody_keeps_alive_ends_its_hold(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_inode(clean_host, gmem)
    hold = await pin(gmem, inode, ttl_ms=600)
    assert [h.ttl_ms for h in (await inode.get()).holds] == [600]
    for _ in range(6):
        await asyncio.sleep(0.2)
        await gmem.keep_alive(holds=[hold])
    assert len((await inode.get()).holds) == 1
    # Whoever waits for the pages is woken by its end.
    await to_private(gmem, inode)
    assert list((await inode.get()).holds) == []
    with pytest.raises(NoSuchObject) as caught:
        await gmem.keep_alive(holds=[hold])
    assert caught.value.reason is Reason.HOLDER_UNKNOWN


async def test_a_service_that_stops_ends_the_wait(own_host: Host) -> None:
    async with own_host.clients() as (_, gmem):
        inode = await new_inode(own_host, gmem)
        await pin(gmem, inode)
        convert = to_private(gmem, inode)
        await asyncio.sleep(0.3)
        own_host.kill("guest_memfd", signal.SIGTERM)
        with pytest.raises(Contended) as caught:
            await convert
        assert caught.value.reason is Reason.INTERRUPTED
