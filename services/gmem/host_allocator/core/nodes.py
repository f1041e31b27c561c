"""Every frame of a node is in exactly one place, and every move between two is here.

    base        free, in no pool
    allocated   4K folios of owners (their handles know which)
    memmap      holds struct pages that are in use
    pools       huge folios (their hstate knows which)
    withheld    lost to memory errors

struct pages take 64 bytes per frame. The whole memmap is taken from the top of the node
at boot, as memblock's top-down allocation does, so that the aligned runs below stay
whole. Which memmap frame describes which folio is not kept: they are interchangeable,
optimising gives back the lowest ones and restoring takes the lowest base frames. The
counts are those of the kernel either way: it allocates one fresh head page and frees
all 4096 (8) old ones, or keeps the old head and frees the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Final, TypeVar

from gmem.host_allocator.core.extents import Extents
from gmem.host_allocator.core.values import (
    MemPolicy,
    MemPolicyMode,
    NodeMemoryStatistics,
)
from gmem.uapi.errors import BadRequest, Reason
from gmem.uapi.pages import PAGE_SIZE, NodeId, PgRange

STRUCT_PAGE_SIZE: Final = 64
PAGES_PER_MEMMAP_PAGE: Final = PAGE_SIZE // STRUCT_PAGE_SIZE

F = TypeVar("F")


class NumaNode:
    """One node: `frames`, and where each of them is."""

    def __init__(self, node: NodeId, frames: PgRange) -> None:
        """Take the memmap of `frames` from their top; the rest is base memory.

        Raises BadRequest SIZE_INVALID for a node whose memmap leaves nothing over.
        """
        nr_memmap = -(-len(frames) // PAGES_PER_MEMMAP_PAGE)
        if nr_memmap >= len(frames):
            raise BadRequest(
                Reason.SIZE_INVALID,
                f"node {node} has {len(frames)} pages of memory: give it at least 2",
                nr_pages=len(frames),
            )

        self.node = node
        self.frames = frames
        memmap_start = frames.stop - nr_memmap
        self.base = Extents([PgRange(frames.start, memmap_start)])
        self.memmap = Extents([PgRange(memmap_start, frames.stop)])
        self.withheld = Extents()
        self.allocated_pages = 0
        # Frames of the boot memmap that HVO never gave to the buddy allocator: they
        # are no managed memory, hence not in MemTotal.
        self.reserved_memmap_pages = nr_memmap

    @property
    def managed_pages(self) -> int:
        """What MemTotal counts of the node."""
        return len(self.frames) - self.reserved_memmap_pages

    def give_vmemmap(self, nr_pages: int) -> None:
        """Move `nr_pages` memmap frames to base memory (vmemmap_remap_free)."""
        self.base.add_all(self.memmap.take_lowest(nr_pages))
        self.reserved_memmap_pages = min(self.reserved_memmap_pages, len(self.memmap))

    def take_vmemmap(self, nr_pages: int) -> bool:
        """Move `nr_pages` base frames to the memmap; False, and no change, if too few.

        As vmemmap_remap_alloc() with __GFP_THISNODE: all of them from this node.
        """
        if nr_pages > len(self.base):
            return False
        self.memmap.add_all(self.base.take_lowest(nr_pages))
        return True

    def allocate(self, nr_pages: int) -> list[PgRange]:
        """Take `nr_pages` base frames, which are there, for an owner's 4K folios."""
        self.allocated_pages += nr_pages
        return self.base.take_lowest(nr_pages)

    def free(self, frames: PgRange) -> None:
        """Return an owner's frames to base memory."""
        self.allocated_pages -= len(frames)
        self.base.add(frames)

    def withhold(self, frames: PgRange) -> None:
        """Take free base frames out of use for good: they have memory errors."""
        self.base.remove(frames)
        self.withheld.add(frames)

    def release(self, frames: PgRange) -> None:
        """Make frames that were withheld base memory again."""
        self.withheld.remove(frames)
        self.base.add(frames)

    def statistics(self) -> NodeMemoryStatistics:
        """Return the node's counts."""
        return NodeMemoryStatistics(
            node=self.node,
            first_pfn=self.frames.start,
            nr_pages=len(self.frames),
            free_base_pages=len(self.base),
            allocated_base_pages=self.allocated_pages,
            nr_memmap_pages=len(self.memmap),
            managed_pages=self.managed_pages,
        )

    def check(self, *, pool_pages: int) -> None:
        """Conservation: the five places add up; `pool_pages` frames are in pools."""
        known = len(self.base) + len(self.memmap) + len(self.withheld)
        assert known + self.allocated_pages + pool_pages == len(self.frames), self.node
        assert self.allocated_pages >= 0
        assert 0 <= self.reserved_memmap_pages <= len(self.memmap)


def make_nodes(nodes_pages: Sequence[int]) -> tuple[NumaNode, ...]:
    """Return nodes with `nodes_pages` pages each; pfns count on from node to node.

    Raises BadRequest SIZE_INVALID where there is no node, or one is too small.
    """
    if not nodes_pages:
        raise BadRequest(
            Reason.SIZE_INVALID, "a host of 0 nodes has no memory: give it one or more"
        )
    nodes: list[NumaNode] = []
    first_pfn = 0
    for number, nr_pages in enumerate(nodes_pages):
        frames = PgRange(first_pfn, first_pfn + max(nr_pages, 0))
        nodes.append(NumaNode(NodeId(number), frames))
        first_pfn = frames.stop
    return tuple(nodes)


def require_node(nodes: Sequence[NumaNode], node: int | None) -> tuple[NodeId, ...]:
    """Return the nodes that `node` allows: it alone, or all where it is None.

    Raises BadRequest NODE_UNKNOWN.
    """
    if node is None:
        return tuple(each.node for each in nodes)
    if not 0 <= node < len(nodes):
        raise BadRequest(
            Reason.NODE_UNKNOWN,
            f"node {node} does not exist: use 0 to {len(nodes) - 1}",
            node=node,
            nr_nodes=len(nodes),
        )
    return (NodeId(node),)


def nodes_in_order(
    mempolicy: MemPolicy, allowed: tuple[NodeId, ...]
) -> tuple[NodeId, ...]:
    """Return the `allowed` nodes that `mempolicy` uses, the preferred one first.

    The caller of an emulated host runs on no CPU, so its local node is the first.
    Nodes that are not there are dropped from the policy as mpol_set_nodemask() does.
    Raises BadRequest MEMPOLICY_INVALID where none is left, or where MPOL_DEFAULT comes
    with nodes.
    """
    chosen = [node for node in allowed if node in mempolicy.nodes]
    match mempolicy.mode:
        case MemPolicyMode.BIND if chosen:
            return tuple(chosen)
        case MemPolicyMode.PREFERRED if chosen:
            others = [node for node in allowed if node != chosen[0]]
            return (chosen[0], *others)
        case MemPolicyMode.INTERLEAVE if chosen:
            # Only a preference for each page: policy_nodemask() allows all nodes.
            return (*chosen, *(node for node in allowed if node not in chosen))
        case MemPolicyMode.DEFAULT | MemPolicyMode.PREFERRED if not mempolicy.nodes:
            return allowed
        case mode:
            named = list(mempolicy.nodes)
            raise BadRequest(
                Reason.MEMPOLICY_INVALID,
                f"policy {mode.value} cannot use nodes {named}: "
                f"allowed are {list(allowed)}, and none for default",
            )


@dataclass(frozen=True, slots=True)
class Share:
    """How many folios of one allocation come from `node`."""

    node: NodeId
    nr_folios: int


def shares_of(
    mempolicy: MemPolicy,
    allowed: tuple[NodeId, ...],
    wanted: int,
    free_on: Callable[[int], int],
    turn: int,
) -> tuple[list[Share], int]:
    """Say which nodes `wanted` folios come from; fewer where there are fewer.

    `free_on` counts a node's folios; `turn` counts the pages that were interleaved
    before. Returns the shares in the order of the nodes, and the new turn. Raises
    BadRequest MEMPOLICY_INVALID.
    """
    nodes = nodes_in_order(mempolicy, allowed)
    free = [free_on(node) for node in nodes]
    dealt = [0] * len(nodes)
    if mempolicy.mode is MemPolicyMode.INTERLEAVE:
        policy_nodes = sum(node in mempolicy.nodes for node in nodes)
        shares, turn = deal(wanted, free[:policy_nodes], turn % policy_nodes)
        dealt[:policy_nodes] = shares
    left = wanted - sum(dealt)
    for i, there in enumerate(free):
        more = min(left, there - dealt[i])
        dealt[i] += more
        left -= more
    pairs = zip(nodes, dealt, strict=True)
    return [Share(node, nr) for node, nr in pairs if nr], turn


def interleaved(folios: Sequence[Sequence[F]]) -> list[F]:
    """Return the folios of all nodes, one of each node in turn while it has some."""
    rounds = zip_longest(*folios)
    return [folio for turn in rounds for folio in turn if folio is not None]


def deal(count: int, capacities: Sequence[int], first: int) -> tuple[list[int], int]:
    """Deal `count` units in turns, from index `first` on; full ones are passed over.

    Returns the shares and whose turn is next: what alloc_pool_huge_folio() does with
    next_nid_to_alloc page by page. `count` above the sum of capacities deals the sum.
    """
    shares = [0] * len(capacities)
    turn = first
    left = min(count, sum(capacities))
    while left:
        in_turn = [(first + i) % len(shares) for i in range(len(shares))]
        open_ones = [i for i in in_turn if shares[i] < capacities[i]]
        each = max(1, left // len(open_ones))
        for i in open_ones[:left]:
            share = min(each, capacities[i] - shares[i])
            shares[i] += share
            left -= share
            turn = (i + 1) % len(shares)
    return shares, turn
