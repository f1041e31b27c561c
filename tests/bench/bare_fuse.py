"""``python -m tests.bench.bare_fuse CONTROL_FD``: the least that a FUSE server can do.

One file of 1 GiB, one thread, bytes from one memfd; no states, no locks, no counters.
Sends the O_PATH descriptor of its detached mount over CONTROL_FD and serves until
somebody ends the process. Standard library, and `gmem.keeper.mounts` for the mount.
"""

from __future__ import annotations

import array
import errno
import mmap
import os
import socket
import struct
import sys

from gmem.keeper import mounts

SIZE = 1 << 30
ROOT, FILE = 1, 2
LOOKUP, FORGET, GETATTR, OPEN, READ, WRITE, RELEASE = 1, 2, 3, 14, 15, 16, 18
FLUSH, INIT, INTERRUPT, IOCTL, BATCH_FORGET = 25, 26, 36, 39, 42
HEADER = struct.Struct("<IIQQIIIHH")
REPLY = struct.Struct("<IiQ")
# ASYNC_READ | BIG_WRITES | MAX_PAGES, as the service has them.
INIT_FLAGS = 1 << 0 | 1 << 5 | 1 << 22
KEEP_CACHE = 1 << 1


def attributes(node: int) -> bytes:
    mode = 0o100600 if node == FILE else 0o40555
    size = SIZE if node == FILE else 0
    owner = os.getuid(), os.getgid()
    return struct.pack(
        "<6Q10I", node, size, size // 512, *(0,) * 6, mode, 1, *owner, 0, 4096, 0
    )


def answer(store: memoryview, opcode: int, node: int, body: memoryview) -> bytes | int:
    """Return the body of the reply, or a negative errno."""
    if opcode == IOCTL:
        # Its result 0, and the bytes that came.
        size = struct.unpack_from("<I", body, 24)[0]
        return bytes(16) + bytes(body[32 : 32 + size])
    if opcode == READ:
        offset, size = struct.unpack_from("<QI", body, 8)
        return bytes(store[offset : offset + size])
    if opcode == WRITE:
        offset, size = struct.unpack_from("<QI", body, 8)
        store[offset : offset + size] = body[40 : 40 + size]
        return struct.pack("<II", size, 0)
    if opcode == LOOKUP:
        return struct.pack("<QQQQII", FILE, *(0,) * 5) + attributes(FILE)
    if opcode == GETATTR:
        return struct.pack("<QII", 0, 0, 0) + attributes(node)
    if opcode == OPEN:
        return struct.pack("<QIi", node, KEEP_CACHE, 0)
    if opcode == INIT:
        limits = 64, 48, 32 << 12, 1, 32, 0
        return struct.pack("<IIIIHHIIHH32x", 7, 31, 1 << 20, INIT_FLAGS, *limits)
    return b"" if opcode in (RELEASE, FLUSH) else -errno.ENOSYS


def serve(fuse_fd: int, store: memoryview) -> None:
    buffer = memoryview(bytearray((32 << 12) + (1 << 12)))
    while True:
        try:
            length = os.readv(fuse_fd, [buffer])
        except OSError as error:
            if error.errno == errno.ENODEV:
                return
            raise
        _len, opcode, unique, node, *_ = HEADER.unpack_from(buffer)
        if opcode in (FORGET, BATCH_FORGET, INTERRUPT):
            continue
        body = answer(store, opcode, node, buffer[HEADER.size : length])
        if isinstance(body, int):
            os.write(fuse_fd, REPLY.pack(REPLY.size, body, unique))
        else:
            os.write(fuse_fd, REPLY.pack(REPLY.size + len(body), 0, unique) + body)


def main() -> None:
    fuse_fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    mount_fd = mounts.mount_detached(fuse_fd)
    store_fd = os.memfd_create("bare-store")
    os.ftruncate(store_fd, SIZE)
    fds = array.array("i", [mount_fd])
    with socket.socket(fileno=int(sys.argv[1])) as control:
        control.sendmsg([b"m"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
        os.close(mount_fd)
        serve(fuse_fd, memoryview(mmap.mmap(store_fd, SIZE)))


if __name__ == "__main__":
    main()
