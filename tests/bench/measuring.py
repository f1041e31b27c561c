"""Two sides measured in turn, and what follows: medians, their ratio, met or missed."""

from __future__ import annotations

import asyncio
import statistics
import time
import tomllib
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

TARGETS: Final = Path(__file__).with_name("targets.toml")
IN_FLIGHT: Final = 32

Measure = Callable[[], Awaitable[float]]


@dataclass(frozen=True, slots=True)
class Target:
    """One row of targets.toml."""

    row: str
    title: str
    reference: str
    unit: str
    better: str
    target: float
    cause_if_missed: str = ""

    def is_met(self, ratio: float) -> bool:
        """Tell whether a ratio reaches the target, or does not pass it."""
        return ratio >= self.target if self.better == "more" else ratio <= self.target


@dataclass(frozen=True, slots=True)
class Result:
    """What one row came to; without values it was not measured, and `outcome` says why.

    `ours` and `reference` are medians in the row's unit; `rounds` has each pair.
    """

    row: str
    conditions: str
    ours: float | None
    reference: float | None
    ratio: float | None
    target: float
    met: bool
    outcome: str
    cause: str = ""
    rounds: tuple[tuple[float, float], ...] = ()


def load_targets(path: Path = TARGETS) -> dict[str, Target]:
    """Read the rows, in the order of the file."""
    with path.open("rb") as file:
        rows = tomllib.load(file)
    return {row: Target(row=row, **fields) for row, fields in rows.items()}


def result_of(
    target: Target, rounds: list[tuple[float, float]], notes: Iterable[str]
) -> Result:
    """Return what the rounds of a row came to."""
    ours, reference = (statistics.median(side) for side in zip(*rounds, strict=True))
    ratio = ours / reference
    met = target.is_met(ratio)
    return Result(
        row=target.row,
        conditions=_conditions(target, notes),
        ours=ours,
        reference=reference,
        ratio=ratio,
        target=target.target,
        met=met,
        outcome="met" if met else "missed",
        cause="" if met else target.cause_if_missed or "not known",
        rounds=tuple(rounds),
    )


def unmeasured(target: Target, outcome: str) -> Result:
    """Return the result of a row that was not measured."""
    conditions = _conditions(target, ())
    return Result(
        target.row, conditions, None, None, None, target.target, met=False,
        outcome=outcome,
    )  # fmt: skip


def _conditions(target: Target, notes: Iterable[str]) -> str:
    said = "; ".join([f"{target.title}, against {target.reference}", *notes])
    return f"{said} ({target.unit})"


async def alternate(
    ours: Measure, reference: Measure, rounds: int
) -> list[tuple[float, float]]:
    """Measure both sides in each round; who goes first changes each time."""
    pairs = []
    for number in range(rounds):
        if number % 2:
            second = await reference()
            first = await ours()
        else:
            first = await ours()
            second = await reference()
        pairs.append((first, second))
    return pairs


async def median_call(call: Callable[[], Awaitable[Any]], count: int) -> float:
    """Return the median of `count` calls, one after the other; seconds."""
    found = []
    for _ in range(count):
        began = time.perf_counter()
        await call()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


async def rate(calls: Iterable[Callable[[], Awaitable[Any]]]) -> float:
    """Return how many calls end in a second with IN_FLIGHT of them under way."""
    todo = iter(list(calls))
    done = 0

    async def one_after_the_other() -> None:
        nonlocal done
        for call in todo:
            await call()
            done += 1

    began = time.perf_counter()
    await asyncio.gather(*(one_after_the_other() for _ in range(IN_FLIGHT)))
    return done / (time.perf_counter() - began)
