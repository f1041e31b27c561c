"""Host faults, guest faults, and what happens when two of them meet."""

from __future__ import annotations

from typing import Any

import pytest

from gmem.effects import Effect
from gmem.guest_memfd.core import effects as fx
from gmem.guest_memfd.core.values import (
    GuestPage,
    HoldKind,
    Mapped,
    Sigbus,
    ViewKind,
)
from gmem.uapi.errors import KernelError, Reason
from gmem.uapi.pages import PAGE_SIZE, SIZE_1G, SIZE_2M, Pfn, PgRange
from tests.support.gmem_world import EIO, VM, GmemWorld, part, refused, whole

HOST, GUEST = ViewKind.HOST, ViewKind.GUEST
SIZES = pytest.mark.parametrize(
    "page_size", [PAGE_SIZE, SIZE_2M, SIZE_1G], ids=["4K", "2M", "1G"]
)


@SIZES
def test_a_host_fault_allocates_splits_and_maps(page_size: int) -> None:
    world = GmemWorld()
    inode = world.bound(2 * page_size, page_size)
    outcome = world.run(world.fault(inode, 1))
    first = world.asked(fx.AttachFolio)[0]
    assert outcome == Mapped(Pfn(first.pfn + 1 - first.index))
    assert world.run(world.fault(inode, 1)) == outcome
    assert len(world.asked(fx.Allocate)) == 1
    assert inode.statistics().split_folios == (page_size > PAGE_SIZE)
    world.check()


def test_sigbus_is_an_outcome() -> None:
    world = GmemWorld(huge_2m=1)
    inode = world.bound(SIZE_2M, SIZE_2M)
    world.run(world.convert(part(inode, 3), shared=False))
    before = world.snapshot()
    for pgoff, reason in (
        (3, Reason.PAGE_NOT_FAULTABLE),
        (512, Reason.RANGE_PAST_END),
        (1 << 60, Reason.RANGE_PAST_END),
    ):
        assert world.run(world.fault(inode, pgoff)) == Sigbus(reason)
        assert world.snapshot() == before
    world.fail_next(fx.Allocate, Reason.POOL_EMPTY)
    assert world.run(world.fault(inode, 0)) == Sigbus(Reason.POOL_EMPTY)
    assert world.snapshot() == before


def test_a_fault_that_cannot_split_leaves_no_trace() -> None:
    world = GmemWorld()
    inode = world.bound(SIZE_1G, SIZE_1G)
    before = world.snapshot()
    world.fail_next(fx.Split, Reason.VMEMMAP_RESTORE_FAILED)
    assert world.run(world.fault(inode, 0)) == Sigbus(Reason.VMEMMAP_RESTORE_FAILED)
    assert world.snapshot() == before
    world.check()


@pytest.mark.parametrize("page_size", [SIZE_2M, SIZE_1G], ids=["2M", "1G"])
@pytest.mark.parametrize("step", [fx.Allocate, fx.Split, fx.AttachFolio])
def test_two_faults_on_the_last_page_of_a_reservation_both_succeed(
    page_size: int, step: type[Effect[Any]]
) -> None:
    """The second must not find the reservation empty because of the first."""
    world = GmemWorld()
    inode = world.bound(page_size, page_size)
    first = world.task(world.fault(inode, 0))
    first.run_until(step)
    second = world.task(world.fault(inode, 0))
    second.run_until_blocked()
    assert first.finish() == second.finish()
    assert len(world.asked(fx.Allocate)) == 1
    world.check()


def test_the_loser_of_an_allocation_gives_its_folio_back() -> None:
    world = GmemWorld()
    inode = world.bound(2 * PAGE_SIZE)
    first, second = (world.task(world.fault(inode, 0)) for _ in range(2))
    first.run_until(fx.Allocate)
    second.run_until(fx.Allocate)
    winner = second.finish()

    assert first.finish() == winner

    assert len(world.asked(fx.Allocate)) == 2
    assert [len(effect.folios) for effect in world.asked(fx.Free)] == [1]
    assert len(world.asked(fx.AttachFolio)) == 1
    assert inode.statistics().st_blocks == PAGE_SIZE // 512
    world.check()


def test_two_faults_split_a_folio_once() -> None:
    world = GmemWorld()
    inode = world.bound(SIZE_1G, SIZE_1G)
    first = world.task(world.fault(inode, 0))
    first.run_until(fx.Split)
    second = world.task(world.fault(inode, 9))
    second.run_until_blocked()
    first.finish()
    second.finish()
    assert len(world.asked(fx.Split)) == 1
    world.check()


def test_a_batch_that_meets_a_fault_gives_the_loser_back() -> None:
    world = GmemWorld()
    inode = world.bound(64 * PAGE_SIZE)
    batch = world.task(world.core.fallocate(inode.number, 1, 0, 64 * PAGE_SIZE))
    batch.run_until(fx.Allocate)
    world.run(world.fault(inode, 5))
    batch.finish()
    assert inode.statistics().whole_folios == 64
    assert [len(effect.folios) for effect in world.asked(fx.Free)] == [1]
    world.check()


# The guest.


@SIZES
def test_get_pfn_gives_the_whole_folio_when_nothing_is_shared(page_size: int) -> None:
    world = GmemWorld()
    inode = world.bound(2 * page_size, page_size, shared=False)
    page = page_size // PAGE_SIZE
    got = world.run(world.get_pfn(inode, page))
    order = page.bit_length() - 1
    assert got == GuestPage(world.asked(fx.AttachFolio)[0].pfn, order)
    if page > 1:
        again = world.run(world.get_pfn(inode, page + 3))
        assert again == GuestPage(got.pfn + 3, order)
        world.run(world.convert(part(inode, 0), shared=True))
        world.run(world.convert(part(inode, page + 3), shared=True))
        assert world.run(world.get_pfn(inode, page)).order == 0
    world.check()


def test_get_pfn_prepares_the_page_and_no_other() -> None:
    world = GmemWorld()
    inode = world.bound(SIZE_2M, SIZE_2M, shared=False)
    world.run(world.get_pfn(inode, 3))
    assert world.asked(fx.Prepare) == [fx.Prepare(inode.number, PgRange(3, 4))]
    assert list(world.tables[inode.number].uptodate[2:5]) == [0, 1, 0]


def test_get_pfn_takes_no_lock_in_this_series() -> None:
    world = GmemWorld()
    inode = world.bound(2 * PAGE_SIZE)
    world.run(world.convert(part(inode, 1), shared=False))
    convert = world.task(world.convert(part(inode, 0), shared=False))
    convert.run_until(fx.InvalidateView)
    world.run(world.get_pfn(inode, 1))
    convert.finish()
    world.check()


def test_get_pfn_of_a_slot_that_is_not_bound() -> None:
    world = GmemWorld()
    inode = world.create(2 * PAGE_SIZE)
    world.run(world.bind(inode, size=PAGE_SIZE))
    with refused(world, Reason.BINDING_MISSING) as missing:
        world.run(world.get_pfn(inode, 0, slot=1))
    assert str(missing.value).startswith("EFAULT")
    with refused(world, Reason.BINDING_BROKEN) as broken:
        world.run(world.get_pfn(inode, 1))
    assert str(broken.value).startswith("EIO")


def test_get_pfn_looks_again_when_the_slot_was_unbound_meanwhile() -> None:
    world = GmemWorld()
    inode = world.bound(PAGE_SIZE, shared=False)
    fault = world.task(world.get_pfn(inode, 0))
    fault.run_until(fx.Allocate)
    world.run(world.core.unbind(inode.number, VM, 0))
    with pytest.raises(KernelError) as caught:
        fault.finish()
    assert caught.value.reason is Reason.BINDING_MISSING
    world.check()


def test_get_pfn_records_for_the_binding_that_is_there_at_its_end() -> None:
    world = GmemWorld()
    inode = world.bound(PAGE_SIZE, shared=False)
    fault = world.task(world.get_pfn(inode, 0))
    fault.run_until(fx.Allocate)
    world.run(world.core.unbind(inode.number, VM, 0))
    world.run(world.bind(inode, shared=False))
    fault.finish()
    world.run(world.core.fallocate(inode.number, 3, 0, PAGE_SIZE))
    assert len(world.asked(fx.InvalidateBegin)) == 1


def test_a_record_does_not_reach_past_the_binding() -> None:
    world = GmemWorld()
    inode = world.create(SIZE_2M, SIZE_2M)
    for slot in range(2):
        offset = slot * SIZE_2M // 2
        bind = world.bind(
            inode, slot=slot, offset=offset, size=SIZE_2M // 2, shared=False
        )
        world.run(bind)
    world.run(world.get_pfn(inode, 300, slot=1))
    world.check()
    world.run(world.core.fallocate(inode.number, 3, 0, SIZE_2M))
    [begin] = world.asked(fx.InvalidateBegin)
    assert begin.gfns == PgRange(0x100000 + 256, 0x100000 + 512)


def test_a_conversion_to_shared_splits_what_a_guest_fault_is_attaching() -> None:
    world = GmemWorld()
    inode = world.bound(SIZE_2M, SIZE_2M, shared=False)
    fault = world.task(world.get_pfn(inode, 0))
    fault.run_until(fx.AttachFolio)
    convert = world.task(world.convert(part(inode, 3), shared=True))
    convert.run_until_blocked()

    assert fault.finish().order == 9
    convert.finish()

    assert inode.statistics().split_folios == 1
    world.check()


def test_a_conversion_to_private_rebuilds_what_a_guest_fault_is_splitting() -> None:
    world = GmemWorld()
    inode = world.bound(SIZE_2M, SIZE_2M)
    fault = world.task(world.get_pfn(inode, 0))
    fault.run_until(fx.Split)
    convert = world.task(world.convert(whole(inode), shared=False))
    convert.run_until_blocked()
    fault.finish()
    convert.finish()
    assert inode.statistics().whole_folios == 1
    world.check()


def test_a_conversion_finds_the_unit_gone_when_its_fault_could_not_split() -> None:
    world = GmemWorld()
    inode = world.bound(SIZE_2M, SIZE_2M)
    fault = world.task(world.get_pfn(inode, 0))
    fault.run_until(fx.Split)
    convert = world.task(world.convert(whole(inode), shared=False))
    convert.run_until_blocked()
    world.fail_next(fx.Split, Reason.VMEMMAP_RESTORE_FAILED)
    with pytest.raises(KernelError):
        fault.finish()
    convert.finish()
    assert inode.statistics().st_blocks == 0
    world.check()


def test_a_guest_fault_waits_for_a_split_under_way() -> None:
    world = GmemWorld()
    inode = world.bound(SIZE_2M, SIZE_2M, shared=False)
    world.run(world.core.fallocate(inode.number, 1, 0, SIZE_2M))
    convert = world.task(world.convert(part(inode, 3), shared=True))
    convert.run_until(fx.Split)
    fault = world.task(world.get_pfn(inode, 9))
    fault.run_until_blocked()
    convert.finish()
    assert fault.finish().order == 0
    world.check()


# Populate and pin.


@SIZES
def test_populated_pages_are_what_the_guest_reads(page_size: int) -> None:
    world = GmemWorld()
    inode = world.bound(2 * page_size, page_size, shared=False)
    world.descriptors["memfd"] = "payload"
    world.run(world.core.populate(part(inode, 1), "memfd", 64))
    assert world.read(inode, GUEST, 1) == "payload"
    assert world.read(inode, HOST, 1) == EIO
    assert world.asked(fx.ReadDescriptor) == [
        fx.ReadDescriptor("memfd", 64, inode.number, PgRange(1, 2))
    ]
    world.check()

    with refused(world, Reason.PAGE_PREPARED):
        world.run(world.core.populate(part(inode, 0, 2), "memfd", 0))
    world.run(world.core.fallocate(inode.number, 3, 0, 2 * page_size))
    world.run(world.core.populate(part(inode, 1), "memfd", 0))


def test_populate_refuses_shared_pages() -> None:
    world = GmemWorld()
    inode = world.bound(8 * PAGE_SIZE, shared=False)
    world.run(world.convert(part(inode, 5), shared=True))
    with refused(world, Reason.PAGE_NOT_FAULTABLE) as caught:
        world.run(world.core.populate(whole(inode), "memfd", 0))
    assert caught.value.numbers["error_offset"] == 5 << 12


@pytest.mark.parametrize(
    "reason",
    [Reason.DESCRIPTOR_UNKNOWN, Reason.DESCRIPTOR_TYPE, Reason.PAGE_UNREADABLE],
)
def test_what_could_not_be_read_is_never_seen(reason: Reason) -> None:
    world = GmemWorld()
    inode = world.bound(SIZE_2M, SIZE_2M, shared=False)
    world.fail_next(fx.ReadDescriptor, reason)
    with pytest.raises(KernelError) as caught:
        world.run(world.core.populate(whole(inode), "memfd", 0))
    assert caught.value.reason is reason
    assert world.read(inode, GUEST, 0) == 0
    world.check()


def test_a_guest_fault_during_populate_is_seen() -> None:
    world = GmemWorld()
    inode = world.bound(8 * PAGE_SIZE, shared=False)
    populate = world.task(world.core.populate(whole(inode), "memfd", 0))
    populate.run_until(fx.Allocate)
    world.run(world.get_pfn(inode, 0))
    with pytest.raises(KernelError) as caught:
        populate.finish()
    assert caught.value.reason is Reason.PAGE_PREPARED
    world.check()


@SIZES
def test_a_guest_fault_does_not_zero_what_populate_is_writing(page_size: int) -> None:
    world = GmemWorld()
    inode = world.bound(page_size, page_size, shared=False)
    world.descriptors["memfd"] = "payload"
    populate = world.task(world.core.populate(part(inode, 0), "memfd", 0))
    populate.run_until(fx.SetUptodate)
    fault = world.task(world.get_pfn(inode, 0))
    fault.run_until_blocked()
    populate.finish()
    fault.finish()
    assert world.read(inode, GUEST, 0) == "payload"
    world.check()


def test_a_private_page_cannot_be_pinned() -> None:
    world = GmemWorld()
    inode = world.bound(8 * PAGE_SIZE)
    world.run(world.convert(part(inode, 5), shared=False))
    with refused(world, Reason.PAGE_NOT_FAULTABLE) as caught:
        pin = world.core.pin(whole(inode), HoldKind.PIN, holder="n", client="c")
        world.run(pin)
    assert caught.value.numbers["error_offset"] == 5 << 12
    assert "is private" in caught.value.sentence


def test_pinning_brings_the_pages_in() -> None:
    world = GmemWorld()
    inode = world.bound(2 * SIZE_2M, SIZE_2M)
    pin = world.core.pin(part(inode, 1, 600), HoldKind.PIN, holder="n", client="c")
    assert world.run(pin) == 1
    assert inode.statistics().split_folios == 2
    assert inode.statistics().holds[0].pages == PgRange(1, 601)
    world.check()


def test_a_folio_that_is_punched_while_it_is_filled_in_is_filled_in_again() -> None:
    """No lock keeps two 4K faults apart but the one on the folios."""
    world = GmemWorld()
    inode = world.bound(4 * PAGE_SIZE, shared=False)
    fault = world.task(world.get_pfn(inode, 1))
    fault.run_until(fx.AttachFolio)
    allocate = world.task(world.core.fallocate(inode.number, 1, 0, 4 * PAGE_SIZE))
    allocate.run_until_blocked()
    fault.finish()
    allocate.finish()
    assert inode.statistics().whole_folios == 4
    world.check()
