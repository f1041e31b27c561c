"""A step of the demo: a name, what it shows, what it does, what it must change."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeAlias

from gmem.ctl.demo.report import Change, StepReport
from gmem.ctl.demo.stage import Stage

Action: TypeAlias = Callable[[Stage, StepReport], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Step:
    """One sentence of the story."""

    name: str
    aim: str
    action: Action
    change: Change | None
    """Exact change of the counters; None where the action itself compares them."""
