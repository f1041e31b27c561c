"""Fixtures for whole hosts: one for a module, whose tests must each leave it clean.

A conftest.py imports what its directory uses.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator

import pytest

from gmem.api.host_allocator.v1 import host_allocator_pb2 as allocator_pb
from gmem.client import GuestMemfdClient, HostAllocatorClient
from gmem.runtime.backend import Backend
from gmem.runtime.config import HostShape
from tests.support.hosts import SMALL, Host, counters, differences, running_host

BACK_SECONDS_MAX = 10.0
GRPC_CLIENT = "test/i1"
"""What Host.clients() is called when nobody says otherwise."""


@pytest.fixture(scope="module")
def host_shape() -> HostShape:
    """What the module's host is made of; a module may override it."""
    return SMALL


@pytest.fixture(scope="module")
def backend(request: pytest.FixtureRequest) -> Backend:
    """What views are served with: see tests/support/backends.py."""
    return Backend(getattr(request, "param", Backend.FUSE))


@pytest.fixture(scope="module")
def module_host(host_shape: HostShape, backend: Backend) -> Iterator[Host]:
    """A host that the tests of a module share: starting one takes seconds."""
    with running_host(host_shape, backend=backend) as host:
        yield host


@pytest.fixture
def own_host(host_shape: HostShape, backend: Backend) -> Iterator[Host]:
    """A host for one test, which may kill what it likes."""
    with running_host(host_shape, backend=backend) as host:
        yield host


@pytest.fixture
async def clean_host(module_host: Host) -> AsyncIterator[Host]:
    """The module's host; afterwards no inode is left and every counter is back."""
    module_host.rearm()
    async with module_host.clients("audit") as (allocator, gmem):
        before = await counters(allocator)
        yield module_host
        await asyncio.to_thread(module_host.end_programs)
        for inode in await gmem.list_guest_memfds():
            if inode.file_open:
                await gmem.delete_guest_memfd(name=inode.name)
            # Holds of a client without a process end when somebody ends them.
            for hold in inode.holds:
                if hold.client == GRPC_CLIENT:
                    await gmem.unpin_pages(hold=hold.hold)

        deadline = time.monotonic() + BACK_SECONDS_MAX
        # Those of an inode that still ends are withheld first.
        while errors := await allocator.list_memory_errors():
            for frame in errors:
                await allocator.unpoison_memory(frame.pfn)
        while await _left(allocator, gmem, before):
            if time.monotonic() > deadline:
                assert await _left(allocator, gmem, before) == []
            await asyncio.sleep(0.02)


async def _left(
    allocator: HostAllocatorClient,
    gmem: GuestMemfdClient,
    before: allocator_pb.GetStatisticsResponse,
) -> list[str]:
    """Return the inodes that are left, and how the counters differ."""
    inodes = [inode.name for inode in await gmem.list_guest_memfds()]
    return inodes + differences(before, await counters(allocator))


@pytest.fixture
async def allocator(clean_host: Host) -> AsyncIterator[HostAllocatorClient]:
    async with clean_host.clients() as (client, _):
        yield client


@pytest.fixture
async def gmem(clean_host: Host) -> AsyncIterator[GuestMemfdClient]:
    async with clean_host.clients() as (_, client):
        yield client


@pytest.fixture
async def before(
    allocator: HostAllocatorClient,
) -> allocator_pb.GetStatisticsResponse:
    """The allocator's counters when the test began."""
    return await counters(allocator)
