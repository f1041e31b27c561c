"""READ and WRITE of one inode against its page states and the store, without I/O.

The table of design rule V4, for the service that serves the views and for the keeper
that stands in for it:

    request                 OPEN+folio  OPEN, hole   QUIESCED  CLOSING  CLOSED
    READ of one page        data        hole          wait     EIO      EIO
    READ of several pages   data        EIO           EIO      EIO      EIO
    WRITE (writeback)       store       EIO, counted  store    store    EIO, counted

A READ past i_size is EIO. Never a short answer: the kernel would take the rest for
zeros. Standard library only.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Final, Generic, TypeVar

from gmem.runtime.state_table import CLOSED, CLOSING, OPEN, QUIESCED, StateTable
from gmem.uapi.pages import PAGE_SHIFT, PAGE_SIZE

_PAGE_MASK: Final = PAGE_SIZE - 1
# As many as the longest READ has pages (MAX_PAGES; readahead is cut into such pieces)
# and more, because it must never be the shorter one of a comparison.
_PAGES_MAX: Final = 512
_OPEN_RUN: Final = bytes([OPEN]) * _PAGES_MAX
_FRESH_RUN: Final = b"\1" * _PAGES_MAX
_ZEROS: Final = memoryview(bytes(_PAGES_MAX * PAGE_SIZE))

TableT = TypeVar("TableT", bound=StateTable)


class Access(Enum):
    """What becomes of a READ."""

    DATA = "every page is open and has its folio"
    HOLE = "the one page is open, but has no folio"
    QUIESCED = "the one page opens again by itself"
    CLOSING = "the one page is being taken away"
    REFUSED = "EIO"


@dataclass(frozen=True, slots=True)
class WriteOutcome:
    """What became of a WRITE: bytes stored, and the errno of what was not."""

    stored: int
    error: int
    to_hole: bool = False
    to_closed: bool = False


_OF_STATE: Final = {
    CLOSED: Access.REFUSED,
    CLOSING: Access.CLOSING,
    QUIESCED: Access.QUIESCED,
}


class PageAccess(Generic[TableT]):
    """One inode's `table`, and `memory`, the bytes of the store from frame 0 on.

    It has no lock: calls for one inode come one after the other.
    """

    def __init__(self, table: TableT, memory: memoryview) -> None:
        self.table = table
        self._memory = memory

    def access(self, view: int, first: int, stop: int) -> Access:
        """Judge a READ of pages `[first, stop)`."""
        table = self.table
        if stop > table.nr_pages or stop <= first:
            return Access.REFUSED
        states = table.states[view]
        if stop - first > 1:
            all_open = states[first:stop] == _OPEN_RUN[: stop - first]
            whole = all_open and self._has_folios(first, stop)
            return Access.DATA if whole else Access.REFUSED
        state = states[first]
        if state == OPEN:
            present = table.frames[first >> table.order]
            return Access.DATA if present else Access.HOLE
        return _OF_STATE[state]

    def data(self, offset: int, end: int) -> tuple[memoryview, ...]:
        """Return the bytes `[offset, end)` of a READ that is Access.DATA, no copy.

        Pages that nobody has filled are zeroed first.
        """
        self._prepare(offset >> PAGE_SHIFT, (end + _PAGE_MASK) >> PAGE_SHIFT)
        return self._pieces(offset, end)

    def write(
        self, view: int, offset: int, data: memoryview, *, writeback: bool
    ) -> WriteOutcome:
        """Store what may be stored of a WRITE, page by page, and judge the rest.

        A refused page among others costs only itself: the kernel merges neighbours.
        write(2) to a hole is EINVAL as on a real guest_memfd; no page of it is mapped
        anywhere, so nothing that was stored is lost. Past the end likewise.
        """
        end = min(offset + len(data), self.table.i_size)
        if offset >= end:
            return WriteOutcome(0, errno.EINVAL)
        first, stop = offset >> PAGE_SHIFT, (end + _PAGE_MASK) >> PAGE_SHIFT
        closed = CLOSED in self.table.states[view][first:stop].tobytes()
        if not closed and self._has_folios(first, stop):
            self._store_all(offset, data[: end - offset])
            return WriteOutcome(end - offset, 0)
        return self._write_some(view, offset, data[: end - offset], writeback)

    def _has_folios(self, first: int, stop: int) -> bool:
        order = self.table.order
        units = range(first >> order, ((stop - 1) >> order) + 1)
        return all(self.table.frames[unit] for unit in units)

    def _prepare(self, first: int, stop: int) -> None:
        """Zero what nobody has filled since it was allocated or converted."""
        fresh = self.table.fresh
        flags = fresh[first:stop].tobytes()
        if 0 not in flags:
            return
        for at, to in _stale_runs(flags):
            start, end = first + at, first + to
            for piece in self._pieces(start << PAGE_SHIFT, end << PAGE_SHIFT):
                piece[:] = _ZEROS[: len(piece)]
            fresh[start:end] = _FRESH_RUN[: end - start]

    def _pieces(self, offset: int, end: int) -> tuple[memoryview, ...]:
        """Return the bytes `[offset, end)` as runs of the store, without a copy."""
        pieces = []
        page_size = self.table.page_size
        while offset < end:
            stop = min(end, (offset // page_size + 1) * page_size)
            first = self.table.frames[offset >> (self.table.order + PAGE_SHIFT)]
            assert first > 0, offset
            at = ((first - 1) << PAGE_SHIFT) + offset % page_size
            pieces.append(self._memory[at : at + stop - offset])
            offset = stop
        return tuple(pieces)

    def _write_some(
        self, view: int, offset: int, data: memoryview, writeback: bool
    ) -> WriteOutcome:
        to_hole = to_closed = False
        at, end = offset, offset + len(data)
        while at < end:
            pgoff = at >> PAGE_SHIFT
            stop = min(end, (pgoff + 1) << PAGE_SHIFT)
            if self.table.states[view][pgoff] == CLOSED:
                to_closed = True
            elif self.table.pfn_of(pgoff) is None:
                to_hole = True
            else:
                self._store_all(at, data[at - offset : stop - offset])
            at = stop
        number = errno.EIO if to_closed or writeback else errno.EINVAL
        return WriteOutcome(0, number, to_hole=to_hole, to_closed=to_closed)

    def _store_all(self, offset: int, data: memoryview) -> None:
        end = offset + len(data)
        first, stop = offset >> PAGE_SHIFT, (end + _PAGE_MASK) >> PAGE_SHIFT
        # What the write leaves of its first and last page must not be stale.
        if offset & _PAGE_MASK:
            self._prepare(first, first + 1)
        if end & _PAGE_MASK:
            self._prepare(stop - 1, stop)
        at = 0
        for piece in self._pieces(offset, end):
            piece[:] = data[at : at + len(piece)]
            at += len(piece)
        self.table.fresh[first:stop] = _FRESH_RUN[: stop - first]


def _stale_runs(flags: bytes) -> Iterator[tuple[int, int]]:
    """Yield the half-open runs of zero bytes."""
    at = flags.find(0)
    while at >= 0:
        stop = flags.find(1, at)
        stop = len(flags) if stop < 0 else stop
        yield at, stop
        at = flags.find(0, stop)
