"""What crosses the allocator's boundary: folios, policies, statistics; all frozen.

Field names are those of sysfs and /proc/meminfo. Units are in the names: `pages` are
4K pages, `hpages` pages of the pool's size, `kb` KiB.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum

from gmem.uapi.pages import NodeId, Pfn, PgRange


@dataclass(frozen=True, slots=True, order=True)
class Folio:
    """One allocation unit: 2^order pages that begin at frame `pfn` of `node`."""

    pfn: Pfn
    order: int
    node: NodeId

    @property
    def frames(self) -> PgRange:
        """The frames of the folio."""
        return PgRange(self.pfn, self.pfn + (1 << self.order))

    def __str__(self) -> str:
        """Write `pfn 0x40000 order 18`, as the kernel's page dumps do."""
        return f"pfn {self.pfn:#x} order {self.order}"


@dataclass(frozen=True, slots=True)
class FolioRun:
    """Neighbouring folios of one reservation that are in the same state."""

    first: Folio
    nr_folios: int
    split: bool


@dataclass(frozen=True, slots=True)
class PoisonedFrame:
    """A frame with a memory error, and who has it.

    `nr_pages` is 1, or more where only the folio is known in which the error is: then
    `pfn` is its first frame. `handle` is 0 when nobody has it: it is withheld.
    """

    pfn: Pfn
    nr_pages: int
    handle: int = 0


class MemPolicyMode(Enum):
    """How a policy picks nodes (MPOL_*).

    INTERLEAVE goes round the nodes from one allocation of a reservation to the next:
    the series give no interleave index (NO_INTERLEAVE_INDEX), so that the offset in
    the file decides nothing.
    """

    DEFAULT = "default"
    BIND = "bind"
    PREFERRED = "preferred"
    INTERLEAVE = "interleave"


@dataclass(frozen=True, slots=True)
class Charging:
    """Which HugeTLB cgroup pays (empty: the root), and whether for reservations too."""

    cgroup: str = ""
    rsvd: bool = False


@dataclass(frozen=True, slots=True)
class MemPolicy:
    """A NUMA memory policy, as set_mempolicy(2) has it."""

    mode: MemPolicyMode = MemPolicyMode.DEFAULT
    nodes: tuple[int, ...] = ()


MPOL_DEFAULT = MemPolicy()
UNCHARGED = Charging()
"""The root pays for folios, which has no limit."""


@dataclass(frozen=True, slots=True)
class BootPool:
    """`hugepages=` of the command line: pages of one size, of one node or spread."""

    page_size: int
    nr_huge_pages: int
    node: int | None = None


@dataclass(frozen=True, slots=True)
class NodePoolStatistics:
    """One pool on one node: /sys/devices/system/node/nodeN/hugepages."""

    node: int
    nr_huge_pages: int
    free_huge_pages: int
    surplus_huge_pages: int


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """One pool: /sys/kernel/mm/hugepages/hugepages-<kB>kB."""

    page_size: int
    nr_huge_pages: int
    free_huge_pages: int
    resv_huge_pages: int
    surplus_huge_pages: int
    nr_overcommit_huge_pages: int
    nodes: tuple[NodePoolStatistics, ...]


@dataclass(frozen=True, slots=True)
class PoolUpdate:
    """What a write to nr_hugepages did; `missing_pages` of it could not be done."""

    pool: PoolStatistics
    missing_pages: int


@dataclass(frozen=True, slots=True)
class PoolDemotion:
    """What a write to demote did; `missing_pages` of it could not be done.

    `source` and `target` are the pools afterwards: one page of the source became
    `target_pages` / `demoted_pages` pages of the target.
    """

    source: PoolStatistics
    target: PoolStatistics
    demoted_pages: int
    target_pages: int
    missing_pages: int


@dataclass(frozen=True, slots=True)
class NodeMemoryStatistics:
    """The frames of one node, in 4K pages.

    What the fields and the pools leave over of `nr_pages` was withheld after memory
    errors.
    """

    node: int
    first_pfn: int
    nr_pages: int
    free_base_pages: int
    allocated_base_pages: int
    nr_memmap_pages: int
    managed_pages: int = field(compare=False)
    """MemTotal of the node: all but the boot memmap that HVO never gave back.

    Not compared: it only grows, whatever is undone.
    """


@dataclass(frozen=True, slots=True)
class PageFlagCount:
    """How many frames have a word of /proc/kpageflags (KPF_* bits)."""

    flags: int
    nr_pages: int


@dataclass(frozen=True, slots=True)
class VmemmapStatistics:
    """Counters of HVO in vmemmap pages; `_total` ones only grow."""

    optimize_enabled: bool
    saved_pages: int
    restored_pages_total: int
    optimized_pages_total: int
    restore_failures_total: int


@dataclass(frozen=True, slots=True)
class Meminfo:
    """The words of /proc/meminfo; HugePages_* are of the default size."""

    mem_total_kb: int
    mem_free_kb: int
    huge_pages_total: int
    huge_pages_free: int
    huge_pages_rsvd: int
    huge_pages_surp: int
    hugepagesize_kb: int
    hugetlb_kb: int
    hardware_corrupted_kb: int


@dataclass(frozen=True, slots=True)
class HostStatistics:
    """Everything that can be watched of one host's memory at one moment."""

    nodes: tuple[NodeMemoryStatistics, ...]
    pools: tuple[PoolStatistics, ...]
    vmemmap: VmemmapStatistics
    meminfo: Meminfo

    def pool(self, page_size: int) -> PoolStatistics:
        """Return the pool of `page_size`, which exists."""
        return next(pool for pool in self.pools if pool.page_size == page_size)

    def levels(self) -> HostStatistics:
        """Return a copy whose totals are 0: what must return when all is undone."""
        vmemmap = replace(
            self.vmemmap,
            restored_pages_total=0,
            optimized_pages_total=0,
            restore_failures_total=0,
        )
        return replace(self, vmemmap=vmemmap)


@dataclass(frozen=True, slots=True)
class ReservationStatistics:
    """One owner's claim on a page size: the series' subpool."""

    handle: int
    page_size: int
    owner: str
    max_hpages: int
    used_hpages: int
    rsv_hpages: int
    closing: bool
    cgroup: str = ""
