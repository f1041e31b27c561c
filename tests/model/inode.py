"""One file of the reference model: who may fault its pages, its folios, their bytes."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.model.pool import Pool
from tests.model.rules import Refused, Rules, differs, require


@dataclass(eq=False, slots=True)
class Folio:
    """A folio of the file's page size; `holds` are its pages in hands, by hold."""

    split: bool = False
    holds: dict[int, set[int]] = field(default_factory=dict)


@dataclass(slots=True)
class Hold:
    """Somebody's hold on pages; a `pin` counts in every series."""

    pin: bool
    folios: list[Folio] = field(default_factory=list)


class Inode:
    """A file of `nr_pages` pages in units (folios) of `unit` pages.

    `shared` has a 1 for each page that the host may fault, `ready` the pages that were
    filled (uptodate), `serves_shared` whether the guest's shared accesses come to it,
    `mappable` whether userspace can map it,
    `content` what was written, `mapped` who has which page in its
    page tables.
    """

    def __init__(
        self, rules: Rules, pool: Pool, nr_pages: int, holds: dict[int, Hold]
    ) -> None:
        self.rules = rules
        self.pool = pool
        self.unit = pool.unit
        self.nr_pages = nr_pages
        self.limit = nr_pages // pool.unit
        self.used = 0
        self.shared = bytearray(nr_pages)
        self.serves_shared = False
        self.mappable = True
        self.folios: dict[int, Folio] = {}
        self.orphans: list[Folio] = []
        self.ready: set[int] = set()
        self.content: dict[int, int] = {}
        self.mapped: set[tuple[str, int]] = set()
        self.open = True
        self.gone = False
        self.views = 0
        self.vm = ""
        self.bound: dict[tuple[str, int], range] = {}
        self.warnings = 0
        self._holds = holds

    # Looking.

    def any_shared(self, pages: range) -> bool:
        """Tell whether the host may fault a page of `pages`."""
        return b"\1" in self.shared[pages.start : pages.stop]

    def runs(self, pages: range, value: int) -> list[range]:
        """Return the maximal runs of `pages` that have a value."""
        found = []
        at = pages.start
        while at < pages.stop:
            start = self.shared.find(bytes([value]), at, pages.stop)
            if start < 0:
                break
            stop = self.shared.find(bytes([1 - value]), start, pages.stop)
            at = pages.stop if stop < 0 else stop
            found.append(range(start, at))
        return found

    def unit_of(self, index: int) -> range:
        """Return the pages of a unit."""
        return range(index * self.unit, (index + 1) * self.unit)

    def units(self, pages: range, *, out: bool) -> Iterator[int]:
        """Yield the units with a folio that touch `pages`, or lie inside them."""
        first, last = pages.start // self.unit, -(-pages.stop // self.unit)
        if not out:
            first, last = -(-pages.start // self.unit), pages.stop // self.unit
        yield from sorted(index for index in self.folios if first <= index < last)

    def held(self, pages: range, *, pins_only: bool) -> list[int]:
        """Return the pages of `pages` whose folio somebody holds."""
        return sorted(
            page
            for index in self.units(pages, out=True)
            for hold, parts in self.folios[index].holds.items()
            if self._holds[hold].pin or not pins_only
            for page in parts
            if page in pages
        )

    # Folios.

    def get_folio(self, page: int) -> Folio:
        """Allocate what is missing, split what has a shared page (ENOMEM)."""
        index = page // self.unit
        folio = self.folios.get(index)
        if folio is None:
            require(self.pool.unit == 1 or self.used < self.limit, errno.ENOMEM)
            self.pool.take()
            self.used += 1
            folio = self.folios[index] = Folio()
        if self.unit > 1 and not folio.split and self.any_shared(self.unit_of(index)):
            try:
                self.split(index)
            except Refused:
                self.drop(index)
                raise
        return folio

    def fill(self, pages: range) -> None:
        """Have a folio behind each page; what there is already stays on a failure."""
        for index in range(pages.start // self.unit, -(-pages.stop // self.unit)):
            self.get_folio(index * self.unit)

    def split(self, index: int) -> None:
        """Split a whole folio: its vmemmap pages come from base memory (ENOMEM)."""
        self.pool.restore_vmemmap()
        self.folios[index].split = True
        self._restructured(index)

    def merge(self, index: int) -> None:
        """Reconstruct a split folio: HVO gives its vmemmap pages back."""
        self.pool.save_vmemmap()
        self.folios[index].split = False
        self._restructured(index)

    def _restructured(self, index: int) -> None:
        if not self.rules.keeps_content:
            self.forget(self.unit_of(index))

    def match(self, pages: range, value: int) -> None:
        """Split, or make whole, the folios of pages that have become `value`."""
        if self.unit == 1:
            return
        for index in list(self.units(pages, out=bool(value) or self.rules.rounds_out)):
            wanted = self.any_shared(self.unit_of(index))
            split = self.folios[index].split
            if value and wanted and not split:
                self.split(index)
            if not value and split and not wanted:
                self.merge(index)

    def drop(self, index: int) -> None:
        """Take a folio out; it is free when nobody holds it."""
        folio = self.folios.pop(index)
        self.forget(self.unit_of(index))
        if folio.holds:
            self.orphans.append(folio)
        else:
            self.free(folio)

    def free(self, folio: Folio) -> None:
        """Give a folio back, whole."""
        if folio.split:
            self.pool.save_vmemmap()
        self.used -= 1
        self.pool.give(reserved=self.unit > 1)

    # Bytes.

    def forget(self, pages: range) -> None:
        """Have pages zeroed on their next use."""
        self.ready = {page for page in self.ready if page not in pages}
        self.zero(pages)

    def zero(self, pages: range) -> None:
        """Write zeros."""
        for page in [page for page in self.content if page in pages]:
            del self.content[page]

    def prepare(self, page: int) -> None:
        """Use a page for the first time: zeros, unless it was filled before."""
        assert differs(37)
        self.ready.add(page)

    def unmap(self, pages: range, who: str | None = None) -> None:
        """Take mappings away, those of one process or of all."""
        self.mapped = {
            (name, page)
            for name, page in self.mapped
            if page not in pages or who not in (None, name)
        }

    def store(self, pages: range, value: int) -> None:
        """Say who may fault pages."""
        self.shared[pages.start : pages.stop] = bytes([value]) * len(pages)

    # What can be done to it.

    def host_touch(self, page: int) -> None:
        """Fault a page in as userspace does; Refused stands for SIGBUS."""
        require(self.mappable and bool(self.shared[page]), errno.EACCES)
        self.get_folio(page)
        self.prepare(page)

    def allocate(self, pages: range) -> None:
        """Allocate ahead: both ends are rounded down to the page size."""
        unit = self.unit
        self.fill(range(pages.start // unit * unit, pages.stop // unit * unit))

    def punch(self, pages: range) -> None:
        """Free whole units, zero the rest; who may fault what stays as it is."""
        self.unmap(pages)
        inner = range(-(-pages.start // self.unit), pages.stop // self.unit)
        freed = range(inner.start * self.unit, inner.stop * self.unit)
        if not inner:
            freed = range(pages.start, pages.start)
        assert differs(38)
        for part in (
            range(pages.start, freed.start),
            range(freed.stop, pages.stop),
        ):
            self.zero(part)
        if self.rules.punch_is_whole:
            self._require_free_to_merge(freed)
        for index in list(self.units(freed, out=False)) if inner else ():
            if self.rules.punch_merges_first:
                self._require_free_to_merge(self.unit_of(index))
            self.drop(index)

    def _require_free_to_merge(self, pages: range) -> None:
        """Refuse where a huge page of `pages` is held: it would have to be merged."""
        held = self.held(pages, pins_only=False) if self.unit > 1 and pages else []
        require(not held, errno.EAGAIN, held[0] if held else None)
