"""KVM_CREATE_GUEST_MEMFD: the flag word of each series, and what it asks for.

R39's kvm_gmem_create() knows one flag for huge pages and, only with it, six bits with
the logarithm of their size. A logarithm of 0 means the default huge page size, and then
alone a size that is no multiple is rounded up.

Mainline has MMAP and INIT_SHARED, no huge pages, and says by a capability which of them
a type of VM may use.

The in-place conversion adds huge pages to mainline's flags, and their order is a field
beside the flag word.

R51 has the flag and the bits elsewhere, two flags for sharing, and rounds nothing: the
size is checked against PAGE_SIZE by itself, against the huge page by the allocator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from gmem.effects import Op, perform
from gmem.uapi.errors import BadRequest, Reason
from gmem.uapi.flags import (
    GUEST_MEMFD_FLAG_INIT_PRIVATE,
    GUEST_MEMFD_FLAG_INIT_SHARED,
    GUEST_MEMFD_FLAG_MMAP,
    GUEST_MEMFD_FLAG_SUPPORT_SHARED,
    GUESTMEM_HUGE_MASK,
    GUESTMEM_HUGE_SHIFT,
    IN_PLACE_HUGE_PAGES,
    KVM_GUEST_MEMFD_HUGE_MASK,
    KVM_GUEST_MEMFD_HUGE_SHIFT,
    RFC_V1_HUGE_PAGES,
    RFC_V2_HUGE_PAGES,
)
from gmem.uapi.lineage import Lineage
from gmem.uapi.pages import HUGE_PAGE_SIZES, PAGE_SIZE, SIZE_2M, order_of
from gmem.vmm.core.effects import CreateFile
from gmem.vmm.core.vm import Vm

DEFAULT_HUGE_PAGE_SIZE: Final = SIZE_2M
_SIZE_BITS: Final = KVM_GUEST_MEMFD_HUGE_MASK << KVM_GUEST_MEMFD_HUGE_SHIFT
_RFC_V2_SIZE_BITS: Final = GUESTMEM_HUGE_MASK << GUESTMEM_HUGE_SHIFT
_PAGE_SIZE_OF_LOG: Final = {0: DEFAULT_HUGE_PAGE_SIZE} | {
    size.bit_length() - 1: size for size in HUGE_PAGE_SIZES
}


_PAGE_SIZE_OF_ORDER: Final = {order_of(size): size for size in HUGE_PAGE_SIZES}


@dataclass(frozen=True, slots=True)
class FileShape:
    """Bytes of the file and of each of its folios; who may fault it, where said."""

    size: int
    page_size: int
    support_shared: bool = False
    init_private: bool = False
    mmap: bool = False
    init_shared: bool = False


def rfc_v1_shape(vm: Vm, size: int, flags: int, page_order: int = 0) -> FileShape:
    """Decode the flag word of the 39-patch series.

    Raises BadRequest: FLAG_UNKNOWN, FLAG_COMBINATION, PAGE_SIZE_UNKNOWN, SIZE_INVALID.
    """
    _require_no_order(vm, page_order)
    _require_known(flags, RFC_V1_HUGE_PAGES | _SIZE_BITS)
    log = (flags >> KVM_GUEST_MEMFD_HUGE_SHIFT) & KVM_GUEST_MEMFD_HUGE_MASK
    if not flags & RFC_V1_HUGE_PAGES:
        _require_no_log(log, RFC_V1_HUGE_PAGES)
        return _shape(size, PAGE_SIZE)
    page_size = _huge_page_size(log)
    if log == 0:
        size = -(-size // page_size) * page_size
    return _shape(size, page_size)


def rfc_v2_shape(vm: Vm, size: int, flags: int, page_order: int = 0) -> FileShape:
    """Decode the flag word of the 51-patch series; refusals as rfc_v1_shape()."""
    _require_no_order(vm, page_order)
    known = GUEST_MEMFD_FLAG_SUPPORT_SHARED | GUEST_MEMFD_FLAG_INIT_PRIVATE
    _require_known(flags, known | RFC_V2_HUGE_PAGES | _RFC_V2_SIZE_BITS)
    support_shared = bool(flags & GUEST_MEMFD_FLAG_SUPPORT_SHARED)
    init_private = bool(flags & GUEST_MEMFD_FLAG_INIT_PRIVATE)
    if init_private and not support_shared:
        raise BadRequest(
            Reason.FLAG_COMBINATION,
            f"INIT_PRIVATE ({GUEST_MEMFD_FLAG_INIT_PRIVATE:#x}) needs SUPPORT_SHARED "
            f"({GUEST_MEMFD_FLAG_SUPPORT_SHARED:#x}): set both",
        )
    log = flags >> GUESTMEM_HUGE_SHIFT & GUESTMEM_HUGE_MASK
    huge = bool(flags & RFC_V2_HUGE_PAGES)
    if not huge:
        _require_no_log(log, RFC_V2_HUGE_PAGES)
    _shape(size, PAGE_SIZE)
    shape = _shape(size, _huge_page_size(log) if huge else PAGE_SIZE)
    return replace(shape, support_shared=support_shared, init_private=init_private)


def mainline_shape(vm: Vm, size: int, flags: int, page_order: int = 0) -> FileShape:
    """Decode the flag word of mainline; refusals as rfc_v1_shape()."""
    _require_no_order(vm, page_order)
    return _mmap_shape(vm, size, flags, PAGE_SIZE)


def in_place_shape(vm: Vm, size: int, flags: int, page_order: int = 0) -> FileShape:
    """Decode flags and page_order of the in-place conversion; refusals likewise."""
    if not flags & IN_PLACE_HUGE_PAGES:
        if page_order:
            raise BadRequest(
                Reason.FLAG_COMBINATION,
                f"page_order {page_order} needs flag {IN_PLACE_HUGE_PAGES:#x}: set "
                "both, or neither",
                page_order=page_order,
            )
        return _mmap_shape(vm, size, flags, PAGE_SIZE)
    if flags & GUEST_MEMFD_FLAG_INIT_SHARED:
        raise BadRequest(
            Reason.FLAG_COMBINATION,
            f"flag {IN_PLACE_HUGE_PAGES:#x} (huge pages) with INIT_SHARED "
            f"({GUEST_MEMFD_FLAG_INIT_SHARED:#x}): clear one",
        )
    if page_order not in _PAGE_SIZE_OF_ORDER:
        raise BadRequest(
            Reason.PAGE_SIZE_UNKNOWN,
            f"no huge pages of order {page_order} here: use 9 (2M) or 18 (1G)",
            page_order=page_order,
        )
    return _mmap_shape(vm, size, flags, _PAGE_SIZE_OF_ORDER[page_order])


def _mmap_shape(vm: Vm, size: int, flags: int, page_size: int) -> FileShape:
    supported = vm.guest_memfd_flags
    if flags & ~supported & GUEST_MEMFD_FLAG_INIT_SHARED:
        raise BadRequest(
            Reason.FLAG_UNKNOWN,
            f"INIT_SHARED ({GUEST_MEMFD_FLAG_INIT_SHARED:#x}) is not for a "
            f"{vm.type.name} VM, which has private memory: clear it, or use a DEFAULT "
            "VM",
        )
    _require_known(flags, supported)
    shape = _shape(size, page_size)
    return replace(
        shape,
        mmap=bool(flags & GUEST_MEMFD_FLAG_MMAP),
        init_shared=bool(flags & GUEST_MEMFD_FLAG_INIT_SHARED),
    )


SHAPE_OF: Final[dict[Lineage, Callable[[Vm, int, int, int], FileShape]]] = {
    Lineage.RFC_V1: rfc_v1_shape,
    Lineage.RFC_V2: rfc_v2_shape,
    Lineage.IN_PLACE: in_place_shape,
    Lineage.MAINLINE: mainline_shape,
}


def create_guest_memfd(vm: Vm, size: int, flags: int, page_order: int = 0) -> Op[str]:
    """Make a guest_memfd for `vm`; return its name.

    Raises what the decoder of the lineage does, CGROUP_UNKNOWN, and POOL_EMPTY and its
    kin.
    """
    shape = SHAPE_OF[vm.lineage](vm, size, flags, page_order)
    effect = CreateFile(
        vm.name,
        shape.size,
        shape.page_size,
        vm.lineage,
        support_shared=shape.support_shared,
        init_private=shape.init_private,
        mmap=shape.mmap,
        init_shared=shape.init_shared,
        private_memory=vm.traits.private_memory,
        cgroup=vm.cgroup,
    )
    return (yield from perform(effect))


def _require_no_order(vm: Vm, page_order: int) -> None:
    if page_order:
        raise BadRequest(
            Reason.FLAG_COMBINATION,
            f"{vm.lineage} has no field page_order, and not {page_order} in it: say "
            "the page size as its flags do",
            page_order=page_order,
        )


def _require_known(flags: int, known: int) -> None:
    unknown = flags & ~known
    if unknown:
        raise BadRequest(
            Reason.FLAG_UNKNOWN, f"flag bits {unknown:#x} mean nothing: clear them"
        )


def _require_no_log(log: int, huge_pages: int) -> None:
    if log:
        raise BadRequest(
            Reason.FLAG_COMBINATION,
            f"a page size of 2^{log} needs flag {huge_pages:#x}: set both",
            log=log,
        )


def _huge_page_size(log: int) -> int:
    if log not in _PAGE_SIZE_OF_LOG:
        raise BadRequest(
            Reason.PAGE_SIZE_UNKNOWN,
            f"no huge pages of 2^{log} bytes here: use 21 (2M) or 30 (1G)",
            log=log,
        )
    return _PAGE_SIZE_OF_LOG[log]


def _shape(size: int, page_size: int) -> FileShape:
    if size <= 0 or size % page_size:
        raise BadRequest(
            Reason.SIZE_INVALID,
            f"size {size} is not a positive multiple of {page_size}: round it up",
            size=size,
            page_size=page_size,
        )
    return FileShape(size, page_size)
