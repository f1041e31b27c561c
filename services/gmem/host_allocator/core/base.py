"""4K folios straight from base memory: nothing is reserved, nothing can be split.

A handle only remembers whose frames are whose; `num_pages` bounds nothing, as i_size
bounds no page of an ordinary guest_memfd ahead of its allocation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

from gmem.host_allocator.core.allocator import FOLIOS_PER_CALL_MAX
from gmem.host_allocator.core.extents import Extents
from gmem.host_allocator.core.nodes import (
    NumaNode,
    Share,
    interleaved,
    nodes_in_order,
    require_node,
    shares_of,
)
from gmem.host_allocator.core.subpool import (
    Handles,
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
    NodeMemoryStatistics,
    ReservationStatistics,
)
from gmem.uapi.errors import Exhausted, NoSuchObject, Reason, Unsupported
from gmem.uapi.pages import PAGE_SIZE, NodeId, Pfn, PgRange


@dataclass(slots=True)
class BaseClaim:
    """One owner's 4K folios, per node."""

    handle: int
    owner: str
    allowed: tuple[NodeId, ...]
    num_pages: int
    frames: tuple[Extents, ...]
    turn: int = 0
    """Whose turn it is where its policy interleaves."""
    closing: bool = False

    @property
    def used_pages(self) -> int:
        """The folios that are out."""
        return sum(map(len, self.frames))

    def statistics(self) -> ReservationStatistics:
        """Return the counts; rsv_hpages is 0, as nothing is promised."""
        return ReservationStatistics(
            handle=self.handle,
            page_size=PAGE_SIZE,
            owner=self.owner,
            max_hpages=self.num_pages,
            used_hpages=self.used_pages,
            rsv_hpages=0,
            closing=self.closing,
        )


class BaseAllocator:
    """Implements Allocator[tuple[NodeMemoryStatistics, ...]] over base memory."""

    def __init__(self, nodes: Sequence[NumaNode], handles: Handles) -> None:
        """Take frames of `nodes` and the numbers of claims from `handles`."""
        self.nodes = nodes
        self.claims: dict[int, BaseClaim] = {}
        # Frames with a memory error, each one page.
        self.hwpoison: dict[int, int] = {}
        self._handles = handles

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
        """Open a claim; base memory is taken at allocate, not before.

        `use_surplus` has no meaning here: there is no pool to exceed. Nor has
        `charging`: 4K pages are no pages of HugeTLB.
        """
        del use_surplus, charging
        require_page_size(page_size, PAGE_SIZE)
        require_num_pages(num_pages)
        allowed = require_node(self.nodes, node)

        handle = self._handles.new()
        frames = tuple(Extents() for _ in self.nodes)
        self.claims[handle] = BaseClaim(handle, owner, allowed, num_pages, frames)
        self.check()
        return handle

    def unreserve(self, handle: int) -> None:
        """Close a claim; it goes with its last folio."""
        claim = require_open(self.claims, handle)

        claim.closing = True
        self._drop_if_free(claim)
        self.check()

    def _drop_if_free(self, claim: BaseClaim) -> None:
        if claim.closing and claim.used_pages == 0:
            del self.claims[claim.handle]

    def allocate(
        self,
        handle: int,
        mempolicy: MemPolicy = MPOL_DEFAULT,
        page_size: int = PAGE_SIZE,
        nr_folios: int = 1,
    ) -> tuple[Folio, ...]:
        """Take the lowest free frames of the policy's nodes."""
        assert nr_folios >= 1, nr_folios
        claim = require_open(self.claims, handle)
        require_page_size(page_size, PAGE_SIZE)
        shares, turn = shares_of(
            mempolicy,
            claim.allowed,
            min(nr_folios, FOLIOS_PER_CALL_MAX),
            lambda node: len(self.nodes[node].base),
            claim.turn,
        )
        self._require_free_for(nodes_in_order(mempolicy, claim.allowed))

        claim.turn = turn
        taken = [self._take(claim, share) for share in shares]
        self.check()
        if mempolicy.mode is MemPolicyMode.INTERLEAVE:
            return tuple(interleaved(taken))
        return tuple(folio for folios in taken for folio in folios)

    def _take(self, claim: BaseClaim, share: Share) -> list[Folio]:
        folios: list[Folio] = []
        for run in self.nodes[share.node].allocate(share.nr_folios):
            claim.frames[share.node].add(run)
            folios += [Folio(Pfn(pfn), 0, share.node) for pfn in run]
        return folios

    def split(
        self, handle: int, folio: Folio, target_page_size: int = PAGE_SIZE
    ) -> int:
        """Refuse: a 4K folio has no parts."""
        self._require_folio(require_handle(self.claims, handle), folio)
        raise Unsupported(
            Reason.TARGET_UNSUPPORTED,
            f"the 4K folio at {folio} cannot be split to {target_page_size} bytes: "
            "only huge folios can",
            target_page_size=target_page_size,
        )

    def reconstruct(
        self, handle: int, first_folio: Folio, nr_pages: int
    ) -> tuple[Folio, int]:
        """Refuse: 4K folios were never part of a huge one."""
        self._require_folio(require_handle(self.claims, handle), first_folio)
        raise Unsupported(
            Reason.TARGET_UNSUPPORTED,
            f"{nr_pages} pages from {first_folio} on make no huge folio: "
            "handles of huge pages alone can reconstruct",
            nr_pages=nr_pages,
        )

    def free(self, handle: int, folios: Sequence[Folio]) -> None:
        """Return frames to base memory; those with an error are withheld."""
        claim = require_handle(self.claims, handle)
        runs = _runs(folios)
        if not self._are_folios(claim, runs, len(folios)):
            raise self._unknown(claim, self._stranger(claim, folios))

        for node, run in runs:
            claim.frames[node].remove(run)
            self.nodes[node].free(run)
            for pfn in [pfn for pfn in self.hwpoison if pfn in run]:
                self.nodes[node].withhold(PgRange(pfn, pfn + 1))
        self._drop_if_free(claim)
        self.check()

    def error(self, handle: int, folio: Folio) -> None:
        """Mark a folio as poisoned."""
        self._require_folio(require_handle(self.claims, handle), folio)

        self.hwpoison[folio.pfn] = 1
        self.check()

    def claim_at(self, pfn: int) -> BaseClaim | None:
        """Return whose 4K folio a frame is."""
        frame = PgRange(pfn, pfn + 1)
        return next(
            (
                claim
                for claim in self.claims.values()
                if any(frames.covers(frame) for frames in claim.frames)
            ),
            None,
        )

    def _require_free_for(self, order: tuple[NodeId, ...]) -> None:
        if not any(len(self.nodes[node].base) for node in order):
            raise Exhausted(
                Reason.BASE_MEMORY_EMPTY,
                f"no free base page on nodes {list(order)}: free memory there, "
                "shrink a pool, or allow other nodes",
            )

    def _require_folio(self, claim: BaseClaim, folio: Folio) -> None:
        if not self._are_folios(claim, _runs([folio]), 1):
            raise self._unknown(claim, folio)

    def _are_folios(
        self, claim: BaseClaim, runs: Sequence[tuple[int, PgRange]], nr_folios: int
    ) -> bool:
        """Tell whether `runs` are of `nr_folios` 4K folios that a claim has."""
        return sum(len(run) for _, run in runs) == nr_folios and all(
            0 <= node < len(self.nodes) and claim.frames[node].covers(run)
            for node, run in runs
        )

    def _stranger(self, claim: BaseClaim, folios: Sequence[Folio]) -> Folio:
        """Return the first of `folios` that a claim has not, or one named twice."""
        for folio in folios:
            if not self._are_folios(claim, _runs([folio]), 1):
                return folio
        return Counter(folios).most_common(1)[0][0]

    def _unknown(self, claim: BaseClaim, folio: Folio) -> NoSuchObject:
        return NoSuchObject(
            Reason.FOLIO_UNKNOWN,
            f"{folio} on node {folio.node} is no folio of handle {claim.handle}, or "
            "is named twice: use what allocate returned",
            handle=claim.handle,
            pfn=folio.pfn,
            order=folio.order,
        )

    def statistics(self) -> tuple[NodeMemoryStatistics, ...]:
        """Return the nodes' counts."""
        return tuple(node.statistics() for node in self.nodes)

    def reservations(self) -> tuple[ReservationStatistics, ...]:
        """Return the claims."""
        return tuple(claim.statistics() for claim in self.claims.values())

    def folios(self, handle: int) -> list[FolioRun]:
        """Return what is out for a handle, by frame."""
        return [
            FolioRun(Folio(Pfn(run.start), 0, node.node), len(run), split=False)
            for node, frames in zip(self.nodes, self.claims[handle].frames, strict=True)
            for run in frames.runs()
        ]

    def check(self) -> None:
        """What the claims have is what the nodes have given."""
        for i, node in enumerate(self.nodes):
            given = sum(len(claim.frames[i]) for claim in self.claims.values())
            assert given == node.allocated_pages, (i, given, node.allocated_pages)


def _runs(folios: Sequence[Folio]) -> list[tuple[int, PgRange]]:
    """Merge 4K folios into runs per node, ascending.

    A folio that is named twice, or is none of 4K, has no part in them: then there are
    fewer frames than folios. A file of some GiB is freed at once, so this looks at
    runs rather than at a set of all of its folios.
    """
    runs: list[tuple[int, PgRange]] = []
    node, start, stop = -1, 0, 0
    for folio in sorted(folios, key=attrgetter("node", "pfn")):
        if folio.order:
            continue
        if folio.node == node and folio.pfn <= stop:
            stop = max(stop, folio.pfn + 1)
            continue
        if start < stop:
            runs.append((node, PgRange(start, stop)))
        node, start, stop = folio.node, folio.pfn, folio.pfn + 1
    if start < stop:
        runs.append((node, PgRange(start, stop)))
    return runs
