"""Messages with descriptors over UNIX sockets: one JSON object per packet.

Standard library only: the keeper, the guest process and clients without asyncio use
it too. Sockets are SOCK_SEQPACKET, so a message is whole or absent, and the end of
the peer is a packet of no bytes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

MESSAGE_BYTES_MAX: Final = 64 << 10
# SCM_MAX_FD of the kernel; more cannot arrive in one packet.
FDS_PER_MESSAGE_MAX: Final = 253
SOCKET_PATH_BYTES_MAX: Final = 107
_UCRED: Final = struct.Struct("iII")


class MessageRefused(ValueError):  # noqa: N818 - says what happened
    """A packet that is no message of ours: too long, no JSON object, fds cut off."""


class AddressTaken(OSError):  # noqa: N818 - says what happened
    """Another process listens on the socket's path."""


@dataclass(frozen=True, slots=True)
class Message:
    """One packet: its fields, and the descriptors that came with it (close-on-exec)."""

    fields: dict[str, Any]
    fds: list[int]


@dataclass(frozen=True, slots=True)
class Peer:
    """Who connected, as the kernel says (SO_PEERCRED, at the time of connect)."""

    pid: int
    uid: int
    gid: int

    @property
    def comm(self) -> str:
        """The name of the process, or an empty string once it is gone."""
        try:
            return Path(f"/proc/{self.pid}/comm").read_text().strip()
        except OSError:
            return ""


def peer_of(connection: socket.socket) -> Peer:
    """Return who is at the other end."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return Peer(*_UCRED.unpack(raw))


def listen(path: Path, *, mode: int = 0o660, backlog: int = 64) -> socket.socket:
    """Listen on `path`, whose permissions become `mode`.

    A socket left by a crash is removed. Raises AddressTaken when somebody listens
    there, OSError (ENAMETOOLONG) when the path is longer than an address may be.
    """
    _require_short(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        _remove_stale(path)
        # Nobody may connect between bind and chmod.
        mask = os.umask(0o777 & ~mode)
        try:
            listener.bind(str(path))
        finally:
            os.umask(mask)
        listener.listen(backlog)
    except OSError:
        listener.close()
        raise
    return listener


def connect(path: Path, *, timeout: float | None = None) -> socket.socket:
    """Connect to the socket at `path`; OSError when nobody listens."""
    _require_short(path)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.settimeout(timeout)
        connection.connect(str(path))
    except OSError:
        connection.close()
        raise
    return connection


def send(
    connection: socket.socket, fields: dict[str, Any], fds: Sequence[int] = ()
) -> None:
    """Send one message. Raises MessageRefused when it is too long."""
    packet = json.dumps(fields, separators=(",", ":")).encode()
    if len(packet) > MESSAGE_BYTES_MAX:
        raise MessageRefused(
            f"message of {len(packet)} bytes: send at most {MESSAGE_BYTES_MAX}"
        )
    socket.send_fds(connection, [packet], list(fds))


def receive(connection: socket.socket, *, fds_max: int = 1) -> Message | None:
    """Receive one message; None at the end of the peer.

    Raises MessageRefused for a packet that is none (its descriptors are closed).
    """
    try:
        packet, fds, flags, _address = socket.recv_fds(
            connection, MESSAGE_BYTES_MAX, fds_max, socket.MSG_CMSG_CLOEXEC
        )
    except ConnectionResetError:
        return None
    if not packet:
        close_all(fds)
        return None
    try:
        return Message(_fields(packet, flags), list(fds))
    except MessageRefused:
        close_all(fds)
        raise


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors; an error of close(2) leaves nothing to do."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def _fields(packet: bytes, flags: int) -> dict[str, Any]:
    if flags & socket.MSG_TRUNC:
        raise MessageRefused(f"a message has at most {MESSAGE_BYTES_MAX} bytes")
    if flags & socket.MSG_CTRUNC:
        raise MessageRefused("more descriptors than this message may carry")
    try:
        fields = json.loads(packet)
    except (ValueError, RecursionError) as error:
        raise MessageRefused(f"no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise MessageRefused("no JSON object")
    return fields


def _require_short(path: Path) -> None:
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES_MAX:
        raise OSError(
            errno.ENAMETOOLONG,
            f"a socket's path has at most {SOCKET_PATH_BYTES_MAX} bytes: use a "
            "shorter --run-dir",
            str(path),
        )


def _remove_stale(path: Path) -> None:
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except TimeoutError:
            pass  # Its backlog is full: somebody is there.
    raise AddressTaken(
        errno.EADDRINUSE,
        "another process listens there: stop it, or use another --run-dir",
        str(path),
    )
