"""The clock of the core: instants, waits for holds to end, and leases that run out.

Waiting holds no thread and no lock: a future per waiter, woken by TellReleased. Leases
are counted down by one tick for all of them; a tick does not count for a client that
has a READ parked in this service (rule V6), which cannot renew anything, and never
counts for more than LEASE_TICK_SECONDS_MAX: while this process could not run, nobody
could be heard.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from gmem.guest_memfd.core import effects as fx
from gmem.guest_memfd.core.effects import Waited
from gmem.runtime.performer import Performer

MAPPINGS_POLL_SECONDS: Final = 0.05
"""How often a wait looks again when a process has pages mapped: nobody tells of it."""
DRAIN_SECONDS: Final = 0.001
"""What an lru_add_drain_all() takes: it runs once on each CPU."""
LEASE_TICK_SECONDS: Final = 0.1
LEASE_TICK_SECONDS_MAX: Final = 2 * LEASE_TICK_SECONDS


@dataclass(slots=True)
class _Lease:
    """A lease: whose it is, which renewal it counts, and seconds left."""

    client: str
    renewals: int
    left: float


class WaitPorts:
    """Answers the effects of the guest_memfd core that have to do with time.

    `parked_clients` names those that wait for this service in a READ; `expired` is
    called with hold and renewals when a lease has run out. Made on the loop.
    """

    def __init__(
        self,
        parked_clients: Callable[[], frozenset[str]],
        expired: Callable[[int, int], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._parked_clients = parked_clients
        self._expired = expired
        self._waiters: defaultdict[int, set[asyncio.Future[Waited]]]
        self._waiters = defaultdict(set)
        self._stopping = False
        self._leases: dict[int, _Lease] = {}
        self._ticked = 0.0
        self._tick_handle: asyncio.TimerHandle | None = None

    def register(self, performer: Performer) -> None:
        """Enter every effect of this file in the table of who answers what."""
        performer.register_local(fx.StartWait, self._start_wait)
        performer.register_local(fx.TellReleased, self._tell_released)
        performer.register_local(fx.ArmLease, self._arm)
        performer.register_local(fx.DisarmLease, self._disarm)
        performer.register_remote(fx.WaitForRelease, self._wait)
        performer.register_remote(fx.DrainLru, self._drain)

    async def _drain(self, effect: fx.DrainLru) -> None:
        """Let what is on its way to end a hold come in."""
        del effect
        await asyncio.sleep(DRAIN_SECONDS)

    def stop(self) -> None:
        """Wake every waiter: the service stops. Leases run no more."""
        self._stopping = True
        for number in list(self._waiters):
            self._wake(number, Waited.STOPPING)
        if self._tick_handle is not None:
            self._tick_handle.cancel()

    # Waits.

    def _start_wait(self, effect: fx.StartWait) -> int:
        return _milliseconds() + effect.milliseconds

    async def _wait(self, effect: fx.WaitForRelease) -> Waited:
        waiter: asyncio.Future[Waited] = self._loop.create_future()
        waiters = self._waiters[effect.inode]
        # First known, then looked at: what ends in between is told or seen.
        waiters.add(waiter)
        try:
            return await self._woken(waiter, effect)
        finally:
            waiters.discard(waiter)
            if not self._waiters[effect.inode]:
                del self._waiters[effect.inode]

    async def _woken(
        self, waiter: asyncio.Future[Waited], effect: fx.WaitForRelease
    ) -> Waited:
        if self._stopping:
            return Waited.STOPPING
        if effect.references.ended != effect.ended:
            return Waited.AGAIN
        seconds = (effect.instant - _milliseconds()) / 1000
        if seconds <= 0:
            return Waited.DEADLINE
        if effect.mapped:
            seconds = min(seconds, MAPPINGS_POLL_SECONDS)
        try:
            return await asyncio.wait_for(waiter, seconds)
        except TimeoutError:
            # A last look for who has something mapped; then the instant has come.
            return Waited.AGAIN if effect.mapped else Waited.DEADLINE

    def _tell_released(self, effect: fx.TellReleased) -> None:
        self._loop.call_soon_threadsafe(self._wake, effect.inode, Waited.AGAIN)

    def _wake(self, number: int, waited: Waited) -> None:
        for waiter in self._waiters.get(number, ()):
            if not waiter.done():
                waiter.set_result(waited)

    # Leases.

    def _arm(self, effect: fx.ArmLease) -> None:
        lease = _Lease(effect.client, effect.renewals, effect.ttl_ms / 1000)
        self._loop.call_soon_threadsafe(self._keep, effect.hold, lease)

    def _disarm(self, effect: fx.DisarmLease) -> None:
        self._loop.call_soon_threadsafe(self._leases.pop, effect.hold, None)

    def _keep(self, hold: int, lease: _Lease) -> None:
        if not self._leases:
            self._ticked = time.monotonic()
            self._tick_later()
        self._leases[hold] = lease

    def _tick_later(self) -> None:
        if not self._stopping:
            self._tick_handle = self._loop.call_later(LEASE_TICK_SECONDS, self._tick)

    def _tick(self) -> None:
        now = time.monotonic()
        passed = min(now - self._ticked, LEASE_TICK_SECONDS_MAX)
        self._ticked = now
        parked = self._parked_clients()
        for hold, lease in list(self._leases.items()):
            if lease.client not in parked:
                lease.left -= passed
            if lease.left <= 0:
                del self._leases[hold]
                self._expired(hold, lease.renewals)
        if self._leases:
            self._tick_later()


def _milliseconds() -> int:
    return int(time.monotonic() * 1000)
