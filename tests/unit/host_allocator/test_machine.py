"""Any history of calls on one host: checked after every step, shrunk on failure."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
)

from gmem.host_allocator.core.host_memory import HostMemory
from gmem.host_allocator.core.values import (
    BootPool,
    Folio,
    HostStatistics,
    MemPolicy,
    MemPolicyMode,
)
from gmem.uapi.errors import KernelError, Reason
from gmem.uapi.pages import PAGE_SIZE, SIZE_1G, SIZE_2M
from tests.unit.host_allocator.hosts import PAGES_PER_1G

T = TypeVar("T")
SIZES = st.sampled_from([PAGE_SIZE, SIZE_2M, SIZE_1G])
POLICIES = st.builds(
    MemPolicy,
    st.sampled_from(MemPolicyMode),
    st.sampled_from([(), (0,), (1,), (0, 1), (5,)]),
)


class Histories(RuleBasedStateMachine):
    """Legal and illegal calls; a refusal changes nothing but the count of refusals."""

    handles: Bundle[tuple[int, int]] = Bundle("handles")
    folios: Bundle[tuple[int, Folio]] = Bundle("folios")

    @initialize(
        optimize=st.booleans(), small=st.integers(600, 6000), gigantic=st.booleans()
    )
    def boot(self, optimize: bool, small: int, gigantic: bool) -> None:
        pages = [2 * PAGES_PER_1G + 77 if gigantic else small, small]
        pools = [BootPool(SIZE_1G, 1), BootPool(SIZE_2M, 4)]
        self.memory = HostMemory(pages, pools, optimize_vmemmap=optimize)

    def attempt(self, call: Callable[[], T]) -> T | None:
        """Make a call; return None where it was refused and nothing moved."""
        before, claims = self.memory.statistics(), self.memory.reservations()
        try:
            return call()
        except KernelError as error:
            after = self.memory.statistics()
            if error.reason is Reason.VMEMMAP_RESTORE_FAILED:
                assert after.levels() == before.levels()
            else:
                assert after == before
            assert self.memory.reservations() == claims
            return None

    @rule(
        target=handles,
        size=SIZES,
        nr=st.integers(0, 5),
        node=st.sampled_from([None, 0, 1, 2]),
    )
    def reserve(
        self, size: int, nr: int, node: int | None
    ) -> MultipleResults[tuple[int, int]]:
        handle = self.attempt(lambda: self.memory.reserve(size, nr, node))
        return multiple() if handle is None else multiple((handle, size))

    @rule(target=folios, handle=handles, policy=POLICIES, nr=st.integers(1, 700))
    def allocate(
        self, handle: tuple[int, int], policy: MemPolicy, nr: int
    ) -> MultipleResults[tuple[int, Folio]]:
        number, size = handle
        got = self.attempt(lambda: self.memory.allocate(number, policy, size, nr))
        return multiple(*[(number, folio) for folio in (got or ())[:20]])

    @rule(folio=folios)
    def split(self, folio: tuple[int, Folio]) -> None:
        self.attempt(lambda: self.memory.split(*folio))

    @rule(folio=folios)
    def reconstruct(self, folio: tuple[int, Folio]) -> None:
        handle, first = folio
        self.attempt(lambda: self.memory.reconstruct(handle, first, 1 << first.order))

    @rule(folio=folios)
    def free(self, folio: tuple[int, Folio]) -> None:
        self.attempt(lambda: self.memory.free(folio[0], [folio[1]]))

    @rule(folio=folios)
    def error(self, folio: tuple[int, Folio]) -> None:
        self.attempt(lambda: self.memory.error(*folio))

    @rule(folio=folios, at=st.integers(0, 600))
    def inject(self, folio: tuple[int, Folio], at: int) -> None:
        self.attempt(lambda: self.memory.inject(folio[1].pfn + at))

    @rule(number=st.integers(0, 20))
    def unpoison(self, number: int) -> None:
        errors = self.memory.poisoned_frames()
        if errors:
            frame = errors[number % len(errors)]
            assert self.memory.unpoison(frame.pfn) == frame

    @rule(handle=handles)
    def unreserve(self, handle: tuple[int, int]) -> None:
        self.attempt(lambda: self.memory.unreserve(handle[0]))

    @rule(
        size=st.sampled_from([SIZE_2M, SIZE_1G]),
        nr=st.integers(0, 12),
        node=st.sampled_from([None, 0, 1]),
    )
    def resize(self, size: int, nr: int, node: int | None) -> None:
        would = self.memory.update_pool(size, nr, node, validate_only=True)
        update = self.memory.update_pool(size, nr, node)
        assert update == would
        scope = [p for p in update.pool.nodes if node is None or p.node == node]
        assert abs(sum(p.nr_huge_pages for p in scope) - nr) == update.missing_pages

    @rule(nr=st.integers(0, 4), node=st.sampled_from([None, 0, 1]))
    def demote(self, nr: int, node: int | None) -> None:
        would = self.attempt(
            lambda: self.memory.demote_pool(SIZE_1G, nr, node, validate_only=True)
        )
        done = self.attempt(lambda: self.memory.demote_pool(SIZE_1G, nr, node))
        assert done == would

    @rule(nr=st.integers(0, 6))
    def overcommit(self, nr: int) -> None:
        self.memory.update_pool(SIZE_2M, nr_overcommit_huge_pages=nr)

    @rule(enabled=st.booleans())
    def switch(self, enabled: bool) -> None:
        self.memory.update_vmemmap_optimization(enabled=enabled)

    @rule(folio=folios)
    def split_and_reconstruct_is_nothing(self, folio: tuple[int, Folio]) -> None:
        handle, huge = folio
        self.memory.update_vmemmap_optimization(enabled=True)
        before: HostStatistics = self.memory.statistics().levels()
        if self.attempt(lambda: self.memory.split(handle, huge)):
            self.memory.reconstruct(handle, huge, 1 << huge.order)
            assert self.memory.statistics().levels() == before

    @invariant()
    def every_frame_is_somewhere_once(self) -> None:
        if hasattr(self, "memory"):
            self.memory.check_frames()


TestHistories = Histories.TestCase
TestHistories.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None
)
