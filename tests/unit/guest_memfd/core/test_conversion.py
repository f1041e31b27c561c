"""Conversion of RFC_V1: checks, order, contents, restructuring, who waits."""

from __future__ import annotations

import pytest

from gmem.effects import Release
from gmem.guest_memfd.core import effects as fx
from gmem.guest_memfd.core.inode import Inode
from gmem.guest_memfd.core.values import HoldKind, PageState, ViewKind
from gmem.uapi.errors import Contended, Reason
from gmem.uapi.pages import PAGE_SIZE, SIZE_1G, SIZE_2M, PgRange
from tests.support.gmem_world import (
    EIO,
    GmemWorld,
    mapped,
    part,
    refused,
    whole,
)

HOST, GUEST = ViewKind.HOST, ViewKind.GUEST
SIZES = pytest.mark.parametrize(
    "page_size", [PAGE_SIZE, SIZE_2M, SIZE_1G], ids=["4K", "2M", "1G"]
)
SAVED = {SIZE_2M: 7, SIZE_1G: 4095}


def saved_pages(world: GmemWorld) -> int:
    return world.memory.statistics().vmemmap.saved_pages


def pin(world: GmemWorld, inode: Inode, page: int, kind: HoldKind, name: str) -> int:
    return world.run(world.core.pin(part(inode, page), kind, holder=name, client="dev"))


# What a conversion does.


@SIZES
def test_a_page_is_in_one_view_and_zeroed_by_each_conversion(page_size: int) -> None:
    world = GmemWorld()
    inode = world.bound(2 * page_size, page_size)
    world.write(inode, HOST, 1, "host")
    world.run(world.convert(whole(inode), shared=False))
    assert world.read(inode, HOST, 1) == EIO
    world.run(world.get_pfn(inode, 1))
    assert world.read(inode, GUEST, 1) == 0

    world.write(inode, GUEST, 1, "guest")
    world.run(world.convert(whole(inode), shared=True))

    assert world.read(inode, GUEST, 1) == EIO
    assert world.read(inode, HOST, 1) == 0
    world.check()


@SIZES
def test_convert_and_convert_back_is_never_having_converted(page_size: int) -> None:
    world = GmemWorld()
    inode = world.bound(2 * page_size, page_size, shared=False)
    world.run(world.core.fallocate(inode.number, 1, 0, 2 * page_size))
    before = world.snapshot()
    for shared in (True, False):
        world.run(world.convert(whole(inode), shared=shared))
        world.check()
    assert world.snapshot() == before


@pytest.mark.parametrize("page_size", [SIZE_2M, SIZE_1G], ids=["2M", "1G"])
def test_sharing_one_page_splits_its_folio_and_takes_vmemmap(page_size: int) -> None:
    world = GmemWorld()
    inode = world.bound(2 * page_size, page_size, shared=False)
    world.run(world.core.fallocate(inode.number, 1, 0, 2 * page_size))
    before = saved_pages(world)

    world.run(world.convert(part(inode, 3), shared=True))

    assert inode.statistics().split_folios == 1
    assert inode.statistics().whole_folios == 1
    assert saved_pages(world) == before - SAVED[page_size]
    world.check()

    # Reconstruction rounds *in*: only a range that covers the folio makes it whole.
    world.run(world.convert(part(inode, 3), shared=False))
    assert inode.statistics().split_folios == 1
    world.run(world.convert(part(inode, 3), shared=True))
    world.run(world.convert(part(inode, 0, page_size // PAGE_SIZE), shared=False))
    assert inode.statistics().split_folios == 0
    assert saved_pages(world) == before
    world.check()


def test_split_reconstruct_split_restores_vmemmap_once_each_time() -> None:
    world = GmemWorld()
    inode = world.bound(SIZE_1G, SIZE_1G, shared=False)
    world.run(world.core.fallocate(inode.number, 1, 0, SIZE_1G))
    start = saved_pages(world)
    seen = []
    for _ in range(3):
        for shared in (True, False):
            world.run(world.convert(whole(inode), shared=shared))
            seen.append(start - saved_pages(world))
    assert seen == [4095, 0] * 3


def test_restructuring_zeroes_the_private_neighbours() -> None:
    """Quirk: the series clears the flags of the whole huge folio."""
    world = GmemWorld()
    inode = world.bound(2 * SIZE_2M, SIZE_2M, shared=False)
    world.run(world.core.fallocate(inode.number, 1, 0, 2 * SIZE_2M))
    for pgoff in (5, 512):
        world.write(inode, GUEST, pgoff, "private")

    world.run(world.convert(part(inode, 3), shared=True))

    assert world.read(inode, GUEST, 5) == 0
    assert world.read(inode, GUEST, 512) == "private"
    invalidated = [e.pages for e in world.asked(fx.InvalidateView)]
    assert invalidated == [PgRange(3, 4), PgRange(0, 3), PgRange(4, 512)]

    world.write(inode, GUEST, 5, "again")
    world.run(world.convert(part(inode, 0, 512), shared=False))
    assert world.read(inode, GUEST, 5) == 0
    world.check()


def test_a_page_is_closed_before_it_is_invalidated_and_opened_at_the_end() -> None:
    world = GmemWorld()
    inode = world.bound(4 * PAGE_SIZE)
    world.write(inode, HOST, 1, "a")
    world.log.clear()

    world.run(world.convert(part(inode, 1), shared=False))

    number, page = inode.number, PgRange(1, 2)
    effects = [e for e in world.log if not isinstance(e, Release)]
    assert effects == [
        fx.FindMappings(number, page),
        fx.SetViewState(number, HOST, page, PageState.CLOSING),
        fx.InvalidateView(number, HOST, page),
        fx.SetViewState(number, HOST, page, PageState.CLOSED),
        fx.ClearUptodate(number, page),
        # What the guest may write from now on, no crash gives back to the host.
        fx.Record({f"inode/{number}/flip/1": 1, f"inode/{number}/flip/2": 1}),
        fx.SetViewState(number, GUEST, page, PageState.OPEN),
    ]


@SIZES
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "private"])
def test_converting_what_is_so_already_does_nothing(
    page_size: int, shared: bool
) -> None:
    world = GmemWorld()
    inode = world.bound(page_size, page_size, shared=shared)
    world.run(world.core.fallocate(inode.number, 1, 0, page_size))
    view = HOST if shared else GUEST
    world.write(inode, view, 0, "kept")
    pin_or_not = [pin(world, inode, 0, HoldKind.PIN, "nic")] if shared else []
    before = world.snapshot()

    world.run(world.convert(whole(inode), shared=shared))

    assert world.snapshot() == before
    assert world.read(inode, view, 0) == "kept"
    assert len(inode.statistics().holds) == len(pin_or_not)


def test_pages_that_were_shared_already_stay_reachable_and_are_zeroed() -> None:
    world = GmemWorld()
    inode = world.bound(4 * PAGE_SIZE)
    world.run(world.convert(part(inode, 1), shared=False))
    world.write(inode, HOST, 0, "a")
    task = world.task(world.convert(whole(inode), shared=True))
    task.run_until(fx.ClearUptodate)
    assert world.tables[inode.number].views[HOST][0] == PageState.QUIESCED
    task.finish()
    assert world.read(inode, HOST, 0) == 0
    world.check()


def test_pages_that_were_private_already_are_zeroed_too() -> None:
    world = GmemWorld()
    inode = world.bound(4 * PAGE_SIZE)
    world.run(world.convert(part(inode, 1), shared=False))
    world.run(world.core.fallocate(inode.number, 1, 0, inode.i_size))
    world.write(inode, GUEST, 1, "a")
    world.run(world.convert(whole(inode), shared=False))
    assert world.read(inode, GUEST, 1) == 0
    world.check()


def test_unallocated_ranges_convert_without_a_folio() -> None:
    world = GmemWorld()
    inode = world.bound(SIZE_1G, SIZE_1G)
    world.run(world.convert(whole(inode), shared=False))
    assert world.asked(fx.FindMappings) == []
    assert inode.statistics().st_blocks == 0
    assert inode.statistics().shared_pages == 0
    world.check()


# What it refuses.


@SIZES
@pytest.mark.parametrize("validate_only", [True, False], ids=["validate", "convert"])
def test_to_private_refuses_a_pinned_page_and_changes_nothing(
    page_size: int, validate_only: bool
) -> None:
    world = GmemWorld()
    inode = world.bound(2 * page_size, page_size)
    world.run(world.core.fallocate(inode.number, 1, 0, 2 * page_size))
    world.write(inode, HOST, 0, "kept")
    hold = pin(world, inode, 1, HoldKind.PIN, "nic0")
    target = whole(inode)
    with refused(world, Reason.PAGE_IN_USE) as caught:
        world.run(world.convert(target, shared=False, validate_only=validate_only))

    assert isinstance(caught.value, Contended)
    assert str(caught.value).startswith("EINVAL (page_in_use): the page at offset")
    assert caught.value.numbers == {
        "error_offset": 1 << 12,
        "inode": inode.number,
        "holders": "nic0",
        "count": 1,
        "mapped": 0,
    }
    assert world.read(inode, HOST, 0) == "kept"
    world.run(world.core.unpin(hold))
    world.run(world.convert(target, shared=False, validate_only=validate_only))
    world.check()


def test_a_plain_reference_does_not_stop_a_conversion() -> None:
    """The hole that safe_refcount closed later."""
    world = GmemWorld()
    inode = world.bound(SIZE_1G, SIZE_1G)
    pin(world, inode, 0, HoldKind.PLAIN, "gup")
    world.run(world.convert(whole(inode), shared=False))
    assert inode.statistics().whole_folios == 1
    assert [hold.holder for hold in inode.statistics().holds] == ["gup"]
    world.check()


def test_to_private_names_who_maps_the_first_page() -> None:
    world = GmemWorld()
    inode = world.bound(8 * PAGE_SIZE)
    world.run(world.core.fallocate(inode.number, 1, 0, inode.i_size))
    pin(world, inode, 4, HoldKind.PIN, "nic0")
    pin(world, inode, 5, HoldKind.PIN, "nic0")
    world.mappings[inode.number] = [mapped(7, pid=9, comm="late"), mapped(2)]
    with refused(world, Reason.PAGE_IN_USE) as caught:
        world.run(world.convert(part(inode, 1, 7), shared=False))
    assert caught.value.numbers["error_offset"] == 2 << 12
    assert caught.value.numbers["holders"] == "pid 4711 (loader), nic0, pid 9 (late)"
    assert caught.value.numbers["count"] == 3

    world.mappings[inode.number] = []
    world.run(world.convert(part(inode, 1, 3), shared=False))


def test_only_present_shared_pages_can_be_mapped() -> None:
    world = GmemWorld()
    inode = world.bound(8 * PAGE_SIZE)
    world.run(world.core.fallocate(inode.number, 1, 0, PAGE_SIZE))
    world.mappings[inode.number] = [mapped(3), mapped(7)]
    world.run(world.convert(part(inode, 0, 4), shared=False))
    assert inode.statistics().private_pages == 4


def test_many_holders_are_counted_and_a_few_are_named() -> None:
    world = GmemWorld()
    inode = world.bound(PAGE_SIZE)
    for number in range(11):
        pin(world, inode, 0, HoldKind.PIN, f"dev{number:02}")
    with refused(world, Reason.PAGE_IN_USE) as caught:
        world.run(world.convert(whole(inode), shared=False))
    assert str(caught.value.numbers["holders"]).endswith("dev07 and 3 more")
    assert caught.value.numbers["count"] == 11


def test_nobody_gets_sigbus_from_a_conversion_that_is_refused() -> None:
    world = GmemWorld()
    inode = world.bound(2 * SIZE_2M, SIZE_2M)
    world.run(world.core.fallocate(inode.number, 1, 0, 2 * SIZE_2M))
    pin(world, inode, 600, HoldKind.PIN, "nic")
    world.log.clear()
    task = world.task(world.convert(whole(inode), shared=False))
    while not task.done:
        assert set(world.tables[inode.number].views[HOST]) == {PageState.OPEN}
        task.step()
    assert world.asked(fx.InvalidateView) == []
    world.check()


def test_validate_only_of_what_may_be_done_changes_nothing() -> None:
    world = GmemWorld()
    inode = world.bound(SIZE_2M, SIZE_2M)
    world.write(inode, HOST, 0, "a")
    before = world.snapshot()
    world.run(world.convert(whole(inode), shared=False, validate_only=True))
    assert world.snapshot() == before
    assert world.read(inode, HOST, 0) == "a"


# Who waits for whom.


def test_two_inodes_convert_while_one_waits_for_a_silent_vmm() -> None:
    world = GmemWorld()
    one, two = (world.bound(SIZE_2M, SIZE_2M, shared=False) for _ in range(2))
    for inode in (one, two):
        world.run(world.get_pfn(inode, 0))
    # RFC_V1 converts after the VMM has zapped: it is a punch that asks one.
    punch = world.task(world.core.fallocate(one.number, 3, 0, SIZE_2M))
    punch.run_until(fx.InvalidateBegin)
    waits = world.task(world.convert(whole(one), shared=True))
    waits.run_until_blocked()

    world.run(world.convert(whole(two), shared=True))

    assert two.statistics().shared_pages == 512
    assert one.statistics().shared_pages == 0
    assert not waits.step()
    punch.finish()
    waits.finish()
    assert one.statistics().shared_pages == 512
    world.check()


def test_two_inodes_convert_while_one_waits_for_a_process_to_answer() -> None:
    world = GmemWorld()
    one, two = (world.bound(PAGE_SIZE) for _ in range(2))
    for inode in (one, two):
        world.write(inode, HOST, 0, "a")
    waits = world.task(world.convert(whole(one), shared=False))
    waits.run_until(fx.FindMappings)
    world.run(world.convert(whole(two), shared=False))
    assert two.statistics().private_pages == 1
    waits.finish()
    world.check()


def test_conversions_of_two_inodes_in_both_orders_do_not_deadlock() -> None:
    world = GmemWorld()
    one, two = (world.bound(PAGE_SIZE) for _ in range(2))
    first = world.task(world.convert(whole(one), whole(two), shared=False))
    second = world.task(world.convert(whole(two), whole(one), shared=True))
    while not (first.done and second.done):
        moved = [task.step() for task in (first, second) if not task.done]
        assert any(moved), "each waits for the other"
    world.check()


def test_a_host_fault_waits_for_a_conversion() -> None:
    world = GmemWorld()
    inode = world.bound(PAGE_SIZE)
    convert = world.task(world.convert(whole(inode), shared=False))
    convert.run_until(fx.InvalidateView)
    fault = world.task(world.fault(inode, 0))
    fault.run_until_blocked()
    convert.finish()
    assert fault.finish().reason is Reason.PAGE_NOT_FAULTABLE
    assert inode.statistics().st_blocks == 0
