"""Demotion: free 1G pages become 2M pages, and what it costs in vmemmap pages."""

from __future__ import annotations

from typing import Any

import pytest

from gmem.host_allocator.core.host_memory import HostMemory
from gmem.host_allocator.core.values import BootPool, PoolStatistics
from gmem.uapi.errors import Reason
from gmem.uapi.pages import PAGE_SIZE, SIZE_1G, SIZE_2M
from tests.unit.host_allocator.hosts import (
    LITTLE,
    PAGES_PER_1G,
    refused,
    take_base_memory,
)


def counts(pool: PoolStatistics) -> list[tuple[int, int]]:
    return [(node.nr_huge_pages, node.free_huge_pages) for node in pool.nodes]


def two_nodes() -> HostMemory:
    return HostMemory([4 * PAGES_PER_1G] * 2, [BootPool(SIZE_1G, 4)])


def one_page() -> HostMemory:
    """One 1G page, and little else."""
    return HostMemory([PAGES_PER_1G + LITTLE], [BootPool(SIZE_1G, 1)])


def test_a_1g_page_becomes_512_pages_of_2m_and_takes_511_vmemmap_pages() -> None:
    memory = HostMemory([4 * PAGES_PER_1G], [BootPool(SIZE_1G, 2)])
    before = memory.statistics()
    demotion = memory.demote_pool(SIZE_1G, 1)
    assert (demotion.demoted_pages, demotion.target_pages) == (1, 512)
    assert demotion.missing_pages == 0
    assert counts(demotion.source) == [(1, 1)]
    assert counts(demotion.target) == [(512, 512)]

    after = memory.statistics()
    assert after.pools == (demotion.target, demotion.source)
    assert before.nodes[0].free_base_pages - after.nodes[0].free_base_pages == 511
    assert after.vmemmap.restored_pages_total == 4095
    assert before.vmemmap.saved_pages - after.vmemmap.saved_pages == 511
    memory.check_frames()


def test_without_hvo_demotion_costs_nothing() -> None:
    memory = HostMemory(
        [4 * PAGES_PER_1G], [BootPool(SIZE_1G, 2)], optimize_vmemmap=False
    )
    before = memory.statistics().nodes
    memory.demote_pool(SIZE_1G, 2)
    assert memory.statistics().nodes == before


def test_demoted_pages_can_be_had() -> None:
    memory = two_nodes()
    memory.demote_pool(SIZE_1G, 1, node=1)
    handle = memory.reserve(SIZE_2M, 512)
    folios = memory.allocate(handle, page_size=SIZE_2M, nr_folios=512)
    assert {(folio.order, folio.node) for folio in folios} == {(9, 1)}
    memory.check_frames()


def test_pages_of_all_nodes_are_demoted_in_turns() -> None:
    memory = two_nodes()
    demotion = memory.demote_pool(SIZE_1G, 2)
    assert counts(demotion.source) == [(1, 1), (1, 1)]
    assert counts(demotion.target) == [(512, 512), (512, 512)]


def test_reserved_and_allocated_pages_stay() -> None:
    memory = two_nodes()
    handle = memory.reserve(SIZE_1G, 2)
    memory.allocate(handle, page_size=SIZE_1G)
    demotion = memory.demote_pool(SIZE_1G, 9)
    # One of the four is allocated, one of the free three is promised.
    assert (demotion.demoted_pages, demotion.missing_pages) == (2, 7)
    assert demotion.source.free_huge_pages == demotion.source.resv_huge_pages == 1
    again = memory.demote_pool(SIZE_1G, 1)
    assert (again.demoted_pages, again.missing_pages) == (0, 1)
    memory.check_frames()


def test_all_reservations_count_against_the_free_pages_of_one_node() -> None:
    memory = two_nodes()
    memory.reserve(SIZE_1G, 1)
    assert memory.demote_pool(SIZE_1G, 2, node=0).demoted_pages == 1


def test_a_surplus_page_is_not_demoted() -> None:
    memory = one_page()
    take_base_memory(memory)
    # Its vmemmap cannot be restored, so that it stays as a free surplus page.
    assert memory.update_pool(SIZE_1G, 0).pool.surplus_huge_pages == 1
    assert memory.demote_pool(SIZE_1G, 1).demoted_pages == 0


def test_the_first_page_without_vmemmap_is_refused() -> None:
    memory = one_page()
    take_base_memory(memory, leave=4094)
    before = memory.statistics().levels()
    with pytest.raises(OSError, match="takes 4095 vmemmap pages first") as caught:
        memory.demote_pool(SIZE_1G, 1)
    assert "node 0 has 4094 base pages free" in str(caught.value)
    assert memory.statistics().levels() == before
    memory.check_frames()


def test_what_vmemmap_allows_is_demoted() -> None:
    memory = HostMemory([2 * PAGES_PER_1G + 2 * LITTLE], [BootPool(SIZE_1G, 2)])
    take_base_memory(memory, leave=4095 + 510)
    # The first leaves 511 fewer, which is one too few for the second.
    demotion = memory.demote_pool(SIZE_1G, 2)
    assert (demotion.demoted_pages, demotion.missing_pages) == (1, 1)
    memory.check_frames()


def test_validate_only_answers_and_changes_nothing() -> None:
    memory = two_nodes()
    before = memory.statistics()
    would = memory.demote_pool(SIZE_1G, 9, validate_only=True)
    assert memory.statistics() == before
    assert memory.demote_pool(SIZE_1G, 9) == would


@pytest.mark.parametrize(
    ("page_size", "more", "reason", "words"),
    [
        (SIZE_2M, {}, Reason.TARGET_UNSUPPORTED, "demote 1G pages instead"),
        (
            SIZE_1G,
            {"target_page_size": PAGE_SIZE},
            Reason.TARGET_UNSUPPORTED,
            "cannot be demoted to 4K: demote to 2M",
        ),
        (PAGE_SIZE, {}, Reason.PAGE_SIZE_UNKNOWN, "4096 bytes"),
        (SIZE_1G, {"node": 2}, Reason.NODE_UNKNOWN, "node 2 does not exist"),
    ],
)
def test_a_demotion_that_cannot_be_is_refused(
    page_size: int, more: dict[str, Any], reason: Reason, words: str
) -> None:
    memory = two_nodes()
    with refused(memory, reason) as caught:
        memory.demote_pool(page_size, 1, **more)
    assert words in caught.value.sentence
