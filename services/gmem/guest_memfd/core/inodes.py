"""The inodes of one host by number, while they live; what every call on them needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gmem.effects import Op, T, perform
from gmem.guest_memfd.core import operations
from gmem.guest_memfd.core.checks import require_range
from gmem.guest_memfd.core.deferred import DeferredMerges
from gmem.guest_memfd.core.effects import Record
from gmem.guest_memfd.core.inode import Inode
from gmem.guest_memfd.core.lineage import LineageRules, Operation
from gmem.guest_memfd.core.operations import guarded
from gmem.guest_memfd.core.restoring import restore_inodes
from gmem.guest_memfd.core.values import InodeStatistics
from gmem.uapi.errors import NoSuchObject, Reason
from gmem.uapi.lineage import Lineage
from gmem.uapi.pages import PgRange


@dataclass(frozen=True, slots=True)
class ByteRange:
    """A range of one inode as a caller names it: inode number and bytes."""

    inode: int
    offset: int
    size: int


class Inodes:
    """All inodes; an inode that nothing keeps any more is evicted by who used it last.

    The base of what can be called: see `GuestMemfdCore`.
    """

    def __init__(self, rules: Mapping[Lineage, LineageRules]) -> None:
        self._rules = rules
        self._inodes: dict[int, Inode] = {}
        self._next_inode = 1
        self._next_hold = 1
        self.deferred = DeferredMerges()

    # Looking.

    def inode(self, number: int) -> Inode:
        """Return an inode; NoSuchObject (INODE_UNKNOWN) if it never was, or is gone."""
        inode = self._inodes.get(number)
        if inode is None or inode.gone:
            raise NoSuchObject(
                Reason.INODE_UNKNOWN,
                f"inode {number} was never issued, or is gone: create one",
                inode=number,
            )
        return inode

    def open_file(self, number: int) -> Inode:
        """Return an inode whose file is open; NoSuchObject (FD_UNKNOWN) otherwise."""
        inode = self._inodes.get(number)
        if inode is None or not inode.file_open:
            raise NoSuchObject(
                Reason.FD_UNKNOWN,
                f"inode {number} was never issued, or is closed: create one",
                inode=number,
            )
        return inode

    def find(self, number: int) -> Inode | None:
        """Return an inode, or None if it never was, or is gone."""
        inode = self._inodes.get(number)
        return None if inode is None or inode.gone else inode

    @property
    def numbers(self) -> list[int]:
        """The numbers of the inodes that are not gone, rising."""
        return [number for number, inode in self._inodes.items() if not inode.gone]

    @property
    def handles(self) -> set[int]:
        """The reservations of all inodes, of dead ones that left something too."""
        living = {inode.handle for inode in self._inodes.values()}
        return living | self.deferred.handles

    def statistics(self) -> tuple[InodeStatistics, ...]:
        """Return a snapshot of every inode, by rising number."""
        return tuple(self.inode(number).statistics() for number in self.numbers)

    def check_all(self) -> None:
        """Assert everything that holds when no operation is under way. Slow."""
        for inode in self._inodes.values():
            inode.check_all()
        self.deferred.check()

    # A journal's.

    def restore(self, rows: Mapping[str, Any], epoch: int) -> None:
        """Have the inodes of a predecessor; `epoch` keeps numbers of holds unique."""
        assert not self._inodes, "it is in use already"
        self._inodes = restore_inodes(rows, self._rules)
        self._next_inode = rows.get("next_inode", 1)
        self._next_hold = max(self._next_hold, epoch << 32)

    def forget(self, number: int) -> None:
        """Drop an inode whose reservation is gone: its eviction was nearly done."""
        del self._inodes[number]

    def evict_if_unused(self, number: int) -> Op[None]:
        """Evict an inode that nothing keeps any more, where that was cut off."""
        yield from self._using([self.inode(number)], nothing())

    # What dead inodes left behind.

    def merge(self, number: int) -> Op[None]:
        """Give back the split folios of a dead inode that are complete."""
        yield from self.deferred.run(number)
        self.deferred.check()

    # Helpers.

    def _pages_of(self, target: ByteRange) -> tuple[Inode, PgRange]:
        inode = self.inode(target.inode)
        return inode, require_range(target.offset, target.size, i_size=inode.i_size)

    def _using(self, inodes: list[Inode], body: Op[T]) -> Op[T]:
        """Run `body` while the inodes cannot be evicted; then evict what may go."""
        for inode in inodes:
            inode.users += 1
            inode.uses += 1
        try:
            return (yield from body)
        finally:
            for inode in inodes:
                inode.users -= 1
            for inode in inodes:
                yield from self._evict_if_unused(inode)

    def _evict_if_unused(self, inode: Inode) -> Op[None]:
        if inode.gone or not inode.is_unused:
            return
        inode.gone = True
        try:
            body = operations.evict(inode, self.deferred)
            yield from guarded(inode, Operation.EVICT, body)
            yield from perform(Record({f"inode/{inode.number}/": None}))
        finally:
            del self._inodes[inode.number]


def nothing() -> Op[None]:
    """Do nothing, as an operation."""
    yield from ()
