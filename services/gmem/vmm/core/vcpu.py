"""One vCPU: where it is, and which step may follow. What is absent is illegal."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from gmem.uapi.errors import InUse, Reason


class VcpuState(Enum):
    """Where a vCPU is."""

    IDLE = "idle"
    IN_GUEST = "in the guest"
    IN_VMM = "in the vmm"


class VcpuEvent(Enum):
    """What happens to a vCPU."""

    START = "start"
    EXIT = "exit"
    RESUME = "resume"
    END = "end"


TRANSITIONS: Final = {
    (VcpuState.IDLE, VcpuEvent.START): VcpuState.IN_GUEST,
    (VcpuState.IN_GUEST, VcpuEvent.EXIT): VcpuState.IN_VMM,
    (VcpuState.IN_VMM, VcpuEvent.RESUME): VcpuState.IN_GUEST,
    # HLT, the death of the guest process, or a caller that went away.
    (VcpuState.IN_GUEST, VcpuEvent.END): VcpuState.IDLE,
    (VcpuState.IN_VMM, VcpuEvent.END): VcpuState.IDLE,
    # No (IN_GUEST, START): a vCPU is one thread.
    # No (IN_GUEST, RESUME): there is no exit to answer.
}

_REASON_OF: Final = {
    VcpuEvent.START: Reason.VCPU_RUNNING,
}


@dataclass(slots=True)
class Vcpu:
    """A vCPU of a VM; `run` numbers its programs, so that a late message is known."""

    vcpu: int
    state: VcpuState = VcpuState.IDLE
    run: int = 0

    @property
    def running(self) -> bool:
        """Whether a Run stream holds it."""
        return self.state is not VcpuState.IDLE

    def start(self) -> int:
        """Begin a program; return its run number. Raises InUse (VCPU_RUNNING)."""
        self.step(VcpuEvent.START)
        self.run += 1
        return self.run

    def end(self) -> None:
        """Give the vCPU back; harmless where it is idle."""
        if self.running:
            self.step(VcpuEvent.END)

    def step(self, event: VcpuEvent) -> None:
        """Take one transition; raises InUse (STATE_WRONG, VCPU_RUNNING)."""
        following = TRANSITIONS.get((self.state, event))
        if following is None:
            raise InUse(
                _REASON_OF.get(event, Reason.STATE_WRONG),
                f"vCPU {self.vcpu} is {self.state.value}: it cannot {event.value}; "
                "start once, then answer each exit",
                vcpu=self.vcpu,
            )
        self.state = following
