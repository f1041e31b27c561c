"""A guest of RFC_V2: its file says what is private; the VMM need not be the caller."""

from __future__ import annotations

import asyncio
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
from gmem.client.program import fill, load, map_gpa_range, store, verify
from gmem.runtime.backend import Backend
from gmem.runtime.broker_client import BrokerClient
from gmem.uapi.errors import Errno, InUse, KernelError, Reason
from gmem.uapi.flags import KVM_GMEM_CONVERT_PRIVATE, KVM_GMEM_CONVERT_SHARED
from gmem.uapi.pages import PAGE_SIZE, SIZE_1G, SIZE_2M
from tests.support.as_backend import convert, convert_often, is_kept_out
from tests.support.backends import BOTH
from tests.support.hosts import Host, Inode, running_host, until

pytestmark = pytest.mark.fuse
BACKENDS = BOTH

GPA = 4 * SIZE_1G
GMEM = 4
SHARED_FLAG, INIT_PRIVATE, HUGE = 1, 2, 4
PRIVATE, SHARED = KVM_GMEM_CONVERT_PRIVATE, KVM_GMEM_CONVERT_SHARED
ATTRIBUTE_PRIVATE = 8
SIZES = pytest.mark.parametrize(
    "page_size", [PAGE_SIZE, SIZE_2M, SIZE_1G], ids=["4K", "2M", "1G"]
)


@pytest.fixture(scope="module")
def module_host(backend: Backend) -> Iterator[Host]:
    with running_host(nr_vmms=1, backend=backend) as host:
        yield host


def flags_of(page_size: int, flags: int = SHARED_FLAG) -> int:
    huge = HUGE | (page_size.bit_length() - 1) << 58
    return flags | (huge if page_size > PAGE_SIZE else 0)


@dataclass
class Machine:
    """A VM whose memslot at GPA is a file that supports shared pages."""

    client: VmmClient
    inode: Inode
    vm: str

    async def run(
        self, *program: pb.Instruction, policy: pb.Policy.ValueType = pb.POLICY_NONE
    ) -> list[pb.Result]:
        async with self.client.run(vm=self.vm, program=program, policy=policy) as run:
            results: list[pb.Result] = []
            async for reached in run.exits():
                results += reached.results
                assert reached.WhichOneof("exit") == "hlt", reached
            return results

    async def byte(self, offset: int) -> int:
        (result,) = await self.run(load(GPA + offset, 1))
        return result.data[0]

    async def levels(self) -> tuple[int, int, int]:
        found = await self.client.get_stage2(self.vm)
        return found.entries_1g, found.entries_2m, found.entries_4k


@asynccontextmanager
async def booted(
    host: Host,
    gmem: GuestMemfdClient,
    *,
    page_size: int,
    pages: int = 1,
    flags: int = SHARED_FLAG,
    vm_type: pb.VmType.ValueType = pb.VM_TYPE_SW_PROTECTED,
) -> AsyncIterator[Machine]:
    """Boot without a userspace side: the guest has the file for everything."""
    size = page_size * pages
    async with VmmClient(host.target("vmm-0"), client="test") as client:
        made = await client.create_vm(vm_id="v", type=vm_type, lineage="RFC_V2")
        vm = made.name
        try:
            name = await client.create_guest_memfd(
                vm=vm, size=size, flags=flags_of(page_size, flags)
            )
            await client.set_user_memory_region2(
                vm=vm,
                slot=0,
                flags=GMEM,
                guest_phys_addr=GPA,
                memory_size=size,
                guest_memfd=name,
            )
            await client.create_vcpu(vm=vm, vcpu=0)
            yield Machine(client, Inode(host, gmem, name, size), vm)
        finally:
            await until(partial(_deleted, client, vm), f"the end of {vm}")


async def _deleted(client: VmmClient, vm: str) -> bool:
    """A Run stream that its caller cancelled may take a moment to end."""
    try:
        await client.delete_vm(name=vm)
    except InUse:
        return False
    return True


@SIZES
async def test_host_and_guest_pass_a_page_to_and_fro_c087(
    clean_host: Host, gmem: GuestMemfdClient, page_size: int
) -> None:
    async with booted(clean_host, gmem, page_size=page_size) as machine:
        one, two = [await machine.inode.mapped_by(name) for name in ("one", "two")]
        await one.asked("raw_store", 0, 0xA)
        assert await machine.byte(0) == 0xA
        await machine.run(store(GPA, b"\x0b"))
        assert await one.asked("raw_load", 0) == 0xB

        assert await convert(one, PRIVATE, 0, page_size) == (0, 0)
        assert await is_kept_out(two, 0)
        assert await machine.byte(0) == 0xB
        await machine.run(store(GPA, b"\x0c"))

        assert await convert(one, SHARED, 0, page_size) == (0, 0)
        assert await one.asked("raw_load", 0) == 0xC
        assert await machine.byte(0) == 0xC


@SIZES
async def test_what_starts_private_becomes_shared_with_its_content_c088(
    clean_host: Host, gmem: GuestMemfdClient, page_size: int
) -> None:
    flags = SHARED_FLAG | INIT_PRIVATE
    async with booted(clean_host, gmem, page_size=page_size, flags=flags) as machine:
        one, two = [await machine.inode.mapped_by(name) for name in ("one", "two")]
        assert await is_kept_out(one, 0)
        await machine.run(store(GPA + 5, b"\x0a"))
        level = [SIZE_1G, SIZE_2M, PAGE_SIZE].index(page_size)
        assert (await machine.levels())[level] == 1
        assert await convert(two, SHARED, 0, page_size) == (0, 0)
        assert await machine.levels() == (0, 0, 0)
        assert await two.asked("raw_load", 5) == 0xA


@pytest.mark.parametrize("attributes", [0, ATTRIBUTE_PRIVATE])
async def test_attributes_that_contradict_have_no_effect_c094(
    clean_host: Host, gmem: GuestMemfdClient, attributes: int
) -> None:
    async with booted(clean_host, gmem, page_size=SIZE_2M, pages=2) as machine:
        host = await machine.inode.mapped_by()
        assert await convert(host, PRIVATE, SIZE_2M, SIZE_2M) == (0, 0)
        await machine.run(fill(GPA, PAGE_SIZE, 1), fill(GPA + SIZE_2M, PAGE_SIZE, 2))
        await machine.client.set_memory_attributes(
            vm=machine.vm, address=GPA, size=2 * SIZE_2M, attributes=ATTRIBUTE_PRIVATE
        )
        await machine.client.set_memory_attributes(
            vm=machine.vm, address=GPA, size=2 * SIZE_2M, attributes=attributes
        )
        assert [await machine.byte(at) for at in (0, SIZE_2M)] == [1, 2]
        assert await host.asked("raw_load", 0) == 1
        assert await is_kept_out(host, SIZE_2M)
        assert (await machine.inode.get()).shared_pages == 512


async def test_the_wrong_kind_of_access_is_a_memory_fault_that_a_vmm_can_convert(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    async with booted(clean_host, gmem, page_size=SIZE_2M) as machine:
        touch = load(GPA, 1, access=pb.ACCESS_PRIVATE)
        by_hand = machine.client.run(
            vm=machine.vm, program=[touch], policy=pb.POLICY_NONE
        )
        async with by_hand as run:
            fault = (await anext(run.exits())).memory_fault
        assert (fault.errno, fault.flags, fault.gpa) == (Errno.EFAULT, 8, GPA)
        assert (await machine.inode.get()).st_blocks == 0

        await machine.run(touch, policy=pb.POLICY_CONVERT)
        state = await machine.inode.get()
        assert (state.private_pages, state.split_folios) == (1, 1)


async def test_the_guest_asks_and_its_page_is_reconstructed(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    flags = SHARED_FLAG | INIT_PRIVATE
    async with booted(clean_host, gmem, page_size=SIZE_1G, flags=flags) as machine:
        size = 2 * SIZE_2M
        results = await machine.run(
            fill(GPA, 3 * size, 0x5A),
            map_gpa_range(GPA + size, size >> 12, private=False),
            verify(GPA, 3 * size, 0x5A),
            policy=pb.POLICY_CONVERT,
        )
        assert [result.count for result in results] == [0, 0]
        assert (await machine.inode.get()).split_folios == 1
        host = await machine.inode.mapped_by()
        assert await host.asked("count_other", size, size, 0x5A) == 0
        await machine.run(
            map_gpa_range(GPA + size, size >> 12, private=True),
            verify(GPA, 3 * size, 0x5A),
            policy=pb.POLICY_CONVERT,
        )
        assert (await machine.inode.get()).split_folios == 0
        assert (await machine.levels())[0] == 1


async def test_conversions_by_ioctl_under_a_running_guest_lose_nothing(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    """The guest works on the very page that is converted, and on its neighbours."""
    async with booted(clean_host, gmem, page_size=SIZE_2M) as machine:
        caller = await machine.inode.mapped_by("caller")
        busy = [
            instruction
            for value in range(200)
            for instruction in (
                fill(GPA, 2 * PAGE_SIZE, value),
                verify(GPA, 2 * PAGE_SIZE, value),
            )
        ]
        running = asyncio.create_task(machine.run(*busy))
        answers = await convert_often(caller, PAGE_SIZE, PAGE_SIZE, 50)
        results = await running
        assert answers == {"0": 100}
        assert [result.count for result in results] == [0] * 200


async def test_a_default_vm_may_have_one_c080(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    kind = pb.VM_TYPE_DEFAULT
    async with booted(clean_host, gmem, page_size=SIZE_2M, vm_type=kind) as machine:
        await machine.run(store(GPA, b"\x07"))
        host = await machine.inode.mapped_by()
        assert await host.asked("raw_load", 0) == 7


async def test_single_bits_that_are_no_flags_c080(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    async with booted(clean_host, gmem, page_size=PAGE_SIZE) as machine:
        for bit in set(range(64)) - {0, 2}:
            with pytest.raises(KernelError) as refused:
                await machine.client.create_guest_memfd(
                    vm=machine.vm, size=SIZE_2M, flags=1 << bit
                )
            assert refused.value.errno == Errno.EINVAL, bit


async def test_sizes_that_are_no_multiple_c084(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    async with booted(clean_host, gmem, page_size=PAGE_SIZE) as machine:
        for page_size in (PAGE_SIZE, SIZE_2M, SIZE_1G):
            for size in (1, 1 + page_size // 2):
                with pytest.raises(KernelError) as refused:
                    await machine.client.create_guest_memfd(
                        vm=machine.vm, size=size, flags=flags_of(page_size)
                    )
                assert refused.value.errno == Errno.EINVAL, (page_size, size)


async def test_userspace_must_map_this_file_at_this_offset_c085(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    async with booted(clean_host, gmem, page_size=SIZE_2M, pages=2) as machine:
        client, vm = machine.client, machine.vm
        to = Path((await client.get_capabilities()).broker_path)
        flags = flags_of(SIZE_2M)
        name, other = [
            await client.create_guest_memfd(vm=vm, size=2 * SIZE_2M, flags=flags)
            for _ in range(2)
        ]
        with BrokerClient(to, "test", "i1") as broker:
            mine, theirs = [
                await asyncio.to_thread(_give, await gmem.open_view(name=one), broker)
                for one in (name, other)
            ]
            memory = broker.give(os.memfd_create("anonymous"), "anonymous")
            cases = [
                (memory, 0, False),
                (theirs, SIZE_2M, False),
                (mine, 0, False),
                (mine, SIZE_2M, True),
            ]
            for descriptor, offset, accepted in cases:
                call = client.set_user_memory_region2(
                    vm=vm,
                    slot=1,
                    flags=GMEM,
                    guest_phys_addr=2 * GPA,
                    memory_size=SIZE_2M,
                    userspace=pb.Userspace(descriptor=descriptor, offset=offset),
                    guest_memfd=name,
                    guest_memfd_offset=SIZE_2M,
                )
                if accepted:
                    await call
                    continue
                with pytest.raises(KernelError) as refused:
                    await call
                assert refused.value.reason is Reason.USERSPACE_ELSEWHERE
                assert refused.value.errno == Errno.EINVAL
            assert len((await client.get_vm(vm)).memslots) == 2


def _give(view: guest_memfd_pb2.OpenViewResponse, to: BrokerClient) -> str:
    """Pass a host view on; this process maps nothing."""
    with BrokerClient(Path(view.broker_path), "test", "i1") as source:
        fd = source.take(view.token)
    try:
        return to.give(fd, "host view")
    finally:
        os.close(fd)
