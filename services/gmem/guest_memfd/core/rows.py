"""What of the inodes must survive, as rows: incrementally out, and back in.

    next_inode                 the next number of an inode
    inode/N/head               what it was made with, its handle, whether it is open
    inode/N/bindings           its memslots
    inode/N/mempolicies        ranges that have a memory policy of their own
    inode/N/flip/PAGE          faultability changes here: shared or private from here on
    inode/N/folios/CHUNK       runs of [place, nr, pfn, node, split] in the filemap
    inode/N/hold/HOLD          who, and which pages of the filemap
    inode/N/orphans            folios that were punched while somebody held them
    deferred/MERGE             what a dead inode left behind

Faultability, bindings and head change under the exclusive invalidate_lock alone, and
are told only by who holds it: an operation that ends beside a conversion must not tell
half of the conversion. Folios and holds are told by whoever ends first, finished or
not: what the allocator says of a folio wins over its row anyway (see `restoring`).

Not told, because others know it: attached folios and what was filled (the page-state
table), open views (likewise). What was handed out to a guest is forgotten, and taken
for everything: one message too many to each VMM.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

from gmem.effects import Op, perform
from gmem.guest_memfd.core.effects import Record
from gmem.guest_memfd.core.inode import Inode
from gmem.guest_memfd.core.values import Binding, Folio, Hold, MemPolicy
from gmem.uapi.pages import PgRange

Changes: TypeAlias = dict[str, Any]


def record(inodes: Iterable[Inode], *, settled: bool) -> Op[None]:
    """Have journalled what has changed of inodes since it was last recorded.

    `settled`: their invalidate_locks are held exclusively.
    """
    changes: Changes = {}
    for inode in inodes:
        changes |= inode_changes(inode, settled=settled)
    if changes:
        yield from perform(Record(changes))


def inode_changes(inode: Inode, *, settled: bool) -> Changes:
    """Return the rows of an inode that have changed; None for those that are gone."""
    base = f"inode/{inode.number}"
    rows: Changes = {}
    if settled:
        if _is_news(inode, "head", _changing(inode)):
            rows[f"{base}/head"] = _head(inode)
        if _is_news(inode, "bindings", bindings := inode.bindings.all):
            found = [_binding_row(binding) for binding in bindings]
            rows[f"{base}/bindings"] = found or None
        for flip, is_there in inode.faultability.drain().items():
            rows[f"{base}/flip/{flip}"] = 1 if is_there else None
    if _is_news(inode, "mempolicies", policies := inode.mempolicies.all_set):
        rows[f"{base}/mempolicies"] = [_mempolicy_row(*one) for one in policies] or None
    for chunk, runs in inode.filemap.drain().items():
        rows[f"{base}/folios/{chunk}"] = runs or None
    for number, held in inode.references.drain().items():
        rows[f"{base}/hold/{number}"] = None if held is None else _hold_row(*held)
    if inode.references.drain_orphans():
        rows[f"{base}/orphans"] = _orphans(inode) or None
    return rows


def _is_news(inode: Inode, what: str, state: tuple[object, ...]) -> bool:
    """Tell whether a state is not the one told last; an empty one needs no telling.

    States are compared and not rows, which take longer to make: nothing of this
    changes in most operations.
    """
    if inode.told.get(what, ()) == state:
        return False
    inode.told[what] = state
    return True


def _changing(inode: Inode) -> tuple[object, ...]:
    """Return what of a head ever changes."""
    return inode.vm, inode.file_open, inode.rollback_warnings


def _orphans(inode: Inode) -> list[Any]:
    return [
        [*folio_row(orphan.folio), orphan.split, list(orphan.holders)]
        for orphan in inode.references.orphans
    ]


def _head(inode: Inode) -> Changes:
    options = inode.options
    return {
        "size": options.size,
        "page_size": options.page_size,
        "lineage": options.lineage.value,
        "made_for": options.vm,
        "mempolicy": [options.mempolicy.mode.value, list(options.mempolicy.nodes)],
        "support_shared": options.support_shared,
        "init_private": options.init_private,
        "mmap": options.mmap,
        "init_shared": options.init_shared,
        "private_memory": options.private_memory,
        "cgroup": options.cgroup,
        "handle": inode.handle,
        "vm": inode.vm,
        "file_open": inode.file_open,
        "rollback_warnings": inode.rollback_warnings,
    }


def _binding_row(binding: Binding) -> list[Any]:
    pages = binding.pages
    return [
        binding.vm,
        binding.slot,
        binding.base_gfn,
        pages.start,
        pages.stop,
        binding.host_faultable,
        binding.vmm_target,
    ]


def _mempolicy_row(pages: PgRange, policy: MemPolicy) -> list[Any]:
    return [*_ends(pages), policy.mode.value, list(policy.nodes)]


def _hold_row(hold: Hold, live: Sequence[PgRange]) -> list[Any]:
    return [
        hold.kind.value,
        hold.holder,
        hold.client,
        hold.ttl_ms,
        _ends(hold.pages),
        [_ends(part) for part in live],
    ]


def _ends(pages: PgRange) -> list[int]:
    return [pages.start, pages.stop]


def folio_row(folio: Folio) -> list[int]:
    """Return the row of a folio."""
    return [folio.pfn, folio.order, folio.node]
