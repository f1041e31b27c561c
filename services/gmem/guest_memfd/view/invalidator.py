"""Revocation: INVAL_INODE, written by threads that hold nothing else.

Every call sleeps in the kernel, beyond the reach of any signal, until the dirty pages
of its range have been written back and answered: see `revokers` for who may make it.
No more than `at_once` run at the same time, fewer than there are dispatchers.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Iterable
from typing import Final

from gmem.guest_memfd.view.revokers import is_bare
from gmem.runtime.fusewire import pack_inval
from gmem.uapi.errors import InUse, Reason

# Up to here INVAL alone is as fast as sync_file_range before it.
SYNC_PAGES_MIN: Final = 17
# SYNC_FILE_RANGE_WAIT_BEFORE | WRITE | WAIT_AFTER
_SYNC_FILE_RANGE_ALL: Final = 7

_libc = ctypes.CDLL(None, use_errno=True)
_libc.sync_file_range.argtypes = [
    ctypes.c_int,
    ctypes.c_int64,
    ctypes.c_int64,
    ctypes.c_uint,
]


class Invalidator:
    """Writes invalidations to the connection `fuse_fd`; from any thread that may."""

    def __init__(self, fuse_fd: int, at_once: int) -> None:
        self._fuse_fd = fuse_fd
        self._places = threading.BoundedSemaphore(at_once)

    def invalidate(self, nodeid: int, ranges: Iterable[tuple[int, int]]) -> None:
        """Drop ranges (offset, length) of a view from every mapping; blocks.

        Dirty bytes come back as WRITE first. InUse when the connection is gone: the
        caller must not go on as if the pages were revoked.
        """
        assert is_bare(), threading.current_thread().name
        with self._places:
            for offset, length in ranges:
                self._write(pack_inval(nodeid, offset, length))

    def write_back(self, view_fd: int, offset: int, length: int) -> None:
        """Have dirty pages come back in large pieces: INVAL sends one after another.

        A writeback error is the dispatcher's to count; the pages go either way.
        """
        assert is_bare(), threading.current_thread().name
        with self._places:
            _libc.sync_file_range(view_fd, offset, length, _SYNC_FILE_RANGE_ALL)

    def _write(self, message: bytes) -> None:
        try:
            os.write(self._fuse_fd, message)
        except FileNotFoundError:
            # A node that nobody has looked up: nothing is cached.
            return
        except OSError as error:
            name = errno.errorcode.get(error.errno or 0, str(error))
            raise InUse(
                Reason.BINDING_BROKEN,
                f"the range could not be invalidated ({name}): the connection is "
                "gone; restart the guest_memfd service",
            ) from error
