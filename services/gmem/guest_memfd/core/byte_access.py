"""Bytes of shared pages, read and written without a mapping, as one would see them.

Programs may have the pages mapped, and the kernel caches what they touch: the store is
behind for pages that are dirty, and a cached page hides what is written to the store.

* A read has the dirty pages written back first. Their mappings stay. What a program
  stored before the read began is in it; what it stores meanwhile may be or not.
* A write quiesces the range first: dirty bytes are stored, nothing is cached, and who
  touches a page waits. So the bytes written are the only change, no later writeback can
  bring old ones back, and who touches a page afterwards finds them.

Both hold the folios while they copy: a guest fault that holds no lock zeroes pages that
nobody has filled.
"""

from __future__ import annotations

from gmem.effects import Op, perform
from gmem.guest_memfd.core.effects import (
    LoadBytes,
    QuiesceView,
    StoreBytes,
    WriteBackView,
)
from gmem.guest_memfd.core.exposure import require_value, show
from gmem.guest_memfd.core.folios import fill
from gmem.guest_memfd.core.inode import Inode
from gmem.guest_memfd.core.poison import require_usable
from gmem.uapi.flags import Faultability
from gmem.uapi.pages import PgRange

_WAY_OUT = "convert it to shared first"


def require_shared(inode: Inode, pages: PgRange) -> None:
    """Raise NotFaultable (PAGE_NOT_FAULTABLE) at the first private page.

    And Poisoned (PAGE_POISONED) at the first with a memory error.
    """
    require_value(inode, pages, Faultability.ALL, _WAY_OUT)
    require_usable(inode, pages)


def read_bytes(inode: Inode, offset: int, size: int) -> Op[bytes]:
    """Return bytes of shared pages; a hole gets its folio, as in a host fault."""
    pages = PgRange.around(offset, size)
    require_shared(inode, pages)
    yield from fill(inode, pages)
    yield from perform(WriteBackView(inode.number, pages))
    held = yield from inode.folio_locks.take(pages.rounded_out(inode.order))
    try:
        return (yield from perform(LoadBytes(inode.number, offset, size)))
    finally:
        yield from inode.folio_locks.give(held)


def write_bytes(inode: Inode, offset: int, data: bytes) -> Op[None]:
    """Store bytes in shared pages, all of them or none; Contended as a punch."""
    pages = PgRange.around(offset, len(data))
    require_shared(inode, pages)
    yield from fill(inode, pages)
    try:
        yield from perform(QuiesceView(inode.number, pages))
        held = yield from inode.folio_locks.take(pages.rounded_out(inode.order))
        try:
            yield from perform(StoreBytes(inode.number, offset, data))
        finally:
            yield from inode.folio_locks.give(held)
    finally:
        yield from show(inode, pages)
