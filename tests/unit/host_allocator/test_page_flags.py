"""The words of /proc/kpageflags: every frame is counted under exactly one."""

from __future__ import annotations

from gmem.host_allocator.core.host_memory import HostMemory
from gmem.host_allocator.core.values import BootPool, Folio
from gmem.uapi.flags import PageFlag as Flag
from gmem.uapi.pages import PAGE_SIZE, SIZE_2M, Pfn
from tests.unit.host_allocator.hosts import one_folio

HEAD, TAIL = Flag.HUGE | Flag.COMPOUND_HEAD, Flag.HUGE | Flag.COMPOUND_TAIL
IN_A_FILE = Flag.LRU | Flag.UNEVICTABLE
NR_PAGES = 8192


def host() -> HostMemory:
    return HostMemory([NR_PAGES], [BootPool(SIZE_2M, 4)])


def counts(memory: HostMemory) -> dict[int, int]:
    found = {count.flags: count.nr_pages for count in memory.page_flags()}
    assert sum(found.values()) == NR_PAGES
    assert list(found) == sorted(found)
    return found


def test_a_host_at_boot() -> None:
    memory = host()
    (node,) = memory.statistics().nodes
    assert counts(memory) == {
        Flag.BUDDY: node.free_base_pages,
        HEAD: 4,
        TAIL: 4 * 511,
        Flag.RESERVED: 128 - 4 * 7,
    }
    assert node.managed_pages == NR_PAGES - (128 - 4 * 7)


def test_a_split_folio_is_512_pages_of_a_file() -> None:
    memory = host()
    handle, folio = one_folio(memory, SIZE_2M)
    before = counts(memory)
    assert before[HEAD] == 4
    memory.split(handle, folio)
    after = counts(memory)
    assert (after[HEAD], after[IN_A_FILE]) == (3, 512)
    # The vmemmap pages that the split took back are ordinary pages of the kernel.
    assert after[0] == 7


def test_4k_folios_are_pages_of_a_file() -> None:
    memory = host()
    handle = memory.reserve(PAGE_SIZE, 3)
    memory.allocate(handle, nr_folios=3)
    assert counts(memory)[IN_A_FILE] == 3


def test_a_memory_error_marks_its_frame_until_the_folio_is_withheld() -> None:
    memory = host()
    handle, folio = one_folio(memory, SIZE_2M)
    memory.split(handle, folio)
    memory.error(handle, Folio(Pfn(folio.pfn + 5), 0, folio.node))
    assert counts(memory)[IN_A_FILE | Flag.HWPOISON] == 1
    memory.reconstruct(handle, folio, 512)
    assert counts(memory)[TAIL | Flag.HWPOISON] == 1
    memory.error(handle, folio)
    assert counts(memory)[HEAD | Flag.HWPOISON] == 1
    memory.free(handle, [folio])
    assert counts(memory)[Flag.HWPOISON] == 512
    assert HEAD | Flag.HWPOISON not in counts(memory)


def test_a_poisoned_4k_folio() -> None:
    memory = host()
    handle = memory.reserve(PAGE_SIZE, 1)
    (folio,) = memory.allocate(handle)
    memory.error(handle, folio)
    assert counts(memory)[IN_A_FILE | Flag.HWPOISON] == 1
    memory.free(handle, [folio])
    assert counts(memory)[Flag.HWPOISON] == 1
