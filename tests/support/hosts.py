"""Whole emulated hosts for tests: real service processes, started as gmemctl does.

    with running_host(SMALL) as host:
        async with host.clients() as (allocator, gmem):
            ...

It is the host of gmem.testing with what our own tests need beside it. `Program` is a
client process that maps views; every one still there is killed when the host ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from google.protobuf.message import Message

from gmem.api.guest_memfd.v1 import guest_memfd_pb2 as pb
from gmem.api.host_allocator.v1 import host_allocator_pb2 as allocator_pb
from gmem.api.vmm.v1 import vmm_pb2
from gmem.client import GuestMemfdClient, HostAllocatorClient
from gmem.runtime import fdpass
from gmem.runtime.backend import Backend
from gmem.runtime.config import HostShape
from gmem.testing import hosts
from gmem.testing.hosts import (
    GONE_SECONDS_MAX,
    HOST,
    SMALL,
    EmulatedHost,
    wait_until,
)
from gmem.uapi.errors import KernelError, Reason, make_error
from gmem.uapi.pages import SIZE_2M
from tests.support.requirements import require_fuse, require_root
from tests.support.wire import Partial

__all__ = ["HOST", "SMALL", "wait_until"]

ROOT: Final = Path(__file__).parents[2]
VM: Final = f"hosts/{HOST}/vms/v"
ANSWER_SECONDS_MAX: Final = 30.0
SERVED_SECONDS_MAX: Final = 30.0
SPARE_SECONDS_MAX: Final = 60.0
SIGBUS: Final = -signal.SIGBUS


class Refused(Exception):  # noqa: N818 - says what happened
    """What a Program's system call or window refused, by its errno's name or so."""


class Program:
    """A client process; `pid`, and its name in /proc, are what a refusal names."""

    def __init__(self, run_dir: Path, name: str, incarnation: str) -> None:
        self.name, self.incarnation = name, incarnation
        self.inode: Inode | None = None  # What it maps.
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(ANSWER_SECONDS_MAX)
        with theirs:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "tests.support.memory_client"),
                    *(str(theirs.fileno()), str(run_dir)),
                ],
                pass_fds=[theirs.fileno()],
                cwd=ROOT,
            )
        self.pid = self.process.pid
        self.ask("hello", str(run_dir / "guest_memfd.broker"), name, incarnation)

    def ask(self, op: str, *args: Any) -> Any:
        """Have it do something; return the outcome, or raise what it met."""
        self.tell(op, *args)
        return self.heard()

    async def asked(self, op: str, *args: Any) -> Any:
        """Ask, and let this loop run on while the process may wait in a fault."""
        return await asyncio.to_thread(self.ask, op, *args)

    def tell(self, op: str, *args: Any) -> None:
        """Say what to do next, and do not wait for it."""
        fdpass.send(self._control, {"op": op, "args": list(args)})

    def heard(self) -> Any:
        """Return the next answer. Raises KernelError, Refused, or EOFError: it died."""
        message = fdpass.receive(self._control)
        if message is None:
            raise EOFError(f"{self.name} ended with {self.exit_status()}")
        fields = message.fields
        if "kernel_error" in fields:
            reason = Reason(fields["kernel_error"])
            raise make_error(reason, "in a client", **fields["numbers"])
        for kind in ("transport_error", "os_error"):
            if kind in fields:
                raise Refused(fields[kind])
        return fields["ok"]

    def exit_status(self) -> int:
        """Wait for its end; negative for a signal."""
        return self.process.wait(timeout=ANSWER_SECONDS_MAX)

    def stop(self) -> None:
        """Let it exit in order, as a program does: its mappings go first."""
        self._control.close()
        self.exit_status()

    def kill(self) -> None:
        """SIGKILL, and wait."""
        self.process.kill()
        self.exit_status()
        self._control.close()

    def dies_of(self, op: str, *args: Any) -> int:
        """Have it do something deadly; return its exit status."""
        self.tell(op, *args)
        with contextlib.suppress(ConnectionResetError):
            assert fdpass.receive(self._control) is None, f"{op} was survived"
        return self.exit_status()


@dataclass
class Host(EmulatedHost):
    """A running host with its clients and client processes."""

    programs: list[Program] = field(default_factory=list)
    _heard: int = 0
    _loaded: set[int] = field(default_factory=set)

    @asynccontextmanager
    async def clients(
        self, client: str = "test", incarnation: str = "i1"
    ) -> AsyncIterator[tuple[HostAllocatorClient, GuestMemfdClient]]:
        allocator_at, gmem_at = (
            self.target("host_allocator"),
            self.target("guest_memfd"),
        )
        async with (
            HostAllocatorClient(
                allocator_at, client=client, incarnation=incarnation
            ) as allocator,
            GuestMemfdClient(gmem_at, client=client, incarnation=incarnation) as gmem,
        ):
            yield allocator, gmem

    def program(self, name: str = "client", incarnation: str = "i1") -> Program:
        """Start a client process, connected to the broker."""
        program = Program(self.run_dir, name, incarnation)
        self.programs.append(program)
        return program

    def restart(self) -> Host:
        """Start the host again, whose services have all ended; return the new one."""
        self.start_again()
        return self

    async def served_again(self, pid: int) -> float:
        """Wait for another service to have taken over from `pid`; the seconds it took.

        They count from now to the keeper's own word, however late it is heard.
        """
        began = time.time()
        found: list[float] = []

        def taken_over() -> bool:
            successor = self.pid("guest_memfd")
            found[:] = [] if successor == pid else self._took_over(successor)
            return bool(found)

        what = "a successor"
        await asyncio.to_thread(wait_until, taken_over, what, SERVED_SECONDS_MAX)
        return found[0] - began

    def _took_over(self, pid: int) -> list[float]:
        lines = [one for one in self.log("keeper") if one["event"] == "taken_over"]
        return [one["time"] for one in lines if one["pid"] == pid]

    def spare_is_loaded(self, pid: int | None) -> bool:
        """Whether a spare of guest_memfd has everything loaded, and waits."""
        with self.directory.log("guest_memfd").open("rb") as log:
            # Thousands of lines may have been there before.
            log.seek(self._heard)
            for line in log:
                if not line.endswith(b"\n"):
                    break
                self._heard += len(line)
                if b'"loaded"' in line:
                    self._loaded.add(json.loads(line)["pid"])
        return pid in self._loaded

    def loaded_spare(self) -> int:
        """Wait for a spare of guest_memfd that has everything loaded; its pid."""
        found: list[int] = []

        def loaded() -> bool:
            pid = self.spare_pid()
            found[:] = [] if pid is None else [pid]
            return self.spare_is_loaded(pid)

        wait_until(loaded, "a loaded spare", SPARE_SECONDS_MAX)
        return found[0]

    def end_programs(self) -> None:
        while self.programs:
            self.programs.pop().kill()


@dataclass
class Inode:
    """One inode of a host, bound to slot 0 of VM unless a test says otherwise."""

    host: Host
    gmem: GuestMemfdClient
    name: str
    size: int

    async def get(self) -> pb.GuestMemfd:
        return await self.gmem.get_guest_memfd(self.name)

    async def convert(
        self, offset: int, size: int, *, private: bool, validate_only: bool = False
    ) -> None:
        await self.gmem.convert_range(
            ranges=[self.range(offset, size)],
            to_shared=not private,
            validate_only=validate_only,
        )

    def range(self, offset: int, size: int) -> pb.Range:
        return pb.Range(name=self.name, offset=offset, size=size)

    async def fallocate(self, mode: int, offset: int, length: int) -> None:
        await self.gmem.fallocate(
            name=self.name, mode=mode, offset=offset, length=length
        )

    async def token(self) -> str:
        return (await self.gmem.open_view(name=self.name)).token

    async def mapped_by(self, name: str = "client", incarnation: str = "i1") -> Program:
        """Start a client process that maps the whole host view."""
        program = self.host.program(name, incarnation)
        program.inode = self
        program.ask("take", await self.token())
        program.ask("map")
        return program


async def new_inode(
    host: Host,
    gmem: GuestMemfdClient,
    *,
    page_size: int = SIZE_2M,
    pages: int = 1,
    shared: bool = True,
    vmm_target: str = "",
    bound: bool = True,
    cgroup: str = "",
) -> Inode:
    """Make an inode of some huge pages and bind all of it at guest frame 0."""
    size = page_size * pages
    made = await gmem.create_guest_memfd(
        size=size, page_size=page_size, vm=VM, cgroup=cgroup
    )
    inode = Inode(host, gmem, made.name, size)
    if bound:
        await gmem.bind_memslot(
            name=inode.name,
            vm=VM,
            slot=0,
            base_gfn=0,
            offset=0,
            size=size,
            host_faultable=shared,
            vmm_target=vmm_target,
        )
    return inode


async def counters(
    allocator: HostAllocatorClient,
) -> allocator_pb.GetStatisticsResponse:
    """Return the allocator's statistics as far as they can be compared.

    Left out is what only ever grows: the revision, and totals since the start.
    """
    statistics = await allocator.get_statistics()
    for name in ("restored_pages_total", "optimized_pages_total"):
        statistics.vmemmap.ClearField(name)
    statistics.vmemmap.ClearField("restore_failures_total")
    statistics.ClearField("revision")
    return statistics


def differences(one: Message, two: Message) -> list[str]:
    """Return the lines in which two messages differ: pytest shows too few of them."""
    if one == two:
        return []
    lines = difflib.ndiff(str(one).splitlines(), str(two).splitlines())
    return [line for line in lines if line[0] in "+-"]


def changes(before: Sequence[Message], after: Sequence[Message]) -> list[str]:
    """Return the lines in which two lists of messages differ."""
    if len(before) != len(after):
        return [f"{len(before)} messages became {len(after)}"]
    pairs = zip(before, after, strict=True)
    return [line for one, two in pairs for line in differences(one, two)]


def pool_of(
    statistics: allocator_pb.GetStatisticsResponse, page_size: int
) -> allocator_pb.Pool:
    (pool,) = [pool for pool in statistics.pools if pool.page_size == page_size]
    return pool


class FakeVmm(Partial):
    """A VMM that notes what guest_memfd tells it, and answers when it may."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int, int]] = []
        self.asked = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def InvalidateBegin(
        self, request: vmm_pb2.InvalidateBeginRequest, context: Any
    ) -> vmm_pb2.InvalidateBeginResponse:
        self.told.append(("begin", request.gfn, request.npages))
        self.asked.set()
        await self.may_answer.wait()
        return vmm_pb2.InvalidateBeginResponse()

    async def InvalidateEnd(
        self, request: vmm_pb2.InvalidateEndRequest, context: Any
    ) -> vmm_pb2.InvalidateEndResponse:
        self.told.append(("end", request.gfn, request.npages))
        return vmm_pb2.InvalidateEndResponse()


@contextmanager
def refused(
    reason: Reason, *words: str, errno: str | None = None
) -> Iterator[list[KernelError]]:
    """Expect a KernelError with a reason; it is in the list afterwards.

    `words` are regular expressions that its sentence must have.
    """
    caught: list[KernelError] = []
    try:
        yield caught
    except KernelError as error:
        caught.append(error)
    assert caught, f"nothing was refused; {reason} was expected"
    (got,) = caught
    assert got.reason is reason, str(got)
    if errno is not None:
        assert str(got).startswith(errno + " "), str(got)
    for word in words:
        assert re.search(word, got.sentence), (word, got.sentence)


async def until(
    condition: Callable[[], Awaitable[bool]],
    what: str,
    seconds_max: float = GONE_SECONDS_MAX,
) -> None:
    """Poll an async condition until it holds."""
    deadline = time.monotonic() + seconds_max
    while not await condition():
        assert time.monotonic() < deadline, f"{what} did not come"
        await asyncio.sleep(0.02)


@contextmanager
def running_host(
    shape: HostShape = SMALL,
    nr_vmms: int = 0,
    *,
    under: str = "/tmp",
    restarts_max: int = 5,
    user: tuple[int, int] | None = None,
    spare: bool = True,
    backend: Backend = Backend.FUSE,
) -> Iterator[Host]:
    """As gmem.testing.hosts has it, with programs; skipped where it cannot be."""
    if backend is Backend.FUSE:
        require_fuse()
        require_root()
    with hosts.running_host(
        shape,
        nr_vmms,
        under=under,
        restarts_max=restarts_max,
        user=user,
        spare=spare,
        backend=backend,
    ) as emulated:
        host = Host(
            emulated.directory,
            emulated.shape,
            emulated.state,
            emulated.watchdog,
            emulated.connection_id,
        )
        try:
            yield host
        finally:
            host.end_programs()
            emulated.connection_id = host.connection_id
