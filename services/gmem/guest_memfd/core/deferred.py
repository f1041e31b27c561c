"""Split folios whose inode is gone, on their way back: page by page, then merged.

The allocator takes whole folios only. When an inode of the 51-patch series is evicted,
its split folios are freed one page after the other; a page that somebody holds comes
when it is put. Each page that arrives is counted, by the frame of its folio, in a stash
for the whole host; when the last one is there the folio is reconstructed and given
back. That is work of its own (schedule_work()): eviction does not wait for it, and the
statistics recover a moment later.

A folio that was never split, held when its inode went, takes the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from gmem.effects import Op, perform
from gmem.guest_memfd.core.effects import Free, Reconstruct
from gmem.guest_memfd.core.references import minus
from gmem.guest_memfd.core.values import Folio, Hold, MergeStatus
from gmem.uapi.errors import OPERATION_ERRORS, NoSuchObject, Reason
from gmem.uapi.pages import PgRange

MERGES_KEPT_MAX: Final = 256
"""Finished merges that can still be asked for."""


@dataclass(slots=True)
class LeftFolio:
    """A folio of a dead inode; `held` are its frames that somebody has, by hold."""

    folio: Folio
    split: bool
    held: dict[int, list[PgRange]]

    def count_held(self) -> int:
        """Return how many of its pages have not been put by everybody."""
        frames = PgRange(self.folio.pfn, self.folio.pfn + (1 << self.folio.order))
        free = [frames]
        for part in [part for parts in self.held.values() for part in parts]:
            free = [rest for run in free for rest in minus(run, part)]
        return len(frames) - sum(map(len, free))


@dataclass(slots=True)
class _Merge:
    """What one inode left behind."""

    inode: int
    handle: int
    waiting: dict[int, LeftFolio] = field(default_factory=dict)
    ready: list[LeftFolio] = field(default_factory=list)
    running: bool = False
    error: str = ""

    def arrive(self) -> None:
        """Move folios whose last page has come to those that can be given back."""
        come = [pfn for pfn, left in self.waiting.items() if not left.held]
        self.ready += [self.waiting.pop(pfn) for pfn in come]

    @property
    def done(self) -> bool:
        """Whether there is nothing left to do."""
        return not self.waiting and not self.ready


class DeferredMerges:
    """The stash of one host, and the holds on pages of inodes that are gone."""

    def __init__(self) -> None:
        self._merges: dict[int, _Merge] = {}
        self._holds: dict[int, Hold] = {}
        self._next = 1

    def __contains__(self, hold: object) -> bool:
        """Tell whether a hold on pages of a dead inode has this number."""
        return hold in self._holds

    def of_client(self, client: str) -> list[int]:
        """Return the numbers of the holds here that a client took."""
        return [n for n, hold in self._holds.items() if hold.client == client]

    def add(
        self, inode: int, handle: int, folios: list[LeftFolio], holds: Sequence[Hold]
    ) -> int | None:
        """Keep what a dying inode leaves; return the merge to run now, if any."""
        if not folios:
            return None
        number, self._next = self._next, self._next + 1
        merge = self._merges[number] = _Merge(inode, handle)
        merge.waiting = {left.folio.pfn: left for left in folios}
        held = {hold for left in folios for hold in left.held}
        self._holds |= {hold.hold: hold for hold in holds if hold.hold in held}
        merge.arrive()
        self._forget_old()
        return number if merge.ready else None

    def put(self, hold: int) -> list[int]:
        """End a hold that is here; return the merges that can go on."""
        del self._holds[hold]
        touched = []
        for number, merge in self._merges.items():
            for left in merge.waiting.values():
                left.held.pop(hold, None)
            merge.arrive()
            if merge.ready and not merge.running:
                touched.append(number)
        return touched

    def run(self, number: int) -> Op[None]:
        """Give back the folios of one merge that are complete.

        Never raises: who could hear it is gone. What failed stands in the status.
        """
        merge = self._merges.get(number)
        if merge is None or merge.running:
            return
        merge.running = True
        try:
            while merge.ready:
                yield from _give_back(merge.handle, merge.ready[0])
                merge.ready.pop(0)
            merge.error = ""
        except OPERATION_ERRORS as error:
            # The next page that arrives has it tried again.
            merge.error = str(error)
        finally:
            merge.running = False

    @property
    def handles(self) -> set[int]:
        """The reservations that still have folios out for dead inodes."""
        merges = self._merges.values()
        return {merge.handle for merge in merges if not merge.done}

    def status(self, number: int) -> MergeStatus:
        """Return how far a merge is; NoSuchObject (OPERATION_UNKNOWN)."""
        if number not in self._merges:
            raise NoSuchObject(
                Reason.OPERATION_UNKNOWN,
                f"operation {number} was never begun, or is long over: see "
                "ListOperations",
                operation=number,
            )
        merge = self._merges[number]
        pages = sum(left.count_held() for left in merge.waiting.values())
        return MergeStatus(
            number=number,
            inode=merge.inode,
            pages_left=pages,
            folios_left=len(merge.waiting) + len(merge.ready),
            done=merge.done,
            error=merge.error,
        )

    @property
    def numbers(self) -> list[int]:
        """The merges that can be asked for, in the order in which they began."""
        return list(self._merges)

    def check(self) -> None:
        """Assert that what waits is held, by holds that are known."""
        for merge in self._merges.values():
            for pfn, left in merge.waiting.items():
                assert left.held, pfn
                assert all(hold in self._holds for hold in left.held), pfn
                assert left.count_held() > 0, pfn

    def _forget_old(self) -> None:
        over = [number for number, merge in self._merges.items() if merge.done]
        for number in over[: max(0, len(self._merges) - MERGES_KEPT_MAX)]:
            del self._merges[number]


def _give_back(handle: int, left: LeftFolio) -> Op[None]:
    if left.split:
        yield from perform(Reconstruct(handle, left.folio))
        left.split = False
    yield from perform(Free(handle, (left.folio,)))
