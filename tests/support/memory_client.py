"""``python -m tests.support.memory_client CONTROL_FD RUN_DIR``: maps a view by token.

A client program as people write them: no loop, no gRPC; the view comes through the
broker and is used through `gmem.memory`. Obeys messages on CONTROL_FD (fdpass), and
answers what a MappedWindow raises as values. `raw_load` and `raw_store` are plain
accesses: on a page that is refused they kill this process by SIGBUS, as any other.
RUN_DIR is there for the audit of what tests leave behind.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import select
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from gmem.memory import MappedWindow
from gmem.runtime import fdpass
from gmem.runtime.broker_client import BrokerClient
from gmem.uapi.errors import KernelError, TransportError
from gmem.uapi.flags import (
    KVM_GMEM_CONVERT_PRIVATE,
    KVM_GMEM_CONVERT_SHARED,
    KVM_MEMORY_ATTRIBUTES2_FORMAT,
    KVM_SET_MEMORY_ATTRIBUTES2,
)
from gmem.uapi.pages import PAGE_SIZE

MAP_FAILED = (1 << 64) - 1

libc = ctypes.CDLL(None, use_errno=True)
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, *[ctypes.c_int64] * 2]
libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    *[ctypes.c_int] * 3,
    ctypes.c_int64,
]
libc.mmap.restype = ctypes.c_void_p


class MemoryClient:
    """One broker connection, the descriptors it took, and at most one window."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.broker: BrokerClient
        self.fd = -1
        self.states: int | None = None
        self.window: MappedWindow

    def hello(self, broker: str, client: str, incarnation: str) -> int:
        """Connect under a name that /proc shows as well."""
        Path("/proc/self/comm").write_text(client)
        self.broker = BrokerClient(Path(broker), client, incarnation)
        return os.getpid()

    def take(self, token: str) -> int:
        self.fd, *states = self.broker.take_all(token)
        self.states = states[0] if states else None
        return self.fd

    def map(self, offset: int = 0, size: int | None = None) -> int:
        target = str(self.broker.path)
        self.window = MappedWindow(
            self.fd,
            offset,
            size,
            connection=self.broker,
            target=target,
            states=self.states,
        )
        return self.window.size

    def give(self, size: int, value: int) -> str:
        """Give the broker a memfd of `size` bytes, all of them `value`."""
        fd = os.memfd_create("given")
        os.pwrite(fd, bytes([value]) * size, 0)
        return self.broker.give(fd, "given")

    def give_view(self) -> str:
        return self.broker.give(self.fd, "view")

    def give_unreadable(self, path: str) -> str:
        """Give a file with bytes that is open for writing alone."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.ftruncate(fd, 1 << 20)
        return self.broker.give(fd, "blind")

    # Safe accesses.

    def read(self, offset: int, size: int = 1) -> str:
        return self.window.read(offset, size).hex()

    def write(self, offset: int, value: int, size: int = 1) -> None:
        self.window.fill(value, offset, size)

    def count_other(self, offset: int, size: int, value: int) -> int:
        """Count the bytes of a range that are not `value`."""
        copied = np.frombuffer(self.window.read(offset, size), np.uint8)
        return int((copied != value).sum())

    def dont_need(self, offset: int = 0, size: int | None = None) -> None:
        self.window.dont_need(offset, size)

    def require_alive(self) -> None:
        self.window.require_alive()

    # Deadly ones.

    def raw_load(self, offset: int) -> int:
        return int(self.window.array[offset])

    def raw_store(self, offset: int, value: int) -> None:
        self.window.array[offset] = value

    def raw_load_past_the_end(self, size: int) -> int:
        """Map `size` bytes, more than the file has, and read the last of them."""
        return self.raw_load_in(size, size - 1)

    def raw_load_in(self, size: int, at: int) -> int:
        """Map `size` bytes, more than the file has, and read byte `at`."""
        flags = mmap.PROT_READ | mmap.PROT_WRITE
        address = libc.mmap(None, size, flags, mmap.MAP_SHARED, self.fd, 0)
        assert address != MAP_FAILED, os.strerror(ctypes.get_errno())
        return int((ctypes.c_uint8 * size).from_address(address)[at])

    def count_up(self, offsets: list[int]) -> dict[str, int]:
        """Add 1 to the first eight bytes of each page until the next message comes."""
        words = [self.window.array[at : at + 8].view(np.uint64) for at in offsets]
        for word in words:
            # A load would map cached neighbours as well (filemap_map_pages).
            word[0] = 0
        rounds = 0
        longest = 0.0
        while not select.select([self.control], [], [], 0)[0]:
            before = time.monotonic()
            for word in words:
                word[0] += np.uint64(1)
            longest = max(longest, time.monotonic() - before)
            rounds += 1
        return {"rounds": rounds, "longest_ms": int(longest * 1e3)}

    def counters(self, offsets: list[int]) -> list[int]:
        return [
            int.from_bytes(self.window.read(at, 8), sys.byteorder) for at in offsets
        ]

    def fork_and_touch(self, offset: int) -> int:
        """Fork a child that stores to a page again and again; return its pid.

        It has the page mapped already when this returns. No thread was started here.
        """
        ready, told = os.pipe()
        child = os.fork()
        if child == 0:
            self.window.array[offset] = 1
            os.write(told, b"x")
            while True:
                self.window.array[offset] += 1
        os.close(told)
        os.read(ready, 1)
        os.close(ready)
        return child

    def end_of_child(self, child: int) -> int:
        """Wait for the end of a child; return the signal that it died of, or 0."""
        _, status = os.waitpid(child, 0)
        return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0

    # System calls on the descriptor.

    def fstat(self) -> dict[str, int]:
        found = os.fstat(self.fd)
        names = ("st_size", "st_blksize", "st_blocks", "st_ino")
        return {name: getattr(found, name) for name in names}

    def fallocate(self, mode: int, offset: int, length: int) -> None:
        if libc.fallocate(self.fd, mode, offset, length) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def madvise(self, advice: int) -> int:
        """Make one madvise over the whole window; return its errno, 0 for none."""
        address = self.window.array.ctypes.data
        found = libc.madvise(ctypes.c_void_p(address), self.window.size, advice)
        return 0 if found == 0 else ctypes.get_errno()

    def convert(
        self, request: int, offset: int, size: int, error_offset: int = 0
    ) -> dict[str, int]:
        """Make one ioctl with struct kvm_gmem_convert; return errno and the struct."""
        argument = bytearray(struct.pack("=QQQ", offset, size, error_offset))
        try:
            fcntl.ioctl(self.fd, request, argument)
            number = 0
        except OSError as error:
            number = error.errno or -1
        offset, size, error_offset = struct.unpack("=QQQ", argument)
        return {
            "errno": number,
            "offset": offset,
            "size": size,
            "error_offset": error_offset,
        }

    def set_attributes(
        self, offset: int, size: int, attributes: int, words: dict[str, int]
    ) -> dict[str, int]:
        """Make KVM_SET_MEMORY_ATTRIBUTES2; return errno, and the words that changed.

        `words` has flags, error_offset and reserved words by their place in the struct.
        """
        given = [offset, size, attributes, *[0] * 13]
        for place, word in words.items():
            given[int(place)] = word
        argument = bytearray(struct.pack(KVM_MEMORY_ATTRIBUTES2_FORMAT, *given))
        try:
            fcntl.ioctl(self.fd, KVM_SET_MEMORY_ATTRIBUTES2, argument)
            number = 0
        except OSError as error:
            number = error.errno or -1
        found = struct.unpack(KVM_MEMORY_ATTRIBUTES2_FORMAT, argument)
        pairs = enumerate(zip(given, found, strict=True))
        changed = {str(place): new for place, (old, new) in pairs if old != new}
        return {"errno": number, **changed}

    def convert_often(self, offset: int, size: int, times: int) -> dict[str, int]:
        """Make pages private and shared again; count how often which errno came."""
        requests = (KVM_GMEM_CONVERT_PRIVATE, KVM_GMEM_CONVERT_SHARED)
        numbers = [
            self.convert(request, offset, size)["errno"]
            for _ in range(times)
            for request in requests
        ]
        return {str(number): numbers.count(number) for number in numbers}

    def ftruncate(self, size: int) -> None:
        os.ftruncate(self.fd, size)

    def pages(self) -> int:
        return self.window.size // PAGE_SIZE


def answer(client: MemoryClient, fields: dict[str, Any]) -> dict[str, Any]:
    """Do one thing; what it refuses is an answer."""
    method = getattr(client, fields["op"])
    try:
        return {"ok": method(*fields.get("args", []))}
    except KernelError as error:
        return {"kernel_error": error.reason.value, "numbers": error.numbers}
    except TransportError as error:
        return {"transport_error": str(error)}
    except OSError as error:
        return {"os_error": errno.errorcode[error.errno or 0], "text": str(error)}


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    client = MemoryClient(control)
    while (message := fdpass.receive(control)) is not None:
        fdpass.send(control, answer(client, message.fields))


if __name__ == "__main__":
    main()
