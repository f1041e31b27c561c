"""What the allocator says of memory errors, and what the inodes make of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gmem.guest_memfd.core import effects as fx
from gmem.guest_memfd.core.error_calls import Difference
from gmem.guest_memfd.core.inode import Inode
from gmem.guest_memfd.core.poison import believe_errors
from gmem.guest_memfd.core.values import Sigbus
from gmem.uapi.errors import Exhausted, Reason
from gmem.uapi.pages import PAGE_SIZE, SIZE_1G, SIZE_2M, PgRange
from tests.support.gmem_world import EIO, VM, GmemWorld
from tests.unit.guest_memfd.core.test_memory_failure import (
    BAD,
    HOST,
    LINEAGES,
    PUNCH,
    SIZES,
    Maker,
    inject,
)


def said(world: GmemWorld) -> dict[int, dict[int, int]]:
    found: dict[int, dict[int, int]] = {}
    for frame in world.memory.poisoned_frames():
        found.setdefault(frame.handle, {})[frame.pfn] = frame.nr_pages
    return found


def hear(world: GmemWorld) -> set[int]:
    numbers, strays = world.core.differing(said(world))
    for number in numbers:
        assert world.run(world.core.compare_errors(number)) != []
    assert world.core.differing(said(world)) == ([], strays)
    return strays


def frame_of(inode: Inode, pgoff: int) -> int:
    index = inode.unit_of(pgoff).start
    entry = inode.filemap.get(index)
    assert entry is not None
    return entry.folio.pfn + pgoff - index


def bound_anew(
    world: GmemWorld, meanwhile: Callable[[Inode], object] = lambda _: None
) -> Inode:
    """Bind a file that has a private folio anew, as shared; `meanwhile` it is unbound.

    The whole folio is detached: the next fault splits it.
    """
    inode = world.bound(SIZE_2M, SIZE_2M, shared=False)
    world.run(world.get_pfn(inode, 0))
    world.run(world.core.unbind(inode.number, VM, 0))
    meanwhile(inode)
    world.run(world.bind(inode, shared=True))
    return inode


@LINEAGES
@SIZES
def test_what_the_allocator_says_is_believed_both_ways(
    maker: Callable[[GmemWorld], Maker], page_size: int
) -> None:
    world = GmemWorld()
    inode = maker(world)(max(page_size, 16 * PAGE_SIZE), page_size)
    world.write(inode, HOST, BAD, "bytes")
    pfn = frame_of(inode, BAD)
    world.memory.inject(pfn)
    assert hear(world) == set()
    assert world.read(inode, HOST, BAD) == EIO
    world.check()
    world.memory.unpoison(pfn)
    hear(world)
    assert world.read(inode, HOST, BAD) == "bytes"
    world.check()


@pytest.mark.parametrize("page_size", [SIZE_2M, SIZE_1G], ids=["2M", "1G"])
def test_an_error_somewhere_in_a_folio_takes_every_page_split_or_not(
    page_size: int,
) -> None:
    world = GmemWorld()
    inode = world.bound(page_size, page_size)
    world.run(world.fault(inode, 0))
    world.memory.hugetlb[page_size].hwpoison[frame_of(inode, 0)] = (
        page_size // PAGE_SIZE
    )
    hear(world)
    assert inode.statistics().poisoned_pages == page_size // PAGE_SIZE
    assert world.read(inode, HOST, 77) == EIO


def test_a_folio_on_its_way_to_an_inode_is_a_stray() -> None:
    world = GmemWorld()
    inode = world.bound(SIZE_2M, SIZE_2M)
    fault = world.task(world.fault(inode, 0))
    fault.run_until(fx.Allocate)
    folios = world.perform(fault.effect)  # type: ignore[arg-type]
    world.memory.inject(folios[0].pfn + 3)
    assert hear(world) == {folios[0].pfn + 3}
    fault._resume(folios)
    fault.finish()
    assert hear(world) == set()
    assert world.read(inode, HOST, 3) == EIO


@LINEAGES
def test_an_unattached_folio_is_attached_first(
    maker: Callable[[GmemWorld], Maker],
) -> None:
    world = GmemWorld()
    inode = maker(world)(SIZE_2M, SIZE_2M)
    fault = world.task(world.fault(inode, 0))
    fault.run_until(fx.Split)
    world.memory.inject(frame_of(inode, 3))
    heard = world.task(world.core.compare_errors(inode.number))
    heard.run_until_blocked()
    fault.finish()
    heard.finish()
    assert world.read(inode, HOST, 3) == EIO
    world.check()


def test_a_poisoned_folio_that_cannot_be_split_leaves_a_hole_that_is_shown() -> None:
    world = GmemWorld()
    inode = bound_anew(world, lambda inode: inject(world, inode, BAD))
    world.fail_next(fx.Split, Reason.VMEMMAP_RESTORE_FAILED)
    assert world.run(world.fault(inode, BAD)) == Sigbus(Reason.PAGE_POISONED)
    with pytest.raises(OSError, match="injected"):
        world.run(world.get_pfn(inode, 0))
    assert inode.statistics().poisoned_pages == 0
    assert world.read(inode, HOST, BAD) == 0
    world.check()


def test_a_lost_folio_that_a_bind_makes_shared_loses_the_bad_page_alone() -> None:
    world = GmemWorld()

    def lose(inode: Inode) -> None:
        inject(world, inode, BAD)
        assert world.read(inode, HOST, 0) == EIO

    inode = bound_anew(world, lose)
    assert world.read(inode, HOST, 0) == 0
    assert world.read(inode, HOST, BAD) == EIO
    assert inode.statistics().split_folios == 1
    world.check()


def test_an_inode_that_is_gone_is_passed_over() -> None:
    world = GmemWorld()
    inode = world.bound(SIZE_2M, SIZE_2M)
    world.run(world.fault(inode, 0))
    world.memory.inject(frame_of(inode, 3))
    assert world.core.differing(said(world)) == ([inode.number], set())
    world.run(world.core.close(inode.number))
    assert world.run(world.core.compare_errors(inode.number)) == []


def test_a_poisoned_folio_that_cannot_be_split_is_given_back_when_it_is_heard_of() -> (
    None
):
    world = GmemWorld()
    inode = bound_anew(world)
    world.memory.inject(frame_of(inode, 3))
    world.fail_next(fx.Split, Reason.VMEMMAP_RESTORE_FAILED)
    assert hear(world) == set()
    assert inode.statistics().whole_folios == 0
    assert [frame.handle for frame in world.memory.poisoned_frames()] == [0]
    world.check()


def test_what_was_heard_before_is_nothing_new() -> None:
    world = GmemWorld()
    inode = world.bound(SIZE_2M, SIZE_2M)
    world.run(world.fault(inode, 0))
    world.memory.inject(frame_of(inode, 3))
    bad = Difference(PgRange(3, 4), bad=True)
    assert world.run(world.core.compare_errors(inode.number)) == [bad]
    world.log.clear()
    assert world.run(world.core.compare_errors(inode.number)) == []
    assert not world.asked(fx.InvalidateView)


@SIZES
@LINEAGES
def test_a_page_that_was_punched_since_is_not_lost(
    maker: Callable[[GmemWorld], Maker], page_size: int
) -> None:
    world = GmemWorld()
    inode = maker(world)(max(page_size, 16 * PAGE_SIZE), page_size)
    world.run(world.fault(inode, BAD))
    world.memory.inject(frame_of(inode, BAD))
    assert world.core.differing(said(world)) == ([inode.number], set())
    world.run(world.core.fallocate(inode.number, PUNCH, 0, inode.i_size))
    world.run(world.fault(inode, BAD))
    assert world.run(world.core.compare_errors(inode.number)) == []
    assert world.read(inode, HOST, BAD) == 0
    world.check()


def test_another_folio_that_came_meanwhile_is_not_lost() -> None:
    world = GmemWorld()
    inode = bound_anew(world)
    world.memory.inject(frame_of(inode, 3))
    guest = world.task(world.get_pfn(inode, 0))
    guest.run_until(fx.Split)
    heard = world.task(world.core.compare_errors(inode.number))
    heard.run_until_blocked()
    # The guest's fault loses the folio, and the comparison has brought another.
    world.fail_next(fx.Split, Reason.VMEMMAP_RESTORE_FAILED)
    with pytest.raises(Exhausted):
        guest.finish()
    heard.finish()
    assert inode.statistics().split_folios == 1
    assert inode.statistics().poisoned_pages == 0
    assert world.read(inode, HOST, 3) == 0
    world.check()


def test_a_restarted_service_believes_what_it_is_told_before_it_serves() -> None:
    world = GmemWorld()
    inode = world.bound(2 * SIZE_2M, SIZE_2M)
    world.run(world.fault(inode, 512))
    pfn = frame_of(inode, 512 + 7)
    believe_errors(inode, {pfn: 1, pfn + 4096: 1})
    assert inode.statistics().poisoned_offsets == ((512 + 7) * PAGE_SIZE,)
