"""Who restructures, attaches or frees the folios of a range right now.

The series takes hugetlb_fault_mutex_lock() around the same steps. It matters for
kvm_gmem_get_pfn() above all, which does not hold the invalidate_lock there: without
it, a conversion could split a folio that a guest fault is about to split.

A holder keeps a range, not one folio; it holds one range at a time, so there is no
order to keep. Ranges that nobody holds cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from gmem.effects import Acquire, Lock, Mode, Op, Release, Ticket, perform
from gmem.uapi.pages import PgRange


@dataclass(frozen=True, slots=True, eq=False)
class HeldFolios:
    """A range that an operation holds; compared by identity."""

    pages: PgRange
    lock: Lock
    ticket: Ticket


class FolioLocks:
    """The ranges of one inode that are held."""

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held: list[HeldFolios] = []

    def take(self, pages: PgRange) -> Op[HeldFolios]:
        """Wait until nobody holds a page of `pages`, then hold them."""
        while (other := self._holder_of(pages)) is not None:
            ticket = yield from perform(Acquire(other.lock, Mode.SHARED))
            yield from perform(Release(other.lock, ticket))
        lock = Lock(f"folios {pages.start:#x}-{pages.stop:#x}")
        held = HeldFolios(pages, lock, lock.request(Mode.EXCLUSIVE))
        self._held.append(held)
        return held

    def give(self, held: HeldFolios) -> Op[None]:
        """Let those in who wait for the range."""
        self._held.remove(held)
        yield from perform(Release(held.lock, held.ticket))

    def is_held(self, pages: PgRange) -> bool:
        """Tell whether somebody holds a page of `pages`."""
        return self._holder_of(pages) is not None

    @property
    def idle(self) -> bool:
        """Whether nothing is held."""
        return not self._held

    def _holder_of(self, pages: PgRange) -> HeldFolios | None:
        return next((h for h in self._held if h.pages.overlaps(pages)), None)
