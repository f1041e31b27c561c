"""The bytes of one inode in two memfds, and how a page comes from one to the other.

Byte `n` of the inode is byte `n` of both. `place` of the page states says which of them
counts for a page:

    NOWHERE   neither: the page is zeros
    HOST      the host's; the guest's may hold what a guest stored too late
    GUEST     the guest's; the host's may hold what clients stored where they must not

What does not count is never copied and goes before the page changes its place. A page
comes to a view when that view opens it:

    1. punch it out of the file that it comes to
    2. copy what has memory (a page that is NOWHERE has nothing to copy)
    3. write its place down
    4. punch it out of the file that it leaves: every mapping loses it at once

A kill before 3 changed nothing that counts; one after it leaves bytes that do not
count, and `settle` punches those.
"""

from __future__ import annotations

import fcntl
import os
from typing import Final

import numpy as np

from gmem.guest_memfd.core.values import PageState, ViewKind
from gmem.guest_memfd.memfd.opens import open_numbers
from gmem.guest_memfd.page_states import InodeTable, runs
from gmem.guest_memfd.page_store import data_runs, punch_hole
from gmem.uapi.errors import BadRequest, Reason
from gmem.uapi.pages import PAGE_SHIFT, PAGE_SIZE, PgRange

NOWHERE: Final = 0
PLACE_OF: Final = {ViewKind.HOST: 1, ViewKind.GUEST: 2}
COPY_BYTES: Final = 1 << 20


def make_files(ino: int, i_size: int) -> tuple[int, int]:
    """Make the memfds of a new inode, host first; their size is sealed."""
    host = _make_file(f"gmem-host-{ino}", i_size)
    try:
        return host, _make_file(f"gmem-guest-{ino}", i_size)
    except BaseException:
        os.close(host)
        raise


class MemfdPages:
    """The bytes of the inode that `table` describes; it has no lock of its own.

    Who moves pages holds the invalidate_lock of the inode, or its folio's.
    """

    def __init__(self, table: InodeTable, *, host_mmap: bool) -> None:
        assert len(table.files) == len(ViewKind), table.files
        self.table = table
        self.host_mmap = host_mmap
        # How many files of each view were open when that was last looked at.
        self.known = {view: len(open_numbers(self.fd(view))) for view in ViewKind}

    def fd(self, view: ViewKind) -> int:
        """Return the memfd of a view; it is not for handing out."""
        return self.table.files[view]

    def bring(self, view: ViewKind, start: int, stop: int) -> None:
        """Have pages be in the file of a view, with what they hold."""
        place = PLACE_OF[view]
        for run in runs(self.table.place[start:stop] != place, start):
            self._bring(view, *run)

    def settle(self) -> None:
        """Finish what a predecessor's end cut off: open pages are where they belong."""
        table = self.table
        for view, states in (
            (ViewKind.HOST, table.host),
            (ViewKind.GUEST, table.guest),
        ):
            for start, stop in runs(states == PageState.OPEN, 0):
                self.bring(view, start, stop)
                self._punch(_other(view), start, stop)

    def discard(self, start: int, stop: int) -> None:
        """Give the memory of pages back in both files; they read as zeros."""
        for view in ViewKind:
            self._punch(view, start, stop)

    def forget(self, start: int, stop: int) -> None:
        """Have pages hold nothing, unless their users were not told.

        A page that is OPEN to the host was given to whoever touched it, before the
        core heard of it: what is there was written since, and stays. A page that is
        OPEN to the guest becomes zeros where it is.
        """
        table = self.table
        states = table.host[start:stop]
        for first, last in runs(states != PageState.OPEN, start):
            self.discard(first, last)
            guest = table.guest[first:last] == PageState.OPEN
            table.place[first:last] = np.where(guest, PLACE_OF[ViewKind.GUEST], NOWHERE)

    def has_data(self, view: ViewKind, start: int, stop: int) -> bool:
        """Tell whether some page has memory in the file of a view."""
        found = data_runs(self.fd(view), start << PAGE_SHIFT, stop << PAGE_SHIFT)
        return next(found, None) is not None

    def touched(self) -> list[PgRange]:
        """Return the units without a folio that have memory in an OPEN host page."""
        table = self.table
        if not table.has_holes:
            return []
        units = np.zeros(table.nr_units, np.bool_)
        for first, last in data_runs(self.fd(ViewKind.HOST), 0, table.i_size):
            start, stop = first >> PAGE_SHIFT, -(-last // PAGE_SIZE)
            for a, b in table.runs_of(ViewKind.HOST, start, stop, PageState.OPEN):
                units[a >> table.order : -(-b >> table.order)] = True
        units &= table.frame == 0
        step = table.order
        return [PgRange(a << step, b << step) for a, b in runs(units, 0)]

    def fill(self, pages: PgRange, source: int, offset: int) -> None:
        """Copy bytes of a foreign file into the guest's; BadRequest, OSError."""
        target = self.fd(ViewKind.GUEST)
        self.table.place[pages.start : pages.stop] = PLACE_OF[ViewKind.GUEST]
        try:
            _copy(source, offset, target, pages.offset, pages.size)
        except BaseException:
            self._punch(ViewKind.GUEST, pages.start, pages.stop)
            raise

    def _bring(self, view: ViewKind, start: int, stop: int) -> None:
        other = _other(view)
        self._punch(view, start, stop)
        places = self.table.place[start:stop]
        for first, last in runs(places == PLACE_OF[other], start):
            self._copy_from(other, first, last)
        self.table.place[start:stop] = PLACE_OF[view]
        self._punch(other, start, stop)

    def _copy_from(self, source: ViewKind, start: int, stop: int) -> None:
        """Copy what has memory; what came from a client counts as filled now."""
        target = self.fd(_other(source))
        kept = [(start, stop)]
        if source is ViewKind.GUEST:
            # The next fault splits a folio that is not attached, and zeroes it: what
            # it holds is not for the host to see.
            kept = self.table.attached_in(start, stop)
        for a, b in kept:
            parts = data_runs(self.fd(source), a << PAGE_SHIFT, b << PAGE_SHIFT)
            for first, last in parts:
                _copy(self.fd(source), first, target, first, last - first)
                self.table.set_uptodate(first >> PAGE_SHIFT, -(-last // PAGE_SIZE))

    def _punch(self, view: ViewKind, start: int, stop: int) -> None:
        punch_hole(self.fd(view), start << PAGE_SHIFT, stop << PAGE_SHIFT)


def _other(view: ViewKind) -> ViewKind:
    return ViewKind.GUEST if view is ViewKind.HOST else ViewKind.HOST


def _make_file(name: str, size: int) -> int:
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    # Past its end is SIGBUS, as for the real thing, and nobody moves the end.
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def _copy(source: int, offset: int, target: int, at: int, length: int) -> None:
    """Copy by system calls alone: a file that ends early is no SIGBUS of ours."""
    buffer = memoryview(bytearray(min(COPY_BYTES, length)))
    done = 0
    while done < length:
        piece = buffer[: min(COPY_BYTES, length - done)]
        count = os.preadv(source, [piece], offset + done)
        if count == 0:
            raise BadRequest(
                Reason.RANGE_PAST_END,
                f"the source ends after {done} of {length} bytes: "
                "name a range inside the file",
                error_offset=offset + done,
            )
        written = os.pwritev(target, [piece[:count]], at + done)
        assert written > 0, (target, at + done)
        done += written
