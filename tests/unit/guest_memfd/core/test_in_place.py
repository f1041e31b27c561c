"""Conversion of IN_PLACE: what it does, what it refuses, what a failure leaves."""

from __future__ import annotations

import pytest

from gmem.guest_memfd.core import effects as fx
from gmem.guest_memfd.core.inode import Inode
from gmem.guest_memfd.core.values import HoldKind, PageState, ViewKind
from gmem.uapi.errors import Contended, KernelError, Reason, TransportError
from gmem.uapi.pages import PAGE_SHIFT, PAGE_SIZE, SIZE_1G, SIZE_2M, PgRange
from tests.support.gmem_world import EIO, GmemWorld, mapped, part, refused, whole

HOST, GUEST = ViewKind.HOST, ViewKind.GUEST
GFN = 0x100000
SIZES = pytest.mark.parametrize(
    "page_size", [PAGE_SIZE, SIZE_2M, SIZE_1G], ids=["4K", "2M", "1G"]
)
HUGE = pytest.mark.parametrize("page_size", [SIZE_2M, SIZE_1G], ids=["2M", "1G"])
KINDS = pytest.mark.parametrize("kind", list(HoldKind), ids=lambda kind: kind.value)
BOTH_WAYS = pytest.mark.parametrize(
    "shared", [True, False], ids=["to shared", "to private"]
)


def hold(
    world: GmemWorld, inode: Inode, page: int, kind: HoldKind = HoldKind.PIN
) -> int:
    return world.run(
        world.core.pin(part(inode, page), kind, holder="nic", client="dev")
    )


def allocate(world: GmemWorld, inode: Inode) -> None:
    world.run(world.core.fallocate(inode.number, 1, 0, inode.i_size))


def runs(inode: Inode) -> list[tuple[int, int, bool]]:
    return [
        (run.pages.start, run.pages.stop, run.faultability.name == "ALL")
        for run in inode.faultability.runs(inode.whole)
    ]


# What a conversion does.


@SIZES
def test_contents_are_kept_both_ways(page_size: int) -> None:
    world = GmemWorld()
    inode = world.created_in_place(2 * page_size, page_size)
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


@HUGE
def test_one_page_splits_its_huge_page_and_makes_it_whole_again(page_size: int) -> None:
    world = GmemWorld()
    inode = world.created_in_place(2 * page_size, page_size, shared=False)
    allocate(world, inode)
    saved = world.memory.statistics().vmemmap.saved_pages
    world.write(inode, GUEST, 5, "neighbour")
    world.run(world.convert(part(inode, 3), shared=True))
    assert inode.statistics().split_folios == 1
    assert world.read(inode, GUEST, 5) == "neighbour"
    world.run(world.convert(part(inode, 3), shared=False))
    assert inode.statistics().split_folios == 0
    assert world.memory.statistics().vmemmap.saved_pages == saved
    assert world.read(inode, GUEST, 5) == "neighbour"
    world.check()


@SIZES
@BOTH_WAYS
def test_a_range_that_has_it_already_is_left_alone(
    page_size: int, shared: bool
) -> None:
    world = GmemWorld()
    inode = world.created_in_place(2 * page_size, page_size, shared=shared)
    if shared:
        hold(world, inode, 0)
    world.log.clear()
    world.run(world.convert(whole(inode), shared=shared))
    changing = (fx.QuiesceView, fx.InvalidateView, fx.SetViewState, fx.Record)
    assert [e for e in world.log if isinstance(e, changing)] == []


def test_4k_pages_are_one_step() -> None:
    world = GmemWorld()
    inode = world.created_in_place(4 * PAGE_SIZE)
    allocate(world, inode)
    world.mappings[inode.number] = [mapped(1), mapped(3)]
    world.log.clear()
    world.run(world.convert(part(inode, 0, 3), shared=False))
    quiesced = [e.pages for e in world.asked(fx.QuiesceView)]
    assert quiesced == [PgRange(0, 3)]
    assert world.asked(fx.DrainLru) == []
    assert world.mappings[inode.number] == [mapped(3)]
    assert world.asked(fx.FindMappings) == []


def test_each_huge_page_is_a_step_with_its_own_record_and_bracket() -> None:
    world = GmemWorld()
    inode = world.created_in_place(3 * SIZE_2M, SIZE_2M, shared=False)
    allocate(world, inode)
    for index in range(3):
        world.run(world.get_pfn(inode, index << 9))
    world.log.clear()
    world.run(world.convert(part(inode, 100, 1200), shared=True))
    words = {fx.InvalidateBegin: "begin", fx.Split: "split", fx.Record: "record"}
    words[fx.InvalidateEnd] = "end"
    seen = [words[type(e)] for e in world.log if type(e) in words]
    assert seen == ["begin", "split", "record", "end"] * 3
    gfns = [e.gfns for e in world.asked(fx.InvalidateBegin)]
    assert gfns == [PgRange(GFN + at, GFN + at + 512) for at in (0, 512, 1024)]
    withdrawn = [e.pages for e in world.asked(fx.InvalidateView)]
    assert withdrawn == [PgRange(100, 512), PgRange(512, 1024), PgRange(1024, 1300)]
    assert runs(inode) == [
        (0, 100, False),
        (100, 1300, True),
        (1300, 1536, False),
    ]


def test_the_vm_is_told_after_the_references_were_looked_at() -> None:
    world = GmemWorld()
    inode = world.created_in_place(2 * PAGE_SIZE)
    world.run(world.get_pfn(inode, 0))
    nic = hold(world, inode, 0)
    world.log.clear()
    with refused(world, Reason.PAGE_IN_USE):
        world.run(world.convert(whole(inode), shared=False))
    assert world.asked(fx.InvalidateBegin) == []
    world.run(world.core.unpin(nic))
    world.run(world.convert(whole(inode), shared=False))
    assert len(world.asked(fx.InvalidateBegin)) == 1


# What it refuses.


@SIZES
@KINDS
def test_a_held_page_is_eagain_at_its_offset_and_only_unmapped(
    page_size: int, kind: HoldKind
) -> None:
    world = GmemWorld()
    inode = world.created_in_place(max(4 * PAGE_SIZE, page_size), page_size)
    allocate(world, inode)
    world.write(inode, HOST, 3, "kept")
    nic = hold(world, inode, 2, kind)
    world.mappings[inode.number] = [mapped(1)]
    target = part(inode, 1, 3)
    with refused(world, Reason.PAGE_IN_USE) as caught:
        world.run(world.convert(target, shared=False))

    assert isinstance(caught.value, Contended)
    assert str(caught.value).startswith("EAGAIN (page_in_use): the page at offset")
    numbers = caught.value.numbers
    assert numbers["error_offset"] == 2 << PAGE_SHIFT
    assert (numbers["inode"], numbers["holders"]) == (inode.number, "nic")
    # The host's mappings are gone, and nothing else.
    assert world.mappings[inode.number] == []
    assert world.read(inode, HOST, 3) == "kept"
    # Once, and it is looked at again after that.
    assert len(world.asked(fx.DrainLru)) == 1
    world.run(world.core.unpin(nic))
    world.run(world.convert(target, shared=False))
    assert len(world.asked(fx.DrainLru)) == 1
    world.check()


@SIZES
def test_error_offset_is_never_before_the_range(page_size: int) -> None:
    world = GmemWorld()
    inode = world.created_in_place(max(SIZE_2M, page_size), page_size)
    world.run(
        world.core.pin(part(inode, 0, 8), HoldKind.PIN, holder="nic", client="dev")
    )
    with refused(world, Reason.PAGE_IN_USE) as caught:
        world.run(world.convert(part(inode, 4, 8), shared=False))
    assert caught.value.numbers["error_offset"] == 4 << PAGE_SHIFT


def test_a_reference_of_a_moment_is_gone_after_the_drain() -> None:
    world = GmemWorld()
    inode = world.created_in_place(4 * PAGE_SIZE)
    allocate(world, inode)
    moment = hold(world, inode, 2)
    task = world.task(world.convert(whole(inode), shared=False))
    task.run_until(fx.DrainLru)
    world.run(world.core.unpin(moment))
    task.finish()
    assert inode.statistics().shared_pages == 0
    assert len(world.asked(fx.DrainLru)) == 1
    world.check()


@SIZES
def test_validate_only_and_a_wait_that_ends_in_vain_change_nothing(
    page_size: int,
) -> None:
    world = GmemWorld()
    inode = world.created_in_place(4 * page_size, page_size)
    hold(world, inode, len(inode.whole) - 1)
    world.mappings[inode.number] = [mapped(0)]
    with refused(world, Reason.PAGE_IN_USE):
        world.run(world.convert(whole(inode), shared=False, validate_only=True))
    with refused(world, Reason.DEADLINE):
        world.run(world.convert(whole(inode), shared=False, wait_ms=0))
    assert world.mappings[inode.number] == [mapped(0)]
    world.run(world.convert(part(inode, 0), shared=False, validate_only=True))
    assert world.mappings[inode.number] == [mapped(0)]


@BOTH_WAYS
def test_a_vm_without_private_memory_converts_nothing(shared: bool) -> None:
    world = GmemWorld()
    inode = world.created_in_place(PAGE_SIZE, shared=False)
    plain = world.create(
        PAGE_SIZE,
        lineage=inode.options.lineage,
        mmap=True,
        init_shared=not shared,
        private_memory=False,
    )
    with refused(world, Reason.ATTRIBUTE_UNSUPPORTED):
        world.run(world.convert(whole(plain), shared=shared))


# What a failure leaves.


@HUGE
def test_what_lies_before_a_held_page_stays_converted(page_size: int) -> None:
    world = GmemWorld()
    inode = world.created_in_place(3 * page_size, page_size)
    allocate(world, inode)
    pages = page_size >> PAGE_SHIFT
    world.write(inode, HOST, 0, "first")
    nic = hold(world, inode, pages + 7)
    with pytest.raises(Contended) as caught:
        world.run(world.convert(whole(inode), shared=False))
    assert caught.value.numbers["error_offset"] == (pages + 7) << PAGE_SHIFT
    assert runs(inode) == [(0, pages, False), (pages, 3 * pages, True)]
    assert inode.statistics().split_folios == 2
    assert world.read(inode, GUEST, 0) == "first"
    world.check()

    # Whoever goes on from there, or begins anew, comes to the same.
    world.run(world.core.unpin(nic))
    world.run(world.convert(whole(inode), shared=False))
    assert runs(inode) == [(0, 3 * pages, False)]
    assert inode.statistics().split_folios == 0
    world.check()


@pytest.mark.parametrize("splits_before", [0, 1, 2])
def test_a_split_that_fails_stops_there(splits_before: int) -> None:
    world = GmemWorld()
    inode = world.created_in_place(3 * SIZE_2M, SIZE_2M, shared=False)
    allocate(world, inode)
    world.write(inode, GUEST, 300, "kept")
    world.fail_next(fx.Split, Reason.VMEMMAP_RESTORE_FAILED, after=splits_before)
    with pytest.raises(KernelError) as caught:
        world.run(world.convert(part(inode, 256, 1280), shared=True))
    assert caught.value.reason is Reason.VMEMMAP_RESTORE_FAILED
    at = [256, 512, 1024][splits_before]
    assert caught.value.numbers["error_offset"] == at << PAGE_SHIFT
    assert caught.value.numbers["inode"] == inode.number
    assert inode.faultability.shared_pages == at - 256
    assert inode.statistics().split_folios == splits_before
    kept = HOST if splits_before else GUEST
    assert world.read(inode, kept, 300) == "kept"
    world.check()


def test_a_reconstruction_that_nobody_answers_stops_there() -> None:
    world = GmemWorld()
    inode = world.created_in_place(3 * SIZE_2M, SIZE_2M)
    allocate(world, inode)
    world.fail_next(fx.Reconstruct, TransportError("no answer"), after=1)
    with pytest.raises(TransportError):
        world.run(world.convert(whole(inode), shared=False))
    assert runs(inode) == [(0, 512, False), (512, 1536, True)]
    assert inode.statistics().split_folios == 2
    world.check()


@BOTH_WAYS
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
def test_whatever_fails_leaves_whole_steps(
    kind: type, reason: Reason, after: int, shared: bool
) -> None:
    world = GmemWorld()
    inode = world.created_in_place(3 * SIZE_2M, SIZE_2M, shared=not shared)
    allocate(world, inode)
    world.fail_next(kind, reason, after=after)
    task = world.task(world.convert(whole(inode), shared=shared))
    while not task.done:
        task.step()
    done = 3
    if task.error is not None:
        assert isinstance(task.error, KernelError)
        assert task.error.reason is reason
        assert task.error.numbers["error_offset"] == after * SIZE_2M
        done = after
    expected = [(0, 512 * done, shared), (512 * done, 1536, not shared)]
    assert runs(inode) == [run for run in expected if run[0] < run[1]]
    world.check()


def test_nobody_gets_sigbus_from_a_step_that_fails() -> None:
    world = GmemWorld()
    inode = world.created_in_place(SIZE_2M, SIZE_2M)
    allocate(world, inode)
    world.fail_next(fx.Reconstruct, Reason.PEER_RESTARTED)
    task = world.task(world.convert(whole(inode), shared=False))
    while not task.done:
        states = set(world.tables[inode.number].views[HOST])
        assert states <= {PageState.OPEN, PageState.QUIESCED}
        task.step()
    world.check()


def test_ranges_are_calls_one_after_the_other() -> None:
    world = GmemWorld()
    one, two, three = [world.created_in_place(2 * PAGE_SIZE) for _ in range(3)]
    hold(world, two, 1)
    with pytest.raises(Contended) as caught:
        world.run(world.convert(whole(one), whole(two), whole(three), shared=False))
    numbers = caught.value.numbers
    assert (numbers["inode"], numbers["error_offset"]) == (two.number, PAGE_SIZE)
    shared = [inode.statistics().shared_pages for inode in (one, two, three)]
    assert shared == [0, 2, 2]
    world.check()
