"""Memory policies by range: what mbind on a file of MAINLINE sets."""

from __future__ import annotations

import pytest

from gmem.guest_memfd.core import effects as fx
from gmem.guest_memfd.core.inode import Inode
from gmem.guest_memfd.core.mempolicies import MemPolicies
from gmem.guest_memfd.core.registry import GuestMemfdCore
from gmem.guest_memfd.core.values import MemPolicy, MemPolicyMode
from gmem.uapi.errors import Reason
from gmem.uapi.lineage import Lineage
from gmem.uapi.pages import PAGE_SIZE, PgRange
from tests.support.gmem_world import GmemWorld, part, refused, whole

DEFAULT = MemPolicy()
ZERO, ONE = MemPolicy(MemPolicyMode.BIND, (0,)), MemPolicy(MemPolicyMode.BIND, (1,))
ROUND = MemPolicy(MemPolicyMode.INTERLEAVE, (0, 1))
P = PgRange


def made(world: GmemWorld, policy: MemPolicy = DEFAULT) -> Inode:
    return world.create(
        8 * PAGE_SIZE,
        lineage=Lineage.MAINLINE,
        mmap=True,
        init_shared=True,
        mempolicy=policy,
    )


def node_of(inode: Inode, pgoff: int) -> int:
    entry = inode.filemap.get(pgoff)
    assert entry is not None
    return entry.folio.node


def test_ranges_replace_each_other_and_default_takes_them_away() -> None:
    policies = MemPolicies(DEFAULT)
    policies.store(P(0, 6), ONE)
    policies.store(P(2, 4), ROUND)
    assert policies.runs(P(0, 8)) == [
        (P(0, 2), ONE),
        (P(2, 4), ROUND),
        (P(4, 6), ONE),
        (P(6, 8), DEFAULT),
    ]
    policies.store(P(1, 5), DEFAULT)
    assert policies.all_set == ((P(0, 1), ONE), (P(5, 6), ONE))
    assert policies.at(3) == DEFAULT
    assert policies.first_run(P(5, 8)) == P(5, 6)
    policies.store(P(0, 8), DEFAULT)
    assert policies.runs(P(3, 5)) == [(P(3, 5), DEFAULT)]


def test_what_nobody_set_has_the_policy_of_the_file() -> None:
    world = GmemWorld(nodes=2)
    inode = made(world, ONE)
    world.run(world.core.set_mempolicy(part(inode, 2, 2), ZERO))
    runs = world.core.mempolicies(whole(inode))
    assert runs == [(P(0, 2), ONE), (P(2, 4), ZERO), (P(4, 8), ONE)]
    world.run(world.core.set_mempolicy(whole(inode), DEFAULT))
    assert world.core.mempolicies(part(inode, 3)) == [(P(3, 4), ONE)]


def test_later_allocations_follow_it_page_by_page_and_none_moves_c077() -> None:
    """Nodes 1, 1, 0, 0; then policies 0, 0, 1, 1, which only a punch lets act."""
    world = GmemWorld(nodes=2)
    inode = made(world)
    four = part(inode, 0, 4)
    for at, policy in ((0, ONE), (2, ZERO)):
        world.run(world.core.set_mempolicy(part(inode, at, 2), policy))
    world.run(world.core.fallocate(inode.number, 1, 0, 4 * PAGE_SIZE))
    assert [node_of(inode, page) for page in range(4)] == [1, 1, 0, 0]
    for at, policy in ((0, ZERO), (2, ONE)):
        world.run(world.core.set_mempolicy(part(inode, at, 2), policy))
    assert [node_of(inode, page) for page in range(4)] == [1, 1, 0, 0]

    world.run(world.core.fallocate(inode.number, 3, four.offset, four.size))
    for page in range(4):
        world.run(world.fault(inode, page))
    assert [node_of(inode, page) for page in range(4)] == [0, 0, 1, 1]
    world.check()


def test_one_call_of_the_allocator_has_one_policy() -> None:
    world = GmemWorld(nodes=2)
    inode = made(world)
    world.run(world.core.set_mempolicy(part(inode, 3, 2), ONE))
    world.log.clear()
    world.run(world.core.fallocate(inode.number, 1, 0, inode.i_size))
    asked = [(e.mempolicy, e.nr_folios) for e in world.asked(fx.Allocate)]
    assert asked == [(DEFAULT, 3), (ONE, 2), (DEFAULT, 3)]


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (MemPolicy(MemPolicyMode.BIND), Reason.MEMPOLICY_INVALID),
        (MemPolicy(MemPolicyMode.INTERLEAVE), Reason.MEMPOLICY_INVALID),
        (MemPolicy(MemPolicyMode.DEFAULT, (0,)), Reason.MEMPOLICY_INVALID),
        (MemPolicy(MemPolicyMode.BIND, (0, 2)), Reason.NODE_UNKNOWN),
        (MemPolicy(MemPolicyMode.PREFERRED, (9,)), Reason.NODE_UNKNOWN),
    ],
)
def test_a_policy_that_cannot_be_is_refused(policy: MemPolicy, reason: Reason) -> None:
    world = GmemWorld(nodes=2)
    inode = made(world)
    with refused(world, reason):
        world.run(world.core.set_mempolicy(whole(inode), policy))
    assert world.core.mempolicies(whole(inode)) == [(inode.whole, DEFAULT)]


@pytest.mark.parametrize("lineage", [Lineage.RFC_V1, Lineage.RFC_V2])
def test_the_series_use_the_policy_of_the_task(lineage: Lineage) -> None:
    world = GmemWorld()
    inode = world.create(PAGE_SIZE, lineage=lineage)
    with refused(world, Reason.OPERATION_UNSUPPORTED):
        world.run(world.core.set_mempolicy(whole(inode), ZERO))
    with refused(world, Reason.OPERATION_UNSUPPORTED):
        world.core.mempolicies(whole(inode))


def test_they_outlive_the_service() -> None:
    world = GmemWorld(nodes=2)
    inode = made(world)
    world.run(world.core.set_mempolicy(part(inode, 1, 2), ROUND))
    again = GuestMemfdCore()
    again.restore(world.rows, epoch=2)
    assert again.inode(inode.number).mempolicies.all_set == ((P(1, 3), ROUND),)
    world.run(world.core.set_mempolicy(whole(inode), DEFAULT))
    assert f"inode/{inode.number}/mempolicies" not in world.rows
