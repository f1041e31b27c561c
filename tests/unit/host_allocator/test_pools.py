"""Pools: filled at boot and at run time, shrunk, with and without vmemmap to spare."""

from __future__ import annotations

import pytest

from gmem.host_allocator.core.host_memory import HostMemory
from gmem.host_allocator.core.values import BootPool, PoolStatistics
from gmem.uapi.errors import Errno, Reason
from gmem.uapi.pages import SIZE_1G, SIZE_2M
from tests.unit.host_allocator.hosts import (
    PAGES_PER_1G,
    refused,
    take_base_memory,
)


def per_node(pool: PoolStatistics) -> list[tuple[int, int, int]]:
    return [
        (n.nr_huge_pages, n.free_huge_pages, n.surplus_huge_pages) for n in pool.nodes
    ]


def test_boot_fills_the_pool_of_each_node() -> None:
    memory = HostMemory(
        [8 * PAGES_PER_1G, 8 * PAGES_PER_1G],
        [BootPool(SIZE_1G, 6, 0), BootPool(SIZE_1G, 2, 1), BootPool(SIZE_2M, 10)],
    )
    assert per_node(memory.statistics().pool(SIZE_1G)) == [(6, 6, 0), (2, 2, 0)]
    assert per_node(memory.statistics().pool(SIZE_2M)) == [(5, 5, 0), (5, 5, 0)]
    assert memory.boot_shortfalls == ()
    memory.check_frames()


def test_boot_reports_what_it_could_not_fill() -> None:
    asked = BootPool(SIZE_1G, 4)
    memory = HostMemory([4 * PAGES_PER_1G], [asked])
    # The memmap lies in the last gigabyte.
    assert memory.boot_shortfalls == ((asked, 1),)
    assert memory.statistics().pool(SIZE_1G).nr_huge_pages == 3


def test_1g_folios_are_carved_before_2m_ones() -> None:
    pools = [BootPool(SIZE_2M, 2000), BootPool(SIZE_1G, 2)]
    memory = HostMemory([3 * PAGES_PER_1G], pools)
    assert memory.statistics().pool(SIZE_1G).nr_huge_pages == 2


def test_a_pool_grows_at_run_time_in_turns_of_nodes() -> None:
    memory = HostMemory([4 * PAGES_PER_1G] * 2)
    for count, nodes in [(1, [1, 0]), (2, [1, 1]), (3, [2, 1])]:
        update = memory.update_pool(SIZE_1G, count)
        assert update.missing_pages == 0
        assert [node[0] for node in per_node(update.pool)] == nodes


def test_a_pool_of_one_node_leaves_the_others() -> None:
    memory = HostMemory([4 * PAGES_PER_1G] * 2, [BootPool(SIZE_1G, 2)])
    update = memory.update_pool(SIZE_1G, 3, node=1)
    assert per_node(update.pool) == [(1, 1, 0), (3, 3, 0)]
    update = memory.update_pool(SIZE_1G, 0, node=0)
    assert per_node(update.pool) == [(0, 0, 0), (3, 3, 0)]


def test_growing_takes_what_there_is_and_says_what_is_missing() -> None:
    memory = HostMemory([4 * PAGES_PER_1G])
    update = memory.update_pool(SIZE_1G, 1 << 62)
    assert update.pool.nr_huge_pages == 3
    assert update.missing_pages == (1 << 62) - 3
    memory.check_frames()


def test_vmemmap_given_back_completes_another_aligned_run() -> None:
    # The memmap reaches into the fifth 2M run; HVO of the first four frees enough.
    memory = HostMemory([5 * 512 + 14])
    assert memory.statistics().nodes[0].nr_memmap_pages == 41
    update = memory.update_pool(SIZE_2M, 5)
    assert (update.pool.nr_huge_pages, update.missing_pages) == (5, 0)
    memory.check_frames()


def test_shrinking_to_nothing_is_never_having_grown() -> None:
    memory = HostMemory([4 * PAGES_PER_1G] * 2)
    before = memory.statistics()
    memory.update_pool(SIZE_2M, 1001)
    memory.update_pool(SIZE_1G, 3)
    memory.update_pool(SIZE_2M, 0)
    memory.update_pool(SIZE_1G, 0)
    after = memory.statistics().levels()
    assert (after.nodes, after.pools, after.vmemmap) == (
        before.nodes,
        before.pools,
        before.vmemmap,
    )


def test_shrinking_below_use_makes_surplus_that_goes_when_it_is_freed() -> None:
    memory = HostMemory([4 * PAGES_PER_1G], [BootPool(SIZE_1G, 3)])
    handle = memory.reserve(SIZE_1G, 2)
    folios = memory.allocate(handle, page_size=SIZE_1G, nr_folios=2)

    update = memory.update_pool(SIZE_1G, 0)
    assert per_node(update.pool) == [(2, 0, 2)]
    assert update.missing_pages == 2

    memory.free(handle, folios[:1])
    pool = memory.statistics().pool(SIZE_1G)
    assert per_node(pool) == [(1, 0, 1)]
    # The promise outlives its page, as in the kernel: allocate finds nothing.
    assert pool.resv_huge_pages == 1
    memory.check_frames()

    memory.free(handle, folios[1:])
    memory.unreserve(handle)
    pool = memory.statistics().pool(SIZE_1G)
    assert (pool.nr_huge_pages, pool.resv_huge_pages) == (0, 0)
    memory.check_frames()


def test_surplus_is_called_persistent_before_the_pool_grows() -> None:
    memory = HostMemory([4 * PAGES_PER_1G], [BootPool(SIZE_1G, 2)])
    handle = memory.reserve(SIZE_1G, 2)
    memory.allocate(handle, page_size=SIZE_1G, nr_folios=2)
    memory.update_pool(SIZE_1G, 0)
    update = memory.update_pool(SIZE_1G, 3)
    assert per_node(update.pool) == [(3, 1, 0)]


def test_reserved_pages_stay_when_the_pool_shrinks() -> None:
    memory = HostMemory([4 * PAGES_PER_1G], [BootPool(SIZE_1G, 3)])
    memory.reserve(SIZE_1G, 2)
    update = memory.update_pool(SIZE_1G, 0)
    assert per_node(update.pool) == [(2, 2, 2)]
    assert update.missing_pages == 2


def test_a_folio_whose_vmemmap_cannot_be_restored_stays_as_surplus() -> None:
    memory = HostMemory([2048], [BootPool(SIZE_2M, 2)])
    take_base_memory(memory, leave=6)
    failures = memory.statistics().vmemmap.restore_failures_total

    update = memory.update_pool(SIZE_2M, 0)
    assert per_node(update.pool) == [(2, 2, 2)]
    assert memory.statistics().vmemmap.restore_failures_total == failures + 1
    memory.check_frames()


def test_one_dissolved_folio_pays_for_the_next() -> None:
    memory = HostMemory([4096], [BootPool(SIZE_2M, 6)])
    take_base_memory(memory, leave=7)
    update = memory.update_pool(SIZE_2M, 0)
    assert (update.pool.nr_huge_pages, update.missing_pages) == (0, 0)
    memory.check_frames()


def test_a_freed_surplus_folio_stays_when_its_vmemmap_cannot_be_restored() -> None:
    memory = HostMemory([2048], [BootPool(SIZE_2M, 1)])
    handle = memory.reserve(SIZE_2M, 1)
    folios = memory.allocate(handle, page_size=SIZE_2M)
    memory.update_pool(SIZE_2M, 0)
    take_base_memory(memory)

    memory.free(handle, folios)
    assert per_node(memory.statistics().pool(SIZE_2M)) == [(1, 1, 1)]
    memory.check_frames()


def test_unoptimised_folios_need_no_vmemmap_to_go() -> None:
    memory = HostMemory([2048], [BootPool(SIZE_2M, 2)], optimize_vmemmap=False)
    take_base_memory(memory)
    assert memory.update_pool(SIZE_2M, 0).missing_pages == 0


def test_validate_only_answers_and_changes_nothing() -> None:
    memory = HostMemory([4 * PAGES_PER_1G])
    before = memory.statistics()
    would = memory.update_pool(SIZE_1G, 5, validate_only=True)
    assert memory.statistics() == before
    assert memory.update_pool(SIZE_1G, 5) == would


@pytest.mark.parametrize(
    ("arguments", "reason", "words"),
    [
        ((4096, 1), Reason.PAGE_SIZE_UNKNOWN, "4096 bytes"),
        ((0, 1), Reason.PAGE_SIZE_UNKNOWN, "use 2097152 or 1073741824"),
        ((SIZE_1G, 1, 5), Reason.NODE_UNKNOWN, "node 5 does not exist"),
        ((SIZE_1G, -1), Reason.SIZE_INVALID, "a pool of -1 pages"),
    ],
)
def test_a_pool_that_cannot_be_is_refused(
    arguments: tuple[int, ...], reason: Reason, words: str
) -> None:
    memory = HostMemory([4 * PAGES_PER_1G])
    with refused(memory, reason) as caught:
        memory.update_pool(*arguments)
    assert caught.value.errno == Errno.EINVAL
    assert words in caught.value.sentence


def test_four_tib_of_2m_pages_are_quick() -> None:
    # Without runs this would be two million objects.
    memory = HostMemory([512 * PAGES_PER_1G] * 8)
    update = memory.update_pool(SIZE_2M, 2_000_000)
    assert update.missing_pages == 0
    assert memory.update_pool(SIZE_2M, 0).missing_pages == 0
    memory.check_frames()
