"""How the demo's VMM speaks to its kernel, by lineage: flags, and conversion."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from gmem.api.guest_memfd.v1.guest_memfd_pb2 import Range
from gmem.uapi.flags import (
    GUEST_MEMFD_FLAG_HUGETLB,
    GUEST_MEMFD_FLAG_MMAP,
    GUEST_MEMFD_FLAG_SUPPORT_SHARED,
    GUESTMEM_HUGE_SHIFT,
    IN_PLACE_HUGE_PAGES,
    KVM_GUEST_MEMFD_HUGE_SHIFT,
    KVM_GUEST_MEMFD_HUGETLB,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
)
from gmem.uapi.lineage import Lineage
from gmem.uapi.pages import SIZE_1G, order_of

if TYPE_CHECKING:
    from gmem.ctl.demo.stage import Stage

CONVERT_SECONDS_MAX: Final = 60.0
_LOG2_1G: Final = SIZE_1G.bit_length() - 1

Convert: TypeAlias = "Callable[[Stage, int, int, bool], Awaitable[None]]"
"""(stage, offset, size, private): makes a range of the memory private, or shared."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """What a VMM says differently in a lineage."""

    create_flags: int
    """KVM_CREATE_GUEST_MEMFD's flags for a file of 1G pages."""
    call: str
    """The name of the call that converts."""
    convert: Convert
    page_order: int = 0
    """KVM_CREATE_GUEST_MEMFD's field of that name."""
    starts_shared: bool = True
    """Whether every page may be touched by the host before anything is converted."""
    ioctl: str = ""
    """The ioctl on the file that converts, where there is one, and its number."""


async def _set_attributes(
    stage: Stage,
    offset: int,
    size: int,
    private: bool,
) -> None:
    await stage.vmm.set_memory_attributes(
        vm=stage.vm,
        address=stage.gpa + offset,
        size=size,
        attributes=KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0,
        timeout=CONVERT_SECONDS_MAX,
    )


async def _convert_file(
    stage: Stage,
    offset: int,
    size: int,
    private: bool,
) -> None:
    await stage.guest_memfd.convert_range(
        ranges=[Range(name=stage.inode, offset=offset, size=size)],
        to_shared=not private,
        timeout=CONVERT_SECONDS_MAX,
    )


DIALECTS: Final[Mapping[Lineage, Dialect]] = {
    Lineage.RFC_V1: Dialect(
        KVM_GUEST_MEMFD_HUGETLB | _LOG2_1G << KVM_GUEST_MEMFD_HUGE_SHIFT,
        "KVM_SET_MEMORY_ATTRIBUTES",
        _set_attributes,
    ),
    Lineage.RFC_V2: Dialect(
        GUEST_MEMFD_FLAG_SUPPORT_SHARED
        | GUEST_MEMFD_FLAG_HUGETLB
        | _LOG2_1G << GUESTMEM_HUGE_SHIFT,
        "KVM_GMEM_CONVERT_PRIVATE",
        _convert_file,
        ioctl="KVM_GMEM_CONVERT_PRIVATE, _IOWR(0xAF, 0x42)",
    ),
    Lineage.IN_PLACE: Dialect(
        GUEST_MEMFD_FLAG_MMAP | IN_PLACE_HUGE_PAGES,
        "KVM_SET_MEMORY_ATTRIBUTES2",
        _convert_file,
        page_order=order_of(SIZE_1G),
        starts_shared=False,
        ioctl="KVM_SET_MEMORY_ATTRIBUTES2, _IOWR(0xAE, 0xd2)",
    ),
}
