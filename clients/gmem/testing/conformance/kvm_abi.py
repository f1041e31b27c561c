"""The requests and structs of /dev/kvm, put together as <linux/kvm.h> does.

No request number is typed in: each follows from its direction, its number and the size
of its struct, by the macros of <asm-generic/ioctl.h>.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

KVMIO: Final = 0xAE
KVM_API_VERSION: Final = 12
KVM_CAP_NR_MEMSLOTS: Final = 10
KVM_CAP_GUEST_MEMFD_FLAGS: Final = 244

_NONE, _WRITE, _READ = 0, 1, 2
_NR_BITS, _TYPE_BITS, _SIZE_BITS = 8, 8, 14


def _request(direction: int, number: int, size: int) -> int:
    """_IOC(direction, KVMIO, number, size)."""
    assert number < 1 << _NR_BITS, number
    assert size < 1 << _SIZE_BITS, size
    size_shift = _NR_BITS + _TYPE_BITS
    direction_shift = size_shift + _SIZE_BITS
    return (
        direction << direction_shift | size << size_shift | KVMIO << _NR_BITS | number
    )


def _io(number: int) -> int:
    return _request(_NONE, number, 0)


def _iow(number: int, struct: Struct) -> int:
    return _request(_WRITE, number, struct.size)


def _ior(number: int, struct: Struct) -> int:
    return _request(_READ, number, struct.size)


def _iowr(number: int, struct: Struct) -> int:
    return _request(_READ | _WRITE, number, struct.size)


USERSPACE_MEMORY_REGION2: Final = Struct("=IIQQQQI4x112x")
"""slot, flags, guest_phys_addr, memory_size, userspace_addr, guest_memfd_offset, fd."""

CREATE_GUEST_MEMFD: Final = Struct("=QQ48x")
"""size, flags."""

PRE_FAULT_MEMORY: Final = Struct("=QQQ40x")
"""gpa, size, flags."""

REGS: Final = Struct("=18Q")
"""rax rbx rcx rdx rsi rdi rsp rbp r8..r15 rip rflags."""

SEGMENT: Final = Struct("=QIHBBBBBBBB2x")
"""base, limit, selector, type, present, dpl, db, s, l, g, avl."""

DESCRIPTOR_TABLE: Final = Struct("=QH6x")
"""base, limit."""

CONTROL_REGISTERS: Final = Struct("=7Q")
"""cr0 cr2 cr3 cr4 cr8 efer apic_base."""

SEGMENTS: Final = 8
"""cs ds es fs gs ss tr ldt."""

SREGS: Final = Struct(
    f"{SEGMENTS * SEGMENT.size + 2 * DESCRIPTOR_TABLE.size}s"
    f"{CONTROL_REGISTERS.size}s32x"
)
"""Segments and tables, control registers, interrupts."""

KVM_GET_API_VERSION: Final = _io(0x00)
KVM_CREATE_VM: Final = _io(0x01)
KVM_CHECK_EXTENSION: Final = _io(0x03)
KVM_GET_VCPU_MMAP_SIZE: Final = _io(0x04)
KVM_CREATE_VCPU: Final = _io(0x41)
KVM_SET_USER_MEMORY_REGION2: Final = _iow(0x49, USERSPACE_MEMORY_REGION2)
KVM_RUN: Final = _io(0x80)
KVM_SET_REGS: Final = _iow(0x82, REGS)
KVM_GET_SREGS: Final = _ior(0x83, SREGS)
KVM_SET_SREGS: Final = _iow(0x84, SREGS)
KVM_CREATE_GUEST_MEMFD: Final = _iowr(0xD4, CREATE_GUEST_MEMFD)
KVM_PRE_FAULT_MEMORY: Final = _iowr(0xD5, PRE_FAULT_MEMORY)

# struct kvm_run: the head, and what a union behind it holds for each exit.
RUN_EXIT_REASON: Final = Struct("=8xI")
RUN_UNION_OFFSET: Final = 32
RUN_IO: Final = Struct("=BBHIQ")
"""direction, size, port, count, data_offset."""
RUN_MMIO: Final = Struct("=Q8sIB")
"""phys_addr, data, len, is_write."""
RUN_MMIO_DATA_OFFSET: Final = 8
RUN_MEMORY_FAULT: Final = Struct("=QQQ")
"""flags, gpa, size."""
