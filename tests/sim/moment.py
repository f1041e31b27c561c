"""What checkers look at: a host between two steps."""

from __future__ import annotations

from dataclasses import dataclass

from gmem.guest_memfd.core.filemap import Entry
from gmem.guest_memfd.core.inode import Inode
from gmem.uapi.pages import PAGE_SIZE, PgRange
from gmem.vmm.core.memslots import Memslot
from tests.sim.host import Host


@dataclass(frozen=True, slots=True)
class Moment:
    """A host between two steps; `folios` of each inode, also while it is evicted."""

    host: Host
    folios: list[tuple[Inode, list[tuple[int, Entry]]]]

    @classmethod
    def now(cls, host: Host) -> Moment:
        """Read the filemaps once for all checkers."""
        inodes = host.guest_memfd._inodes.values()
        folios = [(inode, list(inode.filemap.entries(inode.whole))) for inode in inodes]
        return cls(host, folios)


def pages_of(slot: Memslot, gfns: PgRange) -> PgRange:
    """Return the pages of its file behind guest frames of a memslot."""
    first = (slot.file_offset(gfns.start)) // PAGE_SIZE
    return PgRange(first, first + len(gfns))
