"""read and write: what a chunk needs, what it leaves, and who waits for it."""

from __future__ import annotations

import pytest

from gmem.guest_memfd.core import effects as fx
from gmem.guest_memfd.core.inodes import ByteRange
from gmem.guest_memfd.core.values import Mapped, ViewKind
from gmem.uapi.errors import KernelError, Reason
from gmem.uapi.flags import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from gmem.uapi.pages import PAGE_SIZE, SIZE_1G, SIZE_2M, PgRange
from tests.support.gmem_world import GmemWorld, mapped, part, refused

PUNCH = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
SIZES = pytest.mark.parametrize(
    "page_size", [PAGE_SIZE, SIZE_2M, SIZE_1G], ids=["4K", "2M", "1G"]
)


@SIZES
def test_what_was_written_is_read_and_what_lies_around_it_is_zero(
    page_size: int,
) -> None:
    world = GmemWorld()
    inode = world.bound(max(SIZE_2M, page_size), page_size)
    at = 3 * PAGE_SIZE - 2
    world.run(world.core.write(inode.number, at, b"abcde"))
    found = world.run(world.core.read(ByteRange(inode.number, at - 1, 8)))
    assert found == b"\0abcde\0\0"
    world.check()


def test_a_read_fills_holes_and_writes_back_and_unmaps_nothing() -> None:
    world = GmemWorld()
    inode = world.bound(2 * SIZE_2M, SIZE_2M)
    world.mappings[inode.number] = [mapped(511)]
    target = ByteRange(inode.number, SIZE_2M - 1, 2)
    assert world.run(world.core.read(target)) == bytes(2)
    assert inode.filemap.present(inode.whole) == [0, 512]
    (back,) = world.asked(fx.WriteBackView)
    assert back.pages == PgRange(511, 513)
    assert world.mappings[inode.number] == [mapped(511)]
    assert world.asked(fx.QuiesceView) == []
    world.check()


def test_a_write_quiesces_exactly_its_pages_and_opens_them_again() -> None:
    world = GmemWorld()
    inode = world.bound(SIZE_2M, SIZE_2M)
    world.mappings[inode.number] = [mapped(0), mapped(1), mapped(2)]
    world.run(world.core.write(inode.number, PAGE_SIZE, b"x"))
    (quiet,) = world.asked(fx.QuiesceView)
    assert quiet.pages == PgRange(1, 2)
    assert world.mappings[inode.number] == [mapped(0), mapped(2)]
    world.check()


@pytest.mark.parametrize("operation", ["read", "write"])
def test_bad_ranges_and_private_pages_are_refused_and_change_nothing(
    operation: str,
) -> None:
    world = GmemWorld()
    inode = world.bound(2 * SIZE_2M, SIZE_2M)
    world.run(world.convert(part(inode, 600), shared=False))

    def call(offset: int, size: int, number: int = inode.number) -> None:
        target = ByteRange(number, offset, size)
        if operation == "read":
            world.run(world.core.read(target))
        else:
            world.run(world.core.write(number, offset, bytes(size)))

    bad = [
        (Reason.RANGE_EMPTY, 0, 0),
        (Reason.RANGE_PAST_END, 2 * SIZE_2M - 1, 2),
        (Reason.RANGE_NEGATIVE, -1, 2),
        (Reason.PAGE_NOT_FAULTABLE, 600 * PAGE_SIZE - 1, 2),
        (Reason.PAGE_NOT_FAULTABLE, 601 * PAGE_SIZE - 1, 2),
    ]
    for reason, offset, size in bad:
        with refused(world, reason):
            call(offset, size)
        with refused(world, reason):
            world.core.check_bytes(ByteRange(inode.number, offset, size))
    with refused(world, Reason.PAGE_NOT_FAULTABLE) as caught:
        call(PAGE_SIZE, 2 * SIZE_2M - PAGE_SIZE)
    assert caught.value.numbers["error_offset"] == 600 * PAGE_SIZE
    with refused(world, Reason.FD_UNKNOWN):
        call(0, 1, number=77)
    world.core.check_bytes(ByteRange(inode.number, 0, 600 * PAGE_SIZE))


def test_a_closed_file_is_read_no_more_though_a_view_keeps_the_inode() -> None:
    world = GmemWorld()
    inode = world.bound(SIZE_2M, SIZE_2M)
    world.core.view_opened(inode.number, ViewKind.HOST)
    world.run(world.core.close(inode.number))
    with refused(world, Reason.FD_UNKNOWN):
        world.run(world.core.read(ByteRange(inode.number, 0, 1)))


@pytest.mark.parametrize(
    ("effect", "reason"),
    [
        (fx.QuiesceView, Reason.PAGE_IN_USE),
        (fx.QuiesceView, Reason.BINDING_BROKEN),
        (fx.Split, Reason.VMEMMAP_RESTORE_FAILED),
    ],
)
def test_a_write_that_fails_stores_nothing_and_leaves_its_pages_open(
    effect: type[fx.QuiesceView | fx.Split], reason: Reason
) -> None:
    world = GmemWorld()
    inode = world.bound(SIZE_2M, SIZE_2M)
    world.fail_next(effect, reason)
    with pytest.raises(KernelError) as caught:
        world.run(world.core.write(inode.number, 5, b"x"))
    assert caught.value.reason is reason
    world.check()
    assert world.run(world.core.read(ByteRange(inode.number, 0, 9))) == bytes(9)


def test_a_read_whose_views_have_ended_is_refused() -> None:
    world = GmemWorld()
    inode = world.bound(SIZE_2M, SIZE_2M)
    world.fail_next(fx.WriteBackView, Reason.BINDING_BROKEN)
    with pytest.raises(KernelError):
        world.run(world.core.read(ByteRange(inode.number, 0, 9)))
    world.check()


def test_readers_go_side_by_side_and_a_conversion_waits_for_them() -> None:
    world = GmemWorld()
    inode = world.bound(SIZE_2M, SIZE_2M)
    target = ByteRange(inode.number, 0, 10)
    one, two = (world.task(world.core.read(target)) for _ in range(2))
    one.run_until(fx.WriteBackView)
    two.run_until(fx.WriteBackView)
    convert = world.task(world.convert(part(inode, 0), shared=False))
    convert.run_until_blocked()
    assert (one.finish(), two.finish()) == (bytes(10), bytes(10))
    convert.finish()
    with refused(world, Reason.PAGE_NOT_FAULTABLE):
        world.run(world.core.read(target))


def test_a_conversion_before_a_write_refuses_it_and_one_after_it_waits() -> None:
    world = GmemWorld()
    inode = world.bound(SIZE_2M, SIZE_2M)
    world.run(world.fault(inode, 0))
    convert = world.task(world.convert(part(inode, 0), shared=False))
    convert.run_until(fx.FindMappings)
    late = world.task(world.core.write(inode.number, 0, b"late"))
    late.run_until_blocked()
    convert.finish()
    with pytest.raises(KernelError) as caught:
        late.finish()
    assert caught.value.reason is Reason.PAGE_NOT_FAULTABLE

    write = world.task(world.core.write(inode.number, PAGE_SIZE, b"soon"))
    write.run_until(fx.StoreBytes)
    again = world.task(world.convert(part(inode, 1), shared=False))
    again.run_until_blocked()
    write.finish()
    again.finish()
    world.check()


def test_a_host_fault_waits_for_a_write_and_finds_its_bytes() -> None:
    world = GmemWorld()
    inode = world.bound(SIZE_2M, SIZE_2M)
    write = world.task(world.core.write(inode.number, 0, b"w"))
    write.run_until(fx.StoreBytes)
    fault = world.task(world.fault(inode, 0))
    fault.run_until_blocked()
    write.finish()
    assert isinstance(fault.finish(), Mapped)
    assert world.run(world.core.read(ByteRange(inode.number, 0, 2))) == b"w\0"


def test_a_guest_fault_does_not_zero_what_a_write_is_storing() -> None:
    world = GmemWorld()
    inode = world.bound(SIZE_2M, SIZE_2M)
    write = world.task(world.core.write(inode.number, 0, b"kept"))
    write.run_until(fx.StoreBytes)
    # RFC_V1: it takes no lock, and zeroes a page that nobody has filled.
    guest = world.task(world.get_pfn(inode, 0))
    guest.run_until_blocked()
    write.finish()
    guest.finish()
    assert world.run(world.core.read(ByteRange(inode.number, 0, 4))) == b"kept"


def test_a_punch_between_two_chunks_leaves_a_hole_that_is_read_as_zeros() -> None:
    world = GmemWorld()
    inode = world.bound(SIZE_2M, SIZE_2M)
    world.run(world.core.write(inode.number, 0, b"gone"))
    world.run(world.core.fallocate(inode.number, PUNCH, 0, SIZE_2M))
    assert inode.filemap.present(inode.whole) == []
    assert world.run(world.core.read(ByteRange(inode.number, 0, 4))) == bytes(4)
