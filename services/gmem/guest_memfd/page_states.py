"""What each page of one inode is to its two views: a table in shared memory.

Per page of PAGE_SIZE: a state in the host view, a state in the guest view, and
whether its bytes are fit to be seen (`uptodate`). Per unit of the inode's page size:
the frame of the attached folio. A split does not move frames, so they are kept at
huge granularity.

    CLOSED      no access; a READ is EIO (SIGBUS)
    CLOSING     no new access; writeback of what was dirty still arrives
    OPEN        accessible; a hole asks for a folio
    QUIESCED    open again soon: a READ waits, without asking anybody

The table lies in a memfd (`gmem.runtime.state_table` has its layout), so that a process
which takes over for the service can read it.
"""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt

from gmem.guest_memfd.core.values import PageState, ViewKind
from gmem.runtime import state_table
from gmem.runtime.state_table import StateTable
from gmem.uapi.errors import BadRequest, Reason
from gmem.uapi.pages import PAGE_SIZE

assert list(PageState) == [
    state_table.CLOSED,
    state_table.CLOSING,
    state_table.OPEN,
    state_table.QUIESCED,
]


class InodeTable(StateTable):
    """The page states and frames of an inode; every range is in pages.

    `host`, `guest` and `uptodate` have one uint8 per page, `frame` one int64 per unit
    of `page_size` bytes: the pfn of the folio's first page **plus one**, so that a
    hole is 0 and a new table costs no memory. They are the memory of `states`, `fresh`
    and `frames`, whose single entries cost a third of an array's; `place` is that of
    `places`. The table has no lock of its own: the view session enters it under the
    lock of its node.
    """

    def __init__(self, fd: int, files: tuple[int, ...] = ()) -> None:
        """Map a table; BadRequest if `fd` is none. Both are closed by `close`.

        `files` are the descriptors of the inode's bytes by view, where it has such.
        """
        super().__init__(fd)
        self.files = files
        self.host: npt.NDArray[np.uint8] = np.frombuffer(self.states[0], np.uint8)
        self.guest: npt.NDArray[np.uint8] = np.frombuffer(self.states[1], np.uint8)
        self.uptodate: npt.NDArray[np.uint8] = np.frombuffer(self.fresh, np.uint8)
        self.frame: npt.NDArray[np.int64] = np.frombuffer(self.frames, np.int64)
        self.place: npt.NDArray[np.uint8] = np.frombuffer(self.places, np.uint8)
        self._nr_attached = int(np.count_nonzero(self.frame))

    @classmethod
    def create(
        cls, ino: int, i_size: int, page_size: int, files: tuple[int, ...] = ()
    ) -> InodeTable:
        """Make the table of a new inode: every page CLOSED, every unit a hole."""
        if i_size <= 0 or i_size % PAGE_SIZE:
            raise BadRequest(
                Reason.SIZE_INVALID,
                f"size {i_size} is not a positive multiple of {PAGE_SIZE}: round it up",
                size=i_size,
            )
        return cls(state_table.create_fd(ino, i_size, page_size), files)

    @property
    def descriptors(self) -> list[int]:
        """Everything that outlives the service with the inode, the table first."""
        return [self.fd, *self.files]

    @property
    def has_holes(self) -> bool:
        """Whether some unit has no attached folio."""
        return self._nr_attached < self.nr_units

    @property
    def allocated_bytes(self) -> int:
        """The bytes of attached folios, as fstat reports them in st_blocks."""
        return self._nr_attached * self.page_size

    def attach(self, index: int, pfn: int) -> None:
        """Put the folio that begins at frame `pfn` at page offset `index`."""
        unit = self._unit(index)
        assert pfn >= 0, pfn
        assert self.frames[unit] == 0, (index, self.frames[unit])
        self.frames[unit] = pfn + 1
        self._nr_attached += 1

    def detach(self, index: int) -> int:
        """Make the unit at `index` a hole; return the pfn that was attached."""
        unit = self._unit(index)
        pfn = self.frames[unit] - 1
        assert pfn >= 0, index
        self.frames[unit] = 0
        self._nr_attached -= 1
        return pfn

    def state_of(self, view: ViewKind, pgoff: int) -> PageState:
        """Return the state of one page in one view."""
        return PageState(self.states[view][pgoff])

    def set_state(
        self, view: ViewKind, start: int, stop: int, state: PageState
    ) -> None:
        """Give pages `[start, stop)` of one view a state."""
        assert 0 <= start <= stop <= self.nr_pages, (start, stop)
        if stop - start == 1:
            self.states[view][start] = state
        else:
            (self.guest if view else self.host)[start:stop].fill(int(state))

    def set_host(self, start: int, stop: int, state: PageState) -> None:
        """Give pages of the host view a state (no request is answered for it)."""
        self.set_state(ViewKind.HOST, start, stop, state)

    def set_guest(self, start: int, stop: int, state: PageState) -> None:
        """Give pages of the guest view a state (no request is answered for it)."""
        self.set_state(ViewKind.GUEST, start, stop, state)

    def set_uptodate(self, start: int, stop: int) -> None:
        """Mark pages as fit to be seen: somebody has filled them."""
        self.uptodate[start:stop] = 1

    def clear_uptodate(self, start: int, stop: int) -> None:
        """Have pages zeroed on their next use."""
        self.uptodate[start:stop] = 0

    def runs_of(
        self, view: ViewKind, start: int, stop: int, state: PageState
    ) -> list[tuple[int, int]]:
        """Return the maximal runs of pages in `state` inside `[start, stop)`."""
        if stop - start == 1:
            return [(start, stop)] if self.states[view][start] == state else []
        states = (self.guest if view else self.host)[start:stop]
        return runs(states == int(state), start)

    def stale_in(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Return the runs of pages in `[start, stop)` that are not uptodate."""
        return runs(self.uptodate[start:stop] == 0, start)

    def attached_in(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Return the runs of pages in `[start, stop)` that have a folio."""
        first, last = start >> self.order, -(-stop >> self.order)
        if last - first == 1:
            return [(start, stop)] if self.frames[first] else []
        present = runs(self.frame[first:last] != 0, first)
        return [
            (max(start, a << self.order), min(stop, b << self.order))
            for a, b in present
        ]

    def check(self) -> None:
        """Assert that the attached folios are counted, and that none overlap."""
        attached = self.frame[self.frame != 0]
        assert len(attached) == self._nr_attached, (len(attached), self._nr_attached)
        assert len(np.unique(attached)) == len(attached), "a frame is attached twice"

    def close(self) -> None:
        """Close the descriptors; the mapping goes with the last reference to it."""
        for fd in self.descriptors:
            os.close(fd)

    def _unit(self, index: int) -> int:
        unit = index >> self.order
        assert index == unit << self.order, (index, self.order)
        assert unit < self.nr_units, (index, self.nr_units)
        return unit


def runs(mask: npt.NDArray[np.bool_], base: int) -> list[tuple[int, int]]:
    """Return the half-open runs of True in `mask`, shifted by `base`."""
    if not mask.any():
        return []
    if mask.all():
        return [(base, base + len(mask))]
    padded = np.concatenate(([False], mask, [False]))
    edges = np.flatnonzero(padded[1:] != padded[:-1]) + base
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]
