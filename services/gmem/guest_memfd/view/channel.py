"""The fuse descriptor: one request in, one reply out, from any thread."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Final

from gmem.runtime.fusewire import BUFFER_BYTES, OUT_HEADER, pack_reply, pack_resend

# A reply to a request that nobody waits for any more, and a request that was taken
# back between poll and read: both are the caller's act, and no fault of ours.
_PASSED_OVER: Final = frozenset({errno.ENOENT, errno.EINTR, errno.EAGAIN})


class Channel:
    """Reads requests from and writes replies to `fd`; keeps no state per request.

    `dead` becomes true when the connection was aborted or unmounted (ENODEV): every
    new touch of a view is SIGBUS from then on, and no request will come again.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.dead = False

    @staticmethod
    def buffer() -> memoryview:
        """Return a buffer that holds any request; one per thread."""
        return memoryview(bytearray(BUFFER_BYTES))

    def receive(self, buffer: memoryview) -> int:
        """Block for a request; return its length, 0 when the connection is gone."""
        while True:
            try:
                return os.readv(self.fd, [buffer])
            except OSError as error:
                if error.errno == errno.ENODEV:
                    self.dead = True
                    return 0
                if error.errno not in _PASSED_OVER:
                    raise

    def answer(self, unique: int, body: bytes = b"") -> None:
        """Reply with success and `body`."""
        self._write([pack_reply(unique, 0, body)])

    def answer_data(self, unique: int, size: int, data: Sequence[memoryview]) -> None:
        """Reply with `size` bytes that lie in `data`, without copying them."""
        self._write([OUT_HEADER.pack(OUT_HEADER.size + size, 0, unique), *data])

    def refuse(self, unique: int, error: int) -> None:
        """Reply with a positive errno."""
        self._write([pack_reply(unique, error)])

    def resend(self) -> None:
        """Have the kernel queue again what was read and never answered."""
        self._write([pack_resend()])

    def _write(self, pieces: Sequence[bytes | memoryview]) -> None:
        try:
            os.writev(self.fd, pieces)
        except OSError as error:
            if error.errno == errno.ENODEV:
                self.dead = True
            elif error.errno not in _PASSED_OVER:
                raise
