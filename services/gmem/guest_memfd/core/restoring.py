"""Inodes made again from their rows, and brought in line with the allocator.

The journal has every finished operation, and of the one that a kill cut off perhaps its
folios. Of folios the allocator knows best: it took part in every step, and has its own
journal. So a unit whose folio it has no longer is a hole (a punch was cut off behind
that free), a folio is split exactly if it says so, and one that lies in no inode goes
back. Faultability is that before the operation, or that after it where the operation
had come as far as showing it; never a mixture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gmem.effects import Op, perform
from gmem.guest_memfd.core.effects import FOLIO_BATCH_MAX, Free, Reconstruct
from gmem.guest_memfd.core.inode import Inode, InodeOptions
from gmem.guest_memfd.core.lineage import LineageRules
from gmem.guest_memfd.core.references import Orphan
from gmem.guest_memfd.core.rows import inode_changes
from gmem.guest_memfd.core.values import (
    Binding,
    Folio,
    Hold,
    HoldKind,
    MemPolicy,
    MemPolicyMode,
)
from gmem.uapi.lineage import Lineage
from gmem.uapi.pages import Gfn, NodeId, Pfn, PgRange


@dataclass(frozen=True, slots=True)
class LiveFolio:
    """A folio of a reservation that the allocator has given out."""

    folio: Folio
    split: bool


def reconcile(
    inode: Inode, live: Mapping[int, LiveFolio], attached: Mapping[int, int]
) -> list[LiveFolio]:
    """Believe the allocator about the folios of an inode; return those left over.

    `live` are by frame; `attached` has the frame that a predecessor's page-state table
    shows at each unit. Such a folio belongs there, though it was not recorded: somebody
    may use it already. No folio is attached afterwards.
    """
    used: set[int] = set()
    for index, entry in list(inode.filemap.entries(inode.whole)):
        known = live.get(entry.folio.pfn)
        if known is None:
            inode.filemap.remove(index)
            continue
        used.add(entry.folio.pfn)
        if known.split is not entry.split:
            inode.filemap.set_split(index, split=known.split)
    _reconcile_orphans(inode, live, used)
    for index, pfn in attached.items():
        known = live.get(pfn)
        if known and pfn not in used and not inode.filemap.is_present(index):
            used.add(pfn)
            inode.filemap.insert(index, known.folio)
            if known.split:
                inode.filemap.set_split(index, split=True)
    return [folio for pfn, folio in live.items() if pfn not in used]


def strays(inode: Inode, live: Mapping[int, LiveFolio]) -> list[LiveFolio]:
    """Return what is out for an inode that rested, and that it knows nothing of."""
    known = {orphan.folio.pfn for orphan in inode.references.orphans}
    known |= {entry.folio.pfn for _, entry in inode.filemap.entries(inode.whole)}
    return [folio for pfn, folio in live.items() if pfn not in known]


def _reconcile_orphans(
    inode: Inode, live: Mapping[int, LiveFolio], used: set[int]
) -> None:
    kept: list[Orphan] = []
    for orphan in inode.references.orphans:
        known = live.get(orphan.folio.pfn)
        if known is not None and orphan.folio.pfn not in used:
            used.add(orphan.folio.pfn)
            kept.append(Orphan(orphan.folio, known.split, orphan.holders))
    if kept != inode.references.orphans:
        inode.references.orphans = kept
        inode.references.touch_orphans()


def give_back(handle: int, folios: Sequence[LiveFolio]) -> Op[None]:
    """Return folios that are in no inode: whole ones are what the allocator takes."""
    for left in folios:
        if left.split:
            yield from perform(Reconstruct(handle, left.folio))
    whole = [left.folio for left in folios]
    for at in range(0, len(whole), FOLIO_BATCH_MAX):
        yield from perform(Free(handle, tuple(whole[at : at + FOLIO_BATCH_MAX])))


def restore_inodes(
    rows: Mapping[str, Any], table: Mapping[Lineage, LineageRules]
) -> dict[int, Inode]:
    """Make the inodes whose changes, one after the other, left `rows`; by number."""
    parts: dict[int, dict[str, Any]] = {}
    for key, row in rows.items():
        if key.startswith("inode/"):
            _, number, rest = key.split("/", 2)
            parts.setdefault(int(number), {})[rest] = row
    # Folios of an inode whose head was never told are of a creation that was cut off.
    whole = {n: part for n, part in parts.items() if "head" in part}
    return {number: _restore(number, whole[number], table) for number in sorted(whole)}


def _restore(
    number: int, rows: Mapping[str, Any], table: Mapping[Lineage, LineageRules]
) -> Inode:
    head = rows["head"]
    mode, nodes = head["mempolicy"]
    lineage = Lineage(head["lineage"])
    options = InodeOptions(
        size=head["size"],
        page_size=head["page_size"],
        lineage=lineage,
        vm=head["made_for"],
        mempolicy=MemPolicy(MemPolicyMode(mode), tuple(nodes)),
        support_shared=head["support_shared"],
        init_private=head["init_private"],
        mmap=head["mmap"],
        init_shared=head["init_shared"],
        private_memory=head["private_memory"],
        cgroup=head["cgroup"],
    )
    inode = Inode(number, options, head["handle"], table[lineage])
    inode.vm, inode.file_open = head["vm"], head["file_open"]
    inode.rollback_warnings = head["rollback_warnings"]
    for vm, slot, gfn, start, stop, faultable, target in rows.get("bindings", ()):
        pages = PgRange(start, stop)
        inode.bindings.bind(Binding(vm, slot, Gfn(gfn), pages, faultable, target))
        # What the guest was handed is not known: everything.
        inode.bindings.require(vm, slot).handed_out.add(pages)
    for start, stop, word, named in rows.get("mempolicies", ()):
        policy = MemPolicy(MemPolicyMode(word), tuple(named))
        inode.mempolicies.store(PgRange(start, stop), policy)
    flips = [int(key.removeprefix("flip/")) for key in rows if key.startswith("flip/")]
    inode.faultability.reset(sorted(flips))
    for key, row in rows.items():
        kind, _, rest = key.partition("/")
        if kind == "folios":
            inode.filemap.restore(int(rest), row)
    holds = [int(key.removeprefix("hold/")) for key in rows if key.startswith("hold/")]
    for hold in sorted(holds):
        _restore_hold(inode, hold, rows[f"hold/{hold}"])
    for pfn, order, node, split, holders in rows.get("orphans", ()):
        orphan = Orphan(Folio(Pfn(pfn), order, NodeId(node)), split, holders)
        inode.references.orphans.append(orphan)
    # Restoring told nothing new.
    inode_changes(inode, settled=True)
    return inode


def _restore_hold(inode: Inode, number: int, row: Sequence[Any]) -> None:
    kind, holder, client, ttl_ms, ends, live = row
    pages = PgRange(*ends)
    hold = Hold(number, HoldKind(kind), holder, client, inode.number, pages, ttl_ms)
    inode.references.take(hold, [PgRange(*part) for part in live])
