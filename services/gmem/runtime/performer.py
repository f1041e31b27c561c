"""Who answers which effect: a table by the type of the effect."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, TypeVar

from gmem.effects import Effect

E = TypeVar("E", bound=Effect[Any])
Remote: TypeAlias = Callable[[], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Blocking:
    """An effect that one of some threads performs: it may sleep in the kernel."""

    effect: Effect[Any]
    handler: Callable[[Any], object]
    workers: Callable[[], Executor | None]


class Performer:
    """Handlers of effects: local, blocking and remote ones."""

    def __init__(self) -> None:
        """Start empty; a type is registered once."""
        self._local: dict[type[Effect[Any]], Callable[[Any], object]] = {}
        self._blocking: dict[
            type[Effect[Any]],
            tuple[Callable[[Any], object], Callable[[], Executor | None]],
        ] = {}
        self._remote: dict[type[Effect[Any]], Callable[[Any], Awaitable[object]]] = {}

    def register_local(self, kind: type[E], handler: Callable[[E], object]) -> None:
        """Answer `kind` in the thread that has it: short, and never waits."""
        self._require_new(kind)
        self._local[kind] = handler

    def register_remote(
        self, kind: type[E], handler: Callable[[E], Awaitable[object]]
    ) -> None:
        """Answer `kind` on the loop, by awaiting somebody else."""
        self._require_new(kind)
        self._remote[kind] = handler

    def register_blocking(
        self,
        kind: type[E],
        handler: Callable[[E], object],
        workers: Callable[[], Executor | None] = lambda: None,
    ) -> None:
        """Answer `kind` in a thread that may sleep in the kernel.

        That is the one that has the operation, or one of `workers()` where the loop has
        it (None: the loop's own), which then goes on with it.
        """
        self._require_new(kind)
        self._blocking[kind] = handler, workers

    def local(
        self, effect: Effect[Any], *, may_sleep: bool = False
    ) -> Callable[[Any], object] | None:
        """Return who answers `effect` in this very thread, or None."""
        handler = self._local.get(type(effect))
        if handler is None and may_sleep:
            blocking = self._blocking.get(type(effect))
            return None if blocking is None else blocking[0]
        return handler

    def elsewhere(self, effect: Effect[Any]) -> Blocking | Remote:
        """Return who else answers `effect`."""
        blocking = self._blocking.get(type(effect))
        if blocking is not None:
            return Blocking(effect, *blocking)
        return partial(self.remote(effect), effect)

    def remote(self, effect: Effect[Any]) -> Callable[[Any], Awaitable[object]]:
        """Return the remote handler; an effect nobody answers is our bug."""
        assert type(effect) in self._remote, f"nobody performs {type(effect).__name__}"
        return self._remote[type(effect)]

    def _require_new(self, kind: type[Effect[Any]]) -> None:
        for table in (self._local, self._blocking, self._remote):
            assert kind not in table, kind
