"""A frame with a memory error: whose it is, where it goes, and the way back."""

from __future__ import annotations

import pytest

from gmem.host_allocator.core.host_memory import HostMemory
from gmem.host_allocator.core.rows import HostRows, restore
from gmem.host_allocator.core.values import BootPool, Folio
from gmem.uapi.errors import Errno, Poisoned, Reason
from gmem.uapi.flags import PageFlag
from gmem.uapi.pages import PAGE_SIZE, SIZE_1G, SIZE_2M, Pfn
from tests.support.rows import apply
from tests.unit.host_allocator.hosts import (
    HUGE,
    LITTLE,
    PAGES_PER_1G,
    one_folio,
    refused,
    take_base_memory,
)


def host() -> HostMemory:
    pools = [BootPool(SIZE_1G, 1), BootPool(SIZE_2M, 4)]
    return HostMemory([PAGES_PER_1G + LITTLE], pools)


def corrupted_kb(memory: HostMemory) -> int:
    return memory.statistics().meminfo.hardware_corrupted_kb


def poisoned_flags(memory: HostMemory) -> dict[int, int]:
    counts = {count.flags: count.nr_pages for count in memory.page_flags()}
    return {word: nr for word, nr in counts.items() if word & PageFlag.HWPOISON}


@HUGE
def test_an_error_in_a_huge_folio_is_its_owners(page_size: int) -> None:
    memory = host()
    handle, folio = one_folio(memory, page_size)
    bad = Pfn(folio.pfn + 5)
    frame = memory.inject(bad)
    assert (frame.pfn, frame.nr_pages, frame.handle) == (bad, 1, handle)
    assert memory.poisoned_frames() == (frame,)
    assert corrupted_kb(memory) == 4
    tail = PageFlag.HUGE | PageFlag.COMPOUND_TAIL | PageFlag.HWPOISON
    assert poisoned_flags(memory) == {tail: 1}
    memory.check_frames()


@HUGE
def test_a_freed_folio_is_taken_apart_around_its_bad_frames(page_size: int) -> None:
    memory = host()
    before = memory.statistics()
    handle, folio = one_folio(memory, page_size)
    for at in (0, 7):
        memory.inject(folio.pfn + at)
    memory.free(handle, [folio])
    pool = memory.statistics().pool(page_size)
    assert pool.nr_huge_pages == before.pool(page_size).nr_huge_pages - 1
    assert pool.resv_huge_pages == 1
    assert [frame.handle for frame in memory.poisoned_frames()] == [0, 0]
    (node,), (was,) = memory.statistics().nodes, before.nodes
    saved = page_size // PAGE_SIZE // 64 - 1
    freed = page_size // PAGE_SIZE - 2 - saved
    assert node.free_base_pages == was.free_base_pages + freed
    assert poisoned_flags(memory) == {PageFlag.HWPOISON: 2}
    memory.check_frames()


@HUGE
def test_a_folio_without_vmemmap_pages_is_withheld_as_a_whole(page_size: int) -> None:
    memory = host()
    handle, folio = one_folio(memory, page_size)
    for at in (3, 7):
        memory.inject(folio.pfn + at)
    hog, folios = take_base_memory(memory)
    memory.free(handle, [folio])
    assert memory.nodes[0].withheld.runs() == [folio.frames]
    memory.free(hog, folios)

    # The first one gives back what was lost with it, but for the other bad one.
    assert memory.unpoison(folio.pfn + 3).nr_pages == page_size // PAGE_SIZE
    assert len(memory.nodes[0].withheld) == 1
    memory.unpoison(folio.pfn + 7)
    assert len(memory.nodes[0].withheld) == 0
    assert corrupted_kb(memory) == 0
    memory.check_frames()


@HUGE
def test_unpoisoning_leads_back_while_the_folio_is_in_use(page_size: int) -> None:
    memory = host()
    before = memory.statistics().levels()
    handle, folio = one_folio(memory, page_size)
    memory.inject(folio.pfn)
    memory.split(handle, folio)
    memory.inject(folio.pfn + 1)
    memory.unpoison(folio.pfn)
    memory.reconstruct(handle, folio, page_size // PAGE_SIZE)
    memory.unpoison(folio.pfn + 1)
    memory.free(handle, [folio])
    memory.unreserve(handle)
    assert memory.statistics().levels() == before


@HUGE
def test_a_folio_is_healthy_when_none_of_its_errors_is_left(page_size: int) -> None:
    memory = HostMemory([PAGES_PER_1G + LITTLE], [BootPool(page_size, 1)])
    handle, folio = one_folio(memory, page_size)
    memory.split(handle, folio)
    # Frame 0 is among them.
    errors = [Pfn(folio.pfn + at) for at in (0, 3, 9)]
    assert errors[0] == 0
    for pfn in errors:
        memory.inject(pfn)
    for left in (2, 1, 0):
        memory.unpoison(errors[left])
        assert [frame.pfn for frame in memory.poisoned_frames()] == errors[:left]
    memory.reconstruct(handle, folio, 1 << folio.order)
    memory.free(handle, [folio])
    assert memory.statistics().pool(page_size).free_huge_pages == 1
    memory.check_frames()


def test_an_error_in_a_4k_folio_withholds_it_when_it_is_freed() -> None:
    memory = host()
    before = memory.statistics()
    handle = memory.reserve(PAGE_SIZE, 2)
    folios = memory.allocate(handle, nr_folios=2)
    assert memory.inject(folios[1].pfn).handle == handle
    memory.free(handle, folios)
    assert memory.poisoned_frames()[0].handle == 0
    assert memory.nodes[0].withheld.runs() == [folios[1].frames]
    memory.unpoison(folios[1].pfn)
    memory.unreserve(handle)
    assert memory.statistics() == before


def test_a_free_base_page_is_withheld_at_once() -> None:
    memory = host()
    lowest = memory.nodes[0].base.runs()[0].start
    assert memory.inject(lowest).handle == 0
    handle = memory.reserve(PAGE_SIZE, 1)
    (folio,) = memory.allocate(handle)
    assert folio.pfn == lowest + 1


def test_an_error_is_given_once() -> None:
    memory = host()
    _, folio = one_folio(memory, SIZE_2M)
    memory.inject(folio.pfn)
    with refused(memory, Reason.PAGE_POISONED) as caught:
        memory.inject(folio.pfn)
    assert caught.value.errno == Errno.EHWPOISON
    assert isinstance(caught.value, Poisoned)


@pytest.mark.parametrize("pfn", [-1, 1 << 40])
def test_a_frame_of_no_node_is_unknown(pfn: int) -> None:
    memory = host()
    with refused(memory, Reason.FRAME_UNKNOWN):
        memory.inject(pfn)
    with refused(memory, Reason.FRAME_UNKNOWN):
        memory.unpoison(pfn)


def test_a_healthy_frame_cannot_be_unpoisoned() -> None:
    memory = host()
    with refused(memory, Reason.FRAME_UNKNOWN) as caught:
        memory.unpoison(1)
    assert "ListMemoryErrors" in caught.value.sentence


def test_free_huge_pages_and_the_memmap_take_no_error() -> None:
    memory = host()
    free = memory.hugetlb[SIZE_1G].hstate.free_runs()[0].start
    for pfn in (free, memory.nodes[0].memmap.runs()[-1].stop - 1):
        with refused(memory, Reason.STATE_WRONG):
            memory.inject(pfn)


@HUGE
def test_errors_survive_in_the_rows(page_size: int) -> None:
    memory = host()
    teller = HostRows(memory)
    rows = apply({}, teller.changes())
    handle, folio = one_folio(memory, page_size)
    memory.error(handle, folio)
    for at in (4, 9):
        memory.inject(folio.pfn + at)
    apply(rows, teller.changes())
    memory.unpoison(folio.pfn + 4)
    apply(rows, teller.changes())
    again = restore(rows)
    assert again.poisoned_frames() == memory.poisoned_frames()
    assert [frame.nr_pages for frame in again.poisoned_frames()] == [
        page_size // PAGE_SIZE,
        1,
    ]
    again.free(handle, [folio])
    assert again.nodes[0].withheld.runs() == [folio.frames]


def test_a_page_of_a_whole_folio_is_named_by_its_frame_only() -> None:
    memory = host()
    handle, folio = one_folio(memory, SIZE_2M)
    with refused(memory, Reason.FOLIO_UNKNOWN):
        memory.error(handle, Folio(Pfn(folio.pfn + 5), 0, folio.node))
    memory.inject(folio.pfn + 5)
