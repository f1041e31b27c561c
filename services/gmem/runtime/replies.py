"""Every mutating request is carried out once; its reply waits under its request_id.

A repeat with the same body gets the stored reply, or joins the first while it still
runs; the same id with another body is refused. The operation runs in a task of the
service: a caller that goes away, or whose deadline passes, stops nothing, and finds
the reply when it asks again. Refusals are remembered like replies. What is not: that
another service did not answer (nothing is known, asking again may help), and our bugs.

With a journal a reply is given when it is on the disk, in one transaction with what the
request changed, and outlives the process: a repeat after a restart gets it too.
"""

from __future__ import annotations

import asyncio
import base64
import copy
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar, cast
from urllib.parse import quote

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.message import Message

from gmem.api.types.v1.types_pb2 import RequestId
from gmem.runtime.journal import Journal
from gmem.uapi.errors import BadRequest, Exhausted, KernelError, Reason, make_error
from gmem.uapi.lineage import Lineage

REPLIES_PER_CLIENT_MAX = 1024
CLIENTS_MAX = 256
NAME_CHARS_MAX = 128
_PREFIX = "reply/"

R = TypeVar("R", bound=Message)


@dataclass(slots=True, eq=False)
class _Entry:
    """One request: what it said, and its task or its outcome.

    `stored` is an outcome as the journal has it, until somebody asks for it.
    """

    fingerprint: bytes
    task: asyncio.Task[Any] | None = None
    reply: Message | None = None
    error: KernelError | None = None
    stored: dict[str, Any] | None = None


@dataclass(slots=True, eq=False)
class _Client:
    """The requests of one incarnation of one client, oldest first."""

    entries: OrderedDict[str, _Entry] = field(default_factory=OrderedDict)

    @property
    def idle(self) -> bool:
        """Whether nothing of it still runs."""
        return all(entry.task is None for entry in self.entries.values())


class Replies:
    """What was answered to whom: bounded, the oldest finished ones are forgotten."""

    def __init__(self, journal: Journal | None = None) -> None:
        """Start with what `journal` has; without one, with no client known."""
        self._clients: OrderedDict[tuple[str, str], _Client] = OrderedDict()
        self._journal = journal
        # Rows of the journal that are to go with the next reply.
        self._forgotten: dict[str, None] = {}
        if journal is not None:
            for row in journal.below(_PREFIX).values():
                self._load(row)

    async def once(
        self,
        request_id: RequestId,
        fingerprint: bytes,
        carry_out: Callable[[], Awaitable[R]],
    ) -> R:
        """Return the reply to `request_id`; `carry_out` runs for the first asker only.

        `fingerprint` stands for the method and the whole body. REQUEST_ID_MISSING,
        REQUEST_ID_REUSED, LIMIT_REACHED; whatever `carry_out` raises.
        """
        require_request_id(request_id)
        entries = self._client(request_id).entries
        entry = entries.get(request_id.id)
        if entry is None:
            entry = self._begin(request_id, entries, fingerprint)
            forget = partial(entries.pop, request_id.id, None)
            if self._journal is not None:
                carry_out = partial(self._journalled, request_id, entry, carry_out)
            entry.task = asyncio.create_task(_remember(entry, carry_out, forget))
        else:
            _require_same(request_id, entry, fingerprint)
        return cast("R", await _outcome(entry))

    async def once_streamed(
        self,
        request_id: RequestId,
        fingerprint: bytes,
        carry_out: Callable[[], Awaitable[R]],
    ) -> R:
        """As `once`, for what reads its caller's stream: it ends with the caller.

        Nothing is kept of one that was broken off, nor of one that ended too early,
        which may be the same: a repeat begins anew, once what is left of the first has
        ended. `fingerprint` stands for the header.
        """
        require_request_id(request_id)
        entries = self._client(request_id).entries
        while (entry := entries.get(request_id.id)) is not None and entry.task:
            _require_same(request_id, entry, fingerprint)
            # Its stream is lost, or a second one would not be there.
            entry.task.cancel()
            await asyncio.wait([entry.task])
        if entry is not None:
            _require_same(request_id, entry, fingerprint)
            return cast("R", await _outcome(entry))
        entry = self._begin(request_id, entries, fingerprint)
        if self._journal is not None:
            carry_out = partial(self._journalled_after, request_id, entry, carry_out)
        forget = partial(entries.pop, request_id.id, None)
        entry.task = asyncio.create_task(_remember(entry, carry_out, forget))
        await entry.task
        return cast("R", await _outcome(entry))

    def _begin(
        self,
        request_id: RequestId,
        entries: OrderedDict[str, _Entry],
        fingerprint: bytes,
    ) -> _Entry:
        for oldest in _make_room(request_id, entries):
            names = (request_id.client, request_id.incarnation, oldest)
            self._forgotten[_key(*names)] = None
        entry = entries[request_id.id] = _Entry(fingerprint)
        return entry

    def _client(self, request_id: RequestId) -> _Client:
        key = (request_id.client, request_id.incarnation)
        client = self._clients.setdefault(key, _Client())
        self._clients.move_to_end(key)
        if len(self._clients) > CLIENTS_MAX:
            others = (k for k in self._clients if k != key and self._clients[k].idle)
            idle = next(others, None)
            if idle is None:
                del self._clients[key]
                raise Exhausted(
                    Reason.CLIENTS_EXHAUSTED,
                    f"{CLIENTS_MAX} clients have requests in progress; ask again later",
                    limit=CLIENTS_MAX,
                )
            del self._clients[idle]
            self._forgotten[_key(*idle, "")] = None
        return client

    def _load(self, row: dict[str, Any]) -> None:
        client = self._clients.setdefault(
            (row["client"], row["incarnation"]), _Client()
        )
        fingerprint = bytes.fromhex(row["fingerprint"])
        client.entries[row["id"]] = _Entry(fingerprint, stored=row)

    async def _journalled(
        self,
        request_id: RequestId,
        entry: _Entry,
        carry_out: Callable[[], Awaitable[R]],
    ) -> R:
        """Carry out; return, or raise the refusal, when the outcome is on the disk."""
        assert self._journal is not None
        with self._journal.request() as request:
            try:
                reply = await carry_out()
            except KernelError as error:
                await request.answer(self._rows(request_id, entry, _refusal(error)))
                raise
            await request.answer(self._rows(request_id, entry, _reply(reply)))
            return reply

    async def _journalled_after(
        self,
        request_id: RequestId,
        entry: _Entry,
        carry_out: Callable[[], Awaitable[R]],
    ) -> R:
        """As `_journalled`, but no change is held: it may wait for its caller."""
        assert self._journal is not None
        try:
            reply = await carry_out()
        except KernelError as error:
            if _is_kept(error):
                with self._journal.request() as request:
                    await request.answer(self._rows(request_id, entry, _refusal(error)))
            raise
        with self._journal.request() as request:
            await request.answer(self._rows(request_id, entry, _reply(reply)))
        return reply

    def _rows(
        self, request_id: RequestId, entry: _Entry, outcome: dict[str, Any]
    ) -> dict[str, Any]:
        """Return what the journal is to change for one outcome."""
        names = (request_id.client, request_id.incarnation, request_id.id)
        rows: dict[str, Any] = dict(self._forgotten)
        self._forgotten.clear()
        rows[_key(*names)] = outcome | {
            "client": names[0],
            "incarnation": names[1],
            "id": names[2],
            "fingerprint": entry.fingerprint.hex(),
        }
        return rows


def require_request_id(request_id: RequestId) -> None:
    """Refuse a request without an id, or with one of absurd length."""
    names = (request_id.client, request_id.incarnation, request_id.id)
    if not all(names):
        raise BadRequest(
            Reason.REQUEST_ID_MISSING,
            "request_id needs client, incarnation and id; send all three",
        )
    longest = max(len(name) for name in names)
    if longest > NAME_CHARS_MAX:
        raise BadRequest(
            Reason.ARGUMENT_INVALID,
            f"request_id holds a name of {longest} characters; "
            f"use {NAME_CHARS_MAX} at most",
        )


def _require_same(request_id: RequestId, entry: _Entry, fingerprint: bytes) -> None:
    if entry.fingerprint != fingerprint:
        raise BadRequest(
            Reason.REQUEST_ID_REUSED,
            f"request_id {request_id.id!r} was used with another body; send a new one",
        )


def _make_room(
    request_id: RequestId, entries: OrderedDict[str, _Entry]
) -> tuple[str, ...]:
    """Forget the oldest reply where a client has too many; return its id."""
    if len(entries) < REPLIES_PER_CLIENT_MAX:
        return ()
    finished = next((key for key, entry in entries.items() if entry.task is None), None)
    if finished is None:
        raise Exhausted(
            Reason.LIMIT_REACHED,
            f"{len(entries)} requests of client {request_id.client!r} are in progress; "
            "wait for some",
            limit=REPLIES_PER_CLIENT_MAX,
        )
    del entries[finished]
    return (finished,)


async def _remember(
    entry: _Entry,
    carry_out: Callable[[], Awaitable[Message]],
    forget: Callable[[], object],
) -> None:
    try:
        entry.reply = await carry_out()
    except KernelError as error:
        if not _is_kept(error):
            forget()
        # A copy: the traceback would keep every frame of the operation alive.
        entry.error = copy.copy(error)
    except BaseException:
        forget()
        raise
    finally:
        entry.task = None


async def _outcome(entry: _Entry) -> Message:
    if entry.task is not None:
        await asyncio.shield(entry.task)
    if entry.stored is not None:
        _restore(entry, entry.stored)
    if entry.error is not None:
        raise copy.copy(entry.error)
    assert entry.reply is not None
    return entry.reply


def _is_kept(error: KernelError) -> bool:
    """Tell whether a repeat is refused likewise."""
    # grpc tells the end of a stream before it tells that its caller is gone.
    return error.reason is not Reason.STREAM_LENGTH


def _key(client: str, incarnation: str, number: str) -> str:
    """Return the key of a reply; with an empty `number` that of all of a client's."""
    return _PREFIX + "/".join(
        quote(name, safe="") for name in (client, incarnation, number)
    )


def _reply(reply: Message) -> dict[str, Any]:
    body = base64.b64encode(reply.SerializeToString()).decode()
    return {"message": reply.DESCRIPTOR.full_name, "body": body}


def _refusal(error: KernelError) -> dict[str, Any]:
    return {
        "reason": error.reason.value,
        "sentence": error.sentence,
        "lineage": error.lineage.value if error.lineage is not None else None,
        "numbers": error.numbers,
    }


def _restore(entry: _Entry, row: dict[str, Any]) -> None:
    """Make the outcome of what the journal has."""
    entry.stored = None
    if "message" in row:
        kind = descriptor_pool.Default().FindMessageTypeByName(row["message"])
        reply = message_factory.GetMessageClass(kind)()
        reply.ParseFromString(base64.b64decode(row["body"]))
        entry.reply = reply
        return
    lineage = row["lineage"]
    entry.error = make_error(
        Reason(row["reason"]),
        row["sentence"],
        lineage=Lineage(lineage) if lineage is not None else None,
        **row["numbers"],
    )
