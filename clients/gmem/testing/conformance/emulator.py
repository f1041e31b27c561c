"""The emulated host as the kernel of the cases.

Calls of KVM are gRPC; calls on a file are made on the file, a view that comes through
the broker. This process is the VMM: it holds the descriptors, and maps nothing.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, assert_never

from gmem.api.guest_memfd.v1 import guest_memfd_pb2
from gmem.api.vmm.v1 import vmm_pb2 as pb
from gmem.client import HostAllocatorClient as AsyncAllocatorClient
from gmem.client import hugetlb_file
from gmem.client import program as make
from gmem.client.sync import (
    GuestMemfdClient,
    HostAllocatorClient,
    VcpuRun,
    VmmClient,
)
from gmem.runtime.broker_client import BrokerClient
from gmem.runtime.config import HostShape, NodeShape
from gmem.testing.conformance import guest
from gmem.testing.conformance.guest import Exit, Instruction, Result
from gmem.testing.conformance.kvm import (
    Backend,
    Capabilities,
    Descriptor,
    Feature,
    GuestMemfd,
    HasFileno,
    Hold,
    HugetlbFile,
    Pool,
    Userspace,
    Vm,
)
from gmem.testing.conformance.outcomes import OK, errno_name
from gmem.testing.hosts import EmulatedHost
from gmem.uapi.errors import InUse, KernelError
from gmem.uapi.flags import VmType
from gmem.uapi.lineage import Lineage
from gmem.uapi.pages import PAGE_SIZE, SIZE_1G, SIZE_2M

CLIENT: Final = "conformance"
BACK_SECONDS_MAX: Final = 20.0
"""How long counters may take to come back after a case."""
SHAPE: Final = HostShape(
    nodes=(
        NodeShape(memory_size=16 * SIZE_1G, huge_pages={SIZE_1G: 6, SIZE_2M: 64}),
        NodeShape(memory_size=16 * SIZE_1G, huge_pages={SIZE_1G: 6, SIZE_2M: 64}),
    )
)
"""A host that has what the cases ask for; pages cost nothing before they are used."""

_VM_TYPES: Final = {
    VmType.DEFAULT: pb.VM_TYPE_DEFAULT,
    VmType.SW_PROTECTED: pb.VM_TYPE_SW_PROTECTED,
}
_ACCESSES: Final = {
    guest.Access.BY_ATTRIBUTE: pb.ACCESS_BY_ATTRIBUTE,
    guest.Access.PRIVATE: pb.ACCESS_PRIVATE,
    guest.Access.SHARED: pb.ACCESS_SHARED,
}
_SIZES: Final = (PAGE_SIZE, SIZE_2M, SIZE_1G)
_PAGE_SIZES: Final[Mapping[str, Sequence[int]]] = {
    lineage.value: _SIZES for lineage in Lineage
}
_FEATURES: Final = frozenset(
    {
        Feature.GUESTS,
        Feature.PRIVATE_MEMORY,
        Feature.PINS,
        Feature.POOLS,
        Feature.OWN_POOLS,
        Feature.HUGETLB_FILES,
        Feature.USERSPACE_VMA,
    }
)
_MISSING: Final = {
    Feature.MACHINE_HUGE_PAGES: (
        "needs huge pages of the machine behind userspace_addr: an emulated host has "
        "those of its own pools alone"
    ),
}


class Emulator(Backend):
    """A running host; it is ended by whoever started it."""

    name = "emulator"

    def __init__(self, host: EmulatedHost) -> None:
        """Connect to the services."""
        self.host = host
        self._stack = ExitStack()
        enter = self._stack.enter_context
        self.allocator = enter(HostAllocatorClient(host.target("host_allocator")))
        self.files = enter(GuestMemfdClient(host.target("guest_memfd"), client=CLIENT))
        self.vmm = enter(VmmClient(host.target("vmm-0"), client=CLIENT))
        incarnation = secrets.token_hex(8)
        broker = Path(self.files.get_capabilities().broker_path)
        self.views = enter(BrokerClient(broker, CLIENT, incarnation))
        broker = Path(self.vmm.get_capabilities().broker_path)
        self.descriptors = enter(BrokerClient(broker, CLIENT, incarnation))
        self._before = self._counters()

    @property
    def capabilities(self) -> Capabilities:
        """Every lineage with every page size."""
        return Capabilities(_PAGE_SIZES, _FEATURES, _MISSING)

    def create_vm(self, *, lineage: str, vm_type: VmType) -> Vm:
        """KVM_CREATE_VM."""
        made = self.vmm.create_vm(
            vm_id=f"c{secrets.token_hex(4)}", type=_VM_TYPES[vm_type], lineage=lineage
        )
        return EmulatedVm(self, made.name)

    def begin(self) -> None:
        """Give the case its time."""
        self.host.rearm()
        self._before = self._counters()

    def leftovers(self) -> list[str]:
        """Return inodes, VMs and counters that are not as before the case."""
        deadline = time.monotonic() + BACK_SECONDS_MAX
        while (left := self._left()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return left

    def pools(self) -> Mapping[int, Pool]:
        """Return the counters of all pools."""
        pools = self.allocator.list_pools()
        return {
            pool.page_size: Pool(
                nr=pool.nr_huge_pages,
                free=pool.free_huge_pages,
                resv=pool.resv_huge_pages,
                surplus=pool.surplus_huge_pages,
                overcommit=pool.nr_overcommit_huge_pages,
            )
            for pool in pools
        }

    def hugetlb_file(self, page_size: int) -> HugetlbFile:
        """Make another tenant of a pool, which only counts."""
        return EmulatedHugetlbFile(self.host.target("host_allocator"), page_size)

    def view(self, name: str) -> int:
        """Return a descriptor of an inode's host view."""
        return self.views.take(self.files.open_view(name=name).token)

    def close(self) -> None:
        """Disconnect."""
        self._stack.close()

    def _left(self) -> list[str]:
        left = [f"{inode.name} is there" for inode in self.files.list_guest_memfds()]
        left += [f"{vm.name} is there" for vm in self.vmm.list_vms()]
        after = self._counters()
        return left + [
            f"{name} was {before} and is {after[name]}"
            for name, before in self._before.items()
            if after[name] != before
        ]

    def _counters(self) -> dict[str, object]:
        statistics = self.allocator.get_statistics()
        counters: dict[str, object] = {
            f"pool of {size:#x}": pool for size, pool in self.pools().items()
        }
        for node in statistics.nodes:
            counters[f"free pages of node {node.node}"] = node.free_base_pages
        counters["vmemmap pages saved"] = statistics.vmemmap.saved_pages
        return counters


class EmulatedMemfd(GuestMemfd):
    """A host view; the file is closed by its service's call, not with a descriptor."""

    def __init__(self, kernel: Emulator, name: str, size: int) -> None:
        """Open the host view."""
        super().__init__(kernel.view(name), size)
        self.name = name
        self._kernel = kernel
        self._closed = False

    def pin(self, offset: int, size: int, *, plain: bool = False) -> Hold:
        """Hold pages in the name of this program."""
        kind = (
            guest_memfd_pb2.HOLD_KIND_PLAIN if plain else guest_memfd_pb2.HOLD_KIND_PIN
        )
        hold = self._kernel.files.pin_pages(
            name=self.name, offset=offset, size=size, holder=CLIENT, kind=kind
        )
        return EmulatedHold(self._kernel, hold)

    def close(self) -> None:
        """DeleteGuestMemfd, and close the descriptor."""
        if self._closed:
            return
        self._closed = True
        os.close(self._fd)
        self._kernel.files.delete_guest_memfd(name=self.name)


class EmulatedHold(Hold):
    """A hold that the service keeps."""

    def __init__(self, kernel: Emulator, number: int) -> None:
        """Take over hold `number`."""
        self._kernel = kernel
        self._number: int | None = number

    def release(self) -> None:
        """UnpinPages."""
        number, self._number = self._number, None
        if number is not None:
            self._kernel.files.unpin_pages(hold=number)


class EmulatedVm(Vm):
    """A VM of vmm-0."""

    def __init__(self, kernel: Emulator, name: str) -> None:
        """Take over the VM `name`."""
        self._kernel = kernel
        self.name = name
        self._given: list[str] = []
        self._closed = False

    def create_guest_memfd(self, size: int, flags: int) -> GuestMemfd:
        """KVM_CREATE_GUEST_MEMFD."""
        create = self._kernel.vmm.create_guest_memfd
        name = create(vm=self.name, size=size, flags=flags)
        return EmulatedMemfd(self._kernel, name, size)

    def set_user_memory_region2(
        self,
        *,
        slot: int,
        guest_phys_addr: int,
        memory_size: int,
        flags: int = 0,
        userspace: Userspace | None = None,
        guest_memfd: Descriptor | None = None,
        guest_memfd_offset: int = 0,
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION2; the userspace side is a descriptor here."""
        side = None
        if userspace is not None:
            descriptor = self._give(userspace.file)
            side = pb.Userspace(descriptor=descriptor, offset=userspace.offset)
        self._kernel.vmm.set_user_memory_region2(
            vm=self.name,
            slot=slot,
            flags=flags,
            guest_phys_addr=guest_phys_addr,
            memory_size=memory_size,
            userspace=side,
            guest_memfd=self._name_of(guest_memfd),
            guest_memfd_offset=guest_memfd_offset,
        )

    def set_memory_attributes(
        self, *, address: int, size: int, attributes: int, flags: int = 0
    ) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES."""
        self._kernel.vmm.set_memory_attributes(
            vm=self.name,
            address=address,
            size=size,
            attributes=attributes,
            flags=flags,
        )

    def check_extension(self, capability: int) -> int:
        """Return what GetCapabilities says of a KVM_CAP number."""
        extensions = self._kernel.vmm.get_capabilities().extensions
        return int(extensions.get(capability, 0))

    def create_vcpu(self, vcpu: int = 0) -> None:
        """KVM_CREATE_VCPU."""
        self._kernel.vmm.create_vcpu(vm=self.name, vcpu=vcpu)

    @contextmanager
    def run(self, program: Sequence[Instruction], *, vcpu: int = 0) -> Iterator[_Run]:
        """KVM_RUN, with nobody who answers exits but the caller."""
        wire = [*(_wire(instruction) for instruction in program), make.halt()]
        with self._kernel.vmm.run(
            vm=self.name, program=wire, vcpu=vcpu, policy=pb.POLICY_NONE
        ) as inner:
            yield _Run(inner)

    def pre_fault_memory(
        self, gpa: int, size: int, *, vcpu: int = 0
    ) -> tuple[str, int, int]:
        """KVM_PRE_FAULT_MEMORY."""
        try:
            left = self._kernel.vmm.pre_fault_memory(
                vm=self.name, vcpu=vcpu, gpa=gpa, size=size
            )
        except KernelError as error:
            return errno_name(error.errno), gpa, size
        return OK, left.gpa, left.size

    def close(self) -> None:
        """DeleteVm; a vCPU that was left running is out of its program soon."""
        if self._closed:
            return
        self._closed = True
        deadline = time.monotonic() + BACK_SECONDS_MAX
        while True:
            try:
                self._kernel.vmm.delete_vm(name=self.name)
                break
            except InUse:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        for descriptor in self._given:
            self._kernel.descriptors.drop(descriptor)

    def _give(self, file: HasFileno) -> str:
        descriptor = self._kernel.descriptors.give(file.fileno(), "userspace")
        self._given.append(descriptor)
        return descriptor

    def _name_of(self, descriptor: Descriptor | None) -> str:
        """Return the resource that stands for a descriptor, also for a wrong one."""
        if descriptor is None:
            return ""
        if isinstance(descriptor, EmulatedMemfd | EmulatedVm):
            return descriptor.name
        if isinstance(descriptor, HasFileno):
            return self._give(descriptor)
        return self.name.partition("/vms/")[0]


class _Run:
    """gmem.client's VcpuRun in the words of the cases."""

    def __init__(self, inner: VcpuRun) -> None:
        self._inner = inner

    def exits(self) -> Iterator[Exit]:
        for response in self._inner.exits():
            yield _exit(response)

    def resume(self, value: int = 0) -> None:
        self._inner.resume(value)


class EmulatedHugetlbFile(HugetlbFile):
    """gmem.client's HugetlbFile, blocking."""

    def __init__(self, target: str, page_size: int) -> None:
        """memfd_create(MFD_HUGETLB)."""
        self._runner = asyncio.Runner()
        self._client = self._runner.run(self._connected(target))
        create = hugetlb_file.HugetlbFile.create(self._client, page_size=page_size)
        self._file = self._runner.run(create)

    def mmap(self) -> None:
        """Map it."""
        self._runner.run(self._file.mmap())

    def touch(self) -> None:
        """Write to it."""
        self._runner.run(self._file.touch())

    def munmap(self) -> None:
        """Unmap it."""
        self._file.munmap()

    def madvise(self, advice: int) -> None:
        """Call madvise where it was mapped."""
        self._file.madvise(advice)

    def close(self) -> None:
        """Close the file."""
        self._runner.run(self._file.close())
        self._runner.run(self._client.close())
        self._runner.close()

    async def _connected(self, target: str) -> AsyncAllocatorClient:
        return AsyncAllocatorClient(target, client=CLIENT)


def _wire(instruction: Instruction) -> pb.Instruction:
    match instruction:
        case guest.Load(gpa, size, access):
            return make.load(gpa, size, access=_access(access))
        case guest.Store(gpa, data, access):
            return make.store(gpa, data, access=_access(access))
        case guest.Fill(gpa, size, value, access):
            return make.fill(gpa, size, value, access=_access(access))
        case guest.Verify(gpa, size, value, access):
            return make.verify(gpa, size, value, access=_access(access))
        case guest.MapGpaRange(gpa, npages, private):
            return make.map_gpa_range(gpa, npages, private=private)
        case guest.Out(port, value):
            return make.out(port, value)
        case _:
            assert_never(instruction)


def _access(access: guest.Access) -> pb.Access.ValueType:
    return _ACCESSES[access]


def _exit(response: pb.RunResponse) -> Exit:
    results = tuple(
        Result(result.data, result.count, result.value) for result in response.results
    )
    match response.WhichOneof("exit"):
        case "memory_fault":
            left = response.memory_fault
            return guest.MemoryFault(
                left.errno, left.flags, left.gpa, left.size, results
            )
        case "hypercall":
            call = response.hypercall
            return guest.HypercallExit(call.nr, tuple(call.args), results)
        case "mmio":
            mmio = response.mmio
            return guest.MmioExit(mmio.gpa, mmio.len, mmio.is_write, results)
        case "io":
            return guest.IoExit(response.io.port, response.io.value, results)
        case _:
            return guest.Halted(results)


__all__ = ["SHAPE", "Emulator"]
