"""guest_memfd_hugetlb_reporting_test: the rows G0 to G4, by the allocator's calls.

The rows H0 to H4 are played by another tenant of the pool in tests/contract.
"""

from __future__ import annotations

import pytest

from gmem.host_allocator.core.host_memory import HostMemory
from gmem.host_allocator.core.values import BootPool, HostStatistics
from gmem.uapi.pages import SIZE_1G, SIZE_2M
from tests.unit.host_allocator.hosts import HUGE, PAGES_PER_1G


def assert_stats(
    memory: HostMemory, base: HostStatistics, page_size: int, *, r: int, f: int
) -> None:
    """As assert_stats(R, F) of the series, on both sizes."""
    for size in (SIZE_2M, SIZE_1G):
        taken, promised = (f, r) if size == page_size else (0, 0)
        now, then = memory.statistics().pool(size), base.pool(size)
        assert now.free_huge_pages == then.free_huge_pages - taken
        assert now.resv_huge_pages == then.resv_huge_pages + promised - taken
        assert now.nr_huge_pages == then.nr_huge_pages
        assert now.surplus_huge_pages == then.surplus_huge_pages
        assert now.nr_overcommit_huge_pages == then.nr_overcommit_huge_pages


@pytest.mark.parametrize("busy", [False, True], ids=["idle host", "busy host"])
@HUGE
def test_guest_memfd_moves_the_counters_as_the_series_reports(
    page_size: int, busy: bool
) -> None:
    memory = HostMemory(
        [4 * PAGES_PER_1G] * 2, [BootPool(SIZE_2M, 8), BootPool(SIZE_1G, 4)]
    )
    if busy:
        other = memory.reserve(page_size, 2)
        memory.allocate(other, page_size=page_size)
    base = memory.statistics()
    assert_stats(memory, base, page_size, r=0, f=0)  # G0

    handle = memory.reserve(page_size, 1)
    assert_stats(memory, base, page_size, r=1, f=0)  # G1

    folios = memory.allocate(handle, page_size=page_size)
    assert_stats(memory, base, page_size, r=1, f=1)  # G2

    memory.free(handle, folios)
    assert_stats(memory, base, page_size, r=1, f=0)  # G3

    memory.unreserve(handle)
    assert_stats(memory, base, page_size, r=0, f=0)  # G4
    assert memory.statistics() == base
