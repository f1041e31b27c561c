"""Counting who has a memfd open, by locks that live as long as an open file does.

Each file that is handed out is opened for that purpose, and an OFD lock of one byte is
set on it, far behind the end of the file. The kernel drops the lock with the last
descriptor and the last mapping of that open file, in whichever process: so the bytes
that are locked are the files that are open. Who asks needs no privilege, and a service
that was started again finds the locks of its predecessor.
"""

from __future__ import annotations

import fcntl
import os
import struct
from typing import Final

from gmem.uapi.errors import Exhausted, Reason

OPENS_MAX: Final = 4096
"""Open files of one view of one inode."""
_BASE: Final = 1 << 62
# The commands of fcntl(2) that Python 3.11 has no names for, and struct flock.
_F_OFD_GETLK, _F_OFD_SETLK = 36, 37
_FLOCK: Final = struct.Struct("@hhqqi4x")


def open_counted(fd: int, flags: int) -> int:
    """Open the file behind `fd` anew, and count it until its last user is gone."""
    taken = set(open_numbers(fd))
    number = next((n for n in range(OPENS_MAX) if n not in taken), None)
    if number is None:
        raise Exhausted(
            Reason.LIMIT_REACHED,
            f"{OPENS_MAX} files of this view are open: close one",
            limit=OPENS_MAX,
        )
    opened = os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)
    try:
        fcntl.fcntl(opened, _F_OFD_SETLK, _flock(number, 1))
    except BaseException:
        os.close(opened)
        raise
    return opened


def open_numbers(fd: int) -> list[int]:
    """Return the numbers of the counted files; `fd` itself is none of them."""
    found: list[int] = []
    gaps = [(0, OPENS_MAX)]
    while gaps:
        start, stop = gaps.pop()
        number = _one_in(fd, start, stop)
        if number is not None:
            found.append(number)
            gaps += [(start, number), (number + 1, stop)]
    return found


def _one_in(fd: int, start: int, stop: int) -> int | None:
    """Return some counted number of `[start, stop)`."""
    if start >= stop:
        return None
    answer = fcntl.fcntl(fd, _F_OFD_GETLK, _flock(start, stop - start))
    kind, _whence, at, _length, _pid = _FLOCK.unpack(answer)
    return None if kind == fcntl.F_UNLCK else at - _BASE


def _flock(number: int, length: int) -> bytes:
    return _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _BASE + number, length, 0)
