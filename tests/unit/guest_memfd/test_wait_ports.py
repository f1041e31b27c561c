"""The clock behind waits and leases, with real time and a loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from gmem.effects import Effect
from gmem.guest_memfd.core import effects as fx
from gmem.guest_memfd.core.effects import Waited
from gmem.guest_memfd.core.references import References
from gmem.guest_memfd.wait_ports import LEASE_TICK_SECONDS, WaitPorts
from gmem.runtime.performer import Performer

INODE = 7
SOON = 5.0


class Ports:
    """The ports, asked as the runner asks them."""

    def __init__(self) -> None:
        self.parked: set[str] = set()
        self.expired: list[tuple[int, int]] = []
        self.references = References()
        self._performer = Performer()
        self.ports = WaitPorts(
            lambda: frozenset(self.parked), lambda *lease: self.expired.append(lease)
        )
        self.ports.register(self._performer)

    def local(self, effect: Effect[Any]) -> Any:
        handler = self._performer.local(effect)
        assert handler is not None
        return handler(effect)

    def wait(self, milliseconds: int, *, mapped: bool = False) -> Awaitable[Any]:
        effect = fx.WaitForRelease(
            inode=INODE,
            references=self.references,
            ended=0,
            mapped=mapped,
            instant=self.local(fx.StartWait(milliseconds)),
        )
        return asyncio.wait_for(self._performer.remote(effect)(effect), SOON)

    def arm(self, hold: int, ttl_ms: int, renewals: int = 0) -> None:
        self.local(fx.ArmLease(hold, "me", ttl_ms, renewals))


@pytest.fixture
async def ports() -> Any:
    made = Ports()
    yield made
    made.ports.stop()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(SOON):
        while not condition():
            await asyncio.sleep(0.01)


async def test_whoever_waits_is_told_from_another_thread(ports: Ports) -> None:
    waiting = [asyncio.ensure_future(ports.wait(60_000)) for _ in range(2)]
    await asyncio.sleep(0.05)
    assert not any(wait.done() for wait in waiting)
    await asyncio.to_thread(ports.local, fx.TellReleased(INODE + 1))
    await asyncio.sleep(0.05)
    assert not any(wait.done() for wait in waiting)
    await asyncio.to_thread(ports.local, fx.TellReleased(INODE))
    assert await asyncio.gather(*waiting) == [Waited.AGAIN] * 2
    assert not ports.ports._waiters


async def test_a_hold_that_ended_before_the_wait_began_is_seen(ports: Ports) -> None:
    ports.references.ended = 1
    assert await ports.wait(60_000) is Waited.AGAIN


async def test_the_instant_comes(ports: Ports) -> None:
    began = time.monotonic()
    assert await ports.wait(100) is Waited.DEADLINE
    assert time.monotonic() - began >= 0.09
    assert await ports.wait(0) is Waited.DEADLINE


async def test_mappings_are_looked_at_again_until_the_instant(ports: Ports) -> None:
    began = time.monotonic()
    assert await ports.wait(60_000, mapped=True) is Waited.AGAIN
    assert time.monotonic() - began < SOON / 2
    assert await ports.wait(0, mapped=True) is Waited.DEADLINE


async def test_a_stop_wakes_all_and_lets_nobody_wait(ports: Ports) -> None:
    waiting = asyncio.ensure_future(ports.wait(60_000))
    await asyncio.sleep(0.05)
    ports.ports.stop()
    assert await waiting is Waited.STOPPING
    assert await ports.wait(60_000) is Waited.STOPPING


async def test_a_lease_runs_out_once(ports: Ports) -> None:
    began = time.monotonic()
    ports.arm(1, 200)
    await until(lambda: ports.expired)
    assert time.monotonic() - began >= 0.2
    await asyncio.sleep(3 * LEASE_TICK_SECONDS)
    assert ports.expired == [(1, 0)]


async def test_a_renewed_lease_begins_anew_and_an_ended_one_is_forgotten(
    ports: Ports,
) -> None:
    ports.arm(1, 300)
    ports.arm(2, 300)
    ports.local(fx.DisarmLease(2))
    for renewals in range(1, 5):
        await asyncio.sleep(0.1)
        ports.arm(1, 60_000 if renewals == 4 else 300, renewals)
    await asyncio.sleep(0.5)
    assert ports.expired == []


async def test_a_lease_does_not_run_while_its_client_is_parked(ports: Ports) -> None:
    ports.parked.add("me")
    ports.arm(1, 200)
    await asyncio.sleep(0.6)
    assert ports.expired == []
    ports.parked.clear()
    await until(lambda: ports.expired)


async def test_time_in_which_this_process_could_not_run_does_not_count(
    ports: Ports,
) -> None:
    ports.arm(1, 1000)
    await asyncio.sleep(0.05)
    time.sleep(1.5)
    await asyncio.sleep(0.15)
    assert ports.expired == []
