"""The front: boot, routing, /proc/meminfo."""

from __future__ import annotations

import pytest

from gmem.host_allocator.core.allocator import Allocator
from gmem.host_allocator.core.host_memory import HostMemory
from gmem.host_allocator.core.values import (
    BootPool,
    HostStatistics,
    Meminfo,
    NodeMemoryStatistics,
    PoolStatistics,
)
from gmem.uapi.errors import BadRequest, Reason
from gmem.uapi.pages import PAGE_SIZE, SIZE_1G, SIZE_2M
from tests.unit.host_allocator.hosts import PAGES_PER_1G


def test_every_backend_is_an_allocator() -> None:
    memory = HostMemory([PAGES_PER_1G])
    front: Allocator[HostStatistics] = memory
    pool: Allocator[PoolStatistics] = memory.hugetlb[SIZE_1G]
    base: Allocator[tuple[NodeMemoryStatistics, ...]] = memory.base
    statistics = front.statistics()
    assert statistics.nodes == base.statistics()
    assert statistics.pools[1] == pool.statistics()


def test_meminfo_has_the_default_size_and_the_sum_of_all() -> None:
    memory = HostMemory(
        [4 * PAGES_PER_1G],
        [BootPool(SIZE_1G, 2), BootPool(SIZE_2M, 3)],
        default_page_size=SIZE_2M,
        optimize_vmemmap=False,
    )
    handle = memory.reserve(SIZE_2M, 2)
    memory.allocate(handle, page_size=SIZE_2M)
    total = 4 * (1 << 20) * 63 // 64
    assert memory.statistics().meminfo == Meminfo(
        mem_total_kb=total,
        mem_free_kb=total - 2 * (1 << 20) - 3 * 2048,
        huge_pages_total=3,
        huge_pages_free=2,
        huge_pages_rsvd=1,
        huge_pages_surp=0,
        hugepagesize_kb=2048,
        hugetlb_kb=2 * (1 << 20) + 3 * 2048,
        hardware_corrupted_kb=0,
    )


def test_handles_are_unique_over_page_sizes_and_begin_where_told() -> None:
    memory = HostMemory([4 * PAGES_PER_1G], [BootPool(SIZE_1G, 1)], first_handle=70)
    handles = [memory.reserve(size, 1) for size in (PAGE_SIZE, SIZE_1G, PAGE_SIZE)]
    assert handles == [70, 71, 72]
    assert [claim.handle for claim in memory.reservations()] == handles


@pytest.mark.parametrize(
    ("pools", "default", "reason"),
    [
        ([BootPool(12345, 1)], SIZE_1G, Reason.PAGE_SIZE_UNKNOWN),
        ([BootPool(PAGE_SIZE, 1)], SIZE_1G, Reason.PAGE_SIZE_UNKNOWN),
        ([], PAGE_SIZE, Reason.PAGE_SIZE_UNKNOWN),
        ([BootPool(SIZE_1G, 1, 3)], SIZE_1G, Reason.NODE_UNKNOWN),
        ([BootPool(SIZE_1G, -1)], SIZE_1G, Reason.SIZE_INVALID),
    ],
)
def test_a_host_that_cannot_be_does_not_boot(
    pools: list[BootPool], default: int, reason: Reason
) -> None:
    with pytest.raises(BadRequest) as caught:
        HostMemory([PAGES_PER_1G], pools, default_page_size=default)
    assert caught.value.reason is reason
