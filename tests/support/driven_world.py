"""A world of a few effects for tests of the Runner: who did what, in which thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gmem.effects import (
    Effect,
    Op,
    perform,
)
from gmem.runtime.drive import Runner
from gmem.runtime.performer import Performer
from gmem.uapi.errors import Exhausted, Reason, TransportError


@dataclass(frozen=True, slots=True)
class Add(Effect[int]):
    """Local: adds one."""

    number: int


@dataclass(frozen=True, slots=True)
class Ask(Effect[int]):
    """Remote: doubles, after others had a turn."""

    number: int


@dataclass(frozen=True, slots=True)
class Sleep(Effect[str]):
    """Blocking: tells the thread it ran in."""


@dataclass(frozen=True, slots=True)
class Mark(Effect[None]):
    """Local: writes a word down."""

    word: str


@dataclass(frozen=True, slots=True)
class Nobody(Effect[None]):
    """Performed by nobody."""


class World:
    """Performs the effects above and remembers which thread did what."""

    def __init__(self) -> None:
        self.marks: list[str] = []
        self.threads: dict[str, list[str]] = {"local": [], "remote": []}
        self.gate = asyncio.Event()
        self.gate.set()
        self.performer = Performer()
        self.performer.register_local(Add, self.add)
        self.performer.register_local(Mark, lambda e: self.marks.append(e.word))
        self.performer.register_remote(Ask, self.ask)
        self.performer.register_blocking(Sleep, self.sleep)
        self.bugs: list[BaseException] = []
        self.runner = Runner(self.performer, on_bug=self.bugs.append)

    def add(self, effect: Add) -> int:
        self.threads["local"].append(threading.current_thread().name)
        if effect.number < 0:
            raise Exhausted(Reason.POOL_EMPTY, "no page is left")
        return effect.number + 1

    async def ask(self, effect: Ask) -> int:
        self.threads["remote"].append(threading.current_thread().name)
        await self.gate.wait()
        await asyncio.sleep(0)
        if effect.number < 0:
            raise TransportError("nobody there", service="host_allocator")
        return effect.number * 2

    def sleep(self, _effect: Sleep) -> str:
        return threading.current_thread().name


def sum_up(local: int, remote: int) -> Op[int]:
    first = yield from perform(Add(local))
    second = yield from perform(Ask(remote))
    return first + second


def recovering(effect: Effect[int]) -> Op[str]:
    try:
        yield from perform(effect)
    except (Exhausted, TransportError) as error:
        return f"{type(error).__name__} at its line"
    return "no error"


def in_thread(work: Any, name: str = "dispatcher") -> threading.Thread:
    thread = threading.Thread(target=work, name=name)
    thread.start()
    return thread


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


def asleep_and_back() -> Op[tuple[str, int, str]]:
    before = yield from perform(Sleep())
    asked = yield from perform(Ask(2))
    return before, asked, (yield from perform(Sleep()))
