"""What of the VMs must survive, as rows: incrementally out, and back in.

    vm/NAME/head            its type, lineage, cgroup, vCPUs, the guest process it had
    vm/NAME/slot/SLOT       a memslot
    vm/NAME/attr/GFN        the attributes from this frame on

A vmm that is killed takes the guest processes with it, and the descriptors that its
clients had given: nobody can give a guest its registers back. So a VM comes back with
its guest gone: it can be looked at, and deleted, which unbinds its memslots; whoever
runs it again makes it again, and gives the descriptors again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from gmem.uapi.flags import MemoryAttribute, VmType
from gmem.uapi.lineage import Lineage
from gmem.vmm.core.lineage import VmRules
from gmem.vmm.core.memslots import Memslot, Region, Userspace
from gmem.vmm.core.registry import VmRegistry
from gmem.vmm.core.vcpu import Vcpu
from gmem.vmm.core.vm import Vm

Changes: TypeAlias = dict[str, Any]


class VmRows:
    """Tells what of the VMs of `registry` has changed since it told last."""

    def __init__(self, registry: VmRegistry) -> None:
        """Follow `registry`; VMs that it has were restored from all of their rows."""
        self._registry = registry
        self._told: dict[str, Changes] = {}
        self.changes()

    def changes(self) -> Changes:
        """Return the rows that have changed, None for those that are gone."""
        names = self._registry.names()
        rows: Changes = {}
        for name in self._told.keys() - set(names):
            del self._told[name]
            rows[f"{_base(name)}/"] = None
        for name in names:
            rows |= self._changes_of(self._registry.get(name))
        return rows

    def _changes_of(self, vm: Vm) -> Changes:
        base, told = _base(vm.name), self._told.get(vm.name, {})
        now: Changes = {f"{base}/head": _head(vm)}
        for slot in vm.memslots:
            now[f"{base}/slot/{slot.region.slot}"] = _slot_row(slot)
        self._told[vm.name] = now
        rows: Changes = dict.fromkeys(sorted(told.keys() - now.keys()))
        rows |= {key: row for key, row in now.items() if told.get(key) != row}
        for start, value in vm.attributes.drain().items():
            rows[f"{base}/attr/{start}"] = None if value is None else int(value)
        return rows


def restore(registry: VmRegistry, rows: Mapping[str, Any]) -> None:
    """Put the VMs whose changes left `rows` into an empty registry, guests gone."""
    parts: dict[str, dict[str, Any]] = {}
    for key, row in rows.items():
        if key.startswith("vm/"):
            _, name, rest = key.split("/", 2)
            parts.setdefault(name, {})[rest] = row
    for _, part in sorted(parts.items()):
        registry.adopt(_restore(part, registry.rules))


def _restore(rows: Mapping[str, Any], table: Mapping[Lineage, VmRules]) -> Vm:
    head = rows["head"]
    kind, lineage = VmType(head["type"]), Lineage(head["lineage"])
    vm = Vm(head["name"], kind, lineage, head["cgroup"], table=table)
    vm.guest_pid = head["guest_pid"]
    vm.vcpus = {number: Vcpu(number) for number in head["vcpus"]}
    attributes: dict[int, MemoryAttribute] = {}
    for key, row in rows.items():
        what, _, rest = key.partition("/")
        if what == "slot":
            vm.memslots.put(_slot_of(int(rest), row))
        elif what == "attr":
            attributes[int(rest)] = MemoryAttribute(row)
    vm.attributes.reset(attributes)
    return vm


def _base(name: str) -> str:
    return f"vm/{name.rpartition('/')[2]}"


def _head(vm: Vm) -> Changes:
    return {
        "name": vm.name,
        "type": int(vm.type),
        "lineage": vm.lineage.value,
        "cgroup": vm.cgroup,
        "guest_pid": vm.guest_pid,
        "vcpus": sorted(vm.vcpus),
    }


def _slot_row(slot: Memslot) -> Changes:
    region, side = slot.region, slot.region.userspace
    return {
        "flags": region.flags,
        "gpa": region.guest_phys_addr,
        "size": region.memory_size,
        "userspace": None if side is None else [side.descriptor, side.offset],
        "guest_memfd": region.guest_memfd,
        "offset": region.guest_memfd_offset,
        "gmem_only": slot.gmem_only,
    }


def _slot_of(number: int, row: Mapping[str, Any]) -> Memslot:
    side = row["userspace"]
    region = Region(
        number,
        row["flags"],
        row["gpa"],
        row["size"],
        None if side is None else Userspace(*side),
        row["guest_memfd"],
        row["offset"],
    )
    # No guest process has a window.
    return Memslot(region, None, None, gmem_only=row["gmem_only"])
