"""Operations run to their end, from the loop and from threads."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from gmem.effects import (
    Acquire,
    Effect,
    Lock,
    Mode,
    Op,
    Release,
    holding,
    perform,
)
from gmem.runtime.drive import Runner, drive
from gmem.runtime.performer import Performer
from gmem.uapi.errors import Exhausted, Reason, TransportError
from tests.support.driven_world import (
    Add,
    Ask,
    Mark,
    Nobody,
    World,
    asleep_and_back,
    in_thread,
    recovering,
    sum_up,
)


@pytest.fixture
async def world() -> World:
    return World()


async def test_drive_answers_each_effect_and_returns_the_value() -> None:
    async def answer(effect: Effect[Any]) -> int:
        await asyncio.sleep(0)
        if effect == Ask(0):
            raise Exhausted(Reason.POOL_EMPTY, "none")
        assert isinstance(effect, Add | Ask)
        return effect.number * 10

    assert await drive(sum_up(1, 2), answer) == 30
    assert await drive(recovering(Ask(0)), answer) == "Exhausted at its line"
    with pytest.raises(Exhausted):
        await drive(sum_up(1, 0), answer)


async def test_replies_and_errors_reach_the_line_that_asked(world: World) -> None:
    assert await world.runner.run(sum_up(1, 10)) == 22
    assert await world.runner.run(recovering(Add(-1))) == "Exhausted at its line"
    assert await world.runner.run(recovering(Ask(-1))) == "TransportError at its line"
    with pytest.raises(Exhausted, match="no page is left"):
        await world.runner.run(sum_up(-1, 0))
    with pytest.raises(TransportError):
        await world.runner.run(sum_up(0, -1))
    assert world.bugs == []


async def test_a_thread_finishes_what_is_local_itself(world: World) -> None:
    def local_only() -> Op[int]:
        first = yield from perform(Add(1))
        return (yield from perform(Add(first)))

    ended: list[tuple[str, int]] = []

    def done(future: Future[int]) -> None:
        ended.append((threading.current_thread().name, future.result()))

    def work() -> None:
        world.runner.start_from_thread(local_only(), threading.Lock(), done)
        assert ended == [("dispatcher", 3)]

    # The loop stands still meanwhile: nothing can have been handed to it.
    in_thread(work).join(5)
    assert ended == [("dispatcher", 3)]
    assert world.threads["local"] == ["dispatcher", "dispatcher"]


@pytest.mark.parametrize("may_sleep", [True, False])
async def test_a_thread_that_may_sleep_performs_what_blocks_until_it_hands_over(
    world: World, may_sleep: bool
) -> None:
    ended: Future[tuple[str, int, str]] = Future()

    def done(future: Future[tuple[str, int, str]]) -> None:
        ended.set_result(future.result())

    def work() -> None:
        start = world.runner.start_from_thread
        start(asleep_and_back(), threading.Lock(), done, may_sleep=may_sleep)

    thread = in_thread(work)
    before, asked, after = await asyncio.wait_for(asyncio.wrap_future(ended), 5)
    thread.join(5)
    assert (before == "dispatcher") is may_sleep
    assert asked == 4
    assert after not in ("dispatcher", threading.current_thread().name)


async def test_the_first_remote_effect_hands_over_to_the_loop(world: World) -> None:
    ended: Future[tuple[str, int]] = Future()

    def done(future: Future[int]) -> None:
        ended.set_result((threading.current_thread().name, future.result()))

    op = sum_up(1, 2)
    thread = in_thread(
        lambda: world.runner.start_from_thread(op, threading.Lock(), done)
    )
    value = await asyncio.wait_for(asyncio.wrap_future(ended), 5)
    thread.join(5)
    loop_thread = threading.current_thread().name
    assert value == (loop_thread, 6)
    assert world.threads == {"local": ["dispatcher"], "remote": [loop_thread]}


async def test_an_error_of_an_operation_started_in_a_thread_reaches_done(
    world: World,
) -> None:
    errors: list[BaseException | None] = []

    def done(future: Future[int]) -> None:
        errors.append(future.exception())

    work = world.runner.start_from_thread
    in_thread(lambda: work(sum_up(-1, 0), None, done)).join(5)
    assert isinstance(errors[0], Exhausted)


async def test_the_mutex_is_held_inside_the_core_and_never_across_an_effect(
    world: World,
) -> None:
    mutex = threading.Lock()
    seen: list[tuple[str, bool]] = []
    world.performer = Performer()
    world.performer.register_local(
        Mark, lambda effect: seen.append((effect.word, mutex.locked()))
    )

    async def ask(_effect: Ask) -> int:
        seen.append(("remote", mutex.locked()))
        return 0

    world.performer.register_remote(Ask, ask)

    def op() -> Op[None]:
        seen.append(("core", mutex.locked()))
        yield from perform(Mark("local"))
        seen.append(("core", mutex.locked()))
        yield from perform(Ask(1))
        seen.append(("core", mutex.locked()))

    await Runner(world.performer).run(op(), mutex)
    core, local, remote = ("core", True), ("local", False), ("remote", False)
    assert seen == [core, local, core, remote, core]
    assert not mutex.locked()


async def test_a_cancelled_caller_leaves_the_operation_running(world: World) -> None:
    def op() -> Op[None]:
        yield from perform(Ask(1))
        yield from perform(Mark("finished"))

    world.gate.clear()
    caller = asyncio.create_task(world.runner.run(op()))
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert await world.runner.drain(0.01) == 1
    world.gate.set()
    assert await world.runner.drain(5) == 0
    assert world.marks == ["finished"]


async def test_locks_are_granted_in_the_order_of_asking_over_loop_and_threads(
    world: World,
) -> None:
    lock = Lock("inode")
    done: list[Future[None]] = []

    def op(word: str, mode: Mode) -> Op[None]:
        def body() -> Op[None]:
            yield from perform(Mark(f"+{word}"))
            yield from perform(Ask(1))
            yield from perform(Mark(f"-{word}"))

        yield from holding(lock, mode, body())

    def start(name: str, mode: Mode) -> None:
        """Ask in a thread and return when the claim is queued."""
        runner = world.runner
        work = lambda: runner.start_from_thread(op(name, mode), None, done.append)  # noqa: E731
        in_thread(work).join(5)

    world.gate.clear()
    first = world.runner.submit(op("loop1", Mode.EXCLUSIVE))
    start("thread1", Mode.SHARED)
    last = world.runner.submit(op("loop2", Mode.SHARED))
    start("thread2", Mode.EXCLUSIVE)
    start("thread3", Mode.SHARED)
    await asyncio.sleep(0.05)
    assert world.marks == ["+loop1"]

    world.gate.set()
    await asyncio.wait_for(asyncio.gather(first, last), 5)
    assert await world.runner.drain(5) == 0
    assert len(done) == 3
    entered = [mark for mark in world.marks if mark[0] == "+"]
    assert entered[0] == "+loop1"
    assert sorted(entered[1:3]) == ["+loop2", "+thread1"]  # two readers together
    assert entered[3:] == ["+thread2", "+thread3"]
    for writer in ("loop1", "thread2"):  # nobody was inside with a writer
        at = world.marks.index(f"+{writer}")
        assert world.marks[at + 1] == f"-{writer}"
    assert lock.idle


async def test_a_lock_released_in_a_thread_wakes_the_next_on_the_loop(
    world: World,
) -> None:
    lock = Lock("inode")
    ticket = lock.request(Mode.EXCLUSIVE)

    def release() -> Op[None]:
        yield from perform(Release(lock, ticket))

    def acquire() -> Op[str]:
        next_ticket = yield from perform(Acquire(lock, Mode.EXCLUSIVE))
        yield from perform(Release(lock, next_ticket))
        return "granted"

    waiting = world.runner.submit(acquire())
    await asyncio.sleep(0.02)
    assert not waiting.done()
    start = world.runner.start_from_thread
    in_thread(lambda: start(release(), None, lambda future: future.result())).join(5)
    assert await asyncio.wait_for(waiting, 5) == "granted"
    assert lock.idle


async def test_a_thousand_operations_on_ten_objects_keep_each_count(
    world: World,
) -> None:
    chance = random.Random(7)
    counts = [0] * 10
    inside = [0] * 10
    locks = [Lock(f"inode {number}") for number in range(10)]
    mutexes = [threading.Lock() for _lock in locks]

    def op(number: int, remote: bool) -> Op[None]:
        def body() -> Op[None]:
            inside[number] += 1
            assert inside[number] == 1
            before = counts[number]
            yield from perform(Ask(1) if remote else Add(1))
            counts[number] = before + 1
            inside[number] -= 1

        yield from holding(locks[number], Mode.EXCLUSIVE, body())

    def ops(count: int) -> Iterator[tuple[Op[None], threading.Lock]]:
        for _ in range(count):
            number = chance.randrange(10)
            yield op(number, chance.random() < 0.5), mutexes[number]

    ended: list[Future[None]] = []
    batches = [list(ops(125)) for _thread in range(4)]

    def work(batch: list[tuple[Op[None], threading.Lock]]) -> None:
        for each, mutex in batch:
            world.runner.start_from_thread(each, mutex, ended.append)

    threads = [in_thread(lambda batch=batch: work(batch)) for batch in batches]
    futures = [world.runner.submit(each, mutex) for each, mutex in ops(500)]
    await asyncio.wait_for(asyncio.gather(*futures), 30)
    for thread in threads:
        await asyncio.to_thread(thread.join, 10)
    assert await world.runner.drain(30) == 0
    assert [future.exception() for future in ended] == [None] * 500
    assert sum(counts) == 1000
    assert all(lock.idle for lock in locks)


async def test_our_own_bug_goes_through_the_operation_and_is_told(
    world: World,
) -> None:
    lock = Lock("inode")

    def body() -> Op[None]:
        yield from perform(Nobody())

    with pytest.raises(AssertionError, match="nobody performs Nobody"):
        await world.runner.run(holding(lock, Mode.EXCLUSIVE, body()))
    assert lock.idle
    assert len(world.bugs) == 1


async def test_an_effect_is_registered_once(world: World) -> None:
    with pytest.raises(AssertionError):
        world.performer.register_local(Ask, lambda _effect: 0)
