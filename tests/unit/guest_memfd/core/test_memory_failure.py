"""Memory errors: who loses what, what every call does about it, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from gmem.effects import Effect, Op
from gmem.guest_memfd.core import effects as fx
from gmem.guest_memfd.core.inode import Inode
from gmem.guest_memfd.core.memory_failure import KillPolicy
from gmem.guest_memfd.core.values import (
    GuestPage,
    HoldKind,
    Mapped,
    Sigbus,
    ViewKind,
)
from gmem.uapi.errors import Errno, Poisoned, Reason, TransportError
from gmem.uapi.flags import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from gmem.uapi.pages import PAGE_SHIFT, PAGE_SIZE, SIZE_1G, SIZE_2M, PgRange
from tests.support.gmem_world import (
    EIO,
    VM,
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
Maker = Callable[..., Inode]
MAKERS: dict[str, Callable[[GmemWorld], Maker]] = {
    "RFC_V1": lambda world: world.bound,
    "RFC_V2": lambda world: world.created_v2,
}
LINEAGES = pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
PUNCH = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
BAD = 5


def inject(world: GmemWorld, inode: Inode, pgoff: int, **more: Any) -> Any:
    return world.run(
        world.core.inject_memory_error(inode.number, pgoff << PAGE_SHIFT, **more)
    )


def unpoison(inode: Inode, world: GmemWorld, pgoff: int) -> Op[Any]:
    return world.core.unpoison(inode.number, pgoff << PAGE_SHIFT)


def private(world: GmemWorld, maker: Callable[[GmemWorld], Maker], size: int) -> Inode:
    """Two units of private pages; the guest has touched both."""
    inode = maker(world)(2 * size, max(size, PAGE_SIZE), shared=False)
    for pgoff in (0, size >> PAGE_SHIFT):
        world.run(world.get_pfn(inode, pgoff))
    return inode


@LINEAGES
@pytest.mark.parametrize("page_size", [SIZE_2M, SIZE_1G], ids=["2M", "1G"])
def test_an_error_in_a_whole_folio_takes_all_of_it(
    maker: Callable[[GmemWorld], Maker], page_size: int
) -> None:
    world = GmemWorld()
    inode = private(world, maker, page_size)
    world.write(inode, GUEST, 0, "secret")
    failure = inject(world, inode, BAD)
    assert failure.pages == PgRange(0, page_size >> PAGE_SHIFT)
    assert inode.statistics().poisoned_offsets == (BAD << PAGE_SHIFT,)
    for pgoff in (0, BAD, failure.pages.stop - 1):
        assert world.read(inode, GUEST, pgoff) == EIO
        with refused(world, Reason.PAGE_POISONED) as caught:
            world.run(world.get_pfn(inode, pgoff))
        assert caught.value.errno == Errno.EHWPOISON
        # What the exit has as its flag.
        assert caught.value.numbers["private"] == 1
    assert world.read(inode, GUEST, failure.pages.stop) == 0
    world.check()

    # It stays in the filemap, and comes back as it was.
    assert inode.statistics().whole_folios == 2
    world.run(unpoison(inode, world, BAD))
    assert world.read(inode, GUEST, 0) == "secret"
    world.check()


@SIZES
@LINEAGES
def test_an_error_in_a_shared_page_takes_the_page(
    maker: Callable[[GmemWorld], Maker], page_size: int
) -> None:
    world = GmemWorld()
    inode = maker(world)(max(page_size, 16 * PAGE_SIZE), page_size)
    for pgoff in range(8):
        world.write(inode, HOST, pgoff, pgoff)
    failure = inject(world, inode, BAD)
    assert failure.pages == PgRange(BAD, BAD + 1)
    assert world.read(inode, HOST, BAD) == EIO
    assert world.run(world.fault(inode, BAD)) == Sigbus(Reason.PAGE_POISONED)
    assert world.read(inode, HOST, BAD - 1) == BAD - 1
    assert isinstance(world.run(world.fault(inode, BAD + 1)), Mapped)
    world.check()
    world.run(unpoison(inode, world, BAD))
    assert world.read(inode, HOST, BAD) == BAD
    world.check()


@LINEAGES
def test_every_vm_that_was_handed_a_page_of_the_folio_zaps_it(
    maker: Callable[[GmemWorld], Maker],
) -> None:
    world = GmemWorld()
    inode = private(world, maker, SIZE_2M)
    inject(world, inode, BAD)
    (begin,) = world.asked(fx.InvalidateBegin)
    (end,) = world.asked(fx.InvalidateEnd)
    assert begin.vm == VM
    assert begin.gfns == end.gfns == PgRange(0x100000, 0x100000 + 512)


@LINEAGES
@pytest.mark.parametrize("step", [fx.Allocate, fx.AttachFolio, fx.Prepare])
def test_a_guest_fault_that_is_under_way_is_refused_or_told(
    maker: Callable[[GmemWorld], Maker], step: type[Effect[Any]]
) -> None:
    """Whatever meets an error: its VM does not keep the page."""
    world = GmemWorld()
    inode = maker(world)(SIZE_2M, SIZE_2M, shared=False)
    fault = world.task(world.get_pfn(inode, 3))
    fault.run_until(step)
    world.log.clear()
    error = world.task(world.core.inject_memory_error(inode.number, 0))
    while not error.done:
        if not error.step():
            fault.step()
    was_hole = error.error is not None
    with suppress(Poisoned):
        fault.finish()
        assert was_hole or world.asked(fx.InvalidateBegin)
    if was_hole:
        inject(world, inode, 0)
    with refused(world, Reason.PAGE_POISONED):
        world.run(world.get_pfn(inode, 3))
    assert not inode.bindings.handed_out_in(inode.whole)


def test_today_whoever_has_the_page_mapped_is_killed() -> None:
    world = GmemWorld()
    inode = world.bound(SIZE_2M, SIZE_2M)
    world.run(world.fault(inode, BAD))
    world.mappings[inode.number] = [mapped(BAD), mapped(BAD, pid=2, comm="b")]
    failure = inject(world, inode, BAD)
    assert failure.errno == Errno.EBUSY
    assert failure.signalled == failure.mapped == ("pid 4711 (loader)", "pid 2 (b)")


@pytest.mark.parametrize(
    ("kill", "dirty", "signalled"),
    [
        (KillPolicy.EARLY, True, ("pid 4711 (loader)",)),
        (KillPolicy.EARLY, False, ()),
        (KillPolicy.LATE, True, ()),
        (KillPolicy.LATE, False, ()),
    ],
)
def test_the_mended_kernel_respects_the_kill_policy(
    kill: KillPolicy, dirty: bool, signalled: tuple[str, ...]
) -> None:
    world = GmemWorld()
    inode = world.bound(16 * PAGE_SIZE)
    world.run(world.fault(inode, BAD))
    world.mappings[inode.number] = [mapped(BAD)]
    if dirty:
        world.dirty.add((inode.number, HOST, BAD))
    failure = inject(world, inode, BAD, kill=kill)
    assert (failure.errno, failure.dirty) == (0, dirty)
    assert failure.signalled == signalled


def test_an_unmapped_page_kills_nobody() -> None:
    world = GmemWorld()
    inode = world.bound(16 * PAGE_SIZE)
    world.run(world.fault(inode, BAD))
    assert inject(world, inode, BAD, kill=KillPolicy.EARLY).signalled == ()


@SIZES
def test_a_hole_and_a_poisoned_page_take_no_error(page_size: int) -> None:
    world = GmemWorld()
    inode = world.bound(max(page_size, 16 * PAGE_SIZE), page_size)
    inject_again = world.core.inject_memory_error(inode.number, BAD << PAGE_SHIFT)
    with refused(world, Reason.FOLIO_UNKNOWN):
        world.run(inject_again)
    world.run(world.fault(inode, BAD))
    inject(world, inode, BAD)
    with refused(world, Reason.PAGE_POISONED):
        inject(world, inode, BAD)
    with refused(world, Reason.FRAME_UNKNOWN):
        world.run(unpoison(inode, world, BAD + 1))


def test_an_error_waits_for_nobody_that_cannot_be_looked_into() -> None:
    world = GmemWorld()
    inode = world.bound(16 * PAGE_SIZE)
    world.run(world.fault(inode, BAD))
    world.fail_next(fx.FindMappings, Reason.PAGE_IN_USE)
    with refused(world, Reason.PAGE_IN_USE):
        inject(world, inode, BAD)


def test_an_allocator_that_does_not_answer_leaves_the_page() -> None:
    world = GmemWorld()
    inode = world.bound(16 * PAGE_SIZE)
    world.run(world.fault(inode, BAD))
    before = world.snapshot()
    world.fail_next(fx.PoisonFrame, TransportError("gone"))
    with pytest.raises(TransportError):
        inject(world, inode, BAD)
    assert world.snapshot() == before
    world.check()


@LINEAGES
@pytest.mark.parametrize("page_size", [SIZE_2M, SIZE_1G], ids=["2M", "1G"])
def test_sharing_a_part_of_a_lost_folio_brings_the_rest_back(
    maker: Callable[[GmemWorld], Maker], page_size: int
) -> None:
    world = GmemWorld()
    inode = private(world, maker, page_size)
    world.write(inode, GUEST, 9, "kept")
    inject(world, inode, BAD)
    world.run(world.convert(part(inode, 0, 2), shared=True))
    assert inode.statistics().split_folios == 1
    assert isinstance(world.run(world.get_pfn(inode, 9)), GuestPage)
    keeps = inode.rules.restructure.keeps_content
    assert world.read(inode, GUEST, 9) == ("kept" if keeps else 0)
    assert world.read(inode, GUEST, BAD) == EIO
    assert world.read(inode, HOST, 0) != EIO
    world.check()


@LINEAGES
@pytest.mark.parametrize("page_size", [SIZE_2M, SIZE_1G], ids=["2M", "1G"])
def test_a_split_folio_with_an_error_is_not_made_whole(
    maker: Callable[[GmemWorld], Maker], page_size: int
) -> None:
    world = GmemWorld()
    inode = maker(world)(page_size, page_size)
    world.run(world.fault(inode, BAD))
    inject(world, inode, BAD)
    world.run(world.convert(whole(inode), shared=False))
    assert not world.asked(fx.Reconstruct)
    assert inode.statistics().split_folios == 1
    assert isinstance(world.run(world.get_pfn(inode, BAD + 1)), GuestPage)
    with refused(world, Reason.PAGE_POISONED):
        world.run(world.get_pfn(inode, BAD))
    world.check()

    # Without the error the next conversion makes it whole.
    world.run(unpoison(inode, world, BAD))
    world.run(world.convert(whole(inode), shared=True))
    world.run(world.convert(whole(inode), shared=False))
    assert inode.statistics().whole_folios == 1
    world.check()


@LINEAGES
@SIZES
def test_a_page_stays_lost_through_conversions(
    maker: Callable[[GmemWorld], Maker], page_size: int
) -> None:
    world = GmemWorld()
    inode = maker(world)(max(page_size, 16 * PAGE_SIZE), page_size)
    world.run(world.fault(inode, BAD))
    inject(world, inode, BAD)
    for shared in (False, True, False, True):
        world.run(world.convert(part(inode, BAD - 1, 3), shared=shared))
        assert world.read(inode, HOST, BAD) == EIO
        assert world.read(inode, GUEST, BAD) == EIO
        world.check()


@LINEAGES
@SIZES
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "private"])
def test_a_punched_folio_is_replaced_by_a_healthy_one(
    maker: Callable[[GmemWorld], Maker], page_size: int, shared: bool
) -> None:
    world = GmemWorld()
    inode = maker(world)(max(page_size, 16 * PAGE_SIZE), page_size, shared=shared)
    view = HOST if shared else GUEST

    def touch() -> object:
        if shared:
            return world.run(world.fault(inode, BAD))
        return world.run(world.get_pfn(inode, BAD))

    touch()
    pfn = inject(world, inode, BAD).pfn
    world.run(world.core.fallocate(inode.number, PUNCH, 0, inode.i_size))
    assert inode.statistics().poisoned_pages == 0
    touch()
    assert world.read(inode, view, BAD) == 0
    world.check()
    (frame,) = world.memory.poisoned_frames()
    assert (frame.pfn, frame.handle) == (pfn, 0)
    world.memory.unpoison(pfn)
    assert world.memory.statistics().meminfo.hardware_corrupted_kb == 0


@pytest.mark.parametrize("page_size", [SIZE_2M, SIZE_1G], ids=["2M", "1G"])
def test_punching_a_part_of_a_folio_does_not_mend_it(page_size: int) -> None:
    world = GmemWorld()
    inode = world.bound(page_size, page_size)
    world.run(world.fault(inode, BAD))
    inject(world, inode, BAD)
    world.run(world.core.fallocate(inode.number, PUNCH, BAD << PAGE_SHIFT, PAGE_SIZE))
    assert world.read(inode, HOST, BAD) == EIO
    assert inode.statistics().poisoned_pages == 1
    world.check()


@LINEAGES
@SIZES
def test_eviction_gives_back_all_but_the_bad_frame(
    maker: Callable[[GmemWorld], Maker], page_size: int
) -> None:
    world = GmemWorld()
    before = world.memory.statistics()
    inode = maker(world)(max(page_size, 16 * PAGE_SIZE), page_size)
    world.run(world.fault(inode, BAD))
    pfn = inject(world, inode, BAD).pfn
    world.run(world.core.close(inode.number))
    world.run_work()
    assert world.core.numbers == []
    assert world.memory.reservations() == ()
    (frame,) = world.memory.poisoned_frames()
    assert (frame.pfn, frame.nr_pages, frame.handle) == (pfn, 1, 0)
    world.memory.unpoison(pfn)
    if page_size > PAGE_SIZE:
        nr = before.pool(page_size).nr_huge_pages
        assert world.memory.update_pool(page_size, nr).missing_pages == 0
    assert world.memory.statistics().levels() == before.levels()


def test_an_allocation_finds_its_folio_there_poisoned_or_not() -> None:
    world = GmemWorld()
    inode = world.bound(16 * PAGE_SIZE)
    world.run(world.fault(inode, BAD))
    inject(world, inode, BAD)
    world.run(world.core.fallocate(inode.number, FALLOC_FL_KEEP_SIZE, 0, inode.i_size))
    assert inode.statistics().whole_folios == 16
    world.check()


@pytest.mark.parametrize("kind", HoldKind)
def test_a_poisoned_page_cannot_be_held(kind: HoldKind) -> None:
    world = GmemWorld()
    inode = world.bound(16 * PAGE_SIZE)
    world.run(world.fault(inode, BAD))
    inject(world, inode, BAD)
    with refused(world, Reason.PAGE_POISONED) as caught:
        world.run(world.core.pin(whole(inode), kind, holder="dev", client="c"))
    assert caught.value.numbers["error_offset"] == BAD << PAGE_SHIFT
    world.run(world.core.pin(part(inode, 0, BAD), kind, holder="dev", client="c"))


@LINEAGES
def test_a_poisoned_page_cannot_be_populated(
    maker: Callable[[GmemWorld], Maker],
) -> None:
    world = GmemWorld()
    world.descriptors["fd"] = "image"
    inode = private(world, maker, SIZE_2M)
    inject(world, inode, BAD)
    with refused(world, Reason.PAGE_POISONED):
        world.run(world.core.populate(part(inode, 100, 2), "fd", 0))


def test_a_held_folio_that_is_punched_is_withheld_when_it_is_put() -> None:
    world = GmemWorld()
    inode = world.bound(16 * PAGE_SIZE)
    hold = world.run(
        world.core.pin(part(inode, BAD), HoldKind.PIN, holder="dev", client="c")
    )
    pfn = inject(world, inode, BAD).pfn
    world.run(world.core.fallocate(inode.number, PUNCH, 0, inode.i_size))
    (frame,) = world.memory.poisoned_frames()
    assert frame.handle == inode.handle
    world.run(world.core.unpin(hold))
    (frame,) = world.memory.poisoned_frames()
    assert (frame.pfn, frame.handle) == (pfn, 0)
