"""The broker: who may take what, what is closed, and who is told."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from gmem.runtime import broker as broker_module
from gmem.runtime import broker_client, fdpass
from gmem.runtime.broker import GIVEN_PER_SESSION_MAX, Broker, Session, Window
from gmem.runtime.broker_client import BrokerClient
from gmem.uapi.errors import KernelError, Reason, TransportError


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    served = Broker(tmp_path / "broker.sock")
    await served.start()
    yield served
    await served.stop()


async def off_loop(work: Callable[..., Any], *args: Any) -> Any:
    return await asyncio.to_thread(work, *args)


async def connect(broker: Broker, name: str = "loader") -> BrokerClient:
    client: BrokerClient = await off_loop(BrokerClient, broker.path, name, "1")
    return client


def memfd(text: bytes = b"") -> int:
    fd = os.memfd_create("given")
    os.write(fd, text)
    return fd


async def said_hello(broker: Broker) -> socket.socket:
    """A connection that does not come back when it is ended."""
    connection: socket.socket = await off_loop(fdpass.connect, broker.path)
    fdpass.send(connection, {"op": "hello", "client": "raw", "incarnation": "1"})
    assert (await off_loop(fdpass.receive, connection)).fields["ok"]
    return connection


def count_fds() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def refused(work: Callable[..., Any], *args: Any) -> Reason:
    with pytest.raises(KernelError) as caught:
        await off_loop(work, *args)
    return caught.value.reason


async def test_a_token_is_good_for_one_descriptor_once(broker: Broker) -> None:
    with await connect(broker) as client:
        token = broker.mint(memfd(b"bytes"))
        fd = await off_loop(client.take, token)
        assert os.pread(fd, 5, 0) == b"bytes"
        os.close(fd)

        assert await refused(client.take, token) is Reason.TOKEN_UNKNOWN
        assert await refused(client.take, "00" * 32) is Reason.TOKEN_UNKNOWN
        assert client.alive()


async def test_a_token_may_open_its_descriptor_when_it_is_taken(broker: Broker) -> None:
    async def opened() -> list[int]:
        return [memfd(b"late"), memfd(b"more")]

    with await connect(broker) as client:
        fd = await off_loop(client.take, broker.mint(opened))
        assert os.pread(fd, 4, 0) == b"late"
        os.close(fd)
        for fd, content in zip(
            await off_loop(client.take_all, broker.mint(opened)),
            (b"late", b"more"),
            strict=True,
        ):
            assert os.pread(fd, 4, 0) == content
            os.close(fd)


@pytest.mark.parametrize("bound", [{"pid": 1}, {"uid": 12345}], ids=str)
async def test_a_token_of_another_process_is_denied_and_not_used_up(
    broker: Broker, bound: dict[str, int]
) -> None:
    with await connect(broker) as client:
        token = broker.mint(memfd(), **bound)
        assert await refused(client.take, token) is Reason.TOKEN_DENIED
        assert await refused(client.take, token) is Reason.TOKEN_DENIED
        own = broker.mint(memfd(), pid=os.getpid(), uid=os.getuid())
        os.close(await off_loop(client.take, own))


async def test_a_process_of_another_pid_namespace_proves_no_pid(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    uid = os.getuid()
    nobody = fdpass.Peer(0, uid, uid)
    monkeypatch.setattr(fdpass, "peer_of", lambda _: nobody)
    with await connect(broker) as client:
        for pid in (0, os.getpid()):
            token = broker.mint(memfd(), pid=pid)
            assert await refused(client.take, token) is Reason.TOKEN_DENIED
        os.close(await off_loop(client.take, broker.mint(memfd(), uid=uid)))


async def test_an_expired_token_is_unknown_and_its_descriptor_closed(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker_module, "TOKEN_SECONDS", 0.05)
    with await connect(broker) as client:
        before = count_fds()
        token = broker.mint(memfd())
        await until(lambda: count_fds() == before)
        assert await refused(client.take, token) is Reason.TOKEN_UNKNOWN


async def test_a_given_descriptor_lives_as_long_as_its_giver(broker: Broker) -> None:
    gone: list[Session] = []
    broker.on_gone(gone.append)
    client = await connect(broker, "vmm-1")
    before = count_fds()
    fd = memfd(b"ram")
    name = await off_loop(client.give, fd, "ram")
    os.close(fd)

    given = broker.descriptor(name)
    assert os.pread(given.fd, 3, 0) == b"ram"
    assert (given.pid, given.client, given.label) == (os.getpid(), "vmm-1", "ram")

    client.close()
    await until(lambda: bool(gone) and count_fds() == before - 2)
    assert [session.client for session in gone] == ["vmm-1"]
    with pytest.raises(KernelError) as caught:
        broker.descriptor(name)
    assert caught.value.reason is Reason.DESCRIPTOR_UNKNOWN


CLIENT = """
import sys, time
from pathlib import Path
from gmem.runtime.broker_client import BrokerClient
client = BrokerClient(Path(sys.argv[1]), "loader", "7")
print(client.give(1, "its output"), flush=True)
time.sleep(60)
"""


async def test_a_killed_client_is_gone_once_with_what_it_gave(broker: Broker) -> None:
    gone: list[tuple[int, str]] = []
    broker.on_gone(lambda session: gone.append((session.pid, session.client)))
    output = memfd()
    command = (sys.executable, "-c", CLIENT, str(broker.path))
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    client = await asyncio.create_subprocess_exec(*command, stdout=output, env=env)
    await until(lambda: os.pread(output, 99, 0).endswith(b"\n"))
    name = os.pread(output, 99, 0).decode().strip()
    assert broker.descriptor(name).pid == client.pid
    client.kill()
    await until(lambda: bool(gone))
    assert gone == [(client.pid, "loader")]
    await client.wait()
    assert name not in broker._given
    os.close(output)


async def test_a_flood_of_descriptors_is_refused_and_kept_nowhere(
    broker: Broker,
) -> None:
    with await connect(broker) as client:
        fd = memfd()
        names = [
            await off_loop(client.give, fd, "x") for _ in range(GIVEN_PER_SESSION_MAX)
        ]
        before = count_fds()
        for _ in range(50):
            assert await refused(client.give, fd, "x") is Reason.FDS_EXHAUSTED
        assert count_fds() == before

        await off_loop(client.drop, names[0])
        assert await refused(client.drop, names[0]) is Reason.DESCRIPTOR_UNKNOWN
        assert count_fds() == before - 1
        os.close(fd)


@pytest.mark.parametrize(
    ("fields", "nr_fds"),
    [
        ({"op": "hello", "client": "a", "incarnation": "1"}, 1),
        ({"op": "give", "label": "three"}, 3),
        ({"op": "give", "label": "none"}, 0),
        ({"op": "take", "token": "x"}, 1),
    ],
    ids=["hello with one", "give with three", "give without", "take with one"],
)
async def test_unexpected_descriptors_are_closed_with_the_connection(
    broker: Broker, fields: dict[str, Any], nr_fds: int
) -> None:
    connection = await said_hello(broker)
    before = count_fds()
    fd = memfd()
    fdpass.send(connection, fields, [fd] * nr_fds)
    os.close(fd)
    await until(lambda: not broker.sessions)
    assert await off_loop(fdpass.receive, connection) is None
    await until(lambda: count_fds() == before - 1)
    connection.close()


async def test_a_pipe_is_no_memory(broker: Broker) -> None:
    client = await connect(broker)
    ends = os.pipe()
    with pytest.raises(TransportError):
        await off_loop(client.give, ends[0], "pipe")
    for end in ends:
        os.close(end)
    client.close()


@pytest.mark.parametrize(
    "packet", [b"{", b"[1]", b"x" * (1 << 17), b'{"op":' * 20000], ids=len
)
async def test_who_sends_no_message_loses_the_connection(
    broker: Broker, packet: bytes
) -> None:
    connection = await said_hello(broker)
    connection.send(packet)
    await until(lambda: not broker.sessions)
    connection.close()


async def test_hello_comes_first_and_operations_are_known(broker: Broker) -> None:
    connection = await off_loop(fdpass.connect, broker.path)
    for fields in (
        {"op": "take", "token": "x"},
        {"op": "hello", "client": "", "incarnation": "1"},
        {"op": "hello", "client": 7, "incarnation": "1"},
        {"op": "steal"},
    ):
        fdpass.send(connection, fields)
        answer = await off_loop(fdpass.receive, connection)
        assert answer.fields["reason"] == "ARGUMENT_INVALID", answer
    connection.close()


async def test_reported_windows_replace_the_last_report(broker: Broker) -> None:
    window = {"file": "inodes/1", "offset": 0, "length": 4096, "address": 1 << 46}
    with await connect(broker) as client:
        await off_loop(client.report_windows, [window])
        assert broker.sessions[0].windows == (Window("inodes/1", 0, 4096, 1 << 46),)
        bad = window | {"length": -1}
        assert await refused(client.report_windows, [bad]) is Reason.ARGUMENT_INVALID
        await off_loop(client.report_windows, [])
        assert len(broker.sessions[0].windows) == 0


async def test_too_many_clients_are_refused(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker_module, "SESSIONS_MAX", 1)
    with await connect(broker):
        assert await refused(BrokerClient, broker.path, "b", "1") is (
            Reason.CLIENTS_EXHAUSTED
        )


async def test_a_client_sees_the_end_of_the_service(tmp_path: Path) -> None:
    broker = Broker(tmp_path / "b.sock")
    await broker.start()
    client = await connect(broker)
    assert client.alive()
    await broker.stop()
    assert not client.alive()
    assert not broker.path.exists()
    with pytest.raises(TransportError):
        await off_loop(BrokerClient, broker.path, "late", "1")
    client.close()


async def test_a_client_comes_back_to_a_service_that_was_started_again(
    tmp_path: Path,
) -> None:
    broker = Broker(tmp_path / "b.sock")
    await broker.start()
    window = {"file": "inodes/1", "offset": 0, "length": 4096, "address": 1 << 46}
    with await connect(broker, "device") as client:
        await off_loop(client.report_windows, [window])
        await broker.stop()
        assert not client.alive()
        again = Broker(tmp_path / "b.sock")
        await again.start()
        assert await off_loop(client.wait_alive)
        await until(lambda: bool(again.sessions and again.sessions[0].windows))
        assert again.sessions[0].client == "device"
        token = again.mint(memfd(b"bytes"))
        os.close(await off_loop(client.take, token))
    await again.stop()


async def test_a_client_gives_up_a_service_that_stays_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker_client, "BACK_SECONDS_MAX", 0.2)
    broker = Broker(tmp_path / "b.sock")
    await broker.start()
    with await connect(broker) as client:
        await broker.stop()
        assert not await off_loop(client.wait_alive)
        with pytest.raises(TransportError):
            await off_loop(client.take, "token")


async def test_a_stale_socket_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "b.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as crashed:
        crashed.bind(str(path))
    broker = Broker(path)
    await broker.start()
    assert path.stat().st_mode & 0o777 == 0o660
    with pytest.raises(OSError, match="another process listens"):
        await Broker(path).start()
    await broker.stop()


async def test_stop_closes_a_connection_that_it_has_not_begun_to_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = Broker(tmp_path / "broker.sock")
    await served.start()
    # Let it listen, then connect and stop at every step of its taking the connection.
    for sessions_max in (broker_module.SESSIONS_MAX, 0):
        monkeypatch.setattr(broker_module, "SESSIONS_MAX", sessions_max)
        for steps in range(6):
            connection = fdpass.connect(served.path)
            for _ in range(steps):
                await asyncio.sleep(0)
            await served.stop()
            assert has_ended(connection), (sessions_max, steps)
            assert not served.sessions
            connection.close()
            await served.start()
    await served.stop()


def has_ended(connection: socket.socket) -> bool:
    """Whether the other end was closed: what it sent is read first."""
    connection.settimeout(10)
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True
