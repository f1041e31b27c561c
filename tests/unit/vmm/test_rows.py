"""VMs that are made again from their rows are the same VMs, with their guests gone."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from gmem.uapi.errors import InUse, Reason
from gmem.uapi.flags import KVM_MEM_GUEST_MEMFD, MemoryAttribute, VmType
from gmem.uapi.lineage import Lineage
from gmem.uapi.pages import PAGE_SIZE, PgRange
from gmem.vmm.core.memslots import Memslot, Region, Userspace
from gmem.vmm.core.registry import VmRegistry
from gmem.vmm.core.rows import VmRows, restore
from gmem.vmm.core.vm import Vm
from tests.support.rows import apply

SEED = 3
GPA = 1 << 20


def vm_of(registry: VmRegistry, name: str) -> Vm:
    vm = Vm(f"hosts/h/vms/{name}", VmType.SW_PROTECTED, Lineage.RFC_V1)
    vm.guest_pid, vm.guest_alive = 77, True
    vm.create_vcpu(2)
    registry.adopt(vm)
    return vm


def slot(number: int, size: int = 4 * PAGE_SIZE) -> Memslot:
    gpa = GPA + number * size
    region = Region(
        number, KVM_MEM_GUEST_MEMFD, gpa, size, Userspace("d/1", 0), "hosts/h/gm/1", 0
    )
    return Memslot(region, 1, 2)


def again(rows: dict[str, Any]) -> VmRegistry:
    registry = VmRegistry("h")
    restore(registry, json.loads(json.dumps(rows)))
    return registry


def test_a_vm_comes_back_with_its_guest_gone() -> None:
    registry = VmRegistry("h")
    teller = VmRows(registry)
    vm = vm_of(registry, "a")
    vm.memslots.put(slot(0))
    vm.memslots.put(slot(1))
    vm.attributes.store(PgRange(256, 258), MemoryAttribute.PRIVATE)
    rows = apply({}, teller.changes())
    vm.memslots.remove(0)
    apply(rows, teller.changes())

    found = again(rows).get(vm.name)
    assert [s.region for s in found.memslots] == [slot(1).region]
    assert not found.guest_alive
    assert (found.guest_pid, sorted(found.vcpus)) == (77, [2])
    everything = PgRange(0, 1 << 30)
    assert list(found.attributes.runs(everything)) == list(
        vm.attributes.runs(everything)
    )
    with pytest.raises(InUse) as caught:
        found.require_guest()
    assert caught.value.reason is Reason.GUEST_GONE


def test_only_changes_are_told_and_a_deleted_vm_leaves_nothing() -> None:
    registry = VmRegistry("h")
    teller = VmRows(registry)
    vm = vm_of(registry, "a")
    rows = apply({}, teller.changes())
    assert teller.changes() == {}
    vm.attributes.store(PgRange(8, 16), MemoryAttribute.PRIVATE)
    assert teller.changes() == {"vm/a/attr/8": 8, "vm/a/attr/16": 0}
    registry._vms.clear()
    assert apply(rows, teller.changes()) == {}


def test_attributes_survive_any_history() -> None:
    chance = random.Random(SEED)
    registry = VmRegistry("h")
    teller = VmRows(registry)
    vm = vm_of(registry, "a")
    rows: dict[str, Any] = {}
    for _ in range(300):
        start = chance.randrange(64)
        value = chance.choice((MemoryAttribute.PRIVATE, MemoryAttribute.SHARED))
        vm.attributes.store(PgRange(start, start + chance.randrange(1, 20)), value)
        apply(rows, teller.changes())
        found = again(rows).get(vm.name).attributes
        span = PgRange(0, 128)
        assert list(found.runs(span)) == list(vm.attributes.runs(span))
