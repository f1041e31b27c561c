"""fallocate: rounding, partial allocation, what a punch frees and what it zeroes."""

from __future__ import annotations

import pytest

from gmem.guest_memfd.core import effects as fx
from gmem.guest_memfd.core.values import HoldKind, PageState, ViewKind
from gmem.uapi.errors import KernelError, Reason
from gmem.uapi.flags import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from gmem.uapi.pages import PAGE_SIZE, SIZE_1G, SIZE_2M, PgRange
from tests.support.gmem_world import EIO, VM, GmemWorld, part, refused

HOST, GUEST = ViewKind.HOST, ViewKind.GUEST
ALLOCATE = FALLOC_FL_KEEP_SIZE
PUNCH = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE


def test_both_ends_of_an_allocation_are_rounded_down() -> None:
    world = GmemWorld()
    inode = world.create(4 * SIZE_2M, SIZE_2M)
    allocated = []
    for offset, length in [
        (0, SIZE_2M - PAGE_SIZE),
        (PAGE_SIZE, SIZE_2M),
        (3 * SIZE_2M + PAGE_SIZE, SIZE_2M - PAGE_SIZE),
    ]:
        world.run(world.core.fallocate(inode.number, ALLOCATE, offset, length))
        allocated.append(inode.filemap.present(inode.whole))
    assert allocated == [[], [0], [0, 3 * 512]]


def test_allocating_twice_is_allocating_once() -> None:
    world = GmemWorld()
    for page_size in (PAGE_SIZE, SIZE_2M, SIZE_1G):
        inode = world.create(2 * page_size, page_size)
        world.run(world.core.fallocate(inode.number, ALLOCATE, 0, 2 * page_size))
        before = world.snapshot()
        world.run(world.core.fallocate(inode.number, ALLOCATE, 0, 2 * page_size))
        assert world.snapshot() == before
        world.check()


def test_a_long_4k_range_is_allocated_in_batches() -> None:
    world = GmemWorld()
    inode = world.create(1200 * PAGE_SIZE)
    world.run(world.core.fallocate(inode.number, ALLOCATE, 600 << 12, 1 << 12))
    world.run(world.core.fallocate(inode.number, ALLOCATE, 0, 1200 << 12))
    sizes = [effect.nr_folios for effect in world.asked(fx.Allocate)]
    assert sizes == [1, 512, 88, 512, 87]
    assert inode.statistics().whole_folios == 1200
    world.check()


def test_a_partial_allocation_stays_on_enomem() -> None:
    world = GmemWorld(base_pages=700)
    inode = world.create(1024 * PAGE_SIZE)
    with pytest.raises(KernelError) as caught:
        world.run(world.core.fallocate(inode.number, ALLOCATE, 0, 1024 * PAGE_SIZE))
    assert caught.value.reason is Reason.BASE_MEMORY_EMPTY
    assert 512 <= inode.statistics().whole_folios < 1024
    world.check()

    world.run(world.core.fallocate(inode.number, PUNCH, 0, 1024 * PAGE_SIZE))
    assert inode.statistics().whole_folios == 0


def test_an_allocation_past_the_end_is_refused_and_changes_nothing() -> None:
    world = GmemWorld()
    inode = world.create(SIZE_2M, SIZE_2M)
    for offset in (0, SIZE_2M, SIZE_2M + PAGE_SIZE):
        with refused(world, Reason.RANGE_PAST_END):
            call = world.core.fallocate(
                inode.number, ALLOCATE, offset, SIZE_2M + PAGE_SIZE
            )
            world.run(call)


def test_a_punch_past_the_end_is_no_op() -> None:
    world = GmemWorld()
    inode = world.bound(SIZE_2M, SIZE_2M)
    world.write(inode, HOST, 0, "a")
    before = world.snapshot()
    for offset in (SIZE_2M, SIZE_2M + PAGE_SIZE, 1 << 50):
        world.run(world.core.fallocate(inode.number, PUNCH, offset, PAGE_SIZE))
    assert world.snapshot() == before
    assert world.read(inode, HOST, 0) == "a"


def test_a_punch_frees_whole_units_and_zeroes_the_rest() -> None:
    world = GmemWorld()
    inode = world.bound(4 * SIZE_2M, SIZE_2M, shared=False)
    world.run(world.convert(part(inode, 3 * 512 + 1), shared=True))
    world.run(world.core.fallocate(inode.number, ALLOCATE, 0, 4 * SIZE_2M))
    for pgoff in (0, 1, 512, 1024, 3 * 512):
        world.write(inode, GUEST, pgoff, pgoff + 7)
    world.write(inode, HOST, 3 * 512 + 1, "shared")
    before = inode.statistics().fragments

    length = 2 * SIZE_2M + SIZE_2M // 2 + PAGE_SIZE
    world.run(world.core.fallocate(inode.number, PUNCH, SIZE_2M - PAGE_SIZE, length))

    assert inode.filemap.present(inode.whole) == [0, 3 * 512]
    assert inode.statistics().fragments == before
    assert world.read(inode, GUEST, 1) == 8
    assert world.read(inode, GUEST, 512) == EIO
    assert world.read(inode, GUEST, 3 * 512) == 0
    assert world.read(inode, HOST, 3 * 512 + 1) == 0
    world.check()


def test_a_punch_inside_a_huge_page_only_zeroes() -> None:
    world = GmemWorld()
    inode = world.bound(SIZE_1G, SIZE_1G)
    for pgoff in (6, 7, 8):
        world.write(inode, HOST, pgoff, "a")
    before = world.snapshot()
    world.run(world.core.fallocate(inode.number, PUNCH, 7 << 12, PAGE_SIZE))
    assert world.snapshot() == before
    assert [world.read(inode, HOST, pgoff) for pgoff in (6, 7, 8)] == ["a", 0, "a"]


@pytest.mark.parametrize("page_size", [PAGE_SIZE, SIZE_2M, SIZE_1G])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "private"])
def test_a_punched_page_reads_zero_and_is_as_faultable_as_before(
    page_size: int, shared: bool
) -> None:
    world = GmemWorld()
    inode = world.bound(page_size, page_size, shared=shared)
    empty = world.snapshot()
    view, other = (HOST, GUEST) if shared else (GUEST, HOST)
    world.run(world.core.fallocate(inode.number, ALLOCATE, 0, page_size))
    world.write(inode, view, 0, "a")

    world.run(world.core.fallocate(inode.number, PUNCH, 0, page_size))

    assert world.snapshot() == empty
    world.run(world.core.fallocate(inode.number, ALLOCATE, 0, page_size))
    assert world.read(inode, view, 0) == 0
    assert world.read(inode, other, 0) == EIO
    world.check()


def test_a_host_fault_during_a_punch_waits_and_finds_a_new_page() -> None:
    world = GmemWorld()
    inode = world.bound(2 * PAGE_SIZE)
    world.write(inode, HOST, 0, "old")
    punch = world.task(world.core.fallocate(inode.number, PUNCH, 0, PAGE_SIZE))
    punch.run_until(fx.Free)

    states = world.tables[inode.number].views[HOST]
    assert list(states) == [PageState.QUIESCED, PageState.OPEN]
    fault = world.task(world.fault(inode, 0))
    fault.run_until_blocked()
    punch.finish()
    fault.finish()
    assert world.read(inode, HOST, 0) == 0
    world.check()


def test_a_punch_tells_the_vms_that_have_something_to_forget() -> None:
    world = GmemWorld()
    inode = world.bound(4 * SIZE_2M, SIZE_2M, shared=False)
    world.run(world.core.fallocate(inode.number, ALLOCATE, 0, 4 * SIZE_2M))
    world.run(world.get_pfn(inode, 512))
    world.run(world.core.fallocate(inode.number, PUNCH, 2 * SIZE_2M, SIZE_2M))
    assert world.asked(fx.InvalidateBegin) == []

    for _ in range(2):  # The second time, nothing was handed out since.
        world.run(world.core.fallocate(inode.number, PUNCH, 0, 2 * SIZE_2M))

    gfns = PgRange(0x100000 + 512, 0x100000 + 1024)
    assert world.asked(fx.InvalidateBegin) == [
        fx.InvalidateBegin(VM, f"unix:{VM}", gfns)
    ]
    begin = world.log.index(world.asked(fx.InvalidateBegin)[0])
    end = world.log.index(world.asked(fx.InvalidateEnd)[0])
    free = [at for at, effect in enumerate(world.log) if isinstance(effect, fx.Free)]
    assert begin < free[1] < end


def test_a_page_handed_out_during_a_punch_is_invalidated_before_it_is_freed() -> None:
    """RFC_V1: get_pfn holds no lock, so it can meet a folio that is being truncated."""
    world = GmemWorld()
    inode = world.bound(SIZE_2M, SIZE_2M, shared=False)
    world.run(world.core.fallocate(inode.number, ALLOCATE, 0, SIZE_2M))
    punch = world.task(world.core.fallocate(inode.number, PUNCH, 0, SIZE_2M))
    punch.run_until(fx.InvalidateView)
    handed = world.run(world.get_pfn(inode, 3))

    punch.finish()

    assert handed.order == 9
    kinds = [type(effect) for effect in world.log]
    assert kinds.index(fx.InvalidateBegin) < kinds.index(fx.Free)
    assert fx.InvalidateEnd in kinds
    world.check()


def test_a_guest_fault_waits_for_a_truncation_and_gets_a_new_folio() -> None:
    world = GmemWorld()
    inode = world.bound(SIZE_2M, SIZE_2M, shared=False)
    world.run(world.core.fallocate(inode.number, ALLOCATE, 0, SIZE_2M))
    punch = world.task(world.core.fallocate(inode.number, PUNCH, 0, SIZE_2M))
    punch.run_until(fx.ClearUptodate)
    fault = world.task(world.get_pfn(inode, 3))
    fault.run_until_blocked()

    punch.finish()
    assert inode.statistics().whole_folios == 0
    fault.finish()
    assert inode.statistics().whole_folios == 1
    world.check()


def test_a_guest_fault_whose_folio_is_punched_tries_again() -> None:
    world = GmemWorld()
    inode = world.bound(SIZE_2M, SIZE_2M, shared=False)
    fault = world.task(world.get_pfn(inode, 3))
    fault.run_until(fx.Prepare)
    fault.step()
    world.run(world.core.fallocate(inode.number, PUNCH, 0, SIZE_2M))
    assert inode.statistics().whole_folios == 0
    fault.finish()
    assert inode.statistics().whole_folios == 1
    world.check()


def test_a_punch_that_fails_reopens_the_views_and_ends_the_bracket() -> None:
    world = GmemWorld()
    inode = world.bound(2 * SIZE_2M, SIZE_2M)
    for pgoff in (0, 512):
        world.write(inode, HOST, pgoff, "a")
    world.fail_next(fx.Reconstruct, Reason.PEER_RESTARTED, after=1)
    with pytest.raises(KernelError):
        world.run(world.core.fallocate(inode.number, PUNCH, 0, 2 * SIZE_2M))
    assert inode.filemap.present(inode.whole) == [512]
    world.check()
    assert world.read(inode, HOST, 512) == "a"


def test_clients_that_refault_too_fast_stop_a_punch_before_it_begins() -> None:
    world = GmemWorld()
    inode = world.bound(SIZE_2M, SIZE_2M)
    world.write(inode, HOST, 0, "a")
    world.fail_next(fx.QuiesceView, Reason.PAGE_IN_USE)
    with refused(world, Reason.PAGE_IN_USE):
        world.run(world.core.fallocate(inode.number, PUNCH, 0, SIZE_2M))


# Punching what somebody holds: RFC_V1 does not check.


@pytest.mark.parametrize("page_size", [PAGE_SIZE, SIZE_2M])
def test_a_punched_folio_lives_until_its_last_hold_goes(page_size: int) -> None:
    world = GmemWorld()
    inode = world.bound(4 * page_size, page_size)
    base = world.snapshot()
    holds = []
    for first, pages in ((1, 1), (0, 2 * page_size // PAGE_SIZE)):
        target = part(inode, first, pages)
        pin = world.core.pin(target, HoldKind.PIN, holder="nic", client="dev")
        holds.append(world.run(pin))

    world.run(world.core.fallocate(inode.number, PUNCH, 0, 4 * page_size))
    assert inode.statistics().orphaned_folios == 2
    assert inode.statistics().st_blocks == 0

    # The hold is on the folio that was: the new one at its place may be converted.
    assert world.read(inode, HOST, 1) == 0
    world.run(world.convert(part(inode, 0, 4), shared=False))
    world.run(world.core.unpin(holds[1]))
    world.check()
    world.run(world.core.unpin(holds[0]))
    assert inode.statistics().orphaned_folios == 0
    world.run(world.convert(part(inode, 0, 4), shared=True))
    world.run(world.core.fallocate(inode.number, PUNCH, 0, 4 * page_size))
    assert world.snapshot() == base
    world.check()


def test_a_hold_on_half_of_what_is_punched_keeps_the_other_half() -> None:
    world = GmemWorld()
    inode = world.bound(8 * PAGE_SIZE)
    target = part(inode, 2, 4)
    hold = world.run(world.core.pin(target, HoldKind.PIN, holder="n", client="c"))
    world.run(world.core.fallocate(inode.number, PUNCH, 3 << 12, 2 << 12))
    assert inode.statistics().orphaned_folios == 2

    with pytest.raises(KernelError) as caught:
        world.run(world.convert(part(inode, 3, 5), shared=False))
    assert caught.value.numbers["error_offset"] == 5 << 12
    world.run(world.core.unpin(hold))
    world.check()


def test_a_hold_that_ends_during_a_punch_leaves_nothing_split() -> None:
    world = GmemWorld()
    inode = world.bound(SIZE_2M, SIZE_2M)
    base = world.snapshot()
    hold = world.run(
        world.core.pin(part(inode, 0), HoldKind.PIN, holder="n", client="c")
    )
    punch = world.task(world.core.fallocate(inode.number, PUNCH, 0, SIZE_2M))
    punch.run_until(fx.ClearUptodate)
    world.run(world.core.unpin(hold))
    punch.finish()
    assert world.snapshot() == base
    world.check()
