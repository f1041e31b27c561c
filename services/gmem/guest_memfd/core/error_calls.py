"""The calls about memory errors: injected, heard of from the allocator, forgotten."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gmem.effects import Op, perform
from gmem.guest_memfd.core import memory_failure
from gmem.guest_memfd.core.effects import ListErrors
from gmem.guest_memfd.core.inode import Inode
from gmem.guest_memfd.core.inodes import ByteRange, Inodes
from gmem.guest_memfd.core.lineage import Operation
from gmem.guest_memfd.core.memory_failure import KillPolicy, MemoryFailure
from gmem.guest_memfd.core.operations import guarded
from gmem.guest_memfd.core.page_set import PageSet
from gmem.guest_memfd.core.poison import pages_with_errors
from gmem.uapi.pages import PAGE_SIZE, Pfn, PgRange


@dataclass(frozen=True, slots=True)
class Difference:
    """Pages of which the allocator said otherwise than their inode."""

    pages: PgRange
    bad: bool


class ErrorCalls(Inodes):
    """What can be called about memory errors; part of `GuestMemfdCore`."""

    def inject_memory_error(
        self, number: int, offset: int, kill: KillPolicy = KillPolicy.DEFAULT
    ) -> Op[MemoryFailure]:
        """Poison the page at byte `offset`; see `memory_failure.inject`."""
        inode, pages = self._pages_of(ByteRange(number, offset, PAGE_SIZE))
        body = memory_failure.inject(inode, pages.start, kill)
        return (yield from self._using([inode], guarded(inode, Operation.ERROR, body)))

    def unpoison(self, number: int, offset: int) -> Op[Pfn]:
        """Forget the error of the page at byte `offset`; return its frame."""
        inode, pages = self._pages_of(ByteRange(number, offset, PAGE_SIZE))
        body = memory_failure.unpoison(inode, pages.start)
        return (yield from self._using([inode], guarded(inode, Operation.ERROR, body)))

    def differing(
        self, errors: Mapping[int, Mapping[int, int]]
    ) -> tuple[list[int], set[int]]:
        """Compare with what the allocator says of errors: by handle, then by frame.

        Returns the inodes that know otherwise, and frames of living inodes that are in
        no filemap (yet): somebody is being handed them, or holds what was punched.
        """
        found: list[int] = []
        stray: set[int] = set()
        for number in self.numbers:
            inode = self.inode(number)
            said = errors.get(inode.handle, {})
            bad = pages_with_errors(inode, said)
            if bad.count < sum(said.values()):
                stray.update(said)
            if _differences(inode, bad):
                found.append(number)
        return found, stray

    def compare_errors(self, number: int) -> Op[list[Difference]]:
        """Have an inode believe the allocator; return of which pages it did not.

        What the allocator says is asked for while nobody else can change the inode:
        a folio may have been punched, and a page been poisoned, since somebody looked.
        """
        inode = self.find(number)
        if inode is None:
            return []
        body = self._believe(inode)
        return (yield from self._using([inode], guarded(inode, Operation.ERROR, body)))

    def _believe(self, inode: Inode) -> Op[list[Difference]]:
        said = yield from perform(ListErrors(inode.handle))
        found = _differences(inode, pages_with_errors(inode, said))
        for difference in found:
            if difference.bad:
                yield from memory_failure.hear(inode, difference.pages, said)
            else:
                yield from memory_failure.forget(inode, difference.pages)
        return found


def _differences(inode: Inode, bad: PageSet) -> list[Difference]:
    new, old = _without(bad, inode.poisoned), _without(inode.poisoned, bad)
    return [
        *[Difference(part, bad=True) for part in new],
        *[Difference(part, bad=False) for part in old],
    ]


def _without(pages: PageSet, others: PageSet) -> list[PgRange]:
    """Return the runs of pages in the one set and not in the other."""
    runs = pages.members(PgRange(0, pages.nr_pages))
    return [part for run in runs for part in others.holes(run)]
