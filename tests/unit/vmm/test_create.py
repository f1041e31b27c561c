"""KVM_CREATE_GUEST_MEMFD: flag words of the 39-patch series."""

from __future__ import annotations

import pytest

from gmem.uapi.errors import BadRequest, Errno, Exhausted, Reason, make_error
from gmem.uapi.lineage import Lineage
from gmem.uapi.pages import PAGE_SIZE, SIZE_1G, SIZE_2M
from gmem.vmm.core.create import FileShape, create_guest_memfd, rfc_v1_shape
from gmem.vmm.core.effects import CreateFile
from tests.support.vmm_world import World, new_vm

HUGE = 2
LOG_2M, LOG_1G = 21 << 26, 30 << 26


@pytest.mark.parametrize(
    ("size", "flags", "shape"),
    [
        (PAGE_SIZE, 0, FileShape(PAGE_SIZE, PAGE_SIZE)),
        (3 * PAGE_SIZE, 0, FileShape(3 * PAGE_SIZE, PAGE_SIZE)),
        (SIZE_2M, HUGE | LOG_2M, FileShape(SIZE_2M, SIZE_2M)),
        (4 * SIZE_1G, HUGE | LOG_1G, FileShape(4 * SIZE_1G, SIZE_1G)),
        # A logarithm of 0 is the default size, and then the size is rounded up.
        (SIZE_2M, HUGE, FileShape(SIZE_2M, SIZE_2M)),
        (SIZE_2M + 1, HUGE, FileShape(2 * SIZE_2M, SIZE_2M)),
    ],
)
def test_flag_word_means_a_shape(size: int, flags: int, shape: FileShape) -> None:
    assert rfc_v1_shape(new_vm(), size, flags) == shape


@pytest.mark.parametrize(
    ("size", "flags", "reason"),
    [
        *[(PAGE_SIZE, 1 << bit, Reason.FLAG_UNKNOWN) for bit in range(26) if bit != 1],
        *[(PAGE_SIZE, 1 << bit, Reason.FLAG_UNKNOWN) for bit in range(32, 64)],
        *[(PAGE_SIZE, 1 << bit, Reason.FLAG_COMBINATION) for bit in range(26, 32)],
        *[
            (SIZE_1G, HUGE | log << 26, Reason.PAGE_SIZE_UNKNOWN)
            for log in range(1, 64)
            if log not in {21, 30}
        ],
        *[(size, 0, Reason.SIZE_INVALID) for size in (1, 4095, 4097, 0, -1, -4096)],
        (-(1 << 63), 0, Reason.SIZE_INVALID),
        ((1 << 63) - 1, 0, Reason.SIZE_INVALID),
        (SIZE_2M, HUGE | LOG_1G, Reason.SIZE_INVALID),
        (SIZE_1G + SIZE_2M, HUGE | LOG_1G, Reason.SIZE_INVALID),
        (0, HUGE, Reason.SIZE_INVALID),
        (-1, HUGE, Reason.SIZE_INVALID),
        # Flags are looked at before the size.
        (0, 1, Reason.FLAG_UNKNOWN),
    ],
)
def test_wrong_word_or_size_is_refused(size: int, flags: int, reason: Reason) -> None:
    world = World()
    with pytest.raises(BadRequest) as refused:
        world.run(create_guest_memfd(new_vm(), size, flags))
    assert (refused.value.reason, refused.value.errno) == (reason, Errno.EINVAL)
    assert world.log == []


def test_file_belongs_to_its_vm() -> None:
    world, vm = World(), new_vm()
    name = world.run(create_guest_memfd(vm, SIZE_1G, HUGE | LOG_1G))
    assert name == "hosts/h/guestMemfds/1"
    assert world.log == [CreateFile(vm.name, SIZE_1G, SIZE_1G, Lineage.RFC_V1)]


def test_empty_pool_is_told() -> None:
    refusal = make_error(Reason.POOL_EMPTY, "0 of 1 available")
    world = World(refuse={CreateFile: refusal})
    with pytest.raises(Exhausted, match="0 of 1 available"):
        world.run(create_guest_memfd(new_vm(), SIZE_1G, HUGE | LOG_1G))
