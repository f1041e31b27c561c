"""The rollback of RFC_V1: the opposite value over the whole of all ranges."""

from __future__ import annotations

import pytest

from gmem.guest_memfd.core import effects as fx
from gmem.guest_memfd.core.inode import Inode
from gmem.guest_memfd.core.values import Fragment, HoldKind, ViewKind
from gmem.uapi.errors import Contended, KernelError, Reason, TransportError
from gmem.uapi.flags import Faultability
from gmem.uapi.pages import PAGE_SIZE, SIZE_1G, SIZE_2M, PgRange
from tests.support.gmem_world import (
    EIO,
    GmemWorld,
    part,
    refused,
    whole,
)

HOST, GUEST = ViewKind.HOST, ViewKind.GUEST
SIZES = pytest.mark.parametrize(
    "page_size", [PAGE_SIZE, SIZE_2M, SIZE_1G], ids=["4K", "2M", "1G"]
)


def pin(world: GmemWorld, inode: Inode, page: int, kind: HoldKind, name: str) -> int:
    return world.run(world.core.pin(part(inode, page), kind, holder=name, client="dev"))


def test_a_refused_to_private_leaves_a_partly_private_range_shared_throughout() -> None:
    """Quirk: the rollback writes the opposite value over the whole range."""
    world = GmemWorld()
    inode = world.bound(3 * SIZE_2M, SIZE_2M, shared=False)
    world.run(world.core.fallocate(inode.number, 1, 0, 3 * SIZE_2M))
    world.run(world.convert(part(inode, 100), shared=True))
    pin(world, inode, 100, HoldKind.PIN, "nic")
    before = inode.statistics()

    with pytest.raises(Contended):
        world.run(world.convert(part(inode, 50, 1000), shared=False))

    after = inode.statistics()
    assert after.fragments == (
        Fragment(PgRange(0, 50), Faultability.GUEST),
        Fragment(PgRange(50, 1050), Faultability.ALL),
        Fragment(PgRange(1050, 1536), Faultability.GUEST),
    )
    assert (before.split_folios, after.split_folios) == (1, 3)
    assert after.rollback_warnings == 0
    world.check()


def test_a_rollback_reaches_every_inode() -> None:
    world = GmemWorld()
    one, two = world.bound(SIZE_2M, SIZE_2M), world.bound(SIZE_2M, SIZE_2M)
    for inode in (one, two):
        world.run(world.core.fallocate(inode.number, 1, 0, SIZE_2M))
    world.run(world.convert(part(one, 0, 512), shared=False))
    world.run(world.convert(part(one, 7), shared=True))
    pin(world, two, 0, HoldKind.PIN, "nic")

    with pytest.raises(Contended) as caught:
        world.run(world.convert(whole(one), whole(two), shared=False))

    assert caught.value.numbers["inode"] == two.number
    assert one.statistics().shared_pages == 512
    assert two.statistics().shared_pages == 512
    world.check()


@pytest.mark.parametrize("page_size", [SIZE_2M, SIZE_1G], ids=["2M", "1G"])
@pytest.mark.parametrize("splits_before", [0, 1, 2])
def test_a_split_that_fails_is_rolled_back(page_size: int, splits_before: int) -> None:
    world = GmemWorld()
    one = world.bound(2 * page_size, page_size, shared=False)
    two = world.bound(page_size, page_size, shared=False)
    for inode in (one, two):
        world.run(world.core.fallocate(inode.number, 1, 0, inode.i_size))
        world.write(inode, GUEST, 0, "lost or kept")
    before = world.snapshot()
    world.fail_next(fx.Split, Reason.VMEMMAP_RESTORE_FAILED, after=splits_before)

    with pytest.raises(KernelError) as caught:
        world.run(world.convert(whole(one), whole(two), shared=True))

    assert caught.value.reason is Reason.VMEMMAP_RESTORE_FAILED
    assert world.snapshot() == before
    assert world.read(two, GUEST, 0) == "lost or kept"
    assert world.read(one, GUEST, 0) == ("lost or kept" if not splits_before else 0)
    world.check()


def test_a_service_that_is_not_heard_is_rolled_back_too() -> None:
    world = GmemWorld()
    inode = world.bound(SIZE_2M, SIZE_2M, shared=False)
    world.run(world.core.fallocate(inode.number, 1, 0, SIZE_2M))
    before = world.snapshot()
    world.fail_next(fx.Split, TransportError("host_allocator does not answer"))
    with pytest.raises(TransportError):
        world.run(world.convert(whole(inode), shared=True))
    assert world.snapshot() == before
    world.check()


def test_vmemmap_that_is_really_gone_is_rolled_back() -> None:
    world = GmemWorld(base_pages=1 << 13)
    inode = world.bound(2 * SIZE_1G, SIZE_1G, shared=False)
    world.run(world.core.fallocate(inode.number, 1, 0, 2 * SIZE_1G))
    hog = world.create(1 << 30)
    free = world.memory.statistics().nodes[0].free_base_pages
    take = (free - 5000) * PAGE_SIZE
    world.run(world.core.fallocate(hog.number, 1, 0, take))
    with refused(world, Reason.VMEMMAP_RESTORE_FAILED):
        world.run(world.convert(whole(inode), shared=True))
    world.run(world.convert(part(inode, 0), shared=True))
    assert inode.statistics().split_folios == 1
    world.check()


def test_a_failed_to_shared_leaves_a_partly_shared_range_private_throughout() -> None:
    world = GmemWorld()
    inode = world.bound(2 * SIZE_2M, SIZE_2M, shared=False)
    world.run(world.core.fallocate(inode.number, 1, 0, 2 * SIZE_2M))
    world.run(world.convert(part(inode, 3), shared=True))
    world.fail_next(fx.Split, Reason.VMEMMAP_RESTORE_FAILED)

    with pytest.raises(KernelError):
        world.run(world.convert(whole(inode), shared=True))

    assert inode.statistics().shared_pages == 0
    assert inode.statistics().split_folios == 0
    assert inode.statistics().rollback_warnings == 0
    world.check()


def test_a_rollback_to_private_stops_at_a_pin_and_warns() -> None:
    world = GmemWorld()
    one = world.bound(2 * SIZE_2M, SIZE_2M, shared=False)
    two = world.bound(SIZE_2M, SIZE_2M, shared=False)
    for inode in (one, two):
        world.run(world.core.fallocate(inode.number, 1, 0, inode.i_size))
    world.run(world.convert(part(one, 3), shared=True))
    world.run(world.convert(part(two, 3), shared=True))
    pin(world, one, 3, HoldKind.PIN, "nic")
    world.fail_next(fx.Split, Reason.VMEMMAP_RESTORE_FAILED)

    with pytest.raises(KernelError):
        world.run(world.convert(whole(one), whole(two), shared=True))

    assert one.statistics().shared_pages == 0
    assert one.statistics().split_folios == 1
    assert one.statistics().rollback_warnings == 1
    assert two.statistics().shared_pages == 1  # Never reached, in either direction.
    assert two.statistics().rollback_warnings == 0
    world.check()


def test_a_rollback_to_shared_that_cannot_split_is_mended_by_the_next_fault() -> None:
    world = GmemWorld()
    inode = world.bound(3 * SIZE_2M, SIZE_2M, shared=False)
    world.run(world.core.fallocate(inode.number, 1, 0, 3 * SIZE_2M))
    world.run(world.convert(part(inode, 3), shared=True))
    pin(world, inode, 3, HoldKind.PIN, "nic")
    world.fail_next(fx.Split, Reason.VMEMMAP_RESTORE_FAILED)

    with pytest.raises(Contended):
        world.run(world.convert(part(inode, 0, 1030), shared=False))

    stats = inode.statistics()
    assert stats.shared_pages == 1030
    assert (stats.split_folios, stats.whole_folios) == (1, 2)
    assert stats.rollback_warnings == 1
    world.check()  # Whole folios with a shared page are reachable by nobody.

    assert world.read(inode, GUEST, 1100) == EIO
    assert world.run(world.get_pfn(inode, 1100)).order == 0
    assert world.read(inode, GUEST, 1100) == 0
    assert world.read(inode, HOST, 600) == 0
    assert inode.statistics().split_folios == 3
    world.check()


@pytest.mark.parametrize("shared", [True, False], ids=["to shared", "to private"])
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (fx.InvalidateView, Reason.OBJECT_IN_USE),
        (fx.QuiesceView, Reason.PAGE_IN_USE),
        (fx.Split, Reason.VMEMMAP_RESTORE_FAILED),
        (fx.Reconstruct, Reason.PEER_RESTARTED),
        (fx.FindMappings, Reason.DEADLINE),
    ],
)
@pytest.mark.parametrize("after", [0, 1, 2])
def test_whatever_fails_leaves_an_inode_that_holds_together(
    kind: type, reason: Reason, after: int, shared: bool
) -> None:
    world = GmemWorld()
    inode = world.bound(4 * SIZE_2M, SIZE_2M, shared=not shared)
    world.run(world.core.fallocate(inode.number, 1, 0, 4 * SIZE_2M))
    world.run(world.convert(part(inode, 700), shared=shared))
    world.fail_next(kind, reason, after=after)
    task = world.task(world.convert(whole(inode), shared=shared))
    while not task.done:
        task.step()
    if task.error is not None:
        assert isinstance(task.error, KernelError)
        assert task.error.reason is reason
    assert inode.statistics().shared_pages in (0, 2048)
    world.check()
