"""HugeTLB cgroups of whole hosts: what is charged, and what a limit refuses."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from gmem.client import GuestMemfdClient, HostAllocatorClient, VmmClient
from gmem.client.host_allocator import NO_LIMIT
from gmem.uapi.errors import Reason
from gmem.uapi.flags import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    GUEST_MEMFD_FLAG_SUPPORT_SHARED,
    GUESTMEM_HUGE_SHIFT,
    KVM_GUEST_MEMFD_HUGE_SHIFT,
    KVM_GUEST_MEMFD_HUGETLB,
    RFC_V2_HUGE_PAGES,
)
from gmem.uapi.lineage import Lineage
from gmem.uapi.pages import PAGE_SIZE, SIZE_1G, SIZE_2M
from tests.cluster.test_recovery import restart
from tests.support.gmemctl import Gmemctl, gmemctl
from tests.support.hosts import (
    SIGBUS,
    VM,
    Host,
    new_inode,
    refused,
    running_host,
    until,
)
from tests.support.requirements import require_fuse, require_root

pytestmark = pytest.mark.fuse

KEEP = FALLOC_FL_KEEP_SIZE
PUNCH = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE


@pytest.fixture(scope="module")
def module_host() -> Iterator[Host]:
    with running_host(nr_vmms=1) as host:
        yield host


def flags_of(lineage: Lineage, page_size: int) -> int:
    log = page_size.bit_length() - 1
    if lineage is Lineage.RFC_V1:
        return KVM_GUEST_MEMFD_HUGETLB | log << KVM_GUEST_MEMFD_HUGE_SHIFT
    shared = GUEST_MEMFD_FLAG_SUPPORT_SHARED
    return shared | RFC_V2_HUGE_PAGES | log << GUESTMEM_HUGE_SHIFT


async def charges(
    allocator: HostAllocatorClient, name: str, page_size: int
) -> tuple[int, int]:
    """Usage and rsvd, in pages."""
    counters = {c.page_size: c for c in (await allocator.get_cgroup(name)).counters}
    found = counters[page_size]
    return found.current // page_size, found.rsvd_current // page_size


@pytest.mark.parametrize("page_size", [SIZE_2M, SIZE_1G], ids=["2M", "1G"])
@pytest.mark.parametrize("lineage", [Lineage.RFC_V1, Lineage.RFC_V2])
async def test_the_rows_of_the_reporting_test_for_a_cgroup(
    clean_host: Host,
    gmem: GuestMemfdClient,
    allocator: HostAllocatorClient,
    lineage: Lineage,
    page_size: int,
) -> None:
    """C045: G0 to G4. RFC_V1 charges usage alone."""
    rsvd = lineage is not Lineage.RFC_V1
    await allocator.create_cgroup("/tenant")
    await allocator.create_cgroup("/tenant/vm")

    async def expect(f: int, r: int) -> None:
        for name in ("/tenant/vm", "/tenant"):
            found = await charges(allocator, name, page_size)
            assert found == (f, r if rsvd else 0), name

    async with VmmClient(clean_host.target("vmm-0")) as client:
        vm = await client.create_vm(
            vm_id="charged", lineage=lineage.value, cgroup="/tenant/vm"
        )
        assert vm.cgroup == "/tenant/vm"
        await expect(0, 0)
        name = await client.create_guest_memfd(
            vm=vm.name, size=page_size, flags=flags_of(lineage, page_size)
        )
        await expect(0, 1)
        assert (await gmem.get_guest_memfd(name)).cgroup == "/tenant/vm"
        await gmem.fallocate(name=name, mode=KEEP, offset=0, length=page_size)
        await expect(1, 1)
        await gmem.fallocate(name=name, mode=PUNCH, offset=0, length=page_size)
        await expect(0, 1)
        await client.delete_vm(name=vm.name)
        await gmem.delete_guest_memfd(name=name)

        async def nothing() -> bool:
            return await charges(allocator, "/tenant/vm", page_size) == (0, 0)

        await until(nothing, "the end of the charges")
        await expect(0, 0)
    for cgroup in ("/tenant/vm", "/tenant"):
        await allocator.delete_cgroup(cgroup)


async def test_limits_refuse_files_folios_and_faults(
    clean_host: Host, gmem: GuestMemfdClient, allocator: HostAllocatorClient
) -> None:
    await allocator.create_cgroup("/small")
    await allocator.update_cgroup(
        "/small", page_size=SIZE_2M, max=SIZE_2M, rsvd_max=2 * SIZE_2M
    )
    with refused(Reason.CGROUP_LIMIT, "rsvd.max of cgroup /small") as caught:
        await gmem.create_guest_memfd(
            size=3 * SIZE_2M, page_size=SIZE_2M, lineage="RFC_V2", cgroup="/small"
        )
    assert str(caught[0]).startswith("ENOMEM")
    # RFC_V1 does not charge the reservation: it finds out when it allocates.
    inode = await new_inode(clean_host, gmem, pages=3, cgroup="/small")
    client = await inode.mapped_by()
    await client.asked("raw_store", 0, 1)
    with refused(Reason.CGROUP_LIMIT, "2MB.max of cgroup /small"):
        await inode.fallocate(KEEP, 0, 2 * SIZE_2M)
    with refused(Reason.CGROUP_LIMIT):
        await gmem.get_pfn(name=inode.name, vm=VM, slot=0, gfn=512)
    assert await asyncio.to_thread(client.dies_of, "raw_load", SIZE_2M) == SIGBUS
    await allocator.update_cgroup("/small", page_size=SIZE_2M, max=NO_LIMIT)
    another = await inode.mapped_by("another")
    assert await another.asked("raw_load", SIZE_2M) == 0
    counters = (await allocator.get_cgroup("/small")).counters[0]
    assert counters.events_max >= 4
    assert counters.max_usage == 2 * SIZE_2M
    await allocator.delete_cgroup("/small")
    # Its parent pays now, and is paid back.
    assert (await charges(allocator, "/", SIZE_2M))[0] >= 2


async def test_a_dead_inode_is_charged_until_its_last_folio_is_back(
    clean_host: Host, gmem: GuestMemfdClient, allocator: HostAllocatorClient
) -> None:
    await allocator.create_cgroup("/dead")
    made = await gmem.create_guest_memfd(
        size=2 * SIZE_2M,
        page_size=SIZE_2M,
        lineage="RFC_V2",
        support_shared=True,
        cgroup="/dead",
    )
    hold = await gmem.pin_pages(
        name=made.name, offset=0, size=PAGE_SIZE, holder="device"
    )
    await gmem.delete_guest_memfd(name=made.name)

    async def is_gone() -> bool:
        return made.name not in {i.name for i in await gmem.list_guest_memfds()}

    await until(is_gone, "the end of the inode")
    assert await charges(allocator, "/dead", SIZE_2M) == (1, 2)
    await gmem.unpin_pages(hold=hold)

    async def is_free() -> bool:
        return await charges(allocator, "/dead", SIZE_2M) == (0, 0)

    await until(is_free, "the end of the charges")
    await allocator.delete_cgroup("/dead")


async def test_charges_outlive_every_service(own_host: Host) -> None:
    host = own_host
    async with host.clients() as (allocator, gmem):
        await allocator.create_cgroup("/kept")
        await allocator.update_cgroup("/kept", page_size=SIZE_2M, max=SIZE_2M)
        inode = await new_inode(host, gmem, pages=2, cgroup="/kept")
        await inode.fallocate(KEEP, 0, SIZE_2M)
        before = await allocator.get_cgroup("/kept")
    for service in ("host_allocator", "guest_memfd"):
        await restart(host, service)
    async with host.clients() as (allocator, gmem):
        assert await allocator.get_cgroup("/kept") == before
        assert (await gmem.get_guest_memfd(inode.name)).cgroup == "/kept"
        with refused(Reason.CGROUP_LIMIT):
            await gmem.fallocate(
                name=inode.name, mode=KEEP, offset=SIZE_2M, length=SIZE_2M
            )
        await gmem.delete_guest_memfd(name=inode.name)

        async def is_free() -> bool:
            return await charges(allocator, "/kept", SIZE_2M) == (0, 0)

        await until(is_free, "the end of the charges")


@pytest.fixture
def ctl() -> Iterator[Gmemctl]:
    require_fuse()
    require_root()
    with gmemctl() as made:
        up = made("up", "--nodes", "1", "--memory", "4G", "--pool", "2M:8")
        assert up.status == 0, up.err
        yield made


def test_gmemctl_shows_and_sets_cgroups_and_memory_errors(ctl: Gmemctl) -> None:
    assert ctl("cgroup", "create", "/a").status == 0
    written = ctl(
        "cgroup", "set", "/a", "hugetlb.2MB.max=4M", "hugetlb.1GB.rsvd.max=1G"
    )
    assert written.status == 0, written.err
    files = ctl("cgroup", "show", "/a", "--json").json["files"]
    assert files["hugetlb.2MB.max"] == files["hugetlb.2MB.limit_in_bytes"] == 4 << 20
    assert files["hugetlb.1GB.rsvd.limit_in_bytes"] == SIZE_1G
    assert files["hugetlb.2MB.rsvd.max"] == "max"
    assert files["hugetlb.2MB.rsvd.limit_in_bytes"] == (1 << 63) - SIZE_2M
    assert "hugetlb.2MB.events max 0\n" in ctl("cgroup", "show", "/a").out
    assert "/a" in ctl("cgroup", "ls").out
    refusal = ctl("cgroup", "set", "/", "hugetlb.2MB.max=4M")
    assert (refusal.status, "EBUSY (state_wrong)" in refusal.err) == (1, True)

    async def create() -> str:
        async with GuestMemfdClient(f"unix:{ctl.base}/local/guest_memfd.sock") as gmem:
            made = await gmem.create_guest_memfd(size=SIZE_2M, page_size=SIZE_2M)
            await gmem.fallocate(name=made.name, mode=KEEP, offset=0, length=SIZE_2M)
        return made.name

    name = asyncio.run(create())
    done = ctl("inode", "poison", "1", "0x5000")
    assert done.status == 0, done.err
    assert f"{name} lost 2M at 0x0; memory_failure() is EBUSY" in done.out
    assert "memory errors at 0x5000" in ctl("inode", "show", "1").out
    assert "HardwareCorrupted:     4 kB" in ctl("meminfo").out
    assert "hwpoison" in ctl("page-types").out
    (frame,) = ctl("frame", "errors", "--json").json["frames"]
    again = ctl("frame", "poison", hex(frame["pfn"]))
    assert (again.status, "EHWPOISON (page_poisoned)" in again.err) == (1, True)
    assert ctl("inode", "unpoison", "1", "0x5000").status == 0
    assert ctl("frame", "errors", "--json").json == {"frames": []}
    other = hex(frame["pfn"] + 1)
    assert ctl("frame", "poison", other).status == 0
    assert ctl("frame", "unpoison", other).status == 0
    assert ctl("cgroup", "delete", "/a").status == 0
