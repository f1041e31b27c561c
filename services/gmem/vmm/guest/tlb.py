"""What the guest process remembers of stage 2, and how it learns that it is stale.

The vmm keeps one number in a page that both processes map: mmu_invalidate_seq. Whoever
is about to use an entry first waits until every notice up to that number was acted on;
whoever has used one looks whether its frames were dropped meanwhile, and if so does the
access again. So an access that began after an invalidation never uses what it removed.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import Final

from gmem.uapi.pages import PgRange
from gmem.vmm.core.runs import RunMap

SYNC_SECONDS_MAX: Final = 10.0
"""Notices come over a local socket; later than this the vmm is stuck."""
HISTORY_MAX: Final = 256
"""Invalidations during one access; beyond it the access is repeated to be safe."""


@dataclass(frozen=True, slots=True)
class Translation:
    """Where guest frames are found."""

    window: int
    private: bool
    writable: bool


@dataclass(frozen=True, slots=True)
class Hit:
    """A translation that holds for `gfns`, as looked up at sequence `seq`."""

    gfns: PgRange
    translation: Translation
    seq: int


class Tlb:
    """Translations of one VM, shared by its vCPU threads."""

    def __init__(self, sequence: memoryview) -> None:
        """`sequence` is the shared page, as one unsigned 64-bit number."""
        self._sequence = sequence
        self._entries: RunMap[Translation | None] = RunMap(None)
        self._seq = 0
        self._in_progress = 0
        self._dropped: deque[tuple[int, PgRange]] = deque(maxlen=HISTORY_MAX)
        self._changed = threading.Condition()

    def insert(self, gfns: PgRange, translation: Translation) -> None:
        """Remember a translation."""
        with self._changed:
            self._entries.set(gfns, translation)

    def drop(self, gfns: PgRange) -> None:
        """Forget what is known of guest frames, without an invalidation."""
        with self._changed:
            self._entries.set(gfns, None)

    def invalidated(self, seq: int, in_progress: int, gfns: PgRange) -> None:
        """Act on a notice of the vmm."""
        with self._changed:
            self._entries.set(gfns, None)
            if len(gfns):
                self._dropped.append((seq, gfns))
            self._seq, self._in_progress = seq, in_progress
            self._changed.notify_all()

    def lookup(self, gfns: PgRange) -> Hit | None:
        """Return what is known of the first of `gfns`, and how far it holds."""
        with self._changed:
            self._synchronise()
            run, translation = next(self._entries.runs(gfns))
            return Hit(run, translation, self._seq) if translation else None

    def is_stale(self, hit: Hit) -> bool:
        """Tell whether frames of `hit` were dropped since it was looked up."""
        with self._changed:
            self._synchronise()
            if self._seq == hit.seq:
                return False
            full = len(self._dropped) == HISTORY_MAX
            if full and self._dropped[0][0] > hit.seq + 1:
                return True
            return any(
                seq > hit.seq and gfns.overlaps(hit.gfns) for seq, gfns in self._dropped
            )

    def wait_past(self, seq: int, seconds: float) -> bool:
        """Wait until nothing is invalidated, or the sequence passed `seq`."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._seq > seq or not self._in_progress, seconds
            )

    def wait_idle(self, seconds: float) -> bool:
        """Wait until nothing is invalidated; tell whether something was."""
        with self._changed:
            if not self._in_progress:
                return False
            self._changed.wait_for(lambda: not self._in_progress, seconds)
            return True

    def _synchronise(self) -> None:
        """Wait until the notices up to the shared number have been acted on."""
        ahead = self._changed.wait_for(
            lambda: self._seq >= self._sequence[0], SYNC_SECONDS_MAX
        )
        assert ahead, f"notice {self._sequence[0]} did not come after {self._seq}"
