"""Operations that worker threads carry out."""

from __future__ import annotations

import asyncio
import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar

import pytest

from gmem.effects import (
    Acquire,
    Lock,
    Mode,
    Op,
    Release,
    holding,
    perform,
)
from gmem.guest_memfd.view.revokers import Revokers
from gmem.uapi.errors import Exhausted, InUse
from tests.support.driven_world import (
    Add,
    Ask,
    Nobody,
    Sleep,
    World,
    asleep_and_back,
    sum_up,
    until,
)


@pytest.fixture
async def world() -> World:
    return World()


async def test_a_worker_performs_what_blocks_and_keeps_the_callers_context(
    world: World,
) -> None:
    who: ContextVar[str] = ContextVar("who", default="nobody")
    world.performer.register_local(
        Nobody, lambda _effect: world.marks.append(who.get())
    )

    def op() -> Op[tuple[str, int, str]]:
        yield from perform(Nobody())
        return (yield from asleep_and_back())

    with ThreadPoolExecutor(1, thread_name_prefix="worker") as workers:
        who.set("the caller")
        before, asked, _ = await world.runner.run_in_worker(op(), None, workers)
        with pytest.raises(Exhausted):
            await world.runner.run_in_worker(sum_up(-1, 0), None, workers)
    assert (before[:6], asked, world.marks) == ("worker", 4, ["the caller"])
    assert await world.runner.drain(5) == 0


async def test_a_refusal_of_an_operation_that_a_worker_has_is_heard_once(
    world: World,
) -> None:
    said: list[str] = []
    asyncio.get_running_loop().set_exception_handler(
        lambda _loop, context: said.append(context["message"])
    )
    with ThreadPoolExecutor(1) as workers:
        with pytest.raises(Exhausted):
            await world.runner.run_in_worker(sum_up(-1, 0), None, workers)
        assert await world.runner.drain(5) == 0
    gc.collect()
    assert said == []


async def test_an_operation_that_a_worker_has_outlives_its_caller(world: World) -> None:
    world.gate.clear()
    with ThreadPoolExecutor(1) as workers:
        run = world.runner.run_in_worker(sum_up(1, 2), None, workers)
        caller = asyncio.create_task(run)
        await until(lambda: bool(world.threads["remote"]))
        caller.cancel()
        await asyncio.wait([caller])
        assert await world.runner.drain(0.01) > 0

        world.gate.set()
        assert await world.runner.drain(5) == 0


async def test_a_worker_goes_on_when_the_lock_is_free_and_none_waits_for_it(
    world: World,
) -> None:
    lock = Lock("invalidate_lock")
    held = await world.runner.run(perform(Acquire(lock, Mode.EXCLUSIVE)))

    def op() -> Op[str]:
        yield from holding(lock, Mode.EXCLUSIVE, perform(Add(1)))
        return (yield from perform(Sleep()))

    with ThreadPoolExecutor(1, thread_name_prefix="worker") as workers:
        run = world.runner.run_in_worker
        waiting = [asyncio.create_task(run(op(), None, workers)) for _ in range(3)]
        await until(lambda: len(lock.queue) == len(waiting))
        # The only worker is free.
        assert await run(perform(Sleep()), None, workers) == "worker_0"
        await world.runner.run(perform(Release(lock, held)))
        assert await asyncio.gather(*waiting) == ["worker_0"] * 3
    assert world.threads["local"] == ["worker_0"] * 3
    assert lock.idle


async def test_workers_that_have_ended_leave_no_lock_behind(world: World) -> None:
    lock = Lock("invalidate_lock")
    held = await world.runner.run(perform(Acquire(lock, Mode.EXCLUSIVE)))
    workers = Revokers(1, ())
    world.performer.register_blocking(Nobody, lambda _: None, lambda: workers)
    op = holding(lock, Mode.EXCLUSIVE, perform(Nobody()))
    waiting = asyncio.create_task(world.runner.run_in_worker(op, None, workers))
    await until(lambda: len(lock.queue) == 1)
    workers.stop(5)
    await world.runner.run(perform(Release(lock, held)))
    with pytest.raises(InUse, match="nothing can be revoked"):
        await waiting
    assert lock.idle


async def test_what_blocks_goes_to_a_thread_which_goes_on_after_it(
    world: World,
) -> None:
    def op() -> Op[str]:
        yield from perform(Ask(1))
        name = yield from perform(Sleep())
        yield from perform(Add(1))
        return name

    name = await world.runner.run(op())
    assert threading.current_thread().name != name == world.threads["local"][0]
