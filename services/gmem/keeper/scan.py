"""`python -m gmem.keeper.scan SOCKET_FD MAJOR MINOR`: look into page tables for others.

The service that serves the views may run without CAP_SYS_PTRACE; the keeper, which has
it, starts this process for it and hands over the other end of the socket. A process of
its own, because a look takes the other process's mmap_lock and may wait: the keeper
never does. It sees the views of one connection only, and ends with its socket.

    {ticket, st_ino, ranges: [[start, stop], ...], left_out: [pid, ...]}
 -> {ticket, runs: [[pid, comm, start, stop], ...], hidden: [pid, ...]}
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from typing import Any, Final

from gmem.runtime import fdpass
from gmem.runtime.mappings import MappingFinder
from gmem.uapi.pages import PgRange

THREADS: Final = 4
RUNS_MAX: Final = 512
"""Runs named in an answer: who they are matters, not how many."""


def serve(control: socket.socket, device: tuple[int, int]) -> None:
    """Answer until the end of input; several threads share the socket."""
    while (message := fdpass.receive(control)) is not None:
        try:
            fdpass.send(control, _look(message.fields, device))
        except (BrokenPipeError, ConnectionResetError):
            break
    # Another thread may wait for a lock of a process that is stuck: leave without it.
    os._exit(0)


def _look(fields: dict[str, Any], device: tuple[int, int]) -> dict[str, Any]:
    left_out = frozenset(int(pid) for pid in fields["left_out"])
    finder = MappingFinder(device, lambda: left_out | {os.getpid()})
    wanted = [PgRange(int(start), int(stop)) for start, stop in fields["ranges"]]
    runs = finder.find(int(fields["st_ino"]), wanted)
    named = [(r.pid, r.comm, r.pages.start, r.pages.stop) for r in runs[:RUNS_MAX]]
    hidden = sorted(finder.hidden)[:RUNS_MAX]
    return {"ticket": fields["ticket"], "runs": named, "hidden": hidden}


def main() -> None:
    """Serve as the module says."""
    number, major, minor = (int(word) for word in sys.argv[1:4])
    control = socket.socket(fileno=number)
    for _ in range(THREADS - 1):
        threading.Thread(
            target=serve, args=(control, (major, minor)), daemon=True
        ).start()
    serve(control, (major, minor))


if __name__ == "__main__":
    main()
