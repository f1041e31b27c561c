"""Changing who may fault pages, in the order of the 51-patch series.

    1. compute work: the sub-ranges whose value really changes; none is success.
    2. invalidate begin for each, rounded out to whole folios: no guest is handed
       anything of them.
    3. should proceed, item by item. To shared: withdraw the pages from the guest. To
       private: the host's mappings go, whoever has them; then nobody may hold a page.
       A refusal leaves no state changed, but the mappings are gone.
    4. execute, item by item: store faultability, then restructure.
    5. on error execute the opposite for every item begun, the failing one included.
    6. show the pages in their view; invalidate end.

While pages on the way to private are unmapped they are QUIESCED: a client that touches
one waits, and is served when the conversion fails and dies of SIGBUS when it does not.
So nobody dies of a conversion that failed. Contents are kept throughout.
"""

from __future__ import annotations

from collections.abc import Sequence

from gmem.effects import Op, perform
from gmem.guest_memfd.core.conversion import ConvertItem
from gmem.guest_memfd.core.effects import InvalidateEnd, QuiesceView, SetViewState
from gmem.guest_memfd.core.exposure import show, withdraw_value
from gmem.guest_memfd.core.faultability import opposite
from gmem.guest_memfd.core.in_use import require_safe_refcount
from gmem.guest_memfd.core.invalidation import invalidate_begin, invalidate_end
from gmem.guest_memfd.core.restructure import retire_whole_folios
from gmem.guest_memfd.core.rows import record
from gmem.guest_memfd.core.values import PageState, ViewKind
from gmem.uapi.errors import OPERATION_ERRORS
from gmem.uapi.flags import Faultability


def convert_exactly(
    items: Sequence[ConvertItem],
    to: Faultability,
    *,
    validate_only: bool = False,
    waits: bool = False,
) -> Op[None]:
    """Give every page of all items the value `to`, or change nothing at all.

    All invalidate_locks are held. Raises Contended (PAGE_IN_USE) with the offset of
    the first page that is held, or what the allocator raises. `validate_only` runs the
    checks and unmaps nothing.
    """
    # A refusal changes nothing here, whether the caller waits or not.
    del waits
    work = _compute_work(items, to)
    if validate_only:
        for item in work:
            _require_proceed(item, to)
        return
    begun: list[InvalidateEnd] = []
    try:
        for item in work:
            rounded = item.pages.rounded_out(item.inode.order)
            yield from invalidate_begin(item.inode, rounded, begun)
        for item in work:
            yield from _should_proceed(item, to)
        yield from _execute_all(work, to)
    finally:
        # All of it at once, and before a view shows any of it.
        inodes = {item.inode.number: item.inode for item in work}
        yield from record(list(inodes.values()), settled=True)
        for item in work:
            yield from show(item.inode, item.pages)
        yield from invalidate_end(begun)


def _compute_work(items: Sequence[ConvertItem], to: Faultability) -> list[ConvertItem]:
    """Return the sub-ranges that differ (kvm_gmem_convert_compute_work()).

    A file without SUPPORT_SHARED has no map of them in the series: never any work.
    """
    return [
        ConvertItem(item.inode, run)
        for item in items
        if item.inode.serves_shared
        for run in item.inode.faultability.runs_of(item.pages, opposite(to))
    ]


def _should_proceed(item: ConvertItem, to: Faultability) -> Op[None]:
    if to is Faultability.ALL:
        yield from withdraw_value(item.inode, item.pages, Faultability.GUEST)
    else:
        yield from perform(QuiesceView(item.inode.number, item.pages))
    _require_proceed(item, to)


def _require_proceed(item: ConvertItem, to: Faultability) -> None:
    if to is Faultability.GUEST:
        require_safe_refcount(item.inode, item.pages)


def _execute_all(work: Sequence[ConvertItem], to: Faultability) -> Op[None]:
    begun: list[ConvertItem] = []
    try:
        for item in work:
            begun.append(item)
            yield from _execute(item, to)
    except OPERATION_ERRORS:
        for item in begun:
            yield from _execute_back(item, opposite(to))
        raise
    if to is Faultability.GUEST:
        for item in work:
            number = item.inode.number
            yield from perform(
                SetViewState(number, ViewKind.HOST, item.pages, PageState.CLOSED)
            )


def _execute(item: ConvertItem, value: Faultability) -> Op[None]:
    """Store, then restructure: folios follow what faultability says by then."""
    item.inode.faultability.store(item.pages, value)
    yield from item.inode.rules.restructure.match(item.inode, item.pages, value)


def _execute_back(item: ConvertItem, value: Faultability) -> Op[None]:
    """Undo one item; where that fails too, the series warns and goes on."""
    try:
        yield from _execute(item, value)
    except OPERATION_ERRORS:
        item.inode.rollback_warnings += 1
        yield from retire_whole_folios(item.inode, item.pages)
