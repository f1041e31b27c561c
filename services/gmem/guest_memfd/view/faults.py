"""READ and WRITE: answered from the store, or parked until the page is settled.

No thread waits for a parked READ. It ends in one of five ways, whichever is first:
its page opens or gets its folio; its range is closed (EIO); the core refuses (EIO);
FAULT_WAIT_MAX passes (EIO, logged and counted); its caller is being killed (at once).
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Final

import structlog

from gmem.guest_memfd.core.values import PageState, ViewKind
from gmem.guest_memfd.view import callers
from gmem.guest_memfd.view.callbacks import ViewCallbacks
from gmem.guest_memfd.view.channel import Channel
from gmem.guest_memfd.view.counters import Counters
from gmem.guest_memfd.view.node import ParkedRead, ReadVerdict, ViewNode, Wait
from gmem.runtime.fusewire import (
    READ_LOCKOWNER,
    WRITE_CACHE,
    WRITE_LOCKOWNER,
)
from gmem.uapi.pages import PAGE_SHIFT, PAGE_SIZE

FAULT_WAIT_MAX: Final = 4.0
"""Seconds after which a parked READ is EIO."""
SCAN_INTERVAL: Final = 0.02
"""Seconds between two looks at the callers of what is parked."""
REPEAT_SECONDS: Final = 0.25
"""A fault that timed out comes once more: filemap_fault() drops mmap_lock to wait, and
then repeats instead of looking at the error. Within this time it is refused at once."""
ASKS_MAX: Final = 64
"""Folios asked for one READ, each taken away again before it could be answered."""

log = structlog.get_logger(__name__)


class Faults:
    """Serves READ and WRITE of all nodes over one channel."""

    def __init__(
        self,
        channel: Channel,
        callbacks: ViewCallbacks,
        counters: Counters,
        *,
        fault_wait_max: float,
    ) -> None:
        self._channel = channel
        self._callbacks = callbacks
        self._counters = counters
        self._fault_wait_max = fault_wait_max
        self._closing = False
        # (pid, ino, view, pgoff) -> when its READ timed out
        self._timed_out: dict[tuple[int, int, int, int], float] = {}
        self.something_parked = threading.Event()

    def read(
        self,
        node: ViewNode,
        view: ViewKind,
        *,
        unique: int,
        pid: int,
        offset: int,
        size: int,
        read_flags: int,
    ) -> None:
        """Answer a READ, or park it."""
        self._counters.add("reads")
        if read_flags & READ_LOCKOWNER:
            # Past the page cache (O_DIRECT): a guest_memfd has no read handler.
            self._refuse(unique, errno.EINVAL)
            return
        parked = None
        with node.lock:
            verdict = node.read(view, offset, size)
            if verdict.wait is not None and self._may_park(node, view, pid, offset):
                parked = ParkedRead(
                    unique=unique,
                    pid=pid,
                    view=view,
                    pgoff=offset >> PAGE_SHIFT,
                    offset=offset,
                    size=size,
                    since=time.monotonic(),
                )
                node.parked[unique] = parked
                parked.asking = verdict.wait is Wait.FOLIO
        if parked is None:
            self._answer(unique, size, verdict)
            return
        self._counters.add("parked")
        self.something_parked.set()
        if parked.asking:
            self._ask(node, parked)

    def write(
        self,
        node: ViewNode,
        view: ViewKind,
        *,
        offset: int,
        data: memoryview,
        write_flags: int,
    ) -> int:
        """Store a WRITE; return the bytes stored, or a negative errno.

        The store is changed under the node's lock: what closes the page afterwards
        finds the bytes there.
        """
        self._counters.add("writes")
        if write_flags & WRITE_LOCKOWNER:
            self._counters.add("writes_refused")
            return -errno.EINVAL
        with node.lock:
            if node.write_watches:
                node.note_write(view, offset, len(data))
            outcome = node.write(
                view, offset, data, writeback=bool(write_flags & WRITE_CACHE)
            )
        self._counters.add("writes_to_hole", outcome.to_hole)
        self._counters.add("writes_to_closed", outcome.to_closed)
        if outcome.error:
            self._counters.add("writes_refused")
            return -outcome.error
        self._counters.add("pages_written", (len(data) + PAGE_SIZE - 1) >> PAGE_SHIFT)
        return outcome.stored

    def set_state(
        self, node: ViewNode, view: ViewKind, start: int, stop: int, state: PageState
    ) -> None:
        """Change states; the READs that waited for the range are answered with it."""
        with node.lock:
            touched = node.set_state(view, start, stop, state)
        if state is PageState.OPEN:
            self.dispatch_again(node, touched)
            return
        for parked in touched:
            self._refuse(parked.unique, errno.EIO)

    def dispatch_again(
        self, node: ViewNode, reads: Iterable[ParkedRead], *, held: bool = True
    ) -> None:
        """Look at parked READs again: something about their pages has changed."""
        for parked in reads:
            self._look_again(node, parked, held=held)

    def refuse_all(self, node: ViewNode) -> None:
        """Answer every parked READ of a node with EIO: the inode goes away."""
        with node.lock:
            reads = node.claim_all(list(node.parked.values()))
        for parked in reads:
            self._refuse(parked.unique, errno.EIO)

    def close(self) -> None:
        """Park nothing from now on: what would wait is EIO."""
        self._closing = True

    def scan(self, nodes: Iterable[ViewNode]) -> int:
        """End READs whose time is up or whose caller is killed; count the others."""
        left = 0
        for node in nodes:
            with node.lock:
                reads = list(node.parked.values())
            left += len(reads)
            for parked in reads:
                left -= self._end_if_due(node, parked)
        return left

    def _may_park(self, node: ViewNode, view: ViewKind, pid: int, offset: int) -> bool:
        key = (pid, node.ino, view, offset >> PAGE_SHIFT)
        when = self._timed_out.pop(key, None)
        repeated = when is not None and time.monotonic() - when < REPEAT_SECONDS
        return not (self._closing or repeated)

    def _remember_timeout(self, node: ViewNode, parked: ParkedRead) -> None:
        now = time.monotonic()
        for key, when in list(self._timed_out.items()):
            if now - when > REPEAT_SECONDS:
                self._timed_out.pop(key, None)
        self._timed_out[parked.pid, node.ino, parked.view, parked.pgoff] = now

    def _end_if_due(self, node: ViewNode, parked: ParkedRead) -> bool:
        waited = time.monotonic() - parked.since
        overdue = waited > self._fault_wait_max
        if not overdue and not callers.is_being_killed(parked.pid):
            return False
        with node.lock:
            if not node.claim(parked):
                return True
        if overdue:
            self._remember_timeout(node, parked)
        self._refuse(parked.unique, errno.EIO)
        if not overdue:
            self._counters.add("killed")
            return True
        self._counters.add("timeouts")
        log.warning(
            "parked_read_timed_out",
            ino=node.ino,
            view=parked.view.name,
            pgoff=parked.pgoff,
            pid=parked.pid,
            waited_seconds=round(waited, 3),
        )
        return True

    def _ask(self, node: ViewNode, parked: ParkedRead) -> None:
        self._counters.add("host_faults")
        done = partial(self._core_answered, node, parked)
        try:
            self._callbacks.host_fault(node.ino, parked.pgoff, done)
        except Exception:
            # A fault of ours must end in SIGBUS, not in a client that hangs.
            done(False)  # noqa: FBT003 - the protocol of ViewCallbacks.host_fault
            raise

    def _core_answered(self, node: ViewNode, parked: ParkedRead, ok: bool) -> None:
        with node.lock:
            parked.asking = False
            parked.asks += 1
            refused = (not ok or parked.asks > ASKS_MAX) and node.claim(parked)
        if refused:
            self._refuse(parked.unique, errno.EIO)
        elif ok:
            self._look_again(node, parked)

    def _look_again(
        self, node: ViewNode, parked: ParkedRead, *, held: bool = True
    ) -> None:
        with node.lock:
            if node.parked.get(parked.unique) is not parked:
                return
            verdict = node.read(parked.view, parked.offset, parked.size, held=held)
            # Somebody may have punched the folio away again: ask once more.
            ask = verdict.wait is Wait.FOLIO and not parked.asking
            parked.asking |= ask
            if verdict.wait is None:
                del node.parked[parked.unique]
        if ask:
            self._ask(node, parked)
        elif verdict.wait is None:
            self._answer(parked.unique, parked.size, verdict)

    def _answer(self, unique: int, size: int, verdict: ReadVerdict) -> None:
        if verdict.data:
            self._counters.add("pages_read", (size + PAGE_SIZE - 1) >> PAGE_SHIFT)
            self._channel.answer_data(unique, size, verdict.data)
        else:
            self._refuse(unique, verdict.error or errno.EIO)

    def _refuse(self, unique: int, error: int) -> None:
        self._counters.add("reads_refused")
        self._channel.refuse(unique, error)


class Scanner(threading.Thread):
    """Looks at everything parked each SCAN_INTERVAL, and sleeps when nothing is."""

    def __init__(
        self, scan: Callable[[], int], something_parked: threading.Event
    ) -> None:
        super().__init__(name="view-scanner", daemon=True)
        self._scan = scan
        self._something_parked = something_parked
        self._stopping = False

    def run(self) -> None:
        """Scan until stopped."""
        while True:
            self._something_parked.wait()
            if self._stopping:
                return
            # Cleared before the look: what is parked after it sets the event again.
            self._something_parked.clear()
            if self._scan():
                self._something_parked.set()
                time.sleep(SCAN_INTERVAL)

    def stop(self) -> None:
        """End the thread and wait for it."""
        self._stopping = True
        self._something_parked.set()
        self.join()
