"""``python -m tests.support.view_client CONTROL_FD``: a process that maps a view.

Obeys messages on CONTROL_FD (fdpass). A plain `load` or `store` of a page it may not
touch kills it with SIGBUS, as any program.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import select
import socket
import sys
import time
from typing import Any

from gmem.runtime import fdpass

PAGE = 4096

libc = ctypes.CDLL(None, use_errno=True)
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, *[ctypes.c_int64] * 2]
libc.msync.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    *[ctypes.c_int] * 3,
    ctypes.c_int64,
]
libc.sync_file_range.argtypes = [
    ctypes.c_int,
    *[ctypes.c_int64] * 2,
    ctypes.c_uint,
]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mmap.restype = ctypes.c_void_p


def name_of(error: OSError) -> str:
    """The errno's name; Python knows 95 by its other name."""
    name = errno.errorcode[error.errno or 0]
    return "EOPNOTSUPP" if name == "ENOTSUP" else name


class Client:
    """One mapping and one open file."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.fd = -1
        self.address = self.length = 0
        self.view: memoryview
        self.scratch = os.memfd_create("scratch")

    def open(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDWR)

    def mmap(self, length: int) -> None:
        # Not mmap.mmap: it refuses to map past the end, which the kernel allows.
        address = libc.mmap(None, length, 3, mmap.MAP_SHARED, self.fd, 0)
        assert address != ctypes.c_void_p(-1).value
        self.address, self.length = address, length
        memory = (ctypes.c_uint8 * length).from_address(address)
        self.view = memoryview(memory).cast("B")

    def load(self, offset: int, count: int = 1) -> str:
        return bytes(self.view[offset : offset + count]).decode("latin1")

    def store(self, offset: int, text: str) -> None:
        self.view[offset : offset + len(text)] = text.encode()

    def fill(self, offset: int, length: int, text: str) -> None:
        for at in range(offset, offset + length, PAGE):
            self.view[at : at + len(text)] = text.encode()

    def read(self, offset: int) -> str:
        """Read one byte safely: EFAULT instead of SIGBUS."""
        try:
            os.pwrite(self.scratch, self.view[offset : offset + 1], 0)
        except OSError as error:
            return name_of(error)
        return os.pread(self.scratch, 1, 0).decode("latin1")

    def hammer(self, offsets: list[int], kind: str) -> dict[str, int]:
        """Touch pages until the next message; count rounds and bytes seen as zero."""
        rounds = zeros = 0
        longest = 0.0
        while not select.select([self.control], [], [], 0)[0]:
            before = time.monotonic()
            for at in offsets:
                if kind == "write":
                    self.view[at] = rounds & 0x7F | 0x80
                else:
                    zeros += self.view[at] == 0
            longest = max(longest, time.monotonic() - before)
            rounds += 1
        return {"rounds": rounds, "zeros": zeros, "longest_ms": int(longest * 1e3)}

    def call(self, name: str, *args: Any) -> Any:
        """Make a system call on the file; the errno's name if it fails."""
        try:
            return getattr(self, f"_{name}")(*args)
        except OSError as error:
            return name_of(error)

    def _fallocate(self, mode: int, offset: int, length: int) -> int:
        if libc.fallocate(self.fd, mode, offset, length) != 0:
            raise OSError(ctypes.get_errno(), "fallocate")
        return 0

    def _ftruncate(self, size: int) -> None:
        os.ftruncate(self.fd, size)

    def _fsync(self) -> None:
        os.fsync(self.fd)

    def _msync(self) -> None:
        if libc.msync(self.address, self.length, 4) != 0:
            raise OSError(ctypes.get_errno(), "msync")

    def _sync_and_forget(self, offset: int, length: int) -> None:
        """Write pages back, and drop them from the page cache."""
        if libc.sync_file_range(self.fd, offset, length, 7) != 0:
            raise OSError(ctypes.get_errno(), "sync_file_range")
        if libc.madvise(self.address + offset, length, mmap.MADV_DONTNEED) != 0:
            raise OSError(ctypes.get_errno(), "madvise")
        os.posix_fadvise(self.fd, offset, length, os.POSIX_FADV_DONTNEED)

    def _lseek(self) -> int:
        return os.lseek(self.fd, 0, os.SEEK_SET)

    def _ioctl(self) -> int:
        return len(fcntl.ioctl(self.fd, 0xC010AF41, bytes(16)))

    def _write(self, text: str) -> int:
        return os.write(self.fd, text.encode())

    def _direct_write(self) -> int:
        fcntl.fcntl(self.fd, fcntl.F_SETFL, os.O_DIRECT)
        return os.writev(self.fd, [mmap.mmap(-1, PAGE)])

    def _exec_map(self) -> None:
        mmap.mmap(self.fd, PAGE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_EXEC)

    def _reopen(self, pid: int, fd: int) -> None:
        os.close(os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR))

    def _fstat(self) -> dict[str, int]:
        found = os.fstat(self.fd)
        names = ("st_size", "st_blksize", "st_blocks", "st_ino")
        return {name: getattr(found, name) for name in names}

    def fds(self) -> int:
        return self.fd


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    client = Client(control)
    while (message := fdpass.receive(control)) is not None:
        op = message.fields.pop("op")
        if message.fds:
            client.fd = message.fds[0]
        args = message.fields.pop("args", [])
        fdpass.send(control, {"ok": getattr(client, op)(*args)})


if __name__ == "__main__":
    main()
