"""The emulated host as the kernel of the cases.

Calls of KVM are gRPC; calls on a file are made on the file, a view that comes through
the broker. This process is the VMM: it holds the descriptors, and maps nothing.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

from gmem.api.guest_memfd.v1 import guest_memfd_pb2
from gmem.api.types.v1.types_pb2 import MemPolicy
from gmem.api.vmm.v1 import vmm_pb2 as pb
from gmem.client import program as make
from gmem.client.host_allocator import NO_LIMIT
from gmem.client.sync import (
    GuestMemfdClient,
    HostAllocatorClient,
    VmmClient,
)
from gmem.runtime.broker_client import BrokerClient
from gmem.runtime.config import HostShape, NodeShape
from gmem.testing.conformance.emulator_guest import EmulatedRun, to_wire
from gmem.testing.conformance.emulator_things import (
    CLIENT,
    EmulatedFailure,
    EmulatedHold,
    EmulatedHugetlbFile,
)
from gmem.testing.conformance.guest import Instruction
from gmem.testing.conformance.kvm import (
    IN_PLACE,
    MAINLINE,
    RFC_V1,
    RFC_V2,
    Backend,
    Capabilities,
    Cgroup,
    Descriptor,
    Feature,
    GuestMemfd,
    HasFileno,
    Hold,
    HugetlbFile,
    KillPolicy,
    MemoryFailure,
    Pool,
    Userspace,
    Vm,
)
from gmem.testing.conformance.outcomes import OK, errno_name
from gmem.testing.conformance.registry import ALL_SIZES, HUGE, SMALL
from gmem.testing.conformance.toucher import Window
from gmem.testing.hosts import EmulatedHost
from gmem.uapi.errors import InUse, KernelError
from gmem.uapi.flags import VmType
from gmem.uapi.pages import PAGE_SHIFT, PAGE_SIZE, SIZE_1G, SIZE_2M

REARM_SECONDS: Final = 1.0
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
_MODES: Final = {
    0: MemPolicy.MODE_DEFAULT,
    1: MemPolicy.MODE_PREFERRED,
    2: MemPolicy.MODE_BIND,
    3: MemPolicy.MODE_INTERLEAVE,
}
"""MPOL_* of mbind, and as they go over the wire."""
_POLICIES: Final = {
    KillPolicy.EARLY: guest_memfd_pb2.KILL_POLICY_EARLY,
    KillPolicy.ADVICE: guest_memfd_pb2.KILL_POLICY_EARLY,
    KillPolicy.LATE: guest_memfd_pb2.KILL_POLICY_LATE,
}
PAGE_SIZES: Final[Mapping[str, Sequence[int]]] = {
    RFC_V1: ALL_SIZES,
    RFC_V2: ALL_SIZES,
    IN_PLACE: ALL_SIZES,
    MAINLINE: SMALL,
}
"""What a host plays, each with the page sizes that a file of it may have."""
_FEATURES: Final = frozenset(
    {
        Feature.GUESTS,
        Feature.PRIVATE_MEMORY,
        Feature.PINS,
        Feature.POOLS,
        Feature.OWN_POOLS,
        Feature.HUGETLB_FILES,
        Feature.USERSPACE_VMA,
        Feature.NUMA,
        Feature.CGROUPS,
        Feature.MEMORY_ERRORS,
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
        self._armed = 0.0
        self._before = self._counters()

    @property
    def capabilities(self) -> Capabilities:
        """Every lineage with every page size."""
        return Capabilities(PAGE_SIZES, _FEATURES, _MISSING)

    def create_vm(self, *, lineage: str, vm_type: VmType) -> Vm:
        """KVM_CREATE_VM."""
        made = self.vmm.create_vm(
            vm_id=f"c{secrets.token_hex(4)}", type=_VM_TYPES[vm_type], lineage=lineage
        )
        return EmulatedVm(self, made.name)

    def begin(self) -> None:
        """Give the case its time."""
        self.going_on()
        self._before = self._counters()

    def going_on(self) -> None:
        """Give the host its time again: a case of many calls is not one that hangs."""
        now = time.monotonic()
        if now - self._armed > REARM_SECONDS:
            self._armed = now
            self.host.rearm()

    def leftovers(self) -> list[str]:
        """Return inodes, VMs and counters that are not as before the case."""
        deadline = time.monotonic() + BACK_SECONDS_MAX
        while (left := self.left_now()) and time.monotonic() < deadline:
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

    def cgroup(self, page_size: int) -> Cgroup:
        """Return the counters of the root: VMs of the cases name no other."""
        counters = self.allocator.get_cgroup().counters
        (found,) = [one for one in counters if one.page_size == page_size]
        return Cgroup(
            usage=found.current,
            limit=found.max if found.HasField("max") else NO_LIMIT,
            max_usage=found.max_usage,
            rsvd_usage=found.rsvd_current,
            rsvd_limit=found.rsvd_max if found.HasField("rsvd_max") else NO_LIMIT,
            rsvd_max_usage=found.rsvd_max_usage,
        )

    def hugetlb_file(self, page_size: int) -> HugetlbFile:
        """Make another tenant of a pool, which only counts."""
        return EmulatedHugetlbFile(self.host.target("host_allocator"), page_size)

    def view(self, name: str) -> int:
        """Return a descriptor of an inode's host view."""
        return self.views.take(self.files.open_view(name=name).token)

    def close(self) -> None:
        """Disconnect."""
        self._stack.close()

    def left_now(self) -> list[str]:
        """Return the same, without waiting for what is on its way."""
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
        for size in HUGE:
            cgroup = self.cgroup(size)
            charged = (cgroup.usage, cgroup.rsvd_usage)
            counters[f"bytes charged for pages of {size:#x}"] = charged
        return counters


@dataclass(frozen=True, slots=True)
class Bound:
    """A memslot of a file: its first guest address, and the bytes of the file."""

    vm: str
    slot: int
    gpa: int
    offsets: range


class EmulatedMemfd(GuestMemfd):
    """A host view; the file is closed by its service's call, not with a descriptor."""

    def __init__(self, kernel: Emulator, name: str, size: int) -> None:
        """Open the host view."""
        super().__init__(kernel.view(name), size)
        self.bound: list[Bound] = []
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
        return EmulatedHold(self._kernel.files, hold)

    def memory_failure(self, offset: int, policy: KillPolicy) -> MemoryFailure:
        """InjectMemoryError; nothing of the machine is poisoned."""
        found = self._kernel.files.inject_memory_error(
            name=self.name, offset=offset, kill_policy=_POLICIES[policy]
        )
        return EmulatedFailure(
            self._kernel.files, self._kernel.allocator, self.name, offset, found
        )

    def mbind(self, window: Window, mode: int, nodes: int, page: range) -> None:
        """SetMempolicy: mbind of a view would be the machine's, not the host's."""
        del window
        # A mode that there is none of goes as it is: it is to be refused there.
        wire = _MODES.get(mode) or cast("MemPolicy.Mode.ValueType", mode)
        bits = [node for node in range(nodes.bit_length()) if nodes >> node & 1]
        policy = MemPolicy(mode=wire, nodes=bits)
        self._kernel.files.set_mempolicy(
            name=self.name, offset=page.start, size=len(page), mempolicy=policy
        )

    def get_mempolicy(self, window: Window, offset: int) -> tuple[int, int]:
        """GetMempolicy."""
        del window
        (run,) = self._kernel.files.get_mempolicy(
            name=self.name, offset=offset, size=PAGE_SIZE
        )
        mode = next(m for m, wire in _MODES.items() if wire == run.mempolicy.mode)
        return mode, sum(1 << node for node in run.mempolicy.nodes)

    def node_of(self, window: Window, offset: int) -> int:
        """Return the node that a page's frame lies on, as KVM is given it."""
        del window
        slot = next(one for one in self.bound if offset in one.offsets)
        gfn = (slot.gpa + offset - slot.offsets.start) >> PAGE_SHIFT
        pfn = self._kernel.files.get_pfn(
            name=self.name, vm=slot.vm, slot=slot.slot, gfn=gfn
        ).pfn
        for node in self._kernel.allocator.get_statistics().nodes:
            if node.first_pfn <= pfn < node.first_pfn + node.nr_pages:
                return int(node.node)
        raise LookupError(f"no node has frame {pfn}")

    def close(self) -> None:
        """DeleteGuestMemfd, and close the descriptor."""
        if self._closed:
            return
        self._closed = True
        os.close(self._fd)
        self._kernel.files.delete_guest_memfd(name=self.name)


class EmulatedVm(Vm):
    """A VM of vmm-0."""

    def __init__(self, kernel: Emulator, name: str) -> None:
        """Take over the VM `name`."""
        self._kernel = kernel
        self.name = name
        self._given: dict[int, tuple[HasFileno, str]] = {}
        self._closed = False

    def create_guest_memfd(
        self, size: int, flags: int, page_order: int = 0
    ) -> GuestMemfd:
        """KVM_CREATE_GUEST_MEMFD."""
        self._kernel.going_on()
        create = self._kernel.vmm.create_guest_memfd
        name = create(vm=self.name, size=size, flags=flags, page_order=page_order)
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
        self._kernel.going_on()
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
        if isinstance(guest_memfd, EmulatedMemfd) and memory_size:
            offsets = range(guest_memfd_offset, guest_memfd_offset + memory_size)
            guest_memfd.bound.append(Bound(self.name, slot, guest_phys_addr, offsets))

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
        """Return what the VM says of a KVM_CAP number, 0 where it says nothing."""
        extensions = self._kernel.vmm.get_vm(self.name).extensions
        return int(extensions.get(capability, 0))

    def create_vcpu(self, vcpu: int = 0) -> None:
        """KVM_CREATE_VCPU."""
        self._kernel.vmm.create_vcpu(vm=self.name, vcpu=vcpu)

    @contextmanager
    def run(
        self, program: Sequence[Instruction], *, vcpu: int = 0
    ) -> Iterator[EmulatedRun]:
        """KVM_RUN, with nobody who answers exits but the caller."""
        wire = [*(to_wire(instruction) for instruction in program), make.halt()]
        with self._kernel.vmm.run(
            vm=self.name, program=wire, vcpu=vcpu, policy=pb.POLICY_NONE
        ) as inner:
            yield EmulatedRun(inner)

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
        for _, descriptor in self._given.values():
            self._kernel.descriptors.drop(descriptor)

    def _give(self, file: HasFileno) -> str:
        """Give a descriptor to the broker, once; a VM gives back what it was given."""
        if id(file) not in self._given:
            descriptor = self._kernel.descriptors.give(file.fileno(), "userspace")
            # The file is kept, or another might be found under its id.
            self._given[id(file)] = file, descriptor
        return self._given[id(file)][1]

    def _name_of(self, descriptor: Descriptor | None) -> str:
        """Return the resource that stands for a descriptor, also for a wrong one."""
        if descriptor is None:
            return ""
        if isinstance(descriptor, EmulatedMemfd | EmulatedVm):
            return descriptor.name
        if isinstance(descriptor, HasFileno):
            return self._give(descriptor)
        return self.name.partition("/vms/")[0]


__all__ = ["SHAPE", "Emulator"]
