"""Plain memfds: what is weaker is said, what must not be seen is not seen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from gmem.api.guest_memfd.v1 import guest_memfd_pb2 as pb
from gmem.client import GuestMemfdClient, HostAllocatorClient
from gmem.runtime.backend import Backend
from gmem.uapi.errors import Reason
from gmem.uapi.flags import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from gmem.uapi.pages import PAGE_SIZE, SIZE_1G, SIZE_2M
from tests.support.hosts import (
    VM,
    Host,
    Inode,
    Program,
    Refused,
    counters,
    new_inode,
    pool_of,
    refused,
    until,
    wait_until,
)

BACKENDS = (Backend.MEMFD,)
PUNCH = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
LINEAGES = pytest.mark.parametrize("lineage", ["RFC_V1", "RFC_V2"])


async def shared_inode(
    host: Host, gmem: GuestMemfdClient, lineage: str, *, page_size: int = SIZE_2M
) -> Inode:
    """An inode of one page, all of it shared, bound to slot 0."""
    if lineage == "RFC_V1":
        return await new_inode(host, gmem, page_size=page_size)
    made = await gmem.create_guest_memfd(
        size=page_size,
        page_size=page_size,
        lineage=lineage,
        vm=VM,
        support_shared=True,
    )
    inode = Inode(host, gmem, made.name, page_size)
    await gmem.bind_memslot(
        name=made.name,
        vm=VM,
        slot=0,
        base_gfn=0,
        offset=0,
        size=page_size,
        host_faultable=True,
    )
    return inode


async def guest_of(inode: Inode) -> Program:
    """A process that maps the guest view, as the guest process of a VM does."""
    guest = inode.host.program("guest")
    view = await inode.gmem.open_view(
        name=inode.name, view=pb.VIEW_GUEST, vm=VM, guest_pid=guest.pid
    )
    await guest.asked("take", view.token)
    await guest.asked("map")
    return guest


# What private means.


@LINEAGES
async def test_what_a_client_stores_in_a_private_page_reaches_nobody(
    clean_host: Host, gmem: GuestMemfdClient, lineage: str
) -> None:
    inode = await shared_inode(clean_host, gmem, lineage)
    client = await inode.mapped_by()
    await client.asked("raw_store", 0, 0x11)
    await client.asked("dont_need")
    await inode.convert(0, SIZE_2M, private=True)
    guest = await guest_of(inode)
    kept = 0 if lineage == "RFC_V1" else 0x11
    assert await guest.asked("raw_load", 0) == kept

    assert await client.asked("raw_load", 0) == 0
    await client.asked("raw_store", 0, 0x66)
    assert await guest.asked("raw_load", 0) == kept
    with refused(Reason.PAGE_NOT_FAULTABLE) as caught:
        await client.asked("read", PAGE_SIZE)
    assert caught[0].numbers["error_offset"] == PAGE_SIZE

    # Neither as shared memory afterwards, nor as private memory again.
    await guest.asked("raw_store", PAGE_SIZE, 0x22)
    await client.asked("dont_need")
    await inode.convert(0, SIZE_2M, private=False)
    assert await client.asked("raw_load", 0) == kept
    given = 0 if lineage == "RFC_V1" else 0x22
    assert await client.asked("raw_load", PAGE_SIZE) == given
    assert await guest.asked("raw_load", PAGE_SIZE) == 0
    await guest.asked("raw_store", PAGE_SIZE, 0x77)
    await client.asked("dont_need")
    await inode.convert(0, SIZE_2M, private=True)
    assert await guest.asked("raw_load", PAGE_SIZE) == given


async def test_a_mapping_from_before_loses_the_page_at_once(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    """RFC_V2 asks nobody to unmap: the page goes from everybody's page tables."""
    inode = await shared_inode(clean_host, gmem, "RFC_V2")
    clients = [await inode.mapped_by(name) for name in ("one", "two")]
    await clients[0].asked("raw_store", 5 * PAGE_SIZE, 0x55)
    assert await clients[1].asked("raw_load", 5 * PAGE_SIZE) == 0x55
    await inode.convert(5 * PAGE_SIZE, PAGE_SIZE, private=True)
    for client in clients:
        assert await client.asked("raw_load", 5 * PAGE_SIZE) == 0
        with refused(Reason.PAGE_NOT_FAULTABLE):
            await client.asked("write", 5 * PAGE_SIZE, 1)
    await inode.convert(5 * PAGE_SIZE, PAGE_SIZE, private=False)
    assert await clients[1].asked("raw_load", 5 * PAGE_SIZE) == 0x55


async def test_stores_before_the_slot_is_bound_are_not_shared_later(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_inode(clean_host, gmem, bound=False)
    client = await inode.mapped_by()
    await client.asked("raw_store", 0, 0x44)
    await gmem.bind_memslot(
        name=inode.name,
        vm=VM,
        slot=0,
        base_gfn=0,
        offset=0,
        size=SIZE_2M,
        host_faultable=True,
    )
    assert await client.asked("raw_load", 0) == 0


async def test_a_safe_access_stops_at_the_first_private_page(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await shared_inode(clean_host, gmem, "RFC_V2")
    client = await inode.mapped_by()
    await inode.convert(3 * PAGE_SIZE, PAGE_SIZE, private=True)
    with refused(Reason.PAGE_NOT_FAULTABLE) as caught:
        await client.asked("write", PAGE_SIZE, 9, 8 * PAGE_SIZE)
    assert caught[0].numbers["error_offset"] == 3 * PAGE_SIZE
    # As for a fault: what lies before it was written, what lies behind it was not.
    assert await client.asked("count_other", PAGE_SIZE, 2 * PAGE_SIZE, 9) == 0
    assert await client.asked("count_other", 4 * PAGE_SIZE, 5 * PAGE_SIZE, 0) == 0


# What nobody tells.


async def test_a_touched_hole_is_counted_soon(
    clean_host: Host, gmem: GuestMemfdClient, allocator: HostAllocatorClient
) -> None:
    """No call is made on the inode: the service looks by itself."""
    inode = await new_inode(clean_host, gmem, page_size=SIZE_1G)
    client = await inode.mapped_by()
    before = pool_of(await counters(allocator), SIZE_1G).free_huge_pages
    await client.asked("raw_store", 77 * PAGE_SIZE, 0x21)

    async def taken() -> bool:
        now = pool_of(await counters(allocator), SIZE_1G).free_huge_pages
        return now == before - 1

    await until(taken, "the folio of a touched page")
    # Splitting it zeroes what it held before, which is not what was stored since.
    assert await client.asked("raw_load", 77 * PAGE_SIZE) == 0x21
    assert (await inode.get()).split_folios == 1


async def test_a_punch_forgets_and_a_store_afterwards_is_kept(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_inode(clean_host, gmem, pages=2)
    client = await inode.mapped_by()
    await client.asked("write", 0, 5, 2 * SIZE_2M)
    await inode.fallocate(PUNCH, 0, SIZE_2M)
    assert (await inode.get()).st_blocks == SIZE_2M // 512
    await client.asked("raw_store", PAGE_SIZE, 6)
    assert (await inode.get()).st_blocks == 2 * SIZE_2M // 512
    assert await client.asked("raw_load", PAGE_SIZE) == 6
    assert await client.asked("count_other", 0, PAGE_SIZE, 0) == 0
    assert await client.asked("count_other", SIZE_2M, SIZE_2M, 5) == 0


async def test_a_system_call_on_the_descriptor_reaches_the_memfd_alone(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_inode(clean_host, gmem)
    client = await inode.mapped_by()
    await client.asked("raw_store", 0, 3)
    before = await inode.get()
    await client.asked("fallocate", PUNCH, 0, SIZE_2M)
    assert await client.asked("raw_load", 0) == 0
    assert await inode.get() == before
    for size in (0, 2 * SIZE_2M):
        with pytest.raises(Refused, match="EPERM"):
            await client.asked("ftruncate", size)
    assert (await client.asked("convert", 0xC018AF41, 0, PAGE_SIZE))["errno"] == 25


@pytest.mark.parametrize("keeps", ["mapping", "descriptor"])
async def test_an_open_file_is_counted_until_its_last_user_is_gone(
    clean_host: Host, gmem: GuestMemfdClient, keeps: str
) -> None:
    inode = await new_inode(clean_host, gmem)
    client = await inode.mapped_by()
    other = clean_host.program("other")
    await other.asked("take", await inode.token())
    assert (await inode.get()).host_views_open == 2
    if keeps == "mapping":
        await asyncio.to_thread(other.kill)
    else:
        await asyncio.to_thread(client.kill)

    async def one_left() -> bool:
        return (await inode.get()).host_views_open == 1

    await until(one_left, "the end of one of two open files")


# Crashes.


@pytest.fixture
async def two_pages(
    own_host: Host,
) -> AsyncIterator[tuple[Inode, Program]]:
    """A file of RFC_V2 with page 0 private (0x31) and page 1 shared (0x32)."""
    async with own_host.clients() as (_, gmem):
        inode = await shared_inode(own_host, gmem, "RFC_V2")
        client = await inode.mapped_by()
        for page in (0, 1):
            await client.asked("raw_store", page * PAGE_SIZE, 0x31 + page)
        await inode.convert(0, PAGE_SIZE, private=True)
        yield inode, client


async def test_bytes_and_open_files_survive_a_service_that_is_killed(
    own_host: Host, two_pages: tuple[Inode, Program]
) -> None:
    inode, client = two_pages
    first = own_host.pid("guest_memfd")
    own_host.kill("guest_memfd")
    # Nobody is asked at a fault, so nobody is missed.
    await client.asked("raw_store", 2 * PAGE_SIZE, 0x33)
    wait_until(lambda: own_host.pid("guest_memfd") != first, "a successor")
    state = await inode.get()
    assert (state.host_views_open, state.shared_pages) == (1, 511)
    assert await client.asked("read", PAGE_SIZE, 1) == "32"
    with refused(Reason.PAGE_NOT_FAULTABLE):
        await client.asked("read", 0)
    await inode.convert(0, PAGE_SIZE, private=False)
    values = [await client.asked("raw_load", page * PAGE_SIZE) for page in range(3)]
    assert values == [0x31, 0x32, 0x33]


async def test_a_keeper_that_is_killed_gets_everything_back(
    own_host: Host, two_pages: tuple[Inode, Program]
) -> None:
    inode, client = two_pages
    own_host.kill("keeper")
    wait_until(lambda: bool(own_host.state.dead), "the end of the keeper")
    await asyncio.to_thread(own_host.repair)
    first = own_host.pid("guest_memfd")
    own_host.kill("guest_memfd")
    wait_until(lambda: own_host.pid("guest_memfd") != first, "a successor")
    await inode.convert(0, PAGE_SIZE, private=False)
    assert await client.asked("raw_load", 0) == 0x31


async def test_kills_under_a_converter_and_a_writer_lose_nothing(
    own_host: Host, two_pages: tuple[Inode, Program]
) -> None:
    """The writer's page is beside the one that is converted, in one huge page."""
    inode, client = two_pages
    client.tell("count_up", [7 * PAGE_SIZE])
    for round_ in range(4):
        first = own_host.pid("guest_memfd")
        converting = asyncio.create_task(_convert_to_and_fro(inode, 40))
        await asyncio.sleep(0.05 + 0.03 * round_)
        own_host.kill("guest_memfd")
        await converting
        wait_until(lambda old=first: own_host.pid("guest_memfd") != old, "a successor")  # type: ignore[misc]
    client.tell("counters", [7 * PAGE_SIZE])
    rounds = (await asyncio.to_thread(client.heard))["rounds"]
    assert await asyncio.to_thread(client.heard) == [rounds]
    await inode.convert(0, PAGE_SIZE, private=False)
    assert await client.asked("raw_load", 0) == 0x31


async def _convert_to_and_fro(inode: Inode, times: int) -> None:
    for _ in range(times):
        await inode.convert(0, PAGE_SIZE, private=False)
        await inode.convert(0, PAGE_SIZE, private=True)
