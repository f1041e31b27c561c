"""An operation of the guest_memfd core, stepped by hand in a world of `gmem_world`."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

from gmem.effects import Acquire, Effect, Op, Ticket
from gmem.guest_memfd.core import effects as fx
from gmem.uapi.errors import OPERATION_ERRORS, KernelError, TransportError

if TYPE_CHECKING:
    from tests.support.gmem_world import GmemWorld

T = TypeVar("T")
OperationError: TypeAlias = KernelError | TransportError
STEPS_MAX = 2_000_000


class _Killed(BaseException):
    """What an operation meets whose process is gone."""


class Task(Generic[T]):
    """One operation, stepped by hand; `effect` is what it asks for next."""

    def __init__(self, world: GmemWorld, op: Op[T]) -> None:
        self._world = world
        self._op = op
        self._ticket: Ticket | None = None
        self.effect: Effect[Any] | None = None
        self.result: T | None = None
        self.error: OperationError | None = None
        self.done = False
        self._resume(None)

    def step(self) -> bool:
        """Answer its effect; False when it waits for a lock."""
        assert self.effect is not None, "it is done"
        if isinstance(self.effect, Acquire):
            if self._ticket is None:
                self._ticket = self.effect.lock.request(self.effect.mode)
            if not self._ticket.granted:
                return False
            ticket, self._ticket = self._ticket, None
            self._resume(ticket)
            return True
        if isinstance(self.effect, fx.WaitForRelease):
            waited = self._world.clock.waited(self.effect)
            if waited is not None:
                self._resume(waited)
            return waited is not None
        try:
            reply = self._world.perform(self.effect)
        except OPERATION_ERRORS as error:
            self._resume(None, error)
        else:
            self._resume(reply)
        return True

    def run_until(self, kind: type[Effect[Any]]) -> None:
        """Step until it asks for an effect of a kind, which is not answered yet."""
        while not isinstance(self.effect, kind):
            assert not self.done, f"it ended without {kind.__name__}"
            assert self.step(), f"it waits for {self.effect}"

    def run_until_blocked(self) -> None:
        """Step until it waits for a lock."""
        while self.step():
            assert not self.done, "it ended without waiting"

    def finish(self) -> T:
        """Step to the end; return the result, or raise what it raised."""
        for _ in range(STEPS_MAX):
            if self.done:
                break
            assert self.step(), f"it waits for {self.effect}"
        if self.error is not None:
            raise self.error
        assert self.done
        return self.result  # type: ignore[return-value]

    def bury(self) -> None:
        """End it as kill -9 does: nothing that it still asks for is done."""
        self.done = True
        with suppress(StopIteration, _Killed):
            self._op.throw(_Killed())
            while True:
                self._op.send(None)

    def _resume(self, reply: Any, error: OperationError | None = None) -> None:
        try:
            self.effect = (
                self._op.send(reply) if error is None else self._op.throw(error)
            )
        except StopIteration as stop:
            self._end(stop.value, None)
        except OPERATION_ERRORS as refusal:
            self._end(None, refusal)

    def _end(self, result: T | None, error: OperationError | None) -> None:
        self.done, self.effect = True, None
        self.result, self.error = result, error
