"""The seven calls on huge pages: which counter moves when, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from gmem.host_allocator.core.host_memory import HostMemory
from gmem.host_allocator.core.subpool import Subpool
from gmem.host_allocator.core.values import BootPool, Folio, MemPolicy, MemPolicyMode
from gmem.uapi.errors import Errno, Reason
from gmem.uapi.pages import PAGE_SIZE, SIZE_1G, SIZE_2M, NodeId, Pfn
from tests.unit.host_allocator.hosts import HUGE, PAGES_PER_1G, one_folio, refused


def host(page_size: int, per_node: tuple[int, ...] = (2, 2)) -> HostMemory:
    pools = [BootPool(page_size, nr, node) for node, nr in enumerate(per_node)]
    return HostMemory([4 * PAGES_PER_1G for _ in per_node], pools)


def counts(memory: HostMemory, page_size: int) -> tuple[int, int, int, int]:
    pool = memory.statistics().pool(page_size)
    return (
        pool.nr_huge_pages,
        pool.free_huge_pages,
        pool.resv_huge_pages,
        pool.surplus_huge_pages,
    )


def claim(memory: HostMemory, handle: int) -> tuple[int, int, int, bool]:
    (found,) = [c for c in memory.reservations() if c.handle == handle]
    return found.max_hpages, found.used_hpages, found.rsv_hpages, found.closing


@HUGE
def test_each_call_moves_the_kernels_counters(page_size: int) -> None:
    memory = host(page_size)
    start = memory.statistics()

    handle = memory.reserve(page_size, 3, owner="vm-0")
    assert counts(memory, page_size) == (4, 4, 3, 0)
    assert claim(memory, handle) == (3, 0, 3, False)

    folios = memory.allocate(handle, page_size=page_size, nr_folios=2)
    assert counts(memory, page_size) == (4, 2, 1, 0)
    assert claim(memory, handle) == (3, 2, 1, False)

    memory.split(handle, folios[0])
    memory.reconstruct(handle, folios[0], page_size // PAGE_SIZE)
    assert counts(memory, page_size) == (4, 2, 1, 0)

    memory.free(handle, folios)
    assert counts(memory, page_size) == (4, 4, 3, 0)
    assert claim(memory, handle) == (3, 0, 3, False)

    memory.unreserve(handle)
    assert memory.statistics().levels() == start.levels()
    assert memory.reservations() == ()
    memory.check_frames()


@HUGE
def test_folios_are_aligned_lowest_first_and_of_their_node(page_size: int) -> None:
    memory = host(page_size)
    handle = memory.reserve(page_size, 4)
    folios = memory.allocate(handle, page_size=page_size, nr_folios=9)
    nr = page_size // PAGE_SIZE
    second = 4 * PAGES_PER_1G
    assert [(f.pfn, f.node) for f in folios] == [
        (0, 0),
        (nr, 0),
        (second, 1),
        (second + nr, 1),
    ]


def test_used_hpages_and_rsv_hpages_always_add_up_to_max() -> None:
    subpool = Subpool(1, SIZE_2M, "", (NodeId(0),), 3, 0, 3)
    subpool.get_pages(2)
    subpool.put_pages(1)
    assert (subpool.used_hpages, subpool.rsv_hpages) == (1, 2)
    with pytest.raises(AssertionError):
        subpool.get_pages(3)


@HUGE
def test_folios_that_are_out_keep_an_unreserved_subpool(page_size: int) -> None:
    memory = host(page_size)
    handle = memory.reserve(page_size, 3)
    folios = memory.allocate(handle, page_size=page_size, nr_folios=2)

    memory.unreserve(handle)
    assert counts(memory, page_size) == (4, 2, 1, 0)
    assert claim(memory, handle) == (3, 2, 1, True)
    with refused(memory, Reason.HANDLE_UNKNOWN) as caught:
        memory.allocate(handle, page_size=page_size)
    assert "waits for its last folios" in caught.value.sentence
    with refused(memory, Reason.HANDLE_UNKNOWN):
        memory.unreserve(handle)

    memory.free(handle, folios[:1])
    assert counts(memory, page_size) == (4, 3, 2, 0)
    memory.free(handle, folios[1:])
    assert counts(memory, page_size) == (4, 4, 0, 0)
    assert memory.reservations() == ()


@HUGE
def test_only_unreserved_free_pages_can_be_reserved(page_size: int) -> None:
    memory = host(page_size)
    memory.reserve(page_size, 3)
    with refused(memory, Reason.POOL_EMPTY) as caught:
        memory.reserve(page_size, 2)
    assert caught.value.errno == Errno.ENOMEM
    assert caught.value.numbers == {
        "num_pages": 2,
        "free_huge_pages": 4,
        "resv_huge_pages": 3,
    }
    assert "1 of the pool are free and not reserved" in caught.value.sentence
    memory.reserve(page_size, 1)


@HUGE
def test_a_node_with_fewer_free_pages_refuses(page_size: int) -> None:
    memory = host(page_size, (3, 1))
    with refused(memory, Reason.NODE_EMPTY) as caught:
        memory.reserve(page_size, 2, node=1)
    assert caught.value.errno == Errno.ENOMEM
    assert "node 1, which has 1 free" in caught.value.sentence


@HUGE
def test_an_allowed_node_bounds_the_policy(page_size: int) -> None:
    memory = host(page_size, (1, 1))
    handle = memory.reserve(page_size, 1, node=1)
    with refused(memory, Reason.MEMPOLICY_INVALID):
        memory.allocate(handle, MemPolicy(MemPolicyMode.BIND, (0,)), page_size)
    (folio,) = memory.allocate(handle, page_size=page_size)
    assert folio.node == 1


@HUGE
def test_bind_finds_its_nodes_empty_where_preferred_goes_on(page_size: int) -> None:
    memory = host(page_size, (1, 2))
    handle = memory.reserve(page_size, 3)
    bind = MemPolicy(MemPolicyMode.BIND, (0,))
    assert memory.allocate(handle, bind, page_size)[0].node == 0
    with refused(memory, Reason.POOL_EMPTY) as caught:
        memory.allocate(handle, bind, page_size)
    assert "nodes [0]" in caught.value.sentence
    preferred = MemPolicy(MemPolicyMode.PREFERRED, (0,))
    assert memory.allocate(handle, preferred, page_size)[0].node == 1


@HUGE
def test_an_exhausted_subpool_refuses(page_size: int) -> None:
    memory = host(page_size)
    handle, folio = one_folio(memory, page_size)
    with refused(memory, Reason.SUBPOOL_EMPTY) as caught:
        memory.allocate(handle, page_size=page_size)
    assert caught.value.errno == Errno.ENOMEM
    assert "free one of its folios" in caught.value.sentence
    memory.free(handle, [folio])
    memory.allocate(handle, page_size=page_size)


@HUGE
@pytest.mark.parametrize("num_pages", [0, -1, -(1 << 63)])
def test_a_reservation_of_nothing_is_refused(page_size: int, num_pages: int) -> None:
    memory = host(page_size)
    with refused(memory, Reason.SIZE_INVALID) as caught:
        memory.reserve(page_size, num_pages)
    assert caught.value.errno == Errno.EINVAL
    assert str(num_pages) in caught.value.sentence


@HUGE
def test_a_reservation_of_2_to_the_63_is_refused(page_size: int) -> None:
    memory = host(page_size)
    with refused(memory, Reason.POOL_EMPTY):
        memory.reserve(page_size, 1 << 63)


@HUGE
def test_another_page_size_than_the_reservations_is_refused(page_size: int) -> None:
    memory = host(page_size)
    handle = memory.reserve(page_size, 1)
    with refused(memory, Reason.PAGE_SIZE_UNKNOWN) as caught:
        memory.allocate(handle, page_size=PAGE_SIZE)
    assert f"use {page_size}" in caught.value.sentence


@HUGE
def test_only_4k_is_a_split_target(page_size: int) -> None:
    memory = host(page_size)
    handle, folio = one_folio(memory, page_size)
    with refused(memory, Reason.TARGET_UNSUPPORTED) as caught:
        memory.split(handle, folio, SIZE_2M)
    assert caught.value.errno == Errno.EOPNOTSUPP
    assert "split to 4096" in caught.value.sentence


@HUGE
def test_a_split_folio_is_neither_split_nor_freed(page_size: int) -> None:
    memory = host(page_size)
    handle, folio = one_folio(memory, page_size)
    memory.split(handle, folio)
    with refused(memory, Reason.FOLIO_STATE):
        memory.split(handle, folio)
    with refused(memory, Reason.FOLIO_STATE) as caught:
        memory.free(handle, [folio])
    assert "reconstruct it first" in caught.value.sentence


@HUGE
def test_reconstruct_takes_the_first_page_or_the_folio(page_size: int) -> None:
    memory = host(page_size)
    handle, folio = one_folio(memory, page_size)
    nr = page_size // PAGE_SIZE
    for first in (folio, replace(folio, order=0)):
        memory.split(handle, folio)
        assert memory.reconstruct(handle, first, nr)[0] == folio
    with refused(memory, Reason.FOLIO_STATE):
        memory.reconstruct(handle, folio, nr)


@HUGE
def test_reconstruct_wants_the_whole_folio(page_size: int) -> None:
    memory = host(page_size)
    handle, folio = one_folio(memory, page_size)
    memory.split(handle, folio)
    nr = page_size // PAGE_SIZE
    for wrong in (0, nr - 1, 2 * nr, 1 << 63):
        with refused(memory, Reason.SIZE_INVALID) as caught:
            memory.reconstruct(handle, folio, wrong)
        assert f"give {nr}" in caught.value.sentence
    second = Folio(Pfn(folio.pfn + 1), 0, folio.node)
    with refused(memory, Reason.FOLIO_UNKNOWN):
        memory.reconstruct(handle, second, nr)


@HUGE
def test_a_folio_of_nobody_or_of_another_is_unknown(page_size: int) -> None:
    memory = host(page_size)
    mine, folio = one_folio(memory, page_size)
    other, others = one_folio(memory, page_size)
    strangers = [
        others,
        replace(folio, order=folio.order - 1),
        replace(folio, node=NodeId(1)),
        replace(folio, node=NodeId(77)),
        replace(folio, pfn=Pfn(1 << 50)),
        replace(folio, pfn=Pfn(folio.pfn + 1)),
    ]
    for stranger in strangers:
        with refused(memory, Reason.FOLIO_UNKNOWN) as caught:
            memory.free(mine, [folio, stranger])
        assert caught.value.errno == Errno.ENOENT
        for call in (memory.split, memory.error):
            with refused(memory, Reason.FOLIO_UNKNOWN):
                call(mine, stranger)
    memory.free(other, [others])


@HUGE
def test_a_folio_named_twice_is_freed_not_once(page_size: int) -> None:
    memory = host(page_size)
    handle, folio = one_folio(memory, page_size)
    with refused(memory, Reason.FOLIO_UNKNOWN) as caught:
        memory.free(handle, [folio, folio])
    assert "named twice" in caught.value.sentence


@HUGE
def test_a_poisoned_folio_never_comes_back(page_size: int) -> None:
    memory = host(page_size, (1,))
    handle, folio = one_folio(memory, page_size)
    memory.error(handle, folio)
    memory.error(handle, folio)
    assert memory.statistics().meminfo.hardware_corrupted_kb == 4
    assert counts(memory, page_size) == (1, 0, 0, 0)

    memory.free(handle, [folio])
    assert counts(memory, page_size) == (0, 0, 1, 0)
    with refused(memory, Reason.POOL_EMPTY):
        memory.allocate(handle, page_size=page_size)
    memory.unreserve(handle)
    memory.update_pool(page_size, 1000)
    pools = memory.hugetlb.values()
    free = [run for pool in pools for run in pool.hstate.free_runs()]
    assert not any(run.overlaps(folio.frames) for run in free)
    memory.check_frames()


@HUGE
def test_a_poisoned_page_of_a_split_folio_takes_the_folio_out_of_its_pool(
    page_size: int,
) -> None:
    memory = host(page_size, (1,))
    handle, folio = one_folio(memory, page_size)
    page = Folio(Pfn(folio.pfn + 5), 0, folio.node)
    with refused(memory, Reason.FOLIO_UNKNOWN):
        memory.error(handle, page)
    memory.split(handle, folio)
    memory.error(handle, page)
    memory.error(handle, replace(page, pfn=folio.pfn))
    assert memory.statistics().meminfo.hardware_corrupted_kb == 8
    memory.reconstruct(handle, folio, page_size // PAGE_SIZE)
    memory.free(handle, [folio])
    memory.unreserve(handle)
    assert counts(memory, page_size) == (0, 0, 0, 0)
    # Only the bad pages are lost: the others are base memory.
    assert sum(len(node.withheld) for node in memory.nodes) == 2
    memory.check_frames()


def test_a_poisoned_surplus_folio_is_one_surplus_less() -> None:
    memory = host(SIZE_2M, (2,))
    handle = memory.reserve(SIZE_2M, 2)
    folios = memory.allocate(handle, page_size=SIZE_2M, nr_folios=2)
    memory.update_pool(SIZE_2M, 0)
    memory.error(handle, folios[0])
    memory.free(handle, folios[:1])
    assert counts(memory, SIZE_2M) == (1, 0, 1, 1)
    memory.check_frames()


def test_freeing_nothing_is_nothing() -> None:
    memory = host(SIZE_1G)
    handle = memory.reserve(SIZE_1G, 1)
    before = memory.statistics()
    memory.free(handle, [])
    assert memory.statistics() == before


@pytest.mark.parametrize("handle", [0, -1, 999, 1 << 63])
def test_a_handle_that_was_never_issued_is_unknown(handle: int) -> None:
    memory = host(SIZE_1G)
    folio = Folio(Pfn(0), 18, NodeId(0))
    calls: list[Callable[[], object]] = [
        lambda: memory.allocate(handle, page_size=SIZE_1G),
        lambda: memory.split(handle, folio),
        lambda: memory.reconstruct(handle, folio, 1 << 18),
        lambda: memory.free(handle, [folio]),
        lambda: memory.error(handle, folio),
        lambda: memory.unreserve(handle),
    ]
    for call in calls:
        with refused(memory, Reason.HANDLE_UNKNOWN) as caught:
            call()
        assert caught.value.errno == Errno.ENOENT
        assert f"handle {handle} was never issued" in caught.value.sentence


def test_a_backend_by_itself_knows_only_its_handles() -> None:
    memory = host(SIZE_1G)
    backend = memory.hugetlb[SIZE_1G]
    handle = backend.reserve(SIZE_1G, 1)
    with refused(memory, Reason.HANDLE_UNKNOWN):
        backend.unreserve(handle + 1)
    with refused(memory, Reason.PAGE_SIZE_UNKNOWN):
        backend.reserve(SIZE_2M, 1)
    assert backend.statistics().resv_huge_pages == 1
