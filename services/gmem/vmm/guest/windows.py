"""The mappings of the guest process, and copies to and from them that never kill.

A window is a memslot's userspace side or its guest view. A load or store of ours on a
page that is refused would be SIGBUS, so the kernel copies for us, through a scratch
memfd of each thread, and says EFAULT (rule V10 of the design).
"""

from __future__ import annotations

import mmap
import os
from typing import Final

from gmem.uapi.pages import PAGE_SHIFT, PgRange

CHUNK_BYTES: Final = 1 << 20
"""Most bytes that one system call copies, and that a stopped program still finishes."""


class Window:
    """`size` bytes of a file from `offset` on, mapped where guest frame `base_gfn` is.

    The pages are unmapped when the last thread lets go of the window.
    """

    def __init__(self, fd: int, *, base_gfn: int, size: int, offset: int) -> None:
        self.gfns = PgRange(base_gfn, base_gfn + (size >> PAGE_SHIFT))
        self._map = mmap.mmap(fd, size, flags=mmap.MAP_SHARED, offset=offset)
        self._memory = memoryview(self._map)

    def slice(self, gpa: int, size: int) -> memoryview:
        """Return the memory of a gpa range; touching it may be SIGBUS."""
        start = gpa - (self.gfns.start << PAGE_SHIFT)
        assert 0 <= start < start + size <= len(self._memory), (gpa, size)
        return self._memory[start : start + size]

    def drop(self, gfns: PgRange) -> None:
        """MADV_DONTNEED what the window has of `gfns`; the data stay in the file."""
        common = gfns.intersection(self.gfns)
        if len(common):
            offset = (common.start - self.gfns.start) << PAGE_SHIFT
            self._map.madvise(mmap.MADV_DONTNEED, offset, common.size)


class Scratch:
    """One thread's memfd: what is copied lies at the start of `memory`."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("gmem-vcpu", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, CHUNK_BYTES)
        self.memory = memoryview(mmap.mmap(self._fd, CHUNK_BYTES))

    def fetch(self, source: memoryview) -> int:
        """Copy from guest memory; return the bytes copied. OSError: EFAULT."""
        return os.pwrite(self._fd, source, 0)

    def put(self, target: memoryview) -> int:
        """Copy to guest memory; return the bytes copied. OSError: EFAULT."""
        return os.preadv(self._fd, [target], 0)

    def close(self) -> None:
        """Give the file back; the memory goes with its last user."""
        os.close(self._fd)
