"""The way to a VMM: gRPC for everybody, its broker's socket where there is one.

A VMM of this machine with a broker answers InvalidateBegin and InvalidateEnd there as
well, in a tenth of the time of a call of gRPC, which a conversion waits for twice. The
first calls go by gRPC while the socket is looked for. Where there is none, or it was
lost, gRPC is the way: a bracket that is told twice counts once.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from enum import Enum
from pathlib import Path
from typing import Any, Final, Self

import structlog

from gmem.client import VmmClient
from gmem.runtime import fdpass
from gmem.runtime.broker_client import refusal_of
from gmem.uapi.errors import KernelError, TransportError
from gmem.uapi.pages import PgRange

ACKNOWLEDGE_SECONDS_MAX: Final = 5.0
"""A VMM that has not acknowledged by then is fenced: its guest cannot reach the pages
anyway, because their view is closed and invalidated."""
LOOK_AGAIN_SECONDS: Final = 1.0
"""After a socket was not found, or was lost."""
_UNIX: Final = "unix:"

log = structlog.get_logger(__name__)


class Edge(Enum):
    """Of a bracket around a change."""

    BEGIN = "begin"
    END = "end"


class VmmLink:
    """One VMM at `target`; made and used on one loop."""

    def __init__(
        self, target: str, client: str, *, seconds: float = ACKNOWLEDGE_SECONDS_MAX
    ) -> None:
        """Connect when something is told; it has `seconds` to acknowledge."""
        self._target = target
        self._seconds = seconds
        self._vmm = VmmClient(target, client=client)
        self._hello = {
            "op": "hello",
            "client": client,
            "incarnation": self._vmm.connection.incarnation,
        }
        self._socket: NoticeSocket | None = None
        self._looking: asyncio.Task[None] | None = None
        self._look_at = 0.0
        self._said = ""

    @property
    def by_socket(self) -> bool:
        """Whether what is told next goes by the socket."""
        return self._socket is not None and not self._socket.lost

    async def tell(self, edge: Edge, vm: str, gfns: PgRange) -> None:
        """Ask once; a VMM that is dead, silent or without the VM has acknowledged."""
        try:
            if self._socket is None or not await self._told(edge, vm, gfns):
                self._look_for_socket()
                await self._call(edge, vm, gfns)
        except (KernelError, TransportError) as error:
            log.warning(
                "vmm_counts_as_acknowledged", what=edge.value, vm=vm, error=str(error)
            )

    async def close(self) -> None:
        """Let go of the VMM."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait([self._looking])
        if self._socket is not None:
            self._socket.close("closed")
        await self._vmm.close()

    async def _told(self, edge: Edge, vm: str, gfns: PgRange) -> bool:
        """Tell through the socket; False where that is lost."""
        assert self._socket is not None
        try:
            await self._socket.ask(
                {
                    "op": "invalidate",
                    "edge": edge.value,
                    "vm": vm,
                    "gfn": gfns.start,
                    "npages": len(gfns),
                },
                self._seconds,
            )
        except TimeoutError:
            raise TransportError(
                f"the VMM at {self._target} did not acknowledge within "
                f"{self._seconds:.0f} s",
                service="vmm",
                target=self._target,
            ) from None
        except KernelError:
            raise
        except OSError as error:
            log.info("vmm_socket_lost", target=self._target, error=str(error))
            self._socket = None
            return False
        return True

    async def _call(self, edge: Edge, vm: str, gfns: PgRange) -> None:
        begin = edge is Edge.BEGIN
        call = self._vmm.invalidate_begin if begin else self._vmm.invalidate_end
        await call(vm=vm, gfn=gfns.start, npages=len(gfns), timeout=self._seconds)

    def _look_for_socket(self) -> None:
        """Look beside the calls, which go by gRPC meanwhile."""
        now = asyncio.get_running_loop().time()
        if now < self._look_at or not self._target.startswith(_UNIX):
            return
        self._look_at = now + LOOK_AGAIN_SECONDS
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._find_socket())

    async def _find_socket(self) -> None:
        try:
            capabilities = await self._vmm.get_capabilities()
            path = Path(capabilities.broker_path)
            # Of this VMM and no namesake: another mount may show other sockets there.
            if path.parent != Path(self._target.removeprefix(_UNIX)).parent:
                raise FileNotFoundError(f"its broker is at {path}")
            self._socket = await NoticeSocket.open(path, self._hello, self._seconds)
        except (KernelError, TransportError, OSError) as error:
            # A VMM that does not answer, or has no such method, among others.
            self._say("vmm_is_told_by_grpc", error=str(error))
        else:
            self._say("vmm_socket_found", path=str(path))

    def _say(self, event: str, **details: str) -> None:
        """Log which way is taken, when it changes: it is looked for again and again."""
        if event != self._said:
            self._said = event
            log.info(event, target=self._target, **details)


class NoticeSocket:
    """A connection to a broker that is asked from a loop; answers come in order."""

    def __init__(self, connection: socket.socket) -> None:
        """Take a connection over."""
        self.lost = False
        self._connection = connection
        self._connection.settimeout(0)
        self._asked: deque[asyncio.Future[dict[str, Any]]] = deque()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(connection, self._receive)

    @classmethod
    async def open(cls, path: Path, hello: dict[str, Any], seconds: float) -> Self:
        """Connect and say hello. OSError, KernelError."""
        found = cls(await asyncio.to_thread(fdpass.connect, path, timeout=seconds))
        try:
            await found.ask(hello, seconds)
        except OSError:
            found.close("refused")
            raise
        return found

    async def ask(self, fields: dict[str, Any], seconds: float) -> None:
        """Send a message, and wait for what is answered.

        KernelError where it is refused; TimeoutError; another OSError where the
        connection is lost.
        """
        if self.lost:
            raise ConnectionResetError("the connection was closed")
        try:
            fdpass.send(self._connection, fields)
        except OSError as error:
            self.close(str(error))
            raise
        answer: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self._asked.append(answer)
        # An answer that is given up keeps its place: what comes then is nobody's.
        async with asyncio.timeout(seconds):
            answered = await answer
        if not answered.get("ok"):
            raise refusal_of(answered)

    def close(self, why: str) -> None:
        """End the connection, and whoever waits."""
        if self.lost:
            return
        self.lost = True
        self._loop.remove_reader(self._connection)
        self._connection.close()
        for answer in self._asked:
            if not answer.done():
                answer.set_exception(ConnectionResetError(why))
        self._asked.clear()

    def _receive(self) -> None:
        try:
            message = fdpass.receive(self._connection)
        except BlockingIOError:
            return
        except (OSError, fdpass.MessageRefused) as error:
            self.close(str(error))
            return
        if message is None:
            self.close("the VMM closed the connection")
            return
        fdpass.close_all(message.fds)
        if not self._asked:
            self.close("an answer came that nobody asked for")
            return
        answer = self._asked.popleft()
        if not answer.done():
            answer.set_result(message.fields)
