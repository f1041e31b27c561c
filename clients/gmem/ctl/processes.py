"""Processes that gmemctl started, known by pid *and* start time, never by name.

A pid alone may belong to somebody else tomorrow. Every process of a host therefore
carries two marks: a record of pid and start time (field 22 of /proc/PID/stat), and an
environment variable with a random value that only the processes of one `up` have, so
that children of services are found as well. Signals go through a pidfd that was opened
*before* the marks were compared: what was compared is what is signalled.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

TAG_VARIABLE: Final = "GMEM_UP_ID"
"""Environment variable whose value is the same in all processes of one `up`."""

PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class ProcessRecord:
    """One process for ever: no other has both this pid and this start time."""

    name: str
    pid: int
    start_time: int

    @property
    def alive(self) -> bool:
        """Whether it runs: neither gone nor a zombie nor another with its pid."""
        return _start_time(self.pid) == self.start_time


def record(name: str, pid: int) -> ProcessRecord | None:
    """Take down a process that runs now; None when it does not."""
    start_time = _start_time(pid)
    return None if start_time is None else ProcessRecord(name, pid, start_time)


def send(process: ProcessRecord, number: signal.Signals) -> bool:
    """Signal exactly this process; False when it does not run any more."""
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(process.pid)
        try:
            if process.alive:
                signal.pidfd_send_signal(pidfd, number)
                return True
        finally:
            os.close(pidfd)
    return False


def wait_gone(
    processes: Iterable[ProcessRecord], seconds_max: float
) -> list[ProcessRecord]:
    """Wait until all have ended; return those that have not after `seconds_max`."""
    deadline = time.monotonic() + seconds_max
    return [process for process in processes if not _wait_one(process, deadline)]


def spawn(
    command: Sequence[str],
    tag: str,
    log: Path,
    user: tuple[int, int] | None = None,
    *,
    stdin: int = subprocess.DEVNULL,
) -> subprocess.Popen[bytes]:
    """Start a process that outlives this one, in a session of its own.

    What it writes goes to the end of `log`. `user` are uid and gid, where it is not to
    run as ourselves. `stdin` may be a pipe to it.
    """
    uid, gid = user or (None, None)
    with log.open("ab") as output:
        child = subprocess.Popen(
            command,
            stdin=stdin,
            stdout=output,
            stderr=output,
            cwd="/",
            env=child_environment(os.environ, tag),
            start_new_session=True,
            user=uid,
            group=gid,
            extra_groups=None if user is None else [],
        )
    _children[child.pid] = child
    return child


def child_environment(environ: Mapping[str, str], tag: str) -> dict[str, str]:
    """Return the environment of the processes of one `up`.

    GMEM_ variables of ours do not leak in: the services read their settings from such.
    """
    kept = {
        name: value
        for name, value in environ.items()
        if not name.startswith("GMEM_") or name == "GMEM_LOG_LEVEL"
    }
    if path := kept.get("PYTHONPATH"):
        # The processes do not run in this directory.
        parts = [str(Path(part).absolute()) for part in path.split(os.pathsep)]
        kept["PYTHONPATH"] = os.pathsep.join(parts)
    return kept | {TAG_VARIABLE: tag}


def exit_status(pid: int) -> int | None:
    """Return how a child that `spawn` started ended; negative for a signal.

    None while it runs, and for processes of another parent.
    """
    child = _children.get(pid)
    return None if child is None else child.poll()


def tagged(tag: str) -> list[ProcessRecord]:
    """Find every process of one `up`, this one left out, in the order of their pids."""
    needle = f"{TAG_VARIABLE}={tag}".encode()
    pids = sorted(int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit())
    found = [
        record(command_of(pid), pid)
        for pid in pids
        if pid != os.getpid() and needle in _read(pid, "environ").split(b"\0")
    ]
    return [process for process in found if process is not None]


def command_of(pid: int) -> str:
    """Return the command line of a process, or its pid where that is not readable."""
    words = _read(pid, "cmdline").rstrip(b"\0").split(b"\0")
    return b" ".join(words).decode(errors="replace") or f"process {pid}"


# Kept: a Popen that is collected while its process runs is a warning.
_children: dict[int, subprocess.Popen[bytes]] = {}


def _wait_one(process: ProcessRecord, deadline: float) -> bool:
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return True
    try:
        if not process.alive:
            return True
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
    finally:
        os.close(pidfd)


def _start_time(pid: int) -> int | None:
    """Return the start time in clock ticks since boot; None when gone or a zombie."""
    # The command may hold blanks and parentheses: count from the last one.
    fields = _read(pid, "stat").rpartition(b")")[2].split()
    if not fields or fields[0] in {b"Z", b"X"}:
        return None
    return int(fields[19])


def _read(pid: int, name: str) -> bytes:
    """Return a file of /proc/PID; nothing when the process is gone or another's."""
    try:
        return (PROC / str(pid) / name).read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return b""
