"""MAINLINE with real files and a real guest: mmap, SIGBUS, memory policies.

Names end in the lines of docs/semantics.md that they show, where there is one.
"""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from gmem.api.types.v1.types_pb2 import MemPolicy
from gmem.api.vmm.v1 import vmm_pb2 as pb
from gmem.client import GuestMemfdClient, HostAllocatorClient, VmmClient
from gmem.client.program import fill, load, store, verify
from gmem.runtime.config import HostShape, NodeShape
from gmem.uapi.errors import Errno, Reason
from gmem.uapi.flags import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    GUEST_MEMFD_FLAG_INIT_SHARED,
    GUEST_MEMFD_FLAG_MMAP,
    KVM_GMEM_CONVERT_PRIVATE,
    KVM_MEM_GUEST_MEMFD,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    Capability,
)
from gmem.uapi.pages import PAGE_SIZE, SIZE_1G, SIZE_2M
from tests.support.hosts import (
    SIGBUS,
    VM,
    Host,
    Inode,
    Program,
    Refused,
    refused,
    running_host,
)

pytestmark = pytest.mark.fuse

KEEP = FALLOC_FL_KEEP_SIZE
PUNCH = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
GPA = 4 * SIZE_1G
PAGES = 4
SIZE = PAGES * PAGE_SIZE
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25
MMAP, INIT_SHARED = GUEST_MEMFD_FLAG_MMAP, GUEST_MEMFD_FLAG_INIT_SHARED
DEFAULT, PROTECTED = pb.VM_TYPE_DEFAULT, pb.VM_TYPE_SW_PROTECTED


@pytest.fixture(scope="module")
def module_host() -> Iterator[Host]:
    """Two nodes without huge pages: MAINLINE has none."""
    shape = HostShape(nodes=(NodeShape(memory_size=SIZE_1G),) * 2)
    with running_host(shape, nr_vmms=1) as host:
        yield host


async def new_inode(
    host: Host, gmem: GuestMemfdClient, *, mmap: bool = True, init_shared: bool = True
) -> Inode:
    made = await gmem.create_guest_memfd(
        size=SIZE,
        page_size=PAGE_SIZE,
        lineage="MAINLINE",
        vm=VM,
        mmap=mmap,
        init_shared=init_shared,
    )
    return Inode(host, gmem, made.name, SIZE)


async def dies(client: Program, op: str, *args: int) -> bool:
    return await asyncio.to_thread(client.dies_of, op, *args) == SIGBUS


# The file.


@pytest.mark.parametrize("init_shared", [True, False])
async def test_without_mmap_there_is_no_mapping_c071(
    clean_host: Host, gmem: GuestMemfdClient, init_shared: bool
) -> None:
    inode = await new_inode(clean_host, gmem, mmap=False, init_shared=init_shared)
    client = clean_host.program()
    await client.asked("take", await inode.token())
    with pytest.raises(Refused, match="ENODEV"):
        await client.asked("map")
    found = await client.asked("fstat")
    assert (found["st_size"], found["st_blksize"]) == (SIZE, PAGE_SIZE)
    await client.asked("fallocate", KEEP, 0, SIZE)


async def test_a_punched_page_reads_0_and_the_others_stay_c073(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_inode(clean_host, gmem)
    client = await inode.mapped_by()
    await client.asked("write", 0, 0xAA, SIZE)
    assert await client.asked("count_other", 0, SIZE, 0xAA) == 0
    await client.asked("fallocate", PUNCH, 0, PAGE_SIZE)
    assert await client.asked("count_other", 0, PAGE_SIZE, 0) == 0
    assert await client.asked("count_other", PAGE_SIZE, SIZE - PAGE_SIZE, 0xAA) == 0
    await client.asked("write", 0, 0xAA, PAGE_SIZE)
    assert await client.asked("count_other", 0, SIZE, 0xAA) == 0


async def test_a_punch_goes_through_whoever_pins_the_page(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_inode(clean_host, gmem)
    client = await inode.mapped_by()
    await client.asked("write", 0, 0xAA, SIZE)
    hold = await gmem.pin_pages(
        name=inode.name, offset=0, size=PAGE_SIZE, holder="vhost"
    )
    await client.asked("fallocate", PUNCH, 0, SIZE)
    assert await client.asked("count_other", 0, SIZE, 0) == 0
    await gmem.unpin_pages(hold=hold)


async def test_touching_past_the_end_is_sigbus_and_bytes_before_it_are_there_c074(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_inode(clean_host, gmem)
    client = await inode.mapped_by()
    await client.asked("write", 0, 0xAA, SIZE)
    assert await client.asked("raw_load_in", 4 * SIZE, SIZE - 1) == 0xAA
    assert await dies(client, "raw_load_in", 4 * SIZE, SIZE)


async def test_without_init_shared_any_touch_is_sigbus_c075(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_inode(clean_host, gmem, init_shared=False)
    for at, op in ((0, "raw_load"), (PAGE_SIZE, "raw_load")):
        assert await dies(await inode.mapped_by(f"c{at}"), op, at)
    assert await dies(await inode.mapped_by("writer"), "raw_store", 0, 1)
    state = await inode.get()
    assert (state.st_blocks, state.private_pages) == (0, PAGES)


async def test_no_huge_pages_are_to_be_had_by_madvise_c078(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_inode(clean_host, gmem)
    client = await inode.mapped_by()
    await client.asked("write", 0, 0xAA, SIZE)
    assert await client.asked("madvise", MADV_HUGEPAGE) == 0
    assert await client.asked("madvise", MADV_COLLAPSE) == Errno.EINVAL
    assert await client.asked("madvise", mmap.MADV_DONTNEED) == 0
    assert await client.asked("count_other", 0, SIZE, 0xAA) == 0


async def test_no_page_is_converted_by_ioctl_or_call(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_inode(clean_host, gmem)
    client = await inode.mapped_by()
    answer = await client.asked("convert", KVM_GMEM_CONVERT_PRIVATE, 0, PAGE_SIZE)
    assert answer["errno"] == Errno.ENOTTY
    with refused(Reason.IOCTL_UNKNOWN, "not converted in place", errno="ENOTTY"):
        await inode.convert(0, PAGE_SIZE, private=True)
    assert await client.asked("raw_load", 0) == 0


# Memory policies.


async def pages_of(allocator: HostAllocatorClient) -> list[int]:
    """Return how many base pages each node has free."""
    nodes = (await allocator.get_statistics()).nodes
    return [node.free_base_pages for node in nodes]


async def test_policies_can_be_read_and_unknown_ones_are_einval_c076(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_inode(clean_host, gmem)
    for policy in (
        MemPolicy(mode=MemPolicy.MODE_INTERLEAVE, nodes=[0, 1]),
        MemPolicy(mode=MemPolicy.MODE_BIND, nodes=[1]),
        MemPolicy(mode=MemPolicy.MODE_DEFAULT),
    ):
        await gmem.set_mempolicy(
            name=inode.name, offset=PAGE_SIZE, size=PAGE_SIZE, mempolicy=policy
        )
        found = await gmem.get_mempolicy(name=inode.name, offset=0, size=SIZE)
        at = {run.offset: run.mempolicy for run in found}
        if policy.mode == MemPolicy.MODE_DEFAULT:
            assert at == {0: policy}
        else:
            assert at[PAGE_SIZE] == policy
            assert at[0] == at[2 * PAGE_SIZE] == MemPolicy(mode=MemPolicy.MODE_DEFAULT)
    unknown = MemPolicy()
    unknown.MergeFromString(b"\x08\xe7\x07")
    with refused(Reason.MEMPOLICY_INVALID, "999", errno="EINVAL"):
        await gmem.set_mempolicy(
            name=inode.name, offset=0, size=SIZE, mempolicy=unknown
        )


async def test_a_policy_is_for_later_allocations_and_moves_nothing_c077(
    clean_host: Host, gmem: GuestMemfdClient, allocator: HostAllocatorClient
) -> None:
    inode = await new_inode(clean_host, gmem)
    client = await inode.mapped_by()

    async def bind(*nodes: int) -> None:
        for page, node in enumerate(nodes):
            policy = MemPolicy(mode=MemPolicy.MODE_BIND, nodes=[node])
            await gmem.set_mempolicy(
                name=inode.name,
                offset=page * PAGE_SIZE,
                size=PAGE_SIZE,
                mempolicy=policy,
            )

    async def taken_by(pages: tuple[int, ...]) -> list[int]:
        """Touch pages; return how many each node gave."""
        before = await pages_of(allocator)
        for page in pages:
            await client.asked("raw_store", page * PAGE_SIZE, 1)
        after = await pages_of(allocator)
        return [one - two for one, two in zip(before, after, strict=True)]

    await bind(1, 1, 0, 0)
    assert await taken_by((0, 1)) == [0, 2]
    assert await taken_by((2, 3)) == [2, 0]
    await bind(0, 0, 1, 1)
    assert await taken_by((0, 1, 2, 3)) == [0, 0]
    await client.asked("fallocate", PUNCH, 0, SIZE)
    assert await taken_by((0, 1)) == [2, 0]
    assert await taken_by((2, 3)) == [0, 2]


# The guest.


@dataclass
class Machine:
    """A VM whose one memslot at GPA is a file of four pages."""

    client: VmmClient
    inode: Inode
    vm: str

    async def run(
        self, *program: pb.Instruction, policy: pb.Policy.ValueType = pb.POLICY_NONE
    ) -> list[pb.RunResponse]:
        async with self.client.run(vm=self.vm, program=program, policy=policy) as run:
            exits: list[pb.RunResponse] = []
            async for reached in run.exits():
                exits.append(reached)
                if reached.WhichOneof("exit") != "hlt":
                    break
            return exits

    async def byte(self, offset: int) -> int:
        (reached,) = await self.run(load(GPA + offset, 1))
        return reached.results[0].data[0]

    async def set(self, *, private: bool) -> None:
        await self.client.set_memory_attributes(
            vm=self.vm,
            address=GPA,
            size=SIZE,
            attributes=KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0,
        )


@asynccontextmanager
async def booted(
    host: Host,
    gmem: GuestMemfdClient,
    flags: int,
    vm_type: pb.VmType.ValueType,
) -> AsyncIterator[Machine]:
    async with VmmClient(host.target("vmm-0"), client="test") as client:
        made = await client.create_vm(vm_id="v", type=vm_type, lineage="MAINLINE")
        try:
            name = await client.create_guest_memfd(vm=made.name, size=SIZE, flags=flags)
            await client.set_user_memory_region2(
                vm=made.name,
                slot=0,
                flags=KVM_MEM_GUEST_MEMFD,
                guest_phys_addr=GPA,
                memory_size=SIZE,
                guest_memfd=name,
            )
            await client.create_vcpu(vm=made.name, vcpu=0)
            yield Machine(client, Inode(host, gmem, name, SIZE), made.name)
        finally:
            await client.delete_vm(name=made.name)


async def test_host_and_guest_of_a_default_vm_share_the_file_c079(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    async with booted(clean_host, gmem, MMAP | INIT_SHARED, DEFAULT) as machine:
        found = await machine.client.get_vm(machine.vm)
        assert found.extensions[Capability.GUEST_MEMFD_FLAGS] == MMAP | INIT_SHARED
        host = await machine.inode.mapped_by()
        await host.asked("write", 0, 0xAA, SIZE)
        (reached,) = await machine.run(verify(GPA, SIZE, 0xAA), fill(GPA, SIZE, 0xFF))
        assert reached.results[0].count == 0
        assert await host.asked("count_other", 0, SIZE, 0xFF) == 0


async def test_a_protected_vm_has_both_kinds_of_access_from_its_file(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    """GMEM_ONLY: an attribute changes what an access is, not where the page is."""
    async with booted(clean_host, gmem, MMAP, PROTECTED) as machine:
        await machine.run(store(GPA + 5, b"\x0a"))
        await machine.set(private=True)
        assert await machine.byte(5) == 0xA
        (reached,) = await machine.run(load(GPA + 5, 1, access=pb.ACCESS_SHARED))
        assert reached.memory_fault.errno == Errno.EFAULT
        await machine.set(private=False)
        (reached,) = await machine.run(load(GPA + 5, 1, access=pb.ACCESS_SHARED))
        assert reached.results[0].data[0] == 0xA
        # The host never could.
        assert (await machine.inode.get()).private_pages == PAGES
        assert await dies(await machine.inode.mapped_by(), "raw_load", 5)


async def test_init_shared_is_not_for_a_vm_with_private_memory(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    async with booted(clean_host, gmem, MMAP, PROTECTED) as machine:
        client, vm = machine.client, machine.vm
        assert (await client.get_vm(vm)).extensions[Capability.GUEST_MEMFD_FLAGS] == 1
        for flags in (INIT_SHARED, MMAP | INIT_SHARED):
            with refused(Reason.FLAG_UNKNOWN, "SW_PROTECTED", errno="EINVAL"):
                await client.create_guest_memfd(vm=vm, size=SIZE, flags=flags)
        for flags in (4, 1 << 58):
            with refused(Reason.FLAG_UNKNOWN, errno="EINVAL"):
                await client.create_guest_memfd(vm=vm, size=SIZE_2M, flags=flags)
        state = await gmem.list_guest_memfds()
        assert [one.name for one in state] == [machine.inode.name]


async def test_a_guest_that_asks_gets_its_attributes_set(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    async with booted(clean_host, gmem, MMAP, PROTECTED) as machine:
        touch = store(GPA, b"\x07", access=pb.ACCESS_PRIVATE)
        (reached,) = await machine.run(touch, policy=pb.POLICY_CONVERT)
        assert reached.WhichOneof("exit") == "hlt"
        runs = await machine.client.get_memory_attributes(
            vm=machine.vm, address=GPA, size=SIZE
        )
        assert [(run.size, run.attributes) for run in runs] == [
            (PAGE_SIZE, KVM_MEMORY_ATTRIBUTE_PRIVATE),
            (SIZE - PAGE_SIZE, 0),
        ]
