"""Making what is kept: the connection, its mount, and the store."""

from __future__ import annotations

import fcntl
import json
import os
import select
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gmem.keeper import fusermount, mounts, tuning
from gmem.runtime import fusewire as wire
from gmem.runtime.backend import Backend
from gmem.runtime.mappings import can_see_other_processes

PAGE_SIZE: Final = 4096
EXIT_CANNOT: Final = 1
INIT_SECONDS_MAX: Final = 10.0
OTHER_WAY: Final = (
    "choose plain memfds with --backend memfd, where a private page reads as zeros "
    "instead of SIGBUS"
)

_NO_FAULTS: Final = (
    "plain memfds: a private page reads as zeros instead of SIGBUS, and a fault is not "
    "heard of"
)
_NO_OTHERS: Final = (
    "processes of other users can map a view that they are given, and do no other "
    "system call on it: user_allow_other in /etc/fuse.conf changes that"
)
_NO_PAGE_TABLES: Final = (
    "who maps a page is known from the reports of clients alone: the page tables of "
    "other users' processes cannot be read without CAP_SYS_PTRACE"
)


class CannotKeep(Exception):  # noqa: N818 - says what happened
    """The keeper cannot start; its text says why and what to do."""


class Terminated(Exception):  # noqa: N818 - says what happened
    """Somebody sent SIGTERM or SIGINT."""


@dataclass(frozen=True, slots=True)
class Held:
    """The descriptors that outlive a service, and the numbers that go with them.

    `fds` are the fuse connection, its mount and the store; none for plain memfds.
    `connection_id` is the minor device number of all views. `survival`: the kernel can
    send requests again (HAS_RESEND), so that a successor and whoever stands in for it
    get what a dead service had read; plain memfds need no such thing.
    """

    backend: Backend
    fds: tuple[int, ...]
    nr_pages: int
    connection_id: int
    survival: bool
    attachable: bool = True
    """Whether the mount can be shown at a path as well."""
    limits: tuple[str, ...] = ()
    """What is slower or missing because this user may not do more, as sentences."""

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


@dataclass(frozen=True, slots=True)
class _Mounted:
    """A connection and its mount; the rest as of Held."""

    fuse_fd: int
    mount_fd: int
    attachable: bool = True
    limits: tuple[str, ...] = ()


def log(event: str, **fields: object) -> None:
    """Write one line of JSON to standard error."""
    line = {"event": event, "service": "keeper", "time": round(time.time(), 6)}
    sys.stderr.write(json.dumps(line | fields) + "\n")
    sys.stderr.flush()


def make_memfds() -> Held:
    """Have nothing but a place for the memfds of inodes; needs no privilege."""
    # All memfds lie on one device, which /proc/PID/maps shows for their mappings.
    fd = os.memfd_create("gmem-device", os.MFD_CLOEXEC)
    minor = os.minor(os.fstat(fd).st_dev)
    os.close(fd)
    limits = [_NO_FAULTS]
    if not can_see_other_processes():
        limits.append(_NO_PAGE_TABLES)
    return Held(Backend.MEMFD, (), 0, minor, survival=True, limits=tuple(limits))


def make(nr_pages: int, run_dir: Path) -> Held:
    """Open the connection, mount it nowhere, tune it, and make the store."""
    mounted = _mount(run_dir)
    major, minor = mounts.device_of(mounted.mount_fd)
    limits = [*mounted.limits, *_tune(major, minor)]
    if not can_see_other_processes():
        limits.append(_NO_PAGE_TABLES)
    flags = _answer_init(mounted.fuse_fd)
    return Held(
        backend=Backend.FUSE,
        fds=(mounted.fuse_fd, mounted.mount_fd, _make_store(nr_pages)),
        nr_pages=nr_pages,
        connection_id=minor,
        survival=bool(flags & wire.InitFlag.HAS_RESEND),
        attachable=mounted.attachable,
        limits=tuple(limits),
    )


def _mount(run_dir: Path) -> _Mounted:
    """Mount by ourselves, or, where that is not allowed, by fusermount3."""
    try:
        return _mount_alone()
    except OSError as error:
        alone = error
    try:
        fuse_fd, mount_fd = fusermount.mount(run_dir)
    except OSError as error:
        raise CannotKeep(
            f"cannot mount FUSE: {alone.strerror}, and as an ordinary user: "
            f"{error.strerror}; run as root or with CAP_SYS_ADMIN where /dev/fuse is "
            "(containers: --device /dev/fuse --cap-add SYS_ADMIN), or install fuse3 "
            f"where /dev/fuse is for everybody, or {OTHER_WAY}"
        ) from error
    limits = [f"mounted by fusermount3 as an ordinary user ({alone.strerror})"]
    if not fusermount.others_allowed():
        limits.append(_NO_OTHERS)
    return _Mounted(fuse_fd, mount_fd, attachable=False, limits=tuple(limits))


def _mount_alone() -> _Mounted:
    fuse_fd = _open_fuse()
    try:
        return _Mounted(fuse_fd, mounts.mount_detached(fuse_fd))
    except OSError:
        os.close(fuse_fd)
        raise


def _tune(major: int, minor: int) -> list[str]:
    refused = tuning.tune(major, minor)
    if not refused:
        return []
    place = f"/sys/class/bdi/{major}:{minor}"
    log("not_tuned", refused=refused, hint=f"make {place} writable")
    words = "rewriting guest memory through a mapping is 8 to 10 times slower"
    return [f"{words}: {place} cannot be written"]


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
        words = f"cannot open /dev/fuse: {error.strerror}"
        raise OSError(error.errno, words) from error


def _make_store(nr_pages: int) -> int:
    fd = os.memfd_create("gmem-store", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, nr_pages * PAGE_SIZE)
    # A store cut short would be a SIGBUS of whoever has it mapped.
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd
