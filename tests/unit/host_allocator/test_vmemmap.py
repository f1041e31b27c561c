"""HVO: saved, restored, refused; the switch; MemTotal."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gmem.host_allocator.core.host_memory import HostMemory
from gmem.host_allocator.core.values import BootPool
from gmem.host_allocator.core.vmemmap import saved_vmemmap_pages
from gmem.uapi.errors import Errno, Exhausted, Reason
from gmem.uapi.pages import PAGE_SIZE, SIZE_1G, SIZE_2M, order_of
from tests.unit.host_allocator.hosts import (
    HUGE,
    LITTLE,
    PAGES_PER_1G,
    SAVED,
    one_folio,
    take_base_memory,
)


def host(page_size: int, *, optimize: bool = True) -> HostMemory:
    pages = [page_size // PAGE_SIZE + LITTLE]
    return HostMemory(pages, [BootPool(page_size, 1)], optimize_vmemmap=optimize)


@HUGE
def test_a_folio_saves_all_but_one_vmemmap_page(page_size: int) -> None:
    assert saved_vmemmap_pages(order_of(page_size)) == SAVED[page_size]
    with_hvo, without = host(page_size), host(page_size, optimize=False)
    saved = with_hvo.statistics().nodes[0].free_base_pages
    saved -= without.statistics().nodes[0].free_base_pages
    assert saved == with_hvo.statistics().vmemmap.saved_pages == SAVED[page_size]
    assert without.statistics().vmemmap.saved_pages == 0


@HUGE
def test_split_reconstruct_split_restores_vmemmap_once_each_time(
    page_size: int,
) -> None:
    memory = host(page_size)
    handle, folio = one_folio(memory, page_size)
    whole = memory.statistics().levels()
    saved = SAVED[page_size]
    for turn in (1, 2):
        assert memory.split(handle, folio) == saved
        split = memory.statistics()
        assert split.vmemmap.saved_pages == 0
        assert split.vmemmap.restored_pages_total == turn * saved
        assert split.nodes[0].free_base_pages == whole.nodes[0].free_base_pages - saved
        assert split.pools == whole.pools

        nr_pages = page_size // PAGE_SIZE
        assert memory.reconstruct(handle, folio, nr_pages) == (folio, saved)
        assert memory.statistics().levels() == whole
        memory.check_frames()


@HUGE
def test_a_refused_restore_leaves_the_folio_whole_and_optimised(page_size: int) -> None:
    memory = host(page_size)
    handle, folio = one_folio(memory, page_size)
    needed = SAVED[page_size]
    hog, _ = take_base_memory(memory, leave=needed - 1)
    before = memory.statistics()

    with pytest.raises(Exhausted) as caught:
        memory.split(handle, folio)
    assert caught.value.reason is Reason.VMEMMAP_RESTORE_FAILED
    assert caught.value.errno == Errno.ENOMEM
    assert caught.value.numbers["needed"] == needed
    assert caught.value.numbers["free_base_pages"] == needed - 1
    assert "still whole and optimised" in caught.value.sentence
    # The one trace that a refusal leaves is its own count.
    counted = replace(before.vmemmap, restore_failures_total=1)
    assert memory.statistics() == replace(before, vmemmap=counted)

    memory.unreserve(hog)
    (claim,) = [c for c in memory.reservations() if c.handle == hog]
    assert claim.closing
    memory.free(handle, [folio])
    memory.check_frames()


def test_a_split_succeeds_once_base_memory_is_freed() -> None:
    memory = host(SIZE_2M)
    handle, folio = one_folio(memory, SIZE_2M)
    hog, folios = take_base_memory(memory, leave=6)
    with pytest.raises(Exhausted):
        memory.split(handle, folio)
    memory.free(hog, folios[:1])
    assert memory.split(handle, folio) == 7


@HUGE
def test_the_switch_counts_for_later_folios_only(page_size: int) -> None:
    memory = host(page_size)
    handle, folio = one_folio(memory, page_size)
    memory.update_vmemmap_optimization(enabled=False)
    assert memory.statistics().vmemmap.saved_pages == SAVED[page_size]

    assert memory.split(handle, folio) == SAVED[page_size]
    nr_pages = page_size // PAGE_SIZE
    assert memory.reconstruct(handle, folio, nr_pages) == (folio, 0)
    assert memory.split(handle, folio) == 0

    memory.update_vmemmap_optimization(enabled=True)
    assert memory.reconstruct(handle, folio, nr_pages) == (folio, SAVED[page_size])
    memory.check_frames()


def test_vmemmap_comes_from_the_folios_own_node() -> None:
    memory = HostMemory([3 * PAGES_PER_1G] * 2, [BootPool(SIZE_1G, 1, 1)])
    handle, folio = one_folio(memory, SIZE_1G)
    before = memory.statistics().nodes
    memory.split(handle, folio)
    after = memory.statistics().nodes
    assert after[0] == before[0]
    assert after[1].free_base_pages == before[1].free_base_pages - 4095
    assert after[1].nr_memmap_pages == before[1].nr_memmap_pages + 4095


def test_mem_total_grows_by_what_hvo_gives_and_never_shrinks() -> None:
    memory = HostMemory([3 * PAGES_PER_1G])
    total = memory.statistics().meminfo.mem_total_kb
    assert total == 3 * (1 << 20) * 63 // 64
    memory.update_pool(SIZE_1G, 1)
    grown = memory.statistics().meminfo.mem_total_kb
    assert grown == total + 4095 * 4
    handle, folio = one_folio(memory, SIZE_1G)
    memory.split(handle, folio)
    assert memory.statistics().meminfo.mem_total_kb == grown
