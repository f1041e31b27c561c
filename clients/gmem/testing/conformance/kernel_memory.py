"""A mapping that a VMM hands to KVM as userspace_addr, and touches in no other way.

A page that is refused kills who touches it. KVM may touch it: to KVM it is EFAULT.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Final

from gmem.uapi.pages import PAGE_SIZE

MAPPED_BYTES_MAX: Final = 1 << 40
"""Of a memslot whose size is nonsense no more than this is mapped."""

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_MAP_FAILED: Final = ctypes.c_void_p(-1).value


class Mapping:
    """Bytes of a file, mapped MAP_SHARED; `address` is that of byte `offset`."""

    def __init__(self, fd: int, offset: int, length: int) -> None:
        """Map it; past the end of the file, too, which Python's own mmap refuses."""
        inside = offset % PAGE_SIZE
        self._length = max(PAGE_SIZE, min(length + inside, MAPPED_BYTES_MAX))
        found = _LIBC.mmap(
            None,
            ctypes.c_size_t(self._length),
            ctypes.c_int(mmap.PROT_READ | mmap.PROT_WRITE),
            ctypes.c_int(mmap.MAP_SHARED),
            ctypes.c_int(fd),
            ctypes.c_int64(offset - inside),
        )
        if found == _MAP_FAILED:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), "mmap")
        self._start = int(found)
        self.address = self._start + inside

    def close(self) -> None:
        """Unmap it; harmless when repeated."""
        if self._length:
            _LIBC.munmap(ctypes.c_void_p(self._start), ctypes.c_size_t(self._length))
            self._length = 0
