"""The page states of one inode in shared memory, as two processes read them.

The guest_memfd service makes the table and changes it; the keeper holds the memfd and
reads it while it stands in. Standard library only. The layout follows from the header
alone, each part begins at a page:

    header          magic, ino, i_size, page_size; how many open files each view has
    host, guest     one byte per page: CLOSED, CLOSING, OPEN or QUIESCED
    fresh           one byte per page: 1 where the bytes are fit to be seen
    frames          one word per unit of page_size: pfn + 1, 0 for a hole
    places          one byte per page: in whose file its bytes lie, where the bytes of
                    an inode have files of their own (the backend memfd)

A word or a byte is written in one piece, so no entry is ever torn by a kill. What must
change together is no business of this table: that is what the journal is for.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from typing import Final

from gmem.uapi.errors import BadRequest, Reason
from gmem.uapi.pages import PAGE_SHIFT, PAGE_SIZE, order_of

CLOSED, CLOSING, OPEN, QUIESCED = range(4)
"""The states of a page in a view; `gmem.guest_memfd.core.values` gives them types."""

QUIESCED_SECONDS_MAX: Final = 4.0
QUIESCED_POLL_SECONDS: Final = 0.001
_OPEN_BYTE: Final = bytes([OPEN])
MAGIC: Final = b"gmempgs3"
# magic, ino, i_size, page_size
HEADER: Final = struct.Struct("<8sQQQ")
_OPENS_AT: Final = 64
_COUNTED_AT: Final = 128
COUNTED_MAX: Final = 128
"""Requests that are remembered as counted: far more than can be under way at once."""
# A request that was sent again carries this bit in its number (FUSE_UNIQUE_RESEND).
_SENT_AGAIN: Final = 1 << 63


class StateTable:
    """The table in the memfd `fd`, mapped; every range is in pages.

    `states[view]`, `fresh`, `frames` and `places` are memoryviews of the memory itself.
    There is no lock: who changes entries agrees with the others by other means.
    """

    def __init__(self, fd: int) -> None:
        """Map it. Raises BadRequest for a file that is no such table."""
        magic, ino, i_size, page_size = _header(fd)
        if magic != MAGIC or os.fstat(fd).st_size < table_bytes(i_size, page_size):
            raise BadRequest(
                Reason.DESCRIPTOR_TYPE,
                f"magic {magic!r} is not that of a page-state table: pass the memfd "
                "that create_fd made",
            )
        self.fd = fd
        self.ino = ino
        self.i_size = i_size
        self.page_size = page_size
        self.order = order_of(page_size)
        self.nr_pages = i_size >> PAGE_SHIFT
        self.nr_units = -(-i_size // page_size)
        length = table_bytes(i_size, page_size)
        # The mapping goes with the last view of it.
        memory = memoryview(mmap.mmap(fd, length, mmap.MAP_SHARED))
        size = _page_multiple(self.nr_pages)
        starts = [PAGE_SIZE + size * part for part in range(4)]
        host, guest, fresh = (memory[at : at + self.nr_pages] for at in starts[:3])
        self.states = (host, guest)
        self.fresh = fresh
        self.frames = memory[starts[3] : starts[3] + 8 * self.nr_units].cast("q")
        at = starts[3] + _page_multiple(8 * self.nr_units)
        self.places = memory[at : at + self.nr_pages]
        self._opens = memory[_OPENS_AT : _OPENS_AT + 16].cast("Q")
        counted = memory[_COUNTED_AT : _COUNTED_AT + 8 * (COUNTED_MAX + 1)].cast("Q")
        self._counted, self._cursor = counted[:COUNTED_MAX], counted[COUNTED_MAX:]

    def pfn_of(self, pgoff: int) -> int | None:
        """Return the frame behind page `pgoff`, or None for a hole."""
        first: int = self.frames[pgoff >> self.order]
        if first == 0:
            return None
        return first - 1 + (pgoff & ((1 << self.order) - 1))

    def opens(self, view: int) -> int:
        """Return how many files of a view are open, the service's own left out."""
        return self._opens[view]

    def count_open(self, view: int, unique: int) -> int:
        """Count the OPEN request `unique` once, also when it was sent again.

        Whoever is killed between the two steps leaves the count too high, never too
        low: an inode may then live too long, but is not taken from under a client.
        """
        if not self._was_counted(unique):
            self._opens[view] += 1
            self._remember(unique)
        return self._opens[view]

    def count_release(self, view: int, unique: int) -> int:
        """Count the RELEASE request `unique` once; a kill errs as in `count_open`."""
        if not self._was_counted(unique) and self._opens[view]:
            self._remember(unique)
            self._opens[view] -= 1
        return self._opens[view]

    def _was_counted(self, unique: int) -> bool:
        if not unique & _SENT_AGAIN:
            return False
        number = unique & ~_SENT_AGAIN
        return any(counted == number for counted in self._counted)

    def _remember(self, unique: int) -> None:
        at = self._cursor[0] % COUNTED_MAX
        self._counted[at] = unique & ~_SENT_AGAIN
        self._cursor[0] = at + 1


class HostStates:
    """The host view's column of a table, for a program that may only read it.

    A program that maps a view without faults looks here what it may touch.
    """

    def __init__(self, fd: int) -> None:
        """Map it; `fd` stays the caller's. BadRequest for what is no such table."""
        magic, _ino, i_size, _page_size = _header(fd)
        if magic != MAGIC:
            raise BadRequest(
                Reason.DESCRIPTOR_TYPE,
                f"magic {magic!r} is not that of a page-state table: pass the "
                "descriptor that came with the view",
            )
        nr_pages = i_size >> PAGE_SHIFT
        self._map = mmap.mmap(fd, PAGE_SIZE + nr_pages, mmap.MAP_SHARED, mmap.PROT_READ)

    def first_private(self, start: int, stop: int) -> int | None:
        """Return the first page of `[start, stop)` that may not be touched, or None.

        A page that opens again by itself is waited for, as a fault would wait.
        """
        deadline = time.monotonic() + QUIESCED_SECONDS_MAX
        while (page := self._first_not_open(start, stop)) is not None:
            quiesced = self._map[PAGE_SIZE + page] == QUIESCED
            if not quiesced or time.monotonic() >= deadline:
                return page
            time.sleep(QUIESCED_POLL_SECONDS)
        return None

    def _first_not_open(self, start: int, stop: int) -> int | None:
        states = self._map[PAGE_SIZE + start : PAGE_SIZE + stop]
        nr_open = len(states) - len(states.lstrip(_OPEN_BYTE))
        return None if nr_open == len(states) else start + nr_open


def create_fd(ino: int, i_size: int, page_size: int) -> int:
    """Make the memfd of a new table: every page CLOSED, every unit a hole."""
    fd = os.memfd_create(f"gmem-states-{ino}", os.MFD_CLOEXEC)
    os.ftruncate(fd, table_bytes(i_size, page_size))
    os.pwrite(fd, HEADER.pack(MAGIC, ino, i_size, page_size), 0)
    return fd


def table_bytes(i_size: int, page_size: int) -> int:
    """Return the length of the memfd that holds the table of such an inode."""
    nr_pages, nr_units = i_size >> PAGE_SHIFT, -(-i_size // page_size)
    return PAGE_SIZE + 4 * _page_multiple(nr_pages) + _page_multiple(8 * nr_units)


def _header(fd: int) -> tuple[bytes, int, int, int]:
    raw = os.pread(fd, HEADER.size, 0)
    return HEADER.unpack(raw) if len(raw) == HEADER.size else (raw, 0, 0, PAGE_SIZE)


def _page_multiple(count: int) -> int:
    return -(-count // PAGE_SIZE) * PAGE_SIZE
