"""Which view shows which page: a page is reachable through exactly one at a time.

    faultability   host view   guest view
    ALL            OPEN        CLOSED
    GUEST          CLOSED      OPEN
    poisoned       CLOSED      CLOSED
    changing       CLOSED      CLOSED

Only operations with the invalidate_lock held exclusively call these. Withdrawing is
refuse first (CLOSING), then unmap everywhere, then CLOSED: a fault that was being
answered has finished when the invalidation returns.
"""

from __future__ import annotations

from typing import Final

from gmem.effects import Op, perform
from gmem.guest_memfd.core.effects import InvalidateView, SetViewState
from gmem.guest_memfd.core.inode import Inode
from gmem.guest_memfd.core.poison import usable
from gmem.guest_memfd.core.values import PageState, ViewKind
from gmem.uapi.errors import NotFaultable, Reason
from gmem.uapi.flags import Faultability
from gmem.uapi.pages import PgRange

VIEW_OF: Final = {
    Faultability.GUEST: ViewKind.GUEST,
    Faultability.ALL: ViewKind.HOST,
}


def withdraw(inode: Inode, view: ViewKind, pages: PgRange) -> Op[bool]:
    """Make pages unreachable through a view, for every process.

    Tells whether bytes came back that were not stored yet.
    """
    number = inode.number
    yield from perform(SetViewState(number, view, pages, PageState.CLOSING))
    dirty = yield from perform(InvalidateView(number, view, pages))
    yield from perform(SetViewState(number, view, pages, PageState.CLOSED))
    return dirty


def withdraw_value(inode: Inode, pages: PgRange, value: Faultability) -> Op[bool]:
    """Withdraw those of `pages` that have a value, from the view that shows them.

    Tells whether bytes came back that were not stored yet.
    """
    runs = inode.faultability.runs_of(pages, value)
    if not runs:
        return False
    for run in runs:
        inode.transit.add(run)
    hull = PgRange(runs[0].start, runs[-1].stop)
    return (yield from withdraw(inode, VIEW_OF[value], hull))


def show(inode: Inode, pages: PgRange) -> Op[None]:
    """Open each page's view, as faultability says; of poisoned pages none."""
    inode.transit.discard(pages)
    for fragment in list(inode.faultability.runs(pages)):
        view = VIEW_OF[fragment.faultability]
        for part in usable(inode, fragment.pages):
            yield from perform(SetViewState(inode.number, view, part, PageState.OPEN))


def require_value(
    inode: Inode, pages: PgRange, value: Faultability, way_out: str
) -> None:
    """Raise NotFaultable (PAGE_NOT_FAULTABLE) at the first page of another value."""
    for fragment in inode.faultability.runs(pages):
        if fragment.faultability is not value:
            offset = fragment.pages.offset
            word = "private" if value is Faultability.ALL else "shared"
            raise NotFaultable(
                Reason.PAGE_NOT_FAULTABLE,
                f"the page at offset {offset:#x} of inode {inode.number} is {word}: "
                f"{way_out}",
                error_offset=offset,
                inode=inode.number,
            )


def with_withdrawn_guest(
    inode: Inode, parts: list[PgRange], body: Op[None]
) -> Op[None]:
    """Run `body` while private pages are withdrawn from the guest."""
    try:
        for part in parts:
            yield from withdraw_value(inode, part, Faultability.GUEST)
        yield from body
    finally:
        for part in parts:
            yield from show(inode, part)
