"""The service's end of the keeper's socket: descriptors in, life and death out."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from gmem.guest_memfd.page_states import InodeTable
from gmem.runtime import fdpass
from gmem.runtime.backend import Backend
from gmem.uapi.errors import TransportError

SOCKET_NAME: Final = "keeper.sock"
HANDOVER_SECONDS_MAX: Final = 10.0
_FDS_PER_INODE: Final = {Backend.FUSE: 1, Backend.MEMFD: 3}


@dataclass(eq=False, slots=True)
class Handover:
    """What the keeper made, and what it kept of a predecessor; ours until `close`.

    `fds` are the fuse connection, its mount and the store; none for plain memfds.
    `connection_id` is the minor device number of all views.
    `tables` are the page states that a predecessor's inodes had, `note` what it wanted
    us to know; `successor` tells whether there was one. With `survival` the keeper
    stands in for us when we die. While `control_socket` is open we are alive to the
    keeper: no other process may inherit it. A keeper that is killed is not missed until
    we end; a new one gets everything back by `give_back`.

    Every method may be called from any thread.
    """

    run_dir: Path
    backend: Backend
    fds: tuple[int, ...]
    nr_pages: int
    connection_id: int
    survival: bool
    successor: bool
    tables: dict[int, InodeTable]
    note: Any
    control_socket: socket.socket
    _held: dict[int, list[int]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def fuse_fd(self) -> int:
        """The connection, where there is one."""
        return self.fds[0]

    @property
    def mount_fd(self) -> int:
        """The mount, where there is one."""
        return self.fds[1]

    @property
    def store_fd(self) -> int:
        """The store, where there is one."""
        return self.fds[2]

    def hold(self, table: InodeTable) -> None:
        """Have the keeper keep the page states of an inode."""
        with self._lock:
            self._held[table.ino] = table.descriptors
            self._tell({"op": "hold"}, table.descriptors)

    def drop(self, ino: int) -> None:
        """Have the keeper forget an inode that is gone."""
        with self._lock:
            self._held.pop(ino, None)
            self._tell({"op": "drop", "ino": ino})

    def leave_note(self, value: object) -> None:
        """Have the keeper tell `value` (JSON, small) to our successor."""
        with self._lock:
            self.note = value
            self._tell({"op": "note", "value": value})

    def take_over(self) -> None:
        """Return when nobody else reads requests; blocks for a moment.

        TransportError when the keeper does not answer: nobody stands in then, and it
        must not be feared that somebody does.
        """
        if self._ask("take_over") is None:
            raise _no_keeper(self.run_dir / SOCKET_NAME, "it did not make way")

    def scanner(self) -> socket.socket | None:
        """Return a connection to a process that looks into page tables, or None."""
        message = self._ask("scanner")
        if message is None or not message.fds:
            return None
        return socket.socket(fileno=message.fds[0])

    def serving(self) -> None:
        """Tell the keeper that requests are answered now: it may show the mount."""
        with self._lock:
            self._tell({"op": "serving"})

    def stopping(self) -> None:
        """Tell the keeper that our end is no crash."""
        with self._lock:
            self._tell({"op": "stopping"})

    def give_back(self) -> bool:
        """Give all that the keeper kept to one started after it died; blocks.

        False when there is no such keeper yet; ask again later.
        """
        try:
            control = fdpass.connect(
                self.run_dir / SOCKET_NAME, timeout=HANDOVER_SECONDS_MAX
            )
        except OSError:
            return False
        with contextlib.suppress(OSError, fdpass.MessageRefused):
            message = fdpass.receive(control, fds_max=3)
            fdpass.close_all([] if message is None else message.fds)
            if message is not None and message.fields.get("want") == "descriptors":
                self._give_back(control)
                return True
        control.close()
        return False

    def close(self) -> None:
        """Close what is ours but the store's fd, which its PageStore closes."""
        for fd in self.fds[:2]:
            os.close(fd)
        self.control_socket.close()

    def _give_back(self, control: socket.socket) -> None:
        numbers = {
            "op": "hand_back",
            "backend": self.backend.value,
            "nr_pages": self.nr_pages,
            "connection_id": self.connection_id,
            "survival": self.survival,
        }
        with self._lock:
            fdpass.send(control, numbers, self.fds)
            for fds in self._held.values():
                fdpass.send(control, {"op": "hold"}, fds)
            fdpass.send(control, {"op": "note", "value": self.note})
            control.settimeout(None)
            self.control_socket.close()
            self.control_socket = control

    def _tell(self, fields: dict[str, Any], fds: list[int] | None = None) -> None:
        # A keeper that was killed is told everything again by `give_back`.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            fdpass.send(self.control_socket, fields, fds or [])

    def _ask(self, op: str) -> fdpass.Message | None:
        with self._lock:
            self._tell({"op": op})
            return fdpass.receive(self.control_socket, fds_max=1)


def connect(run_dir: Path, *, timeout: float = HANDOVER_SECONDS_MAX) -> Handover:
    """Take over the descriptors from the keeper of `run_dir`; blocks.

    Raises TransportError when no keeper answers, or another service has them.
    """
    path = run_dir / SOCKET_NAME
    try:
        control = fdpass.connect(path, timeout=timeout)
        message = fdpass.receive(control, fds_max=3)
    except OSError as error:
        raise _no_keeper(path, error.strerror or str(error)) from error
    fields = {} if message is None else message.fields
    if message is None or "backend" not in fields:
        control.close()
        why = "it is waiting for the descriptors of a service that is gone"
        if "want" not in fields:
            why = str(fields.get("error", "it closed the connection"))
        raise _no_keeper(path, why)
    backend = Backend(fields["backend"])
    tables = _receive_tables(control, int(fields["nr_tables"]), _FDS_PER_INODE[backend])
    control.settimeout(None)
    handed = Handover(
        run_dir=run_dir,
        backend=backend,
        fds=tuple(message.fds),
        nr_pages=int(fields["nr_pages"]),
        connection_id=int(fields["connection_id"]),
        survival=bool(fields["survival"]),
        successor=bool(fields["successor"]),
        tables=tables,
        note=fields["note"],
        control_socket=control,
    )
    held = {ino: table.descriptors for ino, table in tables.items()}
    handed._held.update(held)  # noqa: SLF001 - its own module
    return handed


def _receive_tables(
    control: socket.socket, number: int, fds_per_inode: int
) -> dict[int, InodeTable]:
    tables: dict[int, InodeTable] = {}
    while len(tables) < number:
        message = fdpass.receive(control, fds_max=fdpass.FDS_PER_MESSAGE_MAX)
        if message is None:
            raise _no_keeper(Path(SOCKET_NAME), "it died while it handed over")
        # Whole inodes come in each message.
        for at in range(0, len(message.fds), fds_per_inode):
            fd, *files = message.fds[at : at + fds_per_inode]
            table = InodeTable(fd, tuple(files))
            tables[table.ino] = table
    return tables


def _no_keeper(path: Path, why: str) -> TransportError:
    return TransportError(
        f"no views from the keeper at {path} ({why}): start `python -m gmem.keeper` "
        "with the same run directory, one per service",
        service="keeper",
        target=str(path),
    )
