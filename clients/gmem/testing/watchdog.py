"""A process of its own that ends FUSE connections nobody answers any more.

A thread that faults on a page of a dead FUSE server sleeps in the kernel and takes
its whole interpreter along; no timeout inside that process can fire. So the bound is
kept elsewhere: this file, run as a script, mounts the fusectl file system where only
it can see it, and writes to `abort` of each connection that it was told to watch,
when the bound has passed or when the test's process is gone.

The two talk in lines: `watch ID`, `release ID` in; `ready`, `ok`, `aborted ID` out.
End of input means that the test is over: what is still watched is aborted at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Self, TypeAlias

FUSECTL = Path("/sys/fs/fuse/connections")
CLONE_NEWNS = 0x00020000
MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8
MS_REC, MS_PRIVATE = 0x4000, 0x40000
AT_EMPTY_PATH, AT_STATX_DONT_SYNC, AT_NO_AUTOMOUNT = 0x1000, 0x4000, 0x800
STATX_BASIC_STATS = 0x7FF
STATX_SIZE, STATX_DEV_MINOR_AT = 256, 140
# Starting an interpreter on a loaded machine.
START_SECONDS_MAX = 30.0

# Connection -> when it is aborted, and which of that number is meant.
Deadlines: TypeAlias = dict[int, tuple[float, int]]


class FuseWatchdog:
    """Bounds the life of FUSE connections; `aborted` lists those it had to end.

    Connections are named by the minor number of the mount's st_dev; `connection_id`
    finds it. A connection that is gone when its time comes is not an abort.
    """

    def __init__(self, bound_seconds: float) -> None:
        self.aborted: list[int] = []
        # A session of its own: what ends the test's process group spares it.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(bound_seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._expect("ready")

    def watch(self, connection: int) -> None:
        """Abort `connection` once the bound has passed, counted from now."""
        self._say(f"watch {connection}")

    def release(self, connection: int) -> None:
        """Forget `connection`: it may go on for ever."""
        self._say(f"release {connection}")

    def close(self) -> None:
        """End the watchdog; what is still watched is aborted, but not counted."""
        if self._process.stdin is None or self._process.stdin.closed:
            return
        self._say("done")
        self._process.stdin.close()
        self._process.wait(timeout=START_SECONDS_MAX)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        self._expect("ok")

    def _expect(self, word: str) -> None:
        """Read up to `word`; note each abort that was told on the way."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            heard, *rest = line.split()
            if heard == word:
                return
            assert heard == "aborted", f"the watchdog said {line!r}"
            self.aborted.append(int(rest[0]))
        message = f"the watchdog ended with {self._process.wait()} before {word!r}"
        raise RuntimeError(message)


def connection_id(fd: int) -> int:
    """The FUSE connection that `fd` (any file, also O_PATH) belongs to.

    Asks the kernel alone: fstat() would ask the FUSE server, and may hang.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = (ctypes.c_uint32 * (STATX_SIZE // 4))()
    flags = AT_EMPTY_PATH | AT_STATX_DONT_SYNC | AT_NO_AUTOMOUNT
    if libc.statx(fd, b"", flags, STATX_BASIC_STATS, ctypes.byref(buffer)) != 0:
        raise OSError(ctypes.get_errno(), f"statx of descriptor {fd}")
    return buffer[STATX_DEV_MINOR_AT // 4]


def _mount_fusectl() -> None:
    """Show FUSECTL to this process alone, in a mount namespace of its own."""
    libc = ctypes.CDLL(None, use_errno=True)
    flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
    private = MS_REC | MS_PRIVATE
    if (
        libc.unshare(CLONE_NEWNS) != 0
        # Before the mount: a shared `/` would show it to everybody.
        or libc.mount(None, b"/", None, private, None) != 0
        or libc.mount(b"none", bytes(FUSECTL), b"fusectl", flags, None) != 0
    ):
        raise OSError(ctypes.get_errno(), f"cannot mount fusectl on {FUSECTL}")


def _identity(connection: int) -> int:
    """Return the inode of its control directory; 0 when there is no connection.

    The number alone may be another's tomorrow: that of the root file system of a
    container, where the engine's storage driver is FUSE.
    """
    try:
        return (FUSECTL / str(connection)).stat().st_ino
    except FileNotFoundError:
        return 0


def _abort(connection: int, identity: int) -> bool:
    """End a connection; False when the one that was meant is gone."""
    if _identity(connection) != identity:
        return False
    try:
        (FUSECTL / str(connection) / "abort").write_text("1")
    except FileNotFoundError:
        return False
    return True


def _abort_all(deadlines: Deadlines, now: float, out: IO[str]) -> None:
    """Abort what is overdue at `now`, and tell."""
    for connection in [c for c, (when, _) in deadlines.items() if when <= now]:
        _, identity = deadlines.pop(connection)
        if identity and _abort(connection, identity):
            # The reader may be gone, or asleep for ever: the abort counts.
            with contextlib.suppress(BrokenPipeError):
                print(f"aborted {connection}", file=out, flush=True)


def _obey(line: str, deadlines: Deadlines, bound_seconds: float) -> None:
    word, *rest = line.split()
    if word == "watch":
        connection = int(rest[0])
        when = time.monotonic() + bound_seconds
        deadlines[connection] = when, _identity(connection)
    elif word == "release":
        deadlines.pop(int(rest[0]), None)
    print("ok", flush=True)


def _serve(bound_seconds: float) -> None:
    """Obey lines until the end of input."""
    deadlines: Deadlines = {}
    pending = b""
    with selectors.DefaultSelector() as selector:
        selector.register(sys.stdin.fileno(), selectors.EVENT_READ)
        while True:
            wait = min((when for when, _ in deadlines.values()), default=None)
            timeout = None if wait is None else max(0.0, wait - time.monotonic())
            if selector.select(timeout):
                heard = os.read(sys.stdin.fileno(), 4096)
                if not heard:
                    break
                *lines, pending = (pending + heard).split(b"\n")
                for line in lines:
                    _obey(line.decode(), deadlines, bound_seconds)
            _abort_all(deadlines, time.monotonic(), sys.stdout)
    _abort_all(deadlines, float("inf"), sys.stdout)


if __name__ == "__main__":
    _mount_fusectl()
    print("ready", flush=True)
    _serve(float(sys.argv[1]))
