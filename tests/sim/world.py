"""Time, chance and delivery: one thread and one seed drive every operation there is.

A *task* is an operation of a core, or a script of the workload, between two effects.
Local effects are answered at once; the others by messages, which are delayed,
reordered, duplicated and lost. A service carries a request out once and remembers its
reply under the request_id, as gmem.runtime.replies does.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any, Final, NoReturn, TypeAlias

from gmem.effects import Acquire, Effect, Lock, Op, Release, Ticket
from gmem.uapi.errors import KernelError
from gmem.uapi.lineage import Lineage
from tests.sim.lineages import PLAYS, lineage_of
from tests.sim.options import Options

DELAY_MAX: Final = 40
TIMEOUT: Final = 60

Answer: TypeAlias = Callable[["Outcome"], None]
CarryOut: TypeAlias = Callable[[Answer], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How something ended: a value, or the refusal of a core."""

    value: Any = None
    error: KernelError | None = None


def outcome_of(make: Callable[[], Any]) -> Outcome:
    """Call `make`; what a core refuses is an outcome too."""
    try:
        return Outcome(make())
    except KernelError as error:
        return Outcome(error=error)


@dataclass(slots=True, eq=False)
class Task:
    """One operation; `effect` is what it waits for, `previous` what came before."""

    number: int
    name: str
    op: Op[Any]
    done: Answer
    effect: Effect[Any] | None = None
    previous: Effect[Any] | None = None


@dataclass(slots=True, eq=False)
class Request:
    """A message that is sent until its reply is heard."""

    request_id: int
    service: str
    carry_out: CarryOut
    heard: Answer
    remembered: bool
    answered: bool = False


class Replies:
    """What one service was asked, and what it answered, by request_id."""

    def __init__(self) -> None:
        self._running: dict[int, None] = {}
        self._finished: dict[int, Outcome] = {}

    def begin(self, request_id: int) -> bool:
        """Tell whether the request is to be carried out; a running one is joined."""
        if request_id in self._running:
            return False
        self._running[request_id] = None
        return True

    def finish(self, request_id: int, outcome: Outcome) -> None:
        del self._running[request_id]
        self._finished[request_id] = outcome

    def get(self, request_id: int) -> Outcome | None:
        return self._finished.get(request_id)


@dataclass(slots=True)
class Performers:
    """Who answers which effect: in the same step, or some time later."""

    local: dict[type[Effect[Any]], Callable[[Any], object]] = field(
        default_factory=dict
    )
    remote: dict[type[Effect[Any]], Callable[[Any, Answer], None]] = field(
        default_factory=dict
    )


class World:
    """The clock, the messages under way, and the tasks that have begun."""

    def __init__(
        self,
        seed: int,
        options: Options | None = None,
        lineage: Lineage | None = None,
    ) -> None:
        self.seed = seed
        self.lineage = lineage_of(seed) if lineage is None else lineage
        self.play = PLAYS[self.lineage]
        self.random = Random(seed)
        self.options = Options.draw(self.random) if options is None else options
        self.performers = Performers()
        self.now = 0
        self.steps = 0
        self.marks: Counter[str] = Counter()
        self.tasks: dict[int, Task] = {}
        self.changed = True
        self.print: Callable[[str], None] | None = None
        self._queue: list[tuple[int, float, int, Callable[[], None]]] = []
        self._numbers = 0
        self._replies: dict[str, Replies] = {}
        self._waiting: dict[Ticket, Task] = {}
        self._hash = hashlib.sha256()

    # Time and chance.

    def chance(self, probability: float) -> bool:
        """Tell whether something happens; what is off draws nothing."""
        return probability > 0 and self.random.random() < probability

    def later(self, ticks: int, event: Callable[[], None]) -> None:
        """Have something happen after `ticks`."""
        tie = self.random.random() if self.options.reorder else 0.0
        heapq.heappush(self._queue, (self.now + ticks, tie, self._next(), event))

    def after_a_while(self, event: Callable[[], None]) -> None:
        """Have something happen as soon as a message takes."""
        slow = self.chance(self.options.delay)
        self.later(self.random.randint(1, DELAY_MAX if slow else 3), event)

    def step(self) -> bool:
        """Let the next event happen; tell whether there was one."""
        if not self._queue:
            return False
        self.now, _, _, event = heapq.heappop(self._queue)
        self.steps += 1
        event()
        return True

    @property
    def trace_hash(self) -> str:
        """A digest of every effect and end of every task so far, in their order."""
        return self._hash.hexdigest()

    # Tasks.

    def start(self, name: str, op: Op[Any], done: Answer) -> None:
        """Begin an operation; `done` hears of its end."""
        task = Task(self._next(), name, op, done)
        self.tasks[task.number] = task
        self._go_on(task, partial(op.send, None))

    def resume(self, task: Task, outcome: Outcome) -> None:
        """Answer the effect that a task waits for."""
        if outcome.error is not None:
            self._go_on(task, partial(task.op.throw, outcome.error))
        else:
            self._go_on(task, partial(task.op.send, outcome.value))

    def _go_on(self, task: Task, resume: Callable[[], Effect[Any]]) -> None:
        self.changed = True
        while True:
            try:
                effect = resume()
            except StopIteration as stop:
                self._end(task, Outcome(stop.value))
                return
            except KernelError as error:
                self._end(task, Outcome(error=error))
                return
            task.previous, task.effect = task.effect, effect
            self.note(task, type(effect).__name__, effect)
            answered, reply = self._perform(task, effect)
            if not answered:
                return
            resume = partial(task.op.send, reply)

    def _end(self, task: Task, outcome: Outcome) -> None:
        del self.tasks[task.number]
        word = outcome.error.reason if outcome.error is not None else "done"
        self.note(task, word, outcome.value)
        task.done(outcome)

    def _perform(self, task: Task, effect: Effect[Any]) -> tuple[bool, object]:
        match effect:
            case Acquire(lock=lock, mode=mode):
                ticket = lock.request(mode)
                if not ticket.granted:
                    self._waiting[ticket] = task
                return ticket.granted, ticket
            case Release(lock=lock, ticket=ticket):
                self._release(lock, ticket)
                return True, None
            case _:
                return self._ask_performers(task, effect)

    def _ask_performers(self, task: Task, effect: Effect[Any]) -> tuple[bool, object]:
        local = self.performers.local.get(type(effect))
        if local is None:
            self.performers.remote[type(effect)](effect, partial(self.resume, task))
            return False, None
        reply = local(effect)
        if self.chance(self.options.pause):
            self.after_a_while(partial(self.resume, task, Outcome(reply)))
            return False, None
        return True, reply

    def _release(self, lock: Lock, ticket: Ticket) -> None:
        for granted in lock.release(ticket):
            waiter = self._waiting.pop(granted)
            self.later(1, partial(self.resume, waiter, Outcome(granted)))

    def asker(self, effect: Effect[Any]) -> Task:
        """Return the task that waits for an effect."""
        return next(task for task in self.tasks.values() if task.effect is effect)

    def abandon(self) -> None:
        """End all tasks of a history that failed: each has locks to give back."""
        for task in self.tasks.values():
            while True:
                try:
                    task.op.close()
                    break
                except RuntimeError:
                    # It yielded an effect on its way out: the next close goes on.
                    continue
                except Exception:  # noqa: BLE001 - the history has failed already
                    break

    # Messages.

    def call(
        self,
        service: str,
        carry_out: CarryOut,
        heard: Answer,
        *,
        remembered: bool = True,
    ) -> None:
        """Ask a service until it is heard; `remembered` requests run only once."""
        self._send(Request(self._next(), service, carry_out, heard, remembered))

    def _send(self, request: Request) -> None:
        if request.answered:
            return
        if self.chance(self.options.lost_request):
            self.marks["lost request"] += 1
            self.later(TIMEOUT, partial(self._send, request))
            return
        for _ in range(1 + self.chance(self.options.duplicate)):
            self.after_a_while(partial(self._arrive, request))

    def _arrive(self, request: Request) -> None:
        if not request.remembered:
            request.carry_out(partial(self._reply, request))
            return
        replies = self._replies.setdefault(request.service, Replies())
        known = replies.get(request.request_id)
        if known is not None:
            self.marks["reply from memory"] += 1
            self._reply(request, known)
        elif replies.begin(request.request_id):
            request.carry_out(partial(self._finish, request, replies))

    def _finish(self, request: Request, replies: Replies, outcome: Outcome) -> None:
        replies.finish(request.request_id, outcome)
        self._reply(request, outcome)

    def _reply(self, request: Request, outcome: Outcome) -> None:
        if self.chance(self.options.lost_reply):
            self.marks["lost reply"] += 1
            self.later(TIMEOUT, partial(self._send, request))
            return
        self.after_a_while(partial(self._hear, request, outcome))

    def _hear(self, request: Request, outcome: Outcome) -> None:
        if not request.answered:
            request.answered = True
            request.heard(outcome)

    # The record.

    def note(self, task: Task, word: str, value: object) -> None:
        """Add to the history: by its hash, and in words where somebody reads it."""
        self._hash.update(f"{self.now} {task.number} {word}\n".encode())
        if self.print is not None:
            shown = value.lock.name if isinstance(value, Acquire | Release) else value
            self.print(f"{self.now:6} #{task.number:<5} {task.name:34} {word} {shown}")

    def broken(self, sentence: str) -> NoReturn:
        """End the history: an invariant does not hold."""
        raise AssertionError(sentence)

    def _next(self) -> int:
        self._numbers += 1
        return self._numbers
