"""A successor of guest_memfd that is loaded beforehand: what it has, when it ends."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from gmem.runtime.backend import Backend
from gmem.testing.audit import Audit
from gmem.testing.conformance.emulator import Emulator
from tests.support.backends import BOTH
from tests.support.hosts import Host, new_inode, running_host, wait_until
from tests.support.ordinary_user import NOBODY, reachable_python, status_of

pytestmark = pytest.mark.fuse
BACKENDS = BOTH

__all__ = ["reachable_python"]

EMPTY_HANDED = {"0", "1", "2"}


def said(host: Host, event: str) -> list[dict[str, object]]:
    return [line for line in host.log("keeper") if line["event"] == event]


def spare_of(host: Host) -> int:
    """Wait for a spare, loaded or not; its pid."""
    wait_until(lambda: host.spare_pid() is not None, "a spare")
    pid = host.spare_pid()
    assert pid is not None
    return pid


async def killed(host: Host) -> int:
    """Kill the service; the pid of the one that has taken over."""
    pid = host.pid("guest_memfd")
    host.kill("guest_memfd")
    await host.served_again(pid)
    return host.pid("guest_memfd")


async def test_a_spare_serves_after_a_kill_and_another_is_loaded(
    own_host: Host,
) -> None:
    async with own_host.clients() as (_, gmem):
        inode = await new_inode(own_host, gmem)
        client = await inode.mapped_by()
        await client.asked("write", 0, 5)
        first = own_host.pid("guest_memfd")
        spare = await asyncio.to_thread(own_host.loaded_spare)

        assert own_host.pid("guest_memfd") == first != spare
        assert {fd.name for fd in Path(f"/proc/{spare}/fd").iterdir()} == EMPTY_HANDED

        assert await killed(own_host) == spare
        assert await client.asked("read", 0) == "05"
        await client.asked("write", 0, 6)
        assert (await inode.get()).name == inode.name
        assert [line["spare"] for line in said(own_host, "restarted")] == [True]

        own_host.rearm()
        second = await asyncio.to_thread(own_host.loaded_spare)
        assert second not in {first, spare}
        assert await killed(own_host) == second
        assert await client.asked("read", 0) == "06"


async def test_a_spare_that_is_loading_serves_when_it_is_loaded(own_host: Host) -> None:
    async with own_host.clients() as (_, gmem):
        inode = await new_inode(own_host, gmem)
        await killed(own_host)
        spare = spare_of(own_host)
        os.kill(spare, signal.SIGSTOP)
        pid = own_host.pid("guest_memfd")
        own_host.kill("guest_memfd")
        wait_until(lambda: own_host.pid("guest_memfd") == spare, "the next start")
        os.kill(spare, signal.SIGCONT)
        await own_host.served_again(pid)
        assert own_host.pid("guest_memfd") == spare
        assert (await inode.get()).name == inode.name


async def test_a_spare_that_is_killed_is_replaced_and_never_missed(
    own_host: Host,
) -> None:
    async with own_host.clients() as (_, gmem):
        inode = await new_inode(own_host, gmem)
        first = await asyncio.to_thread(own_host.loaded_spare)
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: own_host.spare_pid() not in {None, first}, "another")
        second = await asyncio.to_thread(own_host.loaded_spare)
        assert said(own_host, "service_lost") == []

        # Both at once: nobody has looked at the spare when the service is missed.
        os.kill(second, signal.SIGKILL)
        assert await killed(own_host) not in {first, second}
        assert (await inode.get()).name == inode.name


async def test_a_spare_ends_with_a_keeper_that_is_killed(own_host: Host) -> None:
    await asyncio.to_thread(own_host.loaded_spare)
    own_host.kill("keeper")
    wait_until(lambda: own_host.spare_pid() is None, "the end of the spare")
    assert [one.name for one in own_host.state.dead] == ["keeper"]

    # The next keeper has one of its own.
    await asyncio.to_thread(own_host.repair)
    own_host.rearm()
    spare = await asyncio.to_thread(own_host.loaded_spare)
    assert await killed(own_host) == spare


@pytest.fixture
def nobodys_host(reachable_python: None, backend: Backend) -> Iterator[Host]:
    with running_host(user=NOBODY, backend=backend) as host:
        yield host


async def test_a_spare_is_of_the_user_of_the_services(nobodys_host: Host) -> None:
    spare = await asyncio.to_thread(nobodys_host.loaded_spare)
    status = status_of(spare)
    assert status["Uid"].split() == status["Gid"].split() == ["65534"] * 4
    assert status["Groups"].split() == []
    for which in ("CapPrm", "CapEff", "CapInh", "CapAmb"):
        assert int(status[which], 16) == 0
    assert await killed(nobodys_host) == spare


@pytest.fixture
def bare_host(backend: Backend) -> Iterator[Host]:
    with running_host(spare=False, backend=backend) as host:
        yield host


async def test_without_a_spare_the_service_is_started_when_it_has_died(
    bare_host: Host,
) -> None:
    for _ in range(2):
        await killed(bare_host)
        # A spare would be spawned 0.2 s after a takeover.
        await asyncio.sleep(1.0)
    assert [line["spare"] for line in said(bare_host, "restarted")] == [False] * 2
    assert said(bare_host, "spare_spawned") == []


def test_an_audit_does_not_take_a_spare_for_something_that_was_left(
    backend: Backend,
) -> None:
    with running_host(nr_vmms=1, backend=backend) as host, Emulator(host) as kernel:
        audit = Audit(kernel)
        spare = host.loaded_spare()
        assert audit.left() == []
        # And one that was there at first is another later.
        audit = Audit(kernel)
        os.kill(spare, signal.SIGKILL)
        wait_until(lambda: host.spare_pid() not in {None, spare}, "another")
        assert audit.left() == []
