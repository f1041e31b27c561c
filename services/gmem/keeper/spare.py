"""A successor that is loaded already: most of what a start takes is spent beforehand.

It is the service's command, held: it waits for a line on its stdin, and has no lock, no
journal, no port and no descriptor of the service until then. When the keeper ends its
stdin closes, and it ends.

One that dies is replaced, within the limits of `restarts`: what cannot load is not
tried for ever, and a service that dies then is started as without a spare.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Final

from gmem.keeper import pids
from gmem.keeper.making import log
from gmem.keeper.restarts import Restarts, ServicePlan, spawn

QUIET_SECONDS: Final = 3.0
"""After the first service: the others of its host are still being started."""
SETTLE_SECONDS: Final = 0.2
"""After a takeover: whoever waited for it is answered first."""


class Spare:
    """At most one process that waits; none where the plan says so, or has no command.

    Times are those of time.monotonic().
    """

    def __init__(self, plan: ServicePlan, run_dir: Path) -> None:
        self._plan = plan
        self._path = run_dir / pids.SPARE
        self._child: subprocess.Popen[bytes] | None = None
        self._spawned_at = 0.0
        self._spawn_at: float | None = None
        self._deaths = Restarts()

    def want(self, at: float) -> None:
        """Have one spawned at `at`, unless there is one."""
        if self._plan.spare and self._plan.command and self._child is None:
            self._spawn_at = at

    def look(self, now: float) -> None:
        """Spawn one when it is time; notice the death of one."""
        if self._child is not None and self._child.poll() is not None:
            log("spare_died", pid=self._child.pid, status=self._child.returncode)
            self._forget(self._child)
            self._again(now)
        if self._spawn_at is not None and now >= self._spawn_at:
            self._spawn(now)

    def take(self) -> subprocess.Popen[bytes] | None:
        """Let it start, loaded or not yet: it is the service now. None: there is none.

        No other is spawned until it is wanted.
        """
        self._spawn_at = None
        child = self._child
        if child is None:
            return None
        try:
            self._forget(child, b"\n")
        except BrokenPipeError:
            # It has ended, or hears nobody any more.
            child.kill()
            log("spare_died", pid=child.pid, status=child.wait())
            return None
        return child

    def close(self) -> None:
        """End it."""
        self._spawn_at = None
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._forget(self._child)

    def _spawn(self, now: float) -> None:
        self._spawn_at = None
        self._spawned_at = now
        try:
            self._child = spawn(self._plan, held=True)
        except OSError as error:
            log("cannot_spawn_spare", why=str(error))
            self._again(now)
            return
        pids.write(self._path, self._child.pid)
        log("spare_spawned", pid=self._child.pid)

    def _again(self, now: float) -> None:
        """Have the next one spawned, later or never."""
        self._spawn_at = self._deaths.next(now, now - self._spawned_at)
        if self._spawn_at is None:
            why = f"{self._deaths.limit} died in half a minute"
            log("no_spare", why=f"{why}: the next is tried after the next takeover")

    def _forget(self, child: subprocess.Popen[bytes], word: bytes = b"") -> None:
        """Have no spare; tell the one there was a last word. BrokenPipeError."""
        self._child = None
        self._path.unlink(missing_ok=True)
        assert child.stdin is not None
        with child.stdin:
            child.stdin.write(word)
