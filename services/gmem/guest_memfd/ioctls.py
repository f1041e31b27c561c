"""The ioctls of a host view: the kernel's numbers and structs, as calls of the core."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final, Self

from gmem.effects import Op
from gmem.guest_memfd.core.registry import GuestMemfdCore
from gmem.uapi.errors import KernelError
from gmem.uapi.flags import (
    KVM_GMEM_CONVERT_FORMAT,
    KVM_GMEM_CONVERT_PRIVATE,
    KVM_GMEM_CONVERT_SHARED,
    Faultability,
)

_CONVERT: Final = struct.Struct(KVM_GMEM_CONVERT_FORMAT)
_TO: Final = {
    KVM_GMEM_CONVERT_SHARED: Faultability.ALL,
    KVM_GMEM_CONVERT_PRIVATE: Faultability.GUEST,
}


@dataclass(frozen=True, slots=True)
class ConvertCall:
    """struct kvm_gmem_convert, and which of the two ioctls it came with."""

    to: Faultability
    offset: int
    size: int
    error_offset: int

    @classmethod
    def decode(cls, cmd: int, data: bytes) -> Self | None:
        """Read an ioctl; None where `cmd` is none of ours (ENOTTY)."""
        to = _TO.get(cmd)
        if to is None or len(data) != _CONVERT.size:
            return None
        return cls(to, *_CONVERT.unpack(data))

    @property
    def to_shared(self) -> bool:
        """Whether it is KVM_GMEM_CONVERT_SHARED."""
        return self.to is Faultability.ALL

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
        """Return the struct as the caller gets it back: where it failed, if it did."""
        offset = self.error_offset
        if isinstance(error, KernelError):
            offset = int(error.numbers.get("error_offset", offset))
        return _CONVERT.pack(self.offset, self.size, offset)
