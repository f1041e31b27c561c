"""Does the wire change the meaning? One suite over the vmm's core and its service.

The same calls go to the core, whose effects are answered by hand, and to a real
service with real guest processes, whose guest_memfd is made of memfds.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from gmem.api.vmm.v1 import vmm_pb2 as pb
from gmem.client import VmmClient
from gmem.client.program import fill, halt, load, out, ring
from gmem.uapi.errors import (
    Errno,
    KernelError,
    Reason,
    TransportError,
    make_error,
)
from gmem.uapi.lineage import Lineage
from gmem.uapi.pages import PAGE_SIZE, SIZE_2M
from gmem.vmm.__main__ import start
from gmem.vmm.codec import VM_TYPES, lineage_from_wire, vm_type_from_wire
from gmem.vmm.core.attributes import require_gpa_range
from gmem.vmm.core.create import create_guest_memfd
from gmem.vmm.core.effects import BindSlot, Convert, CreateFile, Populate
from gmem.vmm.core.memslots import Region, Userspace
from gmem.vmm.core.populate import populate_memory
from gmem.vmm.core.registry import VmRegistry
from gmem.vmm.core.set_attributes import set_memory_attributes
from gmem.vmm.core.set_region import set_user_memory_region2
from tests.support.vmm_host import VmmHost, vmm_host
from tests.support.vmm_world import World
from tests.support.wire import serve

VM = "hosts/host0/vms/v"
GPA = 0x4000_0000
SIZE = 4 * SIZE_2M
U64_MAX = (1 << 64) - 1
RPC_OF = {
    "CreateGuestMemfd": CreateFile,
    "BindMemslot": BindSlot,
    "ConvertRange": Convert,
    "PopulateRange": Populate,
}


@dataclass
class CoreVmm:
    """The core behind the client's methods."""

    registry: VmRegistry = field(default_factory=lambda: VmRegistry("host0"))
    world: World = field(default_factory=World)

    def refuse(self, rpc: str, error: KernelError | None) -> None:
        if error is None:
            del self.world.refuse[RPC_OF[rpc]]
        else:
            self.world.refuse[RPC_OF[rpc]] = error

    async def descriptor(self) -> str:
        return "descriptors/1"

    async def create_vm(self, *, vm_id: str, type: Any, lineage: str = "") -> None:  # noqa: A002
        wanted = lineage_from_wire(lineage)
        self.world.run(self.registry.create(vm_id, vm_type_from_wire(type), wanted))

    async def delete_vm(self, *, name: str) -> None:
        self.world.run(self.registry.delete(name))

    async def create_guest_memfd(self, *, vm: str, size: int, flags: int) -> str:
        return self.world.run(create_guest_memfd(self.registry.get(vm), size, flags))

    async def set_user_memory_region2(
        self, *, vm: str, userspace: pb.Userspace | None = None, **region: Any
    ) -> None:
        side = Userspace(userspace.descriptor, userspace.offset) if userspace else None
        made = Region(**{"flags": 0} | region, userspace=side)
        self.world.run(set_user_memory_region2(self.registry.get(vm), made))

    async def set_memory_attributes(
        self, *, vm: str, address: int, size: int, **rest: Any
    ) -> None:
        op = set_memory_attributes(self.registry.get(vm), address, size, **rest)
        self.world.run(op)

    async def attributes(self, address: int, size: int) -> list[tuple[int, int, int]]:
        runs = self.registry.get(VM).attributes.runs(require_gpa_range(address, size))
        return [(run.offset, run.size, int(value)) for run, value in runs]

    async def populate_memory(
        self, *, vm: str, address: int, size: int, descriptor: str
    ) -> None:
        op = populate_memory(
            self.registry.get(vm),
            address,
            size,
            descriptor=descriptor,
            source_offset=0,
        )
        self.world.run(op)

    async def create_vcpu(self, *, vm: str, vcpu: int) -> None:
        self.registry.get(vm).create_vcpu(vcpu)

    async def memslots(self) -> list[tuple[int, int, int]]:
        slots = self.registry.get(VM).memslots
        return [(s.region.slot, s.gfns.offset, s.gfns.size) for s in slots]


@dataclass
class WireVmm:
    """A real service behind the client."""

    host: VmmHost

    def __getattr__(self, name: str) -> Any:
        return getattr(self.host.client, name)

    def refuse(self, rpc: str, error: KernelError | None) -> None:
        if error is None:
            del self.host.files.refuse[rpc]
        else:
            self.host.files.refuse[rpc] = error

    async def descriptor(self) -> str:
        return (await self.host.share(2 * SIZE)).descriptor

    async def attributes(self, address: int, size: int) -> list[tuple[int, int, int]]:
        runs = await self.host.client.get_memory_attributes(
            vm=VM, address=address, size=size
        )
        return [(run.address, run.size, run.attributes) for run in runs]

    async def memslots(self) -> list[tuple[int, int, int]]:
        vm = await self.host.client.get_vm(VM)
        return [(s.slot, s.guest_phys_addr, s.memory_size) for s in vm.memslots]


@pytest.fixture(params=["core", "wire"])
async def vmm(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Any]:
    if request.param == "core":
        yield CoreVmm()
        return
    async with vmm_host(tmp_path) as host:
        yield WireVmm(host)


@pytest.fixture
async def booted(vmm: Any) -> Any:
    """A SW_PROTECTED VM with one guest_memfd memslot and one vCPU."""
    await vmm.create_vm(vm_id="v", type=pb.VM_TYPE_SW_PROTECTED)
    name = await vmm.create_guest_memfd(vm=VM, size=SIZE, flags=2 | 21 << 26)
    await vmm.set_user_memory_region2(
        vm=VM,
        slot=0,
        flags=4,
        guest_phys_addr=GPA,
        memory_size=SIZE,
        userspace=pb.Userspace(descriptor=await vmm.descriptor()),
        guest_memfd=name,
    )
    await vmm.create_vcpu(vm=VM, vcpu=0)
    return vmm


async def test_memslot_lives_from_create_to_delete(booted: Any) -> None:
    assert await booted.memslots() == [(0, GPA, SIZE)]
    await booted.set_user_memory_region2(
        vm=VM, slot=0, guest_phys_addr=GPA, memory_size=0
    )
    assert await booted.memslots() == []
    await booted.delete_vm(name=VM)
    with pytest.raises(KernelError) as refused:
        await booted.delete_vm(name=VM)
    assert refused.value.reason is Reason.VM_UNKNOWN


async def test_attributes_are_runs(booted: Any) -> None:
    await booted.set_memory_attributes(
        vm=VM, address=GPA + PAGE_SIZE, size=2 * PAGE_SIZE, attributes=8
    )
    assert await booted.attributes(GPA, 4 * PAGE_SIZE) == [
        (GPA, PAGE_SIZE, 0),
        (GPA + PAGE_SIZE, 2 * PAGE_SIZE, 8),
        (GPA + 3 * PAGE_SIZE, PAGE_SIZE, 0),
    ]


async def test_refused_conversion_says_who_and_where(booted: Any) -> None:
    numbers: dict[str, Any] = {"error_offset": 0x3000, "holders": "pid 7 (loader)"}
    refusal = make_error(
        Reason.PAGE_IN_USE, "a page is mapped", lineage=Lineage.RFC_V1, **numbers
    )
    booted.refuse("ConvertRange", refusal)
    with pytest.raises(KernelError) as refused:
        await booted.set_memory_attributes(vm=VM, address=GPA, size=SIZE, attributes=8)
    assert refused.value.errno == Errno.EINVAL
    assert refused.value.numbers == numbers
    assert str(refused.value) == str(refusal)
    assert await booted.attributes(GPA, SIZE) == [(GPA, SIZE, 0)]
    booted.refuse("ConvertRange", None)
    await booted.set_memory_attributes(vm=VM, address=GPA, size=SIZE, attributes=8)
    assert await booted.attributes(GPA, SIZE) == [(GPA, SIZE, 8)]


Call = Callable[[Any], Any]


def region(**change: Any) -> Call:
    base: dict[str, Any] = {
        "slot": 9,
        "flags": 4,
        "guest_phys_addr": 0,
        "memory_size": SIZE_2M,
    }
    base |= {"guest_memfd": "hosts/host0/guestMemfds/1"}
    return lambda vmm: vmm.set_user_memory_region2(vm=VM, **base | change)


def attributes(**change: Any) -> Call:
    base = {"address": GPA, "size": PAGE_SIZE, "attributes": 8, "flags": 0}
    return lambda vmm: vmm.set_memory_attributes(vm=VM, **base | change)


def populate(**change: Any) -> Call:
    base: dict[str, Any] = {
        "address": GPA,
        "size": PAGE_SIZE,
        "descriptor": "descriptors/99",
    }
    return lambda vmm: vmm.populate_memory(vm=VM, **base | change)


def file(size: int, flags: int) -> Call:
    return lambda vmm: vmm.create_guest_memfd(vm=VM, size=size, flags=flags)


def create(vm_id: str, vm_type: Any = pb.VM_TYPE_DEFAULT, lineage: str = "") -> Call:
    return lambda vmm: vmm.create_vm(vm_id=vm_id, type=vm_type, lineage=lineage)


R = Reason
BAD_CALLS: list[tuple[str, Call, Reason]] = [
    ("vm twice", create("v"), R.VM_EXISTS),
    ("vm without name", create(""), R.ARGUMENT_INVALID),
    ("vm without type", create("w", pb.VM_TYPE_UNSPECIFIED), R.ARGUMENT_INVALID),
    ("lineage of tomorrow", create("w", lineage="RFC_V9"), R.ARGUMENT_INVALID),
    ("vcpu twice", lambda v: v.create_vcpu(vm=VM, vcpu=0), R.VCPU_EXISTS),
    ("vcpu too large", lambda v: v.create_vcpu(vm=VM, vcpu=2**32 - 1), R.LIMIT_REACHED),
    ("vcpu of no vm", lambda v: v.create_vcpu(vm="x", vcpu=0), R.VM_UNKNOWN),
    ("file of size 0", file(0, 0), R.SIZE_INVALID),
    ("file of negative size", file(-PAGE_SIZE, 0), R.SIZE_INVALID),
    ("file of 2^63 - 1", file(2**63 - 1, 0), R.SIZE_INVALID),
    ("file unaligned", file(PAGE_SIZE + 1, 0), R.SIZE_INVALID),
    ("file with unknown flag", file(PAGE_SIZE, 1), R.FLAG_UNKNOWN),
    ("file with all flags", file(PAGE_SIZE, U64_MAX), R.FLAG_UNKNOWN),
    ("file of 16G pages", file(PAGE_SIZE, 2 | 34 << 26), R.PAGE_SIZE_UNKNOWN),
    ("file with size bits alone", file(SIZE_2M, 21 << 26), R.FLAG_COMBINATION),
    ("slot unknown flag", region(flags=2**31), R.FLAG_UNKNOWN),
    ("slot logging a file", region(flags=5), R.FLAG_COMBINATION),
    ("slot unaligned", region(guest_phys_addr=1), R.RANGE_UNALIGNED),
    (
        "slot at 2^63, of 2^63",
        region(guest_phys_addr=2**63, memory_size=2**63),
        R.RANGE_WRAPS,
    ),
    ("slot beyond memory", region(memory_size=2**63), R.RANGE_WRAPS),
    ("slot number", region(slot=2**32 - 1), R.ARGUMENT_INVALID),
    ("slot offset wraps", region(guest_memfd_offset=2**64 - 4096), R.RANGE_WRAPS),
    ("slot overlap", region(guest_phys_addr=GPA + PAGE_SIZE), R.MEMSLOT_OVERLAP),
    ("slot not there", region(memory_size=0), R.MEMSLOT_UNKNOWN),
    ("slot changed", region(slot=0, guest_phys_addr=GPA), R.MEMSLOT_IMMUTABLE),
    ("attributes flags", attributes(flags=2**63), R.FLAG_UNKNOWN),
    ("attributes unknown", attributes(attributes=2**63), R.ATTRIBUTE_UNSUPPORTED),
    ("attributes of nothing", attributes(size=0), R.RANGE_EMPTY),
    ("attributes unaligned", attributes(address=GPA + 1), R.RANGE_UNALIGNED),
    ("attributes wrap", attributes(address=2**64 - 4096), R.RANGE_WRAPS),
    ("attributes of 2^63", attributes(address=2**63, size=2**63), R.RANGE_WRAPS),
    ("populate shared", populate(), R.PAGE_NOT_FAULTABLE),
    ("populate nowhere", populate(address=0), R.GPA_OUTSIDE_MEMSLOTS),
    ("populate past the slot", populate(size=SIZE + PAGE_SIZE), R.GPA_OUTSIDE_MEMSLOTS),
    ("populate unaligned", populate(size=1), R.RANGE_UNALIGNED),
    ("attributes read unaligned", lambda v: v.attributes(1, 1), R.RANGE_UNALIGNED),
    ("attributes read of nothing", lambda v: v.attributes(0, 0), R.RANGE_EMPTY),
]


async def test_bad_input_is_refused_and_changes_nothing(booted: Any) -> None:
    before = (await booted.memslots(), await booted.attributes(GPA, SIZE))
    for what, call, reason in BAD_CALLS:
        with pytest.raises(KernelError) as refused:
            await call(booted)
        error = refused.value
        assert error.reason is reason, what
        assert error.errno == make_error(reason, "").errno, what
        assert len(error.sentence) > 15, what
    assert (await booted.memslots(), await booted.attributes(GPA, SIZE)) == before


@pytest.mark.parametrize(
    ("rpc", "reason"),
    [
        ("CreateGuestMemfd", Reason.POOL_EMPTY),
        ("BindMemslot", Reason.FD_UNKNOWN),
        ("BindMemslot", Reason.BINDING_FOREIGN_VM),
        ("BindMemslot", Reason.BINDING_OVERLAP),
        ("BindMemslot", Reason.RANGE_PAST_END),
        ("ConvertRange", Reason.VMEMMAP_RESTORE_FAILED),
    ],
)
async def test_refusal_of_guest_memfd_comes_through(
    booted: Any, rpc: str, reason: Reason
) -> None:
    calls = {
        "CreateGuestMemfd": file(PAGE_SIZE, 0),
        "BindMemslot": region(),
        "ConvertRange": attributes(),
    }
    booted.refuse(rpc, make_error(reason, "not now, free 3 pages", available=1))
    with pytest.raises(KernelError) as refused:
        await calls[rpc](booted)
    assert (refused.value.reason, refused.value.numbers) == (reason, {"available": 1})


def test_every_type_has_a_number() -> None:
    assert len(VM_TYPES) == len(pb.VmType.values()) - 1


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[VmmHost]:
    async with vmm_host(tmp_path) as made:
        yield made


async def test_bad_programs_are_refused_before_they_start(host: VmmHost) -> None:
    await host.boot()
    bad = [
        pb.Instruction(),
        pb.Instruction(access=9, halt=pb.Halt()),  # type: ignore[arg-type]
        load(0, (1 << 20) + 1),
        load(U64_MAX, 2),
        fill(0, 1, 256),
        ring(0, PAGE_SIZE, 1),
        out(1 << 16, 0),
        pb.Instruction(hypercall=pb.Hypercall(nr=1, args=[0] * 5)),
    ]
    for instruction in bad:
        with pytest.raises(KernelError) as refused:
            await host.run(halt(), instruction)
        assert refused.value.reason is Reason.ARGUMENT_INVALID, instruction
    with pytest.raises(KernelError) as refused:
        await host.run(halt(), vcpu=7)
    assert refused.value.reason is Reason.VCPU_UNKNOWN
    host.vm = "hosts/host0/vms/nobody"
    with pytest.raises(KernelError) as refused:
        await host.run(halt())
    assert refused.value.reason is Reason.VM_UNKNOWN


async def test_run_is_started_once_and_then_resumed(host: VmmHost) -> None:
    await host.boot()
    run = host.client.run(
        vm=host.vm, program=[out(1, 1), halt()], policy=pb.POLICY_NONE
    )
    async with run:
        exits = run.exits()
        await anext(exits)
        await run._write(pb.RunRequest(start=pb.RunStart(vm=host.vm)))
        with pytest.raises(KernelError) as refused:
            await anext(exits)
        assert refused.value.reason is Reason.STATE_WRONG
    run = host.client.run(vm=host.vm, program=[])
    run._start = pb.RunRequest(resume=pb.RunResume()).start
    run._call = run._method()
    await run._write(pb.RunRequest(resume=pb.RunResume()))
    with pytest.raises(KernelError) as refused:
        await anext(run.exits())
    assert refused.value.reason is Reason.STATE_WRONG
    assert (await host.run(halt()))[-1].WhichOneof("exit") == "hlt"


async def test_descriptor_must_be_given_and_long_enough(host: VmmHost) -> None:
    await host.boot()
    shared = await host.share(PAGE_SIZE)
    with pytest.raises(KernelError) as refused:
        await host.set_slot(1, 0, 2 * PAGE_SIZE, shared)
    assert refused.value.reason is Reason.ARGUMENT_INVALID
    assert "long enough" in refused.value.sentence
    shared.descriptor = "descriptors/77"
    with pytest.raises(KernelError) as refused:
        await host.set_slot(1, 0, PAGE_SIZE, shared)
    assert refused.value.reason is Reason.DESCRIPTOR_UNKNOWN
    assert [s.slot for s in (await host.client.get_vm(host.vm)).memslots] == [0]


async def test_offset_beyond_2_to_63_is_negative_to_guest_memfd(host: VmmHost) -> None:
    await host.boot()
    refusal = make_error(Reason.RANGE_PAST_END, "offset is negative: use another")
    host.files.refuse["BindMemslot"] = refusal
    with pytest.raises(KernelError) as refused:
        await region(guest_memfd_offset=1 << 63)(WireVmm(host))
    assert refused.value.reason is Reason.RANGE_PAST_END
    assert host.files.requests[-1].offset == -(1 << 63)


async def test_capabilities_are_those_of_kvm(host: VmmHost) -> None:
    found = await host.client.get_capabilities()
    assert dict(found.extensions) == {
        201: 1 << 12,
        231: 1,
        232: 1,
        233: 8,
        234: 1,
        235: 3,
        236: 1,
    }
    assert found.lineages == [lineage.value for lineage in Lineage]
    assert Path(found.broker_path).is_socket()


async def test_vms_are_listed_in_pages(host: VmmHost) -> None:
    for vm_id in ("b", "a", "c"):
        await host.client.create_vm(vm_id=vm_id)
    names = [vm.name for vm in await host.client.list_vms()]
    assert names == [f"hosts/host0/vms/{vm_id}" for vm_id in "abc"]


async def test_changes_are_watched(host: VmmHost) -> None:
    kinds: list[str] = []
    watching = asyncio.Event()

    async def watch() -> None:
        async for response in host.client.watch():
            watching.set()
            kinds.extend(event.kind for event in response.events if event.kind)
            if "vm.deleted" in kinds:
                return

    task = asyncio.create_task(watch())
    await watching.wait()
    await host.boot()
    await host.convert(0, PAGE_SIZE, private=True)
    await host.convert(0, PAGE_SIZE, private=True)
    await host.client.delete_vm(name=host.vm)
    await asyncio.wait_for(task, 30)
    assert kinds == [
        "vm.created",
        "guest_memfd.created",
        "memslot.set",
        "vcpu.created",
        "attributes.set",
        "vm.deleted",
    ]


async def test_service_that_is_not_there_is_named(tmp_path: Path) -> None:
    async with (
        serve(start, tmp_path, service="vmm", name="vmm-0") as runtime,
        VmmClient(runtime.target) as client,
    ):
        vm = (await client.create_vm(vm_id="v")).name
        with pytest.raises(TransportError, match=r"guest_memfd at unix:.* no answer"):
            await client.create_guest_memfd(vm=vm, size=PAGE_SIZE)
        assert (await client.get_vm(vm)).memslots == []
        await client.delete_vm(name=vm)


async def test_populate_reaches_guest_memfd(host: VmmHost) -> None:
    await host.boot()
    await host.convert(0, 4 * PAGE_SIZE, private=True)
    await host.client.populate_memory(
        vm=host.vm,
        address=GPA + PAGE_SIZE,
        size=2 * PAGE_SIZE,
        descriptor="descriptors/5",
        source_offset=77,
    )
    asked = host.files.requests[-1]
    assert (asked.name, asked.offset, asked.size) == (host.name, 4096, 8192)
    assert (asked.descriptor, asked.source_offset) == ("descriptors/5", 77)
