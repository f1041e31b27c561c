"""Memory errors of a history: which frames have one, and who hears of it when.

An error is injected into a page of an inode, by guest_memfd, or into a frame, by the
allocator. guest_memfd hears of the latter as its service does: an event says that
something has changed, some time later; then all errors are asked for and compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from gmem.effects import Effect, Op, perform
from gmem.guest_memfd.core import effects as fx
from gmem.guest_memfd.core.registry import GuestMemfdCore
from gmem.guest_memfd.core.values import Folio
from gmem.host_allocator.core.host_memory import HostMemory
from gmem.host_allocator.core.values import HostStatistics, PoolStatistics
from gmem.host_allocator.core.vmemmap import saved_vmemmap_pages
from gmem.uapi.pages import PgRange, order_of
from tests.sim.world import Answer, Outcome, World, outcome_of

LOOKS_MAX: Final = 6
"""Comparisons for a frame with an error that is in no filemap, or not yet."""


@dataclass(frozen=True, slots=True)
class ListAllErrors(Effect[Mapping[int, Mapping[int, int]]]):
    """Ask the allocator which frames have errors, by handle."""


class MemoryErrors:
    """The frames with an error, as they were given them; answers PoisonFrame.

    `bad` are those frames; `apart` the huge folios that were freed with one and became
    base memory, `withheld` those that could not. `marked` are folios in use that have
    or had one, by their first frame, and `split` those that were seen split with one.
    While the errors of an inode change it is in `changing`.
    """

    def __init__(self, world: World, memory: HostMemory, core: GuestMemfdCore) -> None:
        self.bad: dict[int, None] = {}
        self.marked: dict[int, None] = {}
        self.split: dict[int, None] = {}
        self.apart: list[Folio] = []
        self.withheld: list[Folio] = []
        self.changing: Counter[int] = Counter()
        self._world = world
        self._memory = memory
        self._core = core
        self._following = self._again = False
        world.performers.remote.update(
            {
                fx.PoisonFrame: lambda e, answer: self._call(
                    partial(self.give, e.pfn), answer
                ),
                fx.UnpoisonFrame: lambda e, answer: self._call(
                    partial(self.take, e.pfn), answer
                ),
                fx.ListErrors: lambda e, answer: self._call(
                    lambda: self._listed().get(e.handle, {}), answer
                ),
                ListAllErrors: lambda _, answer: self._call(self._listed, answer),
            }
        )

    def give(self, pfn: int) -> None:
        """Give a frame an error, at the allocator."""
        self._memory.inject(pfn)
        self.bad[pfn] = None
        for pool in self._memory.hugetlb.values():
            live = pool.live_at(pfn)
            if live is not None:
                self.marked[live.folio.pfn] = None
        self._tell()

    def take(self, pfn: int) -> None:
        """Forget the error of a frame, at the allocator."""
        self._memory.unpoison(pfn)
        del self.bad[pfn]
        self._tell()

    def among(self, frames: PgRange) -> list[int]:
        """Return the frames with an error among `frames`."""
        return [pfn for pfn in self.bad if pfn in frames]

    def note_allocated(self, folios: Iterable[Folio]) -> None:
        """Check what the allocator hands out: nobody gets a frame with an error."""
        for folio in folios:
            if self.among(_frames(folio)):
                self._world.broken(f"{folio} is handed out with a memory error")

    def note_freed(self, folios: Iterable[Folio]) -> None:
        """Note which huge folios have left their pool."""
        sizes = {int(f.pfn): f.nr_pages for f in self._memory.poisoned_frames()}
        for folio in folios:
            self.marked.pop(folio.pfn, None)
            self.split.pop(folio.pfn, None)
            bad = self.among(_frames(folio)) if folio.order else []
            if bad:
                is_apart = all(sizes[pfn] == 1 for pfn in bad)
                (self.apart if is_apart else self.withheld).append(folio)
                self._world.marks["a lost huge folio left its pool"] += 1

    def without_lost_folios(self, at_boot: HostStatistics) -> HostStatistics:
        """Return what statistics are when all is given back and no error is left.

        A folio that was taken apart is base memory, which has its vmemmap too. One
        that was withheld as a whole is, once its error is forgotten; its vmemmap
        stays saved.
        """
        return self._without(
            self._without(at_boot, self.apart, restored=True),
            self.withheld,
            restored=False,
        )

    def change(self, inode: int, op: Op[Any]) -> Op[Any]:
        """Run an operation that changes the errors of an inode."""
        self.changing[inode] += 1
        try:
            return (yield from op)
        finally:
            self.changing[inode] -= 1

    def _without(
        self, levels: HostStatistics, lost: list[Folio], *, restored: bool
    ) -> HostStatistics:
        for folio in lost:
            saved = saved_vmemmap_pages(folio.order) if restored else 0
            nodes = [
                replace(
                    node,
                    free_base_pages=node.free_base_pages + (1 << folio.order) - saved,
                    nr_memmap_pages=node.nr_memmap_pages + saved,
                )
                if node.node == folio.node
                else node
                for node in levels.nodes
            ]
            pools = [
                _one_less(pool, folio)
                if order_of(pool.page_size) == folio.order
                else pool
                for pool in levels.pools
            ]
            kept = levels.vmemmap.saved_pages - saved
            vmemmap = replace(levels.vmemmap, saved_pages=kept)
            levels = replace(
                levels, nodes=tuple(nodes), pools=tuple(pools), vmemmap=vmemmap
            )
        return levels

    # What guest_memfd hears.

    def _call(self, make: Callable[[], Any], answer: Answer) -> None:
        def carry_out(done: Answer) -> None:
            self._world.changed = True
            done(outcome_of(make))

        self._world.call("host_allocator", carry_out, answer)

    def _listed(self) -> Mapping[int, Mapping[int, int]]:
        found: dict[int, dict[int, int]] = {}
        for frame in self._memory.poisoned_frames():
            found.setdefault(frame.handle, {})[frame.pfn] = frame.nr_pages
        found.pop(0, None)
        return found

    def _tell(self) -> None:
        self._world.after_a_while(self._hear)

    def _hear(self) -> None:
        """Begin to compare; who compares already does it once more."""
        self._again = True
        if not self._following:
            self._following = True
            self._world.start("follow memory errors", self._follow(), self._over)

    def _over(self, outcome: Outcome) -> None:
        self._following = False
        if outcome.error is not None or self._again:
            # The service asks anew where the stream or a call has failed.
            self._tell()

    def _follow(self) -> Op[None]:
        self._again = False
        for _ in range(LOOKS_MAX):
            errors = yield from perform(ListAllErrors())
            differing, strays = self._core.differing(errors)
            for number in differing:
                compare = self._core.compare_errors(number)
                found = yield from self.change(number, compare)
                bad = sum(difference.bad for difference in found)
                self._world.marks["heard of a memory error"] += bad
            if not strays:
                return


def _one_less(pool: PoolStatistics, folio: Folio) -> PoolStatistics:
    nodes = [
        replace(
            node,
            nr_huge_pages=node.nr_huge_pages - 1,
            free_huge_pages=node.free_huge_pages - 1,
        )
        if node.node == folio.node
        else node
        for node in pool.nodes
    ]
    return replace(
        pool,
        nodes=tuple(nodes),
        nr_huge_pages=pool.nr_huge_pages - 1,
        free_huge_pages=pool.free_huge_pages - 1,
    )


def _frames(folio: Folio) -> PgRange:
    return PgRange(folio.pfn, folio.pfn + (1 << folio.order))
