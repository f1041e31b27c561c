"""Nodes: where frames are, which node comes first, and dealing in turns."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmem.host_allocator.core.nodes import (
    deal,
    make_nodes,
    nodes_in_order,
    require_node,
)
from gmem.host_allocator.core.values import MemPolicy, MemPolicyMode
from gmem.uapi.errors import BadRequest, Reason
from gmem.uapi.pages import NodeId, PgRange

BIND, PREFERRED, DEFAULT, INTERLEAVE = (
    MemPolicyMode.BIND,
    MemPolicyMode.PREFERRED,
    MemPolicyMode.DEFAULT,
    MemPolicyMode.INTERLEAVE,
)
ALL = (NodeId(0), NodeId(1), NodeId(2))


def test_pfns_count_on_from_node_to_node() -> None:
    first, second = make_nodes([6400, 640])
    assert (first.frames, second.frames) == (PgRange(0, 6400), PgRange(6400, 7040))


def test_the_memmap_takes_64_bytes_per_frame_from_the_top() -> None:
    (node,) = make_nodes([6401])
    assert node.memmap.runs() == [PgRange(6300, 6401)]
    assert node.statistics().nr_memmap_pages == 101
    node.check(pool_pages=0)


@pytest.mark.parametrize("pages", [[], [0], [1], [-64], [6400, 0]])
def test_a_node_without_memory_is_refused(pages: list[int]) -> None:
    with pytest.raises(BadRequest) as caught:
        make_nodes(pages)
    assert caught.value.reason is Reason.SIZE_INVALID


def test_vmemmap_that_base_memory_cannot_hold_is_not_taken() -> None:
    (node,) = make_nodes([640])
    before = node.statistics()
    assert not node.take_vmemmap(631)
    assert node.statistics() == before
    assert node.take_vmemmap(630)
    assert node.statistics().free_base_pages == 0


@pytest.mark.parametrize(
    ("policy", "nodes"),
    [
        (MemPolicy(), (0, 1, 2)),
        (MemPolicy(BIND, (2, 1)), (1, 2)),
        (MemPolicy(BIND, (1, 9)), (1,)),
        (MemPolicy(PREFERRED, (1,)), (1, 0, 2)),
        (MemPolicy(PREFERRED, ()), (0, 1, 2)),
        (MemPolicy(INTERLEAVE, (2, 1)), (1, 2, 0)),
    ],
)
def test_a_policy_orders_nodes(policy: MemPolicy, nodes: tuple[int, ...]) -> None:
    assert nodes_in_order(policy, ALL) == nodes


@pytest.mark.parametrize(
    "policy",
    [
        MemPolicy(BIND, ()),
        MemPolicy(BIND, (3,)),
        MemPolicy(PREFERRED, (7,)),
        MemPolicy(INTERLEAVE, ()),
        MemPolicy(INTERLEAVE, (7,)),
        MemPolicy(DEFAULT, (0,)),
        MemPolicy(DEFAULT, (9,)),
    ],
    ids=str,
)
def test_a_policy_without_usable_nodes_is_refused(policy: MemPolicy) -> None:
    with pytest.raises(BadRequest) as caught:
        nodes_in_order(policy, ALL)
    assert caught.value.reason is Reason.MEMPOLICY_INVALID
    assert str(list(policy.nodes)) in caught.value.sentence
    assert "allowed are [0, 1, 2]" in caught.value.sentence


@pytest.mark.parametrize("node", [-1, 2, 1 << 31])
def test_a_node_that_is_not_there_is_refused(node: int) -> None:
    nodes = make_nodes([640, 640])
    with pytest.raises(BadRequest, match=f"node {node} does not exist: use 0 to 1"):
        require_node(nodes, node)


def dealt_one_by_one(
    count: int, capacities: list[int], first: int
) -> tuple[list[int], int]:
    shares, turn = [0] * len(capacities), first
    while count and shares != capacities:
        if shares[turn] < capacities[turn]:
            shares[turn] += 1
            count -= 1
        turn = (turn + 1) % len(capacities)
    return shares, turn


@given(
    st.integers(0, 60), st.lists(st.integers(0, 20), min_size=1, max_size=5), st.data()
)
def test_dealing_at_once_is_dealing_one_by_one(
    count: int, capacities: list[int], data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, len(capacities) - 1))
    assert deal(count, capacities, first) == dealt_one_by_one(count, capacities, first)
