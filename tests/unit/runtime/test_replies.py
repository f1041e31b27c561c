"""Mutating requests are carried out once, and remembered within bounds."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from gmem.api.host_allocator.v1.host_allocator_pb2 import ReserveResponse
from gmem.api.types.v1.types_pb2 import RequestId
from gmem.runtime import replies as module
from gmem.runtime.replies import NAME_CHARS_MAX, REPLIES_PER_CLIENT_MAX, Replies
from gmem.uapi.errors import BadRequest, Exhausted, Reason, TransportError

CarryOut = Callable[[], Awaitable[ReserveResponse]]


def request_id(number: int = 1, client: str = "demo-vmm") -> RequestId:
    return RequestId(client=client, incarnation="a", id=str(number))


class Counter:
    """Answers 1, 2, 3, ...; waits first, and fails, where it is told to."""

    def __init__(self) -> None:
        self.calls = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None

    async def __call__(self) -> ReserveResponse:
        self.calls += 1
        number = self.calls
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return ReserveResponse(handle=number)


async def test_a_repeat_gets_the_stored_reply() -> None:
    replies, carry_out = Replies(), Counter()
    for _time in range(3):
        reply = await replies.once(request_id(), b"body", carry_out)
        assert reply.handle == 1
    assert (await replies.once(request_id(2), b"body", carry_out)).handle == 2
    other = request_id(client="other")
    assert (await replies.once(other, b"body", carry_out)).handle == 3
    assert carry_out.calls == 3


async def test_a_refusal_is_remembered_like_a_reply() -> None:
    replies, carry_out = Replies(), Counter()
    carry_out.error = Exhausted(Reason.POOL_EMPTY, "no page is left", available=0)
    seen = []
    for _time in range(2):
        with pytest.raises(Exhausted) as caught:
            await replies.once(request_id(), b"body", carry_out)
        seen.append(caught.value)
    assert carry_out.calls == 1
    assert str(seen[0]) == str(seen[1]) == str(carry_out.error)
    assert seen[0] is not seen[1]  # a shared one would grow a traceback per repeat


async def test_an_id_with_another_body_is_refused_and_the_reply_stays() -> None:
    replies, carry_out = Replies(), Counter()
    await replies.once(request_id(), b"body", carry_out)
    with pytest.raises(BadRequest) as caught:
        await replies.once(request_id(), b"other", carry_out)
    assert caught.value.reason is Reason.REQUEST_ID_REUSED
    assert (await replies.once(request_id(), b"body", carry_out)).handle == 1
    assert carry_out.calls == 1


async def test_a_concurrent_duplicate_joins_the_first() -> None:
    replies, carry_out = Replies(), Counter()
    carry_out.gate.clear()
    asking = [
        asyncio.create_task(replies.once(request_id(), b"body", carry_out))
        for _time in range(5)
    ]
    await asyncio.sleep(0.01)
    carry_out.gate.set()
    assert [reply.handle for reply in await asyncio.gather(*asking)] == [1] * 5


async def test_a_cancelled_caller_stops_nothing_and_finds_its_reply() -> None:
    replies, carry_out = Replies(), Counter()
    carry_out.gate.clear()
    asking = asyncio.create_task(replies.once(request_id(), b"body", carry_out))
    await asyncio.sleep(0.01)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    carry_out.gate.set()
    assert (await replies.once(request_id(), b"body", carry_out)).handle == 1
    assert carry_out.calls == 1


@pytest.mark.parametrize(
    "error",
    [TransportError("gone", service="host_allocator"), AssertionError("a bug")],
    ids=["no answer from another service", "our bug"],
)
async def test_what_nobody_knows_is_not_remembered(error: Exception) -> None:
    replies, carry_out = Replies(), Counter()
    carry_out.error = error
    with pytest.raises(type(error)):
        await replies.once(request_id(), b"body", carry_out)
    carry_out.error = None
    assert (await replies.once(request_id(), b"body", carry_out)).handle == 2


@pytest.mark.parametrize("missing", ["client", "incarnation", "id"])
async def test_each_part_of_a_request_id_is_needed(missing: str) -> None:
    carry_out = Counter()
    incomplete = request_id()
    incomplete.ClearField(missing)  # type: ignore[arg-type]  # a parameter
    with pytest.raises(BadRequest) as caught:
        await Replies().once(incomplete, b"body", carry_out)
    assert caught.value.reason is Reason.REQUEST_ID_MISSING

    too_long = request_id()
    setattr(too_long, missing, "x" * (NAME_CHARS_MAX + 1))
    with pytest.raises(BadRequest) as caught:
        await Replies().once(too_long, b"body", carry_out)
    assert caught.value.reason is Reason.ARGUMENT_INVALID
    assert carry_out.calls == 0


async def test_the_oldest_finished_reply_of_a_client_is_forgotten_first() -> None:
    replies, carry_out = Replies(), Counter()
    for number in range(REPLIES_PER_CLIENT_MAX + 1):
        await replies.once(request_id(number), b"body", carry_out)
    await replies.once(request_id(1), b"body", carry_out)
    assert carry_out.calls == REPLIES_PER_CLIENT_MAX + 1
    await replies.once(request_id(0), b"body", carry_out)
    assert carry_out.calls == REPLIES_PER_CLIENT_MAX + 2


async def test_requests_in_progress_are_bounded_and_never_forgotten() -> None:
    replies, carry_out = Replies(), Counter()
    carry_out.gate.clear()
    asking = [
        asyncio.create_task(replies.once(request_id(number), b"body", carry_out))
        for number in range(REPLIES_PER_CLIENT_MAX)
    ]
    await asyncio.sleep(0.01)
    with pytest.raises(Exhausted) as caught:
        await replies.once(request_id(-1), b"body", carry_out)
    assert caught.value.reason is Reason.LIMIT_REACHED
    carry_out.gate.set()
    handles = {reply.handle for reply in await asyncio.gather(*asking)}
    assert handles == set(range(1, REPLIES_PER_CLIENT_MAX + 1))


async def test_clients_are_bounded_the_idle_ones_go_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "CLIENTS_MAX", 2)
    replies, carry_out, busy = Replies(), Counter(), Counter()
    busy.gate.clear()
    asking = asyncio.create_task(replies.once(request_id(client="b"), b"", busy))
    await asyncio.sleep(0.01)
    for client in ("c", "d", "e"):
        await replies.once(request_id(client=client), b"", carry_out)
    second = asyncio.create_task(replies.once(request_id(client="f"), b"", busy))
    await asyncio.sleep(0.01)
    with pytest.raises(Exhausted) as caught:
        await replies.once(request_id(client="g"), b"", carry_out)
    assert caught.value.reason is Reason.CLIENTS_EXHAUSTED
    busy.gate.set()
    assert [(await each).handle for each in (asking, second)] == [1, 2]


# What reads a stream of its caller.


async def test_a_streamed_request_that_is_over_is_repeated_from_memory() -> None:
    replies, carry_out = Replies(), Counter()
    for _time in range(2):
        reply = await replies.once_streamed(request_id(), b"header", carry_out)
        assert reply.handle == 1
    carry_out.error = Exhausted(Reason.SUBPOOL_EMPTY, "no page is left", stored=5)
    for _time in range(2):
        with pytest.raises(Exhausted) as caught:
            await replies.once_streamed(request_id(2), b"header", carry_out)
        assert caught.value.numbers == {"stored": 5}
    assert carry_out.calls == 2
    with pytest.raises(BadRequest) as reused:
        await replies.once_streamed(request_id(), b"another", carry_out)
    assert reused.value.reason is Reason.REQUEST_ID_REUSED


@pytest.mark.parametrize(
    "error",
    [
        BadRequest(Reason.STREAM_LENGTH, "the stream ended", stored=1),
        TransportError("nobody answered"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_a_stream_that_broke_off_is_carried_out_again(error: Exception) -> None:
    replies, carry_out = Replies(), Counter()
    carry_out.error = error
    with pytest.raises(type(error)):
        await replies.once_streamed(request_id(), b"header", carry_out)
    carry_out.error = None
    reply = await replies.once_streamed(request_id(), b"header", carry_out)
    assert reply.handle == 2


async def test_a_cancelled_stream_ends_and_leaves_no_reply() -> None:
    replies, carry_out = Replies(), Counter()
    carry_out.gate.clear()
    call = asyncio.create_task(
        replies.once_streamed(request_id(), b"header", carry_out)
    )
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    carry_out.gate.set()
    reply = await replies.once_streamed(request_id(), b"header", carry_out)
    assert reply.handle == 2


async def test_a_repeat_begins_when_what_is_left_of_the_first_has_ended() -> None:
    replies = Replies()
    order: list[str] = []
    started = asyncio.Event()

    async def stands_still() -> ReserveResponse:
        try:
            started.set()
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            order.append("the first has ended")
        raise AssertionError

    async def writes() -> ReserveResponse:
        order.append("the second begins")
        return ReserveResponse(handle=7)

    first = asyncio.create_task(
        replies.once_streamed(request_id(), b"header", stands_still)
    )
    await started.wait()
    with pytest.raises(BadRequest):
        await replies.once_streamed(request_id(), b"another", writes)
    reply = await replies.once_streamed(request_id(), b"header", writes)
    assert reply.handle == 7
    assert order == ["the first has ended", "the second begins"]
    with pytest.raises(asyncio.CancelledError):
        await first
