"""A Run stream against a guest that only writes down what it is told."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from gmem.effects import Op
from gmem.uapi.errors import InUse, Reason
from gmem.uapi.pages import PgRange
from gmem.vmm.core.exits import Access, Mapped, MemoryFault, Retry
from gmem.vmm.core.policy import Policy
from gmem.vmm.core.vm import Vm
from gmem.vmm.guest.messages import (
    Left,
    MapFrames,
    Message,
    Missed,
    Resume,
    TryAgain,
)
from gmem.vmm.program_codec import RunOrder
from gmem.vmm.run import VcpuRun
from tests.support.vmm_world import World, new_vm

MISSED = Missed(0, 1, 0, gfn=7, npages=1, access=Access.BY_ATTRIBUTE, write=False)
FOUND = Mapped(PgRange(7, 8), 3, private=False, writable=True, seq=0)


class Guest:
    """Stands in for the guest process."""

    def __init__(self) -> None:
        self.told: list[Message] = []
        self.heard: asyncio.Queue[Message | None] = asyncio.Queue()
        self.ended = 0

    def require_alive(self) -> None:
        pass

    def begin_run(self, vcpu: int, run: int, program: bytes) -> Any:
        return self.heard

    def end_run(self, vcpu: int, run: int) -> None:
        self.ended += 1

    def send(self, message: Message) -> None:
        self.told.append(message)


class Runner:
    """Answers a fault with `outcome`; `meanwhile` happens before it is heard of."""

    def __init__(self, vm: Vm, outcome: Any, *, invalidated: bool = False) -> None:
        self._vm = vm
        self._outcome = outcome
        self._invalidated = invalidated

    async def run(self, op: Op[Any]) -> Any:
        if op.__name__ != "fault":  # type: ignore[attr-defined]
            return World().run(op)
        op.close()
        if self._invalidated:
            self._vm.invalidate_begin("guest_memfd", PgRange(7, 8))
        return self._outcome


def made(vm: Vm, guest: Guest, runner: Runner) -> VcpuRun:
    order = RunOrder(vm.name, 0, [], Policy.NONE)
    return VcpuRun(vm, cast("Any", guest), cast("Any", runner), order)


@pytest.mark.parametrize(
    ("outcome", "invalidated", "told"),
    [
        (FOUND, False, MapFrames(0, 1, 7, 8, 3, private=False, writable=True)),
        # Its notice went out before: a mapping told after it would outlive it.
        (FOUND, True, TryAgain(0, 1, 1)),
        (Retry(5), False, TryAgain(0, 1, 5)),
    ],
)
async def test_fault_is_answered_with_what_is_still_true(
    outcome: Any, invalidated: bool, told: Message
) -> None:
    vm, guest = new_vm(), Guest()
    vm.create_vcpu(0)
    guest.heard.put_nowait(MISSED)
    guest.heard.put_nowait(Left(0, 1, 0, "Hlt", {}))
    with made(vm, guest, Runner(vm, outcome, invalidated=invalidated)) as run:
        await run.next_exit()
        assert run.halted
    assert guest.told == [told]
    assert (guest.ended, vm.vcpu(0).running) == (1, False)


async def test_memory_fault_is_resumed_by_its_caller() -> None:
    vm, guest = new_vm(), Guest()
    vm.create_vcpu(0)
    guest.heard.put_nowait(MISSED)
    with made(vm, guest, Runner(vm, MemoryFault(8, 0x7000))) as run:
        with pytest.raises(InUse) as refused:
            run.resume(0)
        assert refused.value.reason is Reason.STATE_WRONG
        response = await run.next_exit()
        assert response.memory_fault.gpa == 0x7000
        run.resume(9)
    assert guest.told == [Resume(0, 1, 9)]


async def test_death_of_the_guest_ends_the_stream() -> None:
    vm, guest = new_vm(), Guest()
    vm.create_vcpu(0)
    guest.heard.put_nowait(None)
    with made(vm, guest, Runner(vm, None)) as run:
        with pytest.raises(InUse) as refused:
            await run.next_exit()
        assert refused.value.reason is Reason.GUEST_GONE
    assert not vm.guest_alive


async def test_second_run_of_a_vcpu_is_refused_and_disturbs_nothing() -> None:
    vm, guest = new_vm(), Guest()
    vm.create_vcpu(0)
    with made(vm, guest, Runner(vm, None)):
        with pytest.raises(InUse) as refused:
            made(vm, guest, Runner(vm, None))
        assert refused.value.reason is Reason.VCPU_RUNNING
        assert vm.vcpu(0).running
