"""The guest_memfd service put together: core, views, store, broker, and who asks what.

Three sides meet here: RPCs (in `servicer`), requests of the kernel (`host_fault` and
the other callbacks, from dispatcher threads), and clients that end (from the broker).
All of them start operations of one core. Its steps run under one mutex: a step is a
few microseconds of Python and holds the interpreter lock anyway, so a mutex per inode
would buy nothing and could not serve a conversion that spans inodes. It is never held
across an effect; what waits is a Lock of an inode, and that is core state.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import structlog

from gmem.effects import Op, T
from gmem.guest_memfd import ioctls, recovery
from gmem.guest_memfd.accounting import Accounting
from gmem.guest_memfd.codec import Names
from gmem.guest_memfd.core.effects import ScheduleMerge
from gmem.guest_memfd.core.lineage import RULES, LineageRules
from gmem.guest_memfd.core.registry import GuestMemfdCore
from gmem.guest_memfd.core.values import FaultOutcome, Mapped, ViewKind
from gmem.guest_memfd.page_states import InodeTable
from gmem.guest_memfd.recovery import Misplaced
from gmem.guest_memfd.view.handover import Handover
from gmem.guest_memfd.views import Views
from gmem.runtime.broker import Broker, Session
from gmem.runtime.drive import Runner
from gmem.runtime.events import EventLog
from gmem.runtime.journal import Journal
from gmem.uapi.errors import Errno, KernelError
from gmem.uapi.flags import Faultability
from gmem.uapi.lineage import Lineage
from gmem.uapi.pages import PgOff

if TYPE_CHECKING:
    from gmem.guest_memfd.memory_ports import MemoryPorts

SLEEPING_DISPATCHERS_MAX: Final = 2
"""Dispatcher threads that may be inside a revocation at once (rule V5)."""

BACK_SECONDS_MAX: Final = 10.0
"""How long a client's holds wait for it after a restart of this service."""

log = structlog.get_logger(__name__)


class GuestMemfdService:
    """One host's inodes, and every way in; implements the view session's callbacks.

    `runner`, `session` and `kept` are given after construction, because each
    needs the other.
    """

    runner: Runner
    session: Views
    kept: Handover

    def __init__(
        self,
        host: str,
        broker: Broker,
        events: EventLog,
        journal: Journal,
        rules: Mapping[Lineage, LineageRules] = RULES,
    ) -> None:
        self.core = GuestMemfdCore(f"hosts/{host}/guestMemfds", rules)
        self.names = Names(host)
        self.broker = broker
        self.mutex = threading.Lock()
        self._sleepers = threading.Semaphore(SLEEPING_DISPATCHERS_MAX)
        self.journal = journal
        self._events = events
        self._guest_pids: set[int] = set()
        self.accounting = Accounting(self)
        broker.on_hello(self._client_came)
        broker.on_gone(self._client_gone)

    async def run(self, op: Op[T]) -> T:
        """Run an operation to its end, whatever becomes of the caller (V9)."""
        return await self.runner.run(op, self.mutex)

    async def run_in_worker(self, op: Op[T]) -> T:
        """As `run`, for what revokes: one thread that may sleep does all of it."""
        workers = self.session.revokers
        return await self.runner.run_in_worker(op, self.mutex, workers)

    def record(self, kind: str, inode: int, **details: object) -> None:
        """Tell the watchers of a change of one inode."""
        self._events.record(kind, self.names.of(inode), **details)

    @property
    def left_out(self) -> frozenset[int]:
        """The processes whose page tables are no host mappings: stage 2, and ours."""
        return frozenset({os.getpid(), *self._guest_pids})

    def schedule_merge(self, effect: ScheduleMerge) -> None:
        """Start the work on what a dead inode left; nobody waits for it."""
        op = self.core.merge(effect.number)
        self.runner.start_from_thread(op, self.mutex, _logged("merge"))

    def parked_clients(self) -> frozenset[str]:
        """Return the clients of which a thread waits in a parked READ (rule V6)."""
        tids = self.session.parked_callers()
        return frozenset(
            f"{session.client}/{session.incarnation}"
            for session in self.broker.sessions
            for tid in tids
            if session.pid and Path(f"/proc/{session.pid}/task/{tid}").exists()
        )

    def lease_expired(self, hold: int, renewals: int) -> None:
        """End a hold whose lease ran out; nobody waits for it."""

        def ended(future: Future[bool]) -> None:
            _logged("lease_expired")(future)
            if future.exception() is None and future.result():
                log.warning("lease_expired", hold=hold)

        op = self.core.lease_expired(hold, renewals)
        self.runner.start_from_thread(op, self.mutex, ended)

    def mint(self, inode: int, view: ViewKind, *, vm: str, guest_pid: int) -> str:
        """Return a one-time token for a view; a guest view's is bound to `guest_pid`.

        The file is opened when the token is shown, by a worker thread. Raises what
        GuestMemfdCore.check_open_view does.
        """
        self._check_open_view(inode, view, vm)

        async def open_view() -> list[int]:
            # The file may have been closed since, or the VM's last slot unbound.
            self._check_open_view(inode, view, vm)
            fds = [await asyncio.to_thread(self.session.open_view, inode, view)]
            if view is ViewKind.GUEST:
                self._guest_pids.add(guest_pid)
                self._note_clients()
                return fds
            states = self.session.open_states(inode)
            return fds if states is None else [*fds, states]

        pid = guest_pid if view is ViewKind.GUEST else None
        return self.broker.mint(open_view, pid=pid)

    def _check_open_view(self, inode: int, view: ViewKind, vm: str) -> None:
        with self.mutex:
            self.core.check_open_view(inode, view, vm)

    # Requests of the kernel, in dispatcher threads.

    def host_fault(self, ino: int, pgoff: int, done: Callable[[bool], None]) -> None:
        """Have a folio attached; SIGBUS is `done(False)`."""

        def ended(future: Future[FaultOutcome]) -> None:
            error = future.exception()
            if error is None and isinstance(future.result(), Mapped):
                done(True)  # noqa: FBT003 - a callback of the session
                return
            outcome = error if error is not None else future.result()
            log.info("host_fault_is_sigbus", inode=ino, page=pgoff, why=str(outcome))
            done(False)  # noqa: FBT003

        op = self.core.host_fault(ino, PgOff(pgoff))
        self.runner.start_from_thread(op, self.mutex, ended)

    def fallocate(
        self,
        ino: int,
        mode: int,
        offset: int,
        length: int,
        done: Callable[[int], None],
    ) -> None:
        """Allocate in the host view, or punch a hole in it, as fallocate does."""

        def ended(future: Future[None]) -> None:
            error = future.exception()
            if error is None:
                self.record("inode.fallocated", ino, mode=mode, offset=hex(offset))
            self.journal.when_committed(lambda lost: done(_errno_of(error or lost)))

        op = self.core.fallocate(ino, mode, offset, length)
        self.runner.start_from_thread(op, self.mutex, ended)

    def ioctl(
        self, ino: int, cmd: int, data: bytes, done: Callable[[int, bytes], None]
    ) -> None:
        """Convert a range as the file's lineage does by ioctl; others are ENOTTY."""
        call = ioctls.decode(cmd, data)
        if call is None:
            done(Errno.ENOTTY, b"")
            return

        def ended(future: Future[None]) -> None:
            error = future.exception()
            if error is None:
                to = "shared" if call.to is Faultability.ALL else "private"
                self.record(
                    "inode.converted",
                    ino,
                    offset=hex(call.offset),
                    size=hex(call.size),
                    to=to,
                )
            answer = call.answer(error)
            self.journal.when_committed(
                lambda lost: done(_errno_of(error or lost), answer)
            )

        op = call.op(self.core, ino)
        # Some dispatchers must be left: a revocation waits for WRITEs that they answer.
        may_sleep = self._sleepers.acquire(blocking=False)
        try:
            start = self.runner.start_from_thread
            start(op, self.mutex, ended, may_sleep=may_sleep)
        finally:
            if may_sleep:
                self._sleepers.release()

    def opened(self, ino: int, view: ViewKind, fh_count: int) -> None:
        """Count an open file: it keeps the inode alive."""
        del fh_count
        with self.mutex:
            self.core.view_opened(ino, view)

    def released(self, ino: int, view: ViewKind, fh_count: int) -> None:
        """Uncount an open file; the inode may be evicted with it."""
        del fh_count
        op = self.core.view_released(ino, view)
        self.runner.start_from_thread(op, self.mutex, _logged("view_release"))

    # After a predecessor.

    def recover(
        self, tables: Mapping[int, InodeTable], memory: MemoryPorts
    ) -> list[Misplaced]:
        """Serve what a predecessor left; return what must be invalidated first.

        The core knows already what the journal knows.
        """
        misplaced: list[Misplaced] = []
        for table in tables.values():
            inode = self.core.find(table.ino)
            misplaced += recovery.settle(table, inode)
            mmap = inode is None or inode.rules.creation.host_mmap(inode.options)
            blocks = inode is None or inode.rules.counts_blocks(table.page_size)
            memory.adopt(table, host_mmap=mmap, counts_blocks=blocks)
            if inode is not None:
                for view in ViewKind:
                    opens = self.session.open_count(table.ino, view)
                    inode.references.views_open[view] = opens
        if tables:
            log.info("views_taken_over", inodes=len(tables), misplaced=len(misplaced))
        return misplaced

    def expect_clients_again(self) -> None:
        """Let a predecessor's clients come back; who does not has ended meanwhile."""
        note = self.kept.note or {"guests": [], "clients": []}
        self._guest_pids.update(note["guests"])
        loop = asyncio.get_running_loop()
        loop.call_later(BACK_SECONDS_MAX, self._end_missing, note)

    def _end_missing(self, note: Mapping[str, list[Any]]) -> None:
        here = {_name_of(session) for session in self.broker.sessions}
        self._guest_pids &= {session.pid for session in self.broker.sessions}
        for client in set(note["clients"]) - here:
            log.info("client_did_not_come_back", client=client)
            self._end_client(client)
        self._note_clients()

    # Clients that come and end.

    def _client_came(self, _session: Session) -> None:
        self._note_clients()

    def _client_gone(self, session: Session) -> None:
        self._guest_pids.discard(session.pid)
        client = _name_of(session)
        log.info("client_gone", client=client, pid=session.pid, comm=session.comm)
        self._note_clients()
        self._end_client(client)

    def _end_client(self, client: str) -> None:
        op = self.core.client_gone(client)
        self.runner.start_from_thread(op, self.mutex, _logged("client_gone"))

    def _note_clients(self) -> None:
        """Tell the keeper who is connected: a successor expects them again."""
        clients = {_name_of(one) for one in self.broker.sessions if one.said_hello}
        note = {"guests": sorted(self._guest_pids), "clients": sorted(clients)}
        self.kept.leave_note(note)


def _name_of(session: Session) -> str:
    return f"{session.client}/{session.incarnation}"


def _errno_of(error: BaseException | None) -> int:
    if error is None:
        return 0
    if isinstance(error, KernelError) and error.errno is not None:
        return error.errno
    # The allocator did not answer: the caller sees an I/O error, the log the cause.
    log.warning("call_failed", error=str(error))
    return int(Errno.EIO)


def _logged(what: str) -> Callable[[Future[Any]], None]:
    """Return a listener for operations that nobody waits for."""

    def ended(future: Future[Any]) -> None:
        error = future.exception()
        if error is not None:
            log.warning("operation_failed", what=what, error=str(error))

    return ended
