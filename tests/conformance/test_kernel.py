"""The kernel of this machine, asked what the emulated hosts are asked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import gmem.testing.conformance.cases as _cases
from gmem.testing.conformance.backends import this_machine
from gmem.testing.conformance.dialect import DIALECTS
from gmem.testing.conformance.guest import (
    Fill,
    Halted,
    Instruction,
    IoExit,
    Load,
    MmioExit,
    Out,
    Result,
    Store,
    Verify,
)
from gmem.testing.conformance.kernel import Kernel, NoKernelError
from gmem.testing.conformance.kvm import MAINLINE, GuestMemfd, Userspace, Vm
from gmem.testing.conformance.outcomes import outcome_of
from gmem.testing.conformance.registry import Planned, plan
from gmem.testing.conformance.runner import Outcome, run_all, run_one
from gmem.testing.conformance.scene import GPA
from gmem.testing.conformance.toucher import Toucher
from gmem.uapi.flags import KVM_MEM_GUEST_MEMFD, Capability, VmType
from gmem.uapi.pages import PAGE_SIZE

pytestmark = pytest.mark.conformance

assert _cases.__doc__  # Loading it registers the cases.
PLANNED = [one for one in plan(known=[MAINLINE]) if one.page_size == PAGE_SIZE]
PAGES = 4


@pytest.fixture(scope="module")
def kernel() -> Iterator[Kernel]:
    try:
        found = Kernel()
    except NoKernelError as missing:
        pytest.skip(str(missing))
    with found:
        yield found


@pytest.fixture
def vm(kernel: Kernel) -> Iterator[Vm]:
    made = kernel.create_vm(lineage=MAINLINE, vm_type=VmType.DEFAULT)
    yield made
    made.close()


@pytest.fixture
def file(vm: Vm) -> Iterator[GuestMemfd]:
    """A file bound at GPA, and a vCPU."""
    made = vm.create_guest_memfd(PAGES * PAGE_SIZE, DIALECTS[MAINLINE].shared)
    vm.set_user_memory_region2(
        slot=0,
        flags=KVM_MEM_GUEST_MEMFD,
        guest_phys_addr=GPA,
        memory_size=made.size,
        guest_memfd=made,
    )
    vm.create_vcpu()
    yield made
    made.close()


@pytest.mark.parametrize("planned", PLANNED, ids=str)
def test_case(kernel: Kernel, planned: Planned) -> None:
    result = run_one(kernel, planned)
    if result.outcome is Outcome.SKIP:
        pytest.skip(result.reason)
    assert result.outcome is not Outcome.FAIL, result.reason


def test_a_guest_and_the_host_see_what_the_other_wrote(
    vm: Vm, file: GuestMemfd
) -> None:
    with Toucher(file) as toucher:
        window = toucher.map(file.size)
        window.fill(0xAA)
        program: list[Instruction] = [
            Verify(GPA, file.size, 0xAA),
            Store(GPA + PAGE_SIZE - 1, b"ABC"),
            Load(GPA + PAGE_SIZE - 2, 5),
            Fill(GPA + 2 * PAGE_SIZE, 2 * PAGE_SIZE, 0xFF),
        ]
        with vm.run(program) as run:
            (left,) = run.exits()
        assert left == Halted((Result(), Result(data=b"\xaaABC\xaa")))
        assert window.load(PAGE_SIZE - 2, 5) == b"\xaaABC\xaa"
        assert window.count_other(0xFF, 2 * PAGE_SIZE) == 0


def test_a_guest_leaves_with_io_and_goes_on(vm: Vm, file: GuestMemfd) -> None:
    exits = []
    with vm.run([Store(GPA, b"A"), Out(0x3F8, 0x12345678), Load(GPA, 1)]) as run:
        for left in run.exits():
            exits.append(left)
            run.resume()
    assert exits == [
        IoExit(0x3F8, 0x12345678),
        Halted((Result(data=b"A"),)),
    ]


def test_a_guest_outside_the_memslots_gets_what_the_vmm_answers(
    vm: Vm, file: GuestMemfd
) -> None:
    exits = []
    with vm.run([Load(GPA + file.size, 1)]) as run:
        for left in run.exits():
            exits.append(left)
            run.resume(0x5A)
    assert exits == [
        MmioExit(GPA + file.size, 1, is_write=False),
        Halted((Result(data=b"\x5a"),)),
    ]


@pytest.mark.parametrize(("offset", "want"), [(0, "0"), (1, "EINVAL")])
def test_a_userspace_address_is_as_unaligned_as_its_offset(
    vm: Vm, file: GuestMemfd, offset: int, want: str
) -> None:
    got = outcome_of(
        vm.set_user_memory_region2,
        slot=1,
        guest_phys_addr=2 * GPA,
        memory_size=PAGE_SIZE,
        userspace=Userspace(file, offset),
    )
    assert got == want


def test_pre_fault_is_answered_by_the_kernel(vm: Vm, file: GuestMemfd) -> None:
    result = vm.pre_fault_memory(GPA, PAGE_SIZE)
    if vm.check_extension(Capability.PRE_FAULT_MEMORY):
        assert result == ("0", GPA + PAGE_SIZE, 0)
    else:
        assert result[0] in {"ENOTTY", "EINVAL", "EOPNOTSUPP"}


def test_a_machine_without_the_device_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(NoKernelError, match="No such file"):
        Kernel(tmp_path / "kvm")


def test_where_there_is_no_kernel_each_case_is_skipped_and_says_why(
    tmp_path: Path,
) -> None:
    with this_machine(tmp_path / "kvm") as absent:
        results = list(run_all(absent, plan(absent)))
        with pytest.raises(NoKernelError, match="No such file"):
            absent.create_vm(lineage=MAINLINE, vm_type=VmType.DEFAULT)
    assert len(results) == len(PLANNED)
    assert {result.outcome for result in results} == {Outcome.SKIP}
    assert all("No such file" in result.reason for result in results)


def test_a_device_that_is_another_says_so() -> None:
    with pytest.raises(NoKernelError, match="KVM_GET_API_VERSION fails with ENOTTY"):
        Kernel(Path("/dev/null"))
