"""No base memory for vmemmap: what is refused, and what the series leaves then."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from gmem.api.host_allocator.v1 import host_allocator_pb2 as allocator_pb
from gmem.client import GuestMemfdClient, HostAllocatorClient
from gmem.runtime.config import HostShape, NodeShape
from gmem.uapi.errors import Reason
from gmem.uapi.flags import FALLOC_FL_KEEP_SIZE
from gmem.uapi.pages import PAGE_SIZE, SIZE_1G
from tests.support.hosts import Host, Inode, counters, differences, new_inode, refused

pytestmark = pytest.mark.fuse

KEEP = FALLOC_FL_KEEP_SIZE
VMEMMAP_OF_1G = 4095
MIB = 1 << 20


@pytest.fixture(scope="module")
def host_shape() -> HostShape:
    """Little more than its 1G pages and the struct pages for them."""
    node = NodeShape(memory_size=3 * SIZE_1G + 128 * MIB, huge_pages={SIZE_1G: 3})
    return HostShape(nodes=(node,))


@asynccontextmanager
async def no_base_memory(allocator: HostAllocatorClient) -> AsyncIterator[None]:
    """Have another tenant hold base memory until one 1G page cannot be split."""
    (node,) = (await allocator.get_statistics()).nodes
    taken = node.free_base_pages - VMEMMAP_OF_1G + 1
    handle = await allocator.reserve(
        page_size=PAGE_SIZE, num_pages=taken, owner="tenant"
    )
    folios = await allocator.allocate(
        handle=handle, page_size=PAGE_SIZE, nr_folios=taken
    )
    (node,) = (await allocator.get_statistics()).nodes
    assert node.free_base_pages == VMEMMAP_OF_1G - 1
    try:
        yield
    finally:
        await allocator.free(handle=handle, folios=folios)
        await allocator.unreserve(handle=handle)


async def allocated(inode: Inode) -> Inode:
    await inode.fallocate(KEEP, 0, inode.size)
    return inode


async def test_a_split_without_base_memory_changes_nothing(
    clean_host: Host, gmem: GuestMemfdClient, allocator: HostAllocatorClient
) -> None:
    inode = await allocated(
        await new_inode(clean_host, gmem, page_size=SIZE_1G, shared=False)
    )
    async with no_base_memory(allocator):
        inode_before, before = await inode.get(), await counters(allocator)
        failures = await restore_failures(allocator)
        with refused(Reason.VMEMMAP_RESTORE_FAILED, "4095", "free", errno="ENOMEM"):
            await inode.convert(7 * PAGE_SIZE, PAGE_SIZE, private=False)
        assert differences(await inode.get(), inode_before) == []
        assert differences(await counters(allocator), before) == []
        assert await restore_failures(allocator) > failures
    # With base memory again it is an ordinary conversion.
    await inode.convert(7 * PAGE_SIZE, PAGE_SIZE, private=False)
    assert (await inode.get()).split_folios == 1


@pytest.mark.parametrize("covers_the_first_folio", [True, False])
async def test_the_rollback_writes_private_over_what_was_shared_as_the_series_does(
    clean_host: Host,
    gmem: GuestMemfdClient,
    allocator: HostAllocatorClient,
    covers_the_first_folio: bool,
) -> None:
    inode = await allocated(
        await new_inode(clean_host, gmem, page_size=SIZE_1G, pages=2, shared=False)
    )
    whole = await counters(allocator)
    await inode.convert(SIZE_1G - PAGE_SIZE, PAGE_SIZE, private=False)
    async with no_base_memory(allocator):
        state, before = await inode.get(), await counters(allocator)
        assert (state.split_folios, state.whole_folios) == (1, 1)
        assert state.shared_pages == 1
        start = 0 if covers_the_first_folio else SIZE_1G - PAGE_SIZE
        with refused(Reason.VMEMMAP_RESTORE_FAILED, errno="ENOMEM"):
            await inode.convert(start, SIZE_1G + PAGE_SIZE - start, private=False)

        # Exactly what the series leaves: the whole range is private, whatever it was.
        # A folio that the range covers could be reconstructed, which gave its vmemmap
        # back; one that it does not stays split, without a shared page.
        state.shared_pages, state.private_pages = 0, inode.size // PAGE_SIZE
        state.ClearField("fragments")
        state.fragments.add(offset=0, size=inode.size, shared=False)
        state.nr_fragments = 1
        if covers_the_first_folio:
            state.split_folios, state.whole_folios = 0, 2
            before = _reconstructed(before)
        now = await inode.get()
        state.fragment_bytes = now.fragment_bytes
        assert differences(now, state) == []
        assert differences(await counters(allocator), before) == []
    await inode.convert(0, SIZE_1G, private=False)
    await inode.convert(0, SIZE_1G, private=True)
    assert differences(await counters(allocator), whole) == []


def _reconstructed(
    statistics: allocator_pb.GetStatisticsResponse,
) -> allocator_pb.GetStatisticsResponse:
    """Return the statistics with one more 1G page optimised."""
    after = allocator_pb.GetStatisticsResponse()
    after.CopyFrom(statistics)
    after.vmemmap.saved_pages += VMEMMAP_OF_1G
    after.nodes[0].free_base_pages += VMEMMAP_OF_1G
    after.nodes[0].nr_memmap_pages -= VMEMMAP_OF_1G
    after.meminfo.mem_free_kb += VMEMMAP_OF_1G * 4
    return after


async def test_a_first_touch_that_cannot_split_is_refused_and_takes_no_page(
    clean_host: Host, gmem: GuestMemfdClient, allocator: HostAllocatorClient
) -> None:
    inode = await new_inode(clean_host, gmem, page_size=SIZE_1G)
    client = await inode.mapped_by()
    async with no_base_memory(allocator):
        inode_before, before = await inode.get(), await counters(allocator)
        with refused(Reason.PAGE_NOT_FAULTABLE):
            await client.asked("read", 0)
        with refused(Reason.VMEMMAP_RESTORE_FAILED, errno="ENOMEM"):
            await inode.fallocate(KEEP, 0, SIZE_1G)
        with refused(Reason.VMEMMAP_RESTORE_FAILED, errno="ENOMEM"):
            await gmem.pin_pages(
                name=inode.name, offset=0, size=PAGE_SIZE, holder="vhost"
            )
        assert differences(await inode.get(), inode_before) == []
        assert differences(await counters(allocator), before) == []
    assert await client.asked("read", 0) == "00"


async def test_a_pool_that_is_promised_away_refuses_a_file(
    clean_host: Host, gmem: GuestMemfdClient, allocator: HostAllocatorClient
) -> None:
    await new_inode(clean_host, gmem, page_size=SIZE_1G, pages=2)
    before = await counters(allocator)
    with refused(Reason.POOL_EMPTY, "2", "grow|free", errno="ENOMEM"):
        await gmem.create_guest_memfd(size=2 * SIZE_1G, page_size=SIZE_1G)
    assert differences(await counters(allocator), before) == []
    assert len(await gmem.list_guest_memfds()) == 1


async def restore_failures(allocator: HostAllocatorClient) -> int:
    return (await allocator.get_statistics()).vmemmap.restore_failures_total
