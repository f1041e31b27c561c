"""Answering for a service that has died, until the next one takes over.

What is certain is answered, by the page states that the dead service left in shared
memory: READ of pages that are there, WRITE (writeback), FLUSH and FSYNC. What needs a
service (a hole, an open, a conversion) is read and left unanswered: RESEND queues it
again for the successor. So nobody who touches pages that are there notices anything,
and a process that was killed inside an invalidation can be reaped.

A descriptor of its own (FUSE_DEV_IOC_CLONE) can be non-blocking without making that of
the service so: the keeper never waits, also for a request that was taken back between
poll and read.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final

from gmem.runtime import fusewire as wire
from gmem.runtime.fusewire import BODY, Opcode
from gmem.runtime.page_access import Access, PageAccess
from gmem.runtime.state_table import StateTable
from gmem.uapi.errors import BadRequest
from gmem.uapi.pages import PAGE_SHIFT, PAGE_SIZE

# The ioctl of type 229, number 0, that reads a 32-bit descriptor.
_FUSE_DEV_IOC_CLONE: Final = 0x8004E500
_BATCH: Final = 64
# A request that its caller took back, or whose answer nobody waits for.
_PASSED_OVER: Final = frozenset({errno.ENOENT, errno.EINTR})

# What a service calls on its own views: it opens them, and looks at the mount.
_CALLS: Final = frozenset({Opcode.LOOKUP, Opcode.OPEN, Opcode.GETATTR})

Table = PageAccess[StateTable]
Reply = tuple[int, tuple[bytes | memoryview, ...]]
"""A positive errno or 0, and the pieces of the body."""

_DONE: Final[Reply] = (0, ())
_EIO: Final[Reply] = (errno.EIO, ())
_EINVAL: Final[Reply] = (errno.EINVAL, ())


class StandIn:
    """Answers requests of the connection `fuse_fd` from the store; see the module."""

    fds_per_inode: Final = 1

    def __init__(self, fuse_fd: int, store_fd: int, nr_pages: int) -> None:
        """Open a second descriptor of the connection. OSError where that is refused."""
        self.fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        fcntl.ioctl(self.fd, _FUSE_DEV_IOC_CLONE, struct.pack("=I", fuse_fd))
        store = mmap.mmap(store_fd, nr_pages << PAGE_SHIFT, mmap.MAP_SHARED)
        # As in the service: one byte written must not make 2 MiB resident.
        store.madvise(mmap.MADV_NOHUGEPAGE)
        self._memory = memoryview(store)
        self._tables: dict[int, Table] = {}
        self._buffer = memoryview(bytearray(wire.BUFFER_BYTES))
        self.counts: Counter[str] = Counter()
        self.dead = False
        self._dead_pid = 0
        self._readers_left = False
        self._handlers: dict[int, Callable[[int, memoryview], Reply | None]] = {
            Opcode.READ: self._read,
            Opcode.WRITE: self._write,
            Opcode.FLUSH: lambda _nodeid, _request: _DONE,
            Opcode.FSYNC: lambda _nodeid, _request: _DONE,
        }

    @property
    def readers_left(self) -> bool:
        """Whether the dead service may still take a request along."""
        return self._readers_left

    @property
    def inodes(self) -> dict[int, list[int]]:
        """The inodes that are held, and the memfd of the page states of each."""
        return {ino: [access.table.fd] for ino, access in self._tables.items()}

    def hold(self, fds: list[int]) -> None:
        """Keep the page states of an inode, ours now. BadRequest if they are none."""
        (fd,) = fds
        try:
            table = StateTable(fd)
        except BadRequest:
            os.close(fd)
            raise
        self.drop(table.ino)
        self._tables[table.ino] = PageAccess(table, self._memory)

    def drop(self, ino: int) -> None:
        """Forget an inode that is gone."""
        access = self._tables.pop(ino, None)
        if access is not None:
            os.close(access.table.fd)

    def begin(self, dead_pid: int) -> None:
        """Have what the dead service had read come again.

        A thread of `dead_pid` that sleeps in a call on one of its own views is let go:
        until then the process keeps its locks, its ports and its descriptors.
        """
        self.counts.clear()
        self._dead_pid = dead_pid
        self._readers_left = True
        self.look()

    def look(self) -> None:
        """Have requests come again once the last reader of the dead service has ended.

        Its readers have descriptors of their own, and may end a moment after its
        control connection: one of them may have taken a request along.
        """
        if self._readers_left:
            self._readers_left = _any_runs(self._dead_pid)
            if not self._readers_left:
                self._resend()

    def _resend(self) -> None:
        try:
            os.write(self.fd, wire.pack_resend())
        except OSError as error:
            self.dead = error.errno == errno.ENODEV
            if not self.dead:
                raise

    def answer_waiting(self) -> None:
        """Answer what waits; at most a batch, so that other things are looked at."""
        for _ in range(_BATCH):
            try:
                length = os.readv(self.fd, [self._buffer])
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.ENODEV:
                    self.dead = True
                    return
                if error.errno not in _PASSED_OVER:
                    raise
                continue
            self._answer(self._buffer[:length])

    def _answer(self, request: memoryview) -> None:
        _len, opcode, unique, nodeid, _uid, _gid, tid, *_ = wire.IN_HEADER.unpack_from(
            request
        )
        handler = self._handlers.get(opcode)
        reply = None if handler is None else handler(nodeid, request)
        if reply is None and opcode in _CALLS and self._is_of_dead(tid):
            reply = _EIO
        if reply is None:
            self.counts["left"] += 1
            return
        error, pieces = reply
        self.counts["refused" if error else Opcode(opcode).name.lower()] += 1
        size = wire.OUT_HEADER.size + sum(len(piece) for piece in pieces)
        try:
            header = wire.OUT_HEADER.pack(size, -error, unique)
            os.writev(self.fd, [header, *pieces])
        except OSError as failed:
            self.dead = failed.errno == errno.ENODEV
            if not self.dead and failed.errno not in _PASSED_OVER:
                raise

    def _is_of_dead(self, tid: int) -> bool:
        return Path(f"/proc/{self._dead_pid}/task/{tid}").exists()

    def _read(self, nodeid: int, request: memoryview) -> Reply | None:
        _fh, offset, size, flags, *_ = wire.READ_IN.unpack_from(request, BODY)
        inode = self._tables.get(nodeid >> 1)
        if flags & wire.READ_LOCKOWNER:
            return _EINVAL
        if inode is None:
            return _EIO
        first, stop = offset >> PAGE_SHIFT, -(-(offset + size) // PAGE_SIZE)
        access = inode.access(nodeid & 1, first, stop)
        if access is Access.DATA:
            return 0, inode.data(offset, offset + size)
        if access is Access.REFUSED or (access is Access.HOLE and nodeid & 1):
            return _EIO
        # Only a service can say: it attaches a folio, opens the page, or takes it.
        return None

    def _write(self, nodeid: int, request: memoryview) -> Reply:
        _fh, offset, size, flags, *_ = wire.WRITE_IN.unpack_from(request, BODY)
        inode = self._tables.get(nodeid >> 1)
        if flags & wire.WRITE_LOCKOWNER:
            return _EINVAL
        if inode is None:
            return _EIO
        outcome = inode.write(
            nodeid & 1,
            offset,
            request[wire.WRITE_DATA : wire.WRITE_DATA + size],
            writeback=bool(flags & wire.WRITE_CACHE),
        )
        if outcome.error:
            return outcome.error, ()
        return 0, (wire.WRITE_OUT.pack(outcome.stored, 0),)


def _any_runs(pid: int) -> bool:
    """Tell whether a killed process has a thread that still runs, or may.

    What sleeps beyond the reach of signals (D) is no reader, and reads no more when it
    wakes. 0 is a process of another pid namespace: nobody to look at.
    """
    if pid == 0:
        return False
    for task in Path(f"/proc/{pid}/task").glob("*/stat"):
        try:
            state = task.read_bytes().rpartition(b") ")[2][:1]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state not in b"DZX":
            return True
    return False
