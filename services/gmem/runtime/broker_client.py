"""The blocking end of a broker: for programs without an event loop.

Standard library and `uapi` only, so that the guest process and a loader can use it.
Keep the connection open: its end is the end of this client to the service.

A service that is killed and started again forgets its connections, not its clients: a
thread of this class says hello again under the same name, so that what the client holds
stays. Descriptors that it gave are gone with the old process: give them again.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gmem.runtime import fdpass
from gmem.uapi.errors import (
    ERROR_TABLE,
    KernelError,
    Reason,
    TransportError,
    make_error,
)

ANSWER_SECONDS_MAX = 30.0
BACK_SECONDS_MAX = 30.0
"""How long a service may be away before its clients give it up."""
RETRY_SECONDS = 0.05
TAKEN_MAX = 2
"""A view, and its page states where no fault tells them."""


class BrokerClient:
    """One connection to the broker at `path`, by which this process is known.

    Every method may be called from any thread. A refusal is raised as the class of
    its Reason; TransportError when the broker is gone or does not answer.
    """

    def __init__(self, path: Path, client: str, incarnation: str) -> None:
        self.path = path
        self._hello = {"op": "hello", "client": client, "incarnation": incarnation}
        self._windows: dict[str, Any] | None = None
        self._lock = threading.Lock()
        self._back = threading.Condition()
        self._closed = self._lost = False
        self._socket = self._connect()
        self._here = True
        threading.Thread(target=self._watch, name="broker-watch", daemon=True).start()

    def take(self, token: str) -> int:
        """Return the descriptor that `token` promises; the token is used up."""
        fd, *others = self.take_all(token)
        fdpass.close_all(others)
        return fd

    def take_all(self, token: str) -> list[int]:
        """As `take`, with what belongs to the descriptor behind it."""
        fields = {"op": "take", "token": token}
        fds = self._ask(fields, fds_max=TAKEN_MAX).fds
        if not fds:
            raise self._unreachable("it sent no descriptor")
        return fds

    def give(self, fd: int, label: str) -> str:
        """Hand a regular file in; return its name for RPCs. Our `fd` stays open."""
        answer = self._ask({"op": "give", "label": label}, [fd])
        return str(answer.fields["descriptor"])

    def drop(self, descriptor: str) -> None:
        """Have the service close a descriptor that this client gave."""
        self._ask({"op": "drop", "descriptor": descriptor})

    def report_windows(self, windows: list[dict[str, Any]]) -> None:
        """Tell what is mapped here: dicts of file, offset, length, address (bytes)."""
        self._windows = {"op": "windows", "windows": windows}
        self._ask(self._windows)

    def alive(self) -> bool:
        """Tell whether the service holds its end at this moment; never blocks."""
        return self._here and not _has_ended(self._socket)

    def wait_alive(self, seconds: float = BACK_SECONDS_MAX) -> bool:
        """Wait for a service that was killed to take this client back; False: not."""
        with self._back:
            self._back.wait_for(
                lambda: self.alive() or self._lost or self._closed, timeout=seconds
            )
        return self.alive()

    def fileno(self) -> int:
        """Return the connection's descriptor, to wait for its end with poll."""
        return self._socket.fileno()

    def close(self) -> None:
        """End the connection: to the service this client is gone."""
        with self._back:
            self._closed = True
            self._here = False
            self._back.notify_all()
        with contextlib.suppress(OSError):
            # Wakes the thread that watches it.
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(
        self, fields: dict[str, Any], fds: list[int] | None = None, *, fds_max: int = 1
    ) -> fdpass.Message:
        if not self._closed and not self.alive():
            self.wait_alive(ANSWER_SECONDS_MAX)
        with self._lock:
            try:
                return self._ask_on(self._socket, fields, fds or [], fds_max)
            except TransportError:
                # A late answer would be taken for that of the next question.
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)
                raise

    def _ask_on(
        self,
        connection: socket.socket,
        fields: dict[str, Any],
        fds: list[int],
        fds_max: int = 1,
    ) -> fdpass.Message:
        try:
            fdpass.send(connection, fields, fds)
            answer = fdpass.receive(connection, fds_max=fds_max)
        except (OSError, fdpass.MessageRefused) as error:
            raise self._unreachable(str(error)) from error
        if answer is None:
            raise self._unreachable("it closed the connection")
        if not answer.fields.get("ok"):
            raise refusal_of(answer.fields)
        return answer

    def _connect(self) -> socket.socket:
        try:
            connection = fdpass.connect(self.path, timeout=ANSWER_SECONDS_MAX)
        except OSError as error:
            raise self._unreachable(error.strerror or str(error)) from error
        try:
            self._ask_on(connection, self._hello, [])
            if self._windows is not None:
                self._ask_on(connection, self._windows, [])
        except (KernelError, TransportError):
            connection.close()
            raise
        return connection

    # The thread that says hello again.

    def _watch(self) -> None:
        while True:
            poll = select.poll()
            with contextlib.suppress(OSError, ValueError):
                # Not POLLIN: answers belong to whoever asked.
                poll.register(self._socket, select.POLLRDHUP)
                poll.poll()
            if self._closed or not self._come_back():
                return

    def _come_back(self) -> bool:
        self._here = False
        deadline = time.monotonic() + BACK_SECONDS_MAX
        while time.monotonic() < deadline and not self._closed:
            with contextlib.suppress(KernelError, TransportError):
                self._replace(self._connect())
                return not self._closed
            time.sleep(RETRY_SECONDS)
        with self._back:
            self._lost = True
            self._back.notify_all()
        return False

    def _replace(self, connection: socket.socket) -> None:
        with self._lock, self._back:
            old, self._socket = self._socket, connection
            old.close()
            if self._closed:
                connection.close()
            self._here = not self._closed
            self._back.notify_all()

    def _unreachable(self, why: str) -> TransportError:
        return TransportError(
            f"the broker at {self.path} does not answer ({why}): is its service up?",
            service="broker",
            target=str(self.path),
        )


def refusal_of(fields: dict[str, Any]) -> KernelError:
    """Return the error that a broker's answer is."""
    reason = Reason(fields["reason"])
    assert reason in ERROR_TABLE, reason
    return make_error(reason, str(fields["text"]), **fields["numbers"])


def _has_ended(connection: socket.socket) -> bool:
    poll = select.poll()
    try:
        poll.register(connection, select.POLLRDHUP)
    except (OSError, ValueError):
        return True  # Replaced or closed at this moment.
    return bool(poll.poll(0))
