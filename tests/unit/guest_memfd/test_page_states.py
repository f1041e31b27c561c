from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from gmem.guest_memfd.core.values import PageState, ViewKind
from gmem.guest_memfd.page_states import InodeTable
from gmem.uapi.errors import KernelError, Reason

PAGE = 4096
MIB2, GIB = 1 << 21, 1 << 30
HOST, GUEST = ViewKind.HOST, ViewKind.GUEST


@pytest.fixture
def table() -> Iterator[InodeTable]:
    made = InodeTable.create(5, 3 * MIB2, MIB2)
    yield made
    made.close()


def test_a_new_table_is_closed_full_of_holes_and_costs_nothing() -> None:
    table = InodeTable.create(1, 1 << 40, GIB)
    assert table.nr_pages == 1 << 28
    assert table.nr_units == 1024
    assert table.state_of(HOST, 12345) is PageState.CLOSED
    assert table.pfn_of(12345) is None
    assert os.fstat(table.fd).st_blocks * 512 < 64 * PAGE
    table.close()


@pytest.mark.parametrize("size", [0, -PAGE, PAGE + 1])
def test_a_size_that_is_no_whole_pages_is_refused(size: int) -> None:
    with pytest.raises(KernelError) as caught:
        InodeTable.create(1, size, PAGE)
    assert caught.value.reason is Reason.SIZE_INVALID


def test_frames_are_found_inside_the_unit(table: InodeTable) -> None:
    table.attach(512, 0)
    table.attach(0, 2048)
    assert table.pfn_of(512) == 0
    assert table.pfn_of(512 + 17) == 17
    assert table.pfn_of(511) == 2048 + 511
    assert table.pfn_of(1024) is None
    assert table.allocated_bytes == 2 * MIB2
    table.check()
    assert table.detach(512) == 0
    assert table.pfn_of(512) is None
    assert table.allocated_bytes == MIB2


@pytest.mark.parametrize("index", [1, 511, 3 * 512])
def test_a_folio_is_attached_at_its_own_alignment_and_inside(
    table: InodeTable, index: int
) -> None:
    with pytest.raises(AssertionError):
        table.attach(index, 0)


def test_attaching_twice_and_detaching_a_hole_are_our_bugs(table: InodeTable) -> None:
    table.attach(0, 0)
    with pytest.raises(AssertionError):
        table.attach(0, 512)
    with pytest.raises(AssertionError):
        table.detach(512)
    table.check()


def test_runs_are_maximal_and_views_do_not_mix(table: InodeTable) -> None:
    table.set_host(3, 7, PageState.OPEN)
    table.set_host(9, 10, PageState.OPEN)
    table.set_guest(4, 5, PageState.OPEN)
    assert table.runs_of(HOST, 0, 1536, PageState.OPEN) == [(3, 7), (9, 10)]
    assert table.runs_of(HOST, 4, 6, PageState.OPEN) == [(4, 6)]
    assert table.runs_of(GUEST, 0, 1536, PageState.OPEN) == [(4, 5)]
    assert table.runs_of(HOST, 7, 9, PageState.OPEN) == []


def test_attached_runs_are_cut_to_the_range(table: InodeTable) -> None:
    table.attach(0, 0)
    table.attach(1024, 512)
    assert table.attached_in(0, 1536) == [(0, 512), (1024, 1536)]
    assert table.attached_in(100, 1100) == [(100, 512), (1024, 1100)]
    assert table.attached_in(512, 1024) == []


def test_another_process_reads_the_same_table(table: InodeTable) -> None:
    table.attach(512, 7 << 9)
    table.set_guest(0, 3, PageState.OPEN)
    table.set_uptodate(2, 4)
    other = InodeTable(os.dup(table.fd))
    assert (other.ino, other.i_size, other.page_size) == (5, 3 * MIB2, MIB2)
    assert other.pfn_of(513) == (7 << 9) + 1
    assert other.allocated_bytes == MIB2
    assert other.runs_of(GUEST, 0, 1536, PageState.OPEN) == [(0, 3)]
    assert other.uptodate[:5].tolist() == [0, 0, 1, 1, 0]
    table.clear_uptodate(2, 3)
    assert other.uptodate[:5].tolist() == [0, 0, 0, 1, 0]
    other.close()


def test_a_file_that_is_no_table_is_refused() -> None:
    fd = os.memfd_create("other")
    os.ftruncate(fd, PAGE)
    with pytest.raises(KernelError) as caught:
        InodeTable(fd)
    assert caught.value.reason is Reason.DESCRIPTOR_TYPE
    os.close(fd)
