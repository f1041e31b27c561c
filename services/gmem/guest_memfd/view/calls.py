"""FALLOCATE and IOCTL: handed to the core, answered when done; no thread waits."""

from __future__ import annotations

import errno
import threading
from functools import partial

from gmem.guest_memfd.view import callers
from gmem.guest_memfd.view.callbacks import ViewCallbacks
from gmem.guest_memfd.view.channel import Channel
from gmem.guest_memfd.view.counters import Counters
from gmem.runtime.fusewire import IOCTL_OUT


class Calls:
    """The system calls under way; each is answered once, by whoever removes it."""

    def __init__(
        self,
        channel: Channel,
        callbacks: ViewCallbacks,
        counters: Counters,
        something_parked: threading.Event,
    ) -> None:
        self._channel = channel
        self._callbacks = callbacks
        self._counters = counters
        self._something_parked = something_parked
        self._callers: dict[int, int] = {}

    def fallocate(
        self, ino: int, *, unique: int, pid: int, mode: int, offset: int, length: int
    ) -> None:
        """Ask the core; it answers later, from any thread."""
        self._counters.add("fallocates")
        self._callers[unique] = pid
        done = partial(self._answer, unique)
        try:
            self._callbacks.fallocate(ino, mode, offset, length, done)
        except Exception:
            done(errno.EIO)
            raise
        self._watch(unique)

    def ioctl(
        self, ino: int, *, unique: int, pid: int, cmd: int, data: bytes, out_size: int
    ) -> None:
        """Ask the core; it answers later, from any thread."""
        self._counters.add("ioctls")
        self._callers[unique] = pid
        try:
            done = partial(self._answer_ioctl, unique, out_size)
            self._callbacks.ioctl(ino, cmd, data, done)
        except Exception:
            self._answer(unique, errno.EIO)
            raise
        self._watch(unique)

    def scan(self) -> int:
        """Let callers that are being killed go, not the operation; count the rest."""
        for unique, pid in list(self._callers.items()):
            if callers.is_being_killed(pid):
                self._counters.add("killed")
                self._answer(unique, errno.EINTR)
        return len(self._callers)

    def refuse_all(self) -> None:
        """Answer everything with EIO: the session ends."""
        for unique in list(self._callers):
            self._answer(unique, errno.EIO)

    def _watch(self, unique: int) -> None:
        """Have the scanner look at the caller of what was not answered at once."""
        if unique in self._callers:
            self._something_parked.set()

    def _answer_ioctl(
        self, unique: int, out_size: int, error: int, data: bytes
    ) -> None:
        # The errno goes inside: the kernel copies the struct back with it.
        if self._callers.pop(unique, None) is not None:
            answer = IOCTL_OUT.pack(-error, 0, 0, 0) + data[:out_size]
            self._channel.answer(unique, answer)

    def _answer(self, unique: int, error: int) -> None:
        if self._callers.pop(unique, None) is None:
            return
        if error:
            self._channel.refuse(unique, error)
        else:
            self._channel.answer(unique)
