"""What the keeper does: hold the descriptors, watch their user, stand in, start again.

The service's life is the control connection: its end is the end of the service,
however it died. Waiting for the process itself would not do: one that is killed
inside an invalidation is a zombie until somebody answers its writeback. Where a thread
of a killed service sleeps in the kernel and keeps the connection open, its leader is a
zombie nevertheless: that is looked at, too.

The service tells on the connection:

    hold + fds    page states of a new inode, and its memfds where it has such;
                  drop {ino} when it is gone
    note {value}  something small that its successor must know
    scanner       asks for a process that looks into page tables for it
    take_over     asks that nobody else reads requests from now on
    serving       it answers requests; stopping: its end is no crash
    hand_back     the descriptors, to a keeper that was started after a crash
"""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gmem.keeper import mounts, pids
from gmem.keeper.making import Held, log
from gmem.keeper.restarts import Restarts, ServicePlan, spawn
from gmem.keeper.shelf import Shelf
from gmem.keeper.spare import QUIET_SECONDS, SETTLE_SECONDS, Spare
from gmem.keeper.stand_in import StandIn
from gmem.runtime import fdpass
from gmem.runtime.backend import Backend
from gmem.runtime.mappings import can_see_other_processes
from gmem.uapi.errors import BadRequest

SOCKET_NAME: Final = "keeper.sock"
EXIT_OK: Final = 0
EXIT_SERVICE_DIED: Final = 3
TAKE_OVER_SECONDS_MAX: Final = 30.0
LOOK_SECONDS: Final = 0.1
IDLE_SECONDS: Final = 0.02
SEND_SECONDS_MAX: Final = 5.0
FDS_AT_ONCE: Final = 198
"""A multiple of what any inode has."""
NOTE_BYTES_MAX: Final = 16 << 10


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says."""

    run_dir: Path
    mount_point: Path | None = None
    service: ServicePlan = ServicePlan()  # noqa: RUF009 - frozen
    take_over_seconds: float = TAKE_OVER_SECONDS_MAX
    """How long a started service may need before it answers; and how long to wait
    for one that somebody else starts."""


class Keeper:
    """Keeps what one host's views need to survive their service.

    Without `held` the descriptors come from the service that has them: a keeper that
    was started after another one was killed.
    """

    def __init__(
        self, held: Held | None, listener: socket.socket, options: Options
    ) -> None:
        self.held = held
        self._options = options
        self._listener = listener
        self._patience = options.take_over_seconds
        self._selector = selectors.DefaultSelector()
        self._control: socket.socket | None = None
        self._stand_in: StandIn | Shelf | None = None
        self._standing_in = False
        # A service that asked for the way, which is not free yet.
        self._waiting_for_way: socket.socket | None = None
        self._stopping = self._attached = False
        self._note: Any = None
        self._service_pid = self._starting = 0
        self._served_since = 0.0
        self._zombie_since = 0.0
        self._restarts = Restarts(options.service.restarts_max)
        self._spare = Spare(options.service, options.run_dir)
        self._children: list[subprocess.Popen[bytes]] = []
        self._start_at: float | None = None
        self._give_up_at: float | None = None
        self._status: int | None = None
        if held is None:
            self._give_up_at = time.monotonic() + self._patience
        else:
            self._prepare(held)
        self._watch(listener, self._accept)

    def serve(self) -> int:
        """Keep until the service stops in order, or is given up; the exit status."""
        while self._status is None:
            for key, _ in self._selector.select(self._pause()):
                key.data()
            self._look()
        return self._status

    def _pause(self) -> float:
        """Return the seconds until the next look, if nothing is heard."""
        away = self._control is None or self._standing_in
        waited_for = self._waiting_for_way is not None
        return IDLE_SECONDS if away or waited_for else LOOK_SECONDS

    def close(self) -> None:
        """Close what is ours; a service that is being started is ended."""
        self._spare.close()
        for child in self._children:
            if child.poll() is None:
                child.kill()
        self._selector.close()
        if self._control is not None:
            self._control.close()

    def _prepare(self, held: Held) -> None:
        if held.backend is Backend.MEMFD:
            self._stand_in = Shelf()
            return
        if not held.survival:
            return
        try:
            self._stand_in = StandIn(held.fuse_fd, held.store_fd, held.nr_pages)
        except OSError as error:
            log("survival_off", error=f"no second fuse descriptor: {error}")

    def _watch(self, what: socket.socket | int, then: Callable[[], None]) -> None:
        self._selector.register(what, selectors.EVENT_READ, then)

    # The service comes.

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        connection.settimeout(SEND_SECONDS_MAX)
        peer = fdpass.peer_of(connection)
        if self._control is not None:
            log("refused", pid=peer.pid, reason="another service holds the descriptors")
            _tell(connection, {"error": "another guest_memfd service holds the views"})
            connection.close()
            return
        if not self._hand_over(connection):
            connection.close()
            return
        log("handed_over", pid=peer.pid, comm=peer.comm)
        self._control = connection
        self._service_pid = peer.pid
        self._starting = 0
        self._note_pid(peer.pid)
        self._give_up_at = time.monotonic() + self._patience
        self._start_at = None
        self._watch(connection, self._hear)

    def _hand_over(self, connection: socket.socket) -> bool:
        held = self.held
        if held is None:
            return _tell(connection, {"want": "descriptors"})
        tables = {} if self._stand_in is None else self._stand_in.inodes
        fields = {
            "backend": held.backend.value,
            "nr_pages": held.nr_pages,
            "connection_id": held.connection_id,
            "survival": self._stand_in is not None,
            "successor": self._served_since > 0,
            "nr_tables": len(tables),
            "note": self._note,
        }
        fds = [fd for group in tables.values() for fd in group]
        parts = [fds[at : at + FDS_AT_ONCE] for at in range(0, len(fds), FDS_AT_ONCE)]
        return _tell(connection, fields, list(held.fds)) and all(
            _tell(connection, {}, part) for part in parts
        )

    def _note_pid(self, pid: int) -> None:
        """Write down who serves: the first one did not stay."""
        pids.write(self._options.run_dir / pids.SERVICE, pid)

    # The service speaks.

    def _hear(self) -> None:
        control = self._control
        assert control is not None
        try:
            message = fdpass.receive(control, fds_max=3)
        except fdpass.MessageRefused as error:
            log("message_refused", error=str(error))
            return
        except OSError as error:
            self._lost(f"its connection broke: {error}")
            return
        if message is None:
            self._lost("its connection ended")
            return
        fds = list(message.fds)
        try:
            self._obey(control, message.fields, fds)
        except (BadRequest, KeyError, TypeError, ValueError) as error:
            log("message_refused", error=str(error), op=message.fields.get("op"))
        finally:
            fdpass.close_all(fds)

    def _obey(
        self, control: socket.socket, fields: dict[str, Any], fds: list[int]
    ) -> None:
        """Do what a message says; descriptors left in `fds` are closed."""
        match fields.get("op"):
            case "hold" if self._stand_in is not None and (
                len(fds) == self._stand_in.fds_per_inode
            ):
                self._stand_in.hold([fds.pop(0) for _ in range(len(fds))])
            case "drop" if self._stand_in is not None:
                self._stand_in.drop(int(fields["ino"]))
            case "note" if len(str(fields["value"])) <= NOTE_BYTES_MAX:
                self._note = fields["value"]
            case "scanner":
                self._send_scanner(control)
            case "take_over":
                self._stop_standing_in()
                self._waiting_for_way = control
                self._make_way()
            case "serving":
                self._serving()
            case "stopping":
                self._stopping = True
            case "hand_back" if self.held is None:
                backend = Backend(fields["backend"])
                if len(fds) != (0 if backend is Backend.MEMFD else 3):
                    raise ValueError(f"{len(fds)} descriptors of {backend}")
                self._take_back(fields, backend, [fds.pop(0) for _ in range(len(fds))])

    def _serving(self) -> None:
        now, successor = time.monotonic(), self._served_since > 0
        if successor:
            log("taken_over", pid=self._service_pid)
        self._spare.want(now + (SETTLE_SECONDS if successor else QUIET_SECONDS))
        self._served_since = now
        self._give_up_at = None
        point, held = self._options.mount_point, self.held
        if point is not None and held is not None and not self._attached:
            mounts.attach(held.mount_fd, point)
            self._attached = True
            log("attached", mount_point=str(point))

    def _take_back(
        self, fields: dict[str, Any], backend: Backend, fds: list[int]
    ) -> None:
        self.held = Held(
            backend=backend,
            fds=tuple(fds),
            nr_pages=int(fields["nr_pages"]),
            connection_id=int(fields["connection_id"]),
            survival=bool(fields["survival"]),
        )
        self._attached = True
        self._prepare(self.held)
        self._serving()
        log("taken_back", pid=os.getpid(), service_pid=self._service_pid)

    def _send_scanner(self, control: socket.socket) -> None:
        held = self.held
        if held is None or not can_see_other_processes():
            _tell(control, {"ok": False})
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            command = [sys.executable, "-m", "gmem.keeper.scan", str(ours.fileno())]
            child = subprocess.Popen(
                [*command, "0", str(held.connection_id)],
                pass_fds=(ours.fileno(),),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            self._children.append(child)
            _tell(control, {"ok": True}, [theirs.fileno()])

    # The service goes.

    def _lost(self, why: str) -> None:
        control = self._control
        assert control is not None
        self._selector.unregister(control)
        control.close()
        self._control = self._waiting_for_way = None
        if self._stopping:
            self._status = EXIT_OK
        elif self._stand_in is None or self.held is None:
            self._give_up("no survival without HAS_RESEND and a second descriptor")
        else:
            log("service_lost", pid=self._service_pid, why=why)
            self._begin_standing_in()
            self._plan_restart()

    def _begin_standing_in(self) -> None:
        if self._standing_in or not self._served_since:
            return
        assert self._stand_in is not None
        self._stand_in.begin(self._service_pid)
        self._standing_in = True
        if self._stand_in.fd is not None:
            self._watch(self._stand_in.fd, self._stand_in.answer_waiting)

    def _stop_standing_in(self) -> None:
        if not self._standing_in:
            return
        assert self._stand_in is not None
        if self._stand_in.fd is not None:
            self._selector.unregister(self._stand_in.fd)
        self._standing_in = False
        log("stood_in", **self._stand_in.counts)

    def _make_way(self) -> None:
        """Let a successor go on once no thread of the dead service reads any more.

        It has requests sent again for the last time: what one of them takes along after
        that nobody answers.
        """
        if self._waiting_for_way is None or self._stand_in is None:
            return
        self._stand_in.look()
        if not self._stand_in.readers_left:
            _tell(self._waiting_for_way, {"ok": True})
            self._waiting_for_way = None

    def _plan_restart(self) -> None:
        now = time.monotonic()
        lived = now - self._served_since if self._give_up_at is None else 0.0
        when = self._restarts.next(now, lived)
        if when is None:
            limit = self._options.service.restarts_max
            self._give_up(f"it was started again {limit} times in half a minute")
            return
        self._start_at = when if self._options.service.command else None
        self._give_up_at = when + self._patience

    def _start(self) -> None:
        self._start_at = None
        spare = self._spare.take()
        try:
            child = spare or spawn(self._options.service)
        except OSError as error:
            log("cannot_restart", error=str(error))
            self._plan_restart()
            return
        self._children.append(child)
        self._starting = child.pid
        self._note_pid(child.pid)
        log("restarted", pid=child.pid, spare=spare is not None)

    def _look(self) -> None:
        """Look at what no descriptor tells: time, children, half-dead services."""
        now = time.monotonic()
        self._spare.look(now)
        ended = [child for child in self._children if child.poll() is not None]
        self._children = [child for child in self._children if child not in ended]
        if self._control is not None:
            self._look_for_half_dead(self._control, now)
        elif any(child.pid == self._starting for child in ended):
            log("start_failed", pid=self._starting, why="it ended before it took over")
            self._starting = 0
            self._plan_restart()
        if self._standing_in and self._stand_in is not None:
            self._stand_in.look()
        self._make_way()
        if self._stand_in is not None and self._stand_in.dead:
            self._give_up("the fuse connection was ended")
        elif self._start_at is not None and now >= self._start_at:
            self._start()
        elif self._give_up_at is not None and now >= self._give_up_at:
            self._too_late()

    def _look_for_half_dead(self, control: socket.socket, now: float) -> None:
        """Notice a killed service one of whose threads keeps the connection open.

        Its other threads have ended when its leader is a zombie for a while.
        """
        if not pids.is_zombie(self._service_pid) or _is_readable(control):
            self._zombie_since = 0.0
        elif not self._zombie_since:
            self._zombie_since = now
        elif now - self._zombie_since > LOOK_SECONDS:
            self._lost("it was killed, and one of its threads sleeps in the kernel")

    def _too_late(self) -> None:
        for child in self._children:
            if child.pid in (self._starting, self._service_pid):
                log("start_failed", pid=child.pid, why="it did not take over in time")
                child.kill()
                self._give_up_at = time.monotonic() + self._patience
                return
        self._give_up(f"no service came in {self._patience:g} s")

    def _give_up(self, why: str) -> None:
        log("gave_up", error=f"guest_memfd died and is not started again: {why}")
        self._status = EXIT_SERVICE_DIED


def end(held: Held, mount_point: Path | None, run_dir: Path) -> None:
    """Abort the connection, so that mappings fail closed, and clean the path."""
    if mount_point is not None and mounts.mounted_at(mount_point):
        mounts.detach(mount_point, force=True)
    with contextlib.suppress(FileNotFoundError):
        (run_dir / pids.SERVICE).unlink()
    if held.backend is Backend.MEMFD:
        return
    try:
        mounts.abort_connection(held.connection_id, run_dir)
    except OSError as error:
        # Closing the descriptors, which our end does, aborts as well unless a thread
        # of the dead service still sleeps in the kernel with one of them.
        log("abort_failed", error=str(error), connection_id=held.connection_id)


def clean_stale(mount_point: Path) -> None:
    """Take away what a crash left at the mount point; its connection is aborted."""
    while mounts.mounted_at(mount_point):
        mounts.detach(mount_point, force=True)
        log("stale_mount_removed", mount_point=str(mount_point))


def is_served(run_dir: Path) -> bool:
    """Tell whether the service that an earlier keeper noted still lives."""
    return pids.is_alive(run_dir / pids.SERVICE)


def _is_readable(control: socket.socket) -> bool:
    poll = select.poll()
    poll.register(control, select.POLLIN)
    return bool(poll.poll(0))


def _tell(
    connection: socket.socket, fields: dict[str, Any], fds: list[int] | None = None
) -> bool:
    try:
        fdpass.send(connection, fields, fds or [])
    except OSError:
        return False  # It has gone already.
    return True
