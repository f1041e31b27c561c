"""Every byte of the host's guest memory lies in one sparse memfd, found by its pfn.

Byte `pfn * PAGE_SIZE` of the memfd is the first byte of frame `pfn`. The file is as
long as the host has frames (1 TiB is fine): only pages that somebody wrote take
memory. It is mapped once, shared, with MADV_NOHUGEPAGE: with transparent huge pages
one written byte would make 2 MiB resident.

A memfd, because it outlives the service in the keeper's hands and a stand-in can map
it; not a view, because a process that serves views must never touch one.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from gmem.uapi.errors import BadRequest, Reason
from gmem.uapi.pages import PAGE_SHIFT, PAGE_SIZE

FALLOC_FL_KEEP_SIZE: Final = 0x01
FALLOC_FL_PUNCH_HOLE: Final = 0x02
# One preadv of more than this is cut short by the kernel (MAX_RW_COUNT) anyway.
COPY_BYTES_MAX: Final = 1 << 30

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
    ctypes.c_int64,
]


class PageStore:
    """The bytes of frames `[0, nr_pages)`; every method takes frames, none a view.

    `fd` is the memfd. Windows and arrays are the memory itself: they stay valid until
    `close()` and must not be kept longer than the frame is owned.
    """

    def __init__(self, fd: int, nr_pages: int) -> None:
        assert nr_pages > 0, nr_pages
        self.fd = fd
        self.nr_pages = nr_pages
        self._map = mmap.mmap(fd, nr_pages << PAGE_SHIFT, mmap.MAP_SHARED)
        _without_huge_pages(self._map)
        self.bytes = memoryview(self._map)
        self._array: npt.NDArray[np.uint8] = np.frombuffer(self._map, dtype=np.uint8)

    @classmethod
    def create(cls, nr_pages: int) -> PageStore:
        """Make a new store whose size is sealed: nobody can cut pages off under us."""
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        fd = os.memfd_create("gmem-store", flags)
        os.ftruncate(fd, nr_pages << PAGE_SHIFT)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        return cls(fd, nr_pages)

    @classmethod
    def from_fd(cls, fd: int, nr_pages: int) -> PageStore:
        """Map a store that another process (the keeper) made; takes `fd` over.

        Raises BadRequest when the file is shorter than `nr_pages`: touching the rest
        would be a SIGBUS of our own.
        """
        size = os.fstat(fd).st_size
        if size < nr_pages << PAGE_SHIFT:
            raise BadRequest(
                Reason.SIZE_INVALID,
                f"the store has {size >> PAGE_SHIFT} pages, {nr_pages} were promised: "
                "start keeper and service with the same --store-pages",
                available=size >> PAGE_SHIFT,
            )
        return cls(fd, nr_pages)

    def window(self, pfn: int, nr_pages: int) -> memoryview:
        """Return the bytes of `nr_pages` frames, writable, without a copy."""
        start, stop = self._bounds(pfn, nr_pages)
        return self.bytes[start:stop]

    def array(self, pfn: int, nr_pages: int) -> npt.NDArray[np.uint8]:
        """Return the same bytes as a uint8 array of shape (nr_pages * PAGE_SIZE,)."""
        start, stop = self._bounds(pfn, nr_pages)
        return self._array[start:stop]

    def zero(self, pfn: int, nr_pages: int) -> None:
        """Fill frames with zeros; they keep their memory (five times cheaper)."""
        self.array(pfn, nr_pages).fill(0)

    def clear(self, pfn: int, nr_pages: int) -> None:
        """Make frames read as zeros; bytes that nobody wrote are not touched.

        A huge folio that was never used costs one system call and stays without
        memory: only the extents of the memfd that hold data are filled.
        """
        for first, last in data_runs(self.fd, *self._bounds(pfn, nr_pages)):
            self._array[first:last].fill(0)

    def punch(self, pfn: int, nr_pages: int) -> None:
        """Give the memory of frames back; they read as zeros. OSError if refused."""
        punch_hole(self.fd, *self._bounds(pfn, nr_pages))

    def copy_in(self, pfn: int, fd: int, offset: int, length: int) -> None:
        """Read `length` bytes at `offset` of a foreign `fd` into the frames at `pfn`.

        It blocks as long as the file does, and never maps it: for worker threads.
        Raises BadRequest when the file ends early, OSError as preadv(2) does.
        """
        nr_pages = (length + PAGE_SIZE - 1) >> PAGE_SHIFT
        target = self.window(pfn, nr_pages)[:length]
        done = 0
        while done < length:
            piece = target[done : done + COPY_BYTES_MAX]
            count = os.preadv(fd, [piece], offset + done)
            if count == 0:
                raise BadRequest(
                    Reason.RANGE_PAST_END,
                    f"the source ends after {done} of {length} bytes: "
                    "name a range inside the file",
                    error_offset=offset + done,
                )
            done += count

    def resident_pages(self) -> int:
        """Return how many pages of the memfd hold memory (fstat's st_blocks)."""
        return os.fstat(self.fd).st_blocks * 512 >> PAGE_SHIFT

    def close(self) -> None:
        """Close the fd; the mapping goes when the last window or array is dropped."""
        self.bytes = memoryview(b"")
        self._array = np.empty(0, dtype=np.uint8)
        os.close(self.fd)

    def _bounds(self, pfn: int, nr_pages: int) -> tuple[int, int]:
        assert 0 <= pfn <= pfn + nr_pages <= self.nr_pages, (pfn, nr_pages)
        return pfn << PAGE_SHIFT, (pfn + nr_pages) << PAGE_SHIFT


def punch_hole(fd: int, start: int, stop: int) -> None:
    """Give the memory of bytes `[start, stop)` back; OSError if that is refused.

    Every mapping of a memfd loses the pages at once; whoever touches them again finds
    zeros.
    """
    mode = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
    if stop > start and _libc.fallocate(fd, mode, start, stop - start) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def data_runs(fd: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yield the runs of bytes in `[start, stop)` that have memory, or may have."""
    while start < stop:
        try:
            first = os.lseek(fd, start, os.SEEK_DATA)
            end = os.lseek(fd, first, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # No data up to the end of the file.
                return
            raise
        start = min(end, stop)
        if first < start:
            yield first, start


def _without_huge_pages(mapping: mmap.mmap) -> None:
    try:
        mapping.madvise(mmap.MADV_NOHUGEPAGE)
    except OSError as error:
        # A kernel built without transparent huge pages knows no such advice.
        if error.errno != errno.EINVAL:
            raise
