"""One inode as requests meet it: what may be answered now, what waits, what fails.

Who may read and write what is `gmem.runtime.page_access`; here is what waits. A hole of
the host view waits for a folio, a page that is punched for its end. A hole of the guest
view is EIO at once: the guest asks its vmm for the folio.

A READ that waits is *parked*: an entry in a table, no thread. It is claimed by
removing it from the table, under the lock of the node; whoever removed it answers it.

A *watch* is how a range is quiesced: it notes which pages were answered since it
began, and may hold READs for the short time in which their page is invalidated.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from gmem.guest_memfd.core.values import PageState, ViewKind
from gmem.guest_memfd.page_states import InodeTable
from gmem.guest_memfd.page_store import PageStore
from gmem.runtime.page_access import Access, PageAccess
from gmem.uapi.pages import PAGE_SHIFT, PAGE_SIZE

_PAGE_MASK: Final = PAGE_SIZE - 1


class Wait(Enum):
    """Why a READ has no answer yet."""

    FOLIO = "the page is a hole: the core must attach a folio"
    QUIESCED = "the range is being punched: it opens again by itself"
    HELD = "the page is being invalidated: a moment"


@dataclass(eq=False, slots=True)
class ParkedRead:
    """A READ of one page that waits; times are those of time.monotonic()."""

    unique: int
    pid: int
    view: ViewKind
    pgoff: int
    offset: int
    size: int
    since: float
    asking: bool = False
    asks: int = 0


@dataclass(eq=False, slots=True)
class Watch:
    """Pages `[start, stop)` of a view that are being quiesced."""

    view: ViewKind
    start: int
    stop: int
    hold: bool = False
    answered: set[int] = field(default_factory=set)


@dataclass(eq=False, slots=True)
class WriteWatch:
    """Pages `[start, stop)` of a view of which somebody asks whether they are dirty."""

    view: ViewKind
    start: int
    stop: int
    seen: bool = False


@dataclass(frozen=True, slots=True)
class ReadVerdict:
    """One of three: data (pieces of the store), an errno, or a reason to wait."""

    data: tuple[memoryview, ...] = ()
    error: int = 0
    wait: Wait | None = None


_EIO: Final = ReadVerdict(error=errno.EIO)
_WAIT_FOLIO: Final = ReadVerdict(wait=Wait.FOLIO)
_WAIT_QUIESCED: Final = ReadVerdict(wait=Wait.QUIESCED)
_WAIT_HELD: Final = ReadVerdict(wait=Wait.HELD)
_VERDICTS: Final = {
    Access.HOLE: _WAIT_FOLIO,
    Access.QUIESCED: _WAIT_QUIESCED,
    Access.CLOSING: _EIO,
    Access.REFUSED: _EIO,
}


class ViewNode(PageAccess[InodeTable]):
    """The requests and the page table of one inode.

    Every method but the constructor is called with `lock` held. Without `host_mmap`
    the host view cannot be mapped; without `counts_blocks` its st_blocks stays 0.
    """

    def __init__(
        self,
        table: InodeTable,
        store: PageStore,
        *,
        host_mmap: bool = True,
        counts_blocks: bool = True,
    ) -> None:
        super().__init__(table, store.bytes)
        self.ino = table.ino
        self.host_mmap = host_mmap
        self.counts_blocks = counts_blocks
        self.lock = threading.Lock()
        self.parked: dict[int, ParkedRead] = {}
        self.watches: list[Watch] = []
        self.write_watches: list[WriteWatch] = []

    def read(
        self, view: ViewKind, offset: int, size: int, *, held: bool = True
    ) -> ReadVerdict:
        """Judge a READ; pages that are given out are zeroed first if nobody has.

        `held=False` is for a READ that was held long enough.
        """
        first = offset >> PAGE_SHIFT
        stop = (offset + size + _PAGE_MASK) >> PAGE_SHIFT
        access = self.access(view, first, stop)
        if access is Access.HOLE and view is ViewKind.GUEST:
            return _EIO
        if access is not Access.DATA:
            return _VERDICTS[access]
        if self.watches:
            verdict = self._watched(view, first, stop, held=held)
            if verdict is not None:
                return verdict
        return ReadVerdict(self.data(offset, offset + size))

    def _watched(
        self, view: ViewKind, first: int, stop: int, *, held: bool
    ) -> ReadVerdict | None:
        for watch in self.watches:
            if watch.view != view or watch.start >= stop or first >= watch.stop:
                continue
            if watch.hold and held:
                return _WAIT_HELD if stop - first == 1 else _EIO
            watch.answered.update(range(first, stop))
        return None

    def note_write(self, view: ViewKind, offset: int, size: int) -> None:
        """Tell who asks of a WRITE that has arrived."""
        first, stop = offset >> PAGE_SHIFT, (offset + size + _PAGE_MASK) >> PAGE_SHIFT
        for watch in self.write_watches:
            if watch.view is view and watch.start < stop and first < watch.stop:
                watch.seen = True

    def set_state(
        self, view: ViewKind, start: int, stop: int, state: PageState
    ) -> list[ParkedRead]:
        """Change states; return the parked READs of the range to be looked at now.

        For CLOSING and CLOSED they are claimed (removed): the caller answers EIO. For
        OPEN they stay parked: the caller dispatches each again.
        """
        self.table.set_state(view, start, stop, state)
        touched = self.parked_in(view, start, stop)
        if state in (PageState.OPEN, PageState.QUIESCED):
            return touched if state is PageState.OPEN else []
        for parked in touched:
            del self.parked[parked.unique]
        return touched

    def parked_in(self, view: ViewKind, start: int, stop: int) -> list[ParkedRead]:
        """Return the READs that wait for a page of the range."""
        waiting = self.parked.values()
        return [p for p in waiting if p.view == view and start <= p.pgoff < stop]

    def claim(self, parked: ParkedRead) -> bool:
        """Take a parked READ out; False when somebody else has answered it."""
        return self.parked.pop(parked.unique, None) is parked

    def claim_all(self, reads: Iterable[ParkedRead]) -> list[ParkedRead]:
        """Take those out that are still parked."""
        return [parked for parked in reads if self.claim(parked)]

    def check(self) -> None:
        """Assert that no READ waits for a page that is closed."""
        for parked in self.parked.values():
            state = self.table.state_of(parked.view, parked.pgoff)
            assert state in (PageState.OPEN, PageState.QUIESCED), parked
