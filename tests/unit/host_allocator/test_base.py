"""4K folios from base memory: no promise, no parts, the same seven calls."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gmem.host_allocator.core.allocator import FOLIOS_PER_CALL_MAX
from gmem.host_allocator.core.host_memory import HostMemory
from gmem.host_allocator.core.values import Folio, MemPolicy, MemPolicyMode
from gmem.uapi.errors import Errno, Reason
from gmem.uapi.pages import PAGE_SIZE, NodeId, Pfn
from tests.unit.host_allocator.hosts import PAGES_PER_1G, refused, take_base_memory


@pytest.fixture
def memory() -> HostMemory:
    return HostMemory([640, 640])


def base_pages(memory: HostMemory) -> list[tuple[int, int]]:
    nodes = memory.statistics().nodes
    return [(n.free_base_pages, n.allocated_base_pages) for n in nodes]


def test_reserving_promises_nothing(memory: HostMemory) -> None:
    before = memory.statistics()
    memory.reserve(PAGE_SIZE, 1 << 63)
    assert memory.statistics() == before


def test_allocate_and_free_move_base_pages(memory: HostMemory) -> None:
    before = memory.statistics()
    handle = memory.reserve(PAGE_SIZE, 8)
    folios = memory.allocate(handle, nr_folios=8)
    assert folios == tuple(Folio(Pfn(pfn), 0, NodeId(0)) for pfn in range(8))
    assert base_pages(memory) == [(622, 8), (630, 0)]

    memory.free(handle, folios[2:3] + folios[5:])
    assert base_pages(memory) == [(626, 4), (630, 0)]
    assert memory.allocate(handle)[0].pfn == 2

    memory.free(handle, folios[:5])
    memory.unreserve(handle)
    assert memory.statistics() == before
    memory.check_frames()


def test_allocate_goes_on_to_the_next_node(memory: HostMemory) -> None:
    handle = memory.reserve(PAGE_SIZE, 1)
    folios = memory.allocate(handle, nr_folios=700)
    assert len(folios) == 700
    assert base_pages(memory) == [(0, 630), (560, 70)]
    # One call may return frames of both nodes, though the pfns are neighbours.
    memory.free(handle, folios)
    assert base_pages(memory) == [(630, 0), (630, 0)]


def test_bind_stays_on_its_node_until_it_is_empty(memory: HostMemory) -> None:
    bind = MemPolicy(MemPolicyMode.BIND, (1,))
    handle = memory.reserve(PAGE_SIZE, 1)
    assert len(memory.allocate(handle, bind, nr_folios=1000)) == 630
    with refused(memory, Reason.BASE_MEMORY_EMPTY) as caught:
        memory.allocate(handle, bind)
    assert caught.value.errno == Errno.ENOMEM
    assert "nodes [1]" in caught.value.sentence


def test_one_call_returns_a_bounded_number() -> None:
    memory = HostMemory([PAGES_PER_1G])
    handle = memory.reserve(PAGE_SIZE, 1)
    folios = memory.allocate(handle, nr_folios=(1 << 32) - 1)
    assert len(folios) == FOLIOS_PER_CALL_MAX


def test_a_closed_claim_goes_with_its_last_folio(memory: HostMemory) -> None:
    handle, folios = take_base_memory(memory, leave=1250)
    memory.unreserve(handle)
    (claim,) = memory.reservations()
    assert (claim.closing, claim.used_hpages, claim.rsv_hpages) == (True, 10, 0)
    with refused(memory, Reason.HANDLE_UNKNOWN):
        memory.allocate(handle)
    memory.free(handle, folios[:9])
    memory.free(handle, folios[9:])
    assert memory.reservations() == ()


def test_4k_folios_have_no_parts(memory: HostMemory) -> None:
    handle = memory.reserve(PAGE_SIZE, 1)
    (folio,) = memory.allocate(handle)
    with refused(memory, Reason.TARGET_UNSUPPORTED) as caught:
        memory.split(handle, folio)
    assert caught.value.errno == Errno.EOPNOTSUPP
    with refused(memory, Reason.TARGET_UNSUPPORTED):
        memory.reconstruct(handle, folio, 512)


def test_what_is_not_the_claims_is_unknown(memory: HostMemory) -> None:
    handle = memory.reserve(PAGE_SIZE, 2)
    other = memory.reserve(PAGE_SIZE, 2)
    (folio,) = memory.allocate(handle)
    (others,) = memory.allocate(other)
    strangers = [
        others,
        replace(folio, order=9),
        replace(folio, node=NodeId(1)),
        replace(folio, node=NodeId(2)),
        replace(folio, node=NodeId(-1)),
        replace(folio, pfn=Pfn(1 << 60)),
    ]
    for stranger in strangers:
        with refused(memory, Reason.FOLIO_UNKNOWN):
            memory.free(handle, [folio, stranger])
        with refused(memory, Reason.FOLIO_UNKNOWN):
            memory.error(handle, stranger)
    with refused(memory, Reason.FOLIO_UNKNOWN) as caught:
        memory.free(handle, [folio, folio])
    assert "use what allocate returned" in caught.value.sentence


def test_a_poisoned_frame_is_withheld(memory: HostMemory) -> None:
    handle = memory.reserve(PAGE_SIZE, 3)
    folios = memory.allocate(handle, nr_folios=3)
    memory.error(handle, folios[1])
    assert memory.statistics().meminfo.hardware_corrupted_kb == 4
    memory.free(handle, folios)
    assert base_pages(memory) == [(629, 0), (630, 0)]
    assert [f.pfn for f in memory.allocate(handle, nr_folios=3)] == [0, 2, 3]
    memory.check_frames()


def test_bad_sizes_and_nodes_are_refused(memory: HostMemory) -> None:
    with refused(memory, Reason.SIZE_INVALID):
        memory.reserve(PAGE_SIZE, 0)
    with refused(memory, Reason.NODE_UNKNOWN):
        memory.reserve(PAGE_SIZE, 1, node=2)
    for page_size in (0, -1, 8192, 1 << 63):
        with refused(memory, Reason.PAGE_SIZE_UNKNOWN) as caught:
            memory.reserve(page_size, 1)
        assert f"pages of {page_size} bytes" in caught.value.sentence
    handle = memory.reserve(PAGE_SIZE, 1)
    with refused(memory, Reason.PAGE_SIZE_UNKNOWN):
        memory.allocate(handle, page_size=1 << 21)
