"""Changing who may fault pages as KVM_SET_MEMORY_ATTRIBUTES2 does it, in place.

    1. a range that has the value already is success.
    2. to private: the host's mappings go, whoever has them; then nobody may hold a
       page. One that is held is looked at once more, after the references that a CPU
       keeps for a moment have been drained.
    3. invalidate begin, and the guest's mappings go.
    4. restructure, store, show the pages in their view; invalidate end.

With 4K pages the range is one step: all or nothing. With huge pages each of them is a
step of its own, as far as the range reaches into it. A failure stops there: what was
converted before stays, and `error_offset` says how far it came. Several ranges are one
call after the other.

Contents are kept. As in `conversion_exact`, pages that are unmapped and not yet private
are QUIESCED: who touches one waits, and dies only of a conversion that came to be.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gmem.effects import Op, perform
from gmem.guest_memfd.core.conversion import ConvertItem
from gmem.guest_memfd.core.effects import (
    DrainLru,
    InvalidateEnd,
    QuiesceView,
    SetViewState,
)
from gmem.guest_memfd.core.exposure import show, withdraw_value
from gmem.guest_memfd.core.faultability import opposite
from gmem.guest_memfd.core.in_use import require_safe_refcount
from gmem.guest_memfd.core.inode import Inode
from gmem.guest_memfd.core.invalidation import invalidate_begin, invalidate_end
from gmem.guest_memfd.core.restructure import retire_whole_folios
from gmem.guest_memfd.core.rows import record
from gmem.guest_memfd.core.values import PageState, ViewKind
from gmem.uapi.errors import (
    OPERATION_ERRORS,
    BadRequest,
    Contended,
    KernelError,
    Reason,
    make_error,
)
from gmem.uapi.flags import Faultability
from gmem.uapi.pages import PgRange


def convert_in_place(
    items: Sequence[ConvertItem],
    to: Faultability,
    *,
    validate_only: bool = False,
    waits: bool = False,
) -> Op[None]:
    """Give every page of the items the value `to`, batch by batch.

    All invalidate_locks are held. Raises BadRequest (ATTRIBUTE_UNSUPPORTED), Contended
    (PAGE_IN_USE) or what the allocator raises, with the offset of what failed; what
    lies before it stays converted. `validate_only` runs the checks and unmaps nothing;
    with `waits` they run before anything is changed.
    """
    for item in items:
        _require_private_memory(item.inode)
        if validate_only or waits:
            _require_proceed(item.inode, item.pages, to)
    if validate_only:
        return
    for item in items:
        for batch in _batches(item):
            if item.inode.faultability.any_in(batch, opposite(to)):
                yield from _convert_batch(item.inode, batch, to)


def _batches(item: ConvertItem) -> Iterator[PgRange]:
    """Cut a range at the huge pages; one of 4K pages stays whole."""
    inode, at = item.inode, item.pages.start
    while at < item.pages.stop:
        stop = inode.unit_of(at).stop if inode.order else item.pages.stop
        yield PgRange(at, min(stop, item.pages.stop))
        at = stop


def _convert_batch(inode: Inode, pages: PgRange, to: Faultability) -> Op[None]:
    begun: list[InvalidateEnd] = []
    try:
        if to is Faultability.GUEST:
            yield from perform(QuiesceView(inode.number, pages))
            yield from _require_safe(inode, pages)
        rounded = pages.rounded_out(inode.order)
        yield from invalidate_begin(inode, rounded, begun)
        if to is Faultability.ALL:
            yield from withdraw_value(inode, pages, Faultability.GUEST)
        yield from _store(inode, pages, to)
        if to is Faultability.GUEST:
            yield from perform(
                SetViewState(inode.number, ViewKind.HOST, pages, PageState.CLOSED)
            )
    except KernelError as error:
        raise _at(error, inode, pages) from error
    finally:
        # Before a view shows it; what a later batch does is recorded by itself.
        yield from record([inode], settled=True)
        yield from show(inode, pages)
        yield from invalidate_end(begun)


def _require_safe(inode: Inode, pages: PgRange) -> Op[None]:
    """Look at the references, and once more after those of a moment have gone."""
    try:
        require_safe_refcount(inode, pages)
    except Contended:
        yield from perform(DrainLru(inode.number))
        require_safe_refcount(inode, pages)


def _require_proceed(inode: Inode, pages: PgRange, to: Faultability) -> None:
    if to is Faultability.GUEST:
        require_safe_refcount(inode, pages)


def _store(inode: Inode, pages: PgRange, to: Faultability) -> Op[None]:
    """Store and restructure, or leave both as they were.

    The series restructures first; folios here follow what is stored. Nobody sees the
    pages meanwhile, and a failure stores what was there.
    """
    changed = inode.faultability.runs_of(pages, opposite(to))
    inode.faultability.store(pages, to)
    try:
        yield from inode.rules.restructure.match(inode, pages, to)
    except OPERATION_ERRORS:
        for run in changed:
            inode.faultability.store(run, opposite(to))
        yield from retire_whole_folios(inode, pages)
        raise


def _require_private_memory(inode: Inode) -> None:
    if not inode.options.private_memory:
        raise BadRequest(
            Reason.ATTRIBUTE_UNSUPPORTED,
            f"the VM of inode {inode.number} has no private memory: use a "
            "SW_PROTECTED VM",
            inode=inode.number,
        )


def _at(error: KernelError, inode: Inode, pages: PgRange) -> KernelError:
    """Return a refusal that says where it was: at its page, or else at its batch."""
    numbers = {"error_offset": pages.offset, "inode": inode.number, **error.numbers}
    return make_error(
        error.reason, error.sentence, lineage=inode.options.lineage, **numbers
    )
