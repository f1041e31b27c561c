"""The bytes of inodes in the page store: found by frame, whichever view shows them."""

from __future__ import annotations

from itertools import pairwise

from gmem.guest_memfd.page_states import InodeTable
from gmem.guest_memfd.page_store import PageStore
from gmem.uapi.pages import PAGE_SHIFT, PgRange


class StoreContents:
    """`Contents` over a `PageStore`; see `gmem.guest_memfd.views`."""

    def __init__(self, store: PageStore) -> None:
        self._store = store

    def clear_uptodate(self, table: InodeTable, pages: PgRange) -> None:
        """Have pages zeroed on their next use."""
        table.clear_uptodate(pages.start, pages.stop)

    def is_uptodate(self, table: InodeTable, pages: PgRange) -> bool:
        """Tell whether some page is marked as filled."""
        return bool(table.uptodate[pages.start : pages.stop].any())

    def prepare(self, table: InodeTable, pages: PgRange) -> None:
        """Zero and mark what has a folio and is not filled."""
        for start, stop in _frames_of(table, pages):
            for first, last in table.stale_in(start, stop):
                self._store.clear(_pfn(table, first), last - first)
                table.set_uptodate(first, last)

    def zero(self, table: InodeTable, pages: PgRange) -> None:
        """Write zeros over pages that have a folio; marks stay."""
        for start, stop in _frames_of(table, pages):
            self._store.clear(_pfn(table, start), stop - start)

    def copy_in(self, table: InodeTable, pages: PgRange, fd: int, offset: int) -> None:
        """Read a foreign file into frames; without a mark nobody sees them."""
        for start, stop in _frames_of(table, pages):
            at = offset + ((start - pages.start) << PAGE_SHIFT)
            length = (stop - start) << PAGE_SHIFT
            self._store.copy_in(_pfn(table, start), fd, at, length)


def _frames_of(table: InodeTable, pages: PgRange) -> list[tuple[int, int]]:
    """Return runs of pages that have a folio, each within one folio."""
    step = 1 << table.order
    runs: list[tuple[int, int]] = []
    for start, stop in table.attached_in(pages.start, pages.stop):
        cuts = range((start // step + 1) * step, stop, step)
        runs += pairwise([start, *cuts, stop])
    return runs


def _pfn(table: InodeTable, pgoff: int) -> int:
    pfn = table.pfn_of(pgoff)
    assert pfn is not None, (table.ino, pgoff)
    return pfn
