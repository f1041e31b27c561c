"""What happens to every call of ours on its way in and out; servicers do none of it.

In: names for the log, the incarnation the caller expects, the stored reply.
Out: the incarnation of this service, the revision, the status of a refusal.

Calls of other services on the same server (health, reflection) pass untouched.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any, Protocol, TypeAlias, TypeVar, cast

import grpc
from google.protobuf.message import Message

from gmem.runtime import status
from gmem.runtime.events import EventLog
from gmem.runtime.journal import Journal
from gmem.runtime.log import bound, logger
from gmem.runtime.metadata import (
    EXPECT_INCARNATION_KEY,
    GO_KEY,
    INCARNATION_KEY,
    JOURNAL_KEY,
)
from gmem.runtime.replies import Replies
from gmem.uapi.errors import (
    BadRequest,
    KernelError,
    PeerRestarted,
    Reason,
    TransportError,
)

_OURS = "/gmem.api."

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_Behaviour: TypeAlias = Callable[[Any, Context], Any]


class _Revised(Protocol):
    """Every response of ours."""

    revision: int


V = TypeVar("V", bound=_Revised)


class Boundary(grpc.aio.ServerInterceptor):
    """The one interceptor of a server."""

    def __init__(
        self,
        *,
        incarnation: str,
        events: EventLog,
        on_bug: Callable[[BaseException], None],
    ) -> None:
        """Serve one incarnation; `on_bug` hears of exceptions that are our fault."""
        self._incarnation = incarnation
        self._events = events
        self._on_bug = on_bug
        self._replies = Replies()
        self._journal_id = ""
        self._streams: set[asyncio.Task[Any]] = set()
        self._wrapped: dict[str, Handler] = {}
        self._stopping = False

    def use(self, journal: Journal) -> None:
        """Keep the replies in `journal`, and know those that it has."""
        self._replies = Replies(journal)
        self._journal_id = journal.id

    def end_streams(self) -> None:
        """End every stream of ours with UNAVAILABLE: they never end by themselves."""
        self._stopping = True
        for task in list(self._streams):
            task.cancel()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Wrap the handler of a method of ours, once."""
        method = str(handler_call_details.method)
        if method in self._wrapped:
            return self._wrapped[method]
        handler = await continuation(handler_call_details)
        if handler is None or not method.startswith(_OURS):
            return handler
        return self._wrapped.setdefault(method, self._wrap(method, handler))

    def _wrap(self, method: str, handler: Handler) -> Handler:
        name = method.rpartition("/")[2]
        # The stubs know synchronous handlers only.
        rpc = cast("Any", handler)
        codec = (handler.request_deserializer, handler.response_serializer)
        if rpc.unary_unary:
            behaviour = self._unary(name, rpc.unary_unary)
            return grpc.unary_unary_rpc_method_handler(behaviour, *codec)
        if rpc.unary_stream:
            behaviour = self._stream(name, rpc.unary_stream)
            return grpc.unary_stream_rpc_method_handler(behaviour, *codec)
        if rpc.stream_unary:
            behaviour = self._client_stream(name, rpc.stream_unary)
            return grpc.stream_unary_rpc_method_handler(behaviour, *codec)
        assert rpc.stream_stream, f"{method}: no rpc of ours has this shape"
        behaviour = self._stream(name, rpc.stream_stream)
        return grpc.stream_stream_rpc_method_handler(behaviour, *codec)

    def _unary(self, method: str, behaviour: _Behaviour) -> _Behaviour:
        async def answer(request: Message, context: Context) -> object:
            with bound(method=method, **names_of(request)):
                async with self._translated(context):
                    return await self._reply(method, behaviour, request, context)

        return answer

    def _stream(self, method: str, behaviour: _Behaviour) -> _Behaviour:
        async def answer(request: object, context: Context) -> None:
            # Written here, not yielded: a cancel then always lands in this frame,
            # and the servicer's own `finally` has run before the call is over.
            with bound(method=method, **names_of(request)):
                async with self._translated(context), self._ended_by_a_stop(context):
                    if not inspect.isasyncgenfunction(behaviour):
                        await behaviour(request, context)
                        return
                    async with aclosing(behaviour(request, context)) as responses:
                        async for response in responses:
                            await context.write(self._with_revision(response))

        return answer

    def _client_stream(self, method: str, behaviour: _Behaviour) -> _Behaviour:
        async def answer(requests: AsyncIterator[Any], context: Context) -> object:
            async def go() -> None:
                await context.send_initial_metadata(((GO_KEY, "1"),))

            async with self._translated(context), self._ended_by_a_stop(context):
                first = await anext(aiter(requests), None)
                header = require_header(first)
                with bound(method=method, **names_of(header)):
                    whole = _from(first, go, requests)
                    carry_out = self._carrying_out(
                        behaviour, whole, context, logger.info
                    )
                    return await self._replies.once_streamed(
                        header.request_id, _fingerprint(method, header), carry_out
                    )

        return answer

    @asynccontextmanager
    async def _ended_by_a_stop(self, context: Context) -> AsyncIterator[None]:
        task = asyncio.current_task()
        assert task is not None
        self._streams.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if self._stopping:
                words = "the service was told to stop"
                await context.abort(grpc.StatusCode.UNAVAILABLE, words)
            raise
        finally:
            self._streams.discard(task)

    async def _reply(
        self, method: str, behaviour: _Behaviour, request: Message, context: Context
    ) -> object:
        mutating = "request_id" in request.DESCRIPTOR.fields_by_name
        log = logger.info if mutating else logger.debug
        carry_out = self._carrying_out(behaviour, request, context, log)
        if not mutating:
            return await carry_out()
        request_id = request.request_id  # type: ignore[attr-defined]  # looked up above
        return await self._replies.once(
            request_id, _fingerprint(method, request), carry_out
        )

    def _carrying_out(
        self,
        behaviour: _Behaviour,
        request: object,
        context: Context,
        log: Callable[..., None],
    ) -> Callable[[], Awaitable[Any]]:
        async def carry_out() -> Any:
            started = time.monotonic()
            response = self._with_revision(await behaviour(request, context))
            milliseconds = round((time.monotonic() - started) * 1000, 3)
            log("answered", milliseconds=milliseconds)
            return response

        return carry_out

    def _with_revision(self, response: V) -> V:
        """Fill in the revision, unless the servicer knew a better one."""
        if not response.revision:
            response.revision = self._events.revision
        return response

    @asynccontextmanager
    async def _translated(self, context: Context) -> AsyncIterator[None]:
        """Say who we are; turn what is raised inside into the status of the call."""
        context.set_trailing_metadata(self._who)
        try:
            self._require_incarnation(context)
            yield
        except KernelError as error:
            logger.info("refused", reason=error.reason.value, error=str(error))
            await self._abort(context, status.encode(error))
        except TransportError as error:
            logger.warning("unreachable", peer=error.service, error=str(error))
            await self._abort(context, status.encode(error))
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001 - our bug: the process ends over it
            self._on_bug(error)
            words = f"a bug of this service: {type(error).__name__}; see its log"
            await context.abort(grpc.StatusCode.INTERNAL, words)

    async def _abort(self, context: Context, refusal: grpc.Status) -> None:
        """End a call with a status, and who says so."""
        metadata = (*self._who, *(refusal.trailing_metadata or ()))
        await context.abort(refusal.code, refusal.details or "", metadata)

    @property
    def _who(self) -> tuple[tuple[str, str], ...]:
        who = ((INCARNATION_KEY, self._incarnation),)
        return (*who, (JOURNAL_KEY, self._journal_id)) if self._journal_id else who

    def _require_incarnation(self, context: Context) -> None:
        metadata = context.invocation_metadata() or ()
        known = (self._incarnation, self._journal_id)
        for key, expected in metadata:
            if key == EXPECT_INCARNATION_KEY and expected not in known:
                raise PeerRestarted(
                    Reason.PEER_RESTARTED,
                    "the service was restarted since the request was first sent; "
                    "whether it was carried out is unknown, so begin again",
                    incarnation=self._incarnation,
                )


def require_header(first: Any) -> Any:
    """Return the header that a client's stream begins with; BadRequest otherwise."""
    if first is None or not first.HasField("header"):
        raise BadRequest(
            Reason.ARGUMENT_INVALID,
            "the stream does not begin with a header: send that first",
        )
    return first.header


async def _from(
    first: object, go: Callable[[], Awaitable[None]], rest: AsyncIterator[Any]
) -> AsyncIterator[Any]:
    """Yield all requests of a stream; `go` comes before the second is waited for."""
    yield first
    await go()
    async for request in rest:
        yield request


_naming: dict[type[object], tuple[str, ...]] = {}


def names_of(request: object) -> dict[str, str]:
    """Return request_id, inode and vm of a request, as far as it has them."""
    names: dict[str, str] = {}
    kind = type(request)
    fields = _naming.get(kind)
    if fields is None:
        fields = _naming[kind] = _naming_fields(kind)
    for field in fields:
        value = getattr(request, field)
        if field == "request_id":
            names["request_id"] = value.id
            continue
        if field == "ranges":
            value = value[0].name if value else ""
        parts = value.split("/")
        for word, key in (("guestMemfds", "inode"), ("vms", "vm")):
            if word in parts[:-1]:
                names[key] = parts[parts.index(word) + 1]
    return names


def _naming_fields(kind: type[object]) -> tuple[str, ...]:
    """Return which fields of a request name something; a later one wins."""
    if not issubclass(kind, Message):
        # A stream of requests.
        return ()
    wanted = ("request_id", "name", "vm", "guest_memfd", "ranges")
    return tuple(name for name in wanted if name in kind.DESCRIPTOR.fields_by_name)


def _fingerprint(method: str, request: Message) -> bytes:
    body = request.SerializeToString(deterministic=True)
    return hashlib.blake2b(method.encode() + b"\0" + body, digest_size=16).digest()
