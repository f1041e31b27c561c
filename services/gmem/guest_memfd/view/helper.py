"""The invalidation helper: a process whose uninterruptible sleep holds nothing else.

Writing INVAL_INODE to /dev/fuse blocks, beyond the reach of any signal, until the
dirty pages of the range have been written back and answered. So it is done here: a
process that owns the fuse descriptor, the views it was handed for sync_file_range,
and one end of a socket pair. A killed service is reaped at once, with all its ports
and locks; this process ends at the end of input, or with the connection.

Run as a script with `python -I -S`: standard library only, nothing of the project.
Requests and replies are single packets; see `REQUEST` and `REPLY`.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import sys
import threading

# operation, ticket, node id, offset, length; ADD_VIEW comes with one descriptor.
REQUEST = struct.Struct("<BQQqq")
# ticket, errno
REPLY = struct.Struct("<Qi")
INVALIDATE, SYNC_AND_INVALIDATE, ADD_VIEW, DROP_VIEW = 1, 2, 3, 4

INVAL_INODE = struct.Struct("<IiQQqq")
NOTIFY_INVAL_INODE = 2
# SYNC_FILE_RANGE_WAIT_BEFORE | WRITE | WAIT_AFTER
SYNC_FILE_RANGE_ALL = 7

libc = ctypes.CDLL(None, use_errno=True)
libc.sync_file_range.argtypes = [
    ctypes.c_int,
    ctypes.c_int64,
    ctypes.c_int64,
    ctypes.c_uint,
]


def invalidate(fuse_fd: int, nodeid: int, offset: int, length: int) -> int:
    """Drop a range from every mapping; the errno. A node nobody looked up is done."""
    message = INVAL_INODE.pack(
        INVAL_INODE.size, NOTIFY_INVAL_INODE, 0, nodeid, offset, length
    )
    try:
        os.write(fuse_fd, message)
    except FileNotFoundError:
        return 0
    except OSError as error:
        return error.errno or 5
    return 0


def sync(view_fd: int, offset: int, length: int) -> int:
    """Write back what is dirty in large pieces: INVAL alone sends page by page."""
    if libc.sync_file_range(view_fd, offset, length, SYNC_FILE_RANGE_ALL) != 0:
        return ctypes.get_errno()
    return 0


def obey(fuse_fd: int, views: dict[int, int], request: bytes, fds: list[int]) -> int:
    """Carry out one request; the errno."""
    operation, _ticket, nodeid, offset, length = REQUEST.unpack(request)
    if operation == ADD_VIEW:
        views[nodeid] = fds.pop()
        return 0
    if operation == DROP_VIEW:
        fd = views.pop(nodeid, None)
        if fd is not None:
            os.close(fd)
        return 0
    view_fd = views.get(nodeid)
    if operation == SYNC_AND_INVALIDATE and view_fd is not None:
        # A writeback error is the dispatcher's to count; the pages go either way.
        sync(view_fd, offset, length)
    return invalidate(fuse_fd, nodeid, offset, length)


def serve(control: socket.socket, fuse_fd: int, views: dict[int, int]) -> None:
    """Obey packets until the end of input. Several threads share the socket."""
    flags = socket.MSG_CMSG_CLOEXEC
    while True:
        try:
            request, fds, _flags, _address = socket.recv_fds(control, 64, 1, flags)
        except ConnectionResetError:
            # Killed before it had read an answer of ours.
            request, fds = b"", []
        if not request:
            # Other threads may sleep in the kernel for ever: leave without them.
            os._exit(0)
        error = obey(fuse_fd, views, request, list(fds))
        try:
            control.send(REPLY.pack(REQUEST.unpack(request)[1], error))
        except (BrokenPipeError, ConnectionResetError):
            os._exit(0)


def serve_line(line: socket.socket, fuse_fd: int) -> None:
    """Invalidate what comes over one line, until the end of input."""
    while True:
        try:
            request = line.recv(REQUEST.size)
            if not request:
                os._exit(0)
            _operation, ticket, nodeid, offset, length = REQUEST.unpack(request)
            line.send(REPLY.pack(ticket, invalidate(fuse_fd, nodeid, offset, length)))
        except (BrokenPipeError, ConnectionResetError):
            os._exit(0)


def main() -> None:
    """Serve `FUSE_FD CONTROL_FD THREADS LINE_FD...`, the arguments of the script.

    A line is a socket of its own for one asker at a time, with a thread of its own.
    """
    fuse_fd, control_fd, threads, *line_fds = (int(word) for word in sys.argv[1:])
    control = socket.socket(fileno=control_fd)
    views: dict[int, int] = {}
    for line_fd in line_fds:
        line = socket.socket(fileno=line_fd)
        threading.Thread(target=serve_line, args=(line, fuse_fd), daemon=True).start()
    for _ in range(threads - 1):
        threading.Thread(
            target=serve, args=(control, fuse_fd, views), daemon=True
        ).start()
    serve(control, fuse_fd, views)


if __name__ == "__main__":
    main()
