"""The runner: what is a pass, a fail, a skip, a deviation, and an unused one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gmem.testing.conformance import deviations, runner
from gmem.testing.conformance.deviations import Deviation
from gmem.testing.conformance.kvm import RFC_V2, Backend, Capabilities, Feature, Vm
from gmem.testing.conformance.registry import Case, Planned
from gmem.testing.conformance.runner import CaseResult, Outcome
from gmem.testing.conformance.scene import CaseSkipped, Scene
from gmem.uapi.flags import VmType
from gmem.uapi.pages import PAGE_SIZE

ROW = Deviation(4, "mmap", "somehow", "EINVAL", "0", ("C072",), (RFC_V2,))


class Kernel(Backend):
    """A kernel without anything, which leaves behind what it is told."""

    name = "emulator"

    def __init__(self) -> None:
        self.left: list[str] = []

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            {RFC_V2: (PAGE_SIZE,)},
            frozenset({Feature.PINS}),
            {Feature.NUMA: "this machine has one node"},
        )

    def create_vm(self, *, lineage: str, vm_type: VmType) -> Vm:
        raise NotImplementedError

    def leftovers(self) -> list[str]:
        return self.left

    def close(self) -> None:
        pass


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(deviations, "DEVIATIONS", {"emulator": (ROW,)})
    monkeypatch.setattr(runner, "DEVIATIONS", {"emulator": (ROW,)})
    return Kernel()


def run(
    kernel: Kernel, body: Callable[[Scene], None], *needs: Feature, number: str = "C072"
) -> CaseResult:
    made = Case(number, body, (RFC_V2,), (PAGE_SIZE,), ("",), frozenset(needs))
    return runner.run_one(kernel, Planned(made, RFC_V2, PAGE_SIZE, ""))


def as_listed(scene: Scene) -> None:
    scene.expect("mmap", "somehow", "EINVAL", "EINVAL")


def deviating(scene: Scene) -> None:
    scene.expect("mmap", "somehow", "EINVAL", "0")


def test_what_the_list_says_is_a_pass(kernel: Kernel) -> None:
    assert run(kernel, as_listed).outcome is Outcome.PASS


def test_a_difference_on_purpose_is_a_deviation_and_is_named(kernel: Kernel) -> None:
    result = run(kernel, deviating)
    assert (result.outcome, result.met) == (Outcome.DEVIATION, (ROW,))
    assert result.reason.startswith("deviation 4: mmap, somehow: EINVAL in Linux")


@pytest.mark.parametrize(
    ("call", "condition", "want", "got"),
    [
        ("munmap", "somehow", "EINVAL", "0"),
        ("mmap", "otherwise", "EINVAL", "0"),
        ("mmap", "somehow", "ENODEV", "0"),
        ("mmap", "somehow", "EINVAL", "EPERM"),
    ],
)
def test_a_deviation_matches_call_condition_and_both_results(
    kernel: Kernel, call: str, condition: str, want: str, got: str
) -> None:
    result = run(kernel, lambda scene: scene.expect(call, condition, want, got))
    assert result.outcome is Outcome.FAIL
    assert result.reason == f"{call}, {condition}: {got} instead of {want}"


def test_another_kernel_has_no_deviations(kernel: Kernel) -> None:
    kernel.name = "kernel"
    assert run(kernel, deviating).outcome is Outcome.FAIL


def test_what_is_left_behind_is_a_fail(kernel: Kernel) -> None:
    kernel.left = ["a VM is there"]
    result = run(kernel, as_listed)
    assert (result.outcome, result.reason) == (
        Outcome.FAIL,
        "left behind: a VM is there",
    )


def test_a_crash_of_a_case_is_a_fail(kernel: Kernel) -> None:
    result = run(kernel, lambda scene: scene.expect("x", "y", 1, int("z")))
    assert result.outcome is Outcome.FAIL
    assert result.reason.startswith("ValueError: ")


def test_what_the_kernel_lacks_is_a_skip_with_its_reason(kernel: Kernel) -> None:
    assert run(kernel, as_listed, Feature.PINS).outcome is Outcome.PASS
    result = run(kernel, as_listed, Feature.PINS, Feature.NUMA)
    assert (result.outcome, result.reason) == (
        Outcome.SKIP,
        "this machine has one node",
    )


def test_a_case_may_find_out_itself_that_it_cannot_be_played(kernel: Kernel) -> None:
    def skipping(scene: Scene) -> None:
        raise CaseSkipped("no such page")

    result = run(kernel, skipping)
    assert (result.outcome, result.reason) == (Outcome.SKIP, "no such page")


def test_an_unused_deviation_is_a_fail(kernel: Kernel) -> None:
    passed, met = run(kernel, as_listed), run(kernel, deviating)
    (unused,) = runner.unused(kernel, RFC_V2, [passed])
    assert (unused.outcome, unused.id) == (Outcome.FAIL, "deviation 4")
    assert list(runner.unused(kernel, RFC_V2, [passed, met])) == []
    # Where its cases were not run nobody can say.
    assert list(runner.unused(kernel, RFC_V2, [])) == []
