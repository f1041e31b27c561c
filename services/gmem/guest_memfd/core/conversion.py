"""Changing who may fault pages, in the order of the 39-patch series.

    1. refuse what can be refused: to private, nothing may be mapped or pinned. The
       host view is open meanwhile, so nobody gets SIGBUS from a refusal.
    2. for each range: withdraw it from its view, store faultability, restructure.
    3. clear uptodate over all ranges: pages are zeroed on their next use by anybody.
    4. show the ranges in their new view.

A failure of 1 or 2 is rolled back as kvm_gmem_should_set_attributes() does it: with the
*opposite* value over the *whole* of all ranges, whatever their pages had before. So a
refused conversion to private leaves a range that was partly private faultable
throughout. Where that rollback fails too, the series warns and stops; so do we.

The VMM has zapped its stage 2 before it calls; a VM that is not the caller cannot be
bound to the inode. Whether a range needs converting at all is decided by the VMM's
attributes; a range of which every page has the value already is left alone here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from gmem.effects import Op, perform
from gmem.guest_memfd.core.effects import ClearUptodate, QuiesceView
from gmem.guest_memfd.core.exposure import show, withdraw_value
from gmem.guest_memfd.core.faultability import opposite
from gmem.guest_memfd.core.in_use import (
    require_unmapped_and_unpinned,
    require_unpinned,
)
from gmem.guest_memfd.core.inode import Inode
from gmem.guest_memfd.core.restructure import retire_whole_folios
from gmem.guest_memfd.core.rows import record
from gmem.uapi.errors import OPERATION_ERRORS, BadRequest, Reason
from gmem.uapi.flags import Faultability
from gmem.uapi.pages import PgRange


@dataclass(frozen=True, slots=True)
class ConvertItem:
    """One range of one inode that is to be converted."""

    inode: Inode
    pages: PgRange


class ConvertPolicy(Protocol):
    """How a series converts: what refuses, in which order, what a failure leaves."""

    def __call__(
        self,
        items: Sequence[ConvertItem],
        to: Faultability,
        *,
        validate_only: bool,
        waits: bool,
    ) -> Op[None]:
        """Give every page of all items the value; their invalidate_locks are held.

        With `waits` the caller waits for pages in use and tries again: such a refusal
        changes nothing, whatever the series does after one.
        """


def convert(
    items: Sequence[ConvertItem],
    to: Faultability,
    *,
    validate_only: bool = False,
    waits: bool = False,
) -> Op[None]:
    """Give every page of all items the value `to`, or roll all of them back.

    All invalidate_locks are held. Raises Contended (PAGE_IN_USE), or what the
    allocator raises. `validate_only` runs the checks and changes nothing.
    """
    work = [
        item
        for item in items
        if item.inode.faultability.any_in(item.pages, opposite(to))
    ]
    if not work:
        return
    try:
        yield from _check(work, to)
    except OPERATION_ERRORS:
        if not validate_only and not waits:
            yield from opposite_over_the_whole(items, opposite(to))
        raise
    if validate_only:
        return
    try:
        for item in work:
            yield from _execute(item, to)
    except OPERATION_ERRORS:
        yield from opposite_over_the_whole(items, opposite(to))
        raise

    for item in work:
        # kvm_gmem_clear_prepared(): what was in the pages is forgotten.
        yield from perform(ClearUptodate(item.inode.number, item.pages))
    yield from _record(work)
    for item in work:
        yield from show(item.inode, item.pages)


def require_disjoint(items: Sequence[ConvertItem]) -> None:
    """Refuse no range at all, and a page given twice: RANGE_EMPTY, ARGUMENT_INVALID."""
    if not items:
        raise BadRequest(Reason.RANGE_EMPTY, "no range is given: give one or more")
    if any(item.inode.rules is not items[0].inode.rules for item in items):
        raise BadRequest(
            Reason.ARGUMENT_INVALID,
            "the ranges are of inodes of more than one lineage: convert them apart",
        )
    ordered = sorted(items, key=lambda item: (item.inode.number, item.pages))
    for first, second in pairwise(ordered):
        if first.inode is second.inode and first.pages.overlaps(second.pages):
            raise BadRequest(
                Reason.ARGUMENT_INVALID,
                f"two ranges of inode {first.inode.number} overlap at offset "
                f"{second.pages.offset:#x}: give each page once",
                inode=first.inode.number,
                offset=second.pages.offset,
            )


def opposite_over_the_whole(
    items: Sequence[ConvertItem], back: Faultability
) -> Op[None]:
    """Store `back` over the whole of all items; stop where that fails, and warn."""
    try:
        for item in items:
            try:
                yield from _write_back(item, back)
            except OPERATION_ERRORS:
                item.inode.rollback_warnings += 1
                break
        for item in items:
            yield from retire_whole_folios(item.inode, item.pages)
    finally:
        yield from _record(items)
        for item in items:
            yield from show(item.inode, item.pages)


def _record(items: Sequence[ConvertItem]) -> Op[None]:
    """Record all of it at once, and before a view shows any of it."""
    yield from record([item.inode for item in items], settled=True)


def _check(work: Sequence[ConvertItem], to: Faultability) -> Op[None]:
    if to is Faultability.GUEST:
        for item in work:
            yield from require_unmapped_and_unpinned(item.inode, item.pages)


def _execute(item: ConvertItem, to: Faultability) -> Op[None]:
    """Convert one range; its pages are in no view afterwards."""
    inode, pages = item.inode, item.pages
    if to is Faultability.GUEST:
        yield from withdraw_value(inode, pages, Faultability.ALL)
    elif inode.faultability.any_in(pages, Faultability.ALL):
        # They stay shared: whoever touches them waits for their new, zeroed content.
        yield from perform(QuiesceView(inode.number, pages))
    yield from withdraw_value(inode, pages, Faultability.GUEST)

    inode.faultability.store(pages, to)
    yield from inode.rules.restructure.match(inode, pages, to)


def _write_back(item: ConvertItem, back: Faultability) -> Op[None]:
    inode, pages = item.inode, item.pages
    yield from withdraw_value(inode, pages, opposite(back))
    inode.faultability.store(pages, back)
    if back is Faultability.GUEST:
        # Nothing is mapped any more: the host view has been withdrawn.
        require_unpinned(inode, pages)
    yield from inode.rules.restructure.match(inode, pages, back)
