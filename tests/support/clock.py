"""Time for worlds that step operations by hand: instants, waits and leases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gmem.effects import Effect
from gmem.guest_memfd.core import effects as fx
from gmem.guest_memfd.core.effects import Waited


class Clock:
    """A clock that a test moves; `now` in milliseconds."""

    def __init__(self) -> None:
        self.now = 0
        self.stopping = False
        # Whether a look at mappings is due: the test decides.
        self.look_again = False
        self.leases: dict[int, fx.ArmLease] = {}
        self.answers: dict[type[Effect[Any]], Callable[[Any], Any]] = {
            fx.StartWait: lambda e: self.now + e.milliseconds,
            fx.TellReleased: lambda e: None,
            fx.ArmLease: self._arm,
            fx.DisarmLease: lambda e: self.leases.pop(e.hold),
        }

    def waited(self, effect: fx.WaitForRelease) -> Waited | None:
        """How a wait ends now; None where it goes on."""
        if self.stopping:
            return Waited.STOPPING
        if effect.references.ended != effect.ended:
            return Waited.AGAIN
        if self.now >= effect.instant:
            return Waited.DEADLINE
        if effect.mapped and self.look_again:
            self.look_again = False
            return Waited.AGAIN
        return None

    def _arm(self, effect: fx.ArmLease) -> None:
        self.leases[effect.hold] = effect
