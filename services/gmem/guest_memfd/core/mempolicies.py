"""The memory policies of one inode, by range: what mbind on the file sets.

Kept per page offset; they say where folios that are allocated later come from, and move
none that is there. What nobody has set has the policy that the inode was made with.
"""

from __future__ import annotations

from gmem.guest_memfd.core.references import minus
from gmem.guest_memfd.core.values import MemPolicy, MemPolicyMode
from gmem.uapi.errors import BadRequest, Reason
from gmem.uapi.pages import PgRange


class MemPolicies:
    """Which policy each page has; ranges that were set are disjoint and rise."""

    __slots__ = ("_set", "base")

    def __init__(self, base: MemPolicy) -> None:
        self.base = base
        self._set: list[tuple[PgRange, MemPolicy]] = []

    def store(self, pages: PgRange, policy: MemPolicy) -> None:
        """Give pages a policy; MPOL_DEFAULT takes away what was set."""
        kept = [
            (rest, before)
            for part, before in self._set
            for rest in minus(part, pages)
            if rest
        ]
        if policy.mode is not MemPolicyMode.DEFAULT:
            kept.append((pages, policy))
        self._set = sorted(kept, key=lambda item: item[0].start)
        self.check()

    def at(self, pgoff: int) -> MemPolicy:
        """Return the policy of one page."""
        return self.runs(PgRange(pgoff, pgoff + 1))[0][1]

    def runs(self, pages: PgRange) -> list[tuple[PgRange, MemPolicy]]:
        """Return the policies of a range, as runs that fill it."""
        found: list[tuple[PgRange, MemPolicy]] = []
        at = pages.start
        for part, policy in self._set:
            if part.overlaps(pages):
                inside = part.intersection(pages)
                found.append((PgRange(at, inside.start), self.base))
                found.append((inside, policy))
                at = inside.stop
        found.append((PgRange(at, pages.stop), self.base))
        return [(run, policy) for run, policy in found if run]

    def first_run(self, pages: PgRange) -> PgRange:
        """Return the part of a range, from its start on, that has one policy."""
        return self.runs(pages)[0][0]

    @property
    def all_set(self) -> tuple[tuple[PgRange, MemPolicy], ...]:
        """What was set, in the order of the pages."""
        return tuple(self._set)

    def check(self) -> None:
        """Assert that no page has two policies."""
        at = 0
        for pages, policy in self._set:
            assert pages.start >= at, (pages, at)
            assert pages, policy
            at = pages.stop


def require_mempolicy(policy: MemPolicy) -> None:
    """Check mode and nodes as mpol_new() does: MEMPOLICY_INVALID."""
    needs_nodes = (MemPolicyMode.BIND, MemPolicyMode.INTERLEAVE)
    if policy.mode in needs_nodes and not policy.nodes:
        raise BadRequest(
            Reason.MEMPOLICY_INVALID,
            f"policy {policy.mode.value} without nodes: name one or more",
        )
    if policy.mode is MemPolicyMode.DEFAULT and policy.nodes:
        raise BadRequest(
            Reason.MEMPOLICY_INVALID,
            f"the default policy has no nodes, and not {list(policy.nodes)}: leave "
            "them out, or name another mode",
        )


def require_nodes(policy: MemPolicy, nr_nodes: int) -> None:
    """Check that the nodes of a policy are there: NODE_UNKNOWN."""
    for node in policy.nodes:
        if node >= nr_nodes:
            raise BadRequest(
                Reason.NODE_UNKNOWN,
                f"node {node} does not exist: use 0 to {nr_nodes - 1}",
                node=node,
                nr_nodes=nr_nodes,
            )
