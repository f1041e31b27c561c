"""The checks of arguments, each in the kernel's order; they look at no state.

Ranges of a system call are bytes; what passes is a PgRange. A range that fails has
changed nothing.
"""

from __future__ import annotations

from typing import Final

from gmem.guest_memfd.core.values import AttributesCall
from gmem.uapi.errors import BadRequest, Exhausted, Reason, Unsupported
from gmem.uapi.flags import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
)
from gmem.uapi.pages import PAGE_SIZE, PAGE_SIZES, U64_LIMIT, PgRange, format_size

# loff_t is signed: no file is longer, and no end of a range lies beyond.
OFFSET_LIMIT: Final = (1 << 63) - 1
FILE_BYTES_MAX: Final = 1 << 40
"""Bytes of one file: its tables have an entry for each 4K, used or not."""


def require_creatable(size: int, page_size: int) -> None:
    """Check the arguments of KVM_CREATE_GUEST_MEMFD.

    Raises BadRequest (PAGE_SIZE_UNKNOWN, SIZE_INVALID), Exhausted (LIMIT_REACHED).
    """
    if page_size not in PAGE_SIZES:
        raise BadRequest(
            Reason.PAGE_SIZE_UNKNOWN,
            f"page_size {page_size} is none of 4K, 2M and 1G: use one of them",
            page_size=page_size,
        )
    if not 0 < size <= OFFSET_LIMIT or size % page_size:
        raise BadRequest(
            Reason.SIZE_INVALID,
            f"size {size} is not a positive multiple of {format_size(page_size)} "
            "below 2^63: round it up",
            size=size,
            page_size=page_size,
        )
    if size > FILE_BYTES_MAX:
        raise Exhausted(
            Reason.LIMIT_REACHED,
            f"a file of {format_size(size)} is more than the "
            f"{format_size(FILE_BYTES_MAX)} that a file may have here: make several",
            size=size,
        )


def require_range(offset: int, size: int, *, i_size: int) -> PgRange:
    """Check bytes `[offset, offset + size)` of an inode; return the pages."""
    _require_not_negative(offset, size)
    _require_not_empty(size)
    _require_aligned(offset, size)
    _require_inside(offset, size, i_size)
    return PgRange.of_bytes(offset, size)


def require_bytes(offset: int, size: int, *, i_size: int) -> PgRange:
    """Check bytes of an inode, aligned or not; return the pages that they lie in."""
    _require_not_negative(offset, size)
    _require_not_empty(size)
    _require_inside(offset, size, i_size)
    return PgRange.around(offset, size)


def require_convert_ioctl(
    offset: int, size: int, error_offset: int, *, i_size: int
) -> PgRange | None:
    """Check KVM_GMEM_CONVERT_* in its order; None where there is nothing to do."""
    if error_offset:
        raise BadRequest(
            Reason.ARGUMENT_INVALID,
            f"error_offset {error_offset:#x} is for the answer: set it to 0",
            error_offset=error_offset,
        )
    if size == 0:
        return None
    _require_inside(offset, size, i_size)
    _require_aligned(offset, size)
    return PgRange.of_bytes(offset, size)


def require_attributes_ioctl(
    call: AttributesCall, *, i_size: int, private_memory: bool
) -> PgRange:
    """Check KVM_SET_MEMORY_ATTRIBUTES2 in its order; error_offset is not looked at."""
    if call.flags:
        raise BadRequest(
            Reason.FLAG_UNKNOWN, f"flags {call.flags:#x} mean nothing: set them to 0"
        )
    if any(call.reserved):
        raise BadRequest(
            Reason.ARGUMENT_INVALID, "a reserved word is not 0: set all of them to 0"
        )
    supported = KVM_MEMORY_ATTRIBUTE_PRIVATE if private_memory else 0
    if not supported or call.attributes & ~supported:
        raise BadRequest(
            Reason.ATTRIBUTE_UNSUPPORTED,
            f"the VM of the file has the attributes {supported:#x}, and "
            f"{call.attributes:#x} is asked for: use 0 or PRIVATE (8), with a "
            "SW_PROTECTED VM",
            attributes=call.attributes,
        )
    _require_not_empty(call.size)
    if call.offset + call.size >= U64_LIMIT:
        raise BadRequest(
            Reason.RANGE_WRAPS,
            f"offset {call.offset:#x} plus size {call.size:#x} wraps: shorten it",
            offset=call.offset,
            size=call.size,
        )
    _require_aligned(call.offset, call.size)
    _require_inside(call.offset, call.size, i_size)
    return PgRange.of_bytes(call.offset, call.size)


def require_fallocate(
    mode: int, offset: int, length: int, *, alignment: int = PAGE_SIZE
) -> None:
    """Check fallocate(2) as vfs_fallocate() and then kvm_gmem_fallocate() do."""
    _require_not_negative(offset, length)
    _require_not_empty(length)
    if offset + length > OFFSET_LIMIT:
        raise BadRequest(
            Reason.RANGE_WRAPS,
            f"offset {offset:#x} plus length {length:#x} passes 2^63: shorten it",
            offset=offset,
            length=length,
        )
    supported = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
    if not mode & FALLOC_FL_KEEP_SIZE or mode & ~supported:
        raise Unsupported(
            Reason.MODE_UNSUPPORTED,
            f"fallocate mode {mode:#x} is not supported: use KEEP_SIZE (1), or "
            "KEEP_SIZE and PUNCH_HOLE (3)",
            mode=mode,
        )
    _require_aligned(offset, length, alignment)


def require_source(offset: int, size: int) -> None:
    """Check bytes `[offset, offset + size)` of the file that populate reads."""
    _require_not_negative(offset, size)
    if offset + size > OFFSET_LIMIT:
        raise BadRequest(
            Reason.RANGE_WRAPS,
            f"source_offset {offset:#x} plus size {size:#x} passes 2^63: shorten it",
            offset=offset,
            size=size,
        )


def require_allocatable(offset: int, length: int, *, i_size: int) -> PgRange:
    """Check that an allocation ends inside the inode (kvm_gmem_allocate())."""
    _require_inside(offset, length, i_size)
    return PgRange.of_bytes(offset, length)


def _require_not_negative(offset: int, size: int) -> None:
    for name, value in (("offset", offset), ("size", size)):
        if value < 0:
            raise BadRequest(
                Reason.RANGE_NEGATIVE,
                f"{name} {value} is negative: give bytes from 0 on",
                value=value,
            )


def _require_not_empty(size: int) -> None:
    if size == 0:
        raise BadRequest(Reason.RANGE_EMPTY, "size is 0: give a range", size=0)


def _require_aligned(offset: int, size: int, alignment: int = PAGE_SIZE) -> None:
    for name, value in (("offset", offset), ("size", size)):
        if value % alignment:
            raise BadRequest(
                Reason.RANGE_UNALIGNED,
                f"{name} {value:#x} is not a multiple of {alignment}: align it",
                value=value,
            )


def _require_inside(offset: int, size: int, i_size: int) -> None:
    if offset + size > i_size:
        raise BadRequest(
            Reason.RANGE_PAST_END,
            f"the range ends at {offset + size:#x}, past the end of the inode at "
            f"{i_size:#x}: stay below it",
            offset=offset,
            size=size,
            i_size=i_size,
        )
