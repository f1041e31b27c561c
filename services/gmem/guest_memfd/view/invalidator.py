"""Revocation: the session's side of the helper process that writes INVAL_INODE.

At most `threads` invalidations are in the kernel at once, the helper's number of
threads; further ones wait in its socket. Beside that there are a few *lines*: a thread
that revokes one range asks and hears over one by itself, which saves it the way through
the thread that reads replies. Everything here blocks: for threads that may sleep, never
for a loop.
"""

from __future__ import annotations

import errno
import itertools
import os
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from gmem.guest_memfd.view import helper
from gmem.uapi.errors import InUse, Reason

# Up to here INVAL alone is as fast as sync_file_range before it.
SYNC_PAGES_MIN: Final = 17
# How long an orderly end waits; a helper in the kernel ends with the connection.
END_SECONDS_MAX: Final = 5.0
# Threads that revoke at the same time without waiting for each other.
LINES: Final = 2


@dataclass(eq=False, slots=True)
class Ticket:
    """One request under way; `wait` returns False when it still is."""

    error: int = 0
    _done: threading.Event = field(default_factory=threading.Event)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the helper has answered."""
        return self._done.wait(timeout)

    def finish(self, error: int) -> None:
        """Store the errno and let the waiter go on."""
        self.error = error
        self._done.set()


class Invalidator:
    """Starts the helper with `threads` threads, and talks to it.

    When the helper is gone every request under way and every later one ends with
    EIO: the caller must not go on as if the pages were revoked.
    """

    def __init__(self, fuse_fd: int, threads: int) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket = ours
        pairs = [
            socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            for _ in range(LINES)
        ]
        self._lines = [line for line, _ in pairs]
        self._idle_lines = deque(self._lines)
        self._tickets: dict[int, Ticket] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._gone = False
        with ExitStack() as stack:
            far_ends = [stack.enter_context(end) for _, end in pairs]
            stack.enter_context(theirs)
            self._process = _start(fuse_fd, theirs, threads, far_ends)
        self._reader = threading.Thread(
            target=self._read_replies, name="inval-replies", daemon=True
        )
        self._reader.start()

    @property
    def pid(self) -> int:
        """The helper's process id."""
        return self._process.pid

    def submit(
        self, nodeid: int, offset: int, length: int, *, sync: bool = False
    ) -> Ticket:
        """Begin to invalidate bytes of one view, written back in bulk if `sync`."""
        operation = helper.SYNC_AND_INVALIDATE if sync else helper.INVALIDATE
        return self._send(operation, nodeid, offset, length)

    def finish(self, tickets: list[Ticket]) -> None:
        """Wait for all; raises InUse when one could not be carried out."""
        for ticket in tickets:
            ticket.wait()
        errors = [ticket.error for ticket in tickets if ticket.error]
        if errors:
            raise _could_not(errors[0])

    def invalidate(self, nodeid: int, offset: int, length: int) -> None:
        """Invalidate one range, and wait; as `submit` and `finish`, over an idle line.

        Raises InUse when it could not be carried out.
        """
        try:
            line = self._idle_lines.popleft()
        except IndexError:
            self.finish([self.submit(nodeid, offset, length)])
            return
        try:
            message = helper.REQUEST.pack(helper.INVALIDATE, 0, nodeid, offset, length)
            line.send(message)
            reply = line.recv(helper.REPLY.size)
        except OSError:
            reply = b""
        finally:
            self._idle_lines.append(line)
        error = helper.REPLY.unpack(reply)[1] if reply else errno.EIO
        if error:
            raise _could_not(error)

    def add_view(self, nodeid: int, fd: int) -> None:
        """Give the helper a view for sync_file_range; closes our `fd`."""
        self.finish([self._send(helper.ADD_VIEW, nodeid, 0, 0, [fd])])
        os.close(fd)

    def drop_view(self, nodeid: int) -> None:
        """Have the helper close its view of a node."""
        self._send(helper.DROP_VIEW, nodeid, 0, 0).wait()

    def stop(self) -> None:
        """End the helper; what is under way ends with EIO."""
        for each in (self._socket, *self._lines):
            each.shutdown(socket.SHUT_RDWR)
        try:
            self._process.wait(END_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            # It sleeps in the kernel: only the end of the connection wakes it.
            self._process.kill()
        self._reader.join(END_SECONDS_MAX)
        for each in (self._socket, *self._lines):
            each.close()

    def reap(self) -> None:
        """Wait for the helper's end, once the connection is gone."""
        self._process.wait(END_SECONDS_MAX)

    def _send(
        self,
        operation: int,
        nodeid: int,
        offset: int,
        length: int,
        fds: list[int] | None = None,
    ) -> Ticket:
        ticket = Ticket()
        number = next(self._numbers)
        with self._lock:
            if self._gone:
                ticket.finish(errno.EIO)
                return ticket
            self._tickets[number] = ticket
        message = helper.REQUEST.pack(operation, number, nodeid, offset, length)
        try:
            socket.send_fds(self._socket, [message], fds or [])
        except OSError:
            self._fail_all()
        return ticket

    def _read_replies(self) -> None:
        while True:
            try:
                reply = self._socket.recv(helper.REPLY.size)
            except OSError:
                reply = b""
            if not reply:
                self._fail_all()
                return
            number, error = helper.REPLY.unpack(reply)
            with self._lock:
                ticket = self._tickets.pop(number, None)
            if ticket is not None:
                ticket.finish(error)

    def _fail_all(self) -> None:
        with self._lock:
            self._gone = True
            tickets, self._tickets = list(self._tickets.values()), {}
        for ticket in tickets:
            ticket.finish(errno.EIO)


def _could_not(error: int) -> InUse:
    name = errno.errorcode.get(error, str(error))
    return InUse(
        Reason.BINDING_BROKEN,
        f"the range could not be invalidated ({name}): the connection or its helper is "
        "gone; restart the guest_memfd service",
    )


def _start(
    fuse_fd: int,
    control: socket.socket,
    threads: int,
    lines: Sequence[socket.socket],
) -> subprocess.Popen[bytes]:
    line_fds = [line.fileno() for line in lines]
    # In a session of its own: Ctrl-C in a terminal must not end it before us.
    return subprocess.Popen(
        [
            sys.executable,
            "-I",
            "-S",
            str(Path(helper.__file__)),
            str(fuse_fd),
            str(control.fileno()),
            str(threads),
            *map(str, line_fds),
        ],
        pass_fds=(fuse_fd, control.fileno(), *line_fds),
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        env={},
        cwd="/",
    )
