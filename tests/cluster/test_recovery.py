"""Services are killed in the middle of their work, started again, and agree."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable

import pytest

from gmem.api.guest_memfd.v1 import guest_memfd_pb2 as pb
from gmem.api.vmm.v1 import vmm_pb2 as vmm_pb
from gmem.client import GuestMemfdClient, HostAllocatorClient, Patience, VmmClient
from gmem.ctl import launcher
from gmem.ctl.processes import wait_gone
from gmem.uapi.errors import OPERATION_ERRORS, KernelError, Reason
from gmem.uapi.flags import KVM_MEM_GUEST_MEMFD
from gmem.uapi.pages import PAGE_SIZE, SIZE_2M
from tests.support.hosts import VM, Host, counters, running_host, until

pytestmark = pytest.mark.fuse

SEED = 20
LONG = Patience(timeout=20.0, attempts=60, total=60.0, longest_pause=0.2)
PAGES = SIZE_2M // PAGE_SIZE


class Churn:
    """Creates, converts, punches and deletes inodes until it is told to end."""

    def __init__(self, gmem: GuestMemfdClient, seed: int) -> None:
        self.gmem = gmem
        self.chance = random.Random(seed)
        self.done = 0
        self.refused: list[str] = []
        self.ending = False

    async def run(self, page_size: int) -> None:
        while not self.ending:
            try:
                await self._one_life(page_size)
            except OPERATION_ERRORS as error:
                self.refused.append(str(error))
                await asyncio.sleep(0.05)

    async def _one_life(self, page_size: int) -> None:
        size = 2 * SIZE_2M
        made = await self.gmem.create_guest_memfd(size=size, page_size=page_size, vm=VM)
        name = made.name
        await self.gmem.bind_memslot(
            name=name,
            vm=VM,
            slot=0,
            base_gfn=0,
            offset=0,
            size=size,
            host_faultable=True,
            vmm_target="",
        )
        for _ in range(6):
            if self.ending:
                return
            await self._step(name, size)
            self.done += 1
        if self.chance.random() < 0.7:
            await self.gmem.delete_guest_memfd(name=name)

    async def _step(self, name: str, size: int) -> None:
        first = self.chance.randrange(2 * PAGES - 8) * PAGE_SIZE
        length = self.chance.choice((PAGE_SIZE, 8 * PAGE_SIZE))
        match self.chance.randrange(4):
            case 0:
                await self.gmem.fallocate(name=name, mode=1, offset=0, length=size)
            case 1:
                await self.gmem.fallocate(name=name, mode=3, offset=0, length=SIZE_2M)
            case _:
                part = pb.Range(name=name, offset=first, size=length)
                await self.gmem.convert_range(
                    ranges=[part], to_shared=self.chance.random() < 0.5
                )


async def restart(host: Host, service: str) -> None:
    """Kill a service; return when it, or who was started in its place, answers."""
    process = host.state.service(service).process
    await asyncio.to_thread(host.kill, service)
    await asyncio.to_thread(wait_gone, [process], 20.0)
    host.state = await launcher.restart_service(host.directory, service)


async def churn_under(host: Host, disturb: Callable[[], Awaitable[None]]) -> Churn:
    """Disturb a host while it works; return when the work has ended."""
    async with GuestMemfdClient(host.target("guest_memfd"), patience=LONG) as gmem:
        churn = Churn(gmem, SEED)
        workers = [
            asyncio.create_task(churn.run(size))
            for size in (SIZE_2M, SIZE_2M, PAGE_SIZE, PAGE_SIZE)
        ]
        try:
            await disturb()
        finally:
            churn.ending = True
            await asyncio.gather(*workers)
    return churn


async def agreed(host: Host) -> None:
    """Audit, once calls that went unanswered have been looked into."""
    for _ in range(100):
        with contextlib.suppress(AssertionError):
            return await audit(host)
        await asyncio.sleep(0.2)
    return await audit(host)


async def audit(host: Host) -> None:
    """Every folio that is out lies in one inode, once, in the state that it has."""
    async with (
        HostAllocatorClient(host.target("host_allocator")) as allocator,
        GuestMemfdClient(host.target("guest_memfd")) as gmem,
    ):
        inodes = {inode.name: inode for inode in await gmem.list_guest_memfds()}
        claims = {claim.owner: claim for claim in await allocator.list_reservations()}
        assert set(claims) == set(inodes)
        frames: set[int] = set()
        for name, inode in inodes.items():
            runs = await allocator.list_folios(claims[name].handle)
            out = sum(run.nr_folios for run in runs)
            split = sum(run.nr_folios for run in runs if run.split)
            assert out == inode.whole_folios + inode.split_folios, name
            assert split == inode.split_folios, name
            for run in runs:
                pages = run.nr_folios << run.first.order
                mine = set(range(run.first.pfn, run.first.pfn + pages))
                assert not mine & frames, "a frame is out twice"
                frames |= mine


async def no_orphans(host: Host) -> None:
    """Wait until reservations of creations that were cut off are back."""
    async with (
        HostAllocatorClient(host.target("host_allocator")) as allocator,
        GuestMemfdClient(host.target("guest_memfd")) as gmem,
    ):
        names, owners = set[str](), list[str]()
        for _ in range(200):
            names = {inode.name for inode in await gmem.list_guest_memfds()}
            owners = [claim.owner for claim in await allocator.list_reservations()]
            if sorted(owners) == sorted(names):
                return
            await asyncio.sleep(0.1)
        raise AssertionError(f"reserved {owners}, there are {names}")


async def clean(host: Host) -> None:
    async with GuestMemfdClient(host.target("guest_memfd")) as gmem:
        for inode in await gmem.list_guest_memfds():
            if inode.file_open:
                await gmem.delete_guest_memfd(name=inode.name)


@pytest.mark.parametrize("service", ["host_allocator", "guest_memfd"])
async def test_a_service_killed_at_work_goes_on_where_it_was(
    own_host: Host, service: str
) -> None:
    host, chance = own_host, random.Random(SEED)
    async with HostAllocatorClient(host.target("host_allocator")) as allocator:
        before = await counters(allocator)

    async def disturb() -> None:
        for _ in range(3):
            await asyncio.sleep(chance.uniform(0.2, 0.6))
            await restart(host, service)

    churn = await churn_under(host, disturb)
    assert churn.done > 20
    # Killed between two steps of an operation, that operation may be refused; what
    # was repeated meanwhile was not.
    print(f"{service}: {churn.done} operations, refused: {churn.refused}")
    await no_orphans(host)
    await agreed(host)
    await clean(host)
    async with HostAllocatorClient(host.target("host_allocator")) as allocator:
        assert await counters(allocator) == before


async def test_a_reply_survives_the_service_that_gave_it(own_host: Host) -> None:
    host = own_host
    async with (
        HostAllocatorClient(host.target("host_allocator"), patience=LONG) as allocator,
        GuestMemfdClient(host.target("guest_memfd"), patience=LONG) as gmem,
    ):
        first = allocator.new_request_id()
        handle = await allocator.reserve(
            page_size=SIZE_2M, num_pages=1, request_id=first
        )
        second = gmem.new_request_id()
        made = await gmem.create_guest_memfd(
            size=SIZE_2M, page_size=SIZE_2M, request_id=second
        )
        await restart(host, "host_allocator")
        await restart(host, "guest_memfd")
        again = await allocator.reserve(
            page_size=SIZE_2M, num_pages=1, request_id=first
        )
        assert again == handle
        same = await gmem.create_guest_memfd(
            size=SIZE_2M, page_size=SIZE_2M, request_id=second
        )
        assert same == made
        with pytest.raises(KernelError) as caught:
            await gmem.create_guest_memfd(
                size=2 * SIZE_2M, page_size=SIZE_2M, request_id=second
            )
        assert caught.value.reason is Reason.REQUEST_ID_REUSED
        await allocator.unreserve(handle=handle)


def test_a_vmm_comes_back_with_its_vms_and_their_guests_gone() -> None:
    with running_host(nr_vmms=1) as host:
        asyncio.run(_kill_a_vmm(host))


async def set_slots(vmm: VmmClient, vm: str, name: str, done: list[int]) -> None:
    """Make memslots of eight pages, four of them private, and note each."""
    for slot in range(64):
        await vmm.set_user_memory_region2(
            vm=vm,
            slot=slot,
            flags=KVM_MEM_GUEST_MEMFD,
            guest_phys_addr=slot * 8 * PAGE_SIZE,
            memory_size=8 * PAGE_SIZE,
            guest_memfd=name,
            guest_memfd_offset=slot * 8 * PAGE_SIZE,
        )
        await vmm.set_memory_attributes(
            vm=vm,
            address=slot * 8 * PAGE_SIZE,
            size=4 * PAGE_SIZE,
            attributes=8,
        )
        done.append(slot)


async def _kill_a_vmm(host: Host) -> None:
    chance = random.Random(SEED)
    async with (
        VmmClient(host.target("vmm-0"), patience=LONG) as vmm,
        HostAllocatorClient(host.target("host_allocator")) as allocator,
        GuestMemfdClient(host.target("guest_memfd")) as gmem,
    ):
        before = await counters(allocator)
        request_id = vmm.new_request_id()
        vm = await vmm.create_vm(
            vm_id="a", type=vmm_pb.VM_TYPE_SW_PROTECTED, request_id=request_id
        )
        name = await vmm.create_guest_memfd(vm=vm.name, size=SIZE_2M, flags=0)

        done: list[int] = []
        working = asyncio.create_task(set_slots(vmm, vm.name, name, done))
        await asyncio.sleep(chance.uniform(0.05, 0.2))
        await restart(host, "vmm-0")
        with contextlib.suppress(KernelError):
            await working

        # The reply is the same, and the VM is there; its guest is not.
        again = await vmm.create_vm(
            vm_id="a", type=vmm_pb.VM_TYPE_SW_PROTECTED, request_id=request_id
        )
        assert again == vm
        found = await vmm.get_vm(vm.name)
        assert not found.guest_alive
        runs = await vmm.get_memory_attributes(
            vm=vm.name, address=0, size=len(done) * 8 * PAGE_SIZE
        )
        private = [run.address // (8 * PAGE_SIZE) for run in runs if run.attributes]
        assert private == done

        async def same_slots() -> bool:
            inode = await gmem.get_guest_memfd(name)
            slots = {slot.slot for slot in found.memslots}
            return {binding.slot for binding in inode.bindings} == slots

        await until(same_slots, "the end of a binding that no memslot has")
        await vmm.delete_vm(name=vm.name)
        assert not (await gmem.get_guest_memfd(name)).bindings
        await gmem.delete_guest_memfd(name=name)
        assert await counters(allocator) == before
