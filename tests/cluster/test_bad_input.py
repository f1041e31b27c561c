"""Bad input to a whole host: the right errno, a sentence that helps, nothing moved.

The contract suites go through every row of each service's tables. Here the calls go
through all services at once, as a VMM makes them, and the state of all of them is
compared.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from google.protobuf.message import Message

from gmem.api.guest_memfd.v1 import guest_memfd_pb2
from gmem.api.host_allocator.v1 import host_allocator_pb2
from gmem.api.vmm.v1 import vmm_pb2
from gmem.client import GuestMemfdClient, HostAllocatorClient, VmmClient
from gmem.client.base import ServiceClient
from gmem.client.connection import Patience
from gmem.uapi.errors import Reason, TransportError
from gmem.uapi.flags import KVM_MEM_GUEST_MEMFD
from gmem.uapi.pages import PAGE_SIZE, SIZE_1G, SIZE_2M
from tests.support.hosts import (
    Host,
    Program,
    changes,
    counters,
    refused,
    running_host,
)

pytestmark = pytest.mark.fuse

R = Reason
PAGE = PAGE_SIZE
GPA = 4 * SIZE_1G
PRIVATE = 8
HUGE_2M, HUGE_1G = 2 | 21 << 26, 2 | 30 << 26
BEYOND = 1 << 63
MESSAGES = {
    "vmm": vmm_pb2,
    "gmem": guest_memfd_pb2,
    "allocator": host_allocator_pb2,
}


@dataclass(frozen=True)
class Bad:
    """A call whose `body` differs from a right one; "@vm" and so on are names."""

    what: str
    service: str
    rpc: str
    body: dict[str, Any]
    reason: Reason
    errno: str
    words: str


@dataclass
class Whole:
    """The clients of a host with one VM: 4M from GPA in slot 0, page 3 pinned."""

    clients: dict[str, ServiceClient]
    names: dict[str, str]

    async def call(self, bad: Bad) -> Any:
        client = self.clients[bad.service]
        right = RIGHT.get(bad.rpc, {})
        body = {
            key: self.names[value[1:]] if str(value).startswith("@") else value
            for key, value in (right | bad.body).items()
        }
        request = getattr(MESSAGES[bad.service], f"{bad.rpc}Request")(**body)
        method = getattr(client._stub, bad.rpc)  # type: ignore[attr-defined]
        return await client.connection.mutate(method, request)

    async def state(self) -> list[Message]:
        vmm, gmem = self.clients["vmm"], self.clients["gmem"]
        allocator = self.clients["allocator"]
        assert isinstance(vmm, VmmClient)
        assert isinstance(gmem, GuestMemfdClient)
        assert isinstance(allocator, HostAllocatorClient)
        attributes = await vmm.get_memory_attributes(
            vm=self.names["vm"], address=GPA, size=2 * SIZE_2M
        )
        reservations = await allocator.list_reservations()
        vm = await vmm.get_vm(self.names["vm"])
        # A refused conversion has told the guest to look again: that is counted.
        vm.ClearField("mmu_invalidate_seq")
        inodes = await gmem.list_guest_memfds()
        for inode in inodes:
            # Memory that Python keeps for more runs.
            inode.ClearField("fragment_bytes")
        return [
            *(vm, *attributes),
            *inodes,
            *(await counters(allocator), *reservations),
        ]


RIGHT: dict[str, dict[str, Any]] = {
    "CreateGuestMemfd": {"vm": "@vm", "size": SIZE_2M, "flags": HUGE_2M},
    "SetUserMemoryRegion2": {
        "vm": "@vm",
        "slot": 1,
        "flags": KVM_MEM_GUEST_MEMFD,
        "guest_phys_addr": 0,
        "memory_size": SIZE_2M,
        "guest_memfd": "@spare",
    },
    "SetMemoryAttributes": {
        "vm": "@vm",
        "address": GPA,
        "size": PAGE,
        "attributes": PRIVATE,
    },
    "PopulateMemory": {
        "vm": "@vm",
        "address": GPA + SIZE_2M,
        "size": PAGE,
        "descriptor": "@given",
    },
    "Fallocate": {"name": "@file", "mode": 1, "offset": 0, "length": PAGE},
    "Reserve": {"page_size": SIZE_2M, "num_pages": 1},
    "UpdatePool": {"page_size": SIZE_2M, "nr_huge_pages": 9},
    "Allocate": {"handle": 1, "page_size": SIZE_2M},
}

FILE, SLOT = "CreateGuestMemfd", "SetUserMemoryRegion2"
CONVERT, POPULATE = "SetMemoryAttributes", "PopulateMemory"
ROWS: list[tuple[str, str, str, dict[str, Any], Reason, str, str]] = [
    # Files.
    ("size 0", "vmm", FILE, {"size": 0}, R.SIZE_INVALID, "EINVAL", "positive"),
    ("negative", "vmm", FILE, {"size": -PAGE}, R.SIZE_INVALID, "EINVAL", "-4096"),
    ("odd", "vmm", FILE, {"size": SIZE_2M + 1}, R.SIZE_INVALID, "EINVAL", "2097152"),
    ("flag", "vmm", FILE, {"flags": 1 << 40}, R.FLAG_UNKNOWN, "EINVAL", "0x"),
    (
        *("bits alone", "vmm", FILE, {"flags": 21 << 26}),
        *(R.FLAG_COMBINATION, "EINVAL", "set|flag"),
    ),
    (
        *("16G pages", "vmm", FILE, {"flags": 2 | 34 << 26}),
        *(R.PAGE_SIZE_UNKNOWN, "EINVAL", "17179869184|16G|34"),
    ),
    (
        *("empty pool", "vmm", FILE, {"flags": HUGE_1G, "size": 4 * SIZE_1G}),
        *(R.POOL_EMPTY, "ENOMEM", "4.*(grow|free)"),
    ),
    ("no vm", "vmm", FILE, {"vm": "@no"}, R.VM_UNKNOWN, "ENOENT", "create|never"),
    # Memslots.
    ("flag", "vmm", SLOT, {"flags": 1 << 31}, R.FLAG_UNKNOWN, "EINVAL", "0x"),
    ("log", "vmm", SLOT, {"flags": 5}, R.FLAG_COMBINATION, "EINVAL", "LOG|log"),
    (
        *("unaligned", "vmm", SLOT, {"guest_phys_addr": 1}),
        *(R.RANGE_UNALIGNED, "EINVAL", "4096|align"),
    ),
    (
        *("2^63", "vmm", SLOT, {"guest_phys_addr": BEYOND, "memory_size": BEYOND}),
        *(R.RANGE_WRAPS, "EINVAL", "shorten|wraps|beyond"),
    ),
    (
        *("overlap", "vmm", SLOT, {"guest_phys_addr": GPA + SIZE_2M}),
        *(R.MEMSLOT_OVERLAP, "EEXIST", "slot 0"),
    ),
    (
        *("pages of slot 0", "vmm", SLOT, {"guest_memfd": "@file"}),
        *(R.BINDING_OVERLAP, "EINVAL", "slot 0.*unbind"),
    ),
    (
        *("past the end", "vmm", SLOT, {"memory_size": 2 * SIZE_2M}),
        *(R.RANGE_PAST_END, "EINVAL", "past the end"),
    ),
    (
        *("another VM's", "vmm", SLOT, {"guest_memfd": "@foreign"}),
        *(R.BINDING_FOREIGN_VM, "EINVAL", "create one for this VM"),
    ),
    (
        *("a descriptor", "vmm", SLOT, {"guest_memfd": "descriptors/1"}),
        *(R.DESCRIPTOR_TYPE, "EINVAL", "is no guest_memfd"),
    ),
    (
        *("no file", "vmm", SLOT, {"guest_memfd": "@no"}),
        *(R.FD_UNKNOWN, "EBADF", "guest_memfd"),
    ),
    (
        *("nothing to delete", "vmm", SLOT, {"memory_size": 0, "slot": 7}),
        *(R.MEMSLOT_UNKNOWN, "EINVAL", "7"),
    ),
    # Conversions.
    ("flags", "vmm", CONVERT, {"flags": 1}, R.FLAG_UNKNOWN, "EINVAL", "send 0|0"),
    (
        *("attribute", "vmm", CONVERT, {"attributes": 1}),
        *(R.ATTRIBUTE_UNSUPPORTED, "EINVAL", "0x1|1"),
    ),
    ("size 0", "vmm", CONVERT, {"size": 0}, R.RANGE_EMPTY, "EINVAL", "size"),
    ("odd", "vmm", CONVERT, {"size": 100}, R.RANGE_UNALIGNED, "EINVAL", "4096"),
    (
        *("2^63", "vmm", CONVERT, {"address": BEYOND, "size": BEYOND}),
        *(R.RANGE_WRAPS, "EINVAL", "0x"),
    ),
    (
        *("2^64", "vmm", CONVERT, {"address": (1 << 64) - PAGE}),
        *(R.RANGE_WRAPS, "EINVAL", "0x"),
    ),
    (
        *("pinned", "vmm", CONVERT, {"size": SIZE_2M}),
        *(R.PAGE_IN_USE, "EINVAL", "0x3000.*device"),
    ),
    # Launch-time content.
    (
        *("nowhere", "vmm", POPULATE, {"address": 0}),
        *(R.GPA_OUTSIDE_MEMSLOTS, "ENOENT", "memslot"),
    ),
    (
        *("shared", "vmm", POPULATE, {"address": GPA}),
        *(R.PAGE_NOT_FAULTABLE, "EACCES", "convert it first"),
    ),
    (
        *("no source", "vmm", POPULATE, {"descriptor": "@no"}),
        *(R.DESCRIPTOR_UNKNOWN, "ENOENT", "give it again"),
    ),
    (
        *("short source", "vmm", POPULATE, {"source_offset": 1 << 20}),
        *(R.PAGE_UNREADABLE, "EFAULT", "give a longer one"),
    ),
    (
        *("source at 2^63", "vmm", POPULATE, {"source_offset": BEYOND}),
        *(R.RANGE_WRAPS, "EINVAL", "shorten it"),
    ),
    # The file itself.
    ("mode", "gmem", "Fallocate", {"mode": 0}, R.MODE_UNSUPPORTED, "EOPN", "KEEP"),
    (
        *("negative", "gmem", "Fallocate", {"offset": -PAGE}),
        *(R.RANGE_NEGATIVE, "EINVAL", "-4096"),
    ),
    (
        *("2^63", "gmem", "Fallocate", {"offset": BEYOND - PAGE}),
        *(R.RANGE_WRAPS, "EINVAL", "shorten it"),
    ),
    # Pools.
    (
        *("none", "allocator", "Reserve", {"num_pages": 0}),
        *(R.SIZE_INVALID, "EINVAL", "1 or more"),
    ),
    (
        *("2^63", "allocator", "Reserve", {"num_pages": BEYOND}),
        *(R.POOL_EMPTY, "ENOMEM", "grow|free"),
    ),
    (
        *("8K pages", "allocator", "Reserve", {"page_size": 8192}),
        *(R.PAGE_SIZE_UNKNOWN, "EINVAL", "8192|8K"),
    ),
    (
        *("node 9", "allocator", "UpdatePool", {"node": 9}),
        *(R.NODE_UNKNOWN, "EINVAL", "9"),
    ),
    (
        *("no handle", "allocator", "Allocate", {}),
        *(R.HANDLE_UNKNOWN, "ENOENT", "reserve|never"),
    ),
]
BAD = [Bad(*row) for row in ROWS]


@pytest.fixture(scope="module")
def vmm_host() -> Iterator[Host]:
    with running_host(nr_vmms=1) as host:
        yield host


@pytest.fixture(scope="module")
def names(vmm_host: Host) -> dict[str, str]:
    """The scene, which no refused call changes."""
    program = vmm_host.program("device")
    return asyncio.run(_scene(vmm_host, program))


async def _scene(host: Host, program: Program) -> dict[str, str]:
    async with (
        VmmClient(host.target("vmm-0"), client="device", incarnation="i1") as vmm,
        host.clients("device") as (_, gmem),
    ):
        vm = (await vmm.create_vm(vm_id="v", type=vmm_pb2.VM_TYPE_SW_PROTECTED)).name
        other = (await vmm.create_vm(vm_id="w")).name
        names = {
            "vm": vm,
            "no": "hosts/h/nothing",
            "file": await vmm.create_guest_memfd(
                vm=vm, size=2 * SIZE_2M, flags=HUGE_2M
            ),
            "spare": await vmm.create_guest_memfd(vm=vm, size=SIZE_2M, flags=HUGE_2M),
            "foreign": await vmm.create_guest_memfd(
                vm=other, size=SIZE_2M, flags=HUGE_2M
            ),
            "given": await program.asked("give", PAGE, 1),
        }
        await vmm.set_user_memory_region2(
            vm=vm,
            slot=0,
            flags=KVM_MEM_GUEST_MEMFD,
            guest_phys_addr=GPA,
            memory_size=2 * SIZE_2M,
            guest_memfd=names["file"],
        )
        await vmm.set_memory_attributes(
            vm=vm, address=GPA + SIZE_2M, size=SIZE_2M, attributes=PRIVATE
        )
        # The kernel's populate leaves the folio of a page that it could not fill.
        await gmem.fallocate(name=names["file"], mode=1, offset=0, length=2 * SIZE_2M)
        await gmem.pin_pages(
            name=names["file"], offset=3 * PAGE, size=PAGE, holder="device"
        )
    return names


@pytest.fixture
async def whole(vmm_host: Host, names: dict[str, str]) -> AsyncIterator[Whole]:
    vmm_host.rearm()
    async with (
        VmmClient(vmm_host.target("vmm-0"), client="test") as vmm,
        vmm_host.clients() as (allocator, gmem),
    ):
        yield Whole({"vmm": vmm, "gmem": gmem, "allocator": allocator}, names)


@pytest.mark.parametrize(
    "bad", BAD, ids=[f"{bad.rpc}-{bad.what.replace(' ', '_')}" for bad in BAD]
)
async def test_bad_input_is_refused_and_moves_nothing(whole: Whole, bad: Bad) -> None:
    before = await whole.state()
    with refused(bad.reason, bad.words) as caught:
        await whole.call(bad)
    assert str(caught[0]).startswith(bad.errno)
    assert changes(before, await whole.state()) == []


async def test_a_token_is_used_once(vmm_host: Host, whole: Whole) -> None:
    gmem = whole.clients["gmem"]
    assert isinstance(gmem, GuestMemfdClient)
    token = (await gmem.open_view(name=whole.names["file"])).token
    one, two = vmm_host.program("one"), vmm_host.program("two")
    before = await whole.state()
    await one.asked("take", token)
    with refused(Reason.TOKEN_UNKNOWN):
        await two.asked("take", token)
    await asyncio.to_thread(one.kill)
    async with asyncio.timeout(10):
        while changes(before, await whole.state()):
            await asyncio.sleep(0.02)


async def test_a_client_that_dies_with_a_mapping_and_a_pin_blocks_nothing(
    vmm_host: Host, whole: Whole
) -> None:
    gmem, name = whole.clients["gmem"], whole.names["file"]
    assert isinstance(gmem, GuestMemfdClient)
    before = await whole.state()
    device = vmm_host.program("doomed", "life")
    await device.asked("take", (await gmem.open_view(name=name)).token)
    await device.asked("map")
    await device.asked("raw_store", 8 * PAGE, 1)
    async with vmm_host.clients("doomed", "life") as (_, its):
        await its.pin_pages(name=name, offset=8 * PAGE, size=PAGE, holder="doomed")
    call = Bad(
        *("mapped", "vmm", CONVERT, {"address": GPA + 8 * PAGE}),
        *(R.PAGE_IN_USE, "EINVAL", ""),
    )
    with refused(Reason.PAGE_IN_USE, "doomed"):
        await whole.call(call)
    await asyncio.to_thread(device.kill)
    async with asyncio.timeout(10):
        while changes(before, await whole.state()):
            await asyncio.sleep(0.02)
    await whole.call(call)
    shared = {"address": GPA + 8 * PAGE, "attributes": 0}
    await whole.call(Bad("back", "vmm", CONVERT, shared, R.PAGE_IN_USE, "", ""))
    assert changes(before, await whole.state()) == []


@pytest.mark.parametrize(
    ("kind", "socket"),
    [
        (HostAllocatorClient, "host_allocator"),
        (GuestMemfdClient, "guest_memfd"),
        (VmmClient, "vmm"),
    ],
)
async def test_a_service_that_is_not_there_is_named(
    vmm_host: Host, kind: type[ServiceClient], socket: str
) -> None:
    target = f"unix:{vmm_host.run_dir}/nobody.sock"
    async with kind(target, patience=Patience(attempts=2)) as client:
        request = MESSAGES["vmm"].GetCapabilitiesRequest()
        method = client._stub.GetCapabilities  # type: ignore[attr-defined]
        with pytest.raises(TransportError, match="gmemctl status") as caught:
            await client.connection.call(method, request)
    assert caught.value.service == socket
    assert caught.value.target == target
