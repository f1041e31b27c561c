"""What changed, in order, within bounds."""

from __future__ import annotations

import asyncio
import threading
from contextlib import aclosing

import pytest

from gmem.runtime.events import BATCH_MAX, HISTORY_MAX, EventLog
from gmem.uapi.errors import InUse, Reason


def record(log: EventLog, count: int) -> None:
    for number in range(count):
        log.record("pool.resized", f"hosts/host0/pools/{number}", pages=number)


async def test_a_watch_from_a_revision_tells_every_change_since() -> None:
    log = EventLog()
    record(log, 3)
    async with aclosing(log.watch(2)) as watching:
        assert [(e.revision, e.kind) for e in await anext(watching)] == [(1, "")]
        told = await anext(watching)
    assert [event.revision for event in told] == [2, 3]
    assert told[0].kind == "pool.resized"
    assert dict(told[0].details) == {"pages": "1"}


async def test_a_watch_from_now_waits_for_what_a_thread_records() -> None:
    log = EventLog(progress_seconds=30)
    record(log, 3)
    async with aclosing(log.watch()) as watching:
        assert (await anext(watching))[0].revision == 3
        waiting = asyncio.ensure_future(anext(watching))
        await asyncio.sleep(0.02)
        thread = threading.Thread(target=record, args=(log, 1))
        thread.start()
        told = await asyncio.wait_for(waiting, 5)
        thread.join()
    assert [event.revision for event in told] == [4]


async def test_a_quiet_watch_says_how_far_it_is() -> None:
    log = EventLog(progress_seconds=0.01)
    record(log, 2)
    async with aclosing(log.watch()) as watching:
        for _time in range(3):
            told = await asyncio.wait_for(anext(watching), 5)
            assert [(e.revision, e.kind) for e in told] == [(2, "")]


@pytest.mark.parametrize("start", [1, HISTORY_MAX + 20])
async def test_a_revision_that_is_not_kept_is_refused(start: int) -> None:
    log = EventLog()
    record(log, HISTORY_MAX + 5)
    with pytest.raises(InUse) as caught:
        await anext(log.watch(start))
    assert caught.value.reason is Reason.REVISION_COMPACTED
    assert caught.value.numbers == {"oldest": 6, "revision": HISTORY_MAX + 5}


async def test_a_watcher_that_falls_behind_is_told_so() -> None:
    log = EventLog()
    async with aclosing(log.watch()) as watching:
        await anext(watching)
        record(log, HISTORY_MAX)
        assert len(await anext(watching)) == BATCH_MAX
        record(log, HISTORY_MAX)
        with pytest.raises(InUse, match="is not kept"):
            await anext(watching)


async def test_closing_the_log_ends_every_watch() -> None:
    log = EventLog(progress_seconds=30)

    async def watch() -> int:
        return len([batch async for batch in log.watch()])

    watching = [asyncio.create_task(watch()) for _watcher in range(3)]
    await asyncio.sleep(0.02)
    log.close()
    assert await asyncio.wait_for(asyncio.gather(*watching), 5) == [1, 1, 1]
