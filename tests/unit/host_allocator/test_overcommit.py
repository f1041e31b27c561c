"""Overcommit: surplus pages for tenants that may have them, and when they go again."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from gmem.host_allocator.core.host_memory import HostMemory
from gmem.host_allocator.core.values import BootPool, MemPolicy, MemPolicyMode
from gmem.uapi.errors import Errno, KernelError, Reason
from gmem.uapi.pages import SIZE_1G, SIZE_2M
from tests.unit.host_allocator.hosts import (
    LITTLE,
    PAGES_PER_1G,
    refused,
    take_base_memory,
)

BIND_1 = MemPolicy(MemPolicyMode.BIND, (1,))


def host(nr_overcommit: int = 4, nr_huge_pages: int = 2) -> HostMemory:
    return HostMemory(
        [LITTLE] * 2,
        [BootPool(SIZE_2M, nr_huge_pages)],
        nr_overcommit={SIZE_2M: nr_overcommit},
    )


def counts(memory: HostMemory) -> tuple[int, int, int, int]:
    """The pool of 2M pages: nr, free, resv, surplus."""
    pool = memory.statistics().pool(SIZE_2M)
    return (
        pool.nr_huge_pages,
        pool.free_huge_pages,
        pool.resv_huge_pages,
        pool.surplus_huge_pages,
    )


def test_a_reservation_beyond_the_pool_has_surplus_pages_made() -> None:
    memory = host()
    before = memory.statistics().levels()
    handle = memory.reserve(SIZE_2M, 5, use_surplus=True)
    assert counts(memory) == (5, 5, 5, 3)
    folios = memory.allocate(handle, page_size=SIZE_2M, nr_folios=5)
    assert counts(memory) == (5, 0, 0, 3)
    memory.check_frames()

    memory.free(handle, folios)
    memory.unreserve(handle)
    assert counts(memory) == (2, 2, 0, 0)
    after = memory.statistics().levels()
    assert (after.nodes, after.pools, after.vmemmap) == (
        before.nodes,
        before.pools,
        before.vmemmap,
    )
    memory.check_frames()


def test_surplus_that_was_never_touched_goes_with_its_reservation() -> None:
    memory = host()
    mine = memory.reserve(SIZE_2M, 3, use_surplus=True)
    others = memory.reserve(SIZE_2M, 2, use_surplus=True)
    assert counts(memory) == (5, 5, 5, 3)
    memory.unreserve(mine)
    # Two persistent pages are enough for the other one.
    assert counts(memory) == (2, 2, 2, 0)
    memory.unreserve(others)
    assert counts(memory) == (2, 2, 0, 0)


def test_guest_memfd_takes_no_surplus_whatever_the_overcommit() -> None:
    memory = host()
    with refused(memory, Reason.POOL_EMPTY):
        memory.reserve(SIZE_2M, 3)


def test_overcommit_is_a_limit_for_all_tenants_together() -> None:
    memory = host(nr_overcommit=3)
    memory.reserve(SIZE_2M, 4, use_surplus=True)
    with refused(memory, Reason.POOL_EMPTY) as caught:
        memory.reserve(SIZE_2M, 2, use_surplus=True)
    assert caught.value.errno == Errno.ENOMEM
    memory.reserve(SIZE_2M, 1, use_surplus=True)
    assert counts(memory) == (5, 5, 5, 3)


def test_surplus_needs_base_memory() -> None:
    memory = host(nr_overcommit=4, nr_huge_pages=0)
    take_base_memory(memory, leave=511)
    with refused(memory, Reason.POOL_EMPTY):
        memory.reserve(SIZE_2M, 1, use_surplus=True)


def test_surplus_is_made_on_the_allowed_node() -> None:
    memory = host()
    memory.reserve(SIZE_2M, 2)
    memory.reserve(SIZE_2M, 2, node=1, use_surplus=True)
    nodes = memory.statistics().pool(SIZE_2M).nodes
    assert [node.surplus_huge_pages for node in nodes] == [0, 2]


def test_an_allowed_node_that_stays_too_small_is_refused() -> None:
    memory = host(nr_overcommit=1)
    # One page is missing and can be made: node 1 would have two then, not three.
    with refused(memory, Reason.NODE_EMPTY):
        memory.reserve(SIZE_2M, 3, node=1, use_surplus=True)


def test_a_policy_whose_nodes_are_empty_has_a_surplus_page_made_there() -> None:
    memory = host()
    others = memory.reserve(SIZE_2M, 1, node=1)
    memory.allocate(others, page_size=SIZE_2M)
    mine = memory.reserve(SIZE_2M, 1, use_surplus=True)
    (folio,) = memory.allocate(mine, BIND_1, SIZE_2M)
    assert folio.node == 1
    # The page of node 0 that was promised is free for others now.
    assert counts(memory) == (3, 1, 0, 1)
    memory.free(mine, [folio])
    assert counts(memory) == (2, 1, 1, 0)
    memory.check_frames()


def test_without_surplus_an_empty_policy_is_refused() -> None:
    memory = host(nr_overcommit=0)
    others = memory.reserve(SIZE_2M, 1, node=1)
    memory.allocate(others, page_size=SIZE_2M)
    for use_surplus in (False, True):
        mine = memory.reserve(SIZE_2M, 1, use_surplus=use_surplus)
        with refused(memory, Reason.POOL_EMPTY):
            memory.allocate(mine, BIND_1, SIZE_2M)
        memory.unreserve(mine)


def test_surplus_whose_vmemmap_cannot_be_restored_stays() -> None:
    memory = host(nr_huge_pages=0)
    handle = memory.reserve(SIZE_2M, 1, use_surplus=True)
    take_base_memory(memory)
    memory.unreserve(handle)
    assert counts(memory) == (1, 1, 0, 1)
    memory.check_frames()


def test_less_overcommit_leaves_the_surplus_there_is() -> None:
    memory = host()
    handle = memory.reserve(SIZE_2M, 4, use_surplus=True)
    memory.update_pool(SIZE_2M, nr_overcommit_huge_pages=0)
    assert counts(memory) == (4, 4, 4, 2)
    with refused(memory, Reason.POOL_EMPTY):
        memory.reserve(SIZE_2M, 1, use_surplus=True)
    memory.unreserve(handle)
    assert counts(memory) == (2, 2, 0, 0)


def test_both_numbers_are_set_at_once_or_alone() -> None:
    memory = host(nr_overcommit=0)
    update = memory.update_pool(SIZE_2M, nr_overcommit_huge_pages=7)
    assert (update.pool.nr_huge_pages, update.missing_pages) == (2, 0)
    assert update.pool.nr_overcommit_huge_pages == 7
    update = memory.update_pool(SIZE_2M, 3)
    assert update.pool.nr_overcommit_huge_pages == 7
    set_both = partial(
        memory.update_pool, SIZE_2M, nr_huge_pages=1, nr_overcommit_huge_pages=1
    )
    would = set_both(validate_only=True)
    assert set_both() == would
    assert (would.pool.nr_huge_pages, would.pool.nr_overcommit_huge_pages) == (1, 1)


@pytest.mark.parametrize(
    ("page_size", "numbers", "reason", "words"),
    [
        (SIZE_2M, {}, Reason.ARGUMENT_INVALID, "set one"),
        (SIZE_2M, {"nr_overcommit_huge_pages": -1}, Reason.SIZE_INVALID, "-1 pages"),
        (
            SIZE_2M,
            {"nr_overcommit_huge_pages": 1, "node": 0},
            Reason.ARGUMENT_INVALID,
            "leave the node out",
        ),
        (
            SIZE_1G,
            {"nr_overcommit_huge_pages": 1},
            Reason.ARGUMENT_INVALID,
            "never surplus by overcommit",
        ),
    ],
)
def test_an_overcommit_that_cannot_be_is_refused(
    page_size: int, numbers: dict[str, Any], reason: Reason, words: str
) -> None:
    memory = host()
    with refused(memory, reason) as caught:
        memory.update_pool(page_size, **numbers)
    assert words in caught.value.sentence
    assert caught.value.errno == Errno.EINVAL


def test_a_1g_pool_may_be_told_that_it_has_no_overcommit() -> None:
    assert host().update_pool(SIZE_1G, nr_overcommit_huge_pages=0).missing_pages == 0


def test_a_host_cannot_boot_with_surplus_1g_pages() -> None:
    with pytest.raises(KernelError, match="never surplus"):
        HostMemory([PAGES_PER_1G], nr_overcommit={SIZE_1G: 1})
