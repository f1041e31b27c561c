"""The threads that read requests: each request is answered or parked, never awaited."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from typing import Final

import structlog

from gmem.guest_memfd.core.values import ViewKind
from gmem.guest_memfd.view.calls import Calls
from gmem.guest_memfd.view.channel import Channel
from gmem.guest_memfd.view.counters import Counters
from gmem.guest_memfd.view.faults import Faults
from gmem.guest_memfd.view.files import Files
from gmem.guest_memfd.view.node import ViewNode
from gmem.guest_memfd.view.revokers import keep_only
from gmem.runtime import fusewire as wire
from gmem.runtime.fusewire import BODY, Opcode

log = structlog.get_logger(__name__)

Handler = Callable[[int, int, int, memoryview], "bytes | int | None"]
"""(unique, nodeid, pid, whole request) -> body, negative errno, or None: later."""

# Attributes of the inode never change; there is no directory to change either.
REFUSED: Final[dict[int, int]] = {
    Opcode.SETATTR: errno.EINVAL,
    Opcode.FSYNC: errno.EINVAL,
    **dict.fromkeys(
        (
            Opcode.MKNOD,
            Opcode.MKDIR,
            Opcode.UNLINK,
            Opcode.RMDIR,
            Opcode.RENAME,
            Opcode.RENAME2,
            Opcode.LINK,
            Opcode.CREATE,
        ),
        errno.EPERM,
    ),
}
UNANSWERED: Final = frozenset({Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT})


class Dispatch:
    """What each opcode does; shared by all dispatcher threads."""

    def __init__(
        self,
        nodes: dict[int, ViewNode],
        faults: Faults,
        files: Files,
        calls: Calls,
    ) -> None:
        self._nodes = nodes
        self._faults = faults
        self._files = files
        self._calls = calls
        self._handlers: dict[int, Handler] = {
            Opcode.LOOKUP: self._lookup,
            Opcode.GETATTR: lambda _u, nodeid, _p, _r: files.getattr(nodeid),
            Opcode.OPEN: lambda unique, nodeid, pid, _r: files.open(
                nodeid, pid, unique
            ),
            Opcode.READ: self._read,
            Opcode.WRITE: self._write,
            Opcode.RELEASE: self._release,
            Opcode.FALLOCATE: self._fallocate,
            Opcode.IOCTL: self._ioctl,
            Opcode.READDIR: self._readdir,
            Opcode.STATFS: _statfs,
            Opcode.OPENDIR: lambda *_: wire.OPEN_OUT.pack(0, 0, 0),
            Opcode.RELEASEDIR: lambda *_: b"",
            Opcode.FLUSH: lambda *_: b"",
            Opcode.DESTROY: lambda *_: b"",
        }

    def __call__(
        self, opcode: int, unique: int, nodeid: int, pid: int, request: memoryview
    ) -> bytes | int | None:
        """Carry out one request, as a Handler does."""
        handler = self._handlers.get(opcode)
        if handler is not None:
            return handler(unique, nodeid, pid, request)
        if opcode in UNANSWERED:
            return None
        return -REFUSED.get(opcode, errno.ENOSYS)

    def _lookup(
        self, _unique: int, nodeid: int, pid: int, request: memoryview
    ) -> bytes | int:
        name = request[BODY:].tobytes().partition(b"\0")[0]
        return self._files.lookup(nodeid, name, pid)

    def _read(
        self, unique: int, nodeid: int, pid: int, request: memoryview
    ) -> int | None:
        _fh, offset, size, flags, *_ = wire.READ_IN.unpack_from(request, BODY)
        node = self._nodes.get(nodeid >> 1)
        if node is None:
            return -errno.EIO
        self._faults.read(
            node,
            ViewKind.GUEST if nodeid & 1 else ViewKind.HOST,
            unique=unique,
            pid=pid,
            offset=offset,
            size=size,
            read_flags=flags,
        )
        return None

    def _write(
        self, _unique: int, nodeid: int, _pid: int, request: memoryview
    ) -> bytes | int:
        _fh, offset, size, flags, *_ = wire.WRITE_IN.unpack_from(request, BODY)
        node = self._nodes.get(nodeid >> 1)
        if node is None:
            return -errno.EIO
        stored = self._faults.write(
            node,
            ViewKind.GUEST if nodeid & 1 else ViewKind.HOST,
            offset=offset,
            data=request[wire.WRITE_DATA : wire.WRITE_DATA + size],
            write_flags=flags,
        )
        return stored if stored < 0 else wire.WRITE_OUT.pack(stored, 0)

    def _release(
        self, unique: int, nodeid: int, _pid: int, request: memoryview
    ) -> bytes:
        fh = wire.RELEASE_IN.unpack_from(request, BODY)[0]
        self._files.release(nodeid, fh, unique)
        return b""

    def _fallocate(
        self, unique: int, nodeid: int, pid: int, request: memoryview
    ) -> int | None:
        _fh, offset, length, mode, _ = wire.FALLOCATE_IN.unpack_from(request, BODY)
        if nodeid >> 1 not in self._nodes:
            return -errno.ESTALE
        if nodeid & 1:
            # A guest has no system calls: its vmm punches through the host side.
            return -errno.EOPNOTSUPP
        self._calls.fallocate(
            nodeid >> 1, unique=unique, pid=pid, mode=mode, offset=offset, length=length
        )
        return None

    def _ioctl(
        self, unique: int, nodeid: int, pid: int, request: memoryview
    ) -> int | None:
        if nodeid >> 1 not in self._nodes or nodeid & 1:
            # The root, and a guest's view: whoever converts does it on the host's side.
            return -errno.ENOTTY
        _fh, _flags, cmd, _arg, in_size, out_size = wire.IOCTL_IN.unpack_from(
            request, BODY
        )
        self._calls.ioctl(
            nodeid >> 1,
            unique=unique,
            pid=pid,
            cmd=cmd,
            data=bytes(request[wire.IOCTL_DATA : wire.IOCTL_DATA + in_size]),
            out_size=out_size,
        )
        return None

    def _readdir(
        self, _unique: int, nodeid: int, _pid: int, request: memoryview
    ) -> bytes | int:
        if nodeid != wire.ROOT_ID:
            return -errno.ENOTDIR
        _fh, offset, size, *_ = wire.READ_IN.unpack_from(request, BODY)
        return self._files.readdir(offset, size)


class Dispatcher(threading.Thread):
    """One reader of the fuse descriptor, until the connection or the session ends.

    `finished` is called after each request with the pid of its caller; True means
    that this thread has read its last one. It is asked before the reply is written:
    see `ViewSession.stop`. Of all descriptors it keeps `keep` alone, so that it may
    revoke what an ioctl asks for by itself.
    """

    def __init__(
        self,
        number: int,
        channel: Channel,
        dispatch: Dispatch,
        counters: Counters,
        finished: Callable[[int], bool],
        *,
        keep: frozenset[int],
    ) -> None:
        super().__init__(name=f"view-dispatcher-{number}", daemon=True)
        self._channel = channel
        self._dispatch = dispatch
        self._counters = counters
        self._finished = finished
        self._keep = keep

    def run(self) -> None:
        """Read and answer; with a table of descriptors that may stay open."""
        keep_only(self._keep)
        buffer = self._channel.buffer()
        while length := self._channel.receive(buffer):
            _len, opcode, unique, nodeid, _uid, _gid, pid, _ext, _pad = (
                wire.IN_HEADER.unpack_from(buffer)
            )
            self._counters.add("requests")
            try:
                reply = self._dispatch(opcode, unique, nodeid, pid, buffer[:length])
            except Exception:
                # Our bug. The client must get an error, not wait for ever; and the
                # other clients still need this thread.
                log.exception("request_handler_failed", opcode=opcode, nodeid=nodeid)
                self._counters.add("faulty_handlers")
                reply = None if opcode in _LATER else -errno.EIO
            finished = self._finished(pid)
            if isinstance(reply, int):
                self._channel.refuse(unique, -reply)
            elif reply is not None:
                self._channel.answer(unique, reply)
            if finished:
                return


# Their handlers have answered or parked the request before anything can fail; a
# second answer would be a protocol error.
_LATER: Final = frozenset({Opcode.READ, Opcode.FALLOCATE, Opcode.IOCTL}) | UNANSWERED


def _statfs(_unique: int, _nodeid: int, _pid: int, _request: memoryview) -> bytes:
    return wire.STATFS_OUT.pack(0, 0, 0, 0, 0, 4096, 255, 4096, 0)
