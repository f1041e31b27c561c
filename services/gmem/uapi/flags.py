"""Flag words and numbers of the kernel's interface, as the series define them."""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Final

KVM_MEM_LOG_DIRTY_PAGES: Final = 1 << 0
KVM_MEM_READONLY: Final = 1 << 1
KVM_MEM_GUEST_MEMFD: Final = 1 << 2

KVM_MEMORY_ATTRIBUTE_PRIVATE: Final = 1 << 3
KVM_MEMORY_EXIT_FLAG_PRIVATE: Final = 1 << 3

KVM_HC_MAP_GPA_RANGE: Final = 12
KVM_MAP_GPA_RANGE_ENCRYPTED: Final = 1 << 4

FALLOC_FL_KEEP_SIZE: Final = 0x01
FALLOC_FL_PUNCH_HOLE: Final = 0x02

# KVM_CREATE_GUEST_MEMFD in the 39-patch series: bit 1, and log2 of the page size in
# bits 26 to 31, valid only with it.
KVM_GUEST_MEMFD_HUGETLB: Final = 1 << 1
RFC_V1_HUGE_PAGES: Final = KVM_GUEST_MEMFD_HUGETLB
"""The same bit for who must not know what the huge pages come from."""
KVM_GUEST_MEMFD_HUGE_SHIFT: Final = 26
KVM_GUEST_MEMFD_HUGE_MASK: Final = 0x3F

# KVM_CREATE_GUEST_MEMFD in the 51-patch series: INIT_PRIVATE only with SUPPORT_SHARED,
# and log2 of the page size in bits 58 to 63 only with HUGETLB.
GUEST_MEMFD_FLAG_SUPPORT_SHARED: Final = 1 << 0
GUEST_MEMFD_FLAG_INIT_PRIVATE: Final = 1 << 1
GUEST_MEMFD_FLAG_HUGETLB: Final = 1 << 2
RFC_V2_HUGE_PAGES: Final = GUEST_MEMFD_FLAG_HUGETLB
"""The same bit for who must not know what the huge pages come from."""
GUESTMEM_HUGE_SHIFT: Final = 58
GUESTMEM_HUGE_MASK: Final = 0x3F

# KVM_CREATE_GUEST_MEMFD in mainline; which of them a VM may use says
# KVM_CAP_GUEST_MEMFD_FLAGS.
GUEST_MEMFD_FLAG_MMAP: Final = 1 << 0
GUEST_MEMFD_FLAG_INIT_SHARED: Final = 1 << 1

# The branch for huge pages of the in-place conversion adds a flag, whose bit is not
# known (here that of the 51-patch series), and a field of its own for the page size.
IN_PLACE_HUGE_PAGES: Final = GUEST_MEMFD_FLAG_HUGETLB

# The ioctl of the in-place conversion on the file: _IOWR(KVMIO, 0xd2, struct
# kvm_memory_attributes2), sixteen 64-bit words: offset, size, attributes, flags,
# error_offset, reserved[11].
KVM_SET_MEMORY_ATTRIBUTES2: Final = 0xC080AED2
KVM_MEMORY_ATTRIBUTES2_FORMAT: Final = "=16Q"

# ioctls of the 51-patch series on the file: _IOWR(0xAF, 0x41 and 0x42, struct
# kvm_gmem_convert), three 64-bit words: offset, size, error_offset.
KVM_GMEM_CONVERT_SHARED: Final = 0xC018AF41
KVM_GMEM_CONVERT_PRIVATE: Final = 0xC018AF42
KVM_GMEM_CONVERT_FORMAT: Final = "=QQQ"


class VmType(IntEnum):
    """KVM_CREATE_VM's type argument."""

    DEFAULT = 0
    SW_PROTECTED = 1


class Capability(IntEnum):
    """Numbers of KVM_CHECK_EXTENSION."""

    EXIT_HYPERCALL = 201
    USER_MEMORY2 = 231
    MEMORY_FAULT_INFO = 232
    MEMORY_ATTRIBUTES = 233
    GUEST_MEMFD = 234
    VM_TYPES = 235
    PRE_FAULT_MEMORY = 236
    GUEST_MEMFD_FLAGS = 244
    GUEST_MEMFD_MEMORY_ATTRIBUTES = 250


class ExitReason(IntEnum):
    """KVM_EXIT_* numbers that the emulated vCPUs can leave with."""

    IO = 2
    HYPERCALL = 3
    HLT = 5
    MMIO = 6
    INTR = 10
    MEMORY_FAULT = 39


class PageFlag(IntFlag):
    """KPF_* bits of /proc/kpageflags that a page of an emulated host can have."""

    LRU = 1 << 5
    BUDDY = 1 << 10
    COMPOUND_HEAD = 1 << 15
    COMPOUND_TAIL = 1 << 16
    HUGE = 1 << 17
    UNEVICTABLE = 1 << 18
    HWPOISON = 1 << 19
    RESERVED = 1 << 32


class MemoryAttribute(IntFlag):
    """Bits of KVM_SET_MEMORY_ATTRIBUTES."""

    SHARED = 0
    PRIVATE = KVM_MEMORY_ATTRIBUTE_PRIVATE


class Faultability(IntEnum):
    """Who may fault a page of an inode: two values, every page offset has one.

    The 39-patch series keeps an xarray in which *present* means ALL; its successors
    renamed it shareability and then per-inode memory attributes.
    """

    GUEST = 1
    ALL = 2
