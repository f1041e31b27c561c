"""Who waits for a VMM that is silent, slow or dead, and who does not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gmem.client import GuestMemfdClient
from gmem.uapi.flags import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from gmem.uapi.lineage import Lineage
from gmem.uapi.pages import PAGE_SIZE, SIZE_2M
from tests.support.hosts import VM, FakeVmm, Host, Inode, new_inode
from tests.support.wire import serve_vmm

pytestmark = pytest.mark.fuse

PUNCH = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
UNIT = SIZE_2M // PAGE_SIZE
# Several times what a step takes on a busy machine, less than the VMM's lease.
SOON_SECONDS = 3.0


class Vmm(FakeVmm):
    """A fake VMM with the address it is reached at."""

    target: str


@pytest.fixture
async def vmm(tmp_path: Path) -> AsyncIterator[Vmm]:
    fake = Vmm()
    async with serve_vmm(fake, tmp_path) as runtime:
        fake.target = runtime.target
        yield fake
        fake.may_answer.set()


async def handed_out(
    host: Host, gmem: GuestMemfdClient, vmm_target: str, pages: int = 2
) -> Inode:
    """Return an inode whose first page a guest has."""
    inode = await new_inode(host, gmem, pages=pages, vmm_target=vmm_target)
    await gmem.get_pfn(name=inode.name, vm=VM, slot=0, gfn=0)
    return inode


async def test_only_what_a_vm_was_handed_is_told_and_only_once(
    clean_host: Host, gmem: GuestMemfdClient, vmm: Vmm
) -> None:
    inode = await handed_out(clean_host, gmem, vmm.target, pages=4)
    await gmem.get_pfn(name=inode.name, vm=VM, slot=0, gfn=2 * UNIT + 7)
    await inode.fallocate(PUNCH, SIZE_2M, 2 * SIZE_2M)
    told = [("begin", 2 * UNIT + 7, 1), ("end", 2 * UNIT + 7, 1)]
    assert vmm.told == told
    await inode.fallocate(PUNCH, SIZE_2M, 2 * SIZE_2M)
    assert vmm.told == told
    await gmem.delete_guest_memfd(name=inode.name)
    assert vmm.told == [*told, ("begin", 0, 1), ("end", 0, 1)]


async def test_one_inode_waits_for_a_silent_vmm_and_the_other_does_not(
    clean_host: Host, gmem: GuestMemfdClient, vmm: Vmm
) -> None:
    slow = await handed_out(clean_host, gmem, vmm.target)
    other = await handed_out(clean_host, gmem, vmm.target)
    vmm.may_answer.clear()
    punch = asyncio.create_task(slow.fallocate(PUNCH, 0, SIZE_2M))
    await asyncio.wait_for(vmm.asked.wait(), SOON_SECONDS)
    behind = asyncio.create_task(slow.convert(SIZE_2M, SIZE_2M, private=True))

    # Two at once: this inode's conversions go on, also for a client that touches it.
    async with asyncio.timeout(SOON_SECONDS):
        await other.convert(0, SIZE_2M, private=True)
        await other.convert(0, SIZE_2M, private=False)
        client = await other.mapped_by()
        assert await client.asked("raw_load", 0) == 0
    state = await slow.get()
    assert (punch.done(), behind.done()) == (False, False)
    assert state.private_pages == 0

    vmm.may_answer.set()
    async with asyncio.timeout(SOON_SECONDS):
        await asyncio.gather(punch, behind)
    assert (await slow.get()).private_pages == UNIT


async def test_a_fault_parked_for_2_s_while_the_vmm_answers_succeeds(
    clean_host: Host, gmem: GuestMemfdClient, vmm: Vmm
) -> None:
    inode = await handed_out(clean_host, gmem, vmm.target)
    client = await inode.mapped_by()
    vmm.may_answer.clear()
    punch = asyncio.create_task(inode.fallocate(PUNCH, 0, SIZE_2M))
    await asyncio.wait_for(vmm.asked.wait(), SOON_SECONDS)

    # A hole: its folio is allocated under the lock that the punch holds.
    started = time.monotonic()
    fault = asyncio.create_task(client.asked("raw_load", SIZE_2M))
    await asyncio.sleep(2.0)
    assert not fault.done()
    assert not punch.done()
    vmm.may_answer.set()
    assert await asyncio.wait_for(fault, SOON_SECONDS) == 0
    assert time.monotonic() - started >= 2.0
    await punch
    # The process lives, and its page is there.
    await client.asked("raw_store", SIZE_2M, 5)
    assert await client.asked("raw_load", SIZE_2M) == 5


async def test_a_client_killed_with_a_parked_fault_a_pin_and_a_mapping_is_gone_at_once(
    clean_host: Host, gmem: GuestMemfdClient, vmm: Vmm
) -> None:
    inode = await handed_out(clean_host, gmem, vmm.target)
    device = await inode.mapped_by("device", "life-1")
    await device.asked("raw_store", 0, 1)
    async with clean_host.clients("device", "life-1") as (_, its):
        await its.pin_pages(name=inode.name, offset=0, size=PAGE_SIZE, holder="ring")
    vmm.may_answer.clear()
    punch = asyncio.create_task(inode.fallocate(PUNCH, 0, PAGE_SIZE))
    await asyncio.wait_for(vmm.asked.wait(), SOON_SECONDS)
    device.tell("raw_load", SIZE_2M)
    await asyncio.sleep(0.3)

    started = time.monotonic()
    await asyncio.to_thread(device.kill)
    assert time.monotonic() - started < 1.0
    vmm.may_answer.set()
    await punch
    async with asyncio.timeout(SOON_SECONDS):
        while (state := await inode.get()).holds or state.host_views_open:
            await asyncio.sleep(0.02)
    await inode.convert(0, inode.size, private=True)


async def test_a_dead_vmm_counts_as_acknowledged(
    clean_host: Host, gmem: GuestMemfdClient, tmp_path: Path
) -> None:
    inode = await handed_out(clean_host, gmem, f"unix:{tmp_path}/nobody.sock")
    async with asyncio.timeout(SOON_SECONDS):
        await inode.fallocate(PUNCH, 0, SIZE_2M)
    assert (await inode.get()).st_blocks == 0
    events = [line["event"] for line in clean_host.log("guest_memfd")]
    assert "vmm_counts_as_acknowledged" in events


async def test_a_silent_vmm_is_fenced_after_its_lease(
    clean_host: Host, gmem: GuestMemfdClient, vmm: Vmm
) -> None:
    inode = await handed_out(clean_host, gmem, vmm.target)
    vmm.may_answer.clear()
    started = time.monotonic()
    await inode.fallocate(PUNCH, 0, SIZE_2M)
    assert 4.0 < time.monotonic() - started < 8.0
    assert (await inode.get()).st_blocks == 0


async def test_a_caller_that_goes_away_stops_nothing_half_way(
    clean_host: Host, gmem: GuestMemfdClient, vmm: Vmm
) -> None:
    inode = await handed_out(clean_host, gmem, vmm.target)
    vmm.may_answer.clear()
    punch = asyncio.create_task(inode.fallocate(PUNCH, 0, SIZE_2M))
    await asyncio.wait_for(vmm.asked.wait(), SOON_SECONDS)
    punch.cancel()
    await asyncio.sleep(0.2)
    assert (await inode.get()).st_blocks == SIZE_2M // 512
    vmm.may_answer.set()
    async with asyncio.timeout(SOON_SECONDS):
        while (await inode.get()).st_blocks:
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("lineage", Lineage)
async def test_a_guest_fault_is_served_while_its_page_is_punched_in_rfc_v1_alone(
    clean_host: Host, gmem: GuestMemfdClient, vmm: Vmm, lineage: Lineage
) -> None:
    """The race of the first series: get_pfn takes no lock there, and others wait."""
    size = 4 * PAGE_SIZE
    made = await gmem.create_guest_memfd(
        size=size, page_size=PAGE_SIZE, lineage=lineage.value, vm=VM
    )
    inode = Inode(clean_host, gmem, made.name, size)
    await gmem.bind_memslot(
        name=inode.name,
        vm=VM,
        slot=0,
        base_gfn=0,
        offset=0,
        size=size,
        vmm_target=vmm.target,
    )
    first = await gmem.get_pfn(name=inode.name, vm=VM, slot=0, gfn=1)
    vmm.may_answer.clear()
    punch = asyncio.create_task(inode.fallocate(PUNCH, 0, size))
    await asyncio.wait_for(vmm.asked.wait(), SOON_SECONDS)

    fault = asyncio.create_task(gmem.get_pfn(name=inode.name, vm=VM, slot=0, gfn=1))
    served, _ = await asyncio.wait({fault}, timeout=1.0)
    assert not punch.done()
    assert bool(served) is (lineage is Lineage.RFC_V1)
    if served:
        # The very frame that is being truncated.
        assert fault.result().pfn == first.pfn

    vmm.may_answer.set()
    async with asyncio.timeout(SOON_SECONDS):
        await asyncio.gather(punch, fault)
    # Nobody keeps it: its VM was told of what it was handed meanwhile.
    begun = [told for told in vmm.told if told[0] == "begin"]
    assert len(begun) == (2 if served else 1)
    assert bool((await inode.get()).whole_folios) is not bool(served)
