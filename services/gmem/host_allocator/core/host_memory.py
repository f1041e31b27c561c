"""One host's memory behind one front: every call goes to the backend of its page size.

The backends share the nodes: what a pool takes, 4K folios and vmemmap cannot have.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Final, TypeVar

from gmem.host_allocator.core import memory_errors
from gmem.host_allocator.core.base import BaseAllocator
from gmem.host_allocator.core.cgroups import Cgroups
from gmem.host_allocator.core.demotion import (
    demote,
    require_demote_size,
    require_sizes,
)
from gmem.host_allocator.core.extents import Extents
from gmem.host_allocator.core.hstate import HState
from gmem.host_allocator.core.hugetlb import HugetlbAllocator
from gmem.host_allocator.core.nodes import make_nodes, require_node
from gmem.host_allocator.core.page_flags import page_flags
from gmem.host_allocator.core.subpool import Handles
from gmem.host_allocator.core.values import (
    MPOL_DEFAULT,
    UNCHARGED,
    BootPool,
    Charging,
    Folio,
    FolioRun,
    HostStatistics,
    Meminfo,
    MemPolicy,
    PageFlagCount,
    PoisonedFrame,
    PoolDemotion,
    PoolUpdate,
    ReservationStatistics,
)
from gmem.host_allocator.core.vmemmap import Vmemmap
from gmem.uapi.errors import BadRequest, NoSuchObject, Reason
from gmem.uapi.pages import (
    HUGE_PAGE_SIZES,
    PAGE_SIZE,
    SIZE_1G,
    PgRange,
    order_of,
)

KB_PER_PAGE: Final = PAGE_SIZE // 1024
B = TypeVar("B")


class HostMemory:
    """Implements Allocator[HostStatistics]; owns nodes, pools and the vmemmap switch.

    Every call that changes something ends with check(), whose cost does not grow with
    the memory; check_frames() looks at every run.
    """

    def __init__(
        self,
        nodes_pages: Sequence[int],
        pools: Sequence[BootPool] = (),
        *,
        nr_overcommit: Mapping[int, int] | None = None,
        default_page_size: int = SIZE_1G,
        optimize_vmemmap: bool = True,
        first_handle: int = 1,
    ) -> None:
        """Boot a host whose node i has `nodes_pages[i]` pages of memory.

        `pools` are filled as far as memory goes, 1G before 2M (as gigantic pages are,
        at boot); `boot_shortfalls` says what is missing. `nr_overcommit` is
        nr_overcommit_hugepages by page size. BadRequest SIZE_INVALID,
        PAGE_SIZE_UNKNOWN, NODE_UNKNOWN, ARGUMENT_INVALID.
        """
        self.nodes = make_nodes(nodes_pages)
        orders = [order_of(size) for size in HUGE_PAGE_SIZES]
        self.vmemmap = Vmemmap(orders, optimize_enabled=optimize_vmemmap)
        self.handles = Handles(first_handle)
        self.cgroups = Cgroups()
        self.base = BaseAllocator(self.nodes, self.handles)
        # Huge folios in use that have changed: page size, first frame.
        self._touched: dict[tuple[int, int], None] = {}
        self.hugetlb = {
            size: HugetlbAllocator(
                HState(size, self.nodes, self.vmemmap), self.handles, self.cgroups
            )
            for size in HUGE_PAGE_SIZES
        }
        self.default_hstate = self._require_pool(default_page_size).hstate
        for pool in pools:
            self._require_pool(pool.page_size)

        gigantic_first = sorted(pools, key=lambda pool: -pool.page_size)
        updates = [
            (pool, self.update_pool(pool.page_size, pool.nr_huge_pages, pool.node))
            for pool in gigantic_first
        ]
        self.boot_shortfalls: tuple[tuple[BootPool, int], ...] = tuple(
            (pool, update.missing_pages)
            for pool, update in updates
            if update.missing_pages
        )
        for page_size, nr_pages in (nr_overcommit or {}).items():
            self.update_pool(page_size, nr_overcommit_huge_pages=nr_pages)

    # The switches of an administrator.

    def update_pool(
        self,
        page_size: int,
        nr_huge_pages: int | None = None,
        node: int | None = None,
        *,
        nr_overcommit_huge_pages: int | None = None,
        validate_only: bool = False,
    ) -> PoolUpdate:
        """Set a pool's size, of one `node` or spread over all (write to nr_hugepages).

        And, of the whole host, how many surplus pages there may be (write to
        nr_overcommit_hugepages); None leaves a value as it is. Partial success is a
        result, not an error. With `validate_only` the answer is what would happen.
        BadRequest PAGE_SIZE_UNKNOWN, NODE_UNKNOWN, SIZE_INVALID, ARGUMENT_INVALID.
        """
        hstate = self._require_pool(page_size).hstate
        allowed = require_node(self.nodes, node)
        require_sizes(page_size, nr_huge_pages, nr_overcommit_huge_pages, node)
        if validate_only:
            # Deterministic, so a copy does exactly what this would do.
            return copy.deepcopy(self).update_pool(
                page_size,
                nr_huge_pages,
                node,
                nr_overcommit_huge_pages=nr_overcommit_huge_pages,
            )

        missing = 0
        if nr_overcommit_huge_pages is not None:
            hstate.nr_overcommit_huge_pages = nr_overcommit_huge_pages
        if nr_huge_pages is not None:
            missing = hstate.resize(nr_huge_pages, allowed, spread=node is None)
        self.check()
        return PoolUpdate(hstate.statistics(), missing)

    def demote_pool(
        self,
        page_size: int,
        nr_pages: int,
        node: int | None = None,
        *,
        target_page_size: int | None = None,
        validate_only: bool = False,
    ) -> PoolDemotion:
        """Make free pages into smaller free ones of another pool (write to demote).

        Of one `node`, or of all; `target_page_size` is demote_size. Partial success is
        a result. With `validate_only` the answer is what would happen. BadRequest
        PAGE_SIZE_UNKNOWN, NODE_UNKNOWN; Unsupported TARGET_UNSUPPORTED; Exhausted
        VMEMMAP_RESTORE_FAILED where not even one page could be demoted for it.
        """
        source = self._require_pool(page_size).hstate
        allowed = require_node(self.nodes, node)
        smaller = require_demote_size(page_size, target_page_size)
        if validate_only:
            return copy.deepcopy(self).demote_pool(page_size, nr_pages, node)

        target = self._require_pool(smaller).hstate
        done, made = demote(source, target, nr_pages, allowed)
        self.check()
        return PoolDemotion(
            source.statistics(), target.statistics(), done, made, nr_pages - done
        )

    def update_vmemmap_optimization(self, *, enabled: bool) -> None:
        """Set vm.hugetlb_optimize_vmemmap, for folios made or reconstructed later."""
        self.vmemmap.optimize_enabled = enabled
        self.check()

    def delete_cgroup(self, name: str) -> None:
        """Remove a cgroup; whom it paid for, its parent does. See Cgroups.delete."""
        parent = self.cgroups.delete(name)
        for hugetlb in self.hugetlb.values():
            for subpool in hugetlb.subpools.values():
                if subpool.cgroup == name:
                    subpool.cgroup = parent
        self.check()

    # The seven calls.

    def reserve(
        self,
        page_size: int,
        num_pages: int,
        node: int | None = None,
        owner: str = "",
        *,
        use_surplus: bool = False,
        charging: Charging = UNCHARGED,
    ) -> int:
        """See Allocator.reserve."""
        backend = self._backend(page_size)
        self.cgroups.get(charging.cgroup)
        handle = backend.reserve(
            page_size,
            num_pages,
            node,
            owner,
            use_surplus=use_surplus,
            charging=charging,
        )
        self.check()
        return handle

    def allocate(
        self,
        handle: int,
        mempolicy: MemPolicy = MPOL_DEFAULT,
        page_size: int = PAGE_SIZE,
        nr_folios: int = 1,
    ) -> tuple[Folio, ...]:
        """See Allocator.allocate."""
        backend = self._backend_of(handle)
        folios = backend.allocate(handle, mempolicy, page_size, nr_folios)
        self.touch(backend, folios)
        self.check()
        return folios

    def split(
        self, handle: int, folio: Folio, target_page_size: int = PAGE_SIZE
    ) -> int:
        """See Allocator.split."""
        backend = self._backend_of(handle)
        restored = backend.split(handle, folio, target_page_size)
        self.touch(backend, [folio])
        self.check()
        return restored

    def reconstruct(
        self, handle: int, first_folio: Folio, nr_pages: int
    ) -> tuple[Folio, int]:
        """See Allocator.reconstruct."""
        backend = self._backend_of(handle)
        result = backend.reconstruct(handle, first_folio, nr_pages)
        self.touch(backend, [first_folio])
        self.check()
        return result

    def free(self, handle: int, folios: Sequence[Folio]) -> None:
        """See Allocator.free."""
        backend = self._backend_of(handle)
        backend.free(handle, folios)
        self.touch(backend, folios)
        self.check()

    def error(self, handle: int, folio: Folio) -> None:
        """See Allocator.error."""
        backend = self._backend_of(handle)
        backend.error(handle, folio)
        self.touch(backend, [folio])
        self.check()

    def inject(self, pfn: int) -> PoisonedFrame:
        """Give one frame a memory error, whoever has it (memory_failure()).

        Poisoned PAGE_POISONED where it has one; NoSuchObject FRAME_UNKNOWN; InUse
        STATE_WRONG for a frame of the memmap or of a free huge page.
        """
        poisoned = memory_errors.inject(self, pfn)
        self.check()
        return poisoned

    def unpoison(self, pfn: int) -> PoisonedFrame:
        """Forget the memory error of a frame (unpoison_memory()).

        NoSuchObject FRAME_UNKNOWN where it has none.
        """
        healed = memory_errors.unpoison(self, pfn)
        self.check()
        return healed

    def poisoned_frames(self) -> tuple[PoisonedFrame, ...]:
        """Return every frame with a memory error, rising."""
        return memory_errors.poisoned_frames(self)

    def unreserve(self, handle: int) -> None:
        """See Allocator.unreserve."""
        self._backend_of(handle).unreserve(handle)
        self.check()

    def touch(
        self, backend: HugetlbAllocator | BaseAllocator, folios: Sequence[Folio]
    ) -> None:
        """Note huge folios that changed; 4K folios are told by their runs."""
        if isinstance(backend, HugetlbAllocator):
            size, mask = backend.hstate.page_size, -(1 << backend.hstate.order)
            self._touched.update(((size, f.pfn & mask), None) for f in folios)

    def drain_touched(self) -> list[tuple[int, int]]:
        """Return page size and first frame of huge folios that were touched."""
        touched, self._touched = self._touched, {}
        return list(touched)

    # Routing.

    def _require_pool(self, page_size: int) -> HugetlbAllocator:
        return self._require_size(self.hugetlb, page_size)

    def _backend(self, page_size: int) -> HugetlbAllocator | BaseAllocator:
        backends: Mapping[int, HugetlbAllocator | BaseAllocator]
        backends = {PAGE_SIZE: self.base, **self.hugetlb}
        return self._require_size(backends, page_size)

    @staticmethod
    def _require_size(backends: Mapping[int, B], page_size: int) -> B:
        backend = backends.get(page_size)
        if backend is None:
            known = " or ".join(str(size) for size in backends)
            raise BadRequest(
                Reason.PAGE_SIZE_UNKNOWN,
                f"there are no pages of {page_size} bytes here: use {known}",
                page_size=page_size,
            )
        return backend

    def _backend_of(self, handle: int) -> HugetlbAllocator | BaseAllocator:
        if handle in self.base.claims:
            return self.base
        for hugetlb in self.hugetlb.values():
            if handle in hugetlb.subpools:
                return hugetlb
        raise NoSuchObject(
            Reason.HANDLE_UNKNOWN,
            f"handle {handle} was never issued or is gone: reserve again",
            handle=handle,
        )

    # What can be watched.

    def statistics(self) -> HostStatistics:
        """Return nodes, pools, vmemmap and /proc/meminfo at this moment."""
        return HostStatistics(
            nodes=self.base.statistics(),
            pools=tuple(hugetlb.statistics() for hugetlb in self.hugetlb.values()),
            vmemmap=self.vmemmap.statistics(),
            meminfo=self._meminfo(),
        )

    def page_flags(self) -> tuple[PageFlagCount, ...]:
        """Return how many frames have which flag word, as page-types counts them."""
        return page_flags(self.nodes, self.base, tuple(self.hugetlb.values()))

    def folios(self, handle: int) -> list[FolioRun]:
        """Return what is out for a handle, by frame; NoSuchObject HANDLE_UNKNOWN."""
        return self._backend_of(handle).folios(handle)

    def reservations(self) -> tuple[ReservationStatistics, ...]:
        """Return the claims of all backends in the order of their handles."""
        claims = [*self.base.reservations()]
        for hugetlb in self.hugetlb.values():
            claims += hugetlb.reservations()
        return tuple(sorted(claims, key=lambda claim: claim.handle))

    def _meminfo(self) -> Meminfo:
        default = self.default_hstate
        hstates = [hugetlb.hstate for hugetlb in self.hugetlb.values()]
        managed = [node.managed_pages for node in self.nodes]
        poisoned = [self.base.hwpoison, *(h.hwpoison for h in self.hugetlb.values())]
        return Meminfo(
            mem_total_kb=sum(managed) * KB_PER_PAGE,
            mem_free_kb=sum(len(node.base) for node in self.nodes) * KB_PER_PAGE,
            huge_pages_total=default.nr_huge_pages,
            huge_pages_free=default.free_huge_pages,
            huge_pages_rsvd=default.resv_huge_pages,
            huge_pages_surp=default.surplus_huge_pages,
            hugepagesize_kb=default.page_size // 1024,
            hugetlb_kb=sum(h.nr_huge_pages * h.page_size for h in hstates) // 1024,
            hardware_corrupted_kb=sum(map(len, poisoned)) * KB_PER_PAGE,
        )

    def check(self) -> None:
        """Conservation by counts: every frame of every node is somewhere once."""
        self.vmemmap.check()
        self.cgroups.check()
        self.base.check()
        for hugetlb in self.hugetlb.values():
            hugetlb.check()
        hstates = [hugetlb.hstate for hugetlb in self.hugetlb.values()]
        for i, node in enumerate(self.nodes):
            pools = [h.nr_huge_pages_node[i] << h.order for h in hstates]
            node.check(pool_pages=sum(pools))

    def check_frames(self) -> None:
        """The same frame by frame: all runs of all places tile all memory."""
        self.check()
        self._check_charges()
        everywhere = Extents()
        for node in self.nodes:
            for place in (node.base, node.memmap, node.withheld):
                place.check()
                everywhere.add_all(place.runs())
        for claim in self.base.claims.values():
            for frames in claim.frames:
                everywhere.add_all(frames.runs())
        for hugetlb in self.hugetlb.values():
            hugetlb.check_subpools()
            everywhere.add_all(hugetlb.hstate.free_runs())
            everywhere.add_all(live.folio.frames for live in hugetlb.live.values())
        everywhere.check()
        all_frames = [PgRange(0, self.nodes[-1].frames.stop)]
        assert everywhere.runs() == all_frames

    def _check_charges(self) -> None:
        """What each cgroup is charged for is what its subpools and children have."""
        for cgroup in self.cgroups:
            inside = cgroup.name.rstrip("/") + "/"
            for size, hugetlb in self.hugetlb.items():
                paid_for = [
                    subpool
                    for subpool in hugetlb.subpools.values()
                    if f"{subpool.cgroup}/".startswith(inside)
                ]
                counters = cgroup.sizes[size]
                assert counters.usage.usage == sum(s.used_hpages for s in paid_for)
                rsvd = sum(s.max_hpages for s in paid_for if s.charge_rsvd)
                assert counters.rsvd.usage == rsvd, cgroup
