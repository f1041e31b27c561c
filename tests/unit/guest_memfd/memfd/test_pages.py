"""Where the bytes of a page are, when they move, and what is never moved along."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from gmem.guest_memfd.core.values import PageState, ViewKind
from gmem.guest_memfd.memfd.pages import MemfdPages, make_files
from gmem.guest_memfd.page_states import InodeTable
from gmem.uapi.errors import BadRequest, Reason
from gmem.uapi.pages import PAGE_SIZE, PgRange

PAGE = PAGE_SIZE
HUGE = 1 << 9
HOST, GUEST = ViewKind.HOST, ViewKind.GUEST


def make_table(page_size: int = PAGE, nr_pages: int = 16) -> InodeTable:
    size = nr_pages * PAGE
    return InodeTable.create(7, size, page_size, make_files(7, size))


@pytest.fixture
def table() -> Iterator[InodeTable]:
    made = make_table()
    for page in range(16):
        made.attach(page, page)
    yield made
    made.close()


@pytest.fixture
def pages(table: InodeTable) -> MemfdPages:
    return MemfdPages(table, host_mmap=True)


def put(pages: MemfdPages, view: ViewKind, page: int, value: int) -> None:
    os.pwrite(pages.fd(view), bytes([value]) * PAGE, page * PAGE)


def got(pages: MemfdPages, view: ViewKind, page: int) -> int:
    data = os.pread(pages.fd(view), PAGE, page * PAGE)
    assert data == data[:1] * PAGE, "the page is torn"
    return data[0]


def show(pages: MemfdPages, view: ViewKind, start: int, stop: int) -> None:
    other = GUEST if view is HOST else HOST
    pages.table.set_state(other, start, stop, PageState.CLOSED)
    pages.bring(view, start, stop)
    pages.table.set_state(view, start, stop, PageState.OPEN)


def test_a_page_moves_with_its_content_and_leaves_nothing_behind(
    pages: MemfdPages,
) -> None:
    show(pages, HOST, 0, 16)
    put(pages, HOST, 3, 9)
    show(pages, GUEST, 0, 8)
    assert (got(pages, HOST, 3), got(pages, GUEST, 3)) == (0, 9)
    assert not pages.has_data(HOST, 0, 8)
    # Only what had memory takes memory.
    assert os.fstat(pages.fd(GUEST)).st_blocks * 512 == PAGE
    show(pages, HOST, 3, 4)
    assert (got(pages, HOST, 3), got(pages, GUEST, 3)) == (9, 0)


@pytest.mark.parametrize("view", list(ViewKind), ids=["to the host", "to the guest"])
def test_what_was_stored_where_it_does_not_count_is_never_seen(
    pages: MemfdPages, view: ViewKind
) -> None:
    other = GUEST if view is HOST else HOST
    show(pages, other, 0, 16)
    put(pages, view, 0, 0x66)
    put(pages, view, 1, 0x66)
    put(pages, other, 1, 5)
    show(pages, view, 0, 16)
    assert [got(pages, view, page) for page in (0, 1)] == [0, 5]


def test_forgotten_pages_come_back_as_zeros_whatever_was_stored_since(
    pages: MemfdPages,
) -> None:
    show(pages, HOST, 0, 16)
    put(pages, HOST, 0, 1)
    pages.table.set_state(HOST, 0, 16, PageState.CLOSED)
    pages.forget(0, 16)
    assert got(pages, HOST, 0) == 0
    put(pages, HOST, 0, 2)
    show(pages, GUEST, 0, 16)
    assert (got(pages, GUEST, 0), got(pages, HOST, 0)) == (0, 0)


def test_what_an_open_page_was_given_before_its_folio_stays(pages: MemfdPages) -> None:
    show(pages, HOST, 0, 8)
    show(pages, GUEST, 8, 16)
    put(pages, HOST, 7, 1)
    put(pages, GUEST, 8, 2)
    pages.forget(0, 16)
    assert (got(pages, HOST, 7), got(pages, GUEST, 8)) == (1, 0)
    show(pages, GUEST, 7, 8)
    assert got(pages, GUEST, 7) == 1


def test_what_the_host_filled_counts_as_filled_for_the_guest(
    pages: MemfdPages,
) -> None:
    show(pages, HOST, 0, 16)
    put(pages, HOST, 2, 1)
    show(pages, GUEST, 0, 16)
    assert pages.table.uptodate[:4].tolist() == [0, 0, 1, 0]


def test_content_of_a_folio_that_is_not_attached_is_not_shown_to_the_host() -> None:
    """The next fault splits it, and zeroes it: RFC_V1, a default set by bind."""
    table = make_table(page_size=HUGE * PAGE, nr_pages=HUGE)
    pages = MemfdPages(table, host_mmap=True)
    show(pages, GUEST, 0, HUGE)
    put(pages, GUEST, 5, 9)
    show(pages, HOST, 0, HUGE)
    assert (got(pages, HOST, 5), got(pages, GUEST, 5)) == (0, 0)
    table.close()


def test_touched_holes_are_found_in_whole_units_of_open_pages() -> None:
    table = make_table(page_size=HUGE * PAGE, nr_pages=4 * HUGE)
    pages = MemfdPages(table, host_mmap=True)
    show(pages, HOST, 0, 3 * HUGE)
    table.attach(HUGE, 0)
    for page in (3, HUGE + 1, 3 * HUGE + 1):
        put(pages, HOST, page, 1)
    # The second has a folio, the last is private.
    assert pages.touched() == [PgRange(0, HUGE)]
    put(pages, HOST, 2 * HUGE, 1)
    assert pages.touched() == [PgRange(0, HUGE), PgRange(2 * HUGE, 3 * HUGE)]
    table.close()


@pytest.mark.parametrize("after", ["the copy", "the note of the place"])
def test_a_move_that_was_cut_off_is_finished_by_the_next_service(
    pages: MemfdPages, after: str
) -> None:
    table = pages.table
    show(pages, HOST, 0, 16)
    put(pages, HOST, 4, 8)
    put(pages, HOST, 5, 0)
    # As a kill leaves it; the journal says private, so its states are set first.
    table.set_state(HOST, 4, 5, PageState.CLOSED)
    table.set_state(GUEST, 4, 5, PageState.OPEN)
    put(pages, GUEST, 4, 8)
    if after == "the note of the place":
        table.place[4] = 2
    successor = MemfdPages(table, host_mmap=True)
    successor.settle()
    assert (got(successor, GUEST, 4), got(successor, HOST, 4)) == (8, 0)
    assert not successor.has_data(HOST, 4, 5)


def test_filling_from_a_file_that_ends_early_leaves_nothing(pages: MemfdPages) -> None:
    show(pages, GUEST, 0, 16)
    source = os.memfd_create("short")
    os.pwrite(source, b"x" * (PAGE + 7), 0)
    pages.fill(PgRange(0, 1), source, 0)
    assert got(pages, GUEST, 0) == ord("x")
    with pytest.raises(BadRequest) as refused:
        pages.fill(PgRange(1, 3), source, 0)
    assert refused.value.reason is Reason.RANGE_PAST_END
    assert not pages.has_data(GUEST, 1, 3)
    os.close(source)


def test_nobody_moves_the_end_of_the_files(pages: MemfdPages) -> None:
    for view in ViewKind:
        for size in (PAGE, 32 * PAGE):
            with pytest.raises(PermissionError):
                os.ftruncate(pages.fd(view), size)
