"""HVO: which huge folios have given their vmemmap pages back, and the counts of it.

A folio of 2^order pages has 2^order struct pages of 64 bytes: 4096 vmemmap pages for
1G, 8 for 2M. An optimised folio keeps one and gives the others to its node's base
memory (vmemmap_dedup.rst); a split needs them again, and fails where the node has too
few.

Optimising needs nothing that can run out here: the fresh head page that the kernel
tries to allocate falls back to the old one, and page tables are not modelled. Only the
switch keeps a folio un-optimised, which is no error, as in the series.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from gmem.host_allocator.core.extents import Extents
from gmem.host_allocator.core.nodes import PAGES_PER_MEMMAP_PAGE, NumaNode
from gmem.host_allocator.core.values import VmemmapStatistics
from gmem.uapi.pages import PgRange

VMEMMAP_PAGES_KEPT: Final = 1


def vmemmap_pages(order: int) -> int:
    """Return the vmemmap pages of a huge folio that is not optimised."""
    return (1 << order) // PAGES_PER_MEMMAP_PAGE


def saved_vmemmap_pages(order: int) -> int:
    """Return the vmemmap pages that optimising one folio saves: 1G 4095, 2M 7."""
    return vmemmap_pages(order) - VMEMMAP_PAGES_KEPT


class Vmemmap:
    """The switch, the optimised folios of each order, and the totals."""

    def __init__(self, orders: Iterable[int], *, optimize_enabled: bool) -> None:
        """Start with nothing optimised; `optimize_enabled` is the sysctl's value."""
        self.optimize_enabled = optimize_enabled
        self.saved_pages = 0
        self.restored_pages_total = 0
        self.optimized_pages_total = 0
        self.restore_failures_total = 0
        self._optimized = {order: Extents() for order in orders}

    def optimize(self, node: NumaNode, frames: PgRange, order: int) -> int:
        """Optimise the folios of `order` in `frames`, none of which is.

        Returns the vmemmap pages given to base memory: 0 while the switch is off.
        """
        if not self.optimize_enabled:
            return 0
        saved = (len(frames) >> order) * saved_vmemmap_pages(order)
        node.give_vmemmap(saved)
        self._optimized[order].add(frames)
        self.saved_pages += saved
        self.optimized_pages_total += saved
        return saved

    def restore(
        self, node: NumaNode, runs: Sequence[PgRange], order: int
    ) -> int | None:
        """Take back the vmemmap pages of the optimised ones among folios in `runs`.

        Returns the pages taken from base memory; None where `node` has too few, and
        then only the count of failures has changed.
        """
        optimized = self._optimized[order]
        folios = sum(optimized.overlap(run) for run in runs) >> order
        needed = folios * saved_vmemmap_pages(order)
        if not node.take_vmemmap(needed):
            self.restore_failures_total += 1
            return None
        for run in runs:
            optimized.discard(run)
        self.saved_pages -= needed
        self.restored_pages_total += needed
        return needed

    def needed(self, frames: PgRange, order: int) -> int:
        """Return the vmemmap pages that restoring the folios in `frames` would take."""
        folios = self._optimized[order].overlap(frames) >> order
        return folios * saved_vmemmap_pages(order)

    def statistics(self) -> VmemmapStatistics:
        """Return the switch and the counts."""
        return VmemmapStatistics(
            optimize_enabled=self.optimize_enabled,
            saved_pages=self.saved_pages,
            restored_pages_total=self.restored_pages_total,
            optimized_pages_total=self.optimized_pages_total,
            restore_failures_total=self.restore_failures_total,
        )

    def check(self) -> None:
        """What is saved now is what the optimised folios gave; totals tell the same."""
        saved = [
            (len(folios) >> order) * saved_vmemmap_pages(order)
            for order, folios in self._optimized.items()
        ]
        assert sum(saved) == self.saved_pages
        kept = self.optimized_pages_total - self.restored_pages_total
        assert kept == self.saved_pages
