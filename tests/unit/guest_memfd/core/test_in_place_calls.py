"""Creation, the ioctl, guest faults, fallocate and eviction of IN_PLACE."""

from __future__ import annotations

from typing import Any

import pytest

from gmem.guest_memfd.core import effects as fx
from gmem.guest_memfd.core.inode import Inode
from gmem.guest_memfd.core.lineage import rules_of
from gmem.guest_memfd.core.registry import GuestMemfdCore
from gmem.guest_memfd.core.values import (
    AttributesCall,
    GuestPage,
    HoldKind,
    ViewKind,
    WrongAccess,
)
from gmem.uapi.errors import Contended, Errno, Reason, TransportError
from gmem.uapi.flags import Faultability
from gmem.uapi.lineage import Lineage
from gmem.uapi.pages import PAGE_SHIFT, PAGE_SIZE, SIZE_1G, SIZE_2M, Gfn
from tests.support.gmem_world import EIO, VM, GmemWorld, part, refused, whole

HOST, GUEST = ViewKind.HOST, ViewKind.GUEST
GFN = 0x100000
PRIVATE = 8
SIZES = pytest.mark.parametrize(
    "page_size", [PAGE_SIZE, SIZE_2M, SIZE_1G], ids=["4K", "2M", "1G"]
)
HUGE = pytest.mark.parametrize("page_size", [SIZE_2M, SIZE_1G], ids=["2M", "1G"])


def allocate(world: GmemWorld, inode: Inode) -> None:
    world.run(world.core.fallocate(inode.number, 1, 0, inode.i_size))


def hold(world: GmemWorld, inode: Inode, page: int) -> int:
    target = part(inode, page)
    return world.run(world.core.pin(target, HoldKind.PLAIN, holder="gup", client="d"))


# What a new file is.


@SIZES
@pytest.mark.parametrize("mmap", [True, False])
def test_every_page_begins_private(page_size: int, mmap: bool) -> None:
    world = GmemWorld()
    inode = world.create(page_size, page_size, lineage=Lineage.IN_PLACE, mmap=mmap)
    assert inode.statistics().shared_pages == 0
    assert world.core.supports_shared(inode.number) is mmap
    world.run(world.bind(inode, shared=True))
    assert inode.statistics().shared_pages == 0
    world.check()


def test_init_shared_begins_shared_and_is_for_4k_pages_alone() -> None:
    world = GmemWorld()
    made: dict[str, Any] = {"lineage": Lineage.IN_PLACE, "init_shared": True}
    assert world.create(2 * PAGE_SIZE, **made).statistics().shared_pages == 2
    with refused(world, Reason.FLAG_COMBINATION):
        world.create(SIZE_2M, SIZE_2M, **made)
    with refused(world, Reason.FLAG_UNKNOWN):
        world.create(PAGE_SIZE, lineage=Lineage.IN_PLACE, support_shared=True)


# The ioctl.


def ioctl(world: GmemWorld, inode: Inode, call: AttributesCall) -> None:
    world.run(world.core.attributes_ioctl(inode.number, call))


# Each call breaks the check of its line and all that come after it.
_LAST = {"offset": 8 * PAGE_SIZE, "size": PAGE_SIZE}
_UNALIGNED = {"offset": 1, "size": 8 * PAGE_SIZE}
_WRAPS = {"offset": (1 << 64) - 1, "size": PAGE_SIZE + 1}
ORDER: list[tuple[dict[str, Any], Reason]] = [
    (
        _WRAPS | {"flags": 1, "reserved": (1,) * 11, "attributes": 7},
        Reason.FLAG_UNKNOWN,
    ),
    (
        _WRAPS | {"reserved": (0,) * 10 + (1,), "attributes": 7},
        Reason.ARGUMENT_INVALID,
    ),
    (_WRAPS | {"attributes": 7}, Reason.ATTRIBUTE_UNSUPPORTED),
    (_WRAPS | {"attributes": PRIVATE | 1}, Reason.ATTRIBUTE_UNSUPPORTED),
    ({"offset": 1, "size": 0, "attributes": 0}, Reason.RANGE_EMPTY),
    (_WRAPS | {"attributes": PRIVATE}, Reason.RANGE_WRAPS),
    (_UNALIGNED | {"attributes": PRIVATE}, Reason.RANGE_UNALIGNED),
    ({"offset": 0, "size": 1, "attributes": 0}, Reason.RANGE_UNALIGNED),
    (_LAST | {"attributes": PRIVATE}, Reason.RANGE_PAST_END),
    (
        {"offset": PAGE_SIZE, "size": 4 * PAGE_SIZE, "attributes": 0},
        Reason.RANGE_PAST_END,
    ),
]


@pytest.mark.parametrize(("call", "reason"), ORDER)
def test_the_ioctl_checks_in_the_order_of_the_series(
    call: dict[str, Any], reason: Reason
) -> None:
    world = GmemWorld()
    inode = world.created_in_place(4 * PAGE_SIZE)
    with refused(world, reason) as caught:
        ioctl(world, inode, AttributesCall(**call))
    assert caught.value.errno == Errno.EINVAL


def test_error_offset_of_the_caller_is_ignored() -> None:
    world = GmemWorld()
    inode = world.created_in_place(4 * PAGE_SIZE)
    call = AttributesCall(PAGE_SIZE, PAGE_SIZE, PRIVATE, error_offset=7)
    ioctl(world, inode, call)
    assert inode.statistics().private_pages == 1
    ioctl(world, inode, AttributesCall(0, 4 * PAGE_SIZE, 0, error_offset=7))
    assert inode.statistics().private_pages == 0


@pytest.mark.parametrize("attributes", [0, PRIVATE])
def test_without_private_memory_the_attributes_are_einval(attributes: int) -> None:
    world = GmemWorld()
    inode = world.create(PAGE_SIZE, lineage=Lineage.IN_PLACE, private_memory=False)
    with refused(world, Reason.ATTRIBUTE_UNSUPPORTED):
        ioctl(world, inode, AttributesCall(0, PAGE_SIZE, attributes))


def test_each_lineage_has_its_own_ioctls() -> None:
    world = GmemWorld()
    second, third = world.created_v2(PAGE_SIZE), world.created_in_place(PAGE_SIZE)
    first = world.bound(PAGE_SIZE)
    for inode in (first, second):
        with refused(world, Reason.IOCTL_UNKNOWN):
            ioctl(world, inode, AttributesCall(0, PAGE_SIZE, PRIVATE))
    with refused(world, Reason.IOCTL_UNKNOWN):
        world.run(
            world.core.convert_ioctl(
                third.number, Faultability.GUEST, offset=0, size=0, error_offset=0
            )
        )


def test_a_host_that_was_booted_without_converts_no_file() -> None:
    world = GmemWorld()
    world.core = GuestMemfdCore(rules=rules_of(in_place_conversion=False))
    inode = world.create(PAGE_SIZE, lineage=Lineage.IN_PLACE, mmap=True)
    with refused(world, Reason.IOCTL_UNKNOWN) as caught:
        ioctl(world, inode, AttributesCall(1, 1, 1, flags=1))
    assert caught.value.errno == Errno.ENOTTY
    with refused(world, Reason.IOCTL_UNKNOWN):
        world.run(world.convert(whole(inode), shared=True))
    # The rest of the lineage is there, and the parameter outlives a restart.
    assert world.create(SIZE_2M, SIZE_2M, lineage=Lineage.IN_PLACE).order == 9
    again = GuestMemfdCore(rules=rules_of(in_place_conversion=False))
    again.restore(world.rows, epoch=2)
    assert again.inode(inode.number).rules.convert_ioctls == frozenset()


def test_the_parameter_changes_no_other_lineage() -> None:
    on, off = rules_of(in_place_conversion=True), rules_of(in_place_conversion=False)
    assert {lineage for lineage in on if on[lineage] != off[lineage]} == {
        Lineage.IN_PLACE
    }


# The guest.


@pytest.mark.parametrize(
    ("page", "meant", "found"),
    [
        (0, Faultability.GUEST, None),
        (0, Faultability.ALL, (True, 3)),
        (0, None, (True, 3)),
        (3, Faultability.ALL, None),
        (3, None, (False, 1)),
    ],
)
@pytest.mark.parametrize("mmap", [True, False])
def test_the_file_says_what_an_access_may_be(
    mmap: bool, page: int, meant: Faultability | None, found: tuple[bool, int] | None
) -> None:
    """Without MMAP shared memory is not the file's: nothing is allocated for it."""
    world = GmemWorld()
    inode = world.create(8 * PAGE_SIZE, lineage=Lineage.IN_PLACE, mmap=mmap)
    world.run(world.bind(inode))
    world.run(world.convert(part(inode, 0, 3), shared=True))
    op = world.core.get_pfn(
        inode.number, VM, 0, Gfn(GFN + page), meant=meant, nr_pages=100
    )
    outcome = world.run(op)
    if found is None:
        assert outcome == WrongAccess()
    else:
        assert isinstance(outcome, GuestPage)
        assert (outcome.shared, outcome.nr_pages) == found
    served = found is not None and (mmap or not found[0])
    assert bool(inode.statistics().st_blocks) is served
    world.check()


def test_a_vm_is_told_of_shared_pages_that_it_has_from_elsewhere() -> None:
    world = GmemWorld()
    inode = world.create(4 * PAGE_SIZE, lineage=Lineage.IN_PLACE)
    world.run(world.bind(inode))
    world.run(world.convert(whole(inode), shared=True))
    world.run(world.get_pfn(inode, 1))
    world.log.clear()
    world.run(world.convert(whole(inode), shared=False))
    assert len(world.asked(fx.InvalidateBegin)) == 1


# fallocate.


@HUGE
@pytest.mark.parametrize("mode", [1, 3], ids=["allocate", "punch"])
def test_fallocate_takes_whole_huge_pages_alone(page_size: int, mode: int) -> None:
    world = GmemWorld()
    inode = world.created_in_place(2 * page_size, page_size, shared=False)
    for offset, length in ((0, PAGE_SIZE), (PAGE_SIZE, page_size)):
        with refused(world, Reason.RANGE_UNALIGNED) as caught:
            world.run(world.core.fallocate(inode.number, mode, offset, length))
        assert str(page_size) in str(caught.value)
    world.run(world.core.fallocate(inode.number, mode, page_size, page_size))
    world.check()


@HUGE
def test_a_punch_that_must_merge_what_is_held_frees_nothing(page_size: int) -> None:
    world = GmemWorld()
    inode = world.created_in_place(2 * page_size, page_size, shared=False)
    allocate(world, inode)
    pages = page_size >> PAGE_SHIFT
    world.run(world.convert(part(inode, pages + 5), shared=True))
    gup = hold(world, inode, pages + 5)
    world.write(inode, GUEST, 1, "A")
    before = inode.statistics()
    with pytest.raises(Contended) as caught:
        world.run(world.core.fallocate(inode.number, 3, 0, inode.i_size))
    assert caught.value.numbers["error_offset"] == (pages + 5) << PAGE_SHIFT
    assert inode.statistics() == before
    assert world.read(inode, GUEST, 1) == "A"
    world.run(world.core.fallocate(inode.number, 3, 0, page_size))
    world.run(world.core.unpin(gup))
    world.run(world.core.fallocate(inode.number, 3, 0, inode.i_size))
    assert inode.statistics().st_blocks == 0
    # Who may fault stays.
    assert inode.statistics().shared_pages == 1
    world.check()


def test_4k_pages_are_punched_whoever_holds_them_c100() -> None:
    world = GmemWorld()
    inode = world.created_in_place(4 * PAGE_SIZE)
    world.write(inode, HOST, 1, "A")
    gup = hold(world, inode, 1)
    world.run(world.core.fallocate(inode.number, 3, 0, inode.i_size))
    assert world.read(inode, HOST, 1) == 0
    world.write(inode, HOST, 1, "A")
    world.run(world.core.unpin(gup))
    world.run(world.convert(whole(inode), shared=False))
    world.run(world.get_pfn(inode, 1))
    assert world.read(inode, GUEST, 1) == "A"
    world.run(world.core.fallocate(inode.number, 3, 0, inode.i_size))
    world.run(world.get_pfn(inode, 1))
    assert (world.read(inode, GUEST, 1), world.read(inode, HOST, 1)) == (0, EIO)
    world.check()


# Eviction.


@SIZES
def test_an_inode_that_nobody_holds_is_merged_and_gone_at_once(page_size: int) -> None:
    world = GmemWorld()
    before = world.snapshot()
    inode = world.created_in_place(2 * page_size, page_size)
    allocate(world, inode)
    world.run(world.core.close(inode.number))
    assert world.work == []
    assert world.core.deferred.numbers == []
    assert world.snapshot() == before
    world.check()


@HUGE
def test_what_is_held_comes_page_by_page_and_the_rest_at_once(page_size: int) -> None:
    world = GmemWorld()
    before = world.snapshot()
    inode = world.created_in_place(2 * page_size, page_size)
    allocate(world, inode)
    gup = hold(world, inode, 3)
    world.run(world.core.close(inode.number))
    assert world.core.numbers == []
    assert len(world.asked(fx.Reconstruct)) == 1
    status = world.core.deferred.status(1)
    assert (status.pages_left, status.folios_left, status.done) == (1, 1, False)
    world.run(world.core.unpin(gup))
    world.run_work()
    assert world.core.deferred.status(1).done
    assert world.snapshot() == before
    world.check()


def test_a_merge_that_nobody_answers_takes_the_other_way() -> None:
    world = GmemWorld()
    before = world.snapshot()
    inode = world.created_in_place(2 * SIZE_2M, SIZE_2M)
    allocate(world, inode)
    world.fail_next(fx.Reconstruct, TransportError("no answer"))
    world.run(world.core.close(inode.number))
    assert world.core.deferred.status(1).folios_left == 1
    world.run_work()
    assert world.snapshot() == before
    world.check()
