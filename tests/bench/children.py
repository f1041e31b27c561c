"""The processes beside a host: the worker that touches memory, and bare servers.

Each is ended with the block that it was started for.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final

import grpc

from gmem.runtime import fdpass
from tests.bench.bare_grpc import METHOD, SERVICE
from tests.support.hosts import ROOT

ANSWER_SECONDS_MAX: Final = 80.0
"""Less than the watchdog's bound: then the worker has been freed, and says so."""
END_SECONDS_MAX: Final = 30.0


class WorkerFailedError(Exception):
    """What the worker met, in its words."""


class WorkerProcess:
    """The worker as methods: `await worker("fill", name, 1)`."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._control.settimeout(ANSWER_SECONDS_MAX)

    async def __call__(self, op: str, *args: Any, fds: tuple[int, ...] = ()) -> Any:
        """Have one thing done while this loop runs on."""
        return await asyncio.to_thread(self._ask, op, args, fds)

    def _ask(self, op: str, args: tuple[Any, ...], fds: tuple[int, ...]) -> Any:
        fdpass.send(self._control, {"op": op, "args": list(args)}, fds)
        answer = fdpass.receive(self._control)
        if answer is None:
            raise WorkerFailedError(f"it ended during {op}")
        if "error" in answer.fields:
            raise WorkerFailedError(f"{op}{args}: {answer.fields['error']}")
        return answer.fields["ok"]


@contextmanager
def child(module: str, *words: str) -> Iterator[socket.socket]:
    """Run a module of ours with a socket to talk over; kill it in the end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(theirs.fileno()), *words],
            pass_fds=[theirs.fileno()],
            cwd=ROOT,
        )
    try:
        yield ours
    finally:
        ours.close()
        process.kill()
        process.wait(END_SECONDS_MAX)


@contextmanager
def worker_process() -> Iterator[WorkerProcess]:
    """Start a worker."""
    with child("tests.bench.worker") as control:
        yield WorkerProcess(control)


@asynccontextmanager
async def bare_fuse(worker: WorkerProcess) -> AsyncIterator[str]:
    """Serve the bare FUSE file, mapped by the worker; its name there."""
    with child("tests.bench.bare_fuse") as control:
        control.settimeout(ANSWER_SECONDS_MAX)
        receive = asyncio.to_thread(socket.recv_fds, control, 1, 1)
        _, (mount_fd,), *_ = await receive
        await worker("open_bare", "bare", fds=(mount_fd,))
        os.close(mount_fd)
        try:
            yield "bare"
        finally:
            await worker("close", "bare")


class Echo:
    """A client of the bare gRPC server."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._call: Any = channel.unary_unary(f"/{SERVICE}/{METHOD}")

    async def __call__(self) -> None:
        await self._call(bytes(100))


@asynccontextmanager
async def bare_grpc() -> AsyncIterator[Echo]:
    """Serve echoes over a UNIX socket, and connect to it."""
    with tempfile.TemporaryDirectory(prefix="gb-", dir="/tmp") as directory:
        path = Path(directory) / "s"
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.bare_grpc", str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        try:
            assert process.stdout is not None
            assert await asyncio.to_thread(process.stdout.readline) == b"ready\n"
            async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
                yield Echo(channel)
        finally:
            process.kill()
            process.communicate(timeout=END_SECONDS_MAX)
