"""Views without FUSE: memfds that clients map directly; nobody is asked at a fault.

What that means, against `gmem.guest_memfd.view`:

* A private page is not refused: whoever touches it in a mapping of the host view finds
  zeros, and what is stored there reaches nobody. The guest maps another file.
* No fault is heard of. A hole that was touched has memory (SEEK_DATA) and no folio:
  `touched` finds it, and the service has the folio allocated then.
* fallocate and ioctl on a descriptor reach the kernel's memfd, not the service.
* There is nothing to answer, and nothing to stand in for.

The contents of pages are in `pages`, the counts of open files in `opens`.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from gmem.guest_memfd.core.values import PageState, ViewKind
from gmem.guest_memfd.memfd.opens import open_counted, open_numbers
from gmem.guest_memfd.memfd.pages import MemfdPages, make_files
from gmem.guest_memfd.page_states import InodeTable
from gmem.guest_memfd.view.callbacks import OpenCallbacks
from gmem.runtime.backend import Backend
from gmem.uapi.errors import NoSuchObject, Reason
from gmem.uapi.pages import PAGE_SHIFT, PAGE_SIZE, PgRange

MOVERS: Final = 8
"""Ranges that are moved or given back at once."""


class MemfdSession:
    """`Views` and `Contents` over memfds; see `gmem.guest_memfd.views`.

    `callbacks` hears of files that are opened.
    """

    backend: Final = Backend.MEMFD.value
    sees_faults: Final = False
    moves_bytes: Final = True

    def __init__(self, callbacks: OpenCallbacks) -> None:
        self._callbacks = callbacks
        self.revokers = ThreadPoolExecutor(MOVERS, thread_name_prefix="move")
        self._inodes: dict[int, MemfdPages] = {}
        # st_dev and st_ino of every view: which inode and which view it is.
        self._files: dict[tuple[int, int], tuple[int, ViewKind]] = {}
        # Held while a file is opened and counted, so that counts and reports agree.
        self._opening = threading.Lock()

    def start(self, *, resend: bool = False) -> None:
        """Do nothing: clients need nobody."""
        del resend

    def stop(self) -> None:
        """Let the threads that move bytes end; mappings stay as they are."""
        self.revokers.shutdown(wait=False, cancel_futures=True)

    def new_table(self, ino: int, i_size: int, page_size: int) -> InodeTable:
        """Make page states and both memfds."""
        files = make_files(ino, i_size)
        try:
            return InodeTable.create(ino, i_size, page_size, files)
        except BaseException:
            for fd in files:
                os.close(fd)
            raise

    def add_inode(
        self,
        table: InodeTable,
        *,
        host_mmap: bool = True,
        counts_blocks: bool = True,
    ) -> None:
        """Have an inode; where a predecessor left it half moved it is moved now."""
        # fstat shows the memfd's own blocks.
        del counts_blocks
        assert table.ino not in self._inodes, table.ino
        pages = MemfdPages(table, host_mmap=host_mmap)
        pages.settle()
        with self._opening:
            self._inodes[table.ino] = pages
        for view in ViewKind:
            self._files[_identity(pages.fd(view))] = (table.ino, view)

    def remove_inode(self, ino: int) -> None:
        """Forget an inode; whoever maps a file of it still has zeros."""
        pages = self._pages(ino)
        pages.discard(0, pages.table.nr_pages)
        with self._opening:
            del self._inodes[ino]
        for view in ViewKind:
            del self._files[_identity(pages.fd(view))]

    def set_state(
        self, ino: int, view: ViewKind, start: int, stop: int, state: PageState
    ) -> None:
        """Give pages a state; those that open come to this view's file first."""
        pages = self._pages(ino)
        if state is PageState.OPEN:
            pages.bring(view, start, stop)
        pages.table.set_state(view, start, stop, state)

    def invalidate(self, ino: int, view: ViewKind, start: int, stop: int) -> bool:
        """Do nothing: mappings go when the bytes do, which is when they move.

        No byte of a mapping is ever dirty: it is in the file at once.
        """
        del ino, view, start, stop
        return False

    def quiesce(self, ino: int, view: ViewKind, start: int, stop: int) -> None:
        """Say that OPEN pages are not to be touched; only clients that look obey."""
        table = self._pages(ino).table
        for first, last in table.runs_of(view, start, stop, PageState.OPEN):
            table.set_state(view, first, last, PageState.QUIESCED)

    def write_back(self, ino: int, view: ViewKind, start: int, stop: int) -> None:
        """Do nothing: what a program stores is in the file at once."""

    def load(self, ino: int, offset: int, size: int) -> bytes:
        """Return bytes of the host's file."""
        return os.pread(self._pages(ino).fd(ViewKind.HOST), size, offset)

    def store(self, ino: int, view: ViewKind, offset: int, data: bytes) -> None:
        """Store bytes in a view's file; its pages count as filled."""
        pages = self._pages(ino)
        stored = os.pwrite(pages.fd(view), data, offset)
        assert stored == len(data), (ino, offset, stored)
        pages.table.set_uptodate(
            offset >> PAGE_SHIFT, -(-(offset + stored) // PAGE_SIZE)
        )

    def open_view(self, ino: int, view: ViewKind) -> int:
        """Open a view anew; its end is noticed by `ended_opens`."""
        pages = self._pages(ino)
        # Not readable, so that mmap is refused as far as it can be.
        mapped = view is ViewKind.GUEST or pages.host_mmap
        with self._opening:
            fd = open_counted(pages.fd(view), os.O_RDWR if mapped else os.O_WRONLY)
            pages.known[view] += 1
            self._callbacks.opened(ino, view, pages.known[view])
        return fd

    def open_states(self, ino: int) -> int | None:
        """Return the page states, open for reading."""
        fd = self._pages(ino).table.fd
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)

    def open_count(self, ino: int, view: ViewKind) -> int:
        """Return how many handed out files of a view are open, wherever."""
        return len(open_numbers(self._pages(ino).fd(view)))

    def st_ino(self, ino: int, view: ViewKind) -> int:
        """Return the inode number of a view's memfd."""
        return os.fstat(self._pages(ino).fd(view)).st_ino

    def inode_of(self, st_dev: int, st_ino: int) -> int | None:
        """Return the inode whose host view this file is; None for other files."""
        ino, view = self._files.get((st_dev, st_ino), (0, ViewKind.GUEST))
        return ino if view is ViewKind.HOST else None

    def is_view(self, st_dev: int, st_ino: int) -> bool:
        """Tell whether this file is a view of either kind."""
        return (st_dev, st_ino) in self._files

    def parked_callers(self) -> frozenset[int]:
        """None: nobody waits for this service in a fault."""
        return frozenset()

    def touched(self, ino: int) -> list[PgRange]:
        """Return the holes that clients have touched, in whole units."""
        pages = self._inodes.get(ino)
        return [] if pages is None else pages.touched()

    def ended_opens(self) -> list[tuple[int, ViewKind]]:
        """Return what was closed since the last call, once per open file."""
        ended: list[tuple[int, ViewKind]] = []
        with self._opening:
            for ino, pages in self._inodes.items():
                for view, known in pages.known.items():
                    now = len(open_numbers(pages.fd(view))) if known else 0
                    ended += [(ino, view)] * (known - now)
                    pages.known[view] = now
        return ended

    # What the pages hold.

    def clear_uptodate(self, table: InodeTable, pages: PgRange) -> None:
        """Forget what pages hold; `MemfdPages.forget` says which are spared."""
        table.clear_uptodate(pages.start, pages.stop)
        self._pages(table.ino).forget(pages.start, pages.stop)

    def is_uptodate(self, table: InodeTable, pages: PgRange) -> bool:
        """Tell whether some page was filled, by a call or by a guest's store."""
        marked = bool(table.uptodate[pages.start : pages.stop].any())
        its = self._pages(table.ino)
        return marked or its.has_data(ViewKind.GUEST, pages.start, pages.stop)

    def prepare(self, table: InodeTable, pages: PgRange) -> None:
        """Mark pages that have a folio; what was not filled is zeros already."""
        for start, stop in table.attached_in(pages.start, pages.stop):
            table.set_uptodate(start, stop)

    def zero(self, table: InodeTable, pages: PgRange) -> None:
        """Make pages zeros in both files."""
        self._pages(table.ino).discard(pages.start, pages.stop)

    def copy_in(self, table: InodeTable, pages: PgRange, fd: int, offset: int) -> None:
        """Fill private pages from a foreign file; nothing stays when that fails."""
        self._pages(table.ino).fill(pages, fd, offset)

    def _pages(self, ino: int) -> MemfdPages:
        pages = self._inodes.get(ino)
        if pages is None:
            raise NoSuchObject(
                Reason.INODE_UNKNOWN, f"inode {ino} has no views: create it first"
            )
        return pages


def _identity(fd: int) -> tuple[int, int]:
    found = os.fstat(fd)
    return found.st_dev, found.st_ino
