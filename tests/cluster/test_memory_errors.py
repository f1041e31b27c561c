"""Memory errors in real processes: signals, exits of a vCPU, services that die between.

No page of this machine is poisoned: every error is injected by RPC.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from gmem.api.guest_memfd.v1 import guest_memfd_pb2 as pb
from gmem.client import GuestMemfdClient, HostAllocatorClient, VmmClient
from gmem.client.program import fill, halt, load, verify
from gmem.ctl import launcher
from gmem.uapi.errors import Errno, Reason
from gmem.uapi.flags import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from gmem.uapi.pages import PAGE_SHIFT, PAGE_SIZE, SIZE_1G, SIZE_2M
from tests.cluster.test_recovery import restart
from tests.cluster.test_vmm import GPA, HUGE_2M, PRIVATE, booted
from tests.support.hosts import (
    SIGBUS,
    VM,
    Host,
    Inode,
    new_inode,
    refused,
    running_host,
    until,
)

pytestmark = pytest.mark.fuse

BAD = 5 * PAGE_SIZE
PUNCH = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE


@pytest.fixture(scope="module")
def module_host() -> Iterator[Host]:
    with running_host(nr_vmms=1) as host:
        yield host


async def frame_of(allocator: HostAllocatorClient, inode: Inode, offset: int) -> int:
    """The frame behind a byte of an inode whose first folio is its only one."""
    claims = {c.owner: c.handle for c in await allocator.list_reservations()}
    (run,) = await allocator.list_folios(claims[inode.name])
    return run.first.pfn + (offset >> PAGE_SHIFT)


@pytest.mark.parametrize(
    "page_size", [PAGE_SIZE, SIZE_2M, SIZE_1G], ids=["4K", "2M", "1G"]
)
async def test_who_touches_a_poisoned_page_dies_of_sigbus_and_its_neighbour_lives(
    clean_host: Host, gmem: GuestMemfdClient, page_size: int
) -> None:
    pages = max(1, SIZE_2M // page_size)
    inode = await new_inode(clean_host, gmem, page_size=page_size, pages=pages)
    client = await inode.mapped_by("loader")
    for page in range(8):
        await client.asked("raw_store", page * PAGE_SIZE, page + 1)
    failure = await gmem.inject_memory_error(name=inode.name, offset=BAD)
    assert (failure.offset, failure.size) == (BAD, PAGE_SIZE)
    assert failure.errno == Errno.EBUSY
    assert failure.dirty
    assert list(failure.signalled) == [f"pid {client.pid} (loader)"]

    assert await client.asked("raw_load", BAD - PAGE_SIZE) == 5
    with refused(Reason.PAGE_NOT_FAULTABLE):
        await client.asked("read", BAD, PAGE_SIZE)
    assert await asyncio.to_thread(client.dies_of, "raw_load", BAD) == SIGBUS
    another = await inode.mapped_by("another")
    assert await asyncio.to_thread(another.dies_of, "raw_store", BAD, 7) == SIGBUS

    await gmem.unpoison_memory(name=inode.name, offset=BAD)
    third = await inode.mapped_by("third")
    assert await third.asked("raw_load", BAD) == 6


@pytest.mark.parametrize(
    ("stored", "signalled"), [(True, 1), (False, 0)], ids=["dirty", "clean"]
)
async def test_the_mended_memory_failure_spares_who_has_a_clean_page(
    clean_host: Host, gmem: GuestMemfdClient, stored: bool, signalled: int
) -> None:
    inode = await new_inode(clean_host, gmem, page_size=PAGE_SIZE, pages=16)
    client = await inode.mapped_by("loader")
    await client.asked("raw_store" if stored else "raw_load", BAD, *[1] * stored)
    failure = await gmem.inject_memory_error(
        name=inode.name, offset=BAD, kill_policy=pb.KILL_POLICY_EARLY
    )
    assert (failure.errno, failure.dirty) == (0, stored)
    assert len(failure.mapped) == 1
    assert len(failure.signalled) == signalled
    assert await asyncio.to_thread(client.dies_of, "raw_load", BAD) == SIGBUS
    # C107: a whole punch succeeds, and so does unpoisoning afterwards.
    await inode.fallocate(PUNCH, 0, inode.size)
    fresh = await inode.mapped_by("fresh")
    assert await fresh.asked("raw_load", BAD) == 0
    async with clean_host.clients() as (allocator, _):
        assert (await allocator.unpoison_memory(failure.pfn)).handle == 0


async def test_an_error_of_a_frame_reaches_the_inode_that_has_it(
    clean_host: Host, gmem: GuestMemfdClient, allocator: HostAllocatorClient
) -> None:
    inode = await new_inode(clean_host, gmem)
    client = await inode.mapped_by("loader")
    await client.asked("raw_store", BAD, 9)
    pfn = await frame_of(allocator, inode, BAD)
    await allocator.inject_memory_error(pfn)

    async def has_it() -> bool:
        return list((await inode.get()).poisoned_offsets) == [BAD]

    await until(has_it, "the error in the inode")
    died = asyncio.to_thread(client.dies_of, "raw_load", BAD)
    assert await died == SIGBUS
    await allocator.unpoison_memory(pfn)

    async def has_none() -> bool:
        return (await inode.get()).poisoned_pages == 0

    await until(has_none, "the end of the error")
    again = await inode.mapped_by("again")
    assert await again.asked("raw_load", BAD) == 9


async def test_a_vcpu_leaves_with_ehwpoison(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    async with booted(clean_host, gmem, size=2 * SIZE_2M, flags=HUGE_2M) as machine:
        await machine.convert(0, 2 * SIZE_2M, private=True)
        await machine.run(fill(GPA, 2 * SIZE_2M, 7))
        failure = await gmem.inject_memory_error(name=machine.inode.name, offset=BAD)
        # The kernel's flag is on the head of a whole folio: all of it is lost.
        assert (failure.offset, failure.size) == (0, SIZE_2M)
        assert await machine.levels() == (0, 1, 0)
        for at in (GPA, GPA + BAD):
            async with machine.client.run(vm=machine.vm, program=[load(at, 1)]) as run:
                fault = (await anext(run.exits())).memory_fault
            assert (fault.errno, fault.flags, fault.gpa) == (133, PRIVATE, at)
        (found,) = await machine.run(verify(GPA + SIZE_2M, SIZE_2M, 7))
        assert found.count == 0

        # Sharing one page splits the folio: from then on only the bad page is lost.
        await machine.convert(0, PAGE_SIZE, private=False)
        await machine.run(load(GPA + BAD + PAGE_SIZE, 1), halt())
        async with machine.client.run(
            vm=machine.vm, program=[load(GPA + BAD, 1)]
        ) as run:
            fault = (await anext(run.exits())).memory_fault
        assert fault.errno == Errno.EHWPOISON
        await gmem.unpoison_memory(name=machine.inode.name, offset=BAD)
        await machine.run(load(GPA + BAD, 1), halt())


async def test_a_guest_that_reaches_a_poisoned_page_through_userspace_leaves(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    """Deviation 82: RFC_V1 does not ask the file for shared pages."""
    async with booted(clean_host, gmem, size=SIZE_2M, flags=HUGE_2M) as machine:
        await machine.run(fill(GPA, SIZE_2M, 7))
        await gmem.inject_memory_error(name=machine.inode.name, offset=BAD)
        async with machine.client.run(
            vm=machine.vm, program=[load(GPA + BAD, 1)]
        ) as run:
            fault = (await anext(run.exits())).memory_fault
        assert (fault.errno, fault.flags) == (Errno.EFAULT, 0)
        (found,) = await machine.run(verify(GPA, BAD, 7))
        assert found.count == 0
        await gmem.unpoison_memory(name=machine.inode.name, offset=BAD)
        (found,) = await machine.run(verify(GPA, SIZE_2M, 7))
        assert found.count == 0


async def test_pre_faulting_a_poisoned_page_is_ehwpoison(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    async with booted(clean_host, gmem, size=SIZE_2M, flags=HUGE_2M) as machine:
        await machine.convert(0, SIZE_2M, private=True)
        await gmem.fallocate(
            name=machine.inode.name, mode=FALLOC_FL_KEEP_SIZE, offset=0, length=SIZE_2M
        )
        await gmem.inject_memory_error(name=machine.inode.name, offset=BAD)
        async with VmmClient(clean_host.target("vmm-0")) as client:
            with refused(Reason.PAGE_POISONED) as caught:
                await client.pre_fault_memory(
                    vm=machine.vm, vcpu=0, gpa=GPA, size=PAGE_SIZE
                )
        assert caught[0].errno == Errno.EHWPOISON
        await gmem.unpoison_memory(name=machine.inode.name, offset=BAD)


async def test_errors_outlive_every_service(own_host: Host) -> None:
    host = own_host
    async with host.clients() as (allocator, gmem):
        inode = await new_inode(host, gmem)
        clients = [await inode.mapped_by(f"client-{n}") for n in range(4)]
        for client in clients:
            await client.asked("raw_store", BAD, 3)
        await gmem.inject_memory_error(name=inode.name, offset=BAD)
        frames = await allocator.list_memory_errors()
        assert len(frames) == 1

    # Nobody serves: whoever stands in judges by the page states.
    await asyncio.to_thread(host.kill, "guest_memfd")
    assert await asyncio.to_thread(clients[0].dies_of, "raw_load", BAD) == SIGBUS
    assert await clients[1].asked("raw_load", BAD - PAGE_SIZE) == 0
    host.state = await launcher.restart_service(host.directory, "guest_memfd")
    assert await asyncio.to_thread(clients[1].dies_of, "raw_load", BAD) == SIGBUS

    await restart(host, "host_allocator")
    async with host.clients() as (allocator, gmem):
        assert await allocator.list_memory_errors() == frames
        assert list((await gmem.get_guest_memfd(inode.name)).poisoned_offsets) == [BAD]
        with refused(Reason.PAGE_POISONED):
            await gmem.get_pfn(name=inode.name, vm=VM, slot=0, gfn=5)

        # An error that nobody could tell guest_memfd of: it asks when it is back.
        other = 7 * PAGE_SIZE
        await clients[2].asked("raw_store", other, 4)
        pfn = frames[0].pfn + 2
        await asyncio.to_thread(host.kill, "guest_memfd")
        await allocator.inject_memory_error(pfn)
    host.state = await launcher.restart_service(host.directory, "guest_memfd")
    assert await asyncio.to_thread(clients[2].dies_of, "raw_load", other) == SIGBUS
    async with host.clients() as (allocator, gmem):
        found = await gmem.get_guest_memfd(inode.name)
        assert list(found.poisoned_offsets) == [BAD, other]
        await gmem.unpoison_memory(name=inode.name, offset=other)
        assert await clients[3].asked("raw_load", other) == 4
        await allocator.unpoison_memory(frames[0].pfn)

        async def is_healthy() -> bool:
            return (await gmem.get_guest_memfd(inode.name)).poisoned_pages == 0

        await until(is_healthy, "the end of the error")
    assert await clients[3].asked("raw_load", BAD) == 3
