"""What a VMM is told, and by which way: gRPC, or its broker's socket."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from gmem.api.types.v1.types_pb2 import Capabilities
from gmem.api.vmm.v1 import vmm_pb2 as pb
from gmem.guest_memfd import vmm_link
from gmem.guest_memfd.vmm_link import Edge, VmmLink
from gmem.runtime import fdpass
from gmem.runtime.broker import Broker
from gmem.uapi.errors import NoSuchObject, Reason
from gmem.uapi.pages import PgRange
from tests.support.hosts import VM, FakeVmm
from tests.support.wire import serve_vmm

GFNS = PgRange(7, 10)
BY_GRPC = ("begin", 7, 3)
BY_SOCKET = {"op": "invalidate", "edge": "begin", "vm": VM, "gfn": 7, "npages": 3}
SECONDS_MAX = 10.0


class Vmm(FakeVmm):
    """Says that it has a broker at `path`."""

    path: Path
    target: str

    async def GetCapabilities(
        self, request: pb.GetCapabilitiesRequest, context: Any
    ) -> pb.GetCapabilitiesResponse:
        capabilities = Capabilities(broker_path=str(self.path))
        return pb.GetCapabilitiesResponse(capabilities=capabilities)


@pytest.fixture
async def vmm(tmp_path: Path) -> AsyncIterator[Vmm]:
    vmm = Vmm()
    vmm.path = tmp_path / "vmm.broker"
    async with serve_vmm(vmm, tmp_path) as runtime:
        vmm.target = runtime.target
        yield vmm


@pytest.fixture
def heard() -> list[dict[str, Any]]:
    """What came by the broker's socket."""
    return []


@pytest.fixture
async def broker(vmm: Vmm, heard: list[dict[str, Any]]) -> AsyncIterator[Broker]:
    broker = await broker_at(vmm.path, heard.append)
    yield broker
    await broker.stop()


@asynccontextmanager
async def link_to(vmm: Vmm, seconds: float = SECONDS_MAX) -> AsyncIterator[VmmLink]:
    """Make a link; nothing may be told late, or not at all, without a word."""
    link = VmmLink(vmm.target, "guest_memfd", seconds=seconds)
    try:
        yield link
    finally:
        await link.close()


async def broker_at(path: Path, hear: Callable[[dict[str, Any]], None]) -> Broker:
    broker = Broker(path)
    broker.register("invalidate", hear)
    await broker.start()
    return broker


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS_MAX):
        while not condition():
            await asyncio.sleep(0.01)


async def found(link: VmmLink) -> None:
    """Tell something, and wait for the socket to be found meanwhile."""
    await link.tell(Edge.BEGIN, VM, GFNS)
    await until(lambda: link.by_socket)


async def test_the_first_goes_by_grpc_and_the_next_by_the_socket(
    vmm: Vmm, broker: Broker, heard: list[dict[str, Any]]
) -> None:
    async with link_to(vmm) as link:
        await found(link)
        assert (vmm.told, heard) == ([BY_GRPC], [])
        await link.tell(Edge.BEGIN, VM, GFNS)
        await link.tell(Edge.END, VM, GFNS)
    assert vmm.told == [BY_GRPC]
    assert heard == [BY_SOCKET, BY_SOCKET | {"edge": "end"}]
    await until(lambda: not broker.sessions)


async def test_many_at_once_are_each_answered(
    vmm: Vmm, broker: Broker, heard: list[dict[str, Any]]
) -> None:
    pages = [PgRange(page, page + 1) for page in range(200)]
    async with link_to(vmm) as link:
        await found(link)
        await asyncio.gather(*(link.tell(Edge.BEGIN, VM, page) for page in pages))
    assert sorted(fields["gfn"] for fields in heard) == list(range(200))


@pytest.mark.parametrize("why", ["says nothing of it", "another directory", "gone"])
async def test_without_a_socket_of_its_own_a_vmm_is_told_by_grpc(
    vmm: Vmm,
    tmp_path: Path,
    heard: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    why: str,
) -> None:
    monkeypatch.setattr(vmm_link, "LOOK_AGAIN_SECONDS", 0.0)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    vmm.path = {"another directory": elsewhere / "b", "gone": vmm.path}.get(why, Path())
    broker = await broker_at(elsewhere / "b", heard.append)
    with capture_logs() as logs:
        async with link_to(vmm) as link:
            for _ in range(3):
                await link.tell(Edge.BEGIN, VM, GFNS)
                await asyncio.sleep(0.05)
            assert not link.by_socket
    said = [line for line in logs if line["event"] == "vmm_is_told_by_grpc"]
    assert [line["target"] for line in said] == [vmm.target]
    await broker.stop()
    assert (vmm.told, heard) == ([BY_GRPC] * 3, [])


async def test_a_lost_socket_is_looked_for_again_and_nothing_goes_untold(
    vmm: Vmm,
    broker: Broker,
    heard: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vmm_link, "LOOK_AGAIN_SECONDS", 0.0)
    async with link_to(vmm) as link:
        await found(link)
        await broker.stop()
        with capture_logs() as logs:
            await link.tell(Edge.BEGIN, VM, GFNS)
        assert vmm.told == [BY_GRPC] * 2
        assert not [line for line in logs if line["log_level"] == "warning"]

        again = await broker_at(vmm.path, heard.append)
        await found(link)
        await link.tell(Edge.BEGIN, VM, GFNS)
        assert heard == [BY_SOCKET]
    await again.stop()


async def test_a_vmm_without_the_vm_has_acknowledged(vmm: Vmm) -> None:
    def refuse(_fields: dict[str, Any]) -> None:
        raise NoSuchObject(Reason.VM_UNKNOWN, f"{VM} is not here: create it first")

    broker = await broker_at(vmm.path, refuse)
    async with link_to(vmm) as link:
        await found(link)
        with capture_logs() as logs:
            await link.tell(Edge.END, VM, GFNS)
        assert link.by_socket
    await broker.stop()
    (line,) = logs
    assert (line["event"], line["what"]) == ("vmm_counts_as_acknowledged", "end")
    assert "is not here" in line["error"]
    assert vmm.told == [BY_GRPC]


@pytest.fixture
def late(vmm: Vmm) -> Iterator[threading.Event]:
    """Serve a broker that refuses the first message, when the event says so."""
    may_answer, listener = threading.Event(), fdpass.listen(vmm.path)
    refusal = {"ok": False, "reason": "VM_UNKNOWN", "text": "late", "numbers": {}}

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            granted: dict[str, Any] = {"ok": True}
            for answer in (granted, refusal, granted, granted):
                if fdpass.receive(connection) is None:
                    return
                if answer is refusal:
                    may_answer.wait(SECONDS_MAX)
                fdpass.send(connection, answer)

    thread = threading.Thread(target=serve)
    thread.start()
    yield may_answer
    may_answer.set()
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(SECONDS_MAX)
    assert not thread.is_alive()


async def test_a_silent_vmm_is_waited_for_no_longer_and_its_late_answer_is_nobodys(
    vmm: Vmm, late: threading.Event
) -> None:
    async with link_to(vmm, seconds=0.5) as link:
        await found(link)
        with capture_logs() as logs:
            await link.tell(Edge.BEGIN, VM, GFNS)
        assert "did not acknowledge within" in logs[0]["error"]

        with capture_logs() as logs:
            telling = asyncio.create_task(link.tell(Edge.END, VM, GFNS))
            await asyncio.sleep(0)
            late.set()
            await telling
            await link.tell(Edge.BEGIN, VM, GFNS)
        assert logs == []
    assert vmm.told == [BY_GRPC]
