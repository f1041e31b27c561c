"""Making what is kept: the connection, its mount, and the store."""

from __future__ import annotations

import fcntl
import json
import os
import select
import sys
import time
from dataclasses import dataclass
from typing import Final

from gmem.keeper import mounts, tuning
from gmem.runtime import fusewire as wire

PAGE_SIZE: Final = 4096
EXIT_CANNOT: Final = 1
INIT_SECONDS_MAX: Final = 10.0


class CannotKeep(Exception):  # noqa: N818 - says what happened
    """The keeper cannot start; its text says why and what to do."""


class Terminated(Exception):  # noqa: N818 - says what happened
    """Somebody sent SIGTERM or SIGINT."""


@dataclass(frozen=True, slots=True)
class Held:
    """The descriptors that outlive a service, and the numbers that go with them.

    `survival`: the kernel can send requests again (HAS_RESEND), so that a successor
    and whoever stands in for it get what a dead service had read.
    """

    fuse_fd: int
    mount_fd: int
    store_fd: int
    nr_pages: int
    connection_id: int
    survival: bool


def log(event: str, **fields: object) -> None:
    """Write one line of JSON to standard error."""
    line = {"event": event, "service": "keeper", "time": round(time.time(), 6)}
    sys.stderr.write(json.dumps(line | fields) + "\n")
    sys.stderr.flush()


def make(nr_pages: int) -> Held:
    """Open the connection, mount it nowhere, tune it, and make the store."""
    fuse_fd = _open_fuse()
    try:
        mount_fd = mounts.mount_detached(fuse_fd)
    except OSError as error:
        raise CannotKeep(
            f"cannot mount FUSE ({error.strerror}): run as root or with CAP_SYS_ADMIN; "
            "there is no other way to serve views yet"
        ) from error
    major, minor = mounts.device_of(mount_fd)
    refused = tuning.tune(major, minor)
    if refused:
        log(
            "not_tuned",
            refused=refused,
            hint=f"rewriting guest memory is up to ten times slower; make "
            f"/sys/class/bdi/{major}:{minor} writable",
        )
    survival = bool(_answer_init(fuse_fd) & wire.InitFlag.HAS_RESEND)
    return Held(fuse_fd, mount_fd, _make_store(nr_pages), nr_pages, minor, survival)


def _answer_init(fuse_fd: int) -> wire.InitFlag:
    """Answer the one request that comes once in the life of a connection."""
    poll = select.poll()
    poll.register(fuse_fd, select.POLLIN)
    if not poll.poll(INIT_SECONDS_MAX * 1000):
        raise CannotKeep("the kernel sent no INIT: unmount other views, then try again")
    buffer = memoryview(bytearray(wire.BUFFER_BYTES))
    length = os.readv(fuse_fd, [buffer])
    _len, opcode, unique, *_ = wire.IN_HEADER.unpack_from(buffer)
    assert opcode == wire.Opcode.INIT, opcode
    reply = wire.answer_init(buffer[wire.BODY : length])
    os.write(fuse_fd, wire.pack_reply(unique, 0, reply.body))
    return reply.flags


def _open_fuse() -> int:
    try:
        return os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise CannotKeep(
            f"cannot open /dev/fuse ({error.strerror}): run as root where the device "
            "exists (containers: --device /dev/fuse --cap-add SYS_ADMIN); "
            "there is no other way to serve views yet"
        ) from error


def _make_store(nr_pages: int) -> int:
    fd = os.memfd_create("gmem-store", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, nr_pages * PAGE_SIZE)
    # A store cut short would be a SIGBUS of whoever has it mapped.
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd
