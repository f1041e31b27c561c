"""The ioctls of a host view: the kernel's numbers and structs, as calls of the core."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final, Protocol, Self

from gmem.effects import Op
from gmem.guest_memfd.core.registry import GuestMemfdCore
from gmem.guest_memfd.core.values import AttributesCall
from gmem.uapi.errors import KernelError
from gmem.uapi.flags import (
    KVM_GMEM_CONVERT_FORMAT,
    KVM_GMEM_CONVERT_PRIVATE,
    KVM_GMEM_CONVERT_SHARED,
    KVM_MEMORY_ATTRIBUTES2_FORMAT,
    KVM_SET_MEMORY_ATTRIBUTES2,
    Faultability,
)

_CONVERT: Final = struct.Struct(KVM_GMEM_CONVERT_FORMAT)
_ATTRIBUTES2: Final = struct.Struct(KVM_MEMORY_ATTRIBUTES2_FORMAT)
_TO: Final = {
    KVM_GMEM_CONVERT_SHARED: Faultability.ALL,
    KVM_GMEM_CONVERT_PRIVATE: Faultability.GUEST,
}


class IoctlCall(Protocol):
    """One ioctl that converts, whichever series it is from."""

    @property
    def offset(self) -> int:
        """The first byte that is meant."""

    @property
    def size(self) -> int:
        """The bytes that are meant."""

    @property
    def to(self) -> Faultability:
        """What they are to become."""

    def op(self, core: GuestMemfdCore, inode: int) -> Op[None]:
        """Return the operation."""

    def answer(self, error: BaseException | None) -> bytes:
        """Return the struct as the caller gets it back: where it failed, if it did."""


@dataclass(frozen=True, slots=True)
class ConvertCall:
    """struct kvm_gmem_convert, and which of the two ioctls it came with."""

    to: Faultability
    offset: int
    size: int
    error_offset: int

    @classmethod
    def decode(cls, cmd: int, data: bytes) -> Self | None:
        """Read an ioctl; None where `cmd` is none of the 51-patch series."""
        to = _TO.get(cmd)
        if to is None or len(data) != _CONVERT.size:
            return None
        return cls(to, *_CONVERT.unpack(data))

    def op(self, core: GuestMemfdCore, inode: int) -> Op[None]:
        """Return the operation."""
        return core.convert_ioctl(
            inode,
            self.to,
            offset=self.offset,
            size=self.size,
            error_offset=self.error_offset,
        )

    def answer(self, error: BaseException | None) -> bytes:
        """Return the struct with the place where it failed."""
        offset = _error_offset(error, self.error_offset)
        return _CONVERT.pack(self.offset, self.size, offset)


@dataclass(frozen=True, slots=True)
class Attributes2Call:
    """struct kvm_memory_attributes2 of KVM_SET_MEMORY_ATTRIBUTES2."""

    call: AttributesCall

    @classmethod
    def decode(cls, cmd: int, data: bytes) -> Self | None:
        """Read an ioctl; None where `cmd` is not that of the in-place conversion."""
        if cmd != KVM_SET_MEMORY_ATTRIBUTES2 or len(data) != _ATTRIBUTES2.size:
            return None
        offset, size, attributes, flags, error_offset, *reserved = _ATTRIBUTES2.unpack(
            data
        )
        return cls(
            AttributesCall(
                offset, size, attributes, flags, error_offset, tuple(reserved)
            )
        )

    @property
    def offset(self) -> int:
        """The first byte that is meant."""
        return self.call.offset

    @property
    def size(self) -> int:
        """The bytes that are meant."""
        return self.call.size

    @property
    def to(self) -> Faultability:
        """What they are to become."""
        return self.call.to

    def op(self, core: GuestMemfdCore, inode: int) -> Op[None]:
        """Return the operation."""
        return core.attributes_ioctl(inode, self.call)

    def answer(self, error: BaseException | None) -> bytes:
        """Return the struct with the place where it failed."""
        call = self.call
        offset = _error_offset(error, call.error_offset)
        return _ATTRIBUTES2.pack(
            call.offset, call.size, call.attributes, call.flags, offset, *call.reserved
        )


def decode(cmd: int, data: bytes) -> IoctlCall | None:
    """Read an ioctl of a host view; None where it is none of ours (ENOTTY)."""
    return ConvertCall.decode(cmd, data) or Attributes2Call.decode(cmd, data)


def _error_offset(error: BaseException | None, given: int) -> int:
    if isinstance(error, KernelError):
        return int(error.numbers.get("error_offset", given))
    return given
