"""What a client process meets at a guest_memfd: SIGBUS, refusals, files, the end."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from gmem.api.guest_memfd.v1 import guest_memfd_pb2 as pb
from gmem.api.host_allocator.v1 import host_allocator_pb2 as allocator_pb
from gmem.client import GuestMemfdClient, HostAllocatorClient
from gmem.uapi.errors import Reason
from gmem.uapi.flags import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from gmem.uapi.pages import PAGE_SIZE, SIZE_1G, SIZE_2M
from tests.support.as_backend import is_kept_out
from tests.support.backends import BOTH
from tests.support.hosts import (
    SIGBUS,
    VM,
    Host,
    Refused,
    counters,
    new_inode,
    pool_of,
    refused,
    until,
)

pytestmark = pytest.mark.fuse
BACKENDS = BOTH

KEEP = FALLOC_FL_KEEP_SIZE
PUNCH = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
SIZES = pytest.mark.parametrize("page_size", [SIZE_2M, SIZE_1G], ids=["2M", "1G"])
Statistics = allocator_pb.GetStatisticsResponse


# Who may touch what.


@pytest.mark.parametrize("op", ["raw_load", "raw_store"])
async def test_a_private_page_is_signal_7_and_its_neighbour_works(
    clean_host: Host, gmem: GuestMemfdClient, op: str
) -> None:
    inode = await new_inode(clean_host, gmem)
    await inode.convert(3 * PAGE_SIZE, PAGE_SIZE, private=True)
    client = await inode.mapped_by()
    value = [7] if op == "raw_store" else []
    for neighbour in (2, 4):
        await client.asked(op, neighbour * PAGE_SIZE, *value)
    assert await asyncio.to_thread(client.dies_of, op, 3 * PAGE_SIZE, *value) == SIGBUS


async def test_past_the_end_is_signal_7(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_inode(clean_host, gmem)
    client = await inode.mapped_by()
    past = inode.size + PAGE_SIZE
    died = await asyncio.to_thread(client.dies_of, "raw_load_past_the_end", past)
    assert died == SIGBUS


async def test_an_inode_that_no_slot_binds_is_signal_7(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_inode(clean_host, gmem, bound=False)
    client = await inode.mapped_by()
    assert await asyncio.to_thread(client.dies_of, "raw_load", 0) == SIGBUS
    assert (await inode.get()).split_folios == 0


async def test_two_processes_see_one_page_and_zeros_at_first(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_inode(clean_host, gmem, page_size=SIZE_1G)
    one, two = await inode.mapped_by("one"), await inode.mapped_by("two")
    at = SIZE_1G // 2
    assert await one.asked("count_other", at, 16 * PAGE_SIZE, 0) == 0
    await one.asked("raw_store", at, 0x5A)
    assert await two.asked("raw_load", at) == 0x5A
    assert (await inode.get()).st_blocks == SIZE_1G // 512


# A mapped page.


async def test_a_mapped_page_refuses_to_become_private_and_names_who_maps_it(
    clean_host: Host, gmem: GuestMemfdClient, allocator: HostAllocatorClient
) -> None:
    inode = await new_inode(clean_host, gmem)
    client = await inode.mapped_by("loader")
    for page in (5, 9):
        await client.asked("raw_store", page * PAGE_SIZE, page)
    inode_before, before = await inode.get(), await counters(allocator)

    with refused(Reason.PAGE_IN_USE, f"pid {client.pid} \\(loader\\)") as caught:
        await inode.convert(2 * PAGE_SIZE, 62 * PAGE_SIZE, private=True)
    assert str(caught[0]).startswith("EINVAL")
    assert caught[0].numbers["error_offset"] == 5 * PAGE_SIZE
    assert caught[0].numbers["holders"] == f"pid {client.pid} (loader)"
    assert await inode.get() == inode_before
    assert await counters(allocator) == before
    assert await client.asked("raw_load", 5 * PAGE_SIZE) == 5

    await client.asked("dont_need")
    await client.asked("raw_store", 9 * PAGE_SIZE, 9)
    with refused(Reason.PAGE_IN_USE, "loader") as caught:
        await inode.convert(2 * PAGE_SIZE, 62 * PAGE_SIZE, private=True)
    assert caught[0].numbers["error_offset"] == 9 * PAGE_SIZE

    await client.asked("dont_need")
    await inode.convert(2 * PAGE_SIZE, 62 * PAGE_SIZE, private=True)
    with refused(Reason.PAGE_NOT_FAULTABLE) as caught:
        await client.asked("read", 4 * PAGE_SIZE, 8 * PAGE_SIZE)
    assert caught[0].numbers["error_offset"] == 4 * PAGE_SIZE

    await inode.convert(0, inode.size, private=False)
    assert await client.asked("count_other", 5 * PAGE_SIZE, PAGE_SIZE, 0) == 0
    await client.asked("dont_need")
    await inode.convert(5 * PAGE_SIZE, PAGE_SIZE, private=True)
    assert await is_kept_out(client, 5 * PAGE_SIZE)


async def test_a_load_maps_cached_neighbours_too_a_listed_deviation(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_inode(clean_host, gmem)
    client = await inode.mapped_by()
    for page in (16, 17):
        await client.asked("raw_store", page * PAGE_SIZE, 1)
    await client.asked("dont_need")
    # filemap_map_pages(): a read fault maps what is cached around it.
    await client.asked("raw_load", 17 * PAGE_SIZE)
    with refused(Reason.PAGE_IN_USE, "client"):
        await inode.convert(16 * PAGE_SIZE, PAGE_SIZE, private=True)
    await client.asked("dont_need")
    await client.asked("raw_store", 17 * PAGE_SIZE, 1)
    await inode.convert(16 * PAGE_SIZE, PAGE_SIZE, private=True)


async def test_every_process_that_maps_is_named(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_inode(clean_host, gmem)
    clients = [await inode.mapped_by(name) for name in ("net", "blk")]
    for client in clients:
        await client.asked("raw_store", 0, 1)
    with refused(Reason.PAGE_IN_USE) as caught:
        await inode.convert(0, PAGE_SIZE, private=True)
    holders = str(caught[0].numbers["holders"])
    assert caught[0].numbers["count"] == 2
    for client in clients:
        assert f"pid {client.pid} ({client.name})" in holders

    # A process that ends unmaps.
    clients[0].stop()
    with refused(Reason.PAGE_IN_USE, "blk"):
        await inode.convert(0, PAGE_SIZE, private=True)
    clients[1].kill()
    await inode.convert(0, PAGE_SIZE, private=True)


async def test_validate_only_checks_and_changes_nothing(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_inode(clean_host, gmem)
    client = await inode.mapped_by()
    await client.asked("raw_store", 0, 3)
    inode_before = await inode.get()
    with refused(Reason.PAGE_IN_USE):
        await inode.convert(0, PAGE_SIZE, private=True, validate_only=True)
    await client.asked("dont_need")
    await inode.convert(0, PAGE_SIZE, private=True, validate_only=True)
    assert await inode.get() == inode_before
    assert await client.asked("raw_load", 0) == 3


# Holds.


async def test_a_pin_refuses_and_is_named_and_a_plain_reference_does_not(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_inode(clean_host, gmem)
    pinned = await gmem.pin_pages(
        name=inode.name, offset=4 * PAGE_SIZE, size=PAGE_SIZE, holder="vhost-net"
    )
    with refused(Reason.PAGE_IN_USE, "vhost-net") as caught:
        await inode.convert(0, inode.size, private=True)
    assert str(caught[0]).startswith("EINVAL")
    assert caught[0].numbers["error_offset"] == 4 * PAGE_SIZE
    await gmem.unpin_pages(hold=pinned)

    plain = await gmem.pin_pages(
        name=inode.name,
        offset=4 * PAGE_SIZE,
        size=PAGE_SIZE,
        holder="get_user_pages",
        kind=pb.HOLD_KIND_PLAIN,
    )
    # The hole that later series close with the safe refcount.
    await inode.convert(0, inode.size, private=True)
    (hold,) = (await inode.get()).holds
    assert (hold.hold, hold.holder) == (plain, "get_user_pages")
    await gmem.unpin_pages(hold=plain)


async def test_a_killed_client_leaves_no_pin_no_mapping_no_view(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_inode(clean_host, gmem)
    device = await inode.mapped_by("device", "life-7")
    await device.asked("raw_store", 0, 1)
    async with clean_host.clients("device", "life-7") as (_, its):
        for page in (0, 8):
            await its.pin_pages(
                name=inode.name,
                offset=page * PAGE_SIZE,
                size=PAGE_SIZE,
                holder=f"ring {page}",
            )
    state = await inode.get()
    assert [hold.client for hold in state.holds] == ["device/life-7"] * 2
    assert state.host_views_open == 1

    await asyncio.to_thread(device.kill)

    async def gone() -> bool:
        state = await inode.get()
        return not state.holds and state.host_views_open == 0

    await until(gone, "the end of the client's holds and view")
    await inode.convert(0, inode.size, private=True)


# The file.


@SIZES
async def test_the_counters_move_as_in_the_reporting_test(
    clean_host: Host,
    allocator: HostAllocatorClient,
    gmem: GuestMemfdClient,
    before: Statistics,
    page_size: int,
) -> None:
    async def assert_stats(r: int, f: int) -> None:
        now = await counters(allocator)
        for base in before.pools:
            expected = allocator_pb.Pool()
            expected.CopyFrom(base)
            if base.page_size == page_size:
                expected.free_huge_pages -= f
                expected.nodes[0].free_huge_pages -= f
                expected.resv_huge_pages += r - f
            assert pool_of(now, base.page_size) == expected, (r, f)

    await assert_stats(0, 0)  # G0
    inode = await new_inode(clean_host, gmem, page_size=page_size, shared=False)
    await assert_stats(1, 0)  # G1
    client = clean_host.program()
    client.ask("take", await inode.token())
    empty = await client.asked("fstat")
    assert (empty["st_size"], empty["st_blksize"]) == (page_size, page_size)
    assert empty["st_blocks"] == 0
    await client.asked("fallocate", KEEP, 0, page_size)
    await assert_stats(1, 1)  # G2
    assert (await client.asked("fstat"))["st_blocks"] == page_size // 512
    await client.asked("fallocate", PUNCH, 0, page_size)
    await assert_stats(1, 0)  # G3
    assert await client.asked("fstat") == empty
    client.stop()
    await gmem.delete_guest_memfd(name=inode.name)

    async def returned() -> bool:
        return await counters(allocator) == before

    await until(returned, "G4")  # G4


@pytest.mark.parametrize(
    ("op", "args", "error"),
    [
        ("ftruncate", [0], "EINVAL"),
        ("ftruncate", [2 * SIZE_2M], "EINVAL"),
        ("fallocate", [KEEP, SIZE_2M, PAGE_SIZE], "EINVAL"),
        ("fallocate", [PUNCH, 1, PAGE_SIZE], "EINVAL"),
        ("fallocate", [PUNCH, 0, PAGE_SIZE + 1], "EINVAL"),
        ("fallocate", [0, 0, PAGE_SIZE], "EOPNOTSUPP"),
    ],
)
async def test_system_calls_on_the_view_are_refused_as_by_the_kernel(
    clean_host: Host, gmem: GuestMemfdClient, op: str, args: list[int], error: str
) -> None:
    inode = await new_inode(clean_host, gmem)
    client = clean_host.program()
    client.ask("take", await inode.token())
    inode_before, status = await inode.get(), await client.asked("fstat")
    with pytest.raises(Refused, match=error.replace("EOPNOTSUPP", "E(OP)?NOTSUPP?")):
        await client.asked(op, *args)
    assert await inode.get() == inode_before
    assert await client.asked("fstat") == status


async def test_a_mode_that_the_file_has_not_is_refused(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_inode(clean_host, gmem)
    client = await inode.mapped_by()
    with pytest.raises(Refused, match=r"E(OP)?NOTSUPP?"):
        await client.asked("fallocate", KEEP | 16, 0, PAGE_SIZE)
    assert (await inode.get()).st_blocks == 0


async def test_fallocate_and_fstat_through_the_view_agree_with_the_rpc(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_inode(clean_host, gmem, pages=3)
    client = await inode.mapped_by()
    await client.asked("fallocate", KEEP, 0, 2 * SIZE_2M)
    state, status = await inode.get(), await client.asked("fstat")
    assert (state.split_folios, state.whole_folios) == (2, 0)
    for name in ("st_blocks", "st_blksize"):
        assert getattr(state, name) == status[name]
    assert (state.size, state.inode) == (status["st_size"], _inode_of(status))

    await client.asked("write", 0, 7, 2 * SIZE_2M)
    # The second unit whole, and the last page of the first.
    at = SIZE_2M - PAGE_SIZE
    await inode.fallocate(PUNCH, at, SIZE_2M + PAGE_SIZE)
    assert (await client.asked("fstat"))["st_blocks"] == SIZE_2M // 512
    assert await client.asked("count_other", 0, at, 7) == 0
    assert (await inode.get()).split_folios == 1
    assert await client.asked("count_other", at, SIZE_2M + PAGE_SIZE, 0) == 0
    # Punching past the end does nothing, as in the kernel.
    await client.asked("fallocate", PUNCH, inode.size, PAGE_SIZE)


def _inode_of(status: dict[str, Any]) -> int:
    """Return the number that GetGuestMemfd shows for a view's st_ino."""
    # The host view's number; the guest view's is one more (view/wire.py).
    return int(status["st_ino"]) // 2


# The end.


async def test_an_inode_lives_on_while_a_view_is_open(
    clean_host: Host,
    allocator: HostAllocatorClient,
    gmem: GuestMemfdClient,
    before: Statistics,
) -> None:
    inode = await new_inode(clean_host, gmem, page_size=SIZE_1G)
    client = await inode.mapped_by()
    await client.asked("raw_store", 0, 0x77)
    unused = await inode.token()
    await gmem.delete_guest_memfd(name=inode.name)

    state = await inode.get()
    assert (state.file_open, state.host_views_open) == (False, 1)
    assert list(state.bindings) == []
    await client.asked("dont_need")
    assert await client.asked("raw_load", 0) == 0x77
    with refused(Reason.FD_UNKNOWN, "closed", errno="EBADF"):
        await gmem.open_view(name=inode.name)
    with refused(Reason.INODE_UNKNOWN, "closed already", errno="ENOENT"):
        await gmem.delete_guest_memfd(name=inode.name)
    late = clean_host.program("late")
    await asyncio.to_thread(client.kill)

    async def evicted() -> bool:
        return await counters(allocator) == before

    await until(evicted, "the eviction")
    assert await gmem.list_guest_memfds() == []
    with refused(Reason.INODE_UNKNOWN, "never issued, or is gone"):
        await inode.get()
    # A token from before the close opens nothing after it.
    with refused(Reason.FD_UNKNOWN):
        await late.asked("take", unused)


async def test_a_guest_view_shows_what_the_host_view_refuses(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_inode(clean_host, gmem, shared=False)
    guest = clean_host.program("guest")
    view = await gmem.open_view(
        name=inode.name, view=pb.VIEW_GUEST, vm=VM, guest_pid=guest.pid
    )
    await guest.asked("take", view.token)
    await guest.asked("map")
    # A hole of the guest view is for GetPfn to fill.
    with refused(Reason.PAGE_NOT_FAULTABLE):
        await guest.asked("read", 0)
    page = await gmem.get_pfn(name=inode.name, vm=VM, slot=0, gfn=0)
    assert page.order == 9
    await guest.asked("raw_store", PAGE_SIZE, 0x33)
    assert await guest.asked("raw_load", PAGE_SIZE) == 0x33
    host_side = await inode.mapped_by("host-side")
    with refused(Reason.PAGE_NOT_FAULTABLE):
        await host_side.asked("read", PAGE_SIZE)

    # What the guest maps is stage 2: it is withdrawn, and refuses nothing.
    await inode.convert(0, inode.size, private=False)
    assert await host_side.asked("raw_load", PAGE_SIZE) == 0
    with refused(Reason.PAGE_NOT_FAULTABLE):
        await guest.asked("read", PAGE_SIZE)
    await host_side.asked("dont_need")
    await inode.convert(0, inode.size, private=True)


async def test_the_same_pages_by_a_guest_mapping_do_not_count_as_mapped(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_inode(clean_host, gmem)
    guest = await inode.mapped_by("guest")
    view = await gmem.open_view(
        name=inode.name, view=pb.VIEW_GUEST, vm=VM, guest_pid=guest.pid
    )
    await guest.asked("raw_store", 0, 1)
    with refused(Reason.PAGE_IN_USE, "guest"):
        await inode.convert(0, PAGE_SIZE, private=True)
    # From now on it is the VM's guest process: its page tables stand for stage 2.
    await guest.asked("take", view.token)
    await inode.convert(0, PAGE_SIZE, private=True)


async def test_bytes_per_fragment_are_reported(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_inode(clean_host, gmem)
    for page in range(0, 128, 2):
        await inode.convert(page * PAGE_SIZE, PAGE_SIZE, private=True)
    state = await inode.get()
    assert state.nr_fragments == 128
    assert [f.shared for f in state.fragments] == [False, True] * 64
    assert sum(f.size for f in state.fragments) == inode.size
    assert 0 < state.fragment_bytes < 1024


async def test_an_inode_of_4k_pages_takes_base_memory(
    clean_host: Host, gmem: GuestMemfdClient, allocator: HostAllocatorClient
) -> None:
    inode = await new_inode(clean_host, gmem, page_size=PAGE_SIZE, pages=16)
    client = await inode.mapped_by()
    before = await counters(allocator)
    await client.asked("write", 0, 1, 3 * PAGE_SIZE)
    assert (await inode.get()).st_blocks == 3 * PAGE_SIZE // 512
    now = await counters(allocator)
    taken = before.nodes[0].free_base_pages - now.nodes[0].free_base_pages
    assert (taken, list(now.pools)) == (3, list(before.pools))
    await inode.fallocate(PUNCH, 0, PAGE_SIZE)
    assert (await inode.get()).st_blocks == 2 * PAGE_SIZE // 512
