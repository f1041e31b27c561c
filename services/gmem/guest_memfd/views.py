"""What the service asks of a data plane: the views of its inodes, and their bytes.

There are two. `gmem.guest_memfd.view` serves files by FUSE, hears of every fault, and
keeps the bytes in the page store. `gmem.guest_memfd.memfd` hands out memfds, hears of
none, and moves bytes between them.
"""

from __future__ import annotations

from concurrent.futures import Executor
from typing import Protocol

from gmem.guest_memfd.core.values import PageState, ViewKind
from gmem.guest_memfd.page_states import InodeTable
from gmem.uapi.pages import PgRange


class Views(Protocol):
    """Serves the two views of every inode.

    From the event loop's thread only `add_inode`, `touched` and `ended_opens` may be
    called, and `set_state` unless `moves_bytes`; the others block.
    """

    @property
    def backend(self) -> str:
        """The word of `--backend`, GetCapabilities and `gmemctl status` for it."""

    @property
    def sees_faults(self) -> bool:
        """Whether a touched hole is heard of; else `touched` has to be asked."""

    @property
    def moves_bytes(self) -> bool:
        """Whether a page that changes its view is copied, which takes time."""

    @property
    def revokers(self) -> Executor:
        """The threads in which what blocks is to be done."""

    def start(self, *, resend: bool = False) -> object:
        """Begin to serve; `resend`: a predecessor may have left something."""

    def stop(self) -> None:
        """End what `start` began; bounded."""

    def new_table(self, ino: int, i_size: int, page_size: int) -> InodeTable:
        """Make page states, and what else an inode consists of; nobody sees it yet."""

    def add_inode(
        self,
        table: InodeTable,
        *,
        host_mmap: bool = True,
        counts_blocks: bool = True,
    ) -> None:
        """Serve the views of an inode; without `host_mmap` the host's is not mapped.

        Without `counts_blocks` st_blocks stays 0, where fstat reaches the service.
        """

    def remove_inode(self, ino: int) -> None:
        """Serve them no longer: nothing of the inode is reachable any more."""

    def set_state(
        self, ino: int, view: ViewKind, start: int, stop: int, state: PageState
    ) -> None:
        """Give pages of a view a state."""

    def invalidate(self, ino: int, view: ViewKind, start: int, stop: int) -> bool:
        """Drop pages that are CLOSING from every mapping, where that is enforced.

        Tells whether bytes came back that were not stored yet.
        """

    def quiesce(self, ino: int, view: ViewKind, start: int, stop: int) -> object:
        """Make OPEN pages QUIESCED: nobody is to touch them until they open again."""

    def write_back(self, ino: int, view: ViewKind, start: int, stop: int) -> None:
        """Have `load` find what programs stored; nothing is unmapped."""

    def load(self, ino: int, offset: int, size: int) -> bytes:
        """Return bytes of shared pages that have folios."""

    def store(self, ino: int, view: ViewKind, offset: int, data: bytes) -> None:
        """Store bytes in pages that are quiesced and have folios."""

    def open_view(self, ino: int, view: ViewKind) -> int:
        """Open a view for handing out; return its descriptor."""

    def open_states(self, ino: int) -> int | None:
        """Return a descriptor for reading the page states, where clients need it."""

    def open_count(self, ino: int, view: ViewKind) -> int:
        """Return how many files of a view are open outside this service."""

    def st_ino(self, ino: int, view: ViewKind) -> int:
        """Return what fstat and /proc/PID/maps show for a view."""

    def inode_of(self, st_dev: int, st_ino: int) -> int | None:
        """Return the inode whose host view fstat shows so; None for other files."""

    def is_view(self, st_dev: int, st_ino: int) -> bool:
        """Tell whether fstat shows a view of either kind so."""

    def parked_callers(self) -> frozenset[int]:
        """Return the threads that wait for this service in a fault."""

    def touched(self, ino: int) -> list[PgRange]:
        """Return the holes that clients have touched, in whole units."""

    def ended_opens(self) -> list[tuple[int, ViewKind]]:
        """Return what was closed unseen since the last call, once per open file."""


class Contents(Protocol):
    """The bytes behind the pages of inodes."""

    def clear_uptodate(self, table: InodeTable, pages: PgRange) -> None:
        """Forget what pages hold: their next use finds zeros."""

    def is_uptodate(self, table: InodeTable, pages: PgRange) -> bool:
        """Tell whether some page was filled."""

    def prepare(self, table: InodeTable, pages: PgRange) -> None:
        """Zero, and mark as filled, what has a folio and was not filled."""

    def zero(self, table: InodeTable, pages: PgRange) -> None:
        """Write zeros over pages that have a folio."""

    def copy_in(self, table: InodeTable, pages: PgRange, fd: int, offset: int) -> None:
        """Fill pages from `offset` of a foreign `fd`, which is not mapped; blocks.

        BadRequest when the file ends early, OSError as preadv(2) does. What was copied
        by then is never seen.
        """
