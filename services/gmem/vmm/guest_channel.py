"""The vmm's end of the socket pair with a guest process; never waits to send.

Messages go out in the order of `send`. What the socket does not take at once is kept
and sent when it can be; a guest process that does not read (it is stopped, or lost) is
given up at OUTGOING_BYTES_MAX, because InvalidateBegin must not wait for it.
"""

from __future__ import annotations

import array
import asyncio
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import Final

from gmem.vmm.guest.messages import RECEIVE_BYTES, Decoder, Message

OUTGOING_BYTES_MAX: Final = 64 << 20


class GuestChannel:
    """Messages to and from one guest process, on the running loop.

    `on_message` is called for each message that arrives, `on_gone` once when the other
    end is closed or given up; neither may await.
    """

    def __init__(
        self,
        connection: socket.socket,
        on_message: Callable[[Message], None],
        on_gone: Callable[[], None],
    ) -> None:
        connection.settimeout(0)
        self._connection = connection
        self._on_message = on_message
        self._on_gone = on_gone
        self._decoder = Decoder()
        # Bytes that are still to go, and the descriptor that goes with the first.
        self._outgoing: deque[tuple[bytes, int | None]] = deque()
        self._outgoing_bytes = 0
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(connection, self._readable)
        self.alive = True

    def send(self, message: Message, fd: int | None = None) -> None:
        """Send a message, with a duplicate of `fd`; nothing where nobody listens."""
        if not self.alive:
            return
        data = message.encode()
        self._outgoing.append((data, None if fd is None else os.dup(fd)))
        self._outgoing_bytes += len(data)
        if self._outgoing_bytes > OUTGOING_BYTES_MAX:
            self.close()
        elif len(self._outgoing) == 1:
            self._flush()

    def close(self) -> None:
        """Close our end, which ends the guest process; harmless when repeated."""
        if not self.alive:
            return
        self.alive = False
        self._loop.remove_reader(self._connection)
        self._loop.remove_writer(self._connection)
        self._connection.close()
        for _data, fd in self._outgoing:
            _close(fd)
        self._outgoing.clear()
        self._on_gone()

    def _flush(self) -> None:
        while self._outgoing:
            data, fd = self._outgoing[0]
            try:
                sent = self._connection.sendmsg([data], _ancillary(fd))
            except BlockingIOError:
                self._loop.add_writer(self._connection, self._writable)
                return
            except OSError:
                self.close()
                return
            _close(fd)
            self._outgoing_bytes -= sent
            if sent < len(data):
                self._outgoing[0] = (data[sent:], None)
            else:
                self._outgoing.popleft()

    def _writable(self) -> None:
        self._loop.remove_writer(self._connection)
        self._flush()

    def _readable(self) -> None:
        try:
            data = self._connection.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        for message in self._decoder.feed(data):
            self._on_message(message)


def _ancillary(fd: int | None) -> list[tuple[int, int, array.array[int]]]:
    if fd is None:
        return []
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]


def _close(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)
