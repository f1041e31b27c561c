"""One Run stream: a vCPU's program, its faults resolved, its exits handed out.

A vCPU is one thread, so that everything it says is dealt with in order, here. What
it asks runs as operations of the service, which end by themselves (V9), whether or not
the caller is still there.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

from gmem.api.vmm.v1 import vmm_pb2 as pb
from gmem.runtime.drive import Runner
from gmem.vmm import codec
from gmem.vmm.core import policy
from gmem.vmm.core.exits import (
    Access,
    Exit,
    Hlt,
    Mapped,
    MemoryFault,
    NoSlot,
    Retry,
)
from gmem.vmm.core.fault import Fault, fault
from gmem.vmm.core.vcpu import VcpuEvent
from gmem.vmm.core.vm import Vm
from gmem.vmm.guest.messages import (
    Emulate,
    Left,
    MapFrames,
    Message,
    Missed,
    ResultOf,
    Resume,
    TryAgain,
    encode_program,
)
from gmem.vmm.guests import Guest
from gmem.vmm.program_codec import RunOrder


class VcpuRun:
    """A program on one vCPU; leaving the `with` takes the vCPU out of it."""

    def __init__(self, vm: Vm, guest: Guest, runner: Runner, order: RunOrder) -> None:
        """Raises VCPU_UNKNOWN, GUEST_GONE, VCPU_RUNNING."""
        self._vm = vm
        self._guest = guest
        self._runner = runner
        self._policy = order.policy
        self._vcpu = vm.vcpu(order.vcpu)
        vm.require_guest()
        guest.require_alive()
        self._run = self._vcpu.start()
        self._heard: asyncio.Queue[Message | None] = guest.begin_run(
            order.vcpu, self._run, encode_program(order.program)
        )
        self._results: list[pb.Result] = []
        self.halted = False
        """Whether the program is over."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._guest.end_run(self._vcpu.vcpu, self._run)
        self._vcpu.end()

    async def next_exit(self) -> pb.RunResponse:
        """Let the guest run until it leaves; return the exit for the caller.

        Raises InUse (GUEST_GONE), TransportError where guest_memfd does not answer.
        """
        while True:
            message = await self._heard.get()
            if message is None:
                self._vm.guest_died()
                self._vm.require_guest()
            reached = await self._hear(message)
            if reached is not None:
                return reached

    def resume(self, value: int) -> None:
        """Answer the exit before. Raises InUse (STATE_WRONG, GUEST_GONE)."""
        self._vm.require_guest()
        self._vcpu.step(VcpuEvent.RESUME)
        self._send_resume(value)

    async def _hear(self, message: Message | None) -> pb.RunResponse | None:
        match message:
            case ResultOf():
                self._results.append(codec.result_of(message))
                return None
            case Left(instruction=instruction):
                return await self._left(instruction, codec.exit_of(message))
            case Missed():
                return await self._missed(message)
            case _:
                raise AssertionError(f"a vCPU does not say {message}")

    async def _missed(self, missed: Missed) -> pb.RunResponse | None:
        request = Fault(missed.gfn, missed.npages, Access(missed.access), missed.write)
        outcome = await self._runner.run(fault(self._vm, request))
        vcpu, run = self._vcpu.vcpu, self._run
        match outcome:
            case MemoryFault():
                return await self._left(missed.instruction, outcome)
            case NoSlot():
                self._guest.send(Emulate(vcpu, run))
            case Retry(seq=seq):
                self._guest.send(TryAgain(vcpu, run, seq))
            case Mapped():
                self._guest.send(self._mapping(outcome))
        return None

    def _mapping(self, mapped: Mapped) -> Message:
        vcpu, run = self._vcpu.vcpu, self._run
        # Between the core's step and this one an invalidation may have begun, whose
        # notice is on its way already: a mapping behind it would outlive it.
        invalidation = self._vm.invalidation
        if invalidation.must_retry(mapped.seq, mapped.gfns):
            return TryAgain(vcpu, run, invalidation.seq)
        return MapFrames(
            vcpu,
            run,
            mapped.gfns.start,
            mapped.gfns.stop,
            mapped.window,
            mapped.private,
            mapped.writable,
        )

    async def _left(self, instruction: int, reached: Exit) -> pb.RunResponse | None:
        self._vcpu.step(VcpuEvent.EXIT)
        op = policy.answer(self._vm, self._policy, reached)
        answered = await self._runner.run(op)
        if isinstance(answered, int):
            self.resume(answered)
            return None
        self.halted = isinstance(answered, Hlt)
        results, self._results = self._results, []
        return codec.exit_to_wire(instruction, results, answered)

    def _send_resume(self, value: int) -> None:
        self._guest.send(Resume(self._vcpu.vcpu, self._run, value))
