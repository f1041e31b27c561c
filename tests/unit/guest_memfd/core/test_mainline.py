"""MAINLINE: what its flags make of a file, and that no file is converted."""

from __future__ import annotations

from typing import Any

import pytest

from gmem.guest_memfd.core import effects as fx
from gmem.guest_memfd.core.inode import Inode
from gmem.guest_memfd.core.values import (
    GuestPage,
    HoldKind,
    Mapped,
    PageState,
    Sigbus,
    ViewKind,
)
from gmem.uapi.errors import Errno, Reason, Unsupported
from gmem.uapi.flags import FALLOC_FL_KEEP_SIZE, Faultability
from gmem.uapi.lineage import Lineage
from gmem.uapi.pages import PAGE_SIZE, SIZE_1G, SIZE_2M
from tests.support.gmem_world import EIO, GmemWorld, part, refused, whole

HOST, GUEST = ViewKind.HOST, ViewKind.GUEST


def made(
    world: GmemWorld, *, mmap: bool = True, init_shared: bool = True, pages: int = 4
) -> Inode:
    return world.create(
        pages * PAGE_SIZE,
        lineage=Lineage.MAINLINE,
        mmap=mmap,
        init_shared=init_shared,
    )


def bound(world: GmemWorld, **flags: Any) -> Inode:
    inode = made(world, **flags)
    world.run(world.bind(inode))
    return inode


@pytest.mark.parametrize("mmap", [True, False], ids=["MMAP", "no MMAP"])
@pytest.mark.parametrize(
    ("init_shared", "host", "guest"),
    [
        (True, PageState.OPEN, PageState.CLOSED),
        (False, PageState.CLOSED, PageState.OPEN),
    ],
    ids=["INIT_SHARED", "private"],
)
@pytest.mark.parametrize("default_of_the_vm", [True, False])
def test_each_flag_stands_for_itself_and_bind_changes_nothing(
    mmap: bool,
    init_shared: bool,
    host: PageState,
    guest: PageState,
    default_of_the_vm: bool,
) -> None:
    world = GmemWorld()
    inode = made(world, mmap=mmap, init_shared=init_shared)
    assert world.asked(fx.AddInode)[-1].host_mmap is mmap
    assert world.core.supports_shared(inode.number) is mmap
    for _ in range(2):
        table = world.tables[inode.number]
        assert set(table.views[HOST]) == {host}
        assert set(table.views[GUEST]) == {guest}
        if not inode.bindings.all:
            world.run(world.bind(inode, shared=default_of_the_vm))
    world.check()


def test_st_blocks_counts_nothing() -> None:
    world = GmemWorld()
    inode = made(world, mmap=True, init_shared=True)
    assert not world.asked(fx.AddInode)[-1].counts_blocks
    world.run(world.core.fallocate(inode.number, FALLOC_FL_KEEP_SIZE, 0, inode.i_size))
    assert inode.filemap.nr_whole == inode.i_size // PAGE_SIZE
    assert inode.statistics().st_blocks == 0


@pytest.mark.parametrize("page_size", [SIZE_2M, SIZE_1G], ids=["2M", "1G"])
def test_there_are_no_huge_pages(page_size: int) -> None:
    world = GmemWorld()
    with refused(world, Reason.PAGE_SIZE_UNKNOWN) as caught:
        world.create(page_size, page_size, lineage=Lineage.MAINLINE, mmap=True)
    assert "4K only" in str(caught.value)


@pytest.mark.parametrize(
    ("lineage", "flag"),
    [
        (Lineage.MAINLINE, "support_shared"),
        (Lineage.MAINLINE, "init_private"),
        (Lineage.RFC_V1, "mmap"),
        (Lineage.RFC_V1, "init_shared"),
        (Lineage.RFC_V2, "mmap"),
        (Lineage.RFC_V2, "init_shared"),
    ],
)
def test_flags_of_another_lineage_reserve_nothing(lineage: Lineage, flag: str) -> None:
    world = GmemWorld()
    with refused(world, Reason.FLAG_UNKNOWN) as caught:
        flags: dict[str, Any] = {flag: True}
        world.create(PAGE_SIZE, lineage=lineage, **flags)
    assert flag in str(caught.value)


@pytest.mark.parametrize("shared", [True, False], ids=["to shared", "to private"])
@pytest.mark.parametrize("wait_ms", [None, 1000])
@pytest.mark.parametrize("validate_only", [True, False])
def test_no_range_is_converted(
    shared: bool, wait_ms: int | None, validate_only: bool
) -> None:
    world = GmemWorld()
    inode = bound(world)
    with refused(world, Reason.IOCTL_UNKNOWN) as caught:
        world.run(
            world.convert(
                whole(inode),
                shared=shared,
                validate_only=validate_only,
                wait_ms=wait_ms,
            )
        )
    assert caught.value.errno == Errno.ENOTTY
    assert "KVM_SET_MEMORY_ATTRIBUTES" in str(caught.value)


def test_the_ioctls_of_other_series_are_not_there() -> None:
    world = GmemWorld()
    inode = bound(world)
    with pytest.raises(Unsupported) as caught:
        world.run(
            world.core.convert_ioctl(
                inode.number,
                Faultability.GUEST,
                offset=0,
                size=PAGE_SIZE,
                error_offset=0,
            )
        )
    assert caught.value.reason is Reason.IOCTL_UNKNOWN


def test_the_host_faults_a_page_if_and_only_if_it_began_shared() -> None:
    world = GmemWorld()
    shared, private = bound(world), bound(world, init_shared=False)
    assert isinstance(world.run(world.fault(shared, 1)), Mapped)
    assert world.run(world.fault(private, 1)) == Sigbus(Reason.PAGE_NOT_FAULTABLE)
    assert world.run(world.fault(shared, 4)) == Sigbus(Reason.RANGE_PAST_END)
    assert world.read(shared, HOST, 1) == 0
    assert world.read(private, HOST, 1) == EIO


@pytest.mark.parametrize("init_shared", [True, False])
def test_a_guest_is_handed_either_kind_at_4k(init_shared: bool) -> None:
    world = GmemWorld()
    inode = bound(world, init_shared=init_shared)
    found = world.run(world.get_pfn(inode, 2))
    assert isinstance(found, GuestPage)
    assert (found.order, found.shared) == (0, init_shared)
    view = HOST if init_shared else GUEST
    world.write(inode, view, 2, "kept")
    assert world.read(inode, view, 2) == "kept"


def test_a_punch_goes_through_whoever_holds_the_page() -> None:
    world = GmemWorld()
    inode = bound(world)
    world.write(inode, HOST, 1, "old")
    hold = world.run(
        world.core.pin(part(inode, 1), HoldKind.PIN, holder="nic", client="dev")
    )
    world.run(world.core.fallocate(inode.number, 3, 0, inode.i_size))
    assert inode.statistics().orphaned_folios == 1
    assert world.read(inode, HOST, 1) == 0
    world.run(world.core.unpin(hold))
    assert inode.statistics().orphaned_folios == 0
    world.check()


def test_a_held_page_outlives_its_inode_and_comes_back_when_it_is_put() -> None:
    world = GmemWorld()
    before = world.memory.statistics()
    inode = bound(world)
    world.run(world.core.fallocate(inode.number, 1, 0, inode.i_size))
    hold = world.run(
        world.core.pin(part(inode, 1), HoldKind.PIN, holder="nic", client="dev")
    )
    world.run(world.core.close(inode.number))
    assert world.core.numbers == []
    assert world.memory.statistics() != before
    world.run(world.core.unpin(hold))
    world.run_work()
    assert world.memory.statistics().levels() == before.levels()
    world.check()


def test_a_journal_keeps_the_flags() -> None:
    world = GmemWorld()
    inode = made(world, init_shared=False)
    assert world.rows[f"inode/{inode.number}/head"]["mmap"] is True
    again = type(world.core)()
    again.restore(world.rows, epoch=2)
    options = again.inode(inode.number).options
    assert (options.mmap, options.init_shared) == (True, False)
    assert options.lineage is Lineage.MAINLINE
