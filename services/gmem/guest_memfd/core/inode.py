"""One guest_memfd inode: its state, what is always true of it, what can be watched.

State only; what happens to it is in `operations` and below. An inode lives as long as
its file is open, a view is open, an operation uses it or (in some lineages) a page is
held; then it is evicted.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Final

from gmem.effects import Lock
from gmem.guest_memfd.core.bindings import Bindings
from gmem.guest_memfd.core.faultability import FaultabilityMap
from gmem.guest_memfd.core.filemap import Filemap
from gmem.guest_memfd.core.folio_locks import FolioLocks
from gmem.guest_memfd.core.mempolicies import MemPolicies
from gmem.guest_memfd.core.page_set import PageSet
from gmem.guest_memfd.core.references import References
from gmem.guest_memfd.core.values import InodeStatistics, MemPolicy, ViewKind
from gmem.uapi.flags import Faultability
from gmem.uapi.lineage import Lineage
from gmem.uapi.pages import PAGE_SHIFT, PgRange, order_of

if TYPE_CHECKING:
    from gmem.guest_memfd.core.lineage import LineageRules

FRAGMENTS_LISTED_MAX: Final = 1024
POISONED_LISTED_MAX: Final = 1024
_BLOCK_SHIFT: Final = 9


@dataclass(frozen=True, slots=True)
class InodeOptions:
    """What CreateGuestMemfd fixes for the life of an inode; sizes in bytes.

    `vm` alone may bind the file; empty: the first VM that binds it. `support_shared`
    and `init_private` are the 51-patch series' flags, `mmap` and `init_shared` those of
    mainline. `private_memory`: the VM is of a type that has it. `cgroup` pays for huge
    folios; empty: the root.
    """

    size: int
    page_size: int
    lineage: Lineage = Lineage.RFC_V1
    vm: str = ""
    mempolicy: MemPolicy = MemPolicy()  # noqa: RUF009 - frozen
    support_shared: bool = False
    init_private: bool = False
    mmap: bool = False
    init_shared: bool = False
    private_memory: bool = True
    cgroup: str = ""


class Inode:
    """The state of inode `number`, reserved under `handle` at the allocator.

    `transit` are the pages that an operation has withdrawn from their view; `poisoned`
    those with a memory error, of folios that are in the filemap; `users` counts
    operations under way, `uses` all there ever were; `gone` is set when eviction
    begins; `told` is what the journal has of some rows.
    """

    def __init__(
        self, number: int, options: InodeOptions, handle: int, rules: LineageRules
    ) -> None:
        self.number = number
        self.options = options
        self.handle = handle
        self.rules = rules
        self.vm = options.vm
        self.i_size = options.size
        self.page_size = options.page_size
        self.order = order_of(options.page_size)
        self.whole = PgRange(0, options.size >> PAGE_SHIFT)
        nr_pages = len(self.whole)
        self.invalidate_lock = Lock(f"invalidate_lock {number}")
        self.folio_locks = FolioLocks()
        self.faultability = FaultabilityMap(nr_pages)
        self.filemap = Filemap(nr_pages, self.order)
        self.references = References()
        self.bindings = Bindings(nr_pages)
        self.transit = PageSet(nr_pages)
        self.mempolicies = MemPolicies(options.mempolicy)
        self.poisoned = PageSet(nr_pages)
        self.file_open = True
        self.gone = False
        self.users = 0
        self.uses = 0
        self.rollback_warnings = 0
        self.told: dict[str, tuple[object, ...]] = {}

    def unit_of(self, pgoff: int) -> PgRange:
        """Return the pages of the unit that `pgoff` lies in."""
        return PgRange(pgoff, pgoff + 1).rounded_out(self.order)

    def wants_split(self, index: int) -> bool:
        """Tell whether the unit must be split: it is huge, and a page is shared."""
        if self.order == 0:
            return False
        return self.faultability.any_in(self.unit_of(index), Faultability.ALL)

    def shown_private(self, pages: PgRange) -> list[PgRange]:
        """Return the private pages that no operation has withdrawn from the guest."""
        private = self.faultability.runs_of(pages, Faultability.GUEST)
        return [run for part in private for run in self.transit.holes(part)]

    @property
    def serves_shared(self) -> bool:
        """Whether the guest's shared accesses come from the file too."""
        return self.rules.creation.serves_shared(self.options)

    @property
    def is_unused(self) -> bool:
        """Whether nothing keeps the inode alive."""
        if self.file_open or self.users or self.references.any_view_open:
            return False
        return not (self.references.holds and self.rules.holds_keep_inode)

    def statistics(self) -> InodeStatistics:
        """Return a snapshot; equal snapshots are equal inodes to every caller."""
        shared = self.faultability.shared_pages
        folios = self.filemap.nr_whole + self.filemap.nr_split
        counted = folios if self.rules.counts_blocks(self.page_size) else 0
        views = self.references.views_open
        return InodeStatistics(
            inode=self.number,
            lineage=self.options.lineage,
            vm=self.vm,
            i_size=self.i_size,
            page_size=self.page_size,
            st_blocks=counted * self.page_size >> _BLOCK_SHIFT,
            st_blksize=self.page_size,
            file_open=self.file_open,
            host_views_open=views[ViewKind.HOST],
            guest_views_open=views[ViewKind.GUEST],
            whole_folios=self.filemap.nr_whole,
            split_folios=self.filemap.nr_split,
            orphaned_folios=len(self.references.orphans),
            shared_pages=shared,
            private_pages=len(self.whole) - shared,
            bindings=self.bindings.all,
            holds=self.references.holds,
            fragments=self.faultability.first_fragments(FRAGMENTS_LISTED_MAX),
            nr_fragments=self.faultability.nr_fragments,
            rollback_warnings=self.rollback_warnings,
            cgroup=self.options.cgroup,
            poisoned_pages=self.poisoned.count,
            poisoned_offsets=self._poisoned_offsets(),
        )

    def _poisoned_offsets(self) -> tuple[int, ...]:
        runs = self.poisoned.members(self.whole)
        pages = (page << PAGE_SHIFT for run in runs for page in run)
        return tuple(islice(pages, POISONED_LISTED_MAX))

    def check(self) -> None:
        """Assert what is cheap to look at; every operation ends with it."""
        assert 0 <= self.faultability.shared_pages <= len(self.whole), self.number
        folios = self.filemap.nr_whole + self.filemap.nr_split
        assert 0 <= folios <= len(self.whole) >> self.order, (self.number, folios)
        assert self.filemap.nr_split >= 0, self.number
        assert self.order > 0 or self.filemap.nr_split == 0, self.number
        assert self.users >= 0, self.number
        self.references.check()

    def check_all(self) -> None:
        """Assert everything that holds when no operation is under way. Slow."""
        self.check()
        self.faultability.check()
        self.filemap.check()
        self.bindings.check()
        assert self.users == 0, self.users
        assert self.invalidate_lock.idle, self.number
        assert self.folio_locks.idle, self.number
        assert not self.transit, self.number
        self._check_structure()
        self._check_poisoned()

    def _check_poisoned(self) -> None:
        """Assert that memory errors are those of folios that are there."""
        for run in self.poisoned.members(self.whole):
            for index in run.huge_starts(self.order):
                assert self.filemap.is_present(index), (self.number, run)

    def _check_structure(self) -> None:
        """Assert that the views reach no whole folio that has a shared page."""
        for index, entry in self.filemap.entries(self.whole):
            overdue = not entry.split and self.wants_split(index)
            assert not (overdue and entry.attached), (index, entry)
