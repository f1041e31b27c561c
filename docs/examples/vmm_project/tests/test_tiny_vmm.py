"""The VMM against an emulated host: real files, a real guest, real SIGBUS."""

from __future__ import annotations

import signal

import pytest
from tiny_vmm import TinyVmm

from gmem.testing.conformance.guest import MapGpaRange, Store, Verify
from gmem.testing.conformance.kvm import GuestMemfd, Vm
from gmem.testing.conformance.toucher import Died, Window
from gmem.testing.plugin import GPA
from gmem.uapi.pages import PAGE_SIZE

pytestmark = [
    pytest.mark.gmem(lineages=["RFC_V2"], page_sizes=["4K", "1G"]),
    pytest.mark.usefixtures("gmem_audit"),
]


@pytest.fixture
def vmm(gmem_vm: Vm, gmem_inode: GuestMemfd) -> TinyVmm:
    """The VMM that is tested."""
    return TinyVmm(gmem_vm, gmem_inode, GPA)


def test_guest_and_host_share_memory(vmm: TinyVmm, guest_memory: Window) -> None:
    """Each reads what the other wrote."""
    guest_memory.store(0, b"A")
    (seen,) = vmm.run(Verify(GPA, 1, ord("A")), Store(GPA, b"B"))
    assert seen.count == 0
    assert guest_memory.load(0) == b"B"


def test_private_memory_is_sigbus_for_the_host(
    vmm: TinyVmm, guest_memory: Window
) -> None:
    """What the guest made private kills a host that looks."""
    (asked,) = vmm.run(MapGpaRange(GPA, 1, private=True), Store(GPA, b"secret"))
    assert asked.value == 0
    assert guest_memory.load(0) == Died(signal.SIGBUS)


def test_what_becomes_shared_again_is_seen(vmm: TinyVmm, guest_memory: Window) -> None:
    """The guest hands a result out."""
    vmm.run(
        MapGpaRange(GPA, 1, private=True),
        Store(GPA, b"result"),
        MapGpaRange(GPA, 1, private=False),
    )
    assert guest_memory.load(0, 6) == b"result"


@pytest.mark.gmem(lineages=["RFC_V2"], page_sizes=["4K"])
def test_the_guest_hears_of_a_refused_conversion(
    vmm: TinyVmm, gmem_inode: GuestMemfd
) -> None:
    """A page is in use, so that it cannot become private."""
    with gmem_inode.pin(0, PAGE_SIZE):
        (asked,) = vmm.run(MapGpaRange(GPA, 1, private=True))
    assert asked.value != 0, "the guest believes that its shared page is private"
