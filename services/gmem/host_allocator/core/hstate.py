"""One pool of same-sized huge folios over all nodes: the kernel's struct hstate.

Counted per node: nr, free, surplus; only globally: resv. The pool takes its folios from
base memory and returns them to it as set_max_huge_pages() does. Surplus comes from a
pool that shrinks below its use, and, up to nr_overcommit_huge_pages, from tenants that
reserve more than the pool has; it goes when it is freed, or when the reservation that
it stands behind ends.

Two ways lead to resv > free, both the kernel's: a folio that is freed on a node with
surplus leaves the pool although its reservation stays, and so does a poisoned one. The
next allocate of such a reservation finds the pool empty.
"""

from __future__ import annotations

from collections.abc import Sequence

from gmem.host_allocator.core.extents import Extents
from gmem.host_allocator.core.nodes import NumaNode, Share, deal
from gmem.host_allocator.core.values import Folio, NodePoolStatistics, PoolStatistics
from gmem.host_allocator.core.vmemmap import Vmemmap, saved_vmemmap_pages
from gmem.uapi.pages import NodeId, Pfn, PgRange, order_of


class HState:
    """A pool; free folios are runs of frames, folios in use are only counted."""

    def __init__(
        self, page_size: int, nodes: Sequence[NumaNode], vmemmap: Vmemmap
    ) -> None:
        """Start empty; frames come from and go to `nodes`."""
        self.page_size = page_size
        self.order = order_of(page_size)
        self.nodes = nodes
        self.vmemmap = vmemmap
        self.resv_huge_pages = 0
        self.nr_overcommit_huge_pages = 0
        self.nr_huge_pages_node = [0] * len(nodes)
        self.surplus_huge_pages_node = [0] * len(nodes)
        self._free = [Extents() for _ in nodes]
        self._next_to_alloc = 0
        self._next_to_free = 0

    @property
    def nr_huge_pages(self) -> int:
        """Folios in the pool, free or not."""
        return sum(self.nr_huge_pages_node)

    @property
    def free_huge_pages(self) -> int:
        """Folios nobody has; some may be reserved."""
        return sum(map(len, self._free)) >> self.order

    @property
    def surplus_huge_pages(self) -> int:
        """Folios above what the pool was set to."""
        return sum(self.surplus_huge_pages_node)

    @property
    def persistent_huge_pages(self) -> int:
        """What the pool was set to, as far as that was reached."""
        return self.nr_huge_pages - self.surplus_huge_pages

    def free_on(self, node: int) -> int:
        """Return the free folios of `node`."""
        return len(self._free[node]) >> self.order

    def free_runs(self) -> list[PgRange]:
        """Return the frames of all free folios."""
        return [run for free in self._free for run in free.runs()]

    # Folios of owners.

    def dequeue(self, share: Share) -> list[Folio]:
        """Take free folios of one node, which are there, lowest first.

        free_huge_pages goes down; reservations are the caller's to count.
        """
        folios: list[Folio] = []
        for run in self._free[share.node].take_lowest(share.nr_folios << self.order):
            starts = range(run.start, run.stop, 1 << self.order)
            folios += [Folio(Pfn(pfn), self.order, share.node) for pfn in starts]
        return folios

    def enqueue(self, folio: Folio) -> None:
        """Take a whole folio back, or, where its node has surplus, drop it.

        As free_huge_folio(): a dropped folio whose vmemmap cannot be restored is kept
        as a free surplus one (add_hugetlb_folio() with adjust_surplus).
        """
        surplus = self.surplus_huge_pages_node[folio.node] > 0
        if surplus and self._return_to_base(folio.node, [folio.frames]):
            self.nr_huge_pages_node[folio.node] -= 1
            self.surplus_huge_pages_node[folio.node] -= 1
        else:
            self._free[folio.node].add(folio.frames)

    def withhold(self, folio: Folio) -> None:
        """Take a poisoned folio out of the pool; its vmemmap stays as it is."""
        self._lose(folio.node)
        self.nodes[folio.node].withheld.add(folio.frames)

    def dissolve(self, folio: Folio) -> bool:
        """Make a folio that is no longer in use base memory, outside the pool.

        False, and no change but a count, where its vmemmap cannot be restored.
        """
        if not self._return_to_base(folio.node, [folio.frames]):
            return False
        self._lose(folio.node)
        return True

    def _lose(self, node: int) -> None:
        self.nr_huge_pages_node[node] -= 1
        # One folio less is one surplus folio less, where there is surplus.
        surplus = self.surplus_huge_pages_node[node]
        self.surplus_huge_pages_node[node] = max(0, surplus - 1)

    # Surplus.

    def surplus_room(self, allowed: Sequence[NodeId]) -> int:
        """Return how many surplus folios could be made on `allowed` nodes now."""
        limit = self.nr_overcommit_huge_pages - self.surplus_huge_pages
        return max(0, min(limit, sum(self._room(allowed))))

    def make_surplus(self, nr_folios: int, allowed: Sequence[NodeId]) -> None:
        """Make surplus folios, for which there is room, free ones for now.

        alloc_surplus_hugetlb_folio(); the caller reserves or takes them at once.
        """
        room = self._room(allowed)
        shares, self._next_to_alloc = deal(nr_folios, room, self._next_to_alloc)
        for node, share in enumerate(shares):
            self._create(node, share)
            self.surplus_huge_pages_node[node] += share

    def return_unused_surplus(self, unused_resv_pages: int) -> None:
        """Drop free surplus folios that a reservation stood behind.

        return_unused_surplus_pages(): those that cannot be dropped for want of vmemmap
        pages stay surplus.
        """
        nodes = range(len(self.nodes))
        unused = [min(self.free_on(i), self.surplus_huge_pages_node[i]) for i in nodes]
        shares, self._next_to_free = deal(unused_resv_pages, unused, self._next_to_free)
        for node, share in enumerate(shares):
            dissolved = self._dissolve(node, share)
            self.nr_huge_pages_node[node] -= dissolved
            self.surplus_huge_pages_node[node] -= dissolved

    def _room(self, allowed: Sequence[NodeId]) -> list[int]:
        aligned = [node.base.aligned(self.order) for node in self.nodes]
        return self._capacities(aligned, allowed)

    # Demotion.

    def demotable(self, nr_folios: int, allowed: Sequence[NodeId]) -> list[int]:
        """Say how many folios of each node demoting `nr_folios` of them takes.

        demote_store(): free folios of the `allowed` nodes, less all reservations of
        the host, in turns of nodes. Surplus folios are left: they are about to go.
        """
        free = sum(self.free_on(node) for node in allowed)
        available = max(0, min(nr_folios, free - self.resv_huge_pages))
        nodes = range(len(self.nodes))
        there = [min(self.free_on(i), self._persistent_on(i)) for i in nodes]
        capacities = self._capacities(there, allowed)
        shares, self._next_to_free = deal(available, capacities, self._next_to_free)
        return shares

    def give_up(self, node: int) -> PgRange | None:
        """Take a free folio with restored vmemmap out of the pool, for another one.

        None, and no change but a count, where base memory has too few vmemmap pages.
        """
        (run,) = self._free[node].highest(1 << self.order)
        if self.vmemmap.restore(self.nodes[node], [run], self.order) is None:
            return None
        self._free[node].remove(run)
        self.nr_huge_pages_node[node] -= 1
        return run

    def adopt(self, node: int, run: PgRange) -> int:
        """Make the frames of `run` folios of this pool; return how many."""
        self.vmemmap.optimize(self.nodes[node], run, self.order)
        self._free[node].add(run)
        self.nr_huge_pages_node[node] += len(run) >> self.order
        return len(run) >> self.order

    # The size of the pool.

    def resize(self, count: int, allowed: Sequence[NodeId], *, spread: bool) -> int:
        """Set the pool to `count` folios; return how many are missing or too many.

        `allowed` nodes change. With `spread`, `count` is of the whole pool, else of
        the one allowed node (set_max_huge_pages(): the other nodes stay as they are).
        """
        others = [i for i in range(len(self.nodes)) if not spread and i not in allowed]
        here = [i for i in range(len(self.nodes)) if i not in others]
        target = count + sum(self._persistent_on(i) for i in others)

        self._adopt_surplus(target, allowed)
        self._grow(target, allowed)
        self._shrink(target, allowed)
        self._call_surplus(target, allowed)

        return abs(sum(self.nr_huge_pages_node[i] for i in here) - count)

    def _persistent_on(self, node: int) -> int:
        return self.nr_huge_pages_node[node] - self.surplus_huge_pages_node[node]

    def _capacities(self, counts: Sequence[int], allowed: Sequence[int]) -> list[int]:
        return [count if i in allowed else 0 for i, count in enumerate(counts)]

    def _adopt_surplus(self, target: int, allowed: Sequence[NodeId]) -> None:
        """Call surplus folios persistent before new ones are made."""
        missing = max(0, target - self.persistent_huge_pages)
        surplus = self._capacities(self.surplus_huge_pages_node, allowed)
        shares, self._next_to_alloc = deal(missing, surplus, self._next_to_alloc)
        for node, share in enumerate(shares):
            self.surplus_huge_pages_node[node] -= share

    def _grow(self, target: int, allowed: Sequence[NodeId]) -> None:
        """Make folios of aligned base memory, in turns of nodes, while there is any.

        A new folio's vmemmap pages may complete another aligned run: look again.
        """
        while (missing := target - self.persistent_huge_pages) > 0:
            room = self._room(allowed)
            shares, self._next_to_alloc = deal(missing, room, self._next_to_alloc)
            if not any(shares):
                break
            for node, share in enumerate(shares):
                self._create(node, share)

    def _create(self, node: int, nr_folios: int) -> None:
        for run in self.nodes[node].base.take_aligned(self.order, nr_folios):
            self.adopt(node, run)

    def _shrink(self, target: int, allowed: Sequence[NodeId]) -> None:
        """Return free folios that no reservation needs, in turns of nodes."""
        in_use = self.nr_huge_pages - self.free_huge_pages
        floor = max(target, in_use + self.resv_huge_pages)
        excess = max(0, self.persistent_huge_pages - floor)
        free = self._capacities(
            [self.free_on(node) for node in range(len(self.nodes))], allowed
        )
        shares, self._next_to_free = deal(excess, free, self._next_to_free)
        for node, share in enumerate(shares):
            dissolved = self._dissolve(node, share)
            self.nr_huge_pages_node[node] -= dissolved
            # Their vmemmap could not be restored: add_hugetlb_folio() takes them
            # back as surplus.
            self.surplus_huge_pages_node[node] += share - dissolved

    def _dissolve(self, node: int, nr_folios: int) -> int:
        """Return up to `nr_folios` free folios to base memory, highest first.

        Returns how many had their vmemmap restored; each one dissolved brings the
        base memory to restore that of many more.
        """
        done = 0
        while done < nr_folios:
            affordable = len(self.nodes[node].base) // saved_vmemmap_pages(self.order)
            step = min(nr_folios - done, max(1, affordable))
            runs = self._free[node].highest(step << self.order)
            if not self._return_to_base(node, runs):
                break
            for run in runs:
                self._free[node].remove(run)
            done += step
        return done

    def _return_to_base(self, node: int, runs: Sequence[PgRange]) -> bool:
        if self.vmemmap.restore(self.nodes[node], runs, self.order) is None:
            return False
        self.nodes[node].base.add_all(runs)
        return True

    def _call_surplus(self, target: int, allowed: Sequence[NodeId]) -> None:
        """Call what cannot be returned surplus, so that it goes when it is freed."""
        excess = max(0, self.persistent_huge_pages - target)
        persistent = [self._persistent_on(i) for i in range(len(self.nodes))]
        capacities = self._capacities(persistent, allowed)
        shares, self._next_to_free = deal(excess, capacities, self._next_to_free)
        for node, share in enumerate(shares):
            self.surplus_huge_pages_node[node] += share

    # What can be watched.

    def statistics(self) -> PoolStatistics:
        """Return the counts as sysfs shows them."""
        nodes = [
            NodePoolStatistics(
                node=i,
                nr_huge_pages=self.nr_huge_pages_node[i],
                free_huge_pages=self.free_on(i),
                surplus_huge_pages=self.surplus_huge_pages_node[i],
            )
            for i in range(len(self.nodes))
        ]
        return PoolStatistics(
            page_size=self.page_size,
            nr_huge_pages=self.nr_huge_pages,
            free_huge_pages=self.free_huge_pages,
            resv_huge_pages=self.resv_huge_pages,
            surplus_huge_pages=self.surplus_huge_pages,
            nr_overcommit_huge_pages=self.nr_overcommit_huge_pages,
            nodes=tuple(nodes),
        )

    def check(self) -> None:
        """No count is negative; free and surplus folios are folios of the pool."""
        assert self.resv_huge_pages >= 0
        assert self.nr_overcommit_huge_pages >= 0
        for i, nr in enumerate(self.nr_huge_pages_node):
            assert len(self._free[i]) % (1 << self.order) == 0
            assert 0 <= self.free_on(i) <= nr, (i, self.free_on(i), nr)
            assert 0 <= self.surplus_huge_pages_node[i] <= nr, i
