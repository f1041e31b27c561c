"""The guest process itself: one control thread that obeys the vmm, a thread per vCPU.

The control thread never waits for a vCPU. It ends, and the process with it, when the
vmm's end of the socket pair is gone.
"""

from __future__ import annotations

import os
import socket
import threading
from collections import deque
from contextlib import ExitStack
from typing import Protocol

from gmem.uapi.pages import PgRange
from gmem.vmm.guest.memory import Memory
from gmem.vmm.guest.messages import (
    RECEIVE_BYTES,
    Decoder,
    Hello,
    Invalidated,
    MapFrames,
    MapView,
    MapWindow,
    Message,
    Unmap,
    WindowMapped,
)
from gmem.vmm.guest.tlb import Tlb, Translation
from gmem.vmm.guest.vcpu import VcpuThread
from gmem.vmm.guest.windows import Window

FDS_MAX = 16


class ViewTaker(Protocol):
    """Where guest views come from: the broker of the guest_memfd service."""

    def take(self, broker_path: str, token: str) -> int:
        """Return the descriptor that a one-time token stands for; ours to close."""


class GuestProcess:
    """Obeys the messages that arrive on `channel` until its other end is closed."""

    def __init__(
        self, channel: socket.socket, sequence: memoryview, views: ViewTaker
    ) -> None:
        """`sequence` is the shared number of `gmem.vmm.guest.tlb`."""
        self._channel = channel
        self._views = views
        self._memory = Memory(Tlb(sequence))
        self._vcpus: dict[int, VcpuThread] = {}
        self._fds: deque[int] = deque()
        self._sending = threading.Lock()

    def serve(self) -> None:
        """Obey until end of file."""
        decoder = Decoder()
        self.say(Hello())
        while True:
            data, fds, _flags, _address = socket.recv_fds(
                self._channel, RECEIVE_BYTES, FDS_MAX
            )
            self._fds.extend(fds)
            if not data:
                return
            for message in decoder.feed(data):
                self._obey(message)

    def say(self, message: Message) -> None:
        """Send a message to the vmm, whole; from any thread."""
        with self._sending:
            self._channel.sendall(message.encode())

    def _obey(self, message: Message) -> None:
        match message:
            case Invalidated(seq=seq, in_progress=in_progress, start=start, stop=stop):
                self._invalidate(seq, in_progress, PgRange(start, stop))
            case MapFrames():
                gfns = PgRange(message.start, message.stop)
                known = Translation(message.window, message.private, message.writable)
                self._memory.tlb.insert(gfns, known)
                self._vcpu(message.vcpu).hear(message)
            case MapWindow():
                self._map(message, self._fds.popleft())
            case MapView():
                self._map_view(message)
            case Unmap(window=window):
                self._memory.windows.pop(window, None)
            case _:
                vcpu: int = message.vcpu  # type: ignore[attr-defined]
                self._vcpu(vcpu).hear(message)

    def _invalidate(self, seq: int, in_progress: int, gfns: PgRange) -> None:
        self._memory.tlb.invalidated(seq, in_progress, gfns)
        for window in list(self._memory.windows.values()):
            window.drop(gfns)

    def _map_view(self, message: MapView) -> None:
        try:
            fd = self._views.take(message.broker_path, message.token)
        except OSError as error:
            self.say(WindowMapped(message.window, f"no view: {error}"))
        else:
            self._map(message, fd)

    def _map(self, message: MapWindow | MapView, fd: int) -> None:
        problem = ""
        with ExitStack() as stack:
            stack.callback(os.close, fd)
            try:
                self._memory.windows[message.window] = Window(
                    fd,
                    base_gfn=message.base_gfn,
                    size=message.size,
                    offset=message.offset,
                )
            except (OSError, ValueError) as error:
                problem = f"cannot map {message.size:#x} bytes: {error}"
        self.say(WindowMapped(message.window, problem))

    def _vcpu(self, vcpu: int) -> VcpuThread:
        if vcpu not in self._vcpus:
            self._vcpus[vcpu] = VcpuThread(vcpu, self._memory, self.say)
            self._vcpus[vcpu].start()
        return self._vcpus[vcpu]
