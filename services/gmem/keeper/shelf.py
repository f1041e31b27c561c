"""Holding the files of inodes that nobody has to be served: the backend memfd.

Clients map the memfds themselves, so there is no request to answer while the service is
away, and nothing to stand in for. What its successor needs is kept: per inode the page
states and a memfd for each view.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from gmem.runtime import fdpass
from gmem.runtime.state_table import StateTable
from gmem.uapi.errors import BadRequest

FDS_PER_INODE: Final = 3


class Shelf:
    """In the place of a `StandIn`, with the same methods."""

    fds_per_inode: Final = FDS_PER_INODE
    fd: Final = None
    """Where requests would arrive: nowhere."""
    dead: Final = False
    readers_left: Final = False

    def __init__(self) -> None:
        self.inodes: dict[int, list[int]] = {}
        self.counts: Counter[str] = Counter()

    def hold(self, fds: list[int]) -> None:
        """Keep the files of an inode, ours now. BadRequest if they are none."""
        try:
            ino = StateTable(fds[0]).ino
        except BadRequest:
            fdpass.close_all(fds)
            raise
        self.drop(ino)
        self.inodes[ino] = fds

    def drop(self, ino: int) -> None:
        """Forget an inode that is gone."""
        fdpass.close_all(self.inodes.pop(ino, []))

    def begin(self, dead_pid: int) -> None:
        """Do nothing: clients do not miss `dead_pid`."""
        del dead_pid

    def look(self) -> None:
        """Do nothing: no request was taken along."""

    def answer_waiting(self) -> None:
        """Do nothing: nobody asks."""
