"""Who maps pages of a view, asked of a process that may look (`gmem.keeper.scan`)."""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any, Protocol

from gmem.runtime import fdpass
from gmem.runtime.mappings import MappedRun
from gmem.uapi.errors import TransportError
from gmem.uapi.pages import PgRange


class Finder(Protocol):
    """What `gmem.runtime.mappings.MappingFinder` does, here or elsewhere."""

    hidden: frozenset[int]

    def find(self, st_ino: int, ranges: Iterable[PgRange]) -> tuple[MappedRun, ...]:
        """Return the present pages of a file in `ranges`, by process; blocks."""


class RemoteFinder:
    """Asks over `control`; `left_out` returns the pids that are not to be looked at.

    `find` may be called from several threads. TransportError when the other process
    is gone: who maps what cannot be known then.
    """

    def __init__(
        self, control: socket.socket, left_out: Callable[[], frozenset[int]]
    ) -> None:
        """Listen for answers in a thread of its own."""
        self.hidden: frozenset[int] = frozenset()
        self._control = control
        self._left_out = left_out
        self._tickets = itertools.count(1)
        self._asked: dict[int, Future[dict[str, Any]]] = {}
        self._lock = threading.Lock()
        self._ended = False
        threading.Thread(target=self._listen, name="scan-replies", daemon=True).start()

    def find(self, st_ino: int, ranges: Iterable[PgRange]) -> tuple[MappedRun, ...]:
        """Return what the other process sees; `hidden` is what it could not look at."""
        ticket = next(self._tickets)
        answer: Future[dict[str, Any]] = Future()
        question = {
            "ticket": ticket,
            "st_ino": st_ino,
            "ranges": [(pages.start, pages.stop) for pages in ranges],
            "left_out": sorted(self._left_out()),
        }
        with self._lock:
            if self._ended:
                raise _gone()
            self._asked[ticket] = answer
            fdpass.send(self._control, question)
        fields = answer.result()
        self.hidden = frozenset(fields["hidden"])
        return tuple(
            MappedRun(pid, comm, PgRange(start, stop))
            for pid, comm, start, stop in fields["runs"]
        )

    def _listen(self) -> None:
        while (message := self._next()) is not None:
            with self._lock:
                answer = self._asked.pop(int(message.fields["ticket"]))
            answer.set_result(message.fields)
        with self._lock:
            self._ended = True
            left, self._asked = list(self._asked.values()), {}
        for answer in left:
            answer.set_exception(_gone())

    def _next(self) -> fdpass.Message | None:
        try:
            return fdpass.receive(self._control)
        except OSError:
            return None


def _gone() -> TransportError:
    return TransportError(
        "the keeper's process that looks into page tables is gone: who has pages "
        "mapped cannot be known; restart the guest_memfd service",
        service="keeper",
    )
