"""docs/kernel-calls.md names what there is: each rpc, each flag, each lineage."""

from __future__ import annotations

import re

import pytest

from gmem.api.guest_memfd.v1 import guest_memfd_pb2
from gmem.api.host_allocator.v1 import host_allocator_pb2
from gmem.api.vmm.v1 import vmm_pb2
from gmem.uapi import flags
from gmem.uapi.lineage import Lineage
from tests.support.sources import REPOSITORY

TEXT = (REPOSITORY / "docs" / "kernel-calls.md").read_text()
# No call of a kernel: what only an emulator has, or needs.
OURS = {"Watch", "ListVms", "ListGuestMemfds", "InjectMemoryError", "UnpoisonMemory"}
SERVICES = {
    "vmm": vmm_pb2.DESCRIPTOR.services_by_name["VmmService"],
    "guest_memfd": guest_memfd_pb2.DESCRIPTOR.services_by_name["GuestMemfdService"],
}
NAMES = re.compile(r"`(\w+)[(`]")


@pytest.mark.parametrize("service", SERVICES)
def test_every_rpc_of_a_vmm_has_a_row(service: str) -> None:
    named = set(NAMES.findall(TEXT))
    assert {rpc.name for rpc in SERVICES[service].methods} - OURS - named == set()


def test_rpcs_that_are_named_exist() -> None:
    services = [
        *SERVICES.values(),
        host_allocator_pb2.DESCRIPTOR.services_by_name["HostAllocatorService"],
    ]
    rpcs = {rpc.name for service in services for rpc in service.methods}
    for service, cell in re.findall(
        r"\b(vmm|guest_memfd|host_allocator) ((?:`\w+(?:\([^`]*\))?`(?:, )?)+)", TEXT
    ):
        for name in re.findall(r"`(\w+)", cell):
            assert name in rpcs, (service, name)


def test_constants_that_are_named_exist() -> None:
    names = set(re.findall(r"`((?:KVM_GUEST_MEMFD_|GUEST\w*_|IN_PLACE_)\w+)`", TEXT))
    assert names
    assert {name for name in names if not hasattr(flags, name)} == set()


def test_every_lineage_has_its_letters() -> None:
    assert {word for word in Lineage if f"(`{word}`)" not in TEXT} == set()
    rows = [line for line in TEXT.splitlines() if line.startswith("| ")]
    letters = {row.rstrip(" |").rpartition("| ")[2] for row in rows}
    letters -= {"lineages", ""}
    parts = {part for cell in letters for part in cell.split(", ")}
    assert parts == {"all", "V1", "V2", "IP", "ML"}
