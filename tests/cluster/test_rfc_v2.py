"""RFC_V2 with real files: ioctls on the host view, what clients meet, what comes back.

Names end in the lines of docs/semantics.md that they show, where there is one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from gmem.api.guest_memfd.v1 import guest_memfd_pb2 as pb
from gmem.client import GuestMemfdClient, HostAllocatorClient
from gmem.runtime.backend import Backend
from gmem.runtime.config import HostShape, NodeShape
from gmem.uapi.errors import Errno, NoSuchObject, Reason
from gmem.uapi.flags import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    KVM_GMEM_CONVERT_PRIVATE,
    KVM_GMEM_CONVERT_SHARED,
)
from gmem.uapi.pages import PAGE_SIZE, SIZE_1G, SIZE_2M
from tests.support.as_backend import (
    convert,
    convert_often,
    fallocate,
    is_kept_out,
)
from tests.support.backends import BOTH
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
    running_host,
    until,
)

pytestmark = pytest.mark.fuse
BACKENDS = BOTH

KEEP = FALLOC_FL_KEEP_SIZE
PUNCH = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
PRIVATE, SHARED = KVM_GMEM_CONVERT_PRIVATE, KVM_GMEM_CONVERT_SHARED
SIZES = pytest.mark.parametrize(
    "page_size", [PAGE_SIZE, SIZE_2M, SIZE_1G], ids=["4K", "2M", "1G"]
)
OK = 0


@pytest.fixture(scope="module")
def module_host(backend: Backend) -> Iterator[Host]:
    shape = HostShape(
        nodes=(NodeShape(memory_size=8 * SIZE_1G, huge_pages={SIZE_1G: 4, SIZE_2M: 8}),)
    )
    with running_host(shape, backend=backend) as host:
        yield host


async def new_v2(
    host: Host,
    gmem: GuestMemfdClient,
    *,
    page_size: int = SIZE_2M,
    pages: int = 1,
    support_shared: bool = True,
    init_private: bool = False,
) -> Inode:
    size = page_size * pages
    made = await gmem.create_guest_memfd(
        size=size,
        page_size=page_size,
        lineage="RFC_V2",
        vm=VM,
        support_shared=support_shared,
        init_private=init_private,
    )
    return Inode(host, gmem, made.name, size)


async def refuses(client: Program, offset: int) -> bool:
    """Tell whether a safe access is refused, as a plain one would be deadly."""
    with refused(Reason.PAGE_NOT_FAULTABLE):
        await client.asked("read", offset)
    return True


# Flags.


async def test_without_support_shared_mmap_is_enodev_c083(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_v2(clean_host, gmem, support_shared=False)
    client = clean_host.program()
    client.inode = inode
    await client.asked("take", await inode.token())
    with pytest.raises(Refused, match="ENODEV"):
        await client.asked("map")
    assert (await client.asked("fstat"))["st_size"] == SIZE_2M
    # Nothing ever differs there, so a conversion has nothing to do.
    assert await convert(client, SHARED, 0, SIZE_2M) == (OK, 0)
    await fallocate(client, KEEP, 0, SIZE_2M)
    assert (await inode.get()).whole_folios == 1


@SIZES
async def test_init_private_maps_and_a_touch_is_sigbus_c082(
    clean_host: Host, gmem: GuestMemfdClient, page_size: int
) -> None:
    inode = await new_v2(clean_host, gmem, page_size=page_size, init_private=True)
    one, two = await inode.mapped_by("one"), await inode.mapped_by("two")
    assert await is_kept_out(one, 0)
    assert await convert(two, SHARED, 0, page_size) == (OK, 0)
    assert await two.asked("raw_load", 0) == 0


@SIZES
async def test_punching_the_first_page_zeroes_it_alone_c081(
    clean_host: Host, gmem: GuestMemfdClient, page_size: int
) -> None:
    inode = await new_v2(clean_host, gmem, page_size=page_size, pages=2)
    client = await inode.mapped_by()
    for at in (0, page_size):
        await client.asked("raw_store", at, 0xAA)
    await fallocate(client, PUNCH, 0, page_size)
    assert await client.asked("raw_load", 0) == 0
    assert await client.asked("raw_load", page_size) == 0xAA
    await client.asked("raw_store", 0, 0xBB)
    assert await client.asked("raw_load", 0) == 0xBB


# The ioctls.


@SIZES
async def test_the_kernel_unmaps_and_contents_stay_c087(
    clean_host: Host, gmem: GuestMemfdClient, page_size: int
) -> None:
    """The caller itself has the page mapped, and so has another process."""
    inode = await new_v2(clean_host, gmem, page_size=page_size)
    caller, victim, other = [
        await inode.mapped_by(name) for name in ("caller", "victim", "other")
    ]
    await caller.asked("raw_store", 0, 0xA1)
    for client in (victim, other):
        assert await client.asked("raw_load", 0) == 0xA1

    assert await convert(caller, PRIVATE, 0, page_size) == (OK, 0)

    assert await is_kept_out(victim, 0)
    for client in (caller, other):
        assert await refuses(client, 0)
    state = await inode.get()
    assert (state.shared_pages, state.split_folios) == (0, 0)
    assert await convert(other, SHARED, 0, page_size) == (OK, 0)
    for client in (caller, other):
        assert await client.asked("raw_load", 0) == 0xA1


@SIZES
async def test_convert_before_anything_is_allocated_c089(
    clean_host: Host, gmem: GuestMemfdClient, page_size: int
) -> None:
    inode = await new_v2(clean_host, gmem, page_size=page_size)
    client = await inode.mapped_by()
    assert await convert(client, PRIVATE, 0, page_size) == (OK, 0)
    assert (await inode.get()).st_blocks == 0
    assert await is_kept_out(client, 0)


@SIZES
async def test_one_page_of_four_leaves_the_others_shared_c091(
    clean_host: Host, gmem: GuestMemfdClient, page_size: int
) -> None:
    inode = await new_v2(clean_host, gmem, page_size=page_size, pages=4)
    client = await inode.mapped_by()
    offsets = [page * PAGE_SIZE for page in range(4)]
    for value, at in enumerate(offsets, start=1):
        await client.asked("raw_store", at, value)
    for at in offsets:
        for request in (PRIVATE, SHARED):
            assert await convert(client, request, at, PAGE_SIZE) == (OK, 0)
            values = [
                await client.asked("raw_load", there)
                for there in offsets
                if request == SHARED or there != at
            ]
            expected = [
                value
                for value, there in enumerate(offsets, start=1)
                if request == SHARED or there != at
            ]
            assert values == expected


@SIZES
@pytest.mark.parametrize("kind", [pb.HOLD_KIND_PIN, pb.HOLD_KIND_PLAIN])
async def test_a_held_page_is_eagain_at_its_offset_c092(
    clean_host: Host, gmem: GuestMemfdClient, page_size: int, kind: Any
) -> None:
    inode = await new_v2(clean_host, gmem, page_size=page_size, pages=4)
    client = await inode.mapped_by()
    for page in range(4):
        at = page * PAGE_SIZE
        await client.asked("raw_store", at, page + 1)
        hold = await gmem.pin_pages(
            name=inode.name, offset=at, size=PAGE_SIZE, holder="vhost", kind=kind
        )
        before = await inode.get()
        found = await convert(client, PRIVATE, 0, 4 * PAGE_SIZE)
        assert found == (Errno.EAGAIN, at)
        assert await inode.get() == before
        assert await client.asked("raw_load", at) == page + 1
        with refused(Reason.PAGE_IN_USE, "vhost", errno="EAGAIN") as caught:
            await inode.convert(0, 4 * PAGE_SIZE, private=True)
        assert caught[0].numbers["error_offset"] == at
        assert caught[0].numbers["holders"] == "vhost"
        await gmem.unpin_pages(hold=hold)
        assert await convert(client, PRIVATE, 0, 4 * PAGE_SIZE) == (OK, 0)
        assert await convert(client, SHARED, 0, 4 * PAGE_SIZE) == (OK, 0)


@SIZES
async def test_punching_keeps_who_may_fault_c093(
    clean_host: Host, gmem: GuestMemfdClient, page_size: int
) -> None:
    inode = await new_v2(clean_host, gmem, page_size=page_size, pages=2)
    one, two = await inode.mapped_by("one"), await inode.mapped_by("two")
    await one.asked("raw_store", 0, 1)
    assert await convert(one, PRIVATE, page_size, page_size) == (OK, 0)
    await fallocate(one, KEEP, page_size, page_size)
    await fallocate(one, PUNCH, 0, 2 * page_size)
    assert await one.asked("raw_load", 0) == 0
    assert await is_kept_out(two, page_size)


async def test_ioctls_that_are_refused(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_v2(clean_host, gmem)
    client = await inode.mapped_by()
    cases = [
        (PRIVATE, 0, PAGE_SIZE, 1, Errno.EINVAL),
        (PRIVATE, 1, PAGE_SIZE, 0, Errno.EINVAL),
        (PRIVATE, 0, 1, 0, Errno.EINVAL),
        (SHARED, 0, SIZE_2M + PAGE_SIZE, 0, Errno.EINVAL),
        (SHARED, SIZE_2M, PAGE_SIZE, 0, Errno.EINVAL),
        (SHARED, (1 << 64) - PAGE_SIZE, 2 * PAGE_SIZE, 0, Errno.EINVAL),
        (PRIVATE, 3, 0, 0, OK),
        (PRIVATE + 1, 0, PAGE_SIZE, 0, Errno.ENOTTY),
        (0xC018AE41, 0, PAGE_SIZE, 0, Errno.ENOTTY),
    ]
    for request, offset, size, error_offset, number in cases:
        answer = await client.asked("convert", request, offset, size, error_offset)
        assert answer["errno"] == number, (hex(request), offset, size)
        assert answer["error_offset"] == error_offset
    assert (await inode.get()).shared_pages == SIZE_2M // PAGE_SIZE

    first = await new_inode(clean_host, gmem)
    client = await first.mapped_by("first")
    assert await convert(client, PRIVATE, 0, SIZE_2M) == (Errno.ENOTTY, 0)


async def test_a_refused_conversion_costs_a_writing_client_nothing(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_v2(clean_host, gmem)
    writer, caller = await inode.mapped_by("writer"), await inode.mapped_by("caller")
    pages = [page * PAGE_SIZE for page in (0, 1, 7)]
    await gmem.pin_pages(
        name=inode.name, offset=9 * PAGE_SIZE, size=PAGE_SIZE, holder="nic"
    )
    writer.tell("count_up", pages)
    for _ in range(200):
        found = await convert(caller, PRIVATE, 0, SIZE_2M)
        assert found == (Errno.EAGAIN, 9 * PAGE_SIZE)
    writer.tell("counters", pages)
    rounds = (await asyncio.to_thread(writer.heard))["rounds"]
    assert await asyncio.to_thread(writer.heard) == [rounds] * 3
    assert rounds > 0


async def test_two_clients_convert_at_once(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_v2(clean_host, gmem, pages=2)
    clients = [await inode.mapped_by(name) for name in ("one", "two")]
    for number, client in enumerate(clients):
        await client.asked("raw_store", number * PAGE_SIZE, number + 5)
    answers = await asyncio.gather(
        *(
            convert_often(client, number * PAGE_SIZE, PAGE_SIZE, 100)
            for number, client in enumerate(clients)
        )
    )
    assert answers == [{"0": 200}] * 2
    assert [await clients[0].asked("raw_load", n * PAGE_SIZE) for n in (0, 1)] == [5, 6]


# Punching, and the end.


async def test_punching_a_held_huge_page_is_eagain_and_earlier_ones_are_gone(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_v2(clean_host, gmem, pages=3)
    client = await inode.mapped_by()
    for page in range(3):
        await client.asked("raw_store", page * SIZE_2M, page + 1)
    at = SIZE_2M + 5 * PAGE_SIZE
    hold = await gmem.pin_pages(
        name=inode.name, offset=at, size=PAGE_SIZE, holder="nic"
    )
    with pytest.raises(Refused, match="EAGAIN"):
        await fallocate(client, PUNCH, 0, inode.size)
    with refused(Reason.PAGE_IN_USE, "nic", errno="EAGAIN") as caught:
        await inode.fallocate(PUNCH, 0, inode.size)
    assert caught[0].numbers["error_offset"] == at
    values = [await client.asked("raw_load", page * SIZE_2M) for page in range(3)]
    assert values == [0, 2, 3]
    await gmem.unpin_pages(hold=hold)
    await fallocate(client, PUNCH, 0, inode.size)
    assert (await inode.get()).st_blocks == 0


@SIZES
async def test_a_private_page_can_be_punched_c096(
    clean_host: Host, gmem: GuestMemfdClient, page_size: int
) -> None:
    inode = await new_v2(clean_host, gmem, page_size=page_size, init_private=True)
    await inode.fallocate(KEEP, 0, page_size)
    await inode.fallocate(PUNCH, 0, page_size)
    assert (await inode.get()).st_blocks == 0


@SIZES
@pytest.mark.parametrize("private", [True, False], ids=["private", "shared"])
@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "unpinned"])
async def test_close_everything_and_statistics_come_back_c097(  # noqa: PLR0917
    clean_host: Host,
    gmem: GuestMemfdClient,
    allocator: HostAllocatorClient,
    page_size: int,
    pinned: bool,
    private: bool,
) -> None:
    before = await counters(allocator)
    known = {one.name for one in await gmem.list_operations()}
    inode = await new_v2(clean_host, gmem, page_size=page_size, pages=2)
    client = await inode.mapped_by()
    for page in (0, 1):
        await client.asked("raw_store", page * page_size, 1)
    hold = 0
    if pinned:
        hold = await gmem.pin_pages(
            name=inode.name, offset=page_size, size=PAGE_SIZE, holder="nic"
        )
    if private:
        # What is held stays shared: the first of the two pages becomes private.
        assert await convert(client, PRIVATE, 0, page_size) == (OK, 0)
    await gmem.delete_guest_memfd(name=inode.name)
    await asyncio.to_thread(clean_host.end_programs)

    leaves = pinned or page_size > PAGE_SIZE
    operations = await new_operations(gmem, known, at_least=int(leaves))
    assert await gmem.list_guest_memfds() == []
    if pinned:
        (operation,) = operations
        await until_folios_left(gmem, operation.name, 1)
        operation = await gmem.get_operation(operation.name)
        assert not operation.done
        assert operation.metadata.guest_memfd == inode.name
        assert operation.metadata.pages_left == 1
        if page_size > PAGE_SIZE:
            pool = pool_of(await allocator.get_statistics(), page_size)
            free = pool_of(before, page_size).free_huge_pages
            assert pool.free_huge_pages == free - 1
        await gmem.unpin_pages(hold=hold)
        await until_folios_left(gmem, operation.name, 0)

    async def back() -> bool:
        return await counters(allocator) == before

    await until(back, "every counter back", seconds_max=1.0 if not pinned else 20.0)
    for operation in operations:
        # The allocator has the folio a moment before guest_memfd has its answer.
        await until_folios_left(gmem, operation.name, 0)
        assert (await gmem.get_operation(operation.name)).done


async def new_operations(
    gmem: GuestMemfdClient, known: set[str], at_least: int
) -> list[pb.Operation]:
    """Wait for the end of the last inode; return what it left behind.

    A file whose folios are all whole and free leaves nothing.
    """
    found: list[pb.Operation] = []

    async def begun() -> bool:
        found[:] = [o for o in await gmem.list_operations() if o.name not in known]
        inodes = await gmem.list_guest_memfds()
        return len(found) >= at_least and not inodes

    await until(begun, "the end of the inode")
    return found


async def until_folios_left(gmem: GuestMemfdClient, name: str, left: int) -> None:
    async def reached() -> bool:
        return (await gmem.get_operation(name)).metadata.folios_left == left

    await until(reached, f"{left} folios left")


async def test_a_client_that_ends_gives_the_pages_of_a_dead_inode_back(
    clean_host: Host, gmem: GuestMemfdClient, allocator: HostAllocatorClient
) -> None:
    before = await counters(allocator)
    device = clean_host.program("device", "life-9")
    inode = await new_v2(clean_host, gmem)
    async with clean_host.clients("device", "life-9") as (_, its):
        await its.pin_pages(name=inode.name, offset=0, size=SIZE_2M, holder="ring")
    await gmem.delete_guest_memfd(name=inode.name)
    assert await gmem.list_guest_memfds() == []
    assert await counters(allocator) != before
    await asyncio.to_thread(device.kill)

    async def back() -> bool:
        return await counters(allocator) == before

    await until(back, "every counter back")


async def test_operations_that_nobody_knows(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    for name in ("hosts/h/operations/999", "hosts/h/operations/x", "operations/1"):
        with pytest.raises(NoSuchObject) as caught:
            await gmem.get_operation(name)
        assert caught.value.reason is Reason.OPERATION_UNKNOWN
