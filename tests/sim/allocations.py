"""guest_memfd's calls to the allocator, and where a folio is while one is under way."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from gmem.effects import Effect
from gmem.guest_memfd.core import effects as fx
from gmem.guest_memfd.core.values import Folio
from gmem.host_allocator.core.host_memory import HostMemory
from gmem.host_allocator.core.values import Charging
from gmem.host_allocator.core.values import Folio as HostFolio
from tests.sim.errors import MemoryErrors
from tests.sim.world import Answer, World, outcome_of


class Allocations:
    """Answers the effects that the allocator performs.

    `in_flight` and `restructuring` are the folios between the services, by request.
    """

    def __init__(self, world: World, memory: HostMemory, errors: MemoryErrors) -> None:
        self.in_flight: dict[int, tuple[Folio, ...]] = {}
        self.restructuring: dict[int, Folio] = {}
        self._world = world
        self._memory = memory
        self._errors = errors
        self._keys = 0
        world.performers.remote.update(
            {
                fx.Reserve: self._reserve,
                fx.Allocate: self._allocate,
                fx.Split: self._split,
                fx.Reconstruct: self._reconstruct,
                fx.Free: self._free,
                fx.Unreserve: self._unreserve,
            }
        )

    def _call(self, make: Callable[[], Any], answer: Answer) -> None:
        def carry_out(done: Answer) -> None:
            self._world.changed = True
            done(outcome_of(make))

        self._world.call("host_allocator", carry_out, answer)

    def _reserve(self, effect: fx.Reserve, answer: Answer) -> None:
        charging = Charging(effect.cgroup, effect.charge_rsvd)
        reserve = partial(self._memory.reserve, charging=charging)
        self._call(
            lambda: reserve(effect.page_size, effect.num_pages, None, effect.owner),
            answer,
        )

    def _allocate(self, effect: fx.Allocate, answer: Answer) -> None:
        key = self._key()

        def make() -> tuple[Folio, ...]:
            folios = self._memory.allocate(
                effect.handle, page_size=effect.page_size, nr_folios=effect.nr_folios
            )
            mine = tuple(Folio(f.pfn, f.order, f.node) for f in folios)
            self._errors.note_allocated(mine)
            self.in_flight[key] = mine
            return mine

        self._call(make, _landing(self.in_flight, key, answer))

    def _free(self, effect: fx.Free, answer: Answer) -> None:
        key = self._key()
        self.in_flight[key] = effect.folios
        if isinstance(self._previous(effect), fx.Allocate):
            self._world.marks["loser of an allocation race"] += 1

        def make() -> None:
            folios = [_host_folio(folio) for folio in effect.folios]
            self._memory.free(effect.handle, folios)
            self._errors.note_freed(effect.folios)
            self.in_flight.pop(key, None)

        self._call(make, answer)

    def _split(self, effect: fx.Split, answer: Answer) -> None:
        folio, key = _host_folio(effect.folio), self._key()
        self.restructuring[key] = effect.folio
        self._call(
            lambda: self._memory.split(effect.handle, folio),
            _landing(self.restructuring, key, answer),
        )

    def _reconstruct(self, effect: fx.Reconstruct, answer: Answer) -> None:
        folio, key = _host_folio(effect.folio), self._key()
        self.restructuring[key] = effect.folio
        self._world.marks["reconstruct"] += 1
        self._call(
            lambda: self._memory.reconstruct(effect.handle, folio, 1 << folio.order),
            _landing(self.restructuring, key, answer),
        )

    def _unreserve(self, effect: fx.Unreserve, answer: Answer) -> None:
        self._call(partial(self._memory.unreserve, effect.handle), answer)

    def _previous(self, effect: Effect[Any]) -> Effect[Any] | None:
        return self._world.asker(effect).previous

    def _key(self) -> int:
        self._keys += 1
        return self._keys


def _landing(flights: dict[int, Any], key: int, answer: Answer) -> Answer:
    def landed(outcome: Any) -> None:
        flights.pop(key, None)
        answer(outcome)

    return landed


def _host_folio(folio: Folio) -> HostFolio:
    return HostFolio(folio.pfn, folio.order, folio.node)
