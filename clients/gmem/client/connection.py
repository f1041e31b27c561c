"""One channel to one service: request ids, deadlines, repeats, errors.

A call whose outcome is unknown (UNAVAILABLE, DEADLINE_EXCEEDED, CANCELLED by the
transport) is repeated under the same request_id, so a mutation happens once: the
service stores its replies. The repeat also names the journal, or without one the
incarnation, of the service that the first attempt met: a service whose replies were
lost since refuses it with PeerRestarted instead of carrying it out a second time.
Repeats are bounded; then TransportError says who did not answer.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeVar, cast

import grpc

from gmem.api.types.v1.types_pb2 import RequestId
from gmem.runtime import status
from gmem.runtime.metadata import (
    EXPECT_INCARNATION_KEY,
    GO_KEY,
    INCARNATION_KEY,
    JOURNAL_KEY,
)
from gmem.uapi.errors import KernelError, TransportError

Req = TypeVar("Req")
Resp = TypeVar("Resp")
UnaryUnary: TypeAlias = grpc.aio.UnaryUnaryMultiCallable[Req, Resp]
UnaryStream: TypeAlias = grpc.aio.UnaryStreamMultiCallable[Req, Resp]
StreamUnary: TypeAlias = grpc.aio.StreamUnaryMultiCallable[Req, Resp]
Metadata: TypeAlias = tuple[tuple[str, str], ...]

_UNKNOWN_OUTCOME = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
    }
)
_STATUS_LOST = "Internal error from Core"
_DETAIL_CHARS_MAX = 200
_SYSTEM_ERROR = re.compile(
    r"(?:Connection refused|No such file or directory|Connection reset by peer|"
    r"Broken pipe|Deadline Exceeded|Network is unreachable)",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a client waits and how often it asks again; seconds throughout."""

    timeout: float = 10.0
    """One attempt."""
    attempts: int = 10
    total: float = 30.0
    """No attempt begins later than this after the first."""
    first_pause: float = 0.05
    """Doubled after each attempt, up to `longest_pause`."""
    longest_pause: float = 1.0

    def beyond(self, wait_ms: int | None, timeout: float | None) -> float | None:
        """Return the seconds of one attempt at a call that may wait `wait_ms`."""
        if timeout is not None or wait_ms is None:
            return timeout
        return self.timeout + wait_ms / 1000


_Answered: TypeAlias = (
    grpc.aio.UnaryUnaryCall[Any, Resp] | (grpc.aio.StreamUnaryCall[Any, Resp])
)

ONCE = Patience(attempts=1)
"""For calls that must not be repeated: they carry no request_id and count."""


class HasRequestId(Protocol):
    """A mutating request."""

    @property
    def request_id(self) -> RequestId:
        """Which request it is."""
        ...


class Connection:
    """The channel to `service` at `target`; made and used on one event loop."""

    def __init__(
        self,
        service: str,
        target: str,
        *,
        client: str,
        incarnation: str | None = None,
        patience: Patience | None = None,
    ) -> None:
        """Connect lazily; `client` and `incarnation` become part of request ids."""
        self.service = service
        self.target = target
        self.client = client
        self.incarnation = incarnation or secrets.token_hex(8)
        self.peer_incarnation: str | None = None
        """The lifetime of the service that answered last."""
        self.peer_journal: str | None = None
        """The journal of the service that answered last; None where it has none."""
        self.patience = patience or Patience()
        self.channel = grpc.aio.insecure_channel(target, _options(target))
        # One client may have several connections to a service.
        self._prefix = secrets.token_hex(4)
        self._numbers = itertools.count(1)

    async def close(self) -> None:
        """Close the channel; calls in progress are cancelled."""
        await self.channel.close()

    def new_request_id(self) -> RequestId:
        """Return an id that this incarnation has not used."""
        return RequestId(
            client=self.client,
            incarnation=self.incarnation,
            id=f"{self._prefix}-{next(self._numbers)}",
        )

    async def mutate(
        self,
        method: UnaryUnary[Req, Resp],
        request: Req,
        request_id: RequestId | None = None,
        *,
        timeout: float | None = None,
    ) -> Resp:
        """Call a method that changes something, under `request_id` or a new one."""
        field = cast("HasRequestId", request).request_id
        field.CopyFrom(request_id if request_id is not None else self.new_request_id())
        return await self.call(method, request, timeout=timeout, fenced=True)

    async def call(
        self,
        method: UnaryUnary[Req, Resp],
        request: Req,
        *,
        timeout: float | None = None,
        patience: Patience | None = None,
        fenced: bool = False,
    ) -> Resp:
        """Call, and call again while the outcome is unknown.

        `timeout` is that of one attempt; a `fenced` call is not repeated into another
        incarnation of the service. Raises what the service refused with, or
        TransportError.
        """
        patience = patience or self.patience
        seconds = timeout if timeout is not None else patience.timeout

        def send(metadata: Metadata) -> Awaitable[Resp]:
            return self._attempt(method(request, timeout=seconds, metadata=metadata))

        return await self._repeated(send, patience, fenced=fenced)

    async def mutate_by_stream(
        self,
        method: StreamUnary[Req, Resp],
        requests: Callable[[], Iterable[Req]],
        *,
        timeout: float,
    ) -> Resp:
        """Call a method with a stream of requests, made anew for each attempt.

        The first of them carries a request_id; `timeout` is that of one attempt.
        """

        async def send(metadata: Metadata) -> Resp:
            call = method(timeout=timeout, metadata=metadata)
            try:
                await _write_all(call, requests())
                return await self._attempt(call)
            finally:
                call.cancel()

        return await self._repeated(send, self.patience, fenced=True)

    async def _repeated(
        self,
        send: Callable[[Metadata], Awaitable[Resp]],
        patience: Patience,
        *,
        fenced: bool,
    ) -> Resp:
        started, pause = time.monotonic(), patience.first_pause
        metadata: Metadata = ()
        for attempt in itertools.count(1):
            before = self.peer_journal or self.peer_incarnation
            try:
                return await send(metadata)
            except grpc.aio.AioRpcError as error:
                passed = time.monotonic() - started
                last = attempt >= patience.attempts or passed > patience.total
                if last or not _is_outcome_unknown(error):
                    raise self.translated(error) from error
            await asyncio.sleep(pause)
            pause = min(pause * 2, patience.longest_pause)
            if fenced and not metadata and before is not None:
                metadata = ((EXPECT_INCARNATION_KEY, before),)
        raise AssertionError("unreachable")

    async def stream(
        self, method: UnaryStream[Req, Resp], request: Req
    ) -> AsyncGenerator[Resp]:
        """Yield the responses of a stream; closing the generator cancels the call."""
        call = method(request)
        try:
            async for response in call:
                yield response
        except grpc.aio.AioRpcError as error:
            raise self.translated(error) from error
        finally:
            call.cancel()

    async def stream_from(
        self, method: UnaryStream[Req, Resp], request: Callable[[], Req | None]
    ) -> AsyncGenerator[Resp]:
        """As `stream`, begun again when the connection is lost, until it is None.

        `request` says what is still to come. A response is waited for as long as for
        that of any call; attempts count from the last response on.
        """
        attempt, pause = 0, self.patience.first_pause
        while (asked := request()) is not None:
            try:
                async with aclosing(self._timed(method(asked))) as responses:
                    async for response in responses:
                        attempt, pause = 0, self.patience.first_pause
                        yield response
            except (grpc.aio.AioRpcError, TimeoutError) as error:
                attempt += 1
                spent = attempt >= self.patience.attempts
                if spent or not _is_outcome_unknown(error):
                    raise self.translated(error) from error
                await asyncio.sleep(pause)
                pause = min(pause * 2, self.patience.longest_pause)

    async def _timed(
        self, call: grpc.aio.UnaryStreamCall[Any, Resp]
    ) -> AsyncGenerator[Resp]:
        responses = aiter(call)
        try:
            while True:
                async with asyncio.timeout(self.patience.timeout):
                    response = await anext(responses, None)
                if response is None:
                    return
                yield response
        finally:
            call.cancel()

    def translated(
        self, error: grpc.aio.AioRpcError | TimeoutError
    ) -> KernelError | TransportError:
        """Return what the service raised, or who did not answer and what to do."""
        decoded = None if isinstance(error, TimeoutError) else status.decode(error)
        if decoded is not None:
            return decoded
        return TransportError(
            f"{self.service} at {self.target} gave no answer ({_cause(error)}); see "
            "`gmemctl status`",
            service=self.service,
            target=self.target,
        )

    async def _attempt(self, call: _Answered[Resp]) -> Resp:
        try:
            response = await call
            self._learn(await call.trailing_metadata())
            return response
        except grpc.aio.AioRpcError as error:
            self._learn(error.trailing_metadata())
            raise
        finally:
            # grpc.aio does not cancel a call whose awaiting task was cancelled.
            call.cancel()

    def _learn(self, metadata: grpc.aio.Metadata | None) -> None:
        found = metadata or grpc.aio.Metadata()
        incarnation, journal = found.get(INCARNATION_KEY), found.get(JOURNAL_KEY)
        if incarnation is not None:
            self.peer_incarnation = str(incarnation)
            self.peer_journal = str(journal) if journal is not None else None


async def _write_all(
    call: grpc.aio.StreamUnaryCall[Req, Any], requests: Iterable[Req]
) -> None:
    """Write the first request, and the others when they may come."""
    stream = iter(requests)
    # Where the call has ended meanwhile its status says why.
    with suppress(asyncio.InvalidStateError):
        await call.write(next(stream))
        if (await call.initial_metadata()).get(GO_KEY) is None:
            return
        for request in stream:
            await call.write(request)
        await call.done_writing()


def _cause(error: grpc.aio.AioRpcError | TimeoutError) -> str:
    """Return the status and what the system said, without grpc's addresses."""
    if isinstance(error, TimeoutError):
        return "DEADLINE_EXCEEDED: the stream stands still"
    words = " ".join((error.details() or "").split())
    # grpc nests its sentences, each with the address again; the innermost has errno.
    found = _SYSTEM_ERROR.findall(words)
    return f"{error.code().name}: {found[-1] if found else words[:_DETAIL_CHARS_MAX]}"


def _is_outcome_unknown(error: grpc.aio.AioRpcError | TimeoutError) -> bool:
    if isinstance(error, TimeoutError):
        return True
    if error.code() is grpc.StatusCode.INTERNAL:
        # A stream of requests that was ended while one of them was being written; why,
        # a repeat is told before it has written anything.
        return error.details() == _STATUS_LOST
    # A service that says it could not reach another has repeated enough already.
    return error.code() in _UNKNOWN_OUTCOME and status.decode(error) is None


def _options(target: str) -> list[tuple[str, Any]]:
    options: list[tuple[str, Any]] = [
        # The repeats of this file are the only ones.
        ("grpc.enable_retries", 0),
        ("grpc.initial_reconnect_backoff_ms", 50),
        ("grpc.min_reconnect_backoff_ms", 50),
    ]
    if target.startswith("unix:"):
        # Asking a socket that nobody listens at costs nothing, and a call waits for the
        # channel to ask: with a second between two times it may miss a service that was
        # killed, came back and was killed again. gRPC takes less for 100.
        options += [("grpc.max_reconnect_backoff_ms", 100)]
    else:
        options += [("grpc.max_reconnect_backoff_ms", 1000)]
        # A stopped machine is noticed after 1.8 s with all three, 60 s with two.
        options += [
            ("grpc.keepalive_time_ms", 1000),
            ("grpc.keepalive_timeout_ms", 1000),
            ("grpc.http2.ping_timeout_ms", 1000),
            ("grpc.keepalive_permit_without_calls", 1),
        ]
    return options
