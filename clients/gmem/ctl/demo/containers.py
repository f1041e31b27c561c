"""Demo programs in containers of their own, started by somebody else.

Each listens at `<directory>/<name>.sock`. How a container ended only its engine knows:
whoever started the programs writes a line `NAME EXIT_CODE` to our standard input for
each that has ended, with exit codes as engines give them, 128 + N for signal N.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from gmem.ctl.demo.children import LINE_BYTES_MAX, Program
from gmem.ctl.errors import ControlError, ExitStatus

APPEAR_SECONDS_MAX: Final = 60.0
ENDED_SECONDS_MAX: Final = 30.0
_POLL_SECONDS: Final = 0.1
_SIGNALLED: Final = 128


class Containers:
    """The programs of one demo; `directory` holds their sockets."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._ends: dict[str, asyncio.Future[int]] = {}
        self._transport: asyncio.BaseTransport | None = None
        self._reading: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Begin to read how containers end."""
        loop = asyncio.get_running_loop()
        lines = asyncio.StreamReader()
        self._transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(lines), sys.stdin
        )
        self._reading = asyncio.create_task(self._read(lines))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Read no more."""
        assert self._reading is not None
        assert self._transport is not None
        self._reading.cancel()
        self._transport.close()
        await asyncio.wait({self._reading})

    async def connect(self, name: str) -> ContainerProgram:
        """Connect to a program once it is there. Raises ControlError when it is not."""
        answers, requests = await _connection(name, self._directory / f"{name}.sock")
        hello = json.loads(await answers.readline())
        return ContainerProgram(name, hello["hostname"], requests, answers, self)

    async def end_of(self, name: str) -> int | None:
        """Return how a container ended, as Program.end does."""
        try:
            return await asyncio.wait_for(
                asyncio.shield(self._end(name)), ENDED_SECONDS_MAX
            )
        except TimeoutError:
            return None

    async def _read(self, lines: asyncio.StreamReader) -> None:
        async for line in lines:
            name, _, code = line.decode().partition(" ")
            status = int(code)
            if status > _SIGNALLED:
                status = _SIGNALLED - status
            end = self._end(name)
            if not end.done():
                end.set_result(status)

    def _end(self, name: str) -> asyncio.Future[int]:
        if name not in self._ends:
            self._ends[name] = asyncio.get_running_loop().create_future()
        return self._ends[name]


async def _connection(
    name: str, path: Path
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + APPEAR_SECONDS_MAX
    while True:
        try:
            return await asyncio.open_unix_connection(path, limit=LINE_BYTES_MAX)
        except OSError as error:
            if loop.time() >= deadline:
                raise ControlError(
                    f"no {name} at {path} ({error.strerror}): start its container",
                    ExitStatus.UNREACHABLE,
                ) from error
        await asyncio.sleep(_POLL_SECONDS)


class ContainerProgram(Program):
    """One demo program in a container, to which this demo is connected."""

    def __init__(
        self,
        name: str,
        hostname: str,
        requests: asyncio.StreamWriter,
        answers: asyncio.StreamReader,
        containers: Containers,
    ) -> None:
        super().__init__(requests, answers)
        self.name = name
        self.where = f"container {hostname}"
        self.known_as = "in another pid namespace"
        self._containers = containers

    async def end(self) -> int | None:
        """Close its input and wait until its engine has told how it ended."""
        self._requests.close()
        return await self._containers.end_of(self.name)
