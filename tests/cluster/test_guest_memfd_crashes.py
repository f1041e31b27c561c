"""A service is killed: who notices, how it fails, and that nothing is left."""

from __future__ import annotations

import asyncio
import time

import pytest

from gmem.uapi.errors import TransportError
from gmem.uapi.pages import PAGE_SIZE, SIZE_2M
from tests.support.hosts import SIGBUS, Host, Refused, new_inode, wait_until

pytestmark = pytest.mark.fuse

FAULT_WAIT_MAX = 4.0


async def test_when_guest_memfd_and_keeper_are_killed_clients_fail_closed(
    own_host: Host,
) -> None:
    async with own_host.clients() as (_, gmem):
        inode = await new_inode(own_host, gmem, pages=2)
        one, two = await inode.mapped_by("one"), await inode.mapped_by("two")
        for client in (one, two):
            await client.asked("raw_store", 0, 9)
        # In this order, because the keeper would stand in for the service.
        for service in ("keeper", "guest_memfd"):
            own_host.kill(service)
            await asyncio.to_thread(own_host.exit_status, service)

        # What is mapped stays readable without a word; the window notices.
        assert await one.asked("raw_load", 0) == 9
        dead = r"guest_memfd at .* (closed the broker|serves its files no more)"
        accesses: dict[str, list[int]] = {"read": [0], "write": [0, 1]}
        for op, args in (accesses | {"require_alive": []}).items():
            with pytest.raises(Refused, match=dead):
                await one.asked(op, *args)
        with pytest.raises(Refused, match=r"ENOTCONN|ECONNABORTED"):
            await one.asked("fstat")
        # What nobody touched yet is SIGBUS for everybody.
        for client in (one, two):
            at = SIZE_2M + PAGE_SIZE
            assert await asyncio.to_thread(client.dies_of, "raw_load", at) == SIGBUS

        with pytest.raises(TransportError, match="gmemctl status") as caught:
            await inode.get()
        assert caught.value.service == "guest_memfd"


async def test_when_host_allocator_is_killed_a_fault_ends_within_its_bound(
    own_host: Host,
) -> None:
    async with own_host.clients() as (_, gmem):
        inode = await new_inode(own_host, gmem, pages=2)
        client = await inode.mapped_by()
        await client.asked("raw_store", 0, 4)
        await asyncio.to_thread(own_host.kill, "host_allocator")
        await asyncio.to_thread(own_host.exit_status, "host_allocator")

        # A folio that is there needs no allocator.
        await client.asked("dont_need")
        assert await client.asked("raw_load", 0) == 4
        started = time.monotonic()
        died = await asyncio.to_thread(client.dies_of, "raw_load", SIZE_2M)
        assert died == SIGBUS
        assert time.monotonic() - started < FAULT_WAIT_MAX + 1.5

        with pytest.raises(TransportError) as caught:
            await inode.fallocate(1, SIZE_2M, SIZE_2M)
        assert caught.value.service == "host_allocator"
        assert "host_allocator" in str(caught.value)
        assert "gmemctl status" in str(caught.value)
        # What needs nobody else goes on.
        await inode.convert(0, PAGE_SIZE, private=True)
        assert (await inode.get()).private_pages == 1


async def test_when_the_keeper_is_killed_the_views_are_served_on(
    own_host: Host,
) -> None:
    async with own_host.clients() as (_, gmem):
        inode = await new_inode(own_host, gmem)
        client = await inode.mapped_by()
        await asyncio.to_thread(own_host.kill, "keeper")
        wait_until(
            lambda: any(
                "keeper is gone" in line["event"]
                for line in own_host.log("guest_memfd")
            ),
            "the line about the keeper",
        )
        await client.asked("raw_store", 0, 1)
        await client.asked("dont_need")
        await inode.convert(0, inode.size, private=True)


async def test_a_host_that_lost_a_service_comes_up_again_clean(own_host: Host) -> None:
    async with own_host.clients() as (_, gmem):
        inode = await new_inode(own_host, gmem)
        client = await inode.mapped_by()
        await client.asked("raw_store", 0, 1)
    # A parked fault, a mapping and dirty pages, and then everything dies at once.
    services = ("host_allocator", "keeper", "guest_memfd")
    for service in services:
        own_host.kill(service)
    await asyncio.to_thread(client.kill)
    for service in services:
        await asyncio.to_thread(own_host.exit_status, service)
    restarted = await asyncio.to_thread(own_host.restart)
    async with restarted.clients() as (allocator, gmem):
        assert await gmem.list_guest_memfds() == []
        assert (await allocator.get_statistics()).pools[0].resv_huge_pages == 0
        inode = await new_inode(restarted, gmem)
        assert await (await inode.mapped_by()).asked("raw_load", 0) == 0
