"""A separate process that maps a file and touches it; its death is a result.

    toucher = Toucher(gmem)
    window = toucher.map(length=4096)
    window.store(0, b"A")
    assert window.load(0) == b"A"
    ...
    assert window.load(0) == Died(signal.SIGBUS)

The process gets the descriptor by SCM_RIGHTS. Nothing is caught in it: what kills it is
the signal that kills any program, and is seen as its exit status.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from gmem.testing.conformance.kvm import HasFileno

ANSWER_SECONDS_MAX: Final = 60.0
"""Much longer than any access takes: a fault may wait for a conversion."""
MESSAGE_BYTES_MAX: Final = 1 << 20
SIGNAL_SECONDS: Final = 0.2
"""How long a signal that was sent may take to be seen."""
READ_WRITE: Final = mmap.PROT_READ | mmap.PROT_WRITE
_SCRIPT: Final = Path(__file__).with_name("toucher_process.py")


@dataclass(frozen=True, slots=True)
class Died:
    """The process died of a signal while it did what it was told."""

    signal: signal.Signals

    def __str__(self) -> str:
        return self.signal.name


class ToucherGoneError(Exception):
    """The process answers no more."""


class ToucherEndedError(Exception):
    """The process ended in another way than by a signal, or is asked after its end."""


class Toucher:
    """One process; it ends with `close`, or with a touch that kills it."""

    def __init__(self, *files: HasFileno) -> None:
        """Start it, and send it the descriptors of `files`, numbered from 0."""
        self._control, theirs = _socket_pair()
        with theirs:
            self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
                # Isolated: it needs nothing of ours, and starts in a few milliseconds.
                [sys.executable, "-I", "-S", str(_SCRIPT), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self.pid = self._process.pid
        self._parent: Toucher | None = None
        self._lock = threading.Lock()
        self._status: int | None = None
        for file in files:
            self.send(file)

    def send(self, file: HasFileno) -> int:
        """Pass a descriptor by SCM_RIGHTS; return its number there."""
        return int(self.ask("take", fds=[file.fileno()]))

    def drop(self, number: int) -> None:
        """Have it close a descriptor; its mappings stay."""
        self.ask("drop", number)

    def map(
        self,
        length: int,
        *,
        offset: int = 0,
        file: int = 0,
        prot: int = READ_WRITE,
        flags: int = mmap.MAP_SHARED,
    ) -> Window:
        """Have it mmap; OSError with the errno of mmap."""
        number = self.ask("map", file, offset, length, prot, flags)
        return Window(self, int(number), length)

    def fork(self) -> Toucher:
        """Have it fork; return the child, which inherits descriptors and mappings."""
        ours, theirs = _socket_pair()
        with theirs:
            pid = int(self.ask("fork", fds=[theirs.fileno()]))
        child = object.__new__(Toucher)
        child._control, child._process = ours, None
        child._lock = threading.Lock()
        child.pid, child._parent, child._status = pid, self, None
        ours.recv(MESSAGE_BYTES_MAX)  # It says that it is there.
        return child

    def close(self) -> None:
        """Let it exit in order, as a program does: its mappings go first."""
        self._control.close()
        self._wait()

    def kill(self) -> None:
        """SIGKILL it, and wait."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def died_of(self, seconds: float = SIGNAL_SECONDS) -> Died | None:
        """Return how it died of somebody else's doing; None when it lives."""
        assert self._process is not None, "only of a process that was not forked"
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=seconds)
            return Died(signal.Signals(-self._wait()))
        return None

    def touch(self, op: str, *args: int | str) -> Any | Died:  # noqa: ANN401 - JSON
        """Have it do something that may kill it; return the answer, or how it died."""
        try:
            return self.ask(op, *args)
        except ToucherGoneError:
            status = self._wait()
            if status < 0:
                return Died(signal.Signals(-status))
            raise ToucherEndedError(f"exit status {status} in {op}{args}") from None

    def ask(self, op: str, *args: int | str, fds: Sequence[int] = ()) -> Any:  # noqa: ANN401 - JSON
        """Return the answer; OSError that it met, ToucherGoneError: it is dead."""
        if self._status is not None:
            raise ToucherEndedError(f"pid {self.pid} has ended: start another Toucher")
        message = json.dumps({"op": op, "args": args}).encode()
        with self._lock:
            answered = self._exchange(message, fds)
        if not answered:
            raise ToucherGoneError
        answer = json.loads(answered)
        if "errno" in answer:
            raise OSError(answer["errno"], os.strerror(answer["errno"]), op)
        return answer["ok"]

    def _exchange(self, message: bytes, fds: Sequence[int]) -> bytes:
        try:
            socket.send_fds(self._control, [message], list(fds))
            return self._control.recv(MESSAGE_BYTES_MAX)
        except (BrokenPipeError, ConnectionResetError):
            return b""

    def _wait(self) -> int:
        """Return its exit status; negative for a signal."""
        if self._status is None:
            if self._process is not None:
                self._status = self._process.wait(timeout=ANSWER_SECONDS_MAX)
            else:
                assert self._parent is not None
                self._status = int(self._parent.ask("reap", self.pid))
            self._control.close()
        return self._status


@dataclass(frozen=True, slots=True)
class Window:
    """One mapping of a toucher; offsets count from its start."""

    toucher: Toucher
    number: int
    length: int

    def of(self, child: Toucher) -> Window:
        """Return the same mapping in a child of the toucher."""
        return Window(child, self.number, self.length)

    def load(self, offset: int = 0, size: int = 1) -> bytes | Died:
        """Read bytes (64 KiB at most)."""
        found = self.toucher.touch("load", self.number, offset, size)
        return found if isinstance(found, Died) else bytes.fromhex(found)

    def store(self, offset: int, data: bytes) -> Died | None:
        """Write bytes."""
        return self._done("store", offset, data.hex())

    def fill(self, value: int, offset: int = 0, size: int | None = None) -> Died | None:
        """Write one value into a range; `size` None: to the end."""
        return self._done("fill", offset, self._size(offset, size), value)

    def count_other(
        self, value: int, offset: int = 0, size: int | None = None
    ) -> int | Died:
        """Count the bytes of a range that are not `value`."""
        size = self._size(offset, size)
        found: int | Died = self.toucher.touch(
            "count_other", self.number, offset, size, value
        )
        return found

    def madvise(self, advice: int, offset: int = 0, length: int | None = None) -> None:
        """Have it call madvise; OSError with its errno."""
        length = self._size(offset, length)
        self.toucher.ask("madvise", self.number, advice, offset, length)

    def dont_need(self, offset: int = 0, length: int | None = None) -> None:
        """MADV_DONTNEED: drop page table entries, keep the data."""
        self.madvise(mmap.MADV_DONTNEED, offset, length)

    def mbind(self, mode: int, nodes: int, offset: int = 0, length: int = 0) -> None:
        """Set a memory policy; `nodes` is a bit mask."""
        size = length or self.length - offset
        self.toucher.ask("mbind", self.number, offset, size, mode, nodes)

    def get_mempolicy(self, offset: int = 0) -> tuple[int, int]:
        """Return mode and node mask of the policy at an address."""
        mode, nodes = self.toucher.ask("get_mempolicy", self.number, offset)
        return mode, nodes

    def node_of(self, offset: int = 0) -> int:
        """Return the node of the page that is mapped at an address."""
        return int(self.toucher.ask("node_of", self.number, offset))

    def munmap(self) -> None:
        """Have it call munmap."""
        self.toucher.ask("munmap", self.number)

    def _done(self, op: str, *args: int | str) -> Died | None:
        found = self.toucher.touch(op, self.number, *args)
        return found if isinstance(found, Died) else None

    def _size(self, offset: int, size: int | None) -> int:
        return self.length - offset if size is None else size


def _socket_pair() -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(ANSWER_SECONDS_MAX)
    return ours, theirs
