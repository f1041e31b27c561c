"""Names, opens and attributes: who may have which view.

A host view is `inode-<ino>` below the root. A guest view has no name. The session
opens one under a secret of 256 bits that exists while `open_view` runs, and only for
the thread that runs it; an OPEN of a guest view by anybody else is refused, so that a
descriptor seen in /proc cannot be opened a second time.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from gmem.guest_memfd.core.values import ViewKind
from gmem.guest_memfd.view.callbacks import ViewCallbacks
from gmem.guest_memfd.view.counters import Counters
from gmem.guest_memfd.view.node import ViewNode
from gmem.runtime import fusewire as wire
from gmem.uapi.errors import InUse, Reason
from gmem.uapi.pages import PAGE_SIZE

NAME_PREFIX: Final = "inode-"
SECRET_BYTES: Final = 32
FILE_MODE: Final = stat.S_IFREG | 0o600
ROOT_MODE: Final = stat.S_IFDIR | 0o555


@dataclass(eq=False, slots=True)
class Admission:
    """One `open_view` under way: which node, by which thread, for whom."""

    nodeid: int
    tid: int
    internal: bool
    looked_up: bool = False


class Files:
    """Answers what is not READ or WRITE; the bodies of replies, or a negative errno."""

    def __init__(
        self,
        nodes: dict[int, ViewNode],
        callbacks: ViewCallbacks,
        counters: Counters,
    ) -> None:
        self._nodes = nodes
        self._callbacks = callbacks
        self._counters = counters
        self._admissions: dict[bytes, Admission] = {}
        self._opening: dict[int, Admission] = {}
        # Held while a count is reported, so that reports come in the counts' order.
        self._reporting = threading.Lock()

    def lookup(self, parent: int, name: bytes, pid: int) -> bytes | int:
        """Find a host view by name, a guest view by the secret of this very thread."""
        if parent != wire.ROOT_ID:
            return -errno.ENOTDIR
        nodeid = self._nodeid_of_secret(name, pid) or self._nodeid_of_name(name)
        node = self._nodes.get(nodeid >> 1)
        if node is None:
            return -errno.ENOENT
        return wire.pack_entry(nodeid, self.attributes(node, ViewKind(nodeid & 1)))

    def getattr(self, nodeid: int) -> bytes | int:
        """Return the attributes of the root or of a view; -ESTALE for what is gone."""
        if nodeid == wire.ROOT_ID:
            return wire.pack_attr(_root_attributes())
        node = self._nodes.get(nodeid >> 1)
        if node is None:
            return -errno.ESTALE
        return wire.pack_attr(self.attributes(node, ViewKind(nodeid & 1)))

    def attributes(self, node: ViewNode, view: ViewKind) -> wire.Attributes:
        """Return what fstat shows: the inode's size, its page size as st_blksize."""
        table = node.table
        return wire.Attributes(
            ino=wire.nodeid_of(node.ino, view),
            size=table.i_size,
            allocated=table.allocated_bytes if node.counts_blocks else 0,
            block_size=table.page_size,
            mode=FILE_MODE,
            uid=os.getuid(),
            gid=os.getgid(),
        )

    def readdir(self, offset: int, size: int) -> bytes:
        """List the host views."""
        names = [(ino << 1, f"{NAME_PREFIX}{ino}") for ino in sorted(self._nodes)]
        return wire.pack_dirents(names, offset, size)

    def open(self, nodeid: int, pid: int, unique: int) -> bytes | int:
        """Open a view; a guest view only for the thread that looked up its secret."""
        node = self._nodes.get(nodeid >> 1)
        if node is None:
            return -errno.ESTALE
        view = ViewKind(nodeid & 1)
        admission = self._opening.get(pid)
        if admission is not None and admission.nodeid != nodeid:
            admission = None
        if view is ViewKind.GUEST and admission is None:
            self._counters.add("opens_refused")
            return -errno.EACCES
        if admission is not None and admission.internal:
            return wire.pack_open(nodeid | wire.INTERNAL_FH)
        self._counters.add("opens")
        with self._reporting:
            before = node.table.opens(view)
            count = node.table.count_open(view, unique)
            if count > before:
                self._callbacks.opened(node.ino, view, count)
        mmap = view is ViewKind.GUEST or node.host_mmap
        return wire.pack_open(nodeid, mmap=mmap)

    def release(self, nodeid: int, fh: int, unique: int) -> None:
        """Forget an open file; those the session had for itself were never counted."""
        node = self._nodes.get(nodeid >> 1)
        if node is None or fh & wire.INTERNAL_FH:
            return
        self._counters.add("releases")
        view = ViewKind(nodeid & 1)
        with self._reporting:
            before = node.table.opens(view)
            count = node.table.count_release(view, unique)
            if count < before:
                self._callbacks.released(node.ino, view, count)

    @contextmanager
    def admitted(self, nodeid: int, *, internal: bool) -> Iterator[str]:
        """Yield a name under which this thread, and no other, may open a node now."""
        admission = Admission(nodeid, threading.get_native_id(), internal)
        name = secrets.token_hex(SECRET_BYTES)
        self._admissions[name.encode()] = admission
        try:
            yield name
        finally:
            self._admissions.pop(name.encode(), None)
            self._opening.pop(admission.tid, None)

    def _nodeid_of_secret(self, name: bytes, pid: int) -> int:
        admission = self._admissions.get(name)
        if admission is None or admission.tid != pid or admission.looked_up:
            return 0
        admission.looked_up = True
        self._opening[pid] = admission
        return admission.nodeid

    @staticmethod
    def _nodeid_of_name(name: bytes) -> int:
        prefix, digits = name[: len(NAME_PREFIX)], name[len(NAME_PREFIX) :]
        if prefix != NAME_PREFIX.encode() or not digits.isdigit():
            return 0
        ino = int(digits)
        # Only the name that readdir shows: not inode-007.
        if digits != str(ino).encode() or ino == 0:
            return 0
        return wire.nodeid_of(ino, ViewKind.HOST)


def open_by_name(mount_fd: int, ino: int) -> int:
    """Open the host view of `ino` as anybody could; /proc/PID/maps shows its name."""
    return _open(mount_fd, f"{NAME_PREFIX}{ino}")


def open_by_secret(mount_fd: int, files: Files, nodeid: int, *, internal: bool) -> int:
    """Open a view under a name that nobody else learns, and return its descriptor."""
    with files.admitted(nodeid, internal=internal) as name:
        return _open(mount_fd, name)


def _open(mount_fd: int, name: str) -> int:
    try:
        return os.open(name, os.O_RDWR | os.O_CLOEXEC, dir_fd=mount_fd)
    except OSError as error:
        raise InUse(
            Reason.BINDING_BROKEN,
            f"the view cannot be opened ({error.strerror}): the inode or the fuse "
            "connection is gone; restart the guest_memfd service",
        ) from error


def _root_attributes() -> wire.Attributes:
    return wire.Attributes(
        ino=wire.ROOT_ID,
        size=0,
        allocated=0,
        block_size=PAGE_SIZE,
        mode=ROOT_MODE,
        uid=os.getuid(),
        gid=os.getgid(),
    )
