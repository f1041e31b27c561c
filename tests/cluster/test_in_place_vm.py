"""A guest of IN_PLACE: its file has the attributes, and the VM has none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

import pytest

from gmem.api.vmm.v1 import vmm_pb2 as pb
from gmem.client import GuestMemfdClient, VmmClient
from gmem.client.program import fill, load, map_gpa_range, store, verify
from gmem.uapi.errors import Errno, InUse, Reason
from gmem.uapi.flags import (
    GUEST_MEMFD_FLAG_INIT_SHARED,
    GUEST_MEMFD_FLAG_MMAP,
    IN_PLACE_HUGE_PAGES,
    KVM_MEM_GUEST_MEMFD,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    Capability,
)
from gmem.uapi.pages import PAGE_SIZE, SIZE_1G, SIZE_2M, order_of
from tests.support.hosts import (
    SIGBUS,
    Host,
    Inode,
    Program,
    refused,
    running_host,
    until,
)

pytestmark = pytest.mark.fuse

GPA = 4 * SIZE_1G
MMAP, INIT_SHARED = GUEST_MEMFD_FLAG_MMAP, GUEST_MEMFD_FLAG_INIT_SHARED
PRIVATE, SHARED = KVM_MEMORY_ATTRIBUTE_PRIVATE, 0
SIZES = pytest.mark.parametrize(
    "page_size", [PAGE_SIZE, SIZE_2M, SIZE_1G], ids=["4K", "2M", "1G"]
)


@pytest.fixture(scope="module")
def module_host() -> Iterator[Host]:
    with running_host(nr_vmms=1) as host:
        yield host


@dataclass
class Machine:
    """A VM whose memslot at GPA is a file that is converted in place."""

    client: VmmClient
    inode: Inode
    vm: str

    async def exits(
        self, *program: pb.Instruction, policy: pb.Policy.ValueType = pb.POLICY_NONE
    ) -> list[pb.RunResponse]:
        async with self.client.run(vm=self.vm, program=program, policy=policy) as run:
            found: list[pb.RunResponse] = []
            async for reached in run.exits():
                found.append(reached)
                if reached.WhichOneof("exit") != "hlt":
                    break
            return found

    async def run(
        self, *program: pb.Instruction, policy: pb.Policy.ValueType = pb.POLICY_NONE
    ) -> list[pb.Result]:
        (reached,) = await self.exits(*program, policy=policy)
        assert reached.WhichOneof("exit") == "hlt", reached
        return list(reached.results)

    async def byte(self, offset: int) -> int:
        (result,) = await self.run(load(GPA + offset, 1))
        return result.data[0]

    async def delete_slot(self) -> None:
        await self.client.set_user_memory_region2(
            vm=self.vm, slot=0, guest_phys_addr=0, memory_size=0
        )


@asynccontextmanager
async def booted(
    host: Host,
    gmem: GuestMemfdClient,
    *,
    page_size: int = PAGE_SIZE,
    pages: int = 4,
    flags: int = MMAP,
    vm_type: pb.VmType.ValueType = pb.VM_TYPE_SW_PROTECTED,
) -> AsyncIterator[Machine]:
    size = page_size * pages
    huge = page_size > PAGE_SIZE
    async with VmmClient(host.target("vmm-0"), client="test") as client:
        made = await client.create_vm(vm_id="v", type=vm_type, lineage="IN_PLACE")
        try:
            name = await client.create_guest_memfd(
                vm=made.name,
                size=size,
                flags=flags | (IN_PLACE_HUGE_PAGES if huge else 0),
                page_order=order_of(page_size) if huge else 0,
            )
            await client.set_user_memory_region2(
                vm=made.name,
                slot=0,
                flags=KVM_MEM_GUEST_MEMFD,
                guest_phys_addr=GPA,
                memory_size=size,
                guest_memfd=name,
            )
            await client.create_vcpu(vm=made.name, vcpu=0)
            yield Machine(client, Inode(host, gmem, name, size), made.name)
        finally:
            await until(partial(_deleted, client, made.name), "the end of the VM")


async def _deleted(client: VmmClient, vm: str) -> bool:
    """A Run stream that its caller cancelled may take a moment to end."""
    try:
        await client.delete_vm(name=vm)
    except InUse:
        return False
    return True


async def convert(client: Program, attributes: int, offset: int, size: int) -> int:
    answer = await client.asked("set_attributes", offset, size, attributes, {})
    number: int = answer["errno"]
    return number


async def dies(client: Program, offset: int) -> bool:
    return await asyncio.to_thread(client.dies_of, "raw_load", offset) == SIGBUS


@SIZES
async def test_host_and_guest_pass_a_page_to_and_fro_c087(
    clean_host: Host, gmem: GuestMemfdClient, page_size: int
) -> None:
    async with booted(clean_host, gmem, page_size=page_size, pages=1) as machine:
        one, two = [await machine.inode.mapped_by(name) for name in ("one", "two")]
        assert await convert(one, SHARED, 0, page_size) == 0
        await one.asked("raw_store", 0, 0xA)
        assert await machine.byte(0) == 0xA
        await machine.run(store(GPA, b"\x0b"))
        assert await one.asked("raw_load", 0) == 0xB

        assert await convert(one, PRIVATE, 0, page_size) == 0
        assert await dies(two, 0)
        assert await machine.byte(0) == 0xB
        await machine.run(store(GPA, b"\x0c"))

        assert await convert(one, SHARED, 0, page_size) == 0
        assert await one.asked("raw_load", 0) == 0xC
        assert await machine.byte(0) == 0xC


@pytest.mark.parametrize("page_size", [SIZE_2M, SIZE_1G], ids=["2M", "1G"])
async def test_a_private_huge_page_is_one_entry_until_a_page_is_shared(
    clean_host: Host, gmem: GuestMemfdClient, page_size: int
) -> None:
    async with booted(clean_host, gmem, page_size=page_size, pages=1) as machine:
        await machine.run(fill(GPA, PAGE_SIZE, 1))
        before = await machine.client.get_stage2(machine.vm)
        assert before.entries_1g + before.entries_2m == 1
        host = await machine.inode.mapped_by()
        assert await convert(host, SHARED, PAGE_SIZE, PAGE_SIZE) == 0
        assert await machine.byte(0) == 1
        after = await machine.client.get_stage2(machine.vm)
        assert (after.entries_1g, after.entries_2m, after.entries_4k) == (0, 0, 1)


async def test_an_untouched_page_reads_0_on_either_side(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    async with booted(clean_host, gmem) as machine:
        host = await machine.inode.mapped_by()
        assert await convert(host, SHARED, 0, 2 * PAGE_SIZE) == 0
        assert await host.asked("raw_load", 0) == 0
        assert await machine.byte(PAGE_SIZE) == 0
        assert await machine.byte(3 * PAGE_SIZE) == 0
        assert await convert(host, PRIVATE, 0, 2 * PAGE_SIZE) == 0
        (result,) = await machine.run(verify(GPA, 4 * PAGE_SIZE, 0))
        assert result.count == 0


async def test_a_punched_page_reads_0_and_stays_what_it_is_c100(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    async with booted(clean_host, gmem) as machine:
        host = await machine.inode.mapped_by()
        size = machine.inode.size
        assert await convert(host, SHARED, 0, size) == 0
        await host.asked("write", 0, 0xA, size)
        await host.asked("fallocate", 3, 0, size)
        assert await host.asked("raw_load", 0) == 0
        await host.asked("write", 0, 0xA, size)
        assert await convert(host, PRIVATE, 0, size) == 0
        assert await machine.byte(0) == 0xA
        await host.asked("fallocate", 3, 0, size)
        assert await machine.byte(0) == 0
        assert await dies(host, 0)


async def test_a_deleted_slot_is_mmio_c061(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    async with booted(clean_host, gmem) as machine:
        assert await machine.byte(0) == 0
        await machine.delete_slot()
        (reached,) = await machine.exits(load(GPA, 8))
        assert reached.WhichOneof("exit") == "mmio"
        found = reached.mmio
        assert (found.gpa, found.len, found.is_write) == (GPA, 8, False)


async def test_the_guest_asks_and_the_vmm_converts_the_file(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    async with booted(clean_host, gmem, page_size=SIZE_2M, pages=2) as machine:
        await machine.run(fill(GPA, PAGE_SIZE, 0x11))
        await machine.run(
            map_gpa_range(GPA, 1, private=False), policy=pb.POLICY_CONVERT
        )
        host = await machine.inode.mapped_by()
        assert await host.asked("raw_load", 0) == 0x11
        touch = load(GPA, 1, access=pb.ACCESS_PRIVATE)
        (reached,) = await machine.exits(touch)
        fault = reached.memory_fault
        assert (fault.errno, fault.flags, fault.gpa) == (Errno.EFAULT, 8, GPA)
        (result,) = await machine.run(touch, policy=pb.POLICY_CONVERT)
        assert result.data[0] == 0x11
        assert (await machine.inode.get()).shared_pages == 0


async def test_the_vm_takes_no_private_attribute(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    async with booted(clean_host, gmem) as machine:
        extensions = (await machine.client.get_vm(machine.vm)).extensions
        assert extensions[Capability.MEMORY_ATTRIBUTES] == 0
        assert extensions[Capability.GUEST_MEMFD_MEMORY_ATTRIBUTES] == PRIVATE
        with refused(Reason.ATTRIBUTE_UNSUPPORTED, "convert its files", errno="EINVAL"):
            await machine.client.set_memory_attributes(
                vm=machine.vm, address=GPA, size=PAGE_SIZE, attributes=PRIVATE
            )


@pytest.mark.parametrize("flags", [MMAP | INIT_SHARED, INIT_SHARED])
async def test_init_shared_is_for_a_protected_vm_too_c103(
    clean_host: Host, gmem: GuestMemfdClient, flags: int
) -> None:
    async with booted(clean_host, gmem, flags=flags) as machine:
        assert (await machine.inode.get()).private_pages == 0
        if not flags & MMAP:
            # Shared memory is the userspace side's, and this slot has none.
            (reached,) = await machine.exits(load(GPA, 1))
            assert reached.memory_fault.errno == Errno.EFAULT
            return
        host = await machine.inode.mapped_by()
        await host.asked("raw_store", 0, 0x22)
        assert await machine.byte(0) == 0x22
        # Nobody has to call MADV_DONTNEED.
        assert await convert(host, PRIVATE, 0, machine.inode.size) == 0
        assert await dies(host, 0)
        assert await machine.byte(0) == 0x22


@pytest.mark.parametrize(
    ("flags", "order", "reason"),
    [
        (MMAP, 9, Reason.FLAG_COMBINATION),
        (IN_PLACE_HUGE_PAGES | INIT_SHARED, 9, Reason.FLAG_COMBINATION),
        (IN_PLACE_HUGE_PAGES, 0, Reason.PAGE_SIZE_UNKNOWN),
        (IN_PLACE_HUGE_PAGES, 8, Reason.PAGE_SIZE_UNKNOWN),
        (1 << 3, 0, Reason.FLAG_UNKNOWN),
    ],
)
async def test_flags_that_cannot_be_are_einval(
    clean_host: Host, gmem: GuestMemfdClient, flags: int, order: int, reason: Reason
) -> None:
    async with booted(clean_host, gmem) as machine:
        with refused(reason, errno="EINVAL"):
            await machine.client.create_guest_memfd(
                vm=machine.vm, size=SIZE_2M, flags=flags, page_order=order
            )


async def test_a_default_vm_shares_its_file_and_converts_nothing_c079(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    async with booted(
        clean_host, gmem, flags=MMAP | INIT_SHARED, vm_type=pb.VM_TYPE_DEFAULT
    ) as machine:
        host = await machine.inode.mapped_by()
        await host.asked("raw_store", 0, 0xAA)
        assert await machine.byte(0) == 0xAA
        assert await convert(host, PRIVATE, 0, PAGE_SIZE) == Errno.EINVAL
        assert await host.asked("raw_load", 0) == 0xAA
