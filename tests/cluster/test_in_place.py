"""IN_PLACE with real files: KVM_SET_MEMORY_ATTRIBUTES2 on real descriptors.

Names end in the lines of docs/semantics.md that they show, where there is one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from gmem.api.guest_memfd.v1 import guest_memfd_pb2 as pb
from gmem.client import GuestMemfdClient, HostAllocatorClient
from gmem.runtime.config import HostShape, NodeShape
from gmem.uapi.errors import Errno, Reason
from gmem.uapi.flags import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    KVM_GMEM_CONVERT_PRIVATE,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
)
from gmem.uapi.pages import PAGE_SIZE, SIZE_1G, SIZE_2M
from tests.support.hosts import (
    SIGBUS,
    VM,
    Host,
    Inode,
    Program,
    Refused,
    counters,
    refused,
    running_host,
    until,
)

pytestmark = pytest.mark.fuse

KEEP = FALLOC_FL_KEEP_SIZE
PUNCH = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
PRIVATE, SHARED = KVM_MEMORY_ATTRIBUTE_PRIVATE, 0
FLAGS, ERROR_OFFSET, RESERVED = "3", "4", "5"
"""Places of words in struct kvm_memory_attributes2."""
SIZES = pytest.mark.parametrize(
    "page_size", [PAGE_SIZE, SIZE_2M, SIZE_1G], ids=["4K", "2M", "1G"]
)
HUGE = pytest.mark.parametrize("page_size", [SIZE_2M, SIZE_1G], ids=["2M", "1G"])
OK: dict[str, int] = {"errno": 0}


@pytest.fixture(scope="module")
def module_host() -> Iterator[Host]:
    shape = HostShape(
        nodes=(NodeShape(memory_size=8 * SIZE_1G, huge_pages={SIZE_1G: 4, SIZE_2M: 8}),)
    )
    with running_host(shape) as host:
        yield host


async def new_inode(
    host: Host,
    gmem: GuestMemfdClient,
    *,
    page_size: int = PAGE_SIZE,
    pages: int = 4,
    shared: bool = True,
    **options: Any,
) -> Inode:
    """Make a file; every page of it begins private, whatever its size."""
    size = page_size * pages
    made = await gmem.create_guest_memfd(
        size=size,
        page_size=page_size,
        lineage="IN_PLACE",
        vm=VM,
        mmap=True,
        **options,
    )
    inode = Inode(host, gmem, made.name, size)
    if shared:
        await inode.convert(0, size, private=False)
    return inode


async def convert(
    client: Program, attributes: int, offset: int, size: int, **words: int
) -> dict[str, int]:
    """Make the ioctl; return its errno and the words of the struct that changed."""
    answer: dict[str, int] = await client.asked(
        "set_attributes", offset, size, attributes, words
    )
    return answer


def eagain(offset: int) -> dict[str, int]:
    """The answer that names the page at `offset`."""
    answer: dict[str, int] = {"errno": Errno.EAGAIN}
    return answer | ({ERROR_OFFSET: offset} if offset else {})


async def dies(client: Program, op: str, *args: int) -> bool:
    return await asyncio.to_thread(client.dies_of, op, *args) == SIGBUS


async def refuses(client: Program, offset: int) -> bool:
    """Tell whether a safe access is refused, as a plain one would be deadly."""
    with refused(Reason.PAGE_NOT_FAULTABLE):
        await client.asked("read", offset)
    return True


# What a file begins as.


@SIZES
async def test_pages_begin_private_and_are_shared_by_the_ioctl_c088(
    clean_host: Host, gmem: GuestMemfdClient, page_size: int
) -> None:
    inode = await new_inode(clean_host, gmem, page_size=page_size, shared=False)
    one, two = await inode.mapped_by("one"), await inode.mapped_by("two")
    assert await dies(one, "raw_load", 0)
    assert await convert(two, SHARED, 0, inode.size) == OK
    assert await two.asked("raw_load", 0) == 0


async def test_init_shared_begins_shared(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_inode(clean_host, gmem, shared=False, init_shared=True)
    client = await inode.mapped_by()
    await client.asked("raw_store", 0, 7)
    assert (await inode.get()).private_pages == 0


# The ioctl.


@SIZES
async def test_the_kernel_unmaps_and_contents_stay_c087(
    clean_host: Host, gmem: GuestMemfdClient, page_size: int
) -> None:
    inode = await new_inode(clean_host, gmem, page_size=page_size, pages=2)
    caller, victim, other = [
        await inode.mapped_by(name) for name in ("caller", "victim", "other")
    ]
    await caller.asked("raw_store", 0, 0xA1)
    for client in (victim, other):
        assert await client.asked("raw_load", 0) == 0xA1

    assert await convert(caller, PRIVATE, 0, inode.size) == OK

    assert await dies(victim, "raw_load", 0)
    for client in (caller, other):
        assert await refuses(client, 0)
    state = await inode.get()
    assert (state.shared_pages, state.split_folios) == (0, 0)
    assert await convert(other, SHARED, 0, inode.size) == OK
    for client in (caller, other):
        assert await client.asked("raw_load", 0) == 0xA1


@SIZES
async def test_convert_before_anything_is_allocated_c089(
    clean_host: Host, gmem: GuestMemfdClient, page_size: int
) -> None:
    inode = await new_inode(clean_host, gmem, page_size=page_size, pages=1)
    client = await inode.mapped_by()
    assert await convert(client, PRIVATE, 0, page_size) == OK
    assert (await inode.get()).st_blocks == 0
    assert await dies(client, "raw_load", 0)


@SIZES
@pytest.mark.parametrize("page", range(4))
async def test_one_page_of_four_leaves_the_others_shared_c091(
    clean_host: Host, gmem: GuestMemfdClient, page_size: int, page: int
) -> None:
    inode = await new_inode(clean_host, gmem, page_size=page_size)
    client = await inode.mapped_by()
    offsets = [index * PAGE_SIZE for index in range(4)]
    for value, at in enumerate(offsets, start=1):
        await client.asked("raw_store", at, value)
    at = offsets[page]
    assert await convert(client, PRIVATE, at, PAGE_SIZE) == OK
    assert await refuses(client, at)
    others = [await client.asked("raw_load", there) for there in offsets if there != at]
    assert others == [value for value in range(1, 5) if value != page + 1]
    assert await convert(client, SHARED, at, PAGE_SIZE) == OK
    assert [await client.asked("raw_load", there) for there in offsets] == [1, 2, 3, 4]


@SIZES
@pytest.mark.parametrize("kind", [pb.HOLD_KIND_PIN, pb.HOLD_KIND_PLAIN])
async def test_a_held_page_is_eagain_at_its_offset_c092(
    clean_host: Host, gmem: GuestMemfdClient, page_size: int, kind: Any
) -> None:
    inode = await new_inode(clean_host, gmem, page_size=page_size)
    client = await inode.mapped_by()
    for page in range(4):
        at = page * PAGE_SIZE
        await client.asked("raw_store", at, page + 1)
        hold = await gmem.pin_pages(
            name=inode.name, offset=at, size=PAGE_SIZE, holder="vhost", kind=kind
        )
        before = await inode.get()
        # What the caller wrote there is no matter.
        found = await convert(client, PRIVATE, 0, 4 * PAGE_SIZE, **{ERROR_OFFSET: 5})
        assert found == {"errno": Errno.EAGAIN, ERROR_OFFSET: at}
        # The page that is held is where the range begins.
        assert await convert(client, PRIVATE, at, PAGE_SIZE) == eagain(at)
        assert await inode.get() == before
        assert await client.asked("raw_load", at) == page + 1
        with refused(Reason.PAGE_IN_USE, "vhost", errno="EAGAIN") as caught:
            await inode.convert(0, 4 * PAGE_SIZE, private=True)
        assert caught[0].numbers["error_offset"] == at
        await gmem.unpin_pages(hold=hold)
        assert await convert(client, PRIVATE, 0, 4 * PAGE_SIZE) == OK
        assert await convert(client, SHARED, 0, 4 * PAGE_SIZE) == OK


async def test_checks_come_in_the_order_of_the_series(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_inode(clean_host, gmem)
    client = await inode.mapped_by()
    end = inode.size
    cases: list[tuple[int, int, int, dict[str, int]]] = [
        (0, PAGE_SIZE, PRIVATE, {FLAGS: 1}),
        (0, PAGE_SIZE, PRIVATE, {RESERVED: 1}),
        (0, PAGE_SIZE, PRIVATE, {"15": 1 << 63}),
        (0, PAGE_SIZE, PRIVATE | 1, {}),
        (0, PAGE_SIZE, 1 << 63, {}),
        (0, 0, PRIVATE, {}),
        ((1 << 64) - PAGE_SIZE, 2 * PAGE_SIZE, PRIVATE, {}),
        (1, PAGE_SIZE, PRIVATE, {}),
        (0, PAGE_SIZE - 1, PRIVATE, {}),
        (end, PAGE_SIZE, PRIVATE, {}),
        (PAGE_SIZE, end, PRIVATE, {}),
    ]
    for offset, size, attributes, words in cases:
        found = await convert(client, attributes, offset, size, **words)
        assert found == {"errno": Errno.EINVAL}, (offset, size, attributes, words)
    assert (await inode.get()).private_pages == 0
    answer = await client.asked("convert", KVM_GMEM_CONVERT_PRIVATE, 0, PAGE_SIZE)
    assert answer["errno"] == Errno.ENOTTY


async def test_a_vm_without_private_memory_has_no_attributes(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_inode(clean_host, gmem, shared=False, no_private_memory=True)
    client = await inode.mapped_by()
    for attributes in (PRIVATE, SHARED):
        found = await convert(client, attributes, 0, PAGE_SIZE)
        assert found == {"errno": Errno.EINVAL}
    with refused(Reason.ATTRIBUTE_UNSUPPORTED, "no private memory", errno="EINVAL"):
        await inode.convert(0, PAGE_SIZE, private=False)


@HUGE
async def test_what_lies_before_a_held_page_stays_converted(
    clean_host: Host, gmem: GuestMemfdClient, page_size: int
) -> None:
    inode = await new_inode(clean_host, gmem, page_size=page_size, pages=3)
    client = await inode.mapped_by()
    for page in range(3):
        await client.asked("raw_store", page * page_size, page + 1)
    held = page_size + 7 * PAGE_SIZE
    hold = await gmem.pin_pages(
        name=inode.name, offset=held, size=PAGE_SIZE, holder="nic"
    )
    assert await convert(client, PRIVATE, 0, inode.size) == eagain(held)
    state = await inode.get()
    assert [(run.offset, run.shared) for run in state.fragments] == [
        (0, False),
        (page_size, True),
    ]
    assert await refuses(client, 0)
    assert await client.asked("raw_load", page_size) == 2

    # Whoever wants the rest goes on from there.
    await gmem.unpin_pages(hold=hold)
    assert await convert(client, PRIVATE, held, inode.size - held) == OK
    assert await convert(client, PRIVATE, 0, inode.size) == OK
    state = await inode.get()
    assert (state.shared_pages, state.split_folios) == (0, 0)
    assert await convert(client, SHARED, 0, inode.size) == OK
    values = [await client.asked("raw_load", page * page_size) for page in range(3)]
    assert values == [1, 2, 3]


async def test_a_writing_client_loses_nothing_by_a_refused_conversion(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_inode(clean_host, gmem, page_size=SIZE_2M, pages=1)
    writer, caller = await inode.mapped_by("writer"), await inode.mapped_by("caller")
    pages = [page * PAGE_SIZE for page in (0, 1, 7)]
    at = 9 * PAGE_SIZE
    await gmem.pin_pages(name=inode.name, offset=at, size=PAGE_SIZE, holder="nic")
    writer.tell("count_up", pages)
    for _ in range(50):
        assert await convert(caller, PRIVATE, 0, SIZE_2M) == eagain(at)
    writer.tell("counters", pages)
    rounds = (await asyncio.to_thread(writer.heard))["rounds"]
    assert await asyncio.to_thread(writer.heard) == [rounds] * 3
    assert rounds > 0


async def test_a_process_that_inherits_the_mapping_loses_it_too_c101(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_inode(clean_host, gmem)
    parent = await inode.mapped_by()
    await parent.asked("raw_store", 0, 5)
    child = await parent.asked("fork_and_touch", 0)
    assert await convert(parent, PRIVATE, 0, PAGE_SIZE) == OK
    assert await parent.asked("end_of_child", child) == -SIGBUS


@pytest.mark.parametrize("wait_ms", [None, 20_000])
async def test_the_call_waits_where_the_ioctl_refuses(
    clean_host: Host, gmem: GuestMemfdClient, wait_ms: int | None
) -> None:
    inode = await new_inode(clean_host, gmem, page_size=SIZE_2M, pages=2)
    hold = await gmem.pin_pages(
        name=inode.name, offset=SIZE_2M, size=PAGE_SIZE, holder="nic"
    )
    call = gmem.convert_range(
        ranges=[inode.range(0, inode.size)], to_shared=False, wait_ms=wait_ms
    )
    if wait_ms is None:
        with refused(Reason.PAGE_IN_USE, errno="EAGAIN"):
            await call
        assert (await inode.get()).private_pages == SIZE_2M // PAGE_SIZE
        return
    waiting = asyncio.create_task(call)
    await asyncio.sleep(0.2)
    # Nothing is changed by who waits.
    assert (await inode.get()).private_pages == 0
    await gmem.unpin_pages(hold=hold)
    await waiting
    assert (await inode.get()).shared_pages == 0


# fallocate.


@HUGE
async def test_fallocate_takes_whole_huge_pages_and_a_held_one_is_eagain(
    clean_host: Host, gmem: GuestMemfdClient, page_size: int
) -> None:
    inode = await new_inode(clean_host, gmem, page_size=page_size, pages=2)
    client = await inode.mapped_by()
    for mode in (KEEP, PUNCH):
        with pytest.raises(Refused, match="EINVAL"):
            await client.asked("fallocate", mode, 0, PAGE_SIZE)
    await client.asked("fallocate", KEEP, 0, inode.size)
    await client.asked("raw_store", 0, 7)
    at = page_size + PAGE_SIZE
    hold = await gmem.pin_pages(
        name=inode.name, offset=at, size=PAGE_SIZE, holder="nic"
    )
    with pytest.raises(Refused, match="EAGAIN"):
        await client.asked("fallocate", PUNCH, 0, inode.size)
    assert (await inode.get()).st_blocks == inode.size // 512
    assert await client.asked("raw_load", 0) == 7
    await gmem.unpin_pages(hold=hold)
    await client.asked("fallocate", PUNCH, 0, inode.size)
    assert (await inode.get()).st_blocks == 0


@SIZES
@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "unpinned"])
async def test_close_everything_and_statistics_come_back_c097(
    clean_host: Host,
    gmem: GuestMemfdClient,
    allocator: HostAllocatorClient,
    page_size: int,
    pinned: bool,
) -> None:
    before = await counters(allocator)
    known = {one.name for one in await gmem.list_operations()}
    inode = await new_inode(clean_host, gmem, page_size=page_size, pages=2)
    client = await inode.mapped_by()
    for page in (0, 1):
        await client.asked("raw_store", page * page_size, 1)
    hold = 0
    if pinned:
        hold = await gmem.pin_pages(
            name=inode.name, offset=page_size, size=PAGE_SIZE, holder="nic"
        )
    await gmem.delete_guest_memfd(name=inode.name)
    await asyncio.to_thread(clean_host.end_programs)

    async def left() -> list[tuple[int, int]]:
        operations = await gmem.list_operations()
        new = [one.metadata for one in operations if one.name not in known]
        return [(one.pages_left, one.folios_left) for one in new]

    if pinned:

        async def is_left() -> bool:
            return await left() == [(1, 1)]

        await until(is_left, "the one folio that is held")
        await gmem.unpin_pages(hold=hold)

    async def back() -> bool:
        return await counters(allocator) == before

    await until(back, "every counter back")
    # What nobody holds was merged before the inode went, and left nothing to do.
    assert bool(await left()) is pinned


# The parameter.


@pytest.fixture
def without_conversion() -> Iterator[Host]:
    shape = HostShape(
        nodes=(NodeShape(memory_size=SIZE_1G),), gmem_in_place_conversion=False
    )
    with running_host(shape) as host:
        yield host


async def test_a_host_that_was_booted_without_has_no_such_ioctl(
    without_conversion: Host,
) -> None:
    host = without_conversion
    async with host.clients() as (_, gmem):
        inode = await new_inode(host, gmem, shared=False, init_shared=True)
        client = await inode.mapped_by()
        found = await convert(client, PRIVATE, 1, 1, **{FLAGS: 1})
        assert found == {"errno": Errno.ENOTTY}
        with refused(Reason.IOCTL_UNKNOWN, errno="ENOTTY"):
            await inode.convert(0, PAGE_SIZE, private=True)
        assert await client.asked("raw_load", 0) == 0
        await asyncio.to_thread(host.end_programs)
        await gmem.delete_guest_memfd(name=inode.name)
