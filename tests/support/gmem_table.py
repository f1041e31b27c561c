"""The page states of one inode, as the worlds of tests keep them."""

from __future__ import annotations

from dataclasses import dataclass, field

from gmem.guest_memfd.core.inode import Inode
from gmem.guest_memfd.core.poison import unusable, usable
from gmem.guest_memfd.core.values import PageState, ViewKind
from gmem.uapi.flags import Faultability
from gmem.uapi.pages import PgRange


@dataclass
class Table:
    """The page-state table of one inode; one byte per page in each view."""

    order: int
    views: dict[ViewKind, bytearray]
    uptodate: bytearray
    frames: dict[int, int] = field(default_factory=dict)

    def pfn_of(self, pgoff: int) -> int | None:
        unit = pgoff >> self.order
        if unit not in self.frames:
            return None
        return self.frames[unit] + (pgoff & ((1 << self.order) - 1))


def check_views(inode: Inode, table: Table) -> None:
    """Assert that a page is open where faultability says, and a lost one nowhere."""
    for lost in unusable(inode, inode.whole):
        for states in table.views.values():
            assert set(states[lost.start : lost.stop]) == {PageState.CLOSED}, lost
    for fragment in inode.faultability.runs(inode.whole):
        for part in usable(inode, fragment.pages):
            _check_shown(part, fragment.faultability, table)


def _check_shown(pages: PgRange, value: Faultability, table: Table) -> None:
    host, guest = (set(table.views[v][pages.start : pages.stop]) for v in ViewKind)
    if value is Faultability.ALL:
        assert host == {PageState.OPEN}, (pages, host)
        assert guest == {PageState.CLOSED}, (pages, guest)
    else:
        assert host == {PageState.CLOSED}, (pages, host)
        assert guest <= {PageState.OPEN, PageState.CLOSED}, (pages, guest)
