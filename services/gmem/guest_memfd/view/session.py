"""Serves the two views of every inode over one fuse connection.

Threads, all of them daemons that hold no lock while they sleep:

    dispatchers   read requests; answer from the store or park (N >= 3)
    scanner       looks at what is parked each 20 ms
    revokers      write INVAL_INODE, N-1 of them at once

Dispatchers may revoke as well, all but one at once: both kinds own no descriptor whose
closing anybody waits for (`gmem.guest_memfd.view.revokers`).

The session owns neither descriptor: whoever made the connection closes them. It must
live in a process that maps no view (design rule V1).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from types import TracebackType
from typing import Final, Self

import structlog

from gmem.guest_memfd.core.values import PageState, ViewKind
from gmem.guest_memfd.page_states import InodeTable
from gmem.guest_memfd.page_store import PageStore
from gmem.guest_memfd.view.callbacks import ViewCallbacks
from gmem.guest_memfd.view.calls import Calls
from gmem.guest_memfd.view.channel import Channel
from gmem.guest_memfd.view.counters import Counters, ViewStatistics
from gmem.guest_memfd.view.dispatcher import Dispatch, Dispatcher
from gmem.guest_memfd.view.faults import FAULT_WAIT_MAX, Faults, Scanner
from gmem.guest_memfd.view.files import Files, open_by_name, open_by_secret
from gmem.guest_memfd.view.invalidator import SYNC_PAGES_MIN, Invalidator
from gmem.guest_memfd.view.node import ViewNode, WriteWatch
from gmem.guest_memfd.view.quiesce import Revoker, Runs
from gmem.guest_memfd.view.revokers import Revokers
from gmem.runtime.backend import Backend
from gmem.runtime.fusewire import nodeid_of
from gmem.uapi.errors import BadRequest, InUse, NoSuchObject, Reason
from gmem.uapi.pages import PAGE_SHIFT, PgRange

log = structlog.get_logger(__name__)

DISPATCHERS_MIN: Final = 3
REVOKERS: Final = 8
"""Threads that revoke, or wait until they may."""
END_SECONDS_MAX: Final = 5.0
"""How long an orderly end waits for each of them; dispatchers still answer."""


class ViewSession:
    """One fuse connection and the views behind it.

    `fuse_fd` is the connection, `mount_fd` an O_PATH descriptor of the mount's root,
    `fault_wait_max` the seconds a READ may be parked. Threads start with `start()`;
    `st_dev` is the device number of all views from then on. `keep` are descriptors
    that its callbacks need, beside those of the session: see `revokers`.

    From the event loop's thread only `add_inode`, `set_state` and `statistics` may be
    called; the others block. What revokes runs in `revokers`, whoever calls it.
    """

    backend: Final = Backend.FUSE.value
    sees_faults: Final = True
    moves_bytes: Final = False

    def __init__(
        self,
        fuse_fd: int,
        mount_fd: int,
        store: PageStore,
        callbacks: ViewCallbacks,
        *,
        dispatchers: int = 4,
        fault_wait_max: float = FAULT_WAIT_MAX,
        keep: Iterable[int] = (),
    ) -> None:
        if dispatchers < DISPATCHERS_MIN:
            raise BadRequest(
                Reason.ARGUMENT_INVALID,
                f"{dispatchers} dispatchers can deadlock: take at least "
                f"{DISPATCHERS_MIN}",
            )
        self._mount_fd = mount_fd
        self._store = store
        self._nodes: dict[int, ViewNode] = {}
        self._kept = frozenset({fuse_fd, mount_fd, store.fd, *keep})
        self._counters = Counters()
        self._channel = Channel(fuse_fd)
        self._faults = Faults(
            self._channel, callbacks, self._counters, fault_wait_max=fault_wait_max
        )
        self._files = Files(self._nodes, callbacks, self._counters)
        self._calls = Calls(
            self._channel, callbacks, self._counters, self._faults.something_parked
        )
        self._dispatch = Dispatch(self._nodes, self._faults, self._files, self._calls)
        self._dispatchers = [self._dispatcher(number) for number in range(dispatchers)]
        self._scanner = Scanner(self._scan, self._faults.something_parked)
        self._invalidator = Invalidator(fuse_fd, dispatchers - 1)
        self._revoker = Revoker(self._faults, self._invalidator, self._counters)
        self.revokers: Revokers
        self._ending = threading.Lock()
        self._alive = dispatchers
        self._waker_tid = 0
        self._stopped = False
        self.st_dev = 0

    def start(self, *, resend: bool = False) -> Self:
        """Start all threads; wait for the first answer of ours.

        With `resend` the kernel first queues again what a predecessor had read and did
        not answer: nobody else reads requests now. Raises InUse when the connection
        has ended already.
        """
        if resend:
            self._channel.resend()
        self.revokers = Revokers(REVOKERS, self._kept)
        for dispatcher in self._dispatchers:
            dispatcher.start()
        self._scanner.start()
        try:
            self.st_dev = os.fstat(self._mount_fd).st_dev
        except OSError as error:
            raise InUse(
                Reason.BINDING_BROKEN,
                f"the fuse connection does not answer ({error.strerror}): start the "
                "keeper again",
            ) from error
        return self

    @property
    def is_connected(self) -> bool:
        """False once the kernel has ended the connection: all views fail closed."""
        return not self._channel.dead

    def new_table(self, ino: int, i_size: int, page_size: int) -> InodeTable:
        """Make the page states of a new inode."""
        return InodeTable.create(ino, i_size, page_size)

    def add_inode(
        self,
        table: InodeTable,
        *,
        host_mmap: bool = True,
        counts_blocks: bool = True,
    ) -> None:
        """Serve the views of an inode that is not served yet.

        Without `host_mmap`, mmap of the host view is ENODEV; without `counts_blocks`
        st_blocks stays 0.
        """
        assert table.ino not in self._nodes, table.ino
        self._nodes[table.ino] = ViewNode(
            table, self._store, host_mmap=host_mmap, counts_blocks=counts_blocks
        )

    def remove_inode(self, ino: int) -> None:
        """Serve an inode no longer: parked READs are EIO, later requests EIO or ESTALE.

        Its pages must have been closed and invalidated before.
        """
        node = self._node(ino)
        del self._nodes[ino]
        self._faults.refuse_all(node)

    def set_state(
        self, ino: int, view: ViewKind, start: int, stop: int, state: PageState
    ) -> None:
        """Give pages `[start, stop)` of a view a state.

        CLOSING and CLOSED answer every parked READ of the range with EIO; OPEN looks
        at them again. On return no READ that was parked in a closed range is left.
        """
        self._faults.set_state(self._node(ino), view, start, stop, state)

    def invalidate(self, ino: int, view: ViewKind, start: int, stop: int) -> bool:
        """Drop pages from every mapping, dirty bytes stored first; blocks until done.

        Tells whether there were dirty bytes, or some arrived of the kernel's own will.
        Exactly this range. It must be closed, or nobody must convert it: an OPEN
        range can be faulted in again at once. InUse when the connection is gone.
        """
        node = self._node(ino)
        writes = WriteWatch(view, start, stop)
        with node.lock:
            node.write_watches.append(writes)
        try:
            self.revokers.run(self._invalidate, node, view, start, stop)
        finally:
            with node.lock:
                node.write_watches.remove(writes)
        return writes.seen

    def quiesce(self, ino: int, view: ViewKind, start: int, stop: int) -> Runs:
        """Have no page of a range cached and new READs wait; return what to reopen.

        Pages that were not OPEN are left alone: the runs of pages returned, which are
        QUIESCED now, are to be set OPEN within `fault_wait_max`. Blocks. Raises
        Contended when clients refault faster than they can be held (nothing changed),
        InUse when the connection is gone.
        """
        node = self._node(ino)
        return self.revokers.run(self._quiesce, node, view, start, stop)

    def write_back(self, ino: int, view: ViewKind, start: int, stop: int) -> None:
        """Have dirty pages of a range stored; nothing is unmapped. Blocks.

        InUse when the connection is gone.
        """
        self._counters.add("write_backs")
        self.revokers.run(self._write_back, self._node(ino), view, [(start, stop)])
        if not self.is_connected:
            raise InUse(
                Reason.BINDING_BROKEN,
                "the fuse connection has ended: what programs wrote may be lost; start "
                "the host again",
            )

    def load(self, ino: int, offset: int, size: int) -> bytes:
        """Return bytes of the store; each page has a folio."""
        node = self._node(ino)
        with node.lock:
            return b"".join(node.data(offset, offset + size))

    def store(self, ino: int, view: ViewKind, offset: int, data: bytes) -> None:
        """Store bytes; each page has a folio and none is cached or CLOSED."""
        node = self._node(ino)
        with node.lock:
            outcome = node.write(view, offset, memoryview(data), writeback=True)
        assert outcome.stored == len(data), outcome

    def open_view(self, ino: int, view: ViewKind) -> int:
        """Open a view and return its descriptor (O_RDWR, close-on-exec); blocks.

        The descriptor is for handing out: this process must not map it.
        """
        self._node(ino)
        if view is ViewKind.HOST:
            return open_by_name(self._mount_fd, ino)
        nodeid = nodeid_of(ino, view)
        return open_by_secret(self._mount_fd, self._files, nodeid, internal=False)

    def open_count(self, ino: int, view: ViewKind) -> int:
        """Return how many open files of a view exist outside this session."""
        return self._node(ino).table.opens(view)

    @staticmethod
    def st_ino(ino: int, view: ViewKind) -> int:
        """Return the inode number that fstat and /proc/PID/maps show for a view."""
        return nodeid_of(ino, view)

    def inode_of(self, st_dev: int, st_ino: int) -> int | None:
        """Return the inode whose host view fstat shows so; None for other files."""
        if not self.is_view(st_dev, st_ino) or st_ino & ViewKind.GUEST:
            return None
        return st_ino >> 1

    def is_view(self, st_dev: int, st_ino: int) -> bool:
        """Tell whether a file lies on our mount."""
        del st_ino
        return st_dev == self.st_dev

    def open_states(self, ino: int) -> int | None:
        """None: a client is refused by its page faults."""
        del ino
        return None

    def touched(self, ino: int) -> list[PgRange]:
        """None: a touched hole is a READ."""
        del ino
        return []

    def ended_opens(self) -> list[tuple[int, ViewKind]]:
        """None: a closed file is a RELEASE."""
        return []

    def statistics(self) -> ViewStatistics:
        """Return a snapshot of the counters."""
        parked = sum(len(node.parked) for node in list(self._nodes.values()))
        return self._counters.total(parked_now=parked)

    def parked_callers(self) -> frozenset[int]:
        """Return the threads (tids) that wait in a parked READ."""
        nodes = list(self._nodes.values())
        return frozenset(
            parked.pid for node in nodes for parked in list(node.parked.values())
        )

    def stop(self) -> None:
        """End all threads; what is parked is EIO. Blocks, bounded.

        Requests that come later wait in the connection: abort it, or let a successor
        answer them.
        """
        if self._stopped:
            return
        self._stopped = True
        self._faults.close()
        for node in list(self._nodes.values()):
            self._faults.refuse_all(node)
        self._calls.refuse_all()
        # While dispatchers still answer: an invalidation under way needs them.
        self.revokers.stop(END_SECONDS_MAX)
        self._wake_dispatchers()
        self._scanner.stop()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _node(self, ino: int) -> ViewNode:
        node = self._nodes.get(ino)
        if node is None:
            raise NoSuchObject(
                Reason.INODE_UNKNOWN, f"inode {ino} has no views: create it first"
            )
        return node

    def _dispatcher(self, number: int) -> Dispatcher:
        parts = self._channel, self._dispatch, self._counters, self._finished
        return Dispatcher(number, *parts, keep=self._kept)

    def _scan(self) -> int:
        return self._faults.scan(list(self._nodes.values())) + self._calls.scan()

    def _invalidate(
        self, node: ViewNode, view: ViewKind, start: int, stop: int
    ) -> None:
        runs = self._revoker.revocable(node, view, start, stop)
        self._write_back(node, view, _large(runs))
        self._revoker.invalidate(node, view, runs)

    def _quiesce(self, node: ViewNode, view: ViewKind, start: int, stop: int) -> Runs:
        if stop - start >= SYNC_PAGES_MIN and node.table.attached_in(start, stop):
            runs = self._revoker.revocable(node, view, start, stop)
            self._write_back(node, view, _large(runs))
        return self._revoker.quiesce(node, view, start, stop)

    def _write_back(self, node: ViewNode, view: ViewKind, runs: Runs) -> None:
        """Have what is dirty come back in large pieces; nothing is unmapped."""
        # Where nobody has it open nothing is dirty: munmap and exit write back.
        if not runs or node.table.opens(view) == 0:
            return
        # It takes its time: whose system call this is may be killed meanwhile.
        self._faults.something_parked.set()
        nodeid = nodeid_of(node.ino, view)
        fd = open_by_secret(self._mount_fd, self._files, nodeid, internal=True)
        try:
            for start, stop in runs:
                self._counters.add("syncs")
                offset, length = start << PAGE_SHIFT, (stop - start) << PAGE_SHIFT
                self._invalidator.write_back(fd, offset, length)
        finally:
            os.close(fd)

    def _wake_dispatchers(self) -> None:
        """End the dispatchers, which sleep in read(2), by asking them something.

        Each ends after one more request. The last one ends only with a request of the
        waker: were it to end with somebody else's, the waker would wait for ever.
        """
        waker = threading.Thread(target=self._wake, name="view-waker", daemon=True)
        waker.start()
        for thread in (waker, *self._dispatchers):
            thread.join()

    def _wake(self) -> None:
        self._waker_tid = threading.get_native_id()
        while self._alive and not self._channel.dead:
            try:
                os.fstat(self._mount_fd)
            except OSError as error:
                # The connection was aborted: every reader has ended or will.
                log.info("view_session_disconnected", error=error.strerror)
                return

    def _finished(self, pid: int) -> bool:
        if not self._stopped or not self._waker_tid:
            return False
        with self._ending:
            if self._alive == 1 and pid != self._waker_tid:
                return False
            self._alive -= 1
            return True


def _large(runs: Runs) -> Runs:
    """Return those that are written back before an invalidation, which is slower."""
    return [(start, stop) for start, stop in runs if stop - start >= SYNC_PAGES_MIN]
