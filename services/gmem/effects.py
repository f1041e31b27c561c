"""Effects and operations: how a core asks the world for help without doing I/O.

An *effect* is a frozen value typed by its reply. An *operation* is a generator that
yields effects and is sent their replies; `perform` is its only suspension point:

    folio = yield from perform(Allocate(handle))     # mypy: folio is Folio

A driver answers with the reply, or throws a KernelError into the very line that asked.
After every effect a core looks again, because the world may have moved.

Locks are core state too (rule V2 of the design): a Lock is plain data with a queue, an
operation takes it with the effect Acquire and gives it back with Release, and whoever
drives the operation wakes the next in line.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Generic, TypeAlias, TypeVar, cast

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Effect(Generic[T]):
    """A request to the world, typed by its reply."""


Op: TypeAlias = Generator[Effect[Any], Any, T]


def perform(effect: Effect[T]) -> Op[T]:
    """Suspend the operation until the world has answered `effect`."""
    reply = yield effect
    return cast("T", reply)


class Mode(Enum):
    """How a lock is held."""

    SHARED = "shared"
    EXCLUSIVE = "exclusive"


class Ticket:
    """One claim on a Lock, waiting or granted; compared by identity."""

    __slots__ = ("granted", "mode")

    def __init__(self, mode: Mode) -> None:
        """Start as waiting."""
        self.mode = mode
        self.granted = False


@dataclass(slots=True, eq=False)
class Lock:
    """Readers and one writer, first come first served; plain data, no waiting inside.

    As filemap_invalidate_lock (a rw_semaphore) and kvm->slots_lock: a reader that
    comes after a waiting writer waits behind it.
    """

    name: str
    holders: list[Ticket] = field(default_factory=list)
    queue: deque[Ticket] = field(default_factory=deque)

    def request(self, mode: Mode) -> Ticket:
        """Queue a claim; `ticket.granted` tells whether it holds already."""
        ticket = Ticket(mode)
        self.queue.append(ticket)
        self._grant()
        return ticket

    def release(self, ticket: Ticket) -> list[Ticket]:
        """Give a granted claim back; return the tickets that this grants."""
        assert ticket.granted, self.name
        self.holders.remove(ticket)
        return self._grant()

    def abandon(self, ticket: Ticket) -> list[Ticket]:
        """Take a waiting claim out of the queue; return the tickets this grants."""
        assert not ticket.granted, self.name
        self.queue.remove(ticket)
        return self._grant()

    @property
    def idle(self) -> bool:
        """Whether nobody holds it or waits for it."""
        return not self.holders and not self.queue

    def _grant(self) -> list[Ticket]:
        granted: list[Ticket] = []
        while self.queue and self._admits(self.queue[0].mode):
            ticket = self.queue.popleft()
            ticket.granted = True
            self.holders.append(ticket)
            granted.append(ticket)
        return granted

    def _admits(self, mode: Mode) -> bool:
        if not self.holders:
            return True
        return mode is Mode.SHARED and self.holders[0].mode is Mode.SHARED


@dataclass(frozen=True, slots=True)
class Acquire(Effect[Ticket]):
    """Wait until `lock` is held in `mode`; the reply is the ticket to release."""

    lock: Lock
    mode: Mode


@dataclass(frozen=True, slots=True)
class Release(Effect[None]):
    """Give `lock` back; never waits, never fails."""

    lock: Lock
    ticket: Ticket


def holding(lock: Lock, mode: Mode, body: Op[T]) -> Op[T]:
    """Run `body` with `lock` held in `mode`; release it however `body` ends."""
    ticket = yield from perform(Acquire(lock, mode))
    try:
        return (yield from body)
    finally:
        yield from perform(Release(lock, ticket))
