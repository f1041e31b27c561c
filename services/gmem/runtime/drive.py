"""Operations run to their end: by a loop, or by the thread that has the request.

The rules (V2, V7 and V9 of the design):

* A core is entered under its object's mutex, by whichever thread has the request; the
  mutex is never held across an effect.
* *Local* effects are performed by that thread, *blocking* ones too where it may sleep.
  The first *remote* effect, and a lock that is taken, hand the operation over to the
  loop. From there a blocking effect takes it to a worker thread, which goes on until
  the loop is needed again. What a worker started goes on in a worker when its lock is
  granted: no thread waits for a lock.
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
from gmem.runtime.performer import Blocking, Performer, Remote
from gmem.uapi.errors import KernelError, TransportError

T = TypeVar("T")

Mutex: TypeAlias = AbstractContextManager[object]
Done: TypeAlias = Callable[["Future[T]"], None]
_Pending: TypeAlias = "Future[Ticket] | Blocking | Remote"
"""What an operation waits for: a lock, a thread that may sleep, somebody else."""


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
        self._unfinished: set[asyncio.Future[Any]] = set()

    async def run(self, op: Op[T], mutex: Mutex | None = None) -> T:
        """Run `op` from the loop; a cancelled caller leaves it running (V9)."""
        return await asyncio.shield(self.submit(op, mutex))

    def submit(self, op: Op[T], mutex: Mutex | None = None) -> asyncio.Future[T]:
        """Start `op` from the loop; it may have ended when this returns."""
        assert asyncio.get_running_loop() is self._loop
        run = _Run(op, mutex)
        self._go_on(run, self._continue)
        return asyncio.wrap_future(run.done)

    async def run_in_worker(
        self, op: Op[T], mutex: Mutex | None, workers: Executor
    ) -> T:
        """As `run`, but one of `workers` carries it out: for many blocking effects.

        One of them goes on when a lock is granted, too; the loop has only the remote
        effects, and what comes after them up to the next blocking one.
        """
        run = _Run(op, mutex, workers)
        ended = asyncio.wrap_future(run.done)
        self._keep(ended)
        self._go_on_in_worker(run)
        return await asyncio.shield(ended)

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
        returns, or any other. It must not block. `future.result()` returns the
        operation's value or raises its error. With `may_sleep` the thread performs
        blocking effects as well.
        """
        run = _Run(op, mutex)
        run.done.add_done_callback(done)
        self._go_on(run, self._hand_over, may_sleep=may_sleep)

    async def drain(self, seconds: float) -> int:
        """Wait until what was started is finished; return how many did not."""
        if self._unfinished:
            await asyncio.wait(self._unfinished, timeout=seconds)
        return len(self._unfinished)

    # Where an operation goes on: in this thread as far as it gets, then elsewhere.

    def _go_on(
        self,
        run: _Run[T],
        hand_over: Callable[[_Run[T], _Pending], None],
        *,
        may_sleep: bool = False,
    ) -> None:
        """Advance in this thread; `hand_over` what somebody else must answer."""
        try:
            pending = self._advance(run, may_sleep=may_sleep)
            if pending is not None:
                hand_over(run, pending)
        except Exception as error:  # noqa: BLE001 - goes to whoever asked
            self._fail(run.done, error)

    def _go_on_in_worker(self, run: _Run[T]) -> None:
        """Have one of the run's workers go on; the loop, where they have ended."""
        assert run.workers is not None
        go_on = partial(self._go_on, may_sleep=True)
        context = copy_context()
        try:
            run.workers.submit(context.run, go_on, run, self._leave_worker)
        except KernelError:
            # They have ended. The operation releases what it holds all the same.
            self._hand_over(run, None)

    def _leave_worker(self, run: _Run[T], pending: _Pending) -> None:
        """Wait for a lock without a thread; all else is the loop's."""
        if not isinstance(pending, Future):
            self._hand_over(run, pending)
            return

        def granted(ticket: Future[Ticket]) -> None:
            # In the thread that released the lock, which is not to do our work.
            run.reply(ticket.result())
            self._go_on_in_worker(run)

        pending.add_done_callback(granted)

    def _hand_over(self, run: _Run[T], pending: _Pending | None) -> None:
        self._loop.call_soon_threadsafe(self._continue, run, pending)

    def _continue(self, run: _Run[T], pending: _Pending | None) -> None:
        self._keep(self._loop.create_task(self._finish(run, pending)))

    def _keep(self, unfinished: asyncio.Future[Any]) -> None:
        """Have a stop wait for it."""
        self._unfinished.add(unfinished)
        unfinished.add_done_callback(self._unfinished.discard)

    async def _finish(self, run: _Run[T], pending: _Pending | None) -> None:
        """Alternate answers and steps until the operation has ended."""
        try:
            if pending is None:
                pending = self._advance(run)
            while pending is not None:
                if isinstance(pending, Blocking):
                    pending = await self._in_worker(run, pending)
                else:
                    pending = await self._here(run, pending)
        except Exception as error:  # noqa: BLE001 - goes to whoever asked
            self._fail(run.done, error)

    async def _here(
        self, run: _Run[T], pending: Future[Ticket] | Remote
    ) -> _Pending | None:
        """Wait for a lock or somebody else, and go on as far as it gets."""
        try:
            run.reply(await _answer_to(pending))
        except Exception as error:  # noqa: BLE001 - thrown into the op
            run.throw(error)
        return self._advance(run)

    async def _in_worker(self, run: _Run[T], blocking: Blocking) -> _Pending | None:
        """Have a worker perform an effect, and go on as far as it gets."""

        def perform_and_advance() -> _Pending | None:
            try:
                run.reply(blocking.handler(blocking.effect))
            except Exception as error:  # noqa: BLE001 - thrown into the op
                run.throw(error)
            return self._advance(run, may_sleep=True)

        work = partial(copy_context().run, perform_and_advance)
        try:
            advanced = self._loop.run_in_executor(blocking.workers(), work)
        except Exception as error:  # noqa: BLE001 - thrown into the op: they have ended
            run.throw(error)
            return self._advance(run)
        return await advanced

    def _fail(self, done: Future[T], error: Exception) -> None:
        theirs = isinstance(error, KernelError | TransportError)
        if not theirs and self._on_bug is not None:
            self._on_bug(error)
        done.set_exception(error)

    # Stepping.

    def _advance(self, run: _Run[T], *, may_sleep: bool = False) -> _Pending | None:
        """Step and answer here; return what else must be answered, None at the end."""
        while (effect := run.step()) is not None:
            try:
                pending = self._answer(run, effect, may_sleep=may_sleep)
            except Exception as error:  # noqa: BLE001 - thrown into the op
                run.throw(error)
            else:
                if pending is not None:
                    return pending
        run.end()
        return None

    def _answer(
        self, run: _Run[T], effect: Effect[Any], *, may_sleep: bool
    ) -> _Pending | None:
        handler = self._performer.local(effect, may_sleep=may_sleep)
        if handler is not None:
            run.reply(handler(effect))
            return None
        match effect:
            case Acquire(lock=lock, mode=mode):
                return self._acquire(run, lock, mode)
            case Release(lock=lock, ticket=ticket):
                self._release(lock, ticket)
                run.reply(None)
                return None
            case _:
                return self._performer.elsewhere(effect)

    def _acquire(self, run: _Run[T], lock: Lock, mode: Mode) -> Future[Ticket] | None:
        with self._queues:
            # Queued here, by the asking thread: a hand-over must not lose its place.
            ticket = lock.request(mode)
            if not ticket.granted:
                granted: Future[Ticket] = Future()
                self._waiting[ticket] = granted
                return granted
        run.reply(ticket)
        return None

    def _release(self, lock: Lock, ticket: Ticket) -> None:
        with self._queues:
            granted = lock.release(ticket)
            waiting = [(self._waiting.pop(ticket), ticket) for ticket in granted]
        for future, next_ticket in waiting:
            future.set_result(next_ticket)


async def _answer_to(pending: Future[Ticket] | Remote) -> object:
    if isinstance(pending, Future):
        return await asyncio.wrap_future(pending)
    return await pending()


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


class _Run(_Stepper[T]):
    """An operation on its way: who hears of its end, and who carries it out.

    `workers` go on when it is granted a lock; without them the loop does.
    """

    __slots__ = ("done", "workers")

    def __init__(
        self, op: Op[T], mutex: Mutex | None, workers: Executor | None = None
    ) -> None:
        super().__init__(op, mutex if mutex is not None else nullcontext())
        self.workers = workers
        self.done: Future[T] = Future()
        # As running: a cancelled waiter must not take the result away (V9).
        self.done.set_running_or_notify_cancel()

    def end(self) -> None:
        """Tell whoever waits what the operation returned."""
        self.done.set_result(self.value)
