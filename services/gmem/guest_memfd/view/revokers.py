"""Threads that may sleep in the kernel, because they hold next to no descriptor.

An invalidation sleeps beyond the reach of any signal until the dirty pages of its range
have been written back and answered. A service that is killed then ends but for that
thread, and what the thread holds stays open. So it has a table of descriptors of its
own (rule V5): the fuse connection, its mount, the page store, standard streams, and the
end of a pipe that wakes the loop of this process. No control connection, port or lock
is among them: whoever listens for our end hears it at once.
"""

from __future__ import annotations

import ctypes
import os
import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from typing import Final, ParamSpec, TypeVar

from gmem.uapi.errors import InUse, Reason

P = ParamSpec("P")
R = TypeVar("R")

STANDARD_STREAMS: Final = frozenset({0, 1, 2})
_CLOSE_RANGE_UNSHARE: Final = 2
_FD_MAX: Final = 0xFFFFFFFF

_libc = ctypes.CDLL(None, use_errno=True)
_libc.close_range.argtypes = [ctypes.c_uint, ctypes.c_uint, ctypes.c_int]
_own = threading.local()


def keep_only(fds: Iterable[int]) -> None:
    """Give the calling thread a table of descriptors of its own, with `fds` alone.

    Threads that it starts share that table. OSError where the kernel refuses.
    """
    bounds = sorted(STANDARD_STREAMS | set(fds))
    for below, above in zip([-1, *bounds], [*bounds, _FD_MAX + 1], strict=True):
        if above - below > 1:
            _close_range(below + 1, above - 1)
    _own.table = True


def is_bare() -> bool:
    """Tell whether the calling thread may sleep in the kernel."""
    return getattr(_own, "table", False)


class Revokers(Executor):
    """Such threads as an Executor; daemons, because nothing can end a sleeping one."""

    def __init__(self, number: int, keep: Iterable[int]) -> None:
        """Start `number` threads that keep the descriptors `keep`.

        InUse where the kernel lets no thread have a table of its own.
        """
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._stopped = False
        keep, started = frozenset(keep), queue.SimpleQueue[OSError | None]()
        self._threads = [
            threading.Thread(
                target=self._run, args=(keep, started), name="revoker", daemon=True
            )
            for _ in range(number)
        ]
        for thread in self._threads:
            thread.start()
        refusals = [error for _ in self._threads if (error := started.get())]
        if refusals:
            self.stop(0)
            raise InUse(
                Reason.BINDING_BROKEN,
                f"no thread may revoke pages ({refusals[0]}): allow close_range(2) in "
                "the seccomp profile of this service",
            )

    def submit(
        self, work: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs
    ) -> Future[R]:
        """Have one of the threads call `work`. InUse after `stop`."""
        if self._stopped:
            raise InUse(
                Reason.BINDING_BROKEN,
                "the views are ending, nothing can be revoked: restart the "
                "guest_memfd service",
            )
        future: Future[R] = Future()

        def call() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work(*args, **kwargs))
            except BaseException as error:  # noqa: BLE001 - goes to whoever asked
                future.set_exception(error)

        self._calls.put(call)
        return future

    def run(self, work: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call `work` in a thread that may sleep: this one, if it is such."""
        if is_bare():
            return work(*args, **kwargs)
        return self.submit(work, *args, **kwargs).result()

    def stop(self, seconds: float) -> None:
        """Finish what was submitted, and end; wait `seconds` for each at most."""
        self._stopped = True
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join(seconds)

    def _run(
        self, keep: frozenset[int], started: queue.SimpleQueue[OSError | None]
    ) -> None:
        try:
            keep_only(keep)
        except OSError as error:
            started.put(error)
        else:
            started.put(None)
        while (call := self._calls.get()) is not None:
            call()


def _close_range(first: int, last: int) -> None:
    if _libc.close_range(first, last, _CLOSE_RANGE_UNSHARE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"close_range: {os.strerror(number)}")
