"""The calls about memory errors: injected, heard of from the allocator, forgotten."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gmem.effects import Op
from gmem.guest_memfd.core import memory_failure
from gmem.guest_memfd.core.inodes import ByteRange, Inodes
from gmem.guest_memfd.core.lineage import Operation
from gmem.guest_memfd.core.memory_failure import KillPolicy, MemoryFailure
from gmem.guest_memfd.core.operations import guarded
from gmem.guest_memfd.core.page_set import PageSet
from gmem.guest_memfd.core.poison import pages_with_errors
from gmem.uapi.pages import PAGE_SIZE, Pfn, PgRange


@dataclass(frozen=True, slots=True)
class Difference:
    """Pages of which the allocator says otherwise than their inode."""

    inode: int
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

    def differences(
        self, errors: Mapping[int, Mapping[int, int]]
    ) -> tuple[list[Difference], set[int]]:
        """Compare with what the allocator says of errors: by handle, then by frame.

        Returns what is to be done, and frames of living inodes that are in no filemap
        (yet): somebody is being handed them, or holds what was punched.
        """
        found: list[Difference] = []
        stray: set[int] = set()
        for number in self.numbers:
            inode = self.inode(number)
            said = errors.get(inode.handle, {})
            bad = pages_with_errors(inode, said)
            if bad.count < sum(said.values()):
                stray.update(said)
            new, old = _without(bad, inode.poisoned), _without(inode.poisoned, bad)
            found += [Difference(number, part, bad=True) for part in new]
            found += [Difference(number, part, bad=False) for part in old]
        return found, stray

    def apply_difference(self, difference: Difference) -> Op[None]:
        """Believe the allocator about pages; nothing where the inode is gone."""
        inode = self.find(difference.inode)
        if inode is None:
            return
        act = memory_failure.hear if difference.bad else memory_failure.forget
        body = act(inode, difference.pages)
        yield from self._using([inode], guarded(inode, Operation.ERROR, body))


def _without(pages: PageSet, others: PageSet) -> list[PgRange]:
    """Return the runs of pages in the one set and not in the other."""
    runs = pages.members(PgRange(0, pages.nr_pages))
    return [part for run in runs for part in others.holes(run)]
