"""Run as a script: a process that maps descriptors it is sent, and touches them.

Standard library alone, and no import of gmem, so that it starts in no time. One JSON
object for each message on the socket whose number is the first argument; descriptors
come as ancillary data. It is told what to do and does exactly that: an access to a page
that is refused kills it, as it kills every program.
"""

from __future__ import annotations

import array
import ctypes
import errno
import json
import os
import resource
import socket
import sys
from typing import Any

MESSAGE_BYTES_MAX = 1 << 20
MAP_FAILED = ctypes.c_void_p(-1).value
SYS_MBIND, SYS_GET_MEMPOLICY, SYS_MOVE_PAGES = 237, 239, 279
MPOL_F_ADDR = 1 << 1
NODE_BITS = 64

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
Long = ctypes.c_long


class Mapping:
    """One result of mmap."""

    def __init__(self, address: int, length: int) -> None:
        self.address = address
        self.length = length


class Toucher:
    """The descriptors and mappings of this process."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.fds: list[int] = []
        self.mappings: list[Mapping] = []

    def take(self) -> int:
        """Number the descriptor that came last."""
        return len(self.fds) - 1

    def drop(self, fd: int) -> None:
        """Close a descriptor; its mappings stay."""
        os.close(self.fds[fd])

    def map(self, fd: int, offset: int, length: int, prot: int, flags: int) -> int:
        """Return the number of the mapping."""
        found = libc.mmap(
            None,
            ctypes.c_size_t(length),
            ctypes.c_int(prot),
            ctypes.c_int(flags),
            ctypes.c_int(self.fds[fd]),
            ctypes.c_int64(offset),
        )
        if found == MAP_FAILED:
            raise _last_error()
        self.mappings.append(Mapping(found, length))
        return len(self.mappings) - 1

    def munmap(self, mapping: int) -> None:
        """Drop a mapping."""
        where = self.mappings[mapping]
        _require(libc.munmap(Long(where.address), ctypes.c_size_t(where.length)))

    def madvise(self, mapping: int, advice: int, offset: int, length: int) -> None:
        """Call madvise for a part of a mapping."""
        at = self.mappings[mapping].address + offset
        _require(libc.madvise(Long(at), ctypes.c_size_t(length), ctypes.c_int(advice)))

    def mbind(
        self, mapping: int, offset: int, length: int, mode: int, nodes: int
    ) -> None:
        """Set the policy of a part of a mapping; `nodes` is a bit mask."""
        at = self.mappings[mapping].address + offset
        mask = ctypes.c_ulong(nodes)
        bits = NODE_BITS if nodes else 0
        _require(
            libc.syscall(
                *(Long(SYS_MBIND), Long(at), Long(length), Long(mode)),
                *(ctypes.byref(mask), Long(bits), Long(0)),
            )
        )

    def get_mempolicy(self, mapping: int, offset: int) -> list[int]:
        """Return mode and node mask of the policy at an address."""
        at = self.mappings[mapping].address + offset
        mode, mask = ctypes.c_int(), ctypes.c_ulong()
        _require(
            libc.syscall(
                *(Long(SYS_GET_MEMPOLICY), ctypes.byref(mode), ctypes.byref(mask)),
                *(Long(NODE_BITS), Long(at), Long(MPOL_F_ADDR)),
            )
        )
        return [mode.value, mask.value]

    def node_of(self, mapping: int, offset: int) -> int:
        """Return the node of a page that is mapped here, by move_pages."""
        pages = (ctypes.c_void_p * 1)(self.mappings[mapping].address + offset)
        status = (ctypes.c_int * 1)()
        _require(
            libc.syscall(
                *(Long(SYS_MOVE_PAGES), Long(0), Long(1), pages),
                *(None, status, Long(0)),
            )
        )
        return int(status[0])

    def load(self, mapping: int, offset: int, size: int) -> str:
        """Read bytes; deadly where a page is refused."""
        return ctypes.string_at(self.mappings[mapping].address + offset, size).hex()

    def store(self, mapping: int, offset: int, data: str) -> None:
        """Write bytes; deadly as `load`."""
        written = bytes.fromhex(data)
        at = self.mappings[mapping].address + offset
        ctypes.memmove(at, written, len(written))

    def fill(self, mapping: int, offset: int, size: int, value: int) -> None:
        """Write one value into a range; deadly as `load`."""
        ctypes.memset(self.mappings[mapping].address + offset, value, size)

    def count_other(self, mapping: int, offset: int, size: int, value: int) -> int:
        """Count the bytes of a range that are not `value`; deadly as `load`."""
        found = ctypes.string_at(self.mappings[mapping].address + offset, size)
        return size - found.count(value)

    def fork(self) -> int:
        """Return the pid of a child that goes on with the socket that came last."""
        ours, theirs = self.control, socket.socket(fileno=self.fds.pop())
        pid = os.fork()
        if pid:
            theirs.close()
            return pid
        ours.close()
        self.control = theirs
        return os.getpid()

    def reap(self, pid: int) -> int:
        """Wait for a child; return its exit status, negative for a signal."""
        _, status = os.waitpid(pid, 0)
        return os.waitstatus_to_exitcode(status)


def _require(result: int) -> None:
    if result != 0:
        raise _last_error()


def _last_error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def _receive(toucher: Toucher) -> dict[str, Any] | None:
    fds = array.array("i")
    space = socket.CMSG_SPACE(fds.itemsize)
    data, ancillary, _, _ = toucher.control.recvmsg(MESSAGE_BYTES_MAX, space)
    for _, _, received in ancillary:
        fds.frombytes(received[: len(received) // fds.itemsize * fds.itemsize])
    toucher.fds += fds
    message: dict[str, Any] | None = json.loads(data) if data else None
    return message


def _answer(toucher: Toucher, message: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"ok": getattr(toucher, message["op"])(*message["args"])}
    except OSError as error:
        return {"errno": error.errno or errno.EIO}


def main() -> None:
    """Obey until the other end closes."""
    # The parent sees how this process died; a core file would be for nobody.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    toucher = Toucher(socket.socket(fileno=int(sys.argv[1])))
    while (message := _receive(toucher)) is not None:
        answer = _answer(toucher, message)
        toucher.control.send(json.dumps(answer).encode())
    # Nothing is left to be written, and taking an interpreter down takes its time.
    os._exit(0)


if __name__ == "__main__":
    main()
