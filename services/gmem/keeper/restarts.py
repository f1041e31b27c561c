"""Starting the service again: at once, and slower when it dies again and again.

The first half of the starts that it has in RESTART_SECONDS is spent at once: whoever
waits for it should not wait for a pause, and the same crash seldom follows. Of the
other half each start after a short life comes later than the one before, so that what
passes (memory was short) has time to pass. After RESTARTS_MAX it is given up: something
is wrong that another start does not mend, and clients must not wait for ever.
"""

from __future__ import annotations

import os
import subprocess
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

RESTARTS_MAX: Final = 5
RESTART_SECONDS: Final = 30.0
LONG_LIFE_SECONDS: Final = 1.0
"""A service that served this long is started again without a pause."""
PAUSE_SECONDS: Final = 0.5
"""The first pause; doubled after each short life, up to PAUSE_SECONDS_MAX."""
PAUSE_SECONDS_MAX: Final = 5.0
HELD: Final = ("--start-on-stdin", "1")
"""What has the service load everything and then wait for a line."""


@dataclass(frozen=True, slots=True)
class ServicePlan:
    """How the service is started: its command, its log, and as whom.

    Without a command somebody else starts it (a container engine); the keeper waits.
    """

    command: tuple[str, ...] = ()
    log: Path | None = None
    uid: int | None = None
    gid: int | None = None
    restarts_max: int = RESTARTS_MAX
    spare: bool = False
    """Whether a successor is loaded before it is needed."""


@dataclass(slots=True)
class Restarts:
    """When to start again; times are those of time.monotonic()."""

    limit: int = RESTARTS_MAX
    _times: deque[float] = field(default_factory=deque)
    _pause: float = 0.0

    def next(self, now: float, lived: float) -> float | None:
        """Return when to start after a life of `lived` seconds; None: give up."""
        while self._times and now - self._times[0] > RESTART_SECONDS:
            self._times.popleft()
        if len(self._times) >= self.limit:
            return None
        if lived >= LONG_LIFE_SECONDS or len(self._times) < self.limit // 2:
            self._pause = 0.0
        else:
            self._pause = min(max(2 * self._pause, PAUSE_SECONDS), PAUSE_SECONDS_MAX)
        self._times.append(now)
        return now + self._pause


def spawn(plan: ServicePlan, *, held: bool = False) -> subprocess.Popen[bytes]:
    """Start the service in a session of its own. OSError where that fails.

    One that is `held` starts when it gets a line on its stdin.
    """
    log = os.open(
        plan.log or os.devnull, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
    )
    try:
        return subprocess.Popen(
            [*plan.command, *(HELD if held else ())],
            stdin=subprocess.PIPE if held else subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            start_new_session=True,
            user=plan.uid,
            group=plan.gid,
            extra_groups=None if plan.uid is None else [],
        )
    finally:
        os.close(log)
