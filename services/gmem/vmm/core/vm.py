"""One VM: its memslots, attributes, stage 2, vCPUs, and the lock over their changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from gmem.effects import Lock, Op, perform
from gmem.uapi.errors import (
    Exhausted,
    InUse,
    NoSuchObject,
    ObjectExists,
    Reason,
)
from gmem.uapi.flags import Capability, MemoryAttribute, VmType
from gmem.uapi.lineage import Lineage
from gmem.uapi.pages import PgRange
from gmem.vmm.core.attributes import MemoryAttributes
from gmem.vmm.core.effects import NotifyGuest
from gmem.vmm.core.invalidate import Invalidation, Key, Notice
from gmem.vmm.core.lineage import VM_RULES, VmRules
from gmem.vmm.core.memslots import Memslot, Memslots
from gmem.vmm.core.mmu import Stage2, Stage2Statistics
from gmem.vmm.core.vcpu import Vcpu

VCPUS_MAX: Final = 64
"""vCPU ids are below it; each is a thread of the guest process."""


@dataclass(frozen=True, slots=True)
class VmTraits:
    """What follows from a VM's type."""

    private_memory: bool
    """kvm_arch_has_private_mem: PRIVATE attribute and GUEST_MEMFD memslots."""
    host_faultable: bool
    """What a bind sets as the default faultability in RFC_V1."""

    @property
    def attributes(self) -> MemoryAttribute:
        """The attributes that may be set (kvm_supported_mem_attributes)."""
        return MemoryAttribute.PRIVATE if self.private_memory else MemoryAttribute(0)


VM_TRAITS: Final = {
    VmType.DEFAULT: VmTraits(private_memory=False, host_faultable=False),
    VmType.SW_PROTECTED: VmTraits(private_memory=True, host_faultable=True),
}


@dataclass(frozen=True, slots=True)
class VmStatistics:
    """A snapshot that two histories can be compared by."""

    memslots: int
    attribute_runs: int
    stage2: Stage2Statistics
    in_progress: int
    vcpus: tuple[int, ...]
    guest_alive: bool


@dataclass(slots=True, eq=False)
class Vm:
    """struct kvm. `name` is hosts/{host}/vms/{vm}; `guest_pid` plays the guest.

    `slots_lock` is held by whoever changes memslots or attributes, across effects; a
    page fault does not take it and looks at the sequence instead. `cgroup` pays for the
    huge pages of its files; empty: the root.
    """

    name: str
    type: VmType
    lineage: Lineage
    cgroup: str = ""
    guest_pid: int = 0
    guest_alive: bool = False
    memslots: Memslots = field(default_factory=Memslots)
    attributes: MemoryAttributes = field(default_factory=MemoryAttributes)
    stage2: Stage2 = field(default_factory=Stage2)
    invalidation: Invalidation = field(default_factory=Invalidation)
    vcpus: dict[int, Vcpu] = field(default_factory=dict)
    table: Mapping[Lineage, VmRules] = field(default_factory=lambda: VM_RULES)
    """The rules of the host that is emulated: see `lineage.vm_rules_of`."""
    slots_lock: Lock = field(init=False)
    _windows: int = 0
    _changes: int = 0

    def __post_init__(self) -> None:
        self.slots_lock = Lock(f"{self.name} slots_lock")

    @property
    def traits(self) -> VmTraits:
        """What follows from its type."""
        return VM_TRAITS[self.type]

    @property
    def rules(self) -> VmRules:
        """What follows from its lineage."""
        return self.table[self.lineage]

    @property
    def guest_memfd_flags(self) -> int:
        """What KVM_CAP_GUEST_MEMFD_FLAGS answers; 0 where nothing knows it."""
        return (self.rules.flags_capability or {}).get(self.type, 0)

    @property
    def attributes_supported(self) -> MemoryAttribute:
        """What the VM's own ioctl may set (kvm_supported_mem_attributes)."""
        return (
            self.traits.attributes if self.rules.vm_attributes else MemoryAttribute(0)
        )

    @property
    def extensions(self) -> dict[Capability, int]:
        """What KVM_CHECK_EXTENSION answers on this VM and perhaps not on others."""
        answers = {
            Capability.MEMORY_ATTRIBUTES: int(self.attributes_supported),
            Capability.GUEST_MEMFD: int(self.has_gmem),
        }
        if not self.rules.vm_attributes:
            of_files = int(self.traits.attributes)
            answers[Capability.GUEST_MEMFD_MEMORY_ATTRIBUTES] = of_files
        if self.rules.flags_capability is not None:
            answers[Capability.GUEST_MEMFD_FLAGS] = self.guest_memfd_flags
        return answers

    @property
    def has_gmem(self) -> bool:
        """Whether it may have GUEST_MEMFD memslots (kvm_arch_supports_gmem)."""
        return self.traits.private_memory or self.rules.gmem_for_every_type

    def file_says(self, slot: Memslot) -> bool:
        """Tell whether a memslot's file says what is private, not the attributes."""
        asks = slot.gmem_only or (slot.has_gmem and self.rules.every_file_says)
        return asks and self.type in self.rules.files_say_private

    def invalidate_begin(self, key: Key, gfns: PgRange) -> Notice:
        """Open a bracket and zap (kvm_gmem_invalidate_begin); never waits."""
        notice = self.invalidation.begin(key, gfns)
        # A TLB flush covers what was zapped: a huge entry is more than was asked for.
        notice = replace(notice, gfns=self.stage2.widened(gfns))
        self.stage2.zap(gfns)
        return notice

    def invalidate_end(self, key: Key, gfns: PgRange) -> Notice:
        """Close a bracket; never waits."""
        return self.invalidation.end(key, gfns)

    def changing(self, gfns: PgRange, body: Op[None]) -> Op[None]:
        """Run `body` inside a bracket over `gfns` that the guest process hears of."""
        self._changes += 1
        key = self._changes
        notice = self.invalidate_begin(key, gfns)
        yield from perform(NotifyGuest(self.name, notice))
        try:
            yield from body
        finally:
            notice = self.invalidate_end(key, gfns)
            yield from perform(NotifyGuest(self.name, notice))

    def create_vcpu(self, vcpu: int) -> Vcpu:
        """KVM_CREATE_VCPU. Raises LIMIT_REACHED, VCPU_EXISTS."""
        if vcpu >= VCPUS_MAX:
            raise Exhausted(
                Reason.LIMIT_REACHED,
                f"vCPU id {vcpu} is not below {VCPUS_MAX}: use a smaller one",
                vcpu=vcpu,
            )
        if vcpu in self.vcpus:
            raise ObjectExists(
                Reason.VCPU_EXISTS,
                f"vCPU {vcpu} of {self.name} exists: use another id",
                vcpu=vcpu,
            )
        self.vcpus[vcpu] = Vcpu(vcpu)
        return self.vcpus[vcpu]

    def vcpu(self, vcpu: int) -> Vcpu:
        """Return a vCPU. Raises NoSuchObject (VCPU_UNKNOWN)."""
        if vcpu not in self.vcpus:
            raise NoSuchObject(
                Reason.VCPU_UNKNOWN,
                f"{self.name} has no vCPU {vcpu}: create it",
                vcpu=vcpu,
            )
        return self.vcpus[vcpu]

    def next_window(self) -> int:
        """Return a number that no window of the guest process ever had."""
        self._windows += 1
        return self._windows

    def guest_died(self) -> None:
        """Note that the guest process is gone: its vCPUs run no more."""
        self.guest_alive = False
        for vcpu in self.vcpus.values():
            vcpu.end()

    def require_guest(self) -> None:
        """Raise InUse (GUEST_GONE) unless the guest process lives."""
        if not self.guest_alive:
            raise InUse(
                Reason.GUEST_GONE,
                f"the guest process of {self.name} (pid {self.guest_pid}) is gone: "
                "delete the VM, create it again",
                pid=self.guest_pid,
            )

    def require_idle(self) -> None:
        """Raise InUse (VCPU_RUNNING) while a vCPU runs."""
        for vcpu in self.vcpus.values():
            if vcpu.running:
                raise InUse(
                    Reason.VCPU_RUNNING,
                    f"vCPU {vcpu.vcpu} of {self.name} runs: end its Run stream",
                    vcpu=vcpu.vcpu,
                )

    def statistics(self) -> VmStatistics:
        """Return a snapshot."""
        return VmStatistics(
            memslots=len(self.memslots),
            attribute_runs=len(self.attributes),
            stage2=self.stage2.statistics(),
            in_progress=self.invalidation.in_progress,
            vcpus=tuple(sorted(self.vcpus)),
            guest_alive=self.guest_alive,
        )
