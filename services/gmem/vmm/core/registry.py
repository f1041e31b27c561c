"""The VMs of one vmm: made, found and ended by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from gmem.effects import Mode, Op, holding, perform
from gmem.uapi.errors import (
    BadRequest,
    Exhausted,
    NoSuchObject,
    ObjectExists,
    Reason,
)
from gmem.uapi.flags import VmType
from gmem.uapi.lineage import Lineage
from gmem.vmm.core.effects import EndGuest, StartGuest
from gmem.vmm.core.lineage import VM_RULES, VmRules
from gmem.vmm.core.set_region import delete_memslot
from gmem.vmm.core.vm import Vm

VMS_MAX: Final = 64
"""Each VM is a process."""
VM_ID: Final = re.compile(r"[a-z0-9-]{1,63}")


class VmRegistry:
    """The VMs of one vmm process on host `host`."""

    def __init__(self, host: str, rules: Mapping[Lineage, VmRules] = VM_RULES) -> None:
        self._host = host
        self.rules = rules
        self._vms: dict[str, Vm] = {}
        # Names that are taken by a VM whose guest process is still starting.
        self._starting: set[str] = set()

    def __len__(self) -> int:
        """Return the number of VMs."""
        return len(self._vms)

    def names(self) -> list[str]:
        """Return the names of all VMs, sorted."""
        return sorted(self._vms)

    def get(self, name: str) -> Vm:
        """Return a VM by its resource name. Raises NoSuchObject (VM_UNKNOWN)."""
        if name not in self._vms:
            raise NoSuchObject(
                Reason.VM_UNKNOWN,
                f"no VM is called {name!r}: see ListVms, or create it",
                name=name,
            )
        return self._vms[name]

    def adopt(self, vm: Vm) -> None:
        """Have a VM of a predecessor, whose guest process is gone."""
        assert vm.name not in self._vms, vm.name
        self._vms[vm.name] = vm

    def create(
        self, vm_id: str, vm_type: VmType, lineage: Lineage, cgroup: str = ""
    ) -> Op[Vm]:
        """KVM_CREATE_VM: start the guest process, then let the VM be seen.

        Raises BadRequest (ARGUMENT_INVALID), ObjectExists (VM_EXISTS), Exhausted
        (LIMIT_REACHED), InUse (GUEST_GONE) where the guest process does not start.
        """
        name = self._require_new(vm_id)
        vm = Vm(name, vm_type, lineage, cgroup, table=self.rules)

        self._starting.add(name)
        try:
            vm.guest_pid = yield from perform(StartGuest(name))
        finally:
            self._starting.discard(name)
        vm.guest_alive = True
        self._vms[name] = vm
        return vm

    def delete(self, name: str) -> Op[None]:
        """End a VM: memslots unbound, guest process gone.

        Raises NoSuchObject (VM_UNKNOWN), InUse (VCPU_RUNNING).
        """
        vm = self.get(name)
        yield from holding(vm.slots_lock, Mode.EXCLUSIVE, self._delete(vm))

    def _delete(self, vm: Vm) -> Op[None]:
        # Another delete may have come first while this one waited for the lock.
        self.get(vm.name)
        vm.require_idle()
        for slot in list(vm.memslots):
            yield from delete_memslot(vm, slot.region.slot)
        vm.guest_died()
        yield from perform(EndGuest(vm.name))
        del self._vms[vm.name]

    def _require_new(self, vm_id: str) -> str:
        if not VM_ID.fullmatch(vm_id):
            raise BadRequest(
                Reason.ARGUMENT_INVALID,
                f"vm_id {vm_id!r} is no name of 1 to 63 of [a-z0-9-]: use a short one",
                vm_id=vm_id,
            )
        name = f"hosts/{self._host}/vms/{vm_id}"
        if name in self._vms or name in self._starting:
            raise ObjectExists(
                Reason.VM_EXISTS, f"{name} exists: use another id, or delete it"
            )
        if len(self._vms) + len(self._starting) >= VMS_MAX:
            raise Exhausted(
                Reason.LIMIT_REACHED,
                f"{VMS_MAX} VMs are all this vmm has: delete one",
                vms=VMS_MAX,
            )
        return name
