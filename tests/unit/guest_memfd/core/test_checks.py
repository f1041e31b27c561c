"""Every bad argument is refused with its reason, and nothing moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from gmem.effects import Op
from gmem.guest_memfd.core.inode import Inode, InodeOptions
from gmem.guest_memfd.core.inodes import ByteRange
from gmem.guest_memfd.core.values import HoldKind
from gmem.uapi.errors import Reason
from gmem.uapi.flags import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from gmem.uapi.pages import PAGE_SIZE, SIZE_1G, SIZE_2M
from tests.support.gmem_world import VM, GmemWorld, refused, whole

ALLOCATE = FALLOC_FL_KEEP_SIZE
PUNCH = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
SIZE = 4 * SIZE_2M

BAD_RANGES = [
    pytest.param(0, 0, Reason.RANGE_EMPTY, id="zero"),
    pytest.param(1, PAGE_SIZE, Reason.RANGE_UNALIGNED, id="offset+1"),
    pytest.param(0, PAGE_SIZE - 1, Reason.RANGE_UNALIGNED, id="size-1"),
    pytest.param(-PAGE_SIZE, PAGE_SIZE, Reason.RANGE_NEGATIVE, id="negative offset"),
    pytest.param(0, -PAGE_SIZE, Reason.RANGE_NEGATIVE, id="negative size"),
    pytest.param(SIZE, PAGE_SIZE, Reason.RANGE_PAST_END, id="at the end"),
    pytest.param(0, SIZE + PAGE_SIZE, Reason.RANGE_PAST_END, id="past the end"),
    pytest.param(1 << 63, PAGE_SIZE, Reason.RANGE_PAST_END, id="2^63"),
]

CALLS: dict[str, Callable[[GmemWorld, Inode, ByteRange], Op[Any]]] = {
    "to shared": lambda w, i, r: w.convert(r, shared=True),
    "to private": lambda w, i, r: w.convert(r, shared=False),
    "validate": lambda w, i, r: w.convert(r, shared=False, validate_only=True),
    "second range": lambda w, i, r: w.convert(
        ByteRange(i.number, 0, PAGE_SIZE), r, shared=False
    ),
    "populate": lambda w, i, r: w.core.populate(r, "memfd", 0),
    "pin": lambda w, i, r: w.core.pin(r, HoldKind.PIN, holder="nic", client="c"),
    "bind": lambda w, i, r: w.bind(i, slot=1, offset=r.offset, size=r.size),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("offset", "size", "reason"), BAD_RANGES)
def test_bad_range(call: str, offset: int, size: int, reason: Reason) -> None:
    world = GmemWorld()
    inode = world.bound(SIZE, SIZE_2M)
    with refused(world, reason) as caught:
        target = ByteRange(inode.number, offset, size)
        world.run(CALLS[call](world, inode, target))
    assert str(caught.value).startswith("EINVAL")


@pytest.mark.parametrize("mode", [ALLOCATE, PUNCH], ids=["allocate", "punch"])
@pytest.mark.parametrize(
    ("offset", "length", "reason"),
    [
        pytest.param(0, 0, Reason.RANGE_EMPTY, id="zero"),
        pytest.param(0, -1, Reason.RANGE_NEGATIVE, id="negative length"),
        pytest.param(-PAGE_SIZE, PAGE_SIZE, Reason.RANGE_NEGATIVE, id="negative"),
        pytest.param((1 << 63) - PAGE_SIZE, PAGE_SIZE, Reason.RANGE_WRAPS, id="2^63"),
        # C012: every pair of a page plus or minus one.
        *(
            pytest.param(o, n, Reason.RANGE_UNALIGNED, id=f"{o},{n}")
            for o, n in [(0, 1), (0, 4095), (0, 4097), (1, 1), (1, 4095), (1, 4096)]
        ),
        *(
            pytest.param(o, n, Reason.RANGE_UNALIGNED, id=f"{o},{n}")
            for o, n in [(1, 4097), (4096, 1), (4096, 4095), (4096, 4097)]
        ),
    ],
)
def test_bad_fallocate(mode: int, offset: int, length: int, reason: Reason) -> None:
    world = GmemWorld()
    inode = world.bound(SIZE, SIZE_2M)
    with refused(world, reason):
        world.run(world.core.fallocate(inode.number, mode, offset, length))


@pytest.mark.parametrize("mode", [0, FALLOC_FL_PUNCH_HOLE, 0x10, 0x11, 0x43])
def test_unknown_fallocate_mode(mode: int) -> None:
    world = GmemWorld()
    inode = world.bound(SIZE)
    with refused(world, Reason.MODE_UNSUPPORTED) as caught:
        world.run(world.core.fallocate(inode.number, mode, 0, PAGE_SIZE))
    assert str(caught.value).startswith("EOPNOTSUPP")


def test_arguments_are_checked_in_the_kernels_order() -> None:
    """VFS looks at the range before the file system looks at mode and alignment."""
    world = GmemWorld()
    inode = world.bound(SIZE)
    with refused(world, Reason.RANGE_EMPTY):
        world.run(world.core.fallocate(inode.number, 0, 1, 0))
    with refused(world, Reason.MODE_UNSUPPORTED):
        world.run(world.core.fallocate(inode.number, 0, 1, 1))


@pytest.mark.parametrize(
    ("size", "page_size", "reason"),
    [
        (0, PAGE_SIZE, Reason.SIZE_INVALID),
        (-SIZE_2M, SIZE_2M, Reason.SIZE_INVALID),
        (PAGE_SIZE - 1, PAGE_SIZE, Reason.SIZE_INVALID),
        (SIZE_2M + PAGE_SIZE, SIZE_2M, Reason.SIZE_INVALID),
        (1 << 63, PAGE_SIZE, Reason.SIZE_INVALID),
        (SIZE_1G, 0, Reason.PAGE_SIZE_UNKNOWN),
        (SIZE_1G, 1 << 16, Reason.PAGE_SIZE_UNKNOWN),
        (5 * SIZE_1G, SIZE_1G, Reason.POOL_EMPTY),
        ((1 << 40) + PAGE_SIZE, PAGE_SIZE, Reason.LIMIT_REACHED),
        ((1 << 63) - PAGE_SIZE, PAGE_SIZE, Reason.LIMIT_REACHED),
    ],
)
def test_bad_create(size: int, page_size: int, reason: Reason) -> None:
    world = GmemWorld()
    with refused(world, reason):
        world.run(world.core.create(InodeOptions(size=size, page_size=page_size)))


def test_convert_of_nothing_or_of_a_page_twice() -> None:
    world = GmemWorld()
    one, two = world.bound(SIZE, SIZE_2M), world.bound(SIZE, SIZE_2M)
    with refused(world, Reason.RANGE_EMPTY):
        world.run(world.convert(shared=False))
    with refused(world, Reason.ARGUMENT_INVALID):
        page = ByteRange(one.number, SIZE_2M, PAGE_SIZE)
        world.run(world.convert(whole(two), whole(one), page, shared=False))


def test_an_inode_that_never_was() -> None:
    world = GmemWorld()
    world.bound(SIZE)
    nobody = ByteRange(9, 0, PAGE_SIZE)
    for op in (
        world.core.close(9),
        world.core.fallocate(9, ALLOCATE, 0, PAGE_SIZE),
        world.core.host_fault(9, 0),  # type: ignore[arg-type]
        world.core.get_pfn(9, VM, 0, 0),  # type: ignore[arg-type]
        world.core.unbind(9, VM, 0),
        world.core.populate(nobody, "memfd", 0),
        world.core.pin(nobody, HoldKind.PIN, holder="nic", client="c"),
        world.convert(nobody, shared=True),
    ):
        with refused(world, Reason.INODE_UNKNOWN):
            world.run(op)
    with refused(world, Reason.HOLDER_UNKNOWN):
        world.run(world.core.unpin(9))
