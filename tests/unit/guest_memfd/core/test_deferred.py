"""Eviction in RFC_V2: split folios come back page by page, and are merged at last."""

from __future__ import annotations

import pytest

from gmem.guest_memfd.core import deferred as module
from gmem.guest_memfd.core import effects as fx
from gmem.guest_memfd.core.inode import Inode
from gmem.guest_memfd.core.values import HoldKind, MergeStatus, ViewKind
from gmem.uapi.errors import NoSuchObject, Reason, TransportError
from gmem.uapi.pages import PAGE_SIZE, SIZE_1G, SIZE_2M
from tests.support.gmem_world import GmemWorld, part

SIZES = pytest.mark.parametrize("page_size", [SIZE_2M, SIZE_1G], ids=["2M", "1G"])


def hold(world: GmemWorld, inode: Inode, page: int, pages: int = 1) -> int:
    target = part(inode, page, pages)
    op = world.core.pin(target, HoldKind.PLAIN, holder="nic", client="dev/1")
    return world.run(op)


def allocated(world: GmemWorld, size: int, page_size: int) -> Inode:
    inode = world.created_v2(size, page_size)
    world.run(world.core.fallocate(inode.number, 1, 0, size))
    return inode


def close(world: GmemWorld, inode: Inode) -> None:
    world.run(world.core.close(inode.number))


def status(world: GmemWorld, number: int = 1) -> MergeStatus:
    return world.core.deferred.status(number)


@SIZES
def test_statistics_recover_after_eviction_not_in_it(page_size: int) -> None:
    world = GmemWorld()
    before = world.snapshot()
    inode = allocated(world, 2 * page_size, page_size)
    close(world, inode)
    assert world.core.numbers == []
    assert world.asked(fx.Reconstruct) == []
    assert status(world) == MergeStatus(1, inode.number, 0, 2, done=False)
    world.run_work()
    assert status(world) == MergeStatus(1, inode.number, 0, 0, done=True)
    assert world.snapshot() == before
    world.check()


@SIZES
def test_whole_folios_go_at_once(page_size: int) -> None:
    world = GmemWorld()
    before = world.snapshot()
    inode = world.created_v2(2 * page_size, page_size, shared=False)
    world.run(world.core.fallocate(inode.number, 1, 0, 2 * page_size))
    close(world, inode)
    assert world.snapshot() == before
    assert world.work == []
    assert world.core.deferred.numbers == []


@SIZES
def test_a_pinned_page_of_a_dead_inode_comes_back_with_its_last_hold(
    page_size: int,
) -> None:
    world = GmemWorld()
    before = world.snapshot()
    inode = allocated(world, 2 * page_size, page_size)
    holds = [hold(world, inode, 3, 2), hold(world, inode, 4, 2)]
    close(world, inode)
    assert world.core.numbers == []
    world.run_work()
    assert status(world) == MergeStatus(1, inode.number, 3, 1, done=False)
    world.core.check_all()

    world.run(world.core.unpin(holds[0]))
    assert status(world).pages_left == 2
    assert world.work == []
    world.run(world.core.unpin(holds[1]))
    assert status(world).pages_left == 0
    world.run_work()
    assert status(world).done
    assert world.snapshot() == before
    with pytest.raises(NoSuchObject) as caught:
        world.run(world.core.unpin(holds[1]))
    assert caught.value.reason is Reason.HOLDER_UNKNOWN
    world.check()


def test_4k_folios_and_orphans_that_are_held_come_back_too() -> None:
    world = GmemWorld()
    before = world.snapshot()
    inode = allocated(world, 8 * PAGE_SIZE, PAGE_SIZE)
    for page in (1, 5):
        hold(world, inode, page)
    world.run(world.core.fallocate(inode.number, 3, PAGE_SIZE, PAGE_SIZE))
    assert inode.statistics().orphaned_folios == 1
    close(world, inode)
    assert status(world) == MergeStatus(1, inode.number, 2, 2, done=False)
    world.run(world.core.client_gone("dev/1"))
    world.run_work()
    assert status(world).done
    assert world.asked(fx.Reconstruct) == []
    assert world.snapshot() == before
    world.check()


def test_a_hold_that_ends_while_the_inode_is_evicted_is_not_waited_for() -> None:
    world = GmemWorld()
    before = world.snapshot()
    inode = allocated(world, SIZE_2M, SIZE_2M)
    pinned = hold(world, inode, 3)
    evict = world.task(world.core.close(inode.number))
    evict.run_until(fx.DetachFolio)
    world.run(world.core.unpin(pinned))
    evict.finish()
    world.run_work()
    assert status(world).done
    assert world.snapshot() == before


def test_an_allocator_that_does_not_answer_is_asked_again_with_the_next_page() -> None:
    world = GmemWorld()
    before = world.snapshot()
    inode = allocated(world, 2 * SIZE_2M, SIZE_2M)
    pinned = hold(world, inode, 600)
    close(world, inode)
    world.fail_next(fx.Free, TransportError("host_allocator does not answer"))
    world.run_work()
    failed = status(world)
    assert (failed.done, failed.folios_left) == (False, 2)
    assert failed.error == "host_allocator does not answer"
    world.run(world.core.unpin(pinned))
    world.run_work()
    assert status(world) == MergeStatus(1, inode.number, 0, 0, done=True)
    assert len(world.asked(fx.Reconstruct)) == 2
    assert world.snapshot() == before


def test_a_merge_is_run_by_one_at_a_time() -> None:
    world = GmemWorld()
    before = world.snapshot()
    inode = allocated(world, 2 * SIZE_2M, SIZE_2M)
    pinned = hold(world, inode, 600)
    close(world, inode)
    first = world.task(world.core.merge(1))
    first.run_until(fx.Reconstruct)
    world.run(world.core.merge(1))
    # It comes while somebody is at work, who takes it along.
    world.run(world.core.unpin(pinned))
    world.work.clear()
    first.finish()
    assert status(world).done
    assert world.snapshot() == before
    world.run(world.core.merge(99))


def test_old_merges_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MERGES_KEPT_MAX", 2)
    world = GmemWorld()
    for _ in range(4):
        close(world, allocated(world, SIZE_2M, SIZE_2M))
        world.run_work()
    assert world.core.deferred.numbers == [3, 4]
    with pytest.raises(NoSuchObject) as caught:
        status(world, 1)
    assert caught.value.reason is Reason.OPERATION_UNKNOWN


def test_open_views_keep_an_inode_and_holds_do_not() -> None:
    world = GmemWorld()
    inode = allocated(world, SIZE_2M, SIZE_2M)
    world.core.view_opened(inode.number, ViewKind.HOST)
    hold(world, inode, 0)
    close(world, inode)
    assert world.core.numbers == [inode.number]
    world.run(world.core.view_released(inode.number, ViewKind.HOST))
    assert world.core.numbers == []
