"""Guest processes: spawned one for each VM, told what changes, missed when they die."""

from __future__ import annotations

import asyncio
import mmap
import os
import socket
import sys
from collections.abc import Callable
from typing import Final

from gmem.runtime.log import logger
from gmem.uapi.errors import InUse, Reason
from gmem.vmm.core.invalidate import Notice
from gmem.vmm.guest.messages import (
    Hello,
    Invalidated,
    Message,
    RunProgram,
    Stop,
    WindowMapped,
)
from gmem.vmm.guest_channel import GuestChannel

START_SECONDS_MAX: Final = 60.0
"""Starting an interpreter on a loaded machine."""
MAP_SECONDS_MAX: Final = 60.0
"""A control thread that maps waits at most for faults that are parked (4 s each)."""
END_SECONDS_MAX: Final = 5.0
"""After its channel closed; then it is killed."""


class Guest:
    """One guest process, from `start` to its end."""

    def __init__(self, vm: str, on_gone: Callable[[], None]) -> None:
        self.vm = vm
        self._on_gone = on_gone
        self._channel: GuestChannel | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._runs: dict[tuple[int, int], asyncio.Queue[Message | None]] = {}
        loop = asyncio.get_running_loop()
        self._hello: asyncio.Future[str] = loop.create_future()
        self._windows: dict[int, asyncio.Future[str]] = {}
        # The page that the guest process looks at before and after each access. It is
        # ordinary memory, and no view.
        self._sequence_fd = os.memfd_create("gmem-sequence", os.MFD_CLOEXEC)
        os.ftruncate(self._sequence_fd, mmap.PAGESIZE)
        self._page = mmap.mmap(self._sequence_fd, mmap.PAGESIZE)
        self._sequence = memoryview(self._page).cast("Q")

    @property
    def pid(self) -> int:
        """Of the process; 0 before it was started."""
        return self._process.pid if self._process is not None else 0

    @property
    def alive(self) -> bool:
        """Whether its end of the channel is open."""
        return self._channel is not None and self._channel.alive

    async def start(self, client: str, incarnation: str) -> int:
        """Spawn the process and wait until it obeys; return its pid.

        `client` and `incarnation` are what it calls itself at brokers. Raises InUse
        (GUEST_GONE) where it does not come up.
        """
        ours, theirs = socket.socketpair()
        self._channel = GuestChannel(ours, self._heard, self._gone)
        words = {
            "--channel-fd": theirs.fileno(),
            "--sequence-fd": self._sequence_fd,
            "--parent-pid": os.getpid(),
            "--client": client,
            "--incarnation": incarnation,
        }
        flags = [str(word) for pair in words.items() for word in pair]
        with theirs:
            # -P: the directory we happen to be in has no say in what is imported.
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "gmem.vmm.guest", *flags),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), self._sequence_fd),
            )
        try:
            problem = await asyncio.wait_for(self._hello, START_SECONDS_MAX)
        except TimeoutError:
            problem = f"no word from it for {START_SECONDS_MAX:.0f} s"
        if problem:
            await self.end()
            raise self._is_gone(f"did not start ({problem})")
        return self.pid

    async def map(self, message: Message, window: int, fd: int | None = None) -> str:
        """Send a MapWindow or MapView; return "" or what is wrong with it.

        Raises InUse (GUEST_GONE).
        """
        self.require_alive()
        mapped: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._windows[window] = mapped
        try:
            self.send(message, fd)
            return await asyncio.wait_for(mapped, MAP_SECONDS_MAX)
        except TimeoutError:
            return f"the guest process did not answer for {MAP_SECONDS_MAX:.0f} s"
        finally:
            del self._windows[window]

    def send(self, message: Message, fd: int | None = None) -> None:
        """Send a message; never waits, never fails."""
        if self._channel is not None:
            self._channel.send(message, fd)

    def notify(self, notice: Notice) -> None:
        """Publish a notice: the number that accesses look at, then the message."""
        self._sequence[0] = notice.seq
        gfns = notice.gfns
        self.send(Invalidated(notice.seq, notice.in_progress, gfns.start, gfns.stop))

    def begin_run(
        self, vcpu: int, run: int, program: bytes
    ) -> asyncio.Queue[Message | None]:
        """Start an encoded program; return what the vCPU says, None at its death.

        Raises InUse (GUEST_GONE).
        """
        self.require_alive()
        heard: asyncio.Queue[Message | None] = asyncio.Queue()
        self._runs[vcpu, run] = heard
        self.send(RunProgram(vcpu, run, program))
        return heard

    def end_run(self, vcpu: int, run: int) -> None:
        """Stop a program, if it still runs; what it says is heard no more."""
        del self._runs[vcpu, run]
        self.send(Stop(vcpu, run))

    def require_alive(self) -> None:
        """Raise InUse (GUEST_GONE) unless the process lives."""
        if not self.alive:
            raise self._is_gone("is gone")

    async def end(self) -> None:
        """End the process and wait until it is gone; harmless when repeated."""
        if self._channel is not None:
            self._channel.close()
        if self._process is not None:
            await _reap(self._process)
        if self._sequence_fd >= 0:
            os.close(self._sequence_fd)
            self._sequence_fd = -1

    def _heard(self, message: Message) -> None:
        match message:
            case Hello():
                _settle(self._hello, "")
            case WindowMapped(window=window, problem=problem):
                if window in self._windows:
                    _settle(self._windows[window], problem)
            case _:
                run = (getattr(message, "vcpu", -1), getattr(message, "run", -1))
                # What a run said before it heard of its end is of no use to anybody.
                if run in self._runs:
                    self._runs[run].put_nowait(message)

    def _gone(self) -> None:
        _settle(self._hello, "it ended")
        for mapped in self._windows.values():
            _settle(mapped, "the guest process ended")
        for heard in self._runs.values():
            heard.put_nowait(None)
        self._on_gone()

    def _is_gone(self, what: str) -> InUse:
        return InUse(
            Reason.GUEST_GONE,
            f"the guest process of {self.vm} (pid {self.pid}) {what}: "
            "delete the VM, create it again",
            pid=self.pid,
        )


def _settle(future: asyncio.Future[str], value: str) -> None:
    if not future.done():
        future.set_result(value)


async def _reap(process: asyncio.subprocess.Process) -> None:
    """Wait for a process whose channel is closed; kill it when it lingers."""
    try:
        await asyncio.wait_for(process.wait(), END_SECONDS_MAX)
    except TimeoutError:
        # A thread of it may sleep in a fault that somebody must answer first.
        process.kill()
        logger.warning("guest process killed", pid=process.pid)
        try:
            await asyncio.wait_for(process.wait(), END_SECONDS_MAX)
        except TimeoutError:
            logger.error("guest process does not die", pid=process.pid)


class Guests:
    """The guest processes of this vmm, by VM."""

    def __init__(self) -> None:
        """Start with none; set `on_gone` before the first is started."""
        self.on_gone: Callable[[str], None] | None = None
        """Hears of each VM whose guest process died by itself."""
        self._guests: dict[str, Guest] = {}
        self._ending: set[str] = set()

    def get(self, vm: str) -> Guest:
        """Return the guest process of a VM that has one."""
        return self._guests[vm]

    def find(self, vm: str) -> Guest | None:
        """Return the guest process of a VM, None where it has none any more."""
        return self._guests.get(vm)

    async def start(self, vm: str, client: str, incarnation: str) -> int:
        """Spawn the guest process of a new VM; return its pid. InUse (GUEST_GONE)."""
        guest = Guest(vm, lambda: self._lost(vm))
        self._guests[vm] = guest
        self._ending.add(vm)
        try:
            pid = await guest.start(client, incarnation)
        except BaseException:
            del self._guests[vm]
            raise
        finally:
            self._ending.discard(vm)
        return pid

    async def end(self, vm: str) -> None:
        """End the guest process of a VM."""
        guest = self._guests.get(vm)
        if guest is None:
            return
        self._ending.add(vm)
        try:
            await guest.end()
        finally:
            self._ending.discard(vm)
            self._guests.pop(vm, None)

    async def end_all(self) -> None:
        """End every guest process."""
        await asyncio.gather(*(self.end(vm) for vm in list(self._guests)))

    def _lost(self, vm: str) -> None:
        if vm not in self._ending and self.on_gone is not None:
            self.on_gone(vm)
