"""Conversions that wait: for pins and mappings, with a deadline, without the lock."""

from __future__ import annotations

import pytest

from gmem.guest_memfd.core import effects as fx
from gmem.guest_memfd.core.inode import Inode
from gmem.guest_memfd.core.inodes import ByteRange
from gmem.guest_memfd.core.values import HoldKind, ViewKind
from gmem.uapi.errors import BadRequest, Contended, Errno, NoSuchObject, Reason
from gmem.uapi.flags import Faultability
from gmem.uapi.lineage import Lineage
from gmem.uapi.pages import PAGE_SIZE, SIZE_2M
from gmem.uapi.waits import WAIT_MS_MAX
from tests.support.gmem_world import EIO, GmemWorld, Task, mapped, part, refused, whole

HOST = ViewKind.HOST


def pin(world: GmemWorld, inode: Inode, page: int, name: str = "nic") -> int:
    target = part(inode, page)
    return world.run(world.core.pin(target, HoldKind.PIN, holder=name, client="dev"))


def waiting(world: GmemWorld, op: Task[None]) -> Task[None]:
    """Step it to its wait, and see that it does not go on by itself."""
    op.run_until(fx.WaitForRelease)
    assert not op.step()
    return op


def test_it_converts_when_the_pin_is_gone() -> None:
    world = GmemWorld()
    inode = world.bound(4 * PAGE_SIZE)
    hold = pin(world, inode, 1)
    convert = world.convert(whole(inode), shared=False, wait_ms=1000)
    task = waiting(world, world.task(convert))
    world.run(world.core.unpin(hold))
    task.finish()
    assert world.read(inode, HOST, 1) == EIO
    assert world.asked(fx.TellReleased) == [fx.TellReleased(inode.number)]
    world.check()


def test_meanwhile_the_lock_is_free_and_nothing_has_changed() -> None:
    world = GmemWorld()
    inode = world.bound(4 * PAGE_SIZE)
    world.write(inode, HOST, 1, "before")
    hold = pin(world, inode, 1)
    before = world.snapshot()
    convert = world.convert(whole(inode), shared=False, wait_ms=1000)
    task = waiting(world, world.task(convert))

    assert inode.invalidate_lock.idle
    assert world.snapshot() == before
    assert world.read(inode, HOST, 1) == "before"
    world.run(world.core.fallocate(inode.number, 1, 0, PAGE_SIZE))
    world.run(world.core.unpin(hold))
    task.finish()


def test_everything_is_checked_again() -> None:
    world = GmemWorld()
    inode = world.bound(4 * PAGE_SIZE)
    first = pin(world, inode, 1)
    convert = world.convert(whole(inode), shared=False, wait_ms=1000)
    task = waiting(world, world.task(convert))
    second = pin(world, inode, 2, "gpu")
    world.run(world.core.unpin(first))
    assert task.step()
    waiting(world, task)
    world.run(world.core.unpin(second))
    task.finish()
    assert inode.faultability.shared_pages == 0


def test_it_gives_up_at_the_deadline_and_names_the_holders() -> None:
    world = GmemWorld()
    inode = world.bound(4 * PAGE_SIZE)
    # Part of the range is private: the series' rollback would share it.
    world.run(world.convert(part(inode, 3), shared=False))
    pin(world, inode, 1)
    with refused(world, Reason.DEADLINE) as caught:
        convert = world.convert(whole(inode), shared=False, wait_ms=50)
        task = waiting(world, world.task(convert))
        world.clock.now = 50
        task.finish()
    error = caught.value
    assert isinstance(error, Contended)
    assert error.errno == Errno.ETIMEDOUT
    assert error.sentence.startswith("after 50 ms the page at offset 0x1000")
    assert (error.numbers["holders"], error.numbers["error_offset"]) == ("nic", 0x1000)


def test_no_wait_at_all_refuses_at_once_and_changes_nothing() -> None:
    world = GmemWorld()
    inode = world.bound(4 * PAGE_SIZE)
    world.run(world.convert(part(inode, 3), shared=False))
    pin(world, inode, 1)
    with refused(world, Reason.DEADLINE):
        world.run(world.convert(whole(inode), shared=False, wait_ms=0))


def test_mappings_are_looked_at_again_and_pins_are_not() -> None:
    world = GmemWorld()
    inode = world.bound(4 * PAGE_SIZE)
    world.run(world.core.fallocate(inode.number, 1, 0, inode.i_size))
    world.mappings[inode.number] = [mapped(2)]
    convert = world.convert(whole(inode), shared=False, wait_ms=1000)
    task = waiting(world, world.task(convert))
    world.clock.look_again = True
    assert task.step()
    waiting(world, task)
    world.mappings[inode.number] = []
    world.clock.look_again = True
    task.finish()

    world.run(world.convert(whole(inode), shared=True))
    pin(world, inode, 0)
    task = world.task(world.convert(whole(inode), shared=False, wait_ms=1000))
    world.clock.look_again = True
    waiting(world, task)


def test_a_scan_that_failed_is_made_again() -> None:
    world = GmemWorld()
    inode = world.bound(4 * PAGE_SIZE)
    world.run(world.core.fallocate(inode.number, 1, 0, inode.i_size))
    # Such a refusal has no number of the inode, nor of who has pages mapped.
    world.fail_next(fx.FindMappings, Reason.PAGE_IN_USE)
    convert = world.convert(whole(inode), shared=False, wait_ms=1000)
    task = waiting(world, world.task(convert))
    world.clock.look_again = True
    task.finish()


def test_only_pages_in_use_are_waited_for() -> None:
    world = GmemWorld(base_pages=1 << 12)
    inode = world.bound(SIZE_2M, SIZE_2M, shared=False)
    world.run(world.get_pfn(inode, 0))
    world.fail_next(fx.Split, Reason.VMEMMAP_RESTORE_FAILED)
    with pytest.raises(OSError, match="injected"):
        world.run(world.convert(part(inode, 0), shared=True, wait_ms=1000))
    world.fail_next(fx.FindMappings, Reason.INTERRUPTED)
    shared = world.bound(PAGE_SIZE)
    world.run(world.core.fallocate(shared.number, 1, 0, PAGE_SIZE))
    with pytest.raises(Contended, match="injected"):
        world.run(world.convert(whole(shared), shared=False, wait_ms=1000))


def test_a_stop_of_the_service_ends_the_wait() -> None:
    world = GmemWorld()
    inode = world.bound(PAGE_SIZE)
    pin(world, inode, 0)
    with refused(world, Reason.INTERRUPTED) as caught:
        convert = world.convert(whole(inode), shared=False, wait_ms=1000)
        task = waiting(world, world.task(convert))
        world.clock.stopping = True
        task.finish()
    assert caught.value.errno == Errno.EINTR


def test_a_client_that_ends_lets_go() -> None:
    world = GmemWorld()
    inode = world.bound(PAGE_SIZE)
    pin(world, inode, 0)
    convert = world.convert(whole(inode), shared=False, wait_ms=1000)
    task = waiting(world, world.task(convert))
    world.run(world.core.client_gone("dev"))
    task.finish()


def test_two_inodes_wait_for_the_one_that_is_held() -> None:
    world = GmemWorld()
    one, two = world.bound(PAGE_SIZE), world.create(PAGE_SIZE)
    world.run(world.bind(two, slot=1))
    hold = pin(world, two, 0)
    both = world.convert(whole(one), whole(two), shared=False, wait_ms=1000)
    task = waiting(world, world.task(both))
    assert isinstance(task.effect, fx.WaitForRelease)
    assert task.effect.inode == two.number
    world.run(world.core.unpin(hold))
    task.finish()
    assert one.faultability.shared_pages == two.faultability.shared_pages == 0


def test_an_inode_that_went_meanwhile_is_unknown() -> None:
    world = GmemWorld()
    inode = world.bound(PAGE_SIZE)
    hold = pin(world, inode, 0)
    convert = world.convert(whole(inode), shared=False, wait_ms=1000)
    task = waiting(world, world.task(convert))
    world.run(world.core.close(inode.number))
    world.run(world.core.unpin(hold))
    with pytest.raises(NoSuchObject) as caught:
        task.finish()
    assert caught.value.reason is Reason.INODE_UNKNOWN


def test_validate_only_waits_and_converts_nothing() -> None:
    world = GmemWorld()
    inode = world.bound(PAGE_SIZE)
    hold = pin(world, inode, 0)
    convert = world.convert(
        whole(inode), shared=False, validate_only=True, wait_ms=1000
    )
    task = waiting(world, world.task(convert))
    world.run(world.core.unpin(hold))
    task.finish()
    assert inode.faultability.shared_pages == 1


def test_arguments_are_refused_before_any_wait() -> None:
    world = GmemWorld()
    inode = world.bound(PAGE_SIZE)
    pin(world, inode, 0)
    too_long = world.convert(whole(inode), shared=False, wait_ms=WAIT_MS_MAX + 1)
    with refused(world, Reason.ARGUMENT_INVALID) as caught:
        world.run(too_long)
    assert str(WAIT_MS_MAX) in caught.value.sentence
    with refused(world, Reason.RANGE_EMPTY):
        world.run(world.convert(shared=False, wait_ms=5))
    unaligned = ByteRange(inode.number, 0, 1)
    with pytest.raises(BadRequest):
        world.run(world.convert(unaligned, shared=False, wait_ms=5))


def test_the_51_patches_wait_for_plain_references_too() -> None:
    world = GmemWorld()
    inode = world.created_v2(PAGE_SIZE)
    target = whole(inode)
    hold = world.run(world.core.pin(target, HoldKind.PLAIN, holder="gup", client="dev"))
    task = waiting(world, world.task(world.convert(target, shared=False, wait_ms=9)))
    assert inode.options.lineage is Lineage.RFC_V2
    world.run(world.core.unpin(hold))
    task.finish()
    assert inode.faultability[0] is Faultability.GUEST
