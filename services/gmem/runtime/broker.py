"""Descriptors by socket: views go out for one-time tokens, clients' memory comes in.

A UNIX socket beside the gRPC port, because a descriptor cannot travel by gRPC. A
client says hello, then

    take{token}       -> the descriptor that an RPC promised, by SCM_RIGHTS, once; what
                         belongs to it may come behind it
    give{label} + fd  -> a name ("descriptors/17") to use in RPCs
    drop{descriptor}  -> closes one it gave
    windows{windows}  -> reports what it has mapped, where the service cannot look

and what else its service was asked to answer there (`register`),

and stays connected: the end of its connection is the end of its process. Then its
descriptors are closed, after everybody who asked (`on_gone`) has been told.

A request that cannot be granted is answered with its Reason and the connection stays.
Who breaks the protocol (no JSON, a descriptor nobody asked for) loses it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import stat
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

import structlog

from gmem.runtime import fdpass
from gmem.uapi.errors import (
    BadRequest,
    Exhausted,
    KernelError,
    NoSuchObject,
    NotFaultable,
    Reason,
)

TOKEN_BYTES: Final = 32
TOKEN_SECONDS: Final = 60.0
TOKENS_MAX: Final = 4096
SESSIONS_MAX: Final = 256
GIVEN_PER_SESSION_MAX: Final = 64
WINDOWS_PER_SESSION_MAX: Final = 1024
NAME_CHARACTERS_MAX: Final = 128
TURN_AWAY_SECONDS: Final = 1.0

log = structlog.get_logger(__name__)

Open = Callable[[], Awaitable[list[int]]]
"""Opens what a token promises: the descriptor first, then what belongs to it."""
_Reply: TypeAlias = tuple[dict[str, Any], list[int]]
_Operation: TypeAlias = Callable[
    ["Session", dict[str, Any], list[int]], Awaitable[_Reply]
]


@dataclass(frozen=True, slots=True)
class Window:
    """A piece of a file that a client has mapped: bytes, and where in the process."""

    file: str
    offset: int
    length: int
    address: int


@dataclass(frozen=True, slots=True)
class GivenDescriptor:
    """A descriptor that a client handed in; ours until its session ends."""

    name: str
    label: str
    fd: int
    pid: int
    uid: int
    comm: str
    client: str


@dataclass(eq=False, slots=True)
class Session:
    """One connected client: one process's life. `windows` is what it reported last."""

    connection: socket.socket = field(repr=False)
    pid: int
    uid: int
    comm: str
    client: str = ""
    incarnation: str = ""
    windows: tuple[Window, ...] = ()
    given: dict[str, GivenDescriptor] = field(default_factory=dict)

    @property
    def said_hello(self) -> bool:
        """Whether it has told who it is."""
        return bool(self.client)


@dataclass(frozen=True, slots=True)
class _Token:
    source: Open | int
    pid: int | None
    uid: int | None
    timer: asyncio.TimerHandle


class Broker:
    """Serves the socket at `path` in the running loop; see the module for the protocol.

    `mode` are the permissions of the socket. A token is what authorises a take; pid
    and uid of a token are checked against what the kernel says of the peer.
    """

    def __init__(self, path: Path, *, mode: int = 0o660) -> None:
        self.path = path
        self.sessions: list[Session] = []
        self._mode = mode
        self._listener: socket.socket | None = None
        self._tokens: dict[str, _Token] = {}
        self._given: dict[str, GivenDescriptor] = {}
        self._came: list[Callable[[Session], None]] = []
        self._gone: list[Callable[[Session], None]] = []
        self._operations: dict[str, _Operation] = {
            "hello": self._hello,
            "take": self._take,
            "give": self._give,
            "drop": self._drop,
            "windows": self._windows,
        }
        self._tasks: set[asyncio.Task[None]] = set()
        self._next_name = 1

    async def start(self) -> None:
        """Listen; OSError when another process does. A stale socket is removed."""
        self._listener = fdpass.listen(self.path, mode=self._mode)
        self._listener.settimeout(0)
        self._spawn(self._accept(self._listener))

    async def stop(self) -> None:
        """End all sessions (each is reported gone) and remove the socket."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # A task that was cancelled before its first step has run no `finally`.
        for session in list(self.sessions):
            await self._end(session)
        if self._listener is not None:
            self._listener.close()
            self.path.unlink(missing_ok=True)
        for token in list(self._tokens):
            await self._forget(token)

    def mint(
        self, source: Open | int, *, pid: int | None = None, uid: int | None = None
    ) -> str:
        """Return a token for one descriptor: an open one, or what `source()` opens.

        It works once, within TOKEN_SECONDS, for the process and user named. What is
        sent is closed here afterwards, an open descriptor also when the token expires.
        """
        if len(self._tokens) >= TOKENS_MAX:
            raise Exhausted(
                Reason.LIMIT_REACHED,
                f"{TOKENS_MAX} tokens are outstanding: take some, or wait "
                f"{TOKEN_SECONDS:.0f} s",
                limit=TOKENS_MAX,
            )
        token = secrets.token_hex(TOKEN_BYTES)
        timer = asyncio.get_running_loop().call_later(
            TOKEN_SECONDS, lambda: self._spawn(self._forget(token))
        )
        self._tokens[token] = _Token(source, pid, uid, timer)
        return token

    def descriptor(self, name: str) -> GivenDescriptor:
        """Return a descriptor that a living client gave; NoSuchObject otherwise."""
        given = self._given.get(name)
        if given is None:
            raise NoSuchObject(
                Reason.DESCRIPTOR_UNKNOWN,
                f"{name!r} was never given, or its giver is gone: give it again",
            )
        return given

    def register(self, name: str, carry_out: Callable[[dict[str, Any]], None]) -> None:
        """Answer an operation of the service's own; it gets the fields, and no wait."""
        assert name not in self._operations, name

        async def operation(
            _session: Session, fields: dict[str, Any], _fds: list[int]
        ) -> _Reply:
            carry_out(fields)
            return {"ok": True}, []

        self._operations[name] = operation

    def on_hello(self, callback: Callable[[Session], None]) -> None:
        """Have `callback` called for each client that says who it is."""
        self._came.append(callback)

    def on_gone(self, callback: Callable[[Session], None]) -> None:
        """Have `callback` called once for each client that ends; it must not await."""
        self._gone.append(callback)

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            # Not loop.sock_accept(): cancelled at the wrong moment, it has accepted a
            # connection that nobody ever closes.
            await _until_readable(listener)
            try:
                connection, _ = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                continue  # The client has gone again.
            connection.settimeout(0)
            if len(self.sessions) >= SESSIONS_MAX:
                self._spawn(self._turn_away(connection), closing=connection)
                continue
            peer = fdpass.peer_of(connection)
            session = Session(connection, peer.pid, peer.uid, peer.comm)
            self.sessions.append(session)
            self._spawn(self._serve(session))

    async def _turn_away(self, connection: socket.socket) -> None:
        """Answer a client's hello with a refusal: unread, it would hide the answer."""
        error = Exhausted(
            Reason.CLIENTS_EXHAUSTED,
            f"{SESSIONS_MAX} clients are connected: end one",
            limit=SESSIONS_MAX,
        )
        with contextlib.suppress(OSError, ValueError):
            async with asyncio.timeout(TURN_AWAY_SECONDS):
                await _until_readable(connection)
            message = fdpass.receive(connection)
            await _close(*(message.fds if message else ()))
            await self._answer(connection, _refusal(error))

    async def _serve(self, session: Session) -> None:
        try:
            while True:
                await _until_readable(session.connection)
                message = fdpass.receive(session.connection)
                if message is None:
                    return
                await self._handle(session, message)
        except fdpass.MessageRefused as error:
            log.warning("broker_protocol_broken", pid=session.pid, error=str(error))
        except OSError as error:
            log.info("broker_connection_lost", pid=session.pid, error=str(error))
        finally:
            await self._end(session)

    async def _end(self, session: Session) -> None:
        session.connection.close()
        self.sessions.remove(session)
        if session.said_hello:
            for callback in self._gone:
                callback(session)
        fds = [self._given.pop(name).fd for name in session.given]
        session.given.clear()
        await _close(*fds)

    async def _handle(self, session: Session, message: fdpass.Message) -> None:
        op = message.fields.get("op")
        if message.fds and op != "give":
            await _close(*message.fds)
            raise fdpass.MessageRefused(f"a descriptor came with {op!r}")
        operation = self._operations.get(str(op))
        fds = list(message.fds)
        try:
            if operation is None:
                known = ", ".join(self._operations)
                raise _bad(f"operation {op!r} is none of {known}")
            if not session.said_hello and op != "hello":
                raise _bad("say hello first")
            reply, out = await operation(session, message.fields, fds)
        except KernelError as error:
            reply, out = _refusal(error), []
        finally:
            # Whatever the operation did not keep.
            await _close(*fds)
        try:
            await self._answer(session.connection, reply, out)
        finally:
            await _close(*out)

    async def _hello(
        self, session: Session, fields: dict[str, Any], _fds: list[int]
    ) -> _Reply:
        client = _word(fields, "client")
        session.incarnation = _word(fields, "incarnation")
        session.client = client
        for callback in self._came:
            callback(session)
        return {"ok": True, "pid": os.getpid()}, []

    async def _take(
        self, session: Session, fields: dict[str, Any], _fds: list[int]
    ) -> _Reply:
        name = str(fields.get("token", ""))
        token = self._tokens.get(name)
        if token is None:
            raise NoSuchObject(
                Reason.TOKEN_UNKNOWN,
                "the token was used, has expired or was never issued: open the view "
                "again",
            )
        # Pid 0 is every process of other pid namespaces, hence nobody's proof.
        peer_pid = session.pid or None
        if (token.pid is not None and token.pid != peer_pid) or (
            token.uid not in (None, session.uid)
        ):
            raise NotFaultable(
                Reason.TOKEN_DENIED,
                f"the token is not for pid {session.pid}, uid {session.uid}: take it "
                "in the process it was issued for",
            )
        # Before the await: a token shown twice at once is still used once.
        del self._tokens[name]
        token.timer.cancel()
        if isinstance(token.source, int):
            return {"ok": True}, [token.source]
        return {"ok": True}, await token.source()

    async def _give(
        self, session: Session, fields: dict[str, Any], fds: list[int]
    ) -> _Reply:
        label = _word(fields, "label")
        if len(fds) != 1:
            raise fdpass.MessageRefused(f"give came with {len(fds)} descriptors")
        if len(session.given) >= GIVEN_PER_SESSION_MAX:
            raise Exhausted(
                Reason.FDS_EXHAUSTED,
                f"{GIVEN_PER_SESSION_MAX} descriptors were given: drop one first",
                limit=GIVEN_PER_SESSION_MAX,
            )
        # A file may be served by a process that is not there: fstat in a thread.
        mode = (await asyncio.to_thread(os.fstat, fds[0])).st_mode
        if not stat.S_ISREG(mode):
            raise fdpass.MessageRefused("the descriptor given is no regular file")
        name = f"descriptors/{self._next_name}"
        self._next_name += 1
        given = GivenDescriptor(
            name=name,
            label=label,
            fd=fds.pop(),
            pid=session.pid,
            uid=session.uid,
            comm=session.comm,
            client=session.client,
        )
        self._given[name] = session.given[name] = given
        return {"ok": True, "descriptor": name}, []

    async def _drop(
        self, session: Session, fields: dict[str, Any], _fds: list[int]
    ) -> _Reply:
        name = _word(fields, "descriptor")
        given = session.given.pop(name, None)
        if given is None:
            raise NoSuchObject(
                Reason.DESCRIPTOR_UNKNOWN, f"{name!r} was not given by this client"
            )
        del self._given[name]
        await _close(given.fd)
        return {"ok": True}, []

    async def _windows(
        self, session: Session, fields: dict[str, Any], _fds: list[int]
    ) -> _Reply:
        raw = fields.get("windows")
        if not isinstance(raw, list) or len(raw) > WINDOWS_PER_SESSION_MAX:
            raise _bad(f"windows must be a list of at most {WINDOWS_PER_SESSION_MAX}")
        session.windows = tuple(_window(item) for item in raw)
        return {"ok": True}, []

    @staticmethod
    async def _answer(
        connection: socket.socket, fields: dict[str, Any], fds: Sequence[int] = ()
    ) -> None:
        while True:
            try:
                fdpass.send(connection, fields, fds)
            except BlockingIOError:
                await _until_writable(connection)
            else:
                return

    async def _forget(self, name: str) -> None:
        token = self._tokens.pop(name, None)
        if token is None:
            return
        token.timer.cancel()
        if isinstance(token.source, int):
            await _close(token.source)

    def _spawn(
        self,
        work: Coroutine[Any, Any, None],
        *,
        closing: socket.socket | None = None,
    ) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if closing is not None:
            # Not in the task, which may be cancelled before its first step.
            task.add_done_callback(lambda _: closing.close())


def _refusal(error: KernelError) -> dict[str, Any]:
    return {
        "ok": False,
        "reason": error.reason.value,
        "errno": error.errno,
        "text": error.sentence,
        "numbers": error.numbers,
    }


def _bad(sentence: str) -> BadRequest:
    return BadRequest(Reason.ARGUMENT_INVALID, sentence)


def _word(fields: dict[str, Any], key: str) -> str:
    value = fields.get(key)
    if not isinstance(value, str) or not 0 < len(value) <= NAME_CHARACTERS_MAX:
        raise _bad(f"{key} must be a string of 1 to {NAME_CHARACTERS_MAX} characters")
    return value


def _window(item: object) -> Window:
    if not isinstance(item, dict):
        raise _bad("a window is an object with file, offset, length and address")
    numbers = [item.get(key) for key in ("offset", "length", "address")]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise _bad("offset, length and address of a window are numbers, not negative")
    offset, length, address = (int(number) for number in numbers if number is not None)
    return Window(_word(item, "file"), offset, length, address)


async def _close(*fds: int) -> None:
    # close(2) of a file that a dead FUSE server serves may block: not in the loop.
    if fds:
        await asyncio.to_thread(fdpass.close_all, fds)


async def _until_readable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(connection, _wake, ready)
    try:
        await ready
    finally:
        loop.remove_reader(connection)


async def _until_writable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_writer(connection, _wake, ready)
    try:
        await ready
    finally:
        loop.remove_writer(connection)


def _wake(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
