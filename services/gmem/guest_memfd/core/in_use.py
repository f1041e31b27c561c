"""What makes a page too busy to become private, and who is to blame."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias

from gmem.effects import Op, perform
from gmem.guest_memfd.core.effects import FindMappings
from gmem.guest_memfd.core.inode import Inode
from gmem.guest_memfd.core.values import HostMapping
from gmem.uapi.errors import Contended, Reason
from gmem.uapi.flags import Faultability
from gmem.uapi.pages import PAGE_SHIFT, PAGE_SIZE, PgRange

FreeableTest: TypeAlias = Callable[[Inode, PgRange], None]
"""Whether the folios of a range may be freed now.

Raises Contended (PAGE_IN_USE), and nothing of the range is freed.
"""

HOLDERS_NAMED_MAX: Final = 8
_MAPPED_OR_PINNED: Final = (
    "is mapped or pinned",
    "unmap it (MADV_DONTNEED) or unpin it",
)
_REFERENCED: Final = ("has references beside the filemap's", "put it")


def require_unmapped_and_unpinned(inode: Inode, pages: PgRange) -> Op[None]:
    """Raise Contended (PAGE_IN_USE) at the first page that is mapped or pinned.

    kvm_gmem_no_mappings_range(): folio_mapped() or folio_maybe_dma_pinned() on each
    folio that is present; plain references are not looked at. `error_offset` is the
    first such page, `holders` names everybody in the range.
    """
    mapped = yield from _mapped(inode, pages)
    pinned = [(pgoff, hold.holder) for pgoff, hold in inode.references.pins_in(pages)]
    users = sorted(mapped + pinned)
    if users:
        raise _contended(inode, users, _MAPPED_OR_PINNED, mapped=len(mapped))


def require_safe_refcount(inode: Inode, pages: PgRange) -> None:
    """Raise Contended (PAGE_IN_USE) at the first page with a reference too many.

    kvm_gmem_has_safe_refcount(): a folio has one reference of the filemap for each of
    its pages and one of whoever looks; a hold of either kind is one more. Mappings are
    gone already. `error_offset` is that page's, which is a folio: what is shared is
    split.
    """
    holds = inode.references.holds_in(pages)
    users = sorted((pgoff, hold.holder) for pgoff, hold in holds)
    if users:
        raise _contended(inode, users, _REFERENCED)


def anything_is_freeable(inode: Inode, pages: PgRange) -> None:
    """Let every folio be punched: one that is held lives on as an orphan."""
    del inode, pages


def require_unreferenced_if_split(inode: Inode, pages: PgRange) -> None:
    """Raise Contended (PAGE_IN_USE) for a held folio with shared pages.

    It must be merged before it can be freed (kvm_gmem_merge_truncate_indices()).
    """
    if inode.wants_split(pages.start):
        require_safe_refcount(inode, pages)


def require_unreferenced_if_huge(inode: Inode, pages: PgRange) -> None:
    """Raise Contended (PAGE_IN_USE) for a held page among huge ones.

    Whoever holds a page has it shared, so that its folio must be merged
    (merge_truncate_range()). 4K pages are not looked at.
    """
    if inode.order > 0:
        require_safe_refcount(inode, pages)


def require_unpinned(inode: Inode, pages: PgRange) -> None:
    """Raise Contended (PAGE_IN_USE) at the first page that is pinned."""
    pins = [(pgoff, hold.holder) for pgoff, hold in inode.references.pins_in(pages)]
    if pins:
        raise _contended(inode, sorted(pins), _MAPPED_OR_PINNED)


def _mapped(inode: Inode, pages: PgRange) -> Op[list[tuple[int, str]]]:
    """Return the first mapped page of each process that has one, and its name."""
    shared = inode.faultability.any_in(pages, Faultability.ALL)
    if not shared or not inode.filemap.present(pages, limit=1):
        return []
    mappings = yield from perform(FindMappings(inode.number, pages))
    found = []
    for mapping in mappings:
        pgoff = _first_mappable(inode, pages, mapping)
        if pgoff is not None:
            found.append((pgoff, mapping.holder))
    return found


def _first_mappable(inode: Inode, pages: PgRange, mapping: HostMapping) -> int | None:
    """Return the first page of a mapping that has a folio and is shared."""
    stop = -(-(mapping.offset + mapping.size) // PAGE_SIZE)
    window = PgRange(mapping.offset >> PAGE_SHIFT, stop).intersection(pages)
    for run in inode.faultability.runs_of(window, Faultability.ALL):
        present = inode.filemap.present(run, limit=1)
        if present:
            return max(run.start, present[0])
    return None


def _contended(
    inode: Inode,
    users: list[tuple[int, str]],
    words: tuple[str, str],
    *,
    mapped: int = 0,
) -> Contended:
    """Name who holds the pages; `mapped` of them do so by a mapping."""
    what, way_out = words
    names = list(dict.fromkeys(name for _, name in users))
    named = ", ".join(names[:HOLDERS_NAMED_MAX])
    if len(names) > HOLDERS_NAMED_MAX:
        named += f" and {len(names) - HOLDERS_NAMED_MAX} more"
    offset = users[0][0] << PAGE_SHIFT
    return Contended(
        Reason.PAGE_IN_USE,
        f"the page at offset {offset:#x} of inode {inode.number} {what}: have {named} "
        f"{way_out}, then try again",
        lineage=inode.options.lineage,
        error_offset=offset,
        inode=inode.number,
        holders=named,
        count=len(names),
        mapped=mapped,
    )
