"""A VM on a real guest_memfd: its guest reads and writes through real views."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from gmem.api.guest_memfd.v1 import guest_memfd_pb2
from gmem.api.vmm.v1 import vmm_pb2 as pb
from gmem.client import GuestMemfdClient, VmmClient
from gmem.client.program import (
    fill,
    halt,
    hash_range,
    load,
    map_gpa_range,
    store,
    verify,
)
from gmem.runtime.backend import Backend
from gmem.runtime.broker_client import BrokerClient
from gmem.uapi.errors import Contended, Errno, InUse, KernelError, Reason
from gmem.uapi.flags import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from gmem.uapi.pages import PAGE_SIZE, SIZE_1G, SIZE_2M
from tests.support.backends import BOTH
from tests.support.hosts import Host, Inode, counters, running_host, until

pytestmark = pytest.mark.fuse
BACKENDS = BOTH

GPA = 4 * SIZE_1G
HUGE_1G = 2 | 30 << 26
HUGE_2M = 2 | 21 << 26
PRIVATE = 8


@pytest.fixture(scope="module")
def module_host(backend: Backend) -> Iterator[Host]:
    with running_host(nr_vmms=1, backend=backend) as host:
        yield host


@dataclass
class Machine:
    """A booted VM: one memslot at GPA whose userspace side is the host view."""

    client: VmmClient
    gmem: GuestMemfdClient
    inode: Inode
    vm: str

    async def run(
        self, *program: pb.Instruction, policy: pb.Policy.ValueType = pb.POLICY_CONVERT
    ) -> list[pb.Result]:
        async with self.client.run(vm=self.vm, program=program, policy=policy) as run:
            results: list[pb.Result] = []
            async for reached in run.exits():
                results += reached.results
                assert reached.WhichOneof("exit") == "hlt", reached
            return results

    async def convert(self, offset: int, size: int, *, private: bool) -> None:
        await self.client.set_memory_attributes(
            vm=self.vm,
            address=GPA + offset,
            size=size,
            attributes=PRIVATE if private else 0,
        )

    async def levels(self) -> tuple[int, int, int]:
        found = await self.client.get_stage2(self.vm)
        return found.entries_1g, found.entries_2m, found.entries_4k


@asynccontextmanager
async def booted(
    host: Host, gmem: GuestMemfdClient, *, size: int, flags: int
) -> AsyncIterator[Machine]:
    async with VmmClient(host.target("vmm-0"), client="test") as client:
        broker_path = (await client.get_capabilities()).broker_path
        vm = (await client.create_vm(vm_id="v")).name
        name = await client.create_guest_memfd(vm=vm, size=size, flags=flags)
        inode = Inode(host, gmem, name, size)
        view = await gmem.open_view(name=name, view=guest_memfd_pb2.VIEW_HOST)
        give = asyncio.to_thread(_give, view, Path(broker_path))
        vmm_broker, descriptor = await give
        try:
            await client.set_user_memory_region2(
                vm=vm,
                slot=0,
                flags=4,
                guest_phys_addr=GPA,
                memory_size=size,
                userspace=pb.Userspace(descriptor=descriptor),
                guest_memfd=name,
            )
            await client.create_vcpu(vm=vm, vcpu=0)
            yield Machine(client, gmem, inode, vm)
            await until(partial(_deleted, client, vm), f"the end of {vm}")
        finally:
            await asyncio.to_thread(vmm_broker.close)


async def _deleted(client: VmmClient, vm: str) -> bool:
    """A Run stream that its caller cancelled may take a moment to end."""
    try:
        await client.delete_vm(name=vm)
    except InUse:
        return False
    return True


def _give(view: guest_memfd_pb2.OpenViewResponse, to: Path) -> tuple[BrokerClient, str]:
    """Pass the host view from one broker to the other; this process maps nothing."""
    with BrokerClient(Path(view.broker_path), "test", "i1") as source:
        fd = source.take(view.token)
    broker = BrokerClient(to, "test", "i1")
    try:
        return broker, broker.give(fd, "host view")
    finally:
        os.close(fd)


async def test_life_of_a_vm_with_a_1g_page(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    async with clean_host.clients("look") as (allocator, _):
        before = await counters(allocator)
        async with booted(clean_host, gmem, size=SIZE_1G, flags=HUGE_1G) as machine:
            await machine.run(map_gpa_range(GPA, SIZE_1G >> 12, private=True))
            data = os.urandom(1 << 20)
            results = await machine.run(
                store(GPA + 5, data), hash_range(GPA + 5, len(data)), halt()
            )
            assert results[0].data == hashlib.sha256(data).digest()
            assert await machine.levels() == (1, 0, 0)

            # Sharing 64 MiB splits the page; what is shared is zeros, and 4K.
            window, size = GPA + (64 << 20), 64 << 20
            results = await machine.run(
                map_gpa_range(window, size >> 12, private=False),
                verify(window, size, 0),
                fill(window, size, 0x5A),
            )
            assert [r.count for r in results] == [0, 0]
            assert (await machine.inode.get()).split_folios == 1
            assert (await machine.levels())[2] == size >> 12

            client = await machine.inode.mapped_by("device")
            assert await client.asked("raw_load", 64 << 20) == 0x5A
            with pytest.raises(Contended) as refused:
                await machine.convert(64 << 20, size, private=True)
            assert refused.value.errno == Errno.EINVAL
            await client.asked("dont_need")

            # RFC_V1 rounds the range in: only a conversion that covers a whole huge
            # page reconstructs it.
            await machine.convert(0, SIZE_1G, private=True)
            assert (await machine.inode.get()).split_folios == 0
            await machine.run(load(GPA, 1))
            assert await machine.levels() == (1, 0, 0)
            await asyncio.to_thread(clean_host.end_programs)
            await gmem.delete_guest_memfd(name=machine.inode.name)

        async def back() -> bool:
            return await counters(allocator) == before

        await until(back, "every counter back at its start")


async def test_punch_under_a_running_guest_is_seen(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    async with booted(clean_host, gmem, size=2 * SIZE_2M, flags=HUGE_2M) as machine:
        await machine.convert(0, 2 * SIZE_2M, private=True)
        await machine.run(fill(GPA, 2 * SIZE_2M, 7))
        assert await machine.levels() == (0, 2, 0)

        await gmem.fallocate(
            name=machine.inode.name,
            mode=FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE,
            offset=0,
            length=SIZE_2M,
        )

        assert await machine.levels() == (0, 1, 0)
        results = await machine.run(
            verify(GPA, SIZE_2M, 0), verify(GPA + SIZE_2M, SIZE_2M, 7)
        )
        assert [r.count for r in results] == [0, 0]


async def test_conversions_under_a_running_guest_lose_nothing(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    async with booted(clean_host, gmem, size=SIZE_2M, flags=HUGE_2M) as machine:
        await machine.convert(0, SIZE_2M, private=True)
        last = SIZE_2M - PAGE_SIZE
        busy = [fill(GPA, PAGE_SIZE, 1), verify(GPA, PAGE_SIZE, 1)] * 400
        running = asyncio.create_task(machine.run(*busy))
        for _ in range(10):
            await machine.convert(last, PAGE_SIZE, private=False)
            await machine.convert(last, PAGE_SIZE, private=True)
        results = await running
        assert len(results) == 400
        # Split and reconstruct zero the neighbours too, as the series does; a byte is
        # what was written, or that zero.
        assert {r.count for r in results} <= {0, PAGE_SIZE}


async def test_a_closed_file_is_a_memory_fault(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    async with booted(clean_host, gmem, size=SIZE_2M, flags=HUGE_2M) as machine:
        await machine.convert(0, SIZE_2M, private=True)
        await machine.run(load(GPA, 1))
        await gmem.delete_guest_memfd(name=machine.inode.name)
        run = machine.client.run(vm=machine.vm, program=[load(GPA, 1)])
        async with run:
            fault = (await anext(run.exits())).memory_fault
        assert (fault.errno, fault.flags, fault.gpa) == (Errno.EFAULT, PRIVATE, GPA)


async def test_a_file_of_another_vm_is_refused(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    async with booted(clean_host, gmem, size=SIZE_2M, flags=HUGE_2M) as machine:
        other = (await machine.client.create_vm(vm_id="other")).name
        for name, reason in (
            (machine.inode.name, Reason.BINDING_FOREIGN_VM),
            (f"{machine.inode.name}9", Reason.FD_UNKNOWN),
            ("", Reason.FD_UNKNOWN),
        ):
            with pytest.raises(KernelError) as refused:
                await machine.client.set_user_memory_region2(
                    vm=other,
                    slot=0,
                    flags=4,
                    guest_phys_addr=0,
                    memory_size=SIZE_2M,
                    guest_memfd=name,
                )
            assert refused.value.reason is reason
        await machine.client.delete_vm(name=other)
