"""A VM whose conversion waits, and one whose memory is faulted in before it runs."""

from __future__ import annotations

import asyncio

import pytest

from gmem.client import GuestMemfdClient
from gmem.client.errors import Contended, NoSuchObject, Reason
from gmem.client.program import fill, halt, verify
from gmem.uapi.pages import PAGE_SIZE, SIZE_2M
from tests.cluster.test_vmm import GPA, HUGE_2M, PRIVATE, booted, module_host
from tests.support.hosts import Host

__all__ = ["module_host"]
pytestmark = pytest.mark.fuse

SIZE = 2 * SIZE_2M


async def test_the_guest_runs_on_while_its_conversion_waits(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    async with booted(clean_host, gmem, size=SIZE, flags=HUGE_2M) as machine:
        hold = await gmem.pin_pages(
            name=machine.inode.name, offset=0, size=PAGE_SIZE, holder="nic"
        )
        with pytest.raises(Contended) as caught:
            await machine.client.set_memory_attributes(
                vm=machine.vm, address=GPA, size=SIZE, attributes=PRIVATE, wait_ms=200
            )
        assert caught.value.reason is Reason.DEADLINE
        assert caught.value.numbers["holders"] == "nic"

        convert = asyncio.create_task(
            machine.client.set_memory_attributes(
                vm=machine.vm,
                address=GPA,
                size=SIZE,
                attributes=PRIVATE,
                wait_ms=30_000,
            )
        )
        await asyncio.sleep(0.3)
        await machine.run(
            fill(GPA + SIZE_2M, PAGE_SIZE, 7),
            verify(GPA + SIZE_2M, PAGE_SIZE, 7),
            halt(),
        )
        assert not convert.done()
        await gmem.unpin_pages(hold=hold)
        await convert
        assert (await machine.inode.get()).shared_pages == 0


async def test_memory_is_mapped_before_the_guest_runs(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    async with booted(clean_host, gmem, size=SIZE, flags=HUGE_2M) as machine:
        await machine.convert(0, SIZE, private=True)
        client, vm = machine.client, machine.vm
        left = await client.pre_fault_memory(vm=vm, vcpu=0, gpa=GPA, size=SIZE)
        assert (left.gpa, left.size) == (GPA + SIZE, 0)
        assert sum(await machine.levels()) >= 2
        assert (await machine.inode.get()).whole_folios == 2
        await machine.run(verify(GPA, PAGE_SIZE, 0), halt())

        left = await client.pre_fault_memory(
            vm=vm, vcpu=0, gpa=GPA + SIZE - PAGE_SIZE, size=2 * PAGE_SIZE
        )
        assert (left.gpa, left.size) == (GPA + SIZE, PAGE_SIZE)
        with pytest.raises(NoSuchObject) as caught:
            await client.pre_fault_memory(vm=vm, vcpu=0, gpa=left.gpa, size=left.size)
        assert caught.value.reason is Reason.GPA_OUTSIDE_MEMSLOTS
