"""Mistakes that histories of tests/sim must find: what is left out, after an effect.

Each within 200 seeds of one lineage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from gmem.uapi.lineage import Lineage
from tests.mutants.mutant import Mutant

SEEDS: Final = 200
_TEST: Final = "tests/sim/test_sim.py::test_world_stays_consistent_then_converges"
_FOLIOS: Final = "gmem.guest_memfd.core.folios"
_FAULT: Final = "gmem.vmm.core.fault"


def _mutant(
    module: str, old: str, new: str, lineage: Lineage = Lineage.RFC_V1
) -> Mutant:
    options = ("--seeds", str(SEEDS), "--lineage", str(lineage))
    return Mutant(module, old, new, f"{_TEST}[{lineage}]", options)


SIM: Final[Mapping[str, Mutant]] = {
    "no second look at the hole after Allocate": _mutant(
        _FOLIOS,
        """        if inode.filemap.is_present(index):
            losers.append(folio)
        else:
            inode.filemap.insert(index, folio)
""",
        """        inode.filemap.insert(index, folio)
""",
    ),
    "no second look at the folio after Prepare": _mutant(
        "gmem.guest_memfd.core.operations",
        """        if is_bound_still and inode.filemap.get(unit.start) == entry:
            break
""",
        """        break
""",
    ),
    "no second look at the unit after its lock": _mutant(
        "gmem.guest_memfd.core.restructure",
        """        if entry is None or entry.split is inode.wants_split(index):
            return
""",
        """        assert entry is not None
""",
    ),
    "no second look at who was handed what before Free": _mutant(
        _FOLIOS,
        """    yield from invalidate_begin(inode, span, begun)
    yield from _drop(inode, batch)
""",
        """    yield from _drop(inode, batch)
""",
    ),
    "no second look at the folio lock after waiting": _mutant(
        "gmem.guest_memfd.core.folio_locks",
        "        while (other := self._holder_of(pages)) is not None:\n",
        "        if (other := self._holder_of(pages)) is not None:\n",
    ),
    "no second look at the sequence after GetPfn": _mutant(
        _FAULT,
        """    if vm.invalidation.must_retry(seq, PgRange(gfn, gfn + 1)):
        return Retry(vm.invalidation.seq)
    if failure""",
        "    if failure",
    ),
    "no look at brackets over the rest of a huge entry": _mutant(
        _FAULT,
        """    if vm.invalidation.must_retry(vm.invalidation.seq, around):
        order = 0
""",
        "",
    ),
    "no second look at the VM after its lock": _mutant(
        "gmem.vmm.core.registry",
        """        self.get(vm.name)
        vm.require_idle()
""",
        """        vm.require_idle()
""",
    ),
    "one reply in eight is not remembered": _mutant(
        "tests.sim.world",
        "        self._finished[request_id] = outcome\n",
        """        if request_id % 8:
            self._finished[request_id] = outcome
""",
    ),
    "a converted page is not zeroed": _mutant(
        "gmem.guest_memfd.core.conversion",
        "ClearUptodate(item.inode.number, item.pages)",
        "ClearUptodate(item.inode.number, PgRange(0, 0))",
    ),
    "a view is closed but not unmapped": _mutant(
        "gmem.guest_memfd.core.exposure",
        "    dirty = yield from perform(InvalidateView(number, view, pages))\n",
        "    dirty = False\n",
    ),
    "a view is unmapped before it refuses": _mutant(
        "gmem.guest_memfd.core.exposure",
        """    yield from perform(SetViewState(number, view, pages, PageState.CLOSING))
    dirty = yield from perform(InvalidateView(number, view, pages))
""",
        """    dirty = yield from perform(InvalidateView(number, view, pages))
    yield from perform(SetViewState(number, view, pages, PageState.CLOSING))
""",
    ),
    "a punched page is not quiesced": _mutant(
        "gmem.guest_memfd.core.operations",
        """        yield from perform(QuiesceView(inode.number, pages))
    yield from withdraw_value(inode, pages, Faultability.GUEST)
    freed""",
        """        pass
    yield from withdraw_value(inode, pages, Faultability.GUEST)
    freed""",
    ),
    "a conversion forgets what was in a page": _mutant(
        "gmem.guest_memfd.core.restructure",
        "        if not keeps_content:\n",
        "        if True:\n",
        Lineage.RFC_V2,
    ),
    "a folio that a dead inode left is lost": _mutant(
        "gmem.guest_memfd.core.deferred",
        "        return number if merge.ready else None\n",
        "        return None\n",
        Lineage.RFC_V2,
    ),
    "pages that become private are not unmapped": _mutant(
        "gmem.guest_memfd.core.conversion_exact",
        "        yield from perform(QuiesceView(item.inode.number, item.pages))\n",
        "        yield from ()\n",
        Lineage.RFC_V2,
    ),
    "a failed conversion is not undone": _mutant(
        "gmem.guest_memfd.core.conversion_exact",
        "            yield from _execute_back(item, opposite(to))\n",
        "            yield from ()\n",
        Lineage.RFC_V2,
    ),
    "a huge folio is not made whole before Free": _mutant(
        _FOLIOS,
        """    for folio in split:
        yield from perform(Reconstruct(inode.handle, folio))
    if folios:
""",
        """    if folios:
""",
    ),
    "an in-place conversion begins with the last huge page": _mutant(
        "gmem.guest_memfd.core.conversion_in_place",
        """        for batch in _batches(item):
""",
        """        for batch in reversed(list(_batches(item))):
""",
        Lineage.IN_PLACE,
    ),
    "an in-place conversion blames the beginning of its file": _mutant(
        "gmem.guest_memfd.core.conversion_in_place",
        """{"error_offset": pages.offset, """,
        """{"error_offset": 0, """,
        Lineage.IN_PLACE,
    ),
    "shared pages are handed out past one with a memory error": _mutant(
        "gmem.guest_memfd.core.operations",
        """    if lost:
        reach = PgRange(reach.start, lost[0].start)
""",
        "    del lost\n",
        Lineage.RFC_V2,
    ),
}
"""By what was left out; each must be found within the fixed seeds."""
