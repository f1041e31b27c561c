"""Conversion of RFC_V2: what it does, what it refuses, what a failure leaves."""

from __future__ import annotations

import pytest

from gmem.effects import Release
from gmem.guest_memfd.core import effects as fx
from gmem.guest_memfd.core.inode import Inode
from gmem.guest_memfd.core.values import (
    HoldKind,
    PageState,
    ViewKind,
)
from gmem.uapi.errors import Contended, KernelError, Reason, TransportError
from gmem.uapi.pages import PAGE_SHIFT, PAGE_SIZE, SIZE_1G, SIZE_2M, PgRange
from tests.support.gmem_world import EIO, GmemWorld, mapped, part, refused, whole

HOST, GUEST = ViewKind.HOST, ViewKind.GUEST
GFN = 0x100000
SIZES = pytest.mark.parametrize(
    "page_size", [PAGE_SIZE, SIZE_2M, SIZE_1G], ids=["4K", "2M", "1G"]
)
KINDS = pytest.mark.parametrize("kind", list(HoldKind), ids=lambda kind: kind.value)


def saved_pages(world: GmemWorld) -> int:
    return world.memory.statistics().vmemmap.saved_pages


def pin(
    world: GmemWorld,
    inode: Inode,
    page: int,
    kind: HoldKind = HoldKind.PIN,
    name: str = "nic",
) -> int:
    return world.run(world.core.pin(part(inode, page), kind, holder=name, client="dev"))


def allocate(world: GmemWorld, inode: Inode) -> None:
    world.run(world.core.fallocate(inode.number, 1, 0, inode.i_size))


# What a conversion does.


@SIZES
def test_contents_are_kept_both_ways(page_size: int) -> None:
    world = GmemWorld()
    inode = world.created_v2(2 * page_size, page_size)
    world.write(inode, HOST, 1, "A")
    world.run(world.convert(whole(inode), shared=False))
    assert world.read(inode, HOST, 1) == EIO
    world.run(world.get_pfn(inode, 1))
    assert world.read(inode, GUEST, 1) == "A"

    world.write(inode, GUEST, 1, "B")
    world.run(world.convert(whole(inode), shared=True))

    assert world.read(inode, GUEST, 1) == EIO
    assert world.read(inode, HOST, 1) == "B"
    world.check()


@pytest.mark.parametrize("page_size", [SIZE_2M, SIZE_1G], ids=["2M", "1G"])
def test_neighbours_of_a_split_keep_their_content_and_stay_in_their_view(
    page_size: int,
) -> None:
    world = GmemWorld()
    inode = world.created_v2(2 * page_size, page_size, shared=False)
    allocate(world, inode)
    before = saved_pages(world)
    for pgoff in (3, 5):
        world.write(inode, GUEST, pgoff, f"private {pgoff}")
    task = world.task(world.convert(part(inode, 3), shared=True))
    task.run_until(fx.Split)
    assert world.read(inode, GUEST, 5) == "private 5"
    task.finish()

    assert world.read(inode, GUEST, 5) == "private 5"
    assert world.read(inode, HOST, 3) == "private 3"
    assert inode.statistics().split_folios == 1
    # Reconstruction rounds out: one page is enough when it was the last shared one.
    world.run(world.convert(part(inode, 3), shared=False))
    assert inode.statistics().split_folios == 0
    assert saved_pages(world) == before
    assert world.read(inode, GUEST, 3) == "private 3"
    world.check()


@SIZES
@pytest.mark.parametrize("shared", [True, False], ids=["to shared", "to private"])
def test_only_what_differs_is_touched(page_size: int, shared: bool) -> None:
    world = GmemWorld()
    inode = world.created_v2(4 * page_size, page_size, shared=not shared)
    world.run(world.convert(part(inode, 2), shared=shared))
    world.log.clear()
    world.run(world.convert(part(inode, 1, 3), shared=shared))
    withdrawn = [
        e.pages for e in world.log if isinstance(e, fx.InvalidateView | fx.QuiesceView)
    ]
    assert withdrawn == [PgRange(1, 2), PgRange(3, 4)]
    world.log.clear()
    world.run(world.convert(part(inode, 1, 3), shared=shared))
    assert [e for e in world.log if not isinstance(e, Release)] == []
    world.check()


def test_a_mapped_page_is_unmapped_by_the_kernel() -> None:
    world = GmemWorld()
    inode = world.created_v2(4 * PAGE_SIZE)
    world.write(inode, HOST, 1, "a")
    world.mappings[inode.number] = [mapped(1), mapped(2)]
    world.log.clear()

    world.run(world.convert(part(inode, 1), shared=False))

    number, page = inode.number, PgRange(1, 2)
    kinds = (fx.FindMappings, fx.QuiesceView, fx.SetViewState, fx.ClearUptodate)
    assert [e for e in world.log if isinstance(e, kinds)] == [
        fx.QuiesceView(number, page),
        fx.SetViewState(number, HOST, page, PageState.CLOSED),
        fx.SetViewState(number, GUEST, page, PageState.OPEN),
    ]
    assert world.mappings[inode.number] == [mapped(2)]


def test_vms_are_told_of_what_they_were_handed_rounded_out() -> None:
    world = GmemWorld()
    inode = world.created_v2(2 * SIZE_2M, SIZE_2M, shared=False)
    for pgoff in (7, 600):
        world.run(world.get_pfn(inode, pgoff))
    world.log.clear()
    world.run(world.convert(part(inode, 3), shared=True))
    told = [
        (type(e), e.gfns)
        for e in world.log
        if isinstance(e, fx.InvalidateBegin | fx.InvalidateEnd)
    ]
    folio = PgRange(GFN, GFN + 512)
    assert told == [(fx.InvalidateBegin, folio), (fx.InvalidateEnd, folio)]
    world.log.clear()
    world.run(world.convert(part(inode, 5), shared=True))
    assert world.asked(fx.InvalidateBegin) == []


# What it refuses.


@SIZES
@KINDS
def test_a_held_page_refuses_with_its_offset_and_holder_and_only_unmaps(
    page_size: int, kind: HoldKind
) -> None:
    world = GmemWorld()
    inode = world.created_v2(4 * page_size, page_size)
    allocate(world, inode)
    world.write(inode, HOST, 3, "kept")
    hold = pin(world, inode, 2, kind, "nic0")
    world.mappings[inode.number] = [mapped(1)]
    target = part(inode, 1, 3)
    with refused(world, Reason.PAGE_IN_USE) as caught:
        world.run(world.convert(target, shared=False))

    assert isinstance(caught.value, Contended)
    assert str(caught.value).startswith("EAGAIN (page_in_use): the page at offset")
    assert caught.value.numbers == {
        "error_offset": 2 << PAGE_SHIFT,
        "inode": inode.number,
        "holders": "nic0",
        "count": 1,
        "mapped": 0,
    }
    # The trace that the series leaves: the host's mappings are gone.
    assert world.mappings[inode.number] == []
    assert world.read(inode, HOST, 3) == "kept"
    world.run(world.core.unpin(hold))
    world.run(world.convert(target, shared=False))
    world.check()


def test_validate_only_checks_and_unmaps_nothing() -> None:
    world = GmemWorld()
    inode = world.created_v2(4 * PAGE_SIZE)
    allocate(world, inode)
    world.mappings[inode.number] = [mapped(1)]
    before = world.snapshot()
    for shared in (False, True):
        world.run(world.convert(whole(inode), shared=shared, validate_only=True))
    assert world.snapshot() == before
    hold = pin(world, inode, 2)
    with refused(world, Reason.PAGE_IN_USE):
        world.run(world.convert(whole(inode), shared=False, validate_only=True))
    assert world.mappings[inode.number] == [mapped(1)]
    world.run(world.core.unpin(hold))


def test_nobody_gets_sigbus_from_a_conversion_that_fails() -> None:
    world = GmemWorld()
    inode = world.created_v2(2 * SIZE_2M, SIZE_2M)
    allocate(world, inode)
    world.fail_next(fx.Reconstruct, Reason.PEER_RESTARTED, after=1)
    task = world.task(world.convert(whole(inode), shared=False))
    while not task.done:
        states = set(world.tables[inode.number].views[HOST])
        assert states <= {PageState.OPEN, PageState.QUIESCED}
        task.step()
    assert inode.statistics().shared_pages == 1024
    assert inode.statistics().split_folios == 2
    world.check()


def test_ranges_of_two_lineages_are_converted_apart() -> None:
    world = GmemWorld()
    one, two = world.bound(SIZE_2M, SIZE_2M), world.created_v2(SIZE_2M, SIZE_2M)
    with refused(world, Reason.ARGUMENT_INVALID):
        world.run(world.convert(whole(one), whole(two), shared=False))


# Rollback.


@pytest.mark.parametrize("splits_before", [0, 1, 2])
def test_a_split_that_fails_is_rolled_back_exactly(splits_before: int) -> None:
    world = GmemWorld()
    one = world.created_v2(2 * SIZE_2M, SIZE_2M, shared=False)
    two = world.created_v2(SIZE_2M, SIZE_2M, shared=False)
    for inode in (one, two):
        allocate(world, inode)
        world.write(inode, GUEST, 0, "kept")
    world.run(world.convert(part(one, 5), shared=True))
    before = world.snapshot()
    world.fail_next(fx.Split, Reason.VMEMMAP_RESTORE_FAILED, after=splits_before)
    targets = (part(one, 100, 1), part(one, 600), whole(two))
    task = world.task(world.convert(*targets, shared=True))
    while not task.done:
        task.step()
    if splits_before < 2:
        assert isinstance(task.error, KernelError)
        assert world.snapshot() == before
    assert world.run(world.get_pfn(one, 0))
    assert world.read(one, GUEST, 0) == "kept"
    world.check()


def test_a_rollback_that_fails_warns_and_goes_on_with_the_others() -> None:
    world = GmemWorld()
    one = world.created_v2(SIZE_2M, SIZE_2M)
    two = world.created_v2(SIZE_2M, SIZE_2M)
    for inode in (one, two):
        allocate(world, inode)
        world.write(inode, HOST, 0, "kept")
    world.fail_next(fx.Reconstruct, TransportError("no answer"), after=1)
    world.fail_next(fx.Split, Reason.VMEMMAP_RESTORE_FAILED)
    with pytest.raises(TransportError):
        world.run(world.convert(whole(one), whole(two), shared=False))
    assert one.statistics().rollback_warnings == 1
    assert one.statistics().whole_folios == 1
    assert two.statistics().split_folios == 1
    assert [i.statistics().shared_pages for i in (one, two)] == [512, 512]
    world.check()
    # The next fault splits it; content outlives that, too.
    assert world.read(one, HOST, 0) == "kept"
    assert one.statistics().split_folios == 1


@pytest.mark.parametrize("shared", [True, False], ids=["to shared", "to private"])
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (fx.InvalidateView, Reason.OBJECT_IN_USE),
        (fx.QuiesceView, Reason.PAGE_IN_USE),
        (fx.Split, Reason.VMEMMAP_RESTORE_FAILED),
        (fx.Reconstruct, Reason.PEER_RESTARTED),
    ],
)
@pytest.mark.parametrize("after", [0, 1, 2])
def test_whatever_fails_leaves_everything_as_it_was(
    kind: type, reason: Reason, after: int, shared: bool
) -> None:
    world = GmemWorld()
    inode = world.created_v2(4 * SIZE_2M, SIZE_2M, shared=not shared)
    allocate(world, inode)
    world.run(world.convert(part(inode, 700), shared=shared))
    before = world.snapshot()
    world.fail_next(kind, reason, after=after)
    task = world.task(world.convert(whole(inode), shared=shared))
    while not task.done:
        task.step()
    if task.error is not None:
        assert isinstance(task.error, KernelError)
        assert task.error.reason is reason
        assert world.snapshot() == before
    else:
        assert inode.statistics().shared_pages in (0, 2048)
    world.check()
