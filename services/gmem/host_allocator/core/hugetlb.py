"""Folios of one HugeTLB pool: reserve first, then the counters of the kernel move.

| call | subpool | hstate |
|---|---|---|
| reserve N | rsv = N | resv += N |
| allocate | used++, rsv-- | free--, resv-- |
| split, reconstruct | - | - |
| free | used--, rsv++ | free++, resv++ |
| unreserve, with the last folio back | gone | resv -= N |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from gmem.host_allocator.core.allocator import FOLIOS_PER_CALL_MAX
from gmem.host_allocator.core.cgroups import Cgroups
from gmem.host_allocator.core.folio import FolioEvent, FolioState, LiveFolio
from gmem.host_allocator.core.hstate import HState
from gmem.host_allocator.core.memory_errors import take_apart
from gmem.host_allocator.core.nodes import (
    interleaved,
    nodes_in_order,
    require_node,
    shares_of,
)
from gmem.host_allocator.core.subpool import (
    Handles,
    Subpool,
    require_handle,
    require_num_pages,
    require_open,
    require_page_size,
)
from gmem.host_allocator.core.values import (
    MPOL_DEFAULT,
    UNCHARGED,
    Charging,
    Folio,
    FolioRun,
    MemPolicy,
    MemPolicyMode,
    PoolStatistics,
    ReservationStatistics,
)
from gmem.uapi.errors import BadRequest, Exhausted, NoSuchObject, Reason, Unsupported
from gmem.uapi.pages import PAGE_SIZE, NodeId, format_size


class HugetlbAllocator:
    """The seven calls over one hstate; implements Allocator[PoolStatistics]."""

    def __init__(self, hstate: HState, handles: Handles, cgroups: Cgroups) -> None:
        """Serve `hstate`; numbers of reservations are from `handles`."""
        self.hstate = hstate
        self._cgroups = cgroups
        self.subpools: dict[int, Subpool] = {}
        self.live: dict[int, LiveFolio] = {}
        # Frames with a memory error, and in how many pages from there it may be: one,
        # or a whole folio of which no more is known.
        self.hwpoison: dict[int, int] = {}
        self._handles = handles

    # Reservations.

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
        """Reserve as hugetlb_acct_memory() does: first the pool, then the node.

        With `use_surplus` what the pool lacks is made (gather_surplus_pages()). Before
        both the cgroup is charged, where it is for reservations.
        """
        require_page_size(page_size, self.hstate.page_size)
        require_num_pages(num_pages)
        allowed = require_node(self.hstate.nodes, node)
        cgroup = self._cgroups.get(charging.cgroup).name
        if charging.rsvd:
            self._require_room(cgroup, num_pages, rsvd=True)
        room = self.hstate.surplus_room(allowed) if use_surplus else 0
        missing = self._require_available(num_pages, room)
        self._require_free_on(allowed, num_pages, missing)

        self.hstate.make_surplus(missing, allowed)
        handle = self._handles.new()
        self.hstate.resv_huge_pages += num_pages
        self.subpools[handle] = Subpool(
            handle=handle,
            page_size=page_size,
            owner=owner,
            allowed=allowed,
            max_hpages=num_pages,
            used_hpages=0,
            rsv_hpages=num_pages,
            use_surplus=use_surplus,
            cgroup=cgroup,
            charge_rsvd=charging.rsvd,
        )
        if charging.rsvd:
            self._cgroups.charge(cgroup, page_size, num_pages, rsvd=True)
        self.check()
        return handle

    def unreserve(self, handle: int) -> None:
        """End a reservation (hugepage_put_subpool)."""
        subpool = require_open(self.subpools, handle)

        subpool.closing = True
        self._drop_if_free(subpool)
        self.check()

    def _drop_if_free(self, subpool: Subpool) -> None:
        """As unlock_or_release_subpool(): the last one out gives resv back."""
        if subpool.is_free:
            self.hstate.resv_huge_pages -= subpool.max_hpages
            self.hstate.return_unused_surplus(subpool.max_hpages)
            if subpool.charge_rsvd:
                self._uncharge(subpool, subpool.max_hpages, rsvd=True)
            del self.subpools[subpool.handle]

    # Folios.

    def allocate(
        self,
        handle: int,
        mempolicy: MemPolicy = MPOL_DEFAULT,
        page_size: int = PAGE_SIZE,
        nr_folios: int = 1,
    ) -> tuple[Folio, ...]:
        """Take reserved folios from the policy's nodes.

        Where these have none free, a reservation that may use surplus has one made
        there, as alloc_hugetlb_folio() does.
        """
        assert nr_folios >= 1, nr_folios
        subpool = require_open(self.subpools, handle)
        require_page_size(page_size, self.hstate.page_size)
        nodes = nodes_in_order(mempolicy, subpool.allowed)
        self._require_reserved(subpool)
        wanted = min(nr_folios, subpool.rsv_hpages, FOLIOS_PER_CALL_MAX)
        wanted = self._require_some_room(subpool, wanted)
        self._require_free_for(subpool, nodes)

        folios = self._dequeue(subpool, mempolicy, wanted)
        self._cgroups.charge(subpool.cgroup, page_size, len(folios), rsvd=False)
        subpool.get_pages(len(folios))
        self.hstate.resv_huge_pages -= len(folios)
        self.live.update((folio.pfn, LiveFolio(folio, handle)) for folio in folios)
        self.check()
        return tuple(folios)

    def _dequeue(
        self, subpool: Subpool, mempolicy: MemPolicy, wanted: int
    ) -> list[Folio]:
        shares, subpool.turn = shares_of(
            mempolicy, subpool.allowed, wanted, self.hstate.free_on, subpool.turn
        )
        taken = [self.hstate.dequeue(share) for share in shares]
        if mempolicy.mode is MemPolicyMode.INTERLEAVE:
            return interleaved(taken)
        return [folio for folios in taken for folio in folios]

    def split(
        self, handle: int, folio: Folio, target_page_size: int = PAGE_SIZE
    ) -> int:
        """Restore the folio's vmemmap pages, then call its pages folios."""
        require_handle(self.subpools, handle)
        live = self._require_folio(handle, folio)
        self._require_target(target_page_size)
        state = live.after(FolioEvent.SPLIT)
        restored = self._restore(folio)

        live.state = state
        self.check()
        return restored

    def reconstruct(
        self, handle: int, first_folio: Folio, nr_pages: int
    ) -> tuple[Folio, int]:
        """Make the huge folio of its pages, then optimise its vmemmap again."""
        require_handle(self.subpools, handle)
        live = self._require_first(handle, first_folio)
        self._require_nr_pages(nr_pages)
        state = live.after(FolioEvent.RECONSTRUCT)

        live.state = state
        node = self.hstate.nodes[live.folio.node]
        order = self.hstate.order
        saved = self.hstate.vmemmap.optimize(node, live.folio.frames, order)
        self.check()
        return live.folio, saved

    def free(self, handle: int, folios: Sequence[Folio]) -> None:
        """Give whole folios back to the reservation (free_huge_folio)."""
        subpool = require_handle(self.subpools, handle)
        if len(set(folios)) < len(folios):
            twice, _ = Counter(folios).most_common(1)[0]
            raise self._unknown(handle, twice, "is named twice")
        ends = [
            (live, live.after(FolioEvent.FREE))
            for live in [self._require_folio(handle, folio) for folio in folios]
        ]

        for live, state in ends:
            del self.live[live.folio.pfn]
            if state is FolioState.WITHHELD:
                take_apart(self.hstate, live.folio, self.hwpoison)
            else:
                self.hstate.enqueue(live.folio)
        # The reservation stays the owner's until unreserve, with the folio or not.
        self.hstate.resv_huge_pages += len(ends)
        subpool.put_pages(len(ends))
        self._uncharge(subpool, len(ends), rsvd=False)
        self._drop_if_free(subpool)
        self.check()

    def error(self, handle: int, folio: Folio) -> None:
        """Mark a folio, or one page of a split folio, as poisoned."""
        require_handle(self.subpools, handle)
        live = self._require_page(handle, folio)
        state = live.after(FolioEvent.ERROR)

        live.state = state
        nr_pages = 1 << folio.order
        self.hwpoison[folio.pfn] = max(nr_pages, self.hwpoison.get(folio.pfn, 1))
        self.check()

    def live_at(self, pfn: int) -> LiveFolio | None:
        """Return the huge folio in use that a frame belongs to."""
        return self.live.get(pfn & -(1 << self.hstate.order))

    # Refusals.

    def _require_available(self, num_pages: int, room: int) -> int:
        """Return how many surplus folios are missing, for which there must be room."""
        hstate = self.hstate
        available = hstate.free_huge_pages - hstate.resv_huge_pages
        missing = max(0, num_pages - available)
        if missing > room:
            raise Exhausted(
                Reason.POOL_EMPTY,
                f"{num_pages} {self._size} pages wanted, {max(available, 0)} of the "
                "pool are free and not reserved: grow the pool, or ask for less",
                num_pages=num_pages,
                free_huge_pages=hstate.free_huge_pages,
                resv_huge_pages=hstate.resv_huge_pages,
            )
        return missing

    def _require_free_on(
        self, allowed: tuple[NodeId, ...], num_pages: int, made: int
    ) -> None:
        """Refuse where `allowed` nodes have too few, `made` surplus ones included."""
        free = sum(self.hstate.free_on(node) for node in allowed)
        if num_pages > free + made:
            raise Exhausted(
                Reason.NODE_EMPTY,
                f"{num_pages} {self._size} pages wanted of node {allowed[0]}, which "
                f"has {free} free: grow the pool of the node, or allow all nodes",
                num_pages=num_pages,
                node=allowed[0],
                free_huge_pages=free,
            )

    def _require_room(self, cgroup: str, nr_pages: int, *, rsvd: bool) -> None:
        size = self.hstate.page_size
        if self._cgroups.room(cgroup, size, nr_pages, rsvd=rsvd) < nr_pages:
            raise self._cgroups.refusal(cgroup, size, nr_pages, rsvd=rsvd)

    def _require_some_room(self, subpool: Subpool, wanted: int) -> int:
        """Return how many of `wanted` folios the cgroup may have now, at least one."""
        self._require_room(subpool.cgroup, 1, rsvd=False)
        size = self.hstate.page_size
        return self._cgroups.room(subpool.cgroup, size, wanted, rsvd=False)

    def _uncharge(self, subpool: Subpool, nr_pages: int, *, rsvd: bool) -> None:
        size = self.hstate.page_size
        self._cgroups.uncharge(subpool.cgroup, size, nr_pages, rsvd=rsvd)

    def _require_reserved(self, subpool: Subpool) -> None:
        if subpool.rsv_hpages == 0:
            raise Exhausted(
                Reason.SUBPOOL_EMPTY,
                f"all {subpool.max_hpages} {self._size} pages of handle "
                f"{subpool.handle} are in use: free one of its folios",
                handle=subpool.handle,
                max_hpages=subpool.max_hpages,
            )

    def _require_free_for(self, subpool: Subpool, nodes: tuple[NodeId, ...]) -> None:
        """Have a free folio on one of `nodes`, a new surplus one if need be."""
        if any(self.hstate.free_on(node) for node in nodes):
            return
        if subpool.use_surplus and self.hstate.surplus_room(nodes):
            self.hstate.make_surplus(1, nodes)
        else:
            raise Exhausted(
                Reason.POOL_EMPTY,
                f"no free {self._size} page on nodes {list(nodes)}: grow the pool "
                "there, or allow other nodes",
                free_huge_pages=self.hstate.free_huge_pages,
            )

    def _require_target(self, target_page_size: int) -> None:
        if target_page_size != PAGE_SIZE:
            raise Unsupported(
                Reason.TARGET_UNSUPPORTED,
                f"cannot split a {self._size} folio to {format_size(target_page_size)} "
                f"pages: split to {PAGE_SIZE}",
                target_page_size=target_page_size,
            )

    def _require_nr_pages(self, nr_pages: int) -> None:
        if nr_pages != 1 << self.hstate.order:
            raise BadRequest(
                Reason.SIZE_INVALID,
                f"{nr_pages} pages do not make a {self._size} folio: "
                f"give {1 << self.hstate.order}",
                nr_pages=nr_pages,
            )

    def _restore(self, folio: Folio) -> int:
        hstate = self.hstate
        node = hstate.nodes[folio.node]
        restored = hstate.vmemmap.restore(node, [folio.frames], hstate.order)
        if restored is None:
            needed = hstate.vmemmap.needed(folio.frames, hstate.order)
            raise Exhausted(
                Reason.VMEMMAP_RESTORE_FAILED,
                f"splitting a {self._size} folio takes {needed} vmemmap pages, node "
                f"{folio.node} has {len(node.base)} base pages free: free memory of "
                "that node; the folio is still whole and optimised",
                pfn=folio.pfn,
                needed=needed,
                free_base_pages=len(node.base),
            )
        return restored

    def _require_folio(self, handle: int, folio: Folio) -> LiveFolio:
        """Return the live huge folio that is exactly `folio`."""
        live = self.live.get(folio.pfn)
        if live is None or live.handle != handle or live.folio != folio:
            raise self._unknown(handle, folio, "is not a folio")
        return live

    def _require_first(self, handle: int, first: Folio) -> LiveFolio:
        """Return the live huge folio that `first` begins, as a page or as the whole."""
        live = self.live.get(first.pfn)
        whole = Folio(first.pfn, first.order or self.hstate.order, first.node)
        if live is None or live.handle != handle or live.folio != whole:
            raise self._unknown(handle, first, "does not begin a split folio")
        return live

    def _require_page(self, handle: int, page: Folio) -> LiveFolio:
        """Return the live huge folio that is `page`, or, split, has it as a page."""
        first = page.pfn & -(1 << self.hstate.order)
        live = self.live.get(first)
        if live is not None and live.handle == handle:
            is_page = live.is_split and page.order == 0
            if live.folio == page or (is_page and page.node == live.folio.node):
                return live
        raise self._unknown(handle, page, "is not a folio")

    def _unknown(self, handle: int, folio: Folio, what: str) -> NoSuchObject:
        return NoSuchObject(
            Reason.FOLIO_UNKNOWN,
            f"{folio} on node {folio.node} {what} of handle {handle}: "
            "use what allocate returned",
            handle=handle,
            pfn=folio.pfn,
            order=folio.order,
        )

    # What can be watched.

    @property
    def _size(self) -> str:
        return format_size(self.hstate.page_size)

    def statistics(self) -> PoolStatistics:
        """Return the pool's counts."""
        return self.hstate.statistics()

    def reservations(self) -> tuple[ReservationStatistics, ...]:
        """Return the subpools."""
        return tuple(subpool.statistics() for subpool in self.subpools.values())

    def folios(self, handle: int) -> list[FolioRun]:
        """Return what is out for a handle, by frame."""
        live = sorted(each.folio.pfn for each in self.live.values())
        mine = [self.live[pfn] for pfn in live if self.live[pfn].handle == handle]
        return [FolioRun(each.folio, 1, each.is_split) for each in mine]

    def check(self) -> None:
        """Every folio of the pool is free or live."""
        self.hstate.check()
        in_use = self.hstate.nr_huge_pages - self.hstate.free_huge_pages
        assert len(self.live) == in_use, (len(self.live), in_use)

    def check_subpools(self) -> None:
        """The same over all subpools: what they use is live, what they wait for resv.

        Grows with the number of handles and folios, hence not part of check().
        """
        used = dict.fromkeys(self.subpools, 0)
        for live in self.live.values():
            used[live.handle] += 1
        subpools = self.subpools.values()
        assert all(used[subpool.handle] == subpool.used_hpages for subpool in subpools)
        reserved = sum(subpool.rsv_hpages for subpool in subpools)
        assert reserved == self.hstate.resv_huge_pages
