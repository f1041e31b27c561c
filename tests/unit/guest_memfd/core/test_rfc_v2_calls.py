"""Creation, binding, ioctls, guest faults and punching of RFC_V2."""

from __future__ import annotations

from typing import Any

import pytest

from gmem.guest_memfd.core import effects as fx
from gmem.guest_memfd.core.inode import Inode
from gmem.guest_memfd.core.values import (
    GuestPage,
    HoldKind,
    PageState,
    UserspaceSide,
    ViewKind,
    WrongAccess,
)
from gmem.uapi.errors import Contended, Reason
from gmem.uapi.flags import Faultability
from gmem.uapi.lineage import Lineage
from gmem.uapi.pages import PAGE_SHIFT, PAGE_SIZE, SIZE_1G, SIZE_2M, Gfn
from tests.support.gmem_world import EIO, VM, GmemWorld, part, refused, whole

HOST, GUEST = ViewKind.HOST, ViewKind.GUEST
GFN = 0x100000
SIZES = pytest.mark.parametrize(
    "page_size", [PAGE_SIZE, SIZE_2M, SIZE_1G], ids=["4K", "2M", "1G"]
)
KINDS = pytest.mark.parametrize("kind", list(HoldKind), ids=lambda kind: kind.value)


def saved_pages(world: GmemWorld) -> int:
    return world.memory.statistics().vmemmap.saved_pages


def pin(
    world: GmemWorld,
    inode: Inode,
    page: int,
    kind: HoldKind = HoldKind.PIN,
    name: str = "nic",
) -> int:
    return world.run(world.core.pin(part(inode, page), kind, holder=name, client="dev"))


def allocate(world: GmemWorld, inode: Inode) -> None:
    world.run(world.core.fallocate(inode.number, 1, 0, inode.i_size))


# What a new file is.


@pytest.mark.parametrize(
    ("support_shared", "init_private", "host", "guest"),
    [
        (True, False, PageState.OPEN, PageState.CLOSED),
        (True, True, PageState.CLOSED, PageState.OPEN),
        (False, False, PageState.CLOSED, PageState.OPEN),
    ],
    ids=["SUPPORT_SHARED", "INIT_PRIVATE", "none"],
)
def test_flags_say_who_may_fault_and_bind_changes_nothing(
    support_shared: bool, init_private: bool, host: PageState, guest: PageState
) -> None:
    world = GmemWorld()
    inode = world.create(
        2 * SIZE_2M,
        SIZE_2M,
        lineage=Lineage.RFC_V2,
        support_shared=support_shared,
        init_private=init_private,
    )
    assert world.asked(fx.AddInode)[-1].host_mmap is support_shared
    for _ in range(2):
        table = world.tables[inode.number]
        assert set(table.views[HOST]) == {host}
        assert set(table.views[GUEST]) == {guest}
        world.check()
        if not inode.bindings.all:
            world.run(world.bind(inode, shared=not support_shared))


@pytest.mark.parametrize(
    ("lineage", "flags", "reason"),
    [
        (Lineage.RFC_V1, {"support_shared": True}, Reason.FLAG_UNKNOWN),
        (Lineage.RFC_V1, {"init_private": True}, Reason.FLAG_UNKNOWN),
        (Lineage.RFC_V2, {"init_private": True}, Reason.FLAG_COMBINATION),
    ],
)
def test_flags_that_a_lineage_does_not_have_reserve_nothing(
    lineage: Lineage, flags: dict[str, Any], reason: Reason
) -> None:
    world = GmemWorld()
    with refused(world, reason):
        world.create(SIZE_2M, SIZE_2M, lineage=lineage, **flags)


@pytest.mark.parametrize(
    ("inode_given", "offset", "accepted"),
    [
        ("same", 0, True),
        ("same", SIZE_2M, False),
        ("other", 0, False),
        ("no view", 0, False),
        ("none", 0, True),
    ],
)
def test_userspace_must_map_this_file_at_this_offset_or_nothing(
    inode_given: str, offset: int, accepted: bool
) -> None:
    world = GmemWorld()
    kinds: dict[str, Any] = {"lineage": Lineage.RFC_V2, "support_shared": True}
    inode = world.create(2 * SIZE_2M, SIZE_2M, **kinds)
    other = world.create(SIZE_2M, SIZE_2M, **kinds)
    given = {"same": inode.number, "other": other.number, "no view": None}
    userspace = (
        None if inode_given == "none" else UserspaceSide(given[inode_given], offset)
    )
    op = world.core.bind(
        inode.number,
        VM,
        0,
        base_gfn=Gfn(GFN),
        offset=0,
        size=SIZE_2M,
        host_faultable=False,
        vmm_target="unix:vmm",
        userspace=userspace,
    )
    if accepted:
        world.run(op)
    else:
        with refused(world, Reason.USERSPACE_ELSEWHERE):
            world.run(op)
    assert world.core.supports_shared(inode.number)


def test_a_file_that_cannot_be_shared_does_not_look_at_userspace() -> None:
    world = GmemWorld()
    inode = world.create(SIZE_2M, SIZE_2M, lineage=Lineage.RFC_V2)
    op = world.core.bind(
        inode.number,
        VM,
        0,
        base_gfn=Gfn(GFN),
        offset=0,
        size=SIZE_2M,
        host_faultable=False,
        vmm_target="unix:vmm",
        userspace=UserspaceSide(None, 4096),
    )
    world.run(op)
    assert not world.core.supports_shared(inode.number)
    assert not world.core.supports_shared(99)
    # Its map of who may fault is empty in the series: nothing ever differs.
    before = world.snapshot()
    world.run(world.convert(whole(inode), shared=True))
    assert world.snapshot() == before


# The ioctls.


def ioctl(
    world: GmemWorld, inode: Inode, offset: int, size: int, error_offset: int = 0
) -> None:
    op = world.core.convert_ioctl(
        inode.number,
        Faultability.GUEST,
        offset=offset,
        size=size,
        error_offset=error_offset,
    )
    world.run(op)


@pytest.mark.parametrize(
    ("offset", "size", "error_offset", "reason"),
    [
        (0, PAGE_SIZE, PAGE_SIZE, Reason.ARGUMENT_INVALID),
        (0, 5 * PAGE_SIZE, 0, Reason.RANGE_PAST_END),
        (5 * PAGE_SIZE, PAGE_SIZE, 0, Reason.RANGE_PAST_END),
        ((1 << 64) - PAGE_SIZE, PAGE_SIZE, 0, Reason.RANGE_PAST_END),
        (1, PAGE_SIZE, 0, Reason.RANGE_UNALIGNED),
        (0, 1, 0, Reason.RANGE_UNALIGNED),
    ],
)
def test_the_ioctl_checks_in_the_order_of_the_series(
    offset: int, size: int, error_offset: int, reason: Reason
) -> None:
    world = GmemWorld()
    inode = world.created_v2(4 * PAGE_SIZE)
    with refused(world, reason) as caught:
        ioctl(world, inode, offset, size, error_offset)
    assert caught.value.errno == 22
    ioctl(world, inode, 0, PAGE_SIZE)
    assert inode.statistics().private_pages == 1


def test_the_ioctl_of_nothing_succeeds_and_of_the_first_series_is_unknown() -> None:
    world = GmemWorld()
    inode = world.created_v2(4 * PAGE_SIZE)
    before = world.snapshot()
    ioctl(world, inode, 3, 0)
    assert world.snapshot() == before
    first = world.bound(PAGE_SIZE)
    with refused(world, Reason.IOCTL_UNKNOWN):
        ioctl(world, first, 0, PAGE_SIZE)


# The guest.


@pytest.mark.parametrize(
    ("page", "meant", "found"),
    [
        (0, Faultability.GUEST, WrongAccess()),
        (3, Faultability.ALL, WrongAccess()),
        (0, Faultability.ALL, (True, 3)),
        (0, None, (True, 3)),
        (2, None, (True, 1)),
        (3, None, (False, 1)),
        (3, Faultability.GUEST, (False, 1)),
    ],
)
def test_the_file_says_what_an_access_may_be(
    page: int, meant: Faultability | None, found: WrongAccess | tuple[bool, int]
) -> None:
    world = GmemWorld()
    inode = world.created_v2(8 * PAGE_SIZE)
    world.run(world.convert(part(inode, 3, 2), shared=False))
    op = world.core.get_pfn(
        inode.number, VM, 0, Gfn(GFN + page), meant=meant, nr_pages=100
    )
    outcome = world.run(op)
    if isinstance(outcome, GuestPage):
        assert (outcome.shared, outcome.nr_pages) == found
    else:
        assert outcome == found
        assert inode.statistics().st_blocks == 0
    world.check()


def test_a_guest_fault_waits_for_a_conversion() -> None:
    world = GmemWorld()
    inode = world.created_v2(PAGE_SIZE)
    convert = world.task(world.convert(whole(inode), shared=False))
    convert.run_until(fx.QuiesceView)
    fault = world.task(world.get_pfn(inode, 0))
    fault.run_until_blocked()
    convert.finish()
    assert not fault.finish().shared


# Punching.


def punch(world: GmemWorld, inode: Inode, offset: int, size: int) -> None:
    world.run(world.core.fallocate(inode.number, 3, offset, size))


def test_punching_a_held_split_folio_is_refused_and_earlier_pages_are_gone() -> None:
    world = GmemWorld()
    inode = world.created_v2(3 * SIZE_2M, SIZE_2M)
    allocate(world, inode)
    hold = pin(world, inode, 600, HoldKind.PLAIN, "gup")
    world.write(inode, HOST, 601, "kept")
    with pytest.raises(Contended) as caught:
        punch(world, inode, 0, inode.i_size)
    assert caught.value.numbers["error_offset"] == 600 << PAGE_SHIFT
    assert caught.value.numbers["holders"] == "gup"
    assert inode.filemap.present(inode.whole) == [512, 1024]
    assert world.read(inode, HOST, 601) == "kept"
    world.check()
    world.run(world.core.unpin(hold))
    punch(world, inode, 0, inode.i_size)
    assert inode.statistics().st_blocks == 0


def test_punching_a_held_4k_page_orphans_it() -> None:
    world = GmemWorld()
    inode = world.created_v2(4 * PAGE_SIZE)
    allocate(world, inode)
    hold = pin(world, inode, 1)
    punch(world, inode, 0, inode.i_size)
    assert inode.statistics().orphaned_folios == 1
    world.run(world.core.unpin(hold))
    assert inode.statistics().orphaned_folios == 0
    world.check()


@SIZES
def test_punching_keeps_faultability_and_zeroes(page_size: int) -> None:
    world = GmemWorld()
    inode = world.created_v2(2 * page_size, page_size)
    allocate(world, inode)
    world.run(world.convert(part(inode, 1), shared=False))
    world.write(inode, HOST, 0, "a")
    punch(world, inode, 0, inode.i_size)
    assert world.read(inode, HOST, 0) == 0
    assert world.read(inode, HOST, 1) == EIO
    world.check()
