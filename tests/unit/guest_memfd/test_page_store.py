from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from gmem.guest_memfd.page_store import PageStore
from gmem.uapi.errors import KernelError, Reason

PAGE = 4096
TIB_PAGES = 1 << 28


@pytest.fixture
def store() -> Iterator[PageStore]:
    made = PageStore.create(TIB_PAGES)
    yield made
    made.close()


def test_a_terabyte_costs_what_is_written(store: PageStore) -> None:
    store.window(TIB_PAGES - 1, 1)[0] = 1
    store.array(7, 2)[:] = 9
    assert store.resident_pages() == 3
    assert store.array(7, 2).shape == (2 * PAGE,)


def test_zero_keeps_the_memory_and_punch_gives_it_back(store: PageStore) -> None:
    store.array(0, 4).fill(5)
    store.zero(0, 2)
    assert store.resident_pages() == 4
    store.punch(2, 2)
    assert store.resident_pages() == 2
    assert not store.array(0, 4).any()


def test_a_successor_maps_the_same_bytes(store: PageStore) -> None:
    store.window(3, 1)[:5] = b"bytes"
    other = PageStore.from_fd(os.dup(store.fd), TIB_PAGES)
    assert bytes(other.window(3, 1)[:5]) == b"bytes"
    other.close()


def test_a_store_shorter_than_promised_is_refused(store: PageStore) -> None:
    with pytest.raises(KernelError) as caught:
        PageStore.from_fd(store.fd, TIB_PAGES + 1)
    assert caught.value.reason is Reason.SIZE_INVALID
    assert caught.value.numbers["available"] == TIB_PAGES


def test_nobody_can_cut_pages_off(store: PageStore) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(store.fd, PAGE)


def test_copy_in_reads_a_foreign_file_from_an_offset(store: PageStore) -> None:
    source = os.memfd_create("source")
    os.write(source, b"x" * PAGE + b"y" * (PAGE + 3))
    store.copy_in(10, source, PAGE, PAGE + 3)
    assert bytes(store.window(10, 2)) == b"y" * (PAGE + 3) + bytes(PAGE - 3)
    with pytest.raises(KernelError) as caught:
        store.copy_in(10, source, PAGE, 2 * PAGE)
    assert caught.value.reason is Reason.RANGE_PAST_END
    assert caught.value.numbers["error_offset"] == 2 * PAGE + 3
    os.close(source)


@pytest.mark.parametrize(
    ("pfn", "nr_pages"), [(-1, 1), (TIB_PAGES, 1), (TIB_PAGES - 1, 2)]
)
def test_frames_outside_the_host_are_our_bug(
    store: PageStore, pfn: int, nr_pages: int
) -> None:
    with pytest.raises(AssertionError):
        store.window(pfn, nr_pages)
