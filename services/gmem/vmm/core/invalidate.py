"""The bracket around every change that stage 2 must not race with.

As kvm->mmu_invalidate_seq and mmu_invalidate_in_progress: a page fault takes the
sequence first, asks for the page, and installs what it got only if no bracket over its
frames is open and none was opened or closed meanwhile. Two differences, both on
purpose. Brackets are kept by their key, so that a begin or an end that was delivered
twice counts once. And the sequence moves at begin as well as at end, because the guest
process compares it with the last notice that it has acted on.

Nothing here waits or yields: `begin` and `end` are called by the one upcall, which must
be a leaf (rule V3 of the design).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from gmem.uapi.pages import PgRange

Key: TypeAlias = str | int


@dataclass(frozen=True, slots=True)
class Notice:
    """What the guest process is told: drop `gfns`, and how far the sequence is.

    `gfns` is empty where a bracket closed.
    """

    seq: int
    in_progress: int
    gfns: PgRange


@dataclass(slots=True)
class Invalidation:
    """The open brackets of one VM and their sequence."""

    seq: int = 0
    _open: dict[tuple[Key, PgRange], None] = field(default_factory=dict)

    @property
    def in_progress(self) -> int:
        """How many brackets are open."""
        return len(self._open)

    def begin(self, key: Key, gfns: PgRange) -> Notice:
        """Open a bracket (kvm_mmu_invalidate_begin); a repeat opens no second one."""
        if (key, gfns) not in self._open:
            self._open[key, gfns] = None
            self.seq += 1
        return Notice(self.seq, self.in_progress, gfns)

    def end(self, key: Key, gfns: PgRange) -> Notice:
        """Close a bracket (kvm_mmu_invalidate_end); a repeat closes nothing."""
        if (key, gfns) in self._open:
            del self._open[key, gfns]
            self.seq += 1
        return Notice(self.seq, self.in_progress, PgRange(gfns.start, gfns.start))

    def must_retry(self, seq: int, gfns: PgRange) -> bool:
        """Tell whether what was learnt at `seq` about `gfns` may be stale."""
        if any(gfns.overlaps(held) for _, held in self._open):
            return True
        return seq != self.seq
