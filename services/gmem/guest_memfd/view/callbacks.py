"""What the view session asks of, and tells, the service around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from gmem.guest_memfd.core.values import ViewKind


class OpenCallbacks(Protocol):
    """What every data plane tells."""

    def opened(self, ino: int, view: ViewKind, fh_count: int) -> None:
        """Somebody opened a view; `fh_count` open files of it exist now."""


class ViewCallbacks(OpenCallbacks, Protocol):
    """Called by threads of the session: each returns at once and must not raise.

    `done` may be called from any thread, also before the call returns, once. None of
    these may call `open_view`, `invalidate` or `quiesce` in the calling thread: they
    need the dispatcher that is making the call.
    """

    def host_fault(self, ino: int, pgoff: int, done: Callable[[bool], None]) -> None:
        """Attach a folio that covers `pgoff`, then `done(True)`; False is SIGBUS."""

    def fallocate(
        self,
        ino: int,
        mode: int,
        offset: int,
        length: int,
        done: Callable[[int], None],
    ) -> None:
        """Carry out a call on the host view; then `done(errno)`, where 0 is success.

        Offset and length are not checked yet; `mode` has no bits beyond KEEP_SIZE,
        PUNCH_HOLE and ZERO_RANGE: others the kernel refuses itself.
        """

    def ioctl(
        self, ino: int, cmd: int, data: bytes, done: Callable[[int, bytes], None]
    ) -> None:
        """Carry out an ioctl on the host view; then `done(errno, answer)`.

        `data` is the struct that the request number says is read, `answer` at most what
        it says is written; it reaches the caller with an error too.
        """

    def released(self, ino: int, view: ViewKind, fh_count: int) -> None:
        """The last descriptor and mapping of an open file went; `fh_count` remain.

        Calls about one inode come one after the other, in the order of the counts.
        """
