"""How a VMM speaks to each lineage: flag bits, VM types, the call that converts."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

from gmem.testing.conformance.kvm import (
    IN_PLACE,
    MAINLINE,
    RFC_V1,
    RFC_V2,
    GuestMemfd,
    Vm,
)
from gmem.uapi.flags import (
    GUEST_MEMFD_FLAG_HUGETLB,
    GUEST_MEMFD_FLAG_INIT_PRIVATE,
    GUEST_MEMFD_FLAG_INIT_SHARED,
    GUEST_MEMFD_FLAG_MMAP,
    GUEST_MEMFD_FLAG_SUPPORT_SHARED,
    GUESTMEM_HUGE_SHIFT,
    IN_PLACE_HUGE_PAGES,
    KVM_GMEM_CONVERT_FORMAT,
    KVM_GMEM_CONVERT_PRIVATE,
    KVM_GMEM_CONVERT_SHARED,
    KVM_GUEST_MEMFD_HUGE_SHIFT,
    KVM_GUEST_MEMFD_HUGETLB,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    KVM_MEMORY_ATTRIBUTES2_FORMAT,
    KVM_SET_MEMORY_ATTRIBUTES2,
    VmType,
)
from gmem.uapi.pages import PAGE_SIZE, order_of

Convert: TypeAlias = Callable[[Vm, GuestMemfd, "Asked"], None]
"""Raises OSError, ConvertRefused where the kernel writes an error_offset."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A conversion: a range of the file, whose first byte is at `gpa`."""

    gpa: int
    offset: int
    size: int
    private: bool


class ConvertRefused(OSError):  # noqa: N818 - says what happened
    """A conversion's errno with the error_offset that the kernel wrote."""

    def __init__(self, number: int, error_offset: int) -> None:
        super().__init__(number, f"error_offset={error_offset:#x}")
        self.error_offset = error_offset


@dataclass(frozen=True, slots=True)
class Dialect:
    """What a VMM says in one lineage.

    Flags of KVM_CREATE_GUEST_MEMFD: `shared` for a file that the host may map and touch
    (in RFC_V1 once it is bound), `private` for one that it may map and not yet touch,
    `plain` for one that it may not map; None where the lineage has no such file.
    `huge` returns the flags for pages of a size, whose order is a field of its own
    where the lineage `has_page_order`; a file of `huge_begins_private` pages cannot
    begin `shared`, and is converted. `in_use` is the errno of a conversion that
    somebody's use of a page forbids.
    """

    shared: int
    private: int | None
    plain: int | None
    huge: Callable[[int], int]
    has_page_order: bool
    vm_type: VmType
    in_use: str
    keeps_contents: bool
    convert: Convert | None
    huge_begins_private: bool = False


def _attributes(vm: Vm, file: GuestMemfd, asked: Asked) -> None:
    del file
    vm.set_memory_attributes(
        address=asked.gpa + asked.offset,
        size=asked.size,
        attributes=KVM_MEMORY_ATTRIBUTE_PRIVATE if asked.private else 0,
    )


def _convert_ioctl(vm: Vm, file: GuestMemfd, asked: Asked) -> None:
    del vm
    request = KVM_GMEM_CONVERT_PRIVATE if asked.private else KVM_GMEM_CONVERT_SHARED
    argument = bytearray(
        struct.pack(KVM_GMEM_CONVERT_FORMAT, asked.offset, asked.size, 0)
    )
    try:
        file.ioctl(request, argument)
    except OSError as error:
        _, _, error_offset = struct.unpack(KVM_GMEM_CONVERT_FORMAT, argument)
        raise ConvertRefused(error.errno or 0, error_offset) from error


def _set_attributes2(vm: Vm, file: GuestMemfd, asked: Asked) -> None:
    del vm
    attributes = KVM_MEMORY_ATTRIBUTE_PRIVATE if asked.private else 0
    words = [asked.offset, asked.size, attributes, *[0] * 13]
    argument = bytearray(struct.pack(KVM_MEMORY_ATTRIBUTES2_FORMAT, *words))
    try:
        file.ioctl(KVM_SET_MEMORY_ATTRIBUTES2, argument)
    except OSError as error:
        written = struct.unpack(KVM_MEMORY_ATTRIBUTES2_FORMAT, argument)
        raise ConvertRefused(error.errno or 0, written[4]) from error


def _log2(page_size: int) -> int:
    return page_size.bit_length() - 1


def _no_huge(size: int) -> int:
    raise ValueError(f"no flag for pages of {size} bytes in this lineage")


DIALECTS: Final[Mapping[str, Dialect]] = {
    RFC_V1: Dialect(
        shared=0,
        private=None,
        plain=None,
        huge=lambda size: (
            KVM_GUEST_MEMFD_HUGETLB | _log2(size) << KVM_GUEST_MEMFD_HUGE_SHIFT
        ),
        has_page_order=False,
        vm_type=VmType.SW_PROTECTED,
        in_use="EINVAL",
        keeps_contents=False,
        convert=_attributes,
    ),
    RFC_V2: Dialect(
        shared=GUEST_MEMFD_FLAG_SUPPORT_SHARED,
        private=GUEST_MEMFD_FLAG_SUPPORT_SHARED | GUEST_MEMFD_FLAG_INIT_PRIVATE,
        plain=0,
        huge=lambda size: GUEST_MEMFD_FLAG_HUGETLB | _log2(size) << GUESTMEM_HUGE_SHIFT,
        has_page_order=False,
        vm_type=VmType.SW_PROTECTED,
        in_use="EAGAIN",
        keeps_contents=True,
        convert=_convert_ioctl,
    ),
    IN_PLACE: Dialect(
        shared=GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED,
        private=GUEST_MEMFD_FLAG_MMAP,
        plain=0,
        huge=lambda _: IN_PLACE_HUGE_PAGES,
        has_page_order=True,
        huge_begins_private=True,
        vm_type=VmType.SW_PROTECTED,
        in_use="EAGAIN",
        keeps_contents=True,
        convert=_set_attributes2,
    ),
    MAINLINE: Dialect(
        shared=GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED,
        private=GUEST_MEMFD_FLAG_MMAP,
        plain=0,
        huge=_no_huge,
        has_page_order=False,
        vm_type=VmType.DEFAULT,
        in_use="",
        keeps_contents=True,
        convert=None,
    ),
}


def create_flags(lineage: str, page_size: int, flags: int | None = None) -> int:
    """Return flags with the bits for pages of `page_size`.

    None: the flags of a file that the host may touch, once `share` has seen it.
    """
    dialect = DIALECTS[lineage]
    if flags is None:
        begins_private = _begins_private(dialect, page_size)
        flags = dialect.private if begins_private else dialect.shared
    assert flags is not None, (
        "a lineage of which huge pages begin private has such flags"
    )
    return flags if page_size == PAGE_SIZE else flags | dialect.huge(page_size)


def page_order(lineage: str, page_size: int) -> int:
    """Return what the field `page_order` is for pages of `page_size`."""
    return order_of(page_size) if DIALECTS[lineage].has_page_order else 0


def share(lineage: str, page_size: int, vm: Vm, file: GuestMemfd) -> None:
    """Have the host touch a new file: convert it where it could not begin shared."""
    dialect = DIALECTS[lineage]
    if _begins_private(dialect, page_size):
        assert dialect.convert is not None
        dialect.convert(vm, file, Asked(0, 0, file.size, private=False))


def _begins_private(dialect: Dialect, page_size: int) -> bool:
    return dialect.huge_begins_private and page_size > PAGE_SIZE
