"""What the wire does to calls: refusals, repeats, cancels, limits, health."""

from __future__ import annotations

import asyncio
import itertools
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from gmem.client import HostAllocatorClient, Patience
from gmem.client.connection import Connection
from gmem.runtime.server import CannotListenError
from gmem.uapi.errors import (
    BadRequest,
    KernelError,
    PeerRestarted,
    Reason,
    TransportError,
    make_error,
)
from gmem.uapi.lineage import Lineage
from tests.support.wire import ALLOCATOR, Allocator, serve_allocator

HASTY = Patience(timeout=0.5, attempts=3, first_pause=0.01)
RESERVE = f"/{ALLOCATOR.full_name}/Reserve"


async def reserve(client: HostAllocatorClient, **more: Any) -> int:
    return await client.reserve(page_size=1 << 30, num_pages=1, **more)


@pytest.fixture
async def allocator(tmp_path: Path) -> AsyncIterator[tuple[Allocator, Any]]:
    servicer = Allocator()
    async with (
        serve_allocator(servicer, tmp_path) as runtime,
        HostAllocatorClient(runtime.target, patience=HASTY) as client,
    ):
        yield servicer, client


async def test_every_reason_of_every_lineage_comes_back_as_it_was_raised(
    allocator: tuple[Allocator, HostAllocatorClient],
) -> None:
    servicer, client = allocator
    numbers: dict[str, int | str] = {
        "error_offset": 0x3000,
        "holders": 'vfio "0" é',
        "limit": 1 << 64,
    }
    for reason in Reason:
        for lineage in (None, *Lineage):
            raised = make_error(reason, "page 3 ist müde\n", lineage=lineage, **numbers)

            async def refuse(_request: Any, error: KernelError = raised) -> int:
                raise error

            servicer.reserve = refuse
            with pytest.raises(KernelError) as caught:
                await reserve(client)
            heard = caught.value
            assert type(heard) is type(raised)
            assert str(heard) == str(raised)
            assert heard.errno == raised.errno
            assert (heard.reason, heard.lineage) == (reason, lineage)
            assert heard.numbers == numbers


async def test_a_very_long_refusal_is_cut_not_lost(
    allocator: tuple[Allocator, HostAllocatorClient],
) -> None:
    servicer, client = allocator

    async def refuse(_request: Any) -> int:
        raise make_error(Reason.PAGE_IN_USE, "x" * 50_000, holders="y" * 50_000)

    servicer.reserve = refuse
    with pytest.raises(KernelError) as caught:
        await reserve(client)
    assert caught.value.reason is Reason.PAGE_IN_USE
    assert caught.value.sentence.endswith("...")


async def test_who_could_not_reach_another_service_names_it_and_is_not_asked_again(
    allocator: tuple[Allocator, HostAllocatorClient],
) -> None:
    servicer, client = allocator

    async def unreachable(_request: Any) -> int:
        raise TransportError("keeper is gone", service="keeper", target="unix:/k")

    servicer.reserve = unreachable
    with pytest.raises(TransportError, match="keeper is gone") as caught:
        await reserve(client)
    assert (caught.value.service, caught.value.target) == ("keeper", "unix:/k")
    assert servicer.reserved == 1


async def test_nobody_there_names_the_service_and_the_next_command(
    tmp_path: Path,
) -> None:
    target = f"unix:{tmp_path}/host_allocator.sock"
    async with HostAllocatorClient(target, patience=HASTY) as client:
        with pytest.raises(TransportError) as caught:
            await client.get_statistics()
    assert caught.value.service == "host_allocator"
    assert caught.value.target == target
    assert "host_allocator at unix:" in str(caught.value)
    assert "gmemctl status" in str(caught.value)


async def test_a_service_that_comes_later_is_reached_by_a_repeat(
    tmp_path: Path,
) -> None:
    target = f"unix:{tmp_path}/host_allocator.sock"
    patience = Patience(attempts=50, first_pause=0.02, longest_pause=0.1)
    async with HostAllocatorClient(target, patience=patience) as client:
        asking = asyncio.create_task(reserve(client))
        await asyncio.sleep(0.1)
        async with serve_allocator(Allocator(), tmp_path):
            assert await asyncio.wait_for(asking, 10) == 1


async def test_a_service_that_is_away_for_long_is_asked_as_often_as_at_first(
    tmp_path: Path,
) -> None:
    path, asked, enough = tmp_path / "host_allocator.sock", [], asyncio.Event()

    async def die(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(time.monotonic())
        if len(asked) == 12:
            enough.set()
        writer.close()

    patience = Patience(attempts=1000, longest_pause=0.05)
    async with (
        await asyncio.start_unix_server(die, path),
        HostAllocatorClient(f"unix:{path}", patience=patience) as client,
    ):
        asking = asyncio.create_task(client.get_statistics())
        await asyncio.wait_for(enough.wait(), 60)
        asking.cancel()
        await asyncio.wait([asking])
    pauses = [after - before for before, after in itertools.pairwise(asked)]
    # Each may be longer for want of a processor: the shortest of some tell.
    assert min(pauses[-3:]) < 4 * min(pauses[:3])


async def test_a_repeat_after_the_deadline_joins_the_first_request(
    allocator: tuple[Allocator, HostAllocatorClient],
) -> None:
    servicer, client = allocator

    async def slow(_request: Any) -> int:
        await asyncio.sleep(0.8)  # longer than one attempt
        return 7

    servicer.reserve = slow
    assert await reserve(client) == 7
    assert servicer.reserved == 1


async def test_a_cancelled_call_is_carried_out_and_its_reply_waits(
    allocator: tuple[Allocator, HostAllocatorClient],
) -> None:
    servicer, client = allocator
    entered, finish, finished = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def slow(_request: Any) -> int:
        entered.set()
        await finish.wait()
        finished.set()
        return 7

    servicer.reserve = slow
    request_id = client.new_request_id()
    asking = asyncio.create_task(reserve(client, request_id=request_id))
    await entered.wait()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await asyncio.sleep(0.1)
    finish.set()
    await asyncio.wait_for(finished.wait(), 5)
    assert await reserve(client, request_id=request_id) == 7
    assert servicer.reserved == 1


async def test_a_request_id_is_required_and_never_means_two_things(
    allocator: tuple[Allocator, HostAllocatorClient],
) -> None:
    servicer, client = allocator
    request_id = client.new_request_id()
    first = await reserve(client, request_id=request_id)
    assert await reserve(client, request_id=request_id) == first
    with pytest.raises(BadRequest) as caught:
        await reserve(client, request_id=request_id, node=1)
    assert caught.value.reason is Reason.REQUEST_ID_REUSED

    request_id.id = ""
    with pytest.raises(BadRequest) as caught:
        await reserve(client, request_id=request_id)
    assert caught.value.reason is Reason.REQUEST_ID_MISSING
    assert servicer.reserved == 1


async def test_a_mutation_is_not_repeated_into_another_life_of_the_service(
    tmp_path: Path,
) -> None:
    target = f"unix:{tmp_path}/host_allocator.sock"
    patience = Patience(timeout=0.3, attempts=50, first_pause=0.02, longest_pause=0.05)
    second = Allocator()
    async with HostAllocatorClient(target, patience=patience) as client:
        first = Allocator()
        async with serve_allocator(first, tmp_path) as runtime:
            await reserve(client)
            assert client.peer_incarnation == runtime.incarnation

            async def never(_request: Any) -> int:
                await asyncio.sleep(2)
                return 0

            first.reserve = never
            asking = asyncio.create_task(reserve(client))
            await asyncio.sleep(0.1)
        async with serve_allocator(second, tmp_path) as runtime:
            with pytest.raises(PeerRestarted):
                await asyncio.wait_for(asking, 10)
            assert second.reserved == 0
            # Who begins again is served by the new life.
            assert await reserve(client) == 1
            assert client.peer_incarnation == runtime.incarnation


async def test_with_a_journal_a_reply_survives_the_service(tmp_path: Path) -> None:
    target = f"unix:{tmp_path}/host_allocator.sock"
    patience = Patience(timeout=0.3, attempts=50, first_pause=0.02, longest_pause=0.05)
    second = Allocator()
    async with HostAllocatorClient(target, patience=patience) as client:
        first = Allocator()
        request_id, cut_off = client.new_request_id(), client.new_request_id()
        async with serve_allocator(first, tmp_path, journal=True) as runtime:
            runtime.events.record("pool.resized", "x")
            assert await reserve(client, request_id=request_id) == 1
            revision = runtime.events.revision

            async def never(_request: Any) -> int:
                await asyncio.sleep(2)
                return 0

            first.reserve = never
            asking = asyncio.create_task(reserve(client, request_id=cut_off))
            await asyncio.sleep(0.1)
            incarnation = client.peer_incarnation
        async with serve_allocator(second, tmp_path, journal=True) as runtime:
            # Its outcome was lost with the service: it is carried out now.
            assert await asyncio.wait_for(asking, 10) == 1
            assert client.peer_incarnation == runtime.incarnation != incarnation
            # This one's was not.
            assert await reserve(client, request_id=request_id) == 1
            assert second.reserved == 1
            assert runtime.events.revision > revision


async def test_a_service_with_another_journal_refuses_a_repeat(tmp_path: Path) -> None:
    target = f"unix:{tmp_path}/host_allocator.sock"
    patience = Patience(timeout=0.3, attempts=50, first_pause=0.02, longest_pause=0.05)
    second = Allocator()
    async with HostAllocatorClient(target, patience=patience) as client:
        first = Allocator()
        async with serve_allocator(first, tmp_path, journal=True):
            await reserve(client)

            async def never(_request: Any) -> int:
                await asyncio.sleep(2)
                return 0

            first.reserve = never
            asking = asyncio.create_task(reserve(client))
            await asyncio.sleep(0.1)
        for file in tmp_path.glob("host_allocator.db*"):
            file.unlink()
        async with serve_allocator(second, tmp_path, journal=True):
            with pytest.raises(PeerRestarted):
                await asyncio.wait_for(asking, 10)
    assert second.reserved == 0


async def test_an_oversized_message_is_refused_by_its_size(
    allocator: tuple[Allocator, HostAllocatorClient],
) -> None:
    servicer, client = allocator
    with pytest.raises(TransportError, match="RESOURCE_EXHAUSTED"):
        await reserve(client, owner="x" * (5 << 20))
    assert servicer.reserved == 0
    assert await reserve(client) == 1


async def test_malformed_bytes_are_answered_and_the_service_lives(
    allocator: tuple[Allocator, HostAllocatorClient],
) -> None:
    _servicer, client = allocator
    raw = client.connection.channel.unary_unary(
        RESERVE, request_serializer=bytes, response_deserializer=bytes
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await raw(b"\xff\xff\xff")
    assert caught.value.code() in {grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL}
    assert await reserve(client) == 1


async def test_more_calls_than_allowed_are_refused_not_queued(tmp_path: Path) -> None:
    servicer, finish = Allocator(), asyncio.Event()
    entered = asyncio.Event()

    async def wait() -> None:
        entered.set()
        await finish.wait()

    servicer.statistics = wait
    async with (
        serve_allocator(servicer, tmp_path, concurrent_rpcs_max=1) as runtime,
        HostAllocatorClient(runtime.target, patience=HASTY) as client,
    ):
        first = asyncio.create_task(client.get_statistics())
        await entered.wait()
        with pytest.raises(TransportError, match="RESOURCE_EXHAUSTED"):
            await client.get_statistics()
        finish.set()
        await first


async def test_a_bug_is_internal_and_ends_the_process(
    allocator: tuple[Allocator, HostAllocatorClient], tmp_path: Path
) -> None:
    servicer, _client = allocator
    other = tmp_path / "other"
    other.mkdir()

    async def buggy(_request: Any) -> int:
        raise AssertionError("a count below zero")

    servicer.reserve = buggy
    async with (
        serve_allocator(servicer, other) as runtime,
        HostAllocatorClient(runtime.target, patience=HASTY) as client,
    ):
        with pytest.raises(TransportError, match="INTERNAL"):
            await reserve(client)
        assert runtime.stopping.is_set()
        assert isinstance(runtime.bug, AssertionError)


async def test_responses_carry_the_revision(tmp_path: Path) -> None:
    async with (
        serve_allocator(Allocator(), tmp_path) as runtime,
        HostAllocatorClient(runtime.target) as client,
    ):
        assert (await client.get_statistics()).revision == 0
        runtime.events.record("pool.resized", "hosts/host0/pools/2097152")
        assert (await client.get_statistics()).revision == 1


async def test_health_and_reflection_answer(tmp_path: Path) -> None:
    async with (
        serve_allocator(Allocator(), tmp_path) as runtime,
        grpc.aio.insecure_channel(runtime.target) as channel,
    ):
        # Their stubs know synchronous channels only.
        health = cast("Any", health_pb2_grpc.HealthStub)(channel)
        for name in ("", ALLOCATOR.full_name):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING

        listing = reflection_pb2.ServerReflectionRequest(list_services="")
        method = cast("Any", reflection_pb2_grpc.ServerReflectionStub)(
            channel
        ).ServerReflectionInfo
        async for response in method(iter([listing])):
            names = [
                service.name for service in response.list_services_response.service
            ]
            assert ALLOCATOR.full_name in names
            assert "grpc.health.v1.Health" in names
            assert "grpc.channelz.v1.Channelz" in names


async def test_channelz_knows_the_calls_of_the_server(tmp_path: Path) -> None:
    async with (
        serve_allocator(Allocator(), tmp_path) as runtime,
        HostAllocatorClient(runtime.target) as client,
        grpc.aio.insecure_channel(runtime.target) as channel,
    ):
        await reserve(client)
        stub = cast("Any", channelz_pb2_grpc.ChannelzStub)(channel)
        found = await stub.GetServers(channelz_pb2.GetServersRequest())
        names = [s.name for server in found.server for s in server.listen_socket]
        (ours,) = [
            server
            for server in found.server
            if any(runtime.target in socket.name for socket in server.listen_socket)
        ]
        assert names
        assert ours.data.calls_succeeded >= 1


async def test_a_socket_that_is_served_is_not_taken_and_a_stale_one_is(
    tmp_path: Path,
) -> None:
    async with serve_allocator(Allocator(), tmp_path) as runtime:
        with pytest.raises(CannotListenError, match="another process"):
            async with serve_allocator(Allocator(), tmp_path):
                pass
        path = runtime.target.removeprefix("unix:")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(path)
    async with (
        serve_allocator(Allocator(), tmp_path) as runtime,
        HostAllocatorClient(runtime.target) as client,
    ):
        assert await reserve(client) == 1


async def test_a_tcp_port_that_is_taken_is_refused(tmp_path: Path) -> None:
    async with serve_allocator(Allocator(), tmp_path, listen="127.0.0.1:0") as runtime:
        async with HostAllocatorClient(runtime.target) as client:
            assert await reserve(client) == 1
        with pytest.raises(CannotListenError, match="cannot be listened at"):
            async with serve_allocator(Allocator(), tmp_path, listen=runtime.target):
                pass


def test_only_remote_connections_send_pings(tmp_path: Path) -> None:
    async def options(target: str) -> bool:
        connection = Connection("vmm", target, client="test")
        await connection.close()
        from gmem.client.connection import _options

        return any("keepalive" in name for name, _value in _options(target))

    assert not asyncio.run(options(f"unix:{tmp_path}/vmm.sock"))
    assert asyncio.run(options("127.0.0.1:1"))
