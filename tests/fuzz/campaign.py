"""Plays scripts on two kernels at once, and stops at the first unlisted difference."""

from __future__ import annotations

import math
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded

from tests.fuzz.differences import DIFFERENCES, Difference, find
from tests.fuzz.operations import Operation
from tests.fuzz.player import ABSENT, Player
from tests.fuzz.strategies import scripts

SCRIPTS_MAX: Final = 2000
"""Hypothesis remembers what it has drawn: more than so many come from another seed."""
SHRINK_SECONDS_MAX: Final = 20.0
REARM_SECONDS: Final = 10.0


class _TimeIsUp(BaseException):
    """Ends a run of Hypothesis, which has no clock; no Exception: that would shrink."""


class DifferentError(AssertionError):
    """Two kernels gave results that differ, and no row says why."""

    def __init__(self, operation: Operation, first: str, second: str) -> None:
        super().__init__(f"{operation}: {first} and {second}")


@dataclass
class Report:
    """What a campaign did."""

    scripts: int = 0
    operations: Counter[str] = field(default_factory=Counter)
    results: Counter[str] = field(default_factory=Counter)
    met: Counter[Difference] = field(default_factory=Counter)
    seconds: float = 0.0
    failure: Exception | None = None
    script: Sequence[Operation] = ()

    def lines(self, rows: Sequence[Difference] = DIFFERENCES) -> list[str]:
        """Return it as text."""
        total = sum(self.operations.values())
        speed = total / self.seconds if self.seconds else 0.0
        differed = sum(self.met.values()) + (self.failure is not None)
        kinds = ", ".join(f"{n} {kind}" for kind, n in self.operations.most_common())
        words = ", ".join(f"{n} {word}" for word, n in self.results.most_common())
        did = f"{total} operations in {self.scripts} scripts, {self.seconds:.1f} s"
        text = [
            f"{did}, {speed:.0f} a second; {differed} differed",
            f"operations: {kinds}",
            f"results: {words}",
        ]
        text += [f"{self.met[row]} times {row}" for row in rows if self.met[row]]
        text += [f"unused: {row}" for row in rows if not self.met[row]]
        if self.failure is not None:
            text += traceback.format_exception(self.failure)
        return text


class Campaign:
    """Two players in step; the first is Linux, as far as rows are concerned."""

    def __init__(
        self,
        first: Player,
        second: Player,
        rows: Sequence[Difference] = DIFFERENCES,
    ) -> None:
        """Take over both; who made them closes them."""
        self._players = (first, second)
        self._rows = rows
        self.report = Report()
        self._ends = math.inf
        self._shrink_seconds = SHRINK_SECONDS_MAX
        self._rearm = 0.0

    def play(self, script: Sequence[Operation]) -> None:
        """Play one script; DifferentError where the results differ without a row."""
        self.report.scripts += 1
        try:
            for operation in script:
                self._step(operation)
        except Exception as error:
            self.report.failure = error
            self.report.script = script
            raise
        finally:
            for player in self._players:
                player.reset()

    def run(
        self,
        *,
        seconds: float = math.inf,
        examples: int = SCRIPTS_MAX,
        seed: int = 0,
        shrink_seconds: float = SHRINK_SECONDS_MAX,
    ) -> Report:
        """Draw scripts for a time, and no more than a number; stop at a difference.

        The report of a difference has the shortest script that shows it.
        """
        started = time.monotonic()
        self._ends, self._shrink_seconds = started + seconds, shrink_seconds
        try:
            while self.report.scripts < examples and self.report.failure is None:
                left = examples - self.report.scripts
                self._batch(min(SCRIPTS_MAX, left), seed + self.report.scripts)
        except _TimeIsUp:
            pass
        except Exception:
            if self.report.failure is None:
                raise
        self._shorten()
        self.report.seconds = time.monotonic() - started
        return self.report

    def _batch(self, examples: int, seed: int) -> None:
        """Let Hypothesis draw and play some scripts; a failing one is shrunk."""
        wanted = settings(
            max_examples=examples,
            database=None,
            deadline=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
            print_blob=False,
            report_multiple_bugs=False,
        )

        def play(script: Sequence[Operation]) -> None:
            self._look_at_the_clock()
            self.play(script)

        seeded(seed)(wanted(given(scripts())(play)))()

    def _shorten(self) -> None:
        """Leave out what a failing script fails without.

        Hypothesis cannot: the first operations are always drawn.
        """
        failure = self.report.failure
        if failure is None:
            return
        for operation in self.report.script:
            script = [one for one in self.report.script if one is not operation]
            with suppress(type(failure)):
                self.play(script)

    def _look_at_the_clock(self) -> None:
        now = time.monotonic()
        if self.report.failure is not None:
            # Counted from the first look after it.
            self._ends = min(self._ends, now + self._shrink_seconds)
            self._shrink_seconds = math.inf
        if now > self._ends:
            raise _TimeIsUp
        if now > self._rearm:
            self._rearm = now + REARM_SECONDS
            for player in self._players:
                player.kernel.begin()

    def _step(self, operation: Operation) -> None:
        first, second = (player.play(operation) for player in self._players)
        if (first, second) == (ABSENT, ABSENT):
            return
        self.report.operations[type(operation).__name__] += 1
        if first == second:
            self.report.results[_kind_of(first)] += 1
            return
        row = find(self._rows, operation, first, second)
        if row is None:
            raise DifferentError(operation, first, second)
        self.report.met[row] += 1
        # Only one of the two has it now: without it both are alike again.
        for player in self._players:
            player.forget(operation)


def _kind_of(word: str) -> str:
    """Sort results for the report: bytes and stat are one kind each."""
    if word == ABSENT or word[:1] in "ES":
        return word
    return "0" if word == "0" else "bytes"
