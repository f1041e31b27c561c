"""The filemap tiles an inode with folios; millions of entries are cheap."""

from __future__ import annotations

import tracemalloc

import pytest

from gmem.guest_memfd.core.filemap import Entry, Filemap
from gmem.guest_memfd.core.values import Folio
from gmem.uapi.pages import NodeId, Pfn, PgRange

NR_1G = 1 << 18


def folio(pfn: int, order: int = 0, node: int = 0) -> Folio:
    return Folio(Pfn(pfn), order, NodeId(node))


@pytest.mark.parametrize("order", [0, 9, 18])
def test_an_entry_comes_back_as_it_was(order: int) -> None:
    filemap = Filemap(4 << order, order)
    given = folio(0 << order, order, node=3)
    filemap.insert(1 << order, given)

    assert filemap.get(1 << order) == Entry(given, split=False, attached=False)
    assert filemap.get(0) is None
    assert filemap.is_present((2 << order) - 1)
    assert not filemap.is_present(2 << order)
    assert filemap.unattached(PgRange(0, 4 << order)) == [1 << order]
    filemap.set_attached(1 << order, attached=True)
    assert filemap.unattached(PgRange(0, 4 << order)) == []
    assert (filemap.nr_whole, filemap.nr_split) == (1, 0)
    filemap.check()

    assert filemap.remove(1 << order) == Entry(given, split=False, attached=True)

    assert (filemap.nr_whole, filemap.nr_split) == (0, 0)
    assert filemap.present(PgRange(0, 4 << order)) == []
    filemap.check()


def test_split_and_whole_are_counted() -> None:
    filemap = Filemap(4 * NR_1G, 18)
    filemap.insert(0, folio(NR_1G, 18))
    filemap.insert(NR_1G, folio(2 * NR_1G, 18))
    filemap.set_split(0, split=True)
    assert (filemap.nr_whole, filemap.nr_split) == (1, 1)
    filemap.check()

    filemap.set_split(0, split=False)
    assert (filemap.nr_whole, filemap.nr_split) == (2, 0)
    filemap.set_split(NR_1G, split=True)
    filemap.remove(NR_1G)
    assert (filemap.nr_whole, filemap.nr_split) == (1, 0)
    filemap.check()


def test_present_is_in_order_and_bounded() -> None:
    filemap = Filemap(1 << 20, 0)
    for index in (1 << 19, 3, 511, 512):
        filemap.insert(index, folio(index + 1))
    pages = PgRange(3, 1 << 20)
    assert filemap.present(pages) == [3, 511, 512, 1 << 19]
    assert filemap.present(pages, limit=2) == [3, 511]
    assert filemap.present(PgRange(4, 512)) == [511]
    assert filemap.present(PgRange(4, 4)) == []


def test_next_hole_is_the_first_and_bounded() -> None:
    filemap = Filemap(16, 0)
    filemap.insert(0, folio(1))
    filemap.insert(3, folio(2))
    assert filemap.next_hole(PgRange(0, 16), 99) == PgRange(1, 3)
    assert filemap.next_hole(PgRange(3, 16), 4) == PgRange(4, 8)
    assert filemap.next_hole(PgRange(3, 4), 4) == PgRange(4, 4)


def test_an_entry_is_nine_bytes() -> None:
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    filemap = Filemap(1 << 28, 0)
    for index in range(1 << 14):
        filemap.insert(index, folio(index))
    taken = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert taken < 10 << 14


def test_a_1_tib_inode_of_1g_folios_is_nothing() -> None:
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    filemap = Filemap(1 << 28, 18)
    for index in range(0, 1 << 28, NR_1G):
        filemap.insert(index, folio(index, 18))
    taken = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert filemap.nr_whole == 1024
    assert taken < 1 << 15


@pytest.mark.parametrize(
    "wrong",
    [
        lambda f: f.insert(0, folio(5, 9)),
        lambda f: f.insert(512, folio(5, 0)),
        lambda f: f.remove(512),
        lambda f: f.get(1),
        lambda f: f.set_split(0, split=False),
        lambda f: f.set_split(512, split=True),
        lambda f: f.set_attached(0, attached=False),
        lambda f: f.set_attached(512, attached=True),
    ],
    ids=["taken", "order", "hole", "unaligned", "whole", "absent", "twice", "none"],
)
def test_what_cannot_be_is_our_bug(wrong: object) -> None:
    filemap = Filemap(1024, 9)
    filemap.insert(0, folio(0, 9))
    with pytest.raises(AssertionError):
        wrong(filemap)  # type: ignore[operator]


def test_check_finds_a_frame_that_is_there_twice() -> None:
    filemap = Filemap(1024, 9)
    filemap.insert(0, folio(0, 9))
    filemap.insert(512, folio(0, 9))
    with pytest.raises(AssertionError):
        filemap.check()
