"""A vCPU as a thread: it takes one program after another and talks to the vmm."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import fields

from gmem.vmm.core.exits import Access, Exit, Hlt
from gmem.vmm.core.program import Result, Step
from gmem.vmm.guest.memory import Memory, VcpuMemory
from gmem.vmm.guest.messages import (
    Left,
    Message,
    Missed,
    ResultOf,
    Resume,
    RunProgram,
    Stop,
    decode_program,
)
from gmem.vmm.guest.program import Program


class Stopped(Exception):  # noqa: N818 - a fact of the run, not an error
    """The run is over: its caller ended it, or it left with HLT."""


class VcpuThread(threading.Thread):
    """vCPU `vcpu`; `say` sends a message to the vmm."""

    def __init__(
        self, vcpu: int, memory: Memory, say: Callable[[Message], None]
    ) -> None:
        super().__init__(name=f"vcpu-{vcpu}", daemon=True)
        self._vcpu = vcpu
        self._memory = memory
        self._say = say
        self._programs: queue.SimpleQueue[RunProgram] = queue.SimpleQueue()
        self._replies: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._run = 0
        self._stopped = 0
        self._instruction = 0

    def hear(self, message: Message) -> None:
        """Take a message of the vmm; called by the control thread."""
        match message:
            case RunProgram():
                self._programs.put(message)
            case Stop(run=run):
                self._stopped = max(self._stopped, run)
                self._replies.put(message)
            case _:
                self._replies.put(message)

    def run(self) -> None:
        """Execute programs for ever; the process ends with its control thread."""
        while True:
            program = self._programs.get()
            self._run = program.run
            memory = VcpuMemory(self._memory, self)
            try:
                self._execute(decode_program(program.blob), memory)
            except Stopped:
                pass
            finally:
                memory.close()

    def check(self) -> None:
        """Raise Stopped when this run was ended."""
        if self._stopped >= self._run:
            raise Stopped

    def ask(self, gfn: int, npages: int, access: Access, *, write: bool) -> Message:
        """Tell the vmm of a miss and wait for what it says."""
        npages = min(npages, 1 << 31)
        self._say(
            Missed(self._vcpu, self._run, self._instruction, gfn, npages, access, write)
        )
        return self._reply()

    def leave(self, reached: Exit) -> int:
        """Exit to the vmm and wait until it is answered."""
        names = [field.name for field in fields(reached)]
        values = {name: getattr(reached, name) for name in names if name != "data"}
        blob = getattr(reached, "data", b"")
        kind = type(reached).__name__
        self._say(Left(self._vcpu, self._run, self._instruction, kind, values, blob))
        if isinstance(reached, Hlt):
            raise Stopped
        reply = self._reply()
        assert isinstance(reply, Resume), reply
        return reply.value

    def _execute(self, steps: Sequence[Step], memory: VcpuMemory) -> None:
        program = Program(self, memory)
        for index, step in enumerate(steps):
            self.check()
            self._instruction = index
            result = program.execute(step)
            if result is not None:
                self._tell(index, result)
        # A program that runs off its end halts.
        self._instruction = len(steps)
        self.leave(Hlt())

    def _tell(self, index: int, result: Result) -> None:
        said = ResultOf(
            self._vcpu,
            self._run,
            index,
            result.count,
            result.first_gpa,
            result.value,
            result.data,
        )
        self._say(said)

    def _reply(self) -> Message:
        """Return the next message of this run; what belongs to earlier runs is old."""
        while True:
            message = self._replies.get()
            self.check()
            run = getattr(message, "run", 0)
            if run == self._run and not isinstance(message, Stop):
                return message
