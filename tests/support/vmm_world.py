"""The world of the vmm's core, played by hand: effects stop until they are answered.

`Hand` steps one operation. Locks are real; notices to the guest process are written
down; every other effect waits for `reply` or `fail`. `World` answers by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from gmem.effects import Acquire, Effect, Op, Release
from gmem.uapi.errors import KernelError
from gmem.uapi.flags import VmType
from gmem.uapi.lineage import Lineage
from gmem.vmm.core.effects import (
    BindSlot,
    CreateFile,
    FileIdentity,
    Frame,
    GetPfn,
    IdentifyDescriptor,
    NotifyGuest,
    StartGuest,
)
from gmem.vmm.core.invalidate import Notice
from gmem.vmm.core.vm import Vm

T = TypeVar("T")
GUEST_PID = 4711


class Hand(Generic[T]):
    """One operation; `effect` is what it waits for, None when it has ended."""

    def __init__(self, op: Op[T]) -> None:
        self._op = op
        self.effect: Effect[Any] | None = None
        self.notices: list[Notice] = []
        self.value: T | None = None
        self.error: BaseException | None = None
        self._ticket: Any = None
        self._step(lambda: op.send(None))

    @property
    def ended(self) -> bool:
        return self.effect is None

    def reply(self, value: object = None) -> None:
        assert not self.ended
        self._step(lambda: self._op.send(value))

    def fail(self, error: KernelError) -> None:
        assert not self.ended
        self._step(lambda: self._op.throw(error))

    def try_lock(self) -> bool:
        """Go on if the lock that it waits for was granted meanwhile."""
        assert isinstance(self.effect, Acquire)
        if not self._ticket.granted:
            return False
        self.reply(self._ticket)
        return True

    def result(self) -> T:
        assert self.ended, self.effect
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]

    def _step(self, resume: Callable[[], Effect[Any]]) -> None:
        while True:
            try:
                self.effect = resume()
            except StopIteration as stop:
                self.effect, self.value = None, stop.value
                return
            except KernelError as error:
                self.effect, self.error = None, error
                return
            answered, reply = self._answer(self.effect)
            if not answered:
                return
            resume = lambda reply=reply: self._op.send(reply)  # type: ignore[misc]  # noqa: E731

    def _answer(self, effect: Effect[Any]) -> tuple[bool, object]:
        match effect:
            case Acquire(lock=lock, mode=mode):
                self._ticket = lock.request(mode)
                return self._ticket.granted, self._ticket
            case Release(lock=lock, ticket=ticket):
                lock.release(ticket)
                return True, None
            case NotifyGuest(notice=notice):
                self.notices.append(notice)
                return True, None
            case _:
                return False, None


@dataclass
class World:
    """Answers every effect at once; `refuse` maps a type of effect to its error."""

    refuse: dict[type[Effect[Any]], KernelError] = field(default_factory=dict)
    frame: Frame = field(default_factory=lambda: Frame(pfn=1 << 18, order=0))
    in_place: bool = False
    log: list[Effect[Any]] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)

    def run(self, op: Op[T]) -> T:
        hand = Hand(op)
        while not hand.ended:
            effect = hand.effect
            assert effect is not None
            self.log.append(effect)
            if type(effect) in self.refuse:
                hand.fail(self.refuse[type(effect)])
            else:
                hand.reply(self._reply(effect))
        self.notices += hand.notices
        return hand.result()

    def asked(self, kind: type[Effect[Any]]) -> list[Any]:
        """What was asked of one kind, in order."""
        return [effect for effect in self.log if type(effect) is kind]

    def _reply(self, effect: Effect[Any]) -> object:
        match effect:
            case GetPfn():
                return self.frame
            case BindSlot():
                return self.in_place
            case IdentifyDescriptor(offset=offset):
                return FileIdentity(7, 2, offset)
            case StartGuest():
                return GUEST_PID
            case CreateFile():
                return "hosts/h/guestMemfds/1"
            case _:
                return None


def new_vm(
    vm_type: VmType = VmType.SW_PROTECTED, lineage: Lineage = Lineage.RFC_V1
) -> Vm:
    vm = Vm("hosts/h/vms/v", vm_type, lineage)
    vm.guest_pid, vm.guest_alive = GUEST_PID, True
    return vm
