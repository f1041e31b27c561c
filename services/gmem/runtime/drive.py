"""Operations run to their end: by a loop, or by the thread that has the request.

The rules (V2, V7 and V9 of the design):

* A core is entered under its object's mutex, by whichever thread has the request; the
  mutex is never held across an effect.
* *Local* effects are performed by that thread, *blocking* ones too where it may sleep.
  The first *remote* effect, and a lock that is taken, hand the operation over to the
  loop, which then finishes it: blocking effects go to worker threads from there.
* Locks are core state; this file only wakes the next in line, first come first served.
* Started is finished: a caller that goes away never stops an operation half-way.

An effect's handler returns the reply, or raises what the operation is to see at the
very line that asked: KernelError for a refusal, TransportError where nobody answered.
Anything else is our own bug: it goes through the operation too, so that locks are
released, and then to `on_bug`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager, nullcontext
from contextvars import copy_context
from functools import partial
from typing import Any, Generic, TypeAlias, TypeVar

from gmem.effects import Acquire, Effect, Lock, Mode, Op, Release, Ticket
from gmem.uapi.errors import KernelError, TransportError

T = TypeVar("T")
E = TypeVar("E", bound=Effect[Any])

Mutex: TypeAlias = AbstractContextManager[object]
Done: TypeAlias = Callable[["Future[T]"], None]
_Answer: TypeAlias = Callable[[], Awaitable[Any]]


async def drive(op: Op[T], perform: Callable[[Effect[Any]], Awaitable[Any]]) -> T:
    """Run one operation whose every effect, locks included, `perform` answers."""
    stepper = _Stepper(op, nullcontext())
    while (effect := stepper.step()) is not None:
        try:
            stepper.reply(await perform(effect))
        except Exception as error:  # noqa: BLE001 - thrown into the op, not swallowed
            stepper.throw(error)
    return stepper.value


def wake_up_fd() -> int:
    """Return the descriptor by which other threads wake the running loop.

    A thread that closes all others has to keep it: what it hands over would be lost.
    """
    loop: Any = asyncio.get_running_loop()
    # There is no public name for it.
    return int(loop._csock.fileno())  # noqa: SLF001


class Performer:
    """Who answers which effect: a table by the type of the effect."""

    def __init__(self) -> None:
        """Start empty; a type is registered once."""
        self._local: dict[type[Effect[Any]], Callable[[Any], object]] = {}
        self._blocking: dict[type[Effect[Any]], Callable[[Any], object]] = {}
        self._remote: dict[type[Effect[Any]], Callable[[Any], Awaitable[object]]] = {}

    def register_local(self, kind: type[E], handler: Callable[[E], object]) -> None:
        """Answer `kind` in the thread that has it: short, and never waits."""
        self._require_new(kind)
        self._local[kind] = handler

    def register_remote(
        self, kind: type[E], handler: Callable[[E], Awaitable[object]]
    ) -> None:
        """Answer `kind` on the loop, by awaiting somebody else."""
        self._require_new(kind)
        self._remote[kind] = handler

    def register_blocking(
        self,
        kind: type[E],
        handler: Callable[[E], object],
        workers: Callable[[], Executor | None] = lambda: None,
    ) -> None:
        """Answer `kind` in a thread that may sleep in the kernel.

        That is the one that has the operation, or one of `workers()` where the loop has
        it (None: the loop's own).
        """

        async def in_a_thread(effect: E) -> object:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(workers(), handler, effect)

        self.register_remote(kind, in_a_thread)
        self._blocking[kind] = handler

    def local(
        self, effect: Effect[Any], *, may_sleep: bool = False
    ) -> Callable[[Any], object] | None:
        """Return who answers `effect` in this very thread, or None."""
        handler = self._local.get(type(effect))
        if handler is None and may_sleep:
            return self._blocking.get(type(effect))
        return handler

    def remote(self, effect: Effect[Any]) -> Callable[[Any], Awaitable[object]]:
        """Return the remote handler; an effect nobody answers is our bug."""
        assert type(effect) in self._remote, f"nobody performs {type(effect).__name__}"
        return self._remote[type(effect)]

    def _require_new(self, kind: type[Effect[Any]]) -> None:
        assert kind not in self._local, kind
        assert kind not in self._remote, kind


class Runner:
    """Runs the operations of one service; made on the loop that finishes them."""

    def __init__(
        self,
        performer: Performer,
        *,
        on_bug: Callable[[BaseException], None] | None = None,
    ) -> None:
        """Bind to the running loop; `on_bug` hears of exceptions that are our fault."""
        self._loop = asyncio.get_running_loop()
        self._performer = performer
        self._on_bug = on_bug
        # A leaf: guards the queues of all locks for a few instructions, and is never
        # held while anything else happens. Waiting itself is per lock.
        self._queues = threading.Lock()
        self._waiting: dict[Ticket, Future[Ticket]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    async def run(self, op: Op[T], mutex: Mutex | None = None) -> T:
        """Run `op` from the loop; a cancelled caller leaves it running (V9)."""
        return await asyncio.shield(self.submit(op, mutex))

    def submit(self, op: Op[T], mutex: Mutex | None = None) -> asyncio.Future[T]:
        """Start `op` from the loop; it may have ended when this returns."""
        assert asyncio.get_running_loop() is self._loop
        done = _uncancellable(Future[T]())
        self._start(op, mutex, done, self._continue)
        return asyncio.wrap_future(done)

    async def run_in_worker(
        self, op: Op[T], mutex: Mutex | None, workers: Executor
    ) -> T:
        """As `run`, but one of `workers` starts it: for many blocking effects."""
        done = _uncancellable(Future[T]())
        context = copy_context()
        start = partial(self._start, may_sleep=True)
        work = partial(context.run, start, op, mutex, done, self._hand_over)
        self._keep(self._loop.create_task(self._worked(workers, work, done)))
        return await asyncio.shield(asyncio.wrap_future(done))

    def start_from_thread(
        self,
        op: Op[T],
        mutex: Mutex | None,
        done: Done[T],
        *,
        may_sleep: bool = False,
    ) -> None:
        """Start `op` in the calling thread; `done` gets the finished future.

        `done` runs in the thread that ends the operation: this one, before the call
        returns, or the loop's. It must not block. `future.result()` returns the
        operation's value or raises its error. With `may_sleep` the thread performs
        blocking effects as well.
        """
        future = _uncancellable(Future[T]())
        future.add_done_callback(done)
        self._start(op, mutex, future, self._hand_over, may_sleep=may_sleep)

    async def drain(self, seconds: float) -> int:
        """Wait until what was started is finished; return how many did not."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)
        return len(self._tasks)

    def _start(
        self,
        op: Op[T],
        mutex: Mutex | None,
        done: Future[T],
        go_on: Callable[[_Stepper[T], _Answer, Future[T]], None],
        *,
        may_sleep: bool = False,
    ) -> None:
        stepper = _Stepper(op, mutex if mutex is not None else nullcontext())
        try:
            answer = self._advance(stepper, may_sleep=may_sleep)
            if answer is not None:
                go_on(stepper, answer, done)
                return
        except Exception as error:  # noqa: BLE001 - goes to whoever asked
            self._fail(done, error)
        else:
            done.set_result(stepper.value)

    def _hand_over(
        self, stepper: _Stepper[T], answer: _Answer, done: Future[T]
    ) -> None:
        self._loop.call_soon_threadsafe(self._continue, stepper, answer, done)

    def _continue(self, stepper: _Stepper[T], answer: _Answer, done: Future[T]) -> None:
        self._keep(self._loop.create_task(self._finish(stepper, answer, done)))

    def _keep(self, task: asyncio.Task[Any]) -> None:
        """Have a stop wait for a task."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _worked(
        self, workers: Executor, work: Callable[[], None], done: Future[T]
    ) -> None:
        """Last until an operation that a worker starts has ended."""
        await self._loop.run_in_executor(workers, work)
        ended = asyncio.wrap_future(done)
        await asyncio.wait([ended])
        # An error goes to whoever asked; one that nobody looks at here is logged.
        ended.exception()

    async def _finish(
        self, stepper: _Stepper[T], answer: _Answer, done: Future[T]
    ) -> None:
        """Alternate answers and steps until the operation has ended."""
        try:
            pending: _Answer | None = answer
            while pending is not None:
                try:
                    stepper.reply(await pending())
                except Exception as error:  # noqa: BLE001 - thrown into the op
                    stepper.throw(error)
                pending = self._advance(stepper)
        except Exception as error:  # noqa: BLE001 - goes to whoever asked
            self._fail(done, error)
        else:
            done.set_result(stepper.value)

    def _fail(self, done: Future[T], error: Exception) -> None:
        theirs = isinstance(error, KernelError | TransportError)
        if not theirs and self._on_bug is not None:
            self._on_bug(error)
        done.set_exception(error)

    def _advance(
        self, stepper: _Stepper[T], *, may_sleep: bool = False
    ) -> _Answer | None:
        """Step and answer here; return who else must answer, None at the end."""
        while (effect := stepper.step()) is not None:
            try:
                answer = self._answer(stepper, effect, may_sleep=may_sleep)
            except Exception as error:  # noqa: BLE001 - thrown into the op
                stepper.throw(error)
            else:
                if answer is not None:
                    return answer
        return None

    def _answer(
        self, stepper: _Stepper[T], effect: Effect[Any], *, may_sleep: bool
    ) -> _Answer | None:
        handler = self._performer.local(effect, may_sleep=may_sleep)
        if handler is not None:
            stepper.reply(handler(effect))
            return None
        match effect:
            case Acquire(lock=lock, mode=mode):
                return self._acquire(stepper, lock, mode)
            case Release(lock=lock, ticket=ticket):
                self._release(lock, ticket)
                stepper.reply(None)
                return None
            case _:
                return partial(self._performer.remote(effect), effect)

    def _acquire(self, stepper: _Stepper[T], lock: Lock, mode: Mode) -> _Answer | None:
        with self._queues:
            # Queued here, by the asking thread: a hand-over must not lose its place.
            ticket = lock.request(mode)
            if not ticket.granted:
                granted: Future[Ticket] = Future()
                self._waiting[ticket] = granted
                return partial(_wait_for, granted)
        stepper.reply(ticket)
        return None

    def _release(self, lock: Lock, ticket: Ticket) -> None:
        with self._queues:
            granted = lock.release(ticket)
            waiting = [(self._waiting.pop(ticket), ticket) for ticket in granted]
        for future, next_ticket in waiting:
            future.set_result(next_ticket)


def _uncancellable(future: Future[T]) -> Future[T]:
    """Mark as running: a cancelled waiter must not take the result away (V9)."""
    future.set_running_or_notify_cancel()
    return future


async def _wait_for(granted: Future[Ticket]) -> Ticket:
    return await asyncio.wrap_future(granted)


class _Stepper(Generic[T]):
    """One operation between two effects: what it is sent next, and its value."""

    __slots__ = ("_argument", "_mutex", "_op", "_resume", "_value")

    def __init__(self, op: Op[T], mutex: Mutex) -> None:
        self._op = op
        self._mutex = mutex
        # Most of what an operation costs here is made of these few steps.
        self._resume: Callable[[Any], Effect[Any]] = op.send
        self._argument: object = None
        self._value: list[T] = []

    def step(self) -> Effect[Any] | None:
        """Enter the core under the mutex up to its next effect; None at its end."""
        with self._mutex:
            try:
                return self._resume(self._argument)
            except StopIteration as stop:
                self._value.append(stop.value)
                return None

    def reply(self, value: object) -> None:
        """Let the next step return `value` from the effect."""
        self._resume, self._argument = self._op.send, value

    def throw(self, error: Exception) -> None:
        """Let the next step raise `error` at the line that asked."""
        self._resume, self._argument = self._op.throw, error

    @property
    def value(self) -> T:
        """What the operation returned."""
        assert self._value, "the operation has not ended"
        return self._value[0]
