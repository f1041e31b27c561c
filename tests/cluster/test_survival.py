"""Services that are killed while clients use the memory: nobody may notice.

    pytest -m cluster tests/cluster/test_survival.py --kills 200

The seed of the moments is printed; it changes with each run unless GMEM_SEED is set.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest

from gmem.client import GuestMemfdClient, HostAllocatorClient
from gmem.client.connection import Patience
from gmem.uapi.errors import Contended, TransportError
from gmem.uapi.pages import PAGE_SIZE, SIZE_2M
from tests.support.hosts import (
    SIGBUS,
    VM,
    Host,
    Inode,
    Program,
    Refused,
    counters,
    differences,
    new_inode,
    running_host,
    until,
    wait_until,
)

pytestmark = pytest.mark.fuse

PATIENT = Patience(timeout=60, attempts=500, total=60, longest_pause=0.1)
WRITTEN = 64
"""Pages that a writer counts up in, at the start of a huge page of its own."""
CONVERTED = range(2 * SIZE_2M, 3 * SIZE_2M, 16 * PAGE_SIZE)


@dataclass
class Load:
    """Two writers, a converter, and somebody who invalidates under the writers."""

    host: Host
    inode: Inode
    writers: list[Program]
    conversions: int = 0
    refused: int = 0
    longest: float = 0.0
    kills: list[bool] = field(default_factory=list)
    """Of each kill so far, whether it met a loaded spare."""
    over: int = 0
    """How many of them a successor has taken over from."""
    held: dict[bool, list[float]] = field(default_factory=lambda: {True: [], False: []})
    """How long conversions took that met kills, by whether all of those had one."""
    private: set[int] = field(default_factory=set)
    stopping: bool = False

    async def convert(self) -> None:
        """Convert pieces of the third huge page there and back."""
        for number in range(1 << 30):
            if self.stopping:
                return
            at = CONVERTED[number % len(CONVERTED)]
            private = at not in self.private
            began, before = time.monotonic(), self.over
            await self.inode.convert(at, 16 * PAGE_SIZE, private=private)
            took, met = time.monotonic() - began, self.kills[before:]
            self.longest = max(self.longest, took)
            if met:
                self.held[all(met)].append(took)
            (self.private.add if private else self.private.discard)(at)
            self.conversions += 1

    async def invalidate(self) -> None:
        """Ask for what is pinned: RFC_V2 unmaps it everywhere before it refuses."""
        while not self.stopping:
            try:
                await self.inode.convert(0, 2 * SIZE_2M, private=True)
            except Contended:
                self.refused += 1
            else:
                raise AssertionError("what is pinned became private")

    async def check(self) -> list[int]:
        """Stop; compare each byte counted with what is there; the longest stalls."""
        ended = [await self._stopped(writer) for writer in self.writers]
        for number, counted in enumerate(ended):
            assert counted["rounds"] > 0
            for reader in self.writers:
                seen = await reader.asked("counters", written_by(number))
                assert set(seen) == {counted["rounds"]}, (number, seen)
        shown = await self.inode.get()
        assert shown.private_pages == 16 * len(self.private)
        return [counted["longest_ms"] for counted in ended]

    @staticmethod
    async def _stopped(writer: Program) -> dict[str, int]:
        """Have a writer stop counting; what it has done."""
        writer.tell("pages")
        counted: dict[str, int] = await asyncio.to_thread(writer.heard)
        await asyncio.to_thread(writer.heard)
        return counted


def spread(seconds: list[float]) -> str:
    if not seconds:
        return "none"
    median, p90, most = (
        sorted(seconds)[int(part * (len(seconds) - 1))] * 1e3 for part in (0.5, 0.9, 1)
    )
    return f"{median:.0f} ms (median), {p90:.0f} ms (p90), at most {most:.0f} ms"


def written_by(number: int) -> list[int]:
    return [number * SIZE_2M + page * PAGE_SIZE for page in range(WRITTEN)]


@asynccontextmanager
async def load_on(host: Host, gmem: GuestMemfdClient) -> AsyncIterator[Load]:
    """Load a new inode; an error of any client fails the test."""
    made = await gmem.create_guest_memfd(
        size=3 * SIZE_2M,
        page_size=SIZE_2M,
        lineage="RFC_V2",
        vm=VM,
        support_shared=True,
    )
    inode = Inode(host, gmem, made.name, 3 * SIZE_2M)
    writers = [await inode.mapped_by(f"writer{number}") for number in range(2)]
    for number, writer in enumerate(writers):
        writer.tell("count_up", written_by(number))
    await gmem.pin_pages(name=inode.name, offset=0, size=2 * SIZE_2M, holder="pin")
    load = Load(host, inode, writers)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(load.convert())
        tasks.create_task(load.invalidate())
        try:
            yield load
        finally:
            load.stopping = True


@asynccontextmanager
async def patient(
    host: Host,
) -> AsyncIterator[tuple[HostAllocatorClient, GuestMemfdClient]]:
    """Clients that wait for a service as long as it takes to start again."""
    who: dict[str, Any] = {"client": "test", "incarnation": "i1", "patience": PATIENT}
    async with (
        HostAllocatorClient(host.target("host_allocator"), **who) as allocator,
        GuestMemfdClient(host.target("guest_memfd"), **who) as gmem,
    ):
        yield allocator, gmem


def seeded(report_line: Callable[[str], None]) -> random.Random:
    seed = int(os.environ.get("GMEM_SEED") or random.randrange(1 << 32))
    report_line(f"survival: GMEM_SEED={seed}")
    return random.Random(seed)


@pytest.fixture
def lasting_host() -> Iterator[Host]:
    """A host whose service is started again however often it dies."""
    with running_host(under="/dev/shm", restarts_max=1 << 20) as host:
        yield host


@pytest.mark.timeout(3600)
async def test_a_service_that_is_killed_again_and_again_is_not_felt(
    lasting_host: Host,
    request: pytest.FixtureRequest,
    report_line: Callable[[str], None],
) -> None:
    kills = int(request.config.getoption("--kills"))
    moments = seeded(report_line)
    host = lasting_host
    async with patient(host) as (allocator, gmem):
        before = await counters(allocator)
        async with load_on(host, gmem) as load:
            away: dict[bool, list[float]] = {True: [], False: []}
            for number in range(kills):
                host.rearm()
                # Every other one comes as crashes do, seldom enough for a spare to be
                # loaded; those between come before, or while it is.
                if number % 2:
                    await asyncio.to_thread(host.loaded_spare)
                await asyncio.sleep(moments.uniform(0.05, 1.2))
                pid, spare = host.pid("guest_memfd"), host.spare_pid()
                load.kills.append(had := host.spare_is_loaded(spare))
                host.kill("guest_memfd")
                away[had].append(await host.served_again(pid))
                load.over = len(load.kills)
                assert not had or host.pid("guest_memfd") == spare
        stalls = await load.check()
        report_line(
            f"survival: {kills} kills of guest_memfd under 2 writers, "
            f"{load.conversions} conversions, {load.refused} refused ones that "
            f"invalidate: 0 bytes lost, 0 client errors; longest stall of a writer "
            f"{max(stalls)} ms, of a conversion {load.longest * 1e3:.0f} ms"
        )
        for had, words in ((True, "met a loaded spare"), (False, "met none")):
            report_line(
                f"survival: {len(away[had])} kills {words}: away for "
                f"{spread(away[had])}; conversions held for {spread(load.held[had])}"
            )
        assert away[True] or kills < 2
        assert load.conversions > kills
        await all_is_given_back(host, gmem, allocator, load.inode, before)


async def all_is_given_back(
    host: Host,
    gmem: GuestMemfdClient,
    allocator: HostAllocatorClient,
    inode: Inode,
    before: Any,
) -> None:
    """Close everything: no folio and no reservation is left anywhere."""
    await asyncio.to_thread(host.end_programs)
    for hold in (await inode.get()).holds:
        await gmem.unpin_pages(hold=hold.hold)
    await gmem.delete_guest_memfd(name=inode.name)

    async def nothing_left() -> bool:
        gone = not await gmem.list_guest_memfds()
        return gone and not differences(before, await counters(allocator))

    await until(nothing_left, "every counter's return")


@pytest.mark.timeout(900)
async def test_a_keeper_that_is_killed_again_and_again_loses_nothing(
    lasting_host: Host,
    request: pytest.FixtureRequest,
    report_line: Callable[[str], None],
) -> None:
    kills = max(5, int(request.config.getoption("--kills")) // 10)
    moments = seeded(report_line)
    host = lasting_host
    async with patient(host) as (_, gmem):
        async with load_on(host, gmem) as load:
            for _ in range(kills):
                host.rearm()
                await asyncio.sleep(moments.uniform(0.05, 0.5))
                host.kill("keeper")
                await asyncio.sleep(moments.uniform(0.0, 0.3))
                await asyncio.to_thread(repair, host)
            # And the last keeper can do what the first could.
            pid = host.pid("guest_memfd")
            host.kill("guest_memfd")
            await host.served_again(pid)
        stalls = await load.check()
    report_line(
        f"survival: {kills} kills of the keeper, then one of guest_memfd: 0 bytes "
        f"lost, 0 client errors; longest stall of a writer {max(stalls)} ms"
    )


def repair(host: Host) -> None:
    wait_until(lambda: "keeper" in [s.name for s in host.state.dead], "its end")
    host.repair()


async def test_both_at_once_fail_closed_and_it_is_said(own_host: Host) -> None:
    async with own_host.clients() as (_, gmem):
        inode = await new_inode(own_host, gmem, pages=2)
        client = await inode.mapped_by()
        await client.asked("raw_store", 0, 9)
        own_host.kill("keeper")
        own_host.kill("guest_memfd")
        # What is mapped stays readable without a word; the window notices.
        assert await client.asked("raw_load", 0) == 9
        with pytest.raises(Refused, match=r"serves its files no more"):
            await client.asked("require_alive")
        assert await asyncio.to_thread(client.dies_of, "raw_load", SIZE_2M) == SIGBUS
        with pytest.raises(TransportError, match="gmemctl status"):
            await inode.get()
        dead = [service.name for service in own_host.state.dead]
        assert dead == ["keeper", "guest_memfd"]


async def test_a_service_that_dies_too_often_is_given_up(own_host: Host) -> None:
    async with own_host.clients() as (_, gmem):
        inode = await new_inode(own_host, gmem, pages=2)
        client = await inode.mapped_by()
        await client.asked("raw_store", 0, 9)

        def kill_what_starts() -> None:
            with suppress(ProcessLookupError):
                own_host.kill("guest_memfd")

        def gave_up() -> bool:
            kill_what_starts()
            return "keeper" in [service.name for service in own_host.state.dead]

        await asyncio.to_thread(wait_until, gave_up, "the end of the keeper", 60.0)
        assert own_host.exit_status("keeper") == 3
        with pytest.raises(Refused, match=r"serves its files no more"):
            await client.asked("require_alive")
        at = SIZE_2M + PAGE_SIZE
        assert await asyncio.to_thread(client.dies_of, "raw_load", at) == SIGBUS
    said = [line for line in own_host.log("keeper") if "error" in line]
    assert [line["event"] for line in said] == ["gave_up", "service_died"]
    assert "started again 5 times in half a minute" in str(said[0]["error"])


async def test_holds_wait_for_their_client_and_end_without_it(own_host: Host) -> None:
    async with patient(own_host) as (_, gmem):
        inode = await new_inode(own_host, gmem, pages=2)
        stays, goes = [await inode.mapped_by(name) for name in ("stays", "goes")]
        for program in (stays, goes):
            async with GuestMemfdClient(
                own_host.target("guest_memfd"), client=program.name, incarnation="i1"
            ) as theirs:
                await theirs.pin_pages(
                    name=inode.name, offset=0, size=PAGE_SIZE, holder=program.name
                )
        pid = own_host.pid("guest_memfd")
        own_host.kill("guest_memfd")
        goes.kill()
        own_host.programs.remove(goes)
        await own_host.served_again(pid)
        assert len((await inode.get()).holds) == 2

        async def one_is_left() -> bool:
            return [hold.holder for hold in (await inode.get()).holds] == ["stays"]

        await until(one_is_left, "the end of the hold of the client that ended", 30.0)
        await stays.asked("write", 0, 5)
        assert await stays.asked("read", 0) == "05"
