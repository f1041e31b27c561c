"""Known mistakes, made in the source text of a module when it is imported."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder, SourceLoader
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Final

from gmem.uapi.lineage import Lineage
from tests.support.sources import REPOSITORY

SERVICES: Final = REPOSITORY / "services"


@dataclass(frozen=True, slots=True)
class Mutant:
    """In module `module`, the text `old` (which is there once) becomes `new`.

    Histories of `lineage` find it.
    """

    module: str
    old: str
    new: str
    lineage: Lineage = Lineage.RFC_V1

    @property
    def path(self) -> Path:
        """The file of the module."""
        root = REPOSITORY if self.module.startswith("tests.") else SERVICES
        return root.joinpath(*self.module.split(".")).with_suffix(".py")

    def text(self) -> str:
        """Return what stands in the file."""
        return self.path.read_text()

    def source(self) -> str:
        """Return the mutated text."""
        text = self.text()
        found = text.count(self.old)
        assert found == 1, f"{self.old!r} stands {found} times in {self.path}"
        return text.replace(self.old, self.new)


_FOLIOS: Final = "gmem.guest_memfd.core.folios"
_FAULT: Final = "gmem.vmm.core.fault"

MUTANTS: Final[dict[str, Mutant]] = {
    "no second look at the hole after Allocate": Mutant(
        _FOLIOS,
        """        if inode.filemap.is_present(index):
            losers.append(folio)
        else:
            inode.filemap.insert(index, folio)
""",
        """        inode.filemap.insert(index, folio)
""",
    ),
    "no second look at the folio after Prepare": Mutant(
        "gmem.guest_memfd.core.operations",
        """        if is_bound_still and inode.filemap.get(unit.start) == entry:
            break
""",
        """        break
""",
    ),
    "no second look at the unit after its lock": Mutant(
        "gmem.guest_memfd.core.restructure",
        """        if entry is None or entry.split is inode.wants_split(index):
            return
""",
        """        assert entry is not None
""",
    ),
    "no second look at who was handed what before Free": Mutant(
        _FOLIOS,
        """    yield from invalidate_begin(inode, span, begun)
    yield from _drop(inode, batch)
""",
        """    yield from _drop(inode, batch)
""",
    ),
    "no second look at the folio lock after waiting": Mutant(
        "gmem.guest_memfd.core.folio_locks",
        "        while (other := self._holder_of(pages)) is not None:\n",
        "        if (other := self._holder_of(pages)) is not None:\n",
    ),
    "no second look at the sequence after GetPfn": Mutant(
        _FAULT,
        """    if vm.invalidation.must_retry(seq, PgRange(gfn, gfn + 1)):
        return Retry(vm.invalidation.seq)
    if failure""",
        "    if failure",
    ),
    "no look at brackets over the rest of a huge entry": Mutant(
        _FAULT,
        """    if vm.invalidation.must_retry(vm.invalidation.seq, around):
        order = 0
""",
        "",
    ),
    "no second look at the VM after its lock": Mutant(
        "gmem.vmm.core.registry",
        """        self.get(vm.name)
        vm.require_idle()
""",
        """        vm.require_idle()
""",
    ),
    "one reply in eight is not remembered": Mutant(
        "tests.sim.world",
        "        self._finished[request_id] = outcome\n",
        """        if request_id % 8:
            self._finished[request_id] = outcome
""",
    ),
    "a converted page is not zeroed": Mutant(
        "gmem.guest_memfd.core.conversion",
        "ClearUptodate(item.inode.number, item.pages)",
        "ClearUptodate(item.inode.number, PgRange(0, 0))",
    ),
    "a view is closed but not unmapped": Mutant(
        "gmem.guest_memfd.core.exposure",
        "    yield from perform(InvalidateView(number, view, pages))\n",
        "",
    ),
    "a view is unmapped before it refuses": Mutant(
        "gmem.guest_memfd.core.exposure",
        """    yield from perform(SetViewState(number, view, pages, PageState.CLOSING))
    yield from perform(InvalidateView(number, view, pages))
""",
        """    yield from perform(InvalidateView(number, view, pages))
    yield from perform(SetViewState(number, view, pages, PageState.CLOSING))
""",
    ),
    "a punched page is not quiesced": Mutant(
        "gmem.guest_memfd.core.operations",
        """        yield from perform(QuiesceView(inode.number, pages))
    yield from withdraw_value(inode, pages, Faultability.GUEST)
    freed""",
        """        pass
    yield from withdraw_value(inode, pages, Faultability.GUEST)
    freed""",
    ),
    "a conversion forgets what was in a page": Mutant(
        "gmem.guest_memfd.core.restructure",
        "        if not keeps_content:\n",
        "        if True:\n",
        Lineage.RFC_V2,
    ),
    "a folio that a dead inode left is lost": Mutant(
        "gmem.guest_memfd.core.deferred",
        "        return number if merge.ready else None\n",
        "        return None\n",
        Lineage.RFC_V2,
    ),
    "pages that become private are not unmapped": Mutant(
        "gmem.guest_memfd.core.conversion_exact",
        "        yield from perform(QuiesceView(item.inode.number, item.pages))\n",
        "        yield from ()\n",
        Lineage.RFC_V2,
    ),
    "a failed conversion is not undone": Mutant(
        "gmem.guest_memfd.core.conversion_exact",
        "            yield from _execute_back(item, opposite(to))\n",
        "            yield from ()\n",
        Lineage.RFC_V2,
    ),
    "a huge folio is not made whole before Free": Mutant(
        _FOLIOS,
        """    for folio in split:
        yield from perform(Reconstruct(inode.handle, folio))
    if folios:
""",
        """    if folios:
""",
    ),
}
"""By what was left out; each must be found within the fixed seeds."""


class _Loader(SourceLoader):
    """Loads one module from mutated text."""

    def __init__(self, mutant: Mutant) -> None:
        self._mutant = mutant

    def get_filename(self, fullname: str) -> str:
        return str(self._mutant.path)

    def get_data(self, path: str | bytes) -> bytes:
        return self._mutant.source().encode()

    def path_stats(self, path: str) -> dict[str, int]:
        # No cache of compiled code: it would outlive the mutant.
        raise OSError(path)


class _Finder(MetaPathFinder):
    """Finds the mutated module before anybody else does."""

    def __init__(self, mutant: Mutant) -> None:
        self._mutant = mutant

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname != self._mutant.module:
            return None
        return spec_from_loader(fullname, _Loader(self._mutant))


def install(mutant: Mutant) -> None:
    """Have this process import `mutant` instead of the module; before the cores."""
    assert mutant.module not in sys.modules, mutant.module
    sys.meta_path.insert(0, _Finder(mutant))
