"""What an administrator may ask of pools, and one pool's pages becoming another's.

Writing N to /sys/kernel/mm/hugepages/hugepages-<kB>kB/demote makes N free 1G pages
into free 2M pages (demote_free_hugetlb_folios). Each takes its 4095 vmemmap pages back
first, and its 512 successors then save 7 each: 511 more vmemmap pages than before stay
taken from base memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from gmem.host_allocator.core.hstate import HState
from gmem.host_allocator.core.vmemmap import saved_vmemmap_pages
from gmem.uapi.errors import BadRequest, Exhausted, Reason, Unsupported
from gmem.uapi.pages import SIZE_1G, SIZE_2M, NodeId, format_size

DEMOTE_SIZE: Final = {SIZE_1G: SIZE_2M}
"""demote_size of each pool that has the file; HugeTLB has no size below 2M."""


def demote(
    source: HState, target: HState, nr_pages: int, allowed: Sequence[NodeId]
) -> tuple[int, int]:
    """Demote up to `nr_pages` pages; return how many, and how many were made of them.

    Exhausted VMEMMAP_RESTORE_FAILED where there were some and none could be.
    """
    done, made, failed = 0, 0, None
    for node, share in enumerate(source.demotable(nr_pages, allowed)):
        for _ in range(share):
            run = source.give_up(node)
            if run is None:
                failed = node
                break
            done += 1
            made += target.adopt(node, run)
    if failed is not None and not done:
        raise _no_vmemmap(source, failed)
    return done, made


def require_demote_size(page_size: int, target_page_size: int | None) -> int:
    """Return what pages of a pool are demoted to; Unsupported TARGET_UNSUPPORTED."""
    smaller = DEMOTE_SIZE.get(page_size)
    if smaller is None or target_page_size not in (None, smaller):
        asked = format_size(target_page_size or 0) if target_page_size else "less"
        way_out = f"to {format_size(smaller)}" if smaller else "1G pages instead"
        raise Unsupported(
            Reason.TARGET_UNSUPPORTED,
            f"{format_size(page_size)} pages cannot be demoted to {asked}: "
            f"demote {way_out}",
            page_size=page_size,
        )
    return smaller


def require_sizes(
    page_size: int,
    nr_huge_pages: int | None,
    nr_overcommit_huge_pages: int | None,
    node: int | None,
) -> None:
    """Refuse what a pool cannot be set to: SIZE_INVALID, ARGUMENT_INVALID (EINVAL)."""
    for nr_pages in (nr_huge_pages, nr_overcommit_huge_pages):
        if nr_pages is not None and nr_pages < 0:
            raise BadRequest(
                Reason.SIZE_INVALID,
                f"a pool of {nr_pages} pages cannot be: set 0 or more",
                nr_huge_pages=nr_pages,
            )
    if nr_huge_pages is None and nr_overcommit_huge_pages is None:
        raise BadRequest(
            Reason.ARGUMENT_INVALID,
            "neither nr_huge_pages nor nr_overcommit_huge_pages is given: set one",
        )
    if nr_overcommit_huge_pages is None:
        return
    if node is not None:
        raise BadRequest(
            Reason.ARGUMENT_INVALID,
            f"nr_overcommit_huge_pages of node {node} cannot be set: it is the whole "
            "host's; leave the node out",
            node=node,
        )
    if nr_overcommit_huge_pages and page_size == SIZE_1G:
        raise BadRequest(
            Reason.ARGUMENT_INVALID,
            f"{nr_overcommit_huge_pages} surplus 1G pages cannot be: gigantic pages "
            "are never surplus by overcommit; set 0, or grow the pool",
            nr_overcommit_huge_pages=nr_overcommit_huge_pages,
        )


def _no_vmemmap(source: HState, node: int) -> Exhausted:
    needed = saved_vmemmap_pages(source.order)
    free = len(source.nodes[node].base)
    return Exhausted(
        Reason.VMEMMAP_RESTORE_FAILED,
        f"demoting a {format_size(source.page_size)} page takes {needed} vmemmap pages "
        f"first, node {node} has {free} base pages free: free memory of that node",
        needed=needed,
        free_base_pages=free,
    )
